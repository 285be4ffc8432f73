"""What can go wrong outside the program, as a tree: each message says what was wrong, and what to do."""

from typing import ClassVar

from diptych.models.files.location import redacted


class DiptychError(Exception):
    """A failure that its user can mend. The message is one paragraph: value, expectation, remedy.

    Args:
        message: The paragraph; URLs in it lose their users, passwords and signatures.
    """

    is_permanent: ClassVar[bool] = False
    """Whether a second try ends in the same way, so that a runner that would make one may as well stop."""

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class OptionError(DiptychError, ValueError):
    """The command line asks for something that cannot be."""

    is_permanent = True


class InputError(DiptychError):
    """The input cannot be found, recognised or read (a bad row is never an error: it is a reject)."""


class MissingInputError(InputError):
    """The input is not there, by the word of the storage that answers for it."""

    is_permanent = True


class ModelInputError(InputError):
    """The model is not there or cannot be used, or is another than where the job started."""

    is_permanent = True


class FailureLimitError(DiptychError):
    """The model fails on more rows than it may."""

    is_permanent = True


class OutputError(DiptychError):
    """The output cannot be written, or holds something that must not be touched."""


class TooManyRejects(DiptychError):
    """More rows were rejected than the user allows; what was written stays."""

    is_permanent = True


class NothingWritten(TooManyRejects):
    """Rows were read, and none of them was written."""


class DeviceError(DiptychError):
    """The device, its libraries or the machine's memory failed: no row is to blame, and another try may do."""
