"""Errors of loading and running models. Beam and the command line are above this package."""


class ModelError(Exception):
    """A model, or a file of one, that cannot be used: one paragraph with the value, what is expected, the remedy."""
