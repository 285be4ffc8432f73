"""Errors of loading and running models. Beam and the command line are above this package."""


class ModelError(Exception):
    """A model, or a file of one, that cannot be used: one paragraph with the value, what is expected, the remedy."""


class FlagError(ModelError):
    """A flag that the model does not take: the command line is wrong, not the model."""
