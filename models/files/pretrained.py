"""Keeps libraries from writing to the user's terminal what is checked, and said, here."""

import contextlib
import warnings
from collections.abc import Iterator

from transformers.utils import logging


@contextlib.contextmanager
def quiet_transformers(python_warnings: bool = False) -> Iterator[None]:
    """Runs the body without transformers' reports and progress bars.

    Args:
        python_warnings: Also without Python's warnings. Only where no other thread runs: their filters are everyone's.
    """
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings() if python_warnings else contextlib.nullcontext():
            if python_warnings:
                warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
