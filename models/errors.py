"""Errors of loading and running models, and how an error of a library is quoted."""

import re

from diptych.models.files.location import redacted


class ModelError(Exception):
    """A model, or a file of one, that cannot be used: one paragraph with the value, what is expected, the remedy.

    Messages name options in backquotes (`device`); a command shows them as its flags.

    Args:
        message: The paragraph; URLs in it lose their users, passwords and signatures.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class ModelOutageError(ModelError):
    """A model that its storage does not give now, and may give at a second try."""


class ModelOptionError(ModelError):
    """An option that the model does not take: the choice is wrong, not the model."""


# What differs between two runs that go wrong in the same way: addresses in memory, and the random names of `tempfile`
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+\b| ?\b0x[0-9a-fA-F]{9,16}\b")
_TEMPORARY = re.compile(r"(?:/[^\s/'\"<>]+)*/(?:tmp|diptych-[a-z]+-)[a-z0-9_]{8}(?![a-z0-9_])")


def one_line(error: BaseException, max_chars: int = 300, with_type: bool = False) -> str:
    """Returns what an error of a library says, to be quoted in a message: the same in every run.

    Args:
        error: The error. One that says nothing is quoted by the name of its class.
        max_chars: Most characters of the result.
        with_type: Begin with the name of the error's class.
    """
    message, name = " ".join(str(error)[:10_000].split()), type(error).__name__
    message = redacted(_TEMPORARY.sub("a temporary file", _ADDRESS.sub("", message)))
    return (f"{name}: {message}" if with_type and message else message or name)[:max_chars]
