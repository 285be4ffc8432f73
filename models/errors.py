"""Errors of loading and running models, and the quotation of a library's errors."""

import re

from diptych.models.files.location import redacted


class ModelError(Exception):
    """A model, or one of its files, cannot be used.

    Messages name options in backquotes (`device`); a command shows them as its flags.

    Args:
        message: One paragraph with the value, the expectation and the remedy; users, passwords and signatures are
            removed from its URLs.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class ModelOutageError(ModelError):
    """A model's storage does not respond; a second try may succeed."""


class ModelOptionError(ModelError):
    """The model does not support an option."""


# The parts of messages that differ from run to run: memory addresses and the random names of `tempfile`
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+\b| ?\b0x[0-9a-fA-F]{9,16}\b")
_TEMPORARY = re.compile(r"(?:/[^\s/'\"<>]+)*/(?:tmp|diptych-[a-z]+-)[a-z0-9_]{8}(?![a-z0-9_])")


def one_line(error: BaseException, max_chars: int = 300, with_type: bool = False) -> str:
    """Returns the message of a library's error for quotation, without the parts that differ from run to run.

    Args:
        error: The error; one without a message is quoted by the name of its class.
        max_chars: The length of the longest result.
        with_type: Whether to begin with the name of the error's class.
    """
    message, name = " ".join(str(error)[:10_000].split()), type(error).__name__
    message = redacted(_TEMPORARY.sub("a temporary file", _ADDRESS.sub("", message)))
    return (f"{name}: {message}" if with_type and message else message or name)[:max_chars]
