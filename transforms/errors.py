"""What can go wrong outside the program, as a tree: each message says what was wrong, and what to do."""


class DiptychError(Exception):
    """A failure that its user can mend. The message is one paragraph: value, expectation, remedy."""


class OptionError(DiptychError, ValueError):
    """The command line asks for something that cannot be."""


class InputError(DiptychError):
    """The input cannot be found, recognised or read (a bad row is never an error: it is a reject)."""


class OutputError(DiptychError):
    """The output cannot be written, or holds something that must not be touched."""


class TooManyRejects(DiptychError):
    """More rows were rejected than the user allows; what was written stays."""


class NothingWritten(TooManyRejects):
    """Rows were read, and none of them was written."""


class DeviceError(DiptychError):
    """The device, its libraries or the machine's memory failed: no row is to blame, and another try may do."""
