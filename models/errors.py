"""Errors of loading and running models. Beam and the command line are above this package."""

from models.location import redacted


class ModelError(Exception):
    """A model, or a file of one, that cannot be used: one paragraph with the value, what is expected, the remedy.

    Args:
        message: The paragraph; URLs in it lose their users, passwords and signatures.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class ModelOutageError(ModelError):
    """A model that its storage does not give now, and may give at a second try."""


class FlagError(ModelError):
    """A flag that the model does not take: the command line is wrong, not the model."""
