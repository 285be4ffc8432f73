"""Models as transformers saves them: checked, then loaded, with nothing written to the terminal on the way."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

from diptych.models.errors import ModelError, one_line

# Neither asks the hub again, nor the user whether the code that a model brings may run
LOCAL_ONLY: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_NUM_NAMED = 3


@contextlib.contextmanager
def quiet_transformers(python_warnings: bool = False) -> Iterator[None]:
    """Runs the body without transformers' reports and progress bars.

    Args:
        python_warnings: Also hide Python's warnings. Only where no other thread runs: their filters are everyone's.
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


def check_folder(folder: Path, auto_class: Any, is_kind: Callable[[Any], bool], expected: str) -> None:
    """Checks that a folder holds a model of some kind, with weights as safetensors.

    Args:
        folder: The model's folder.
        auto_class: The class of transformers that loads such a model.
        is_kind: Tells of the model's configuration whether it is of the kind.
        expected: Names the kind in errors.

    Raises:
        ModelError: It does not.
    """
    try:
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(folder, **LOCAL_ONLY)
    except Exception as error:  # transformers raises what its many parts raise
        raise ModelError(
            f"{folder} holds no model that can be loaded: {one_line(error)}. Expected {expected}."
        ) from error
    if not is_kind(config):
        raise ModelError(
            f"The model in {folder} is of type {config.model_type!r}. Expected {expected}: name another."
        )
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    content = "no weights"
    if pickles:
        content = f"only {pickles[0]}, a pickle, which is not loaded: it could run anything"
    raise ModelError(
        f"{folder} holds {content}. Expected safetensors. Where you trust the model, convert it: python -c "
        f'"from transformers import {auto_class.__name__} as A; '
        f"A.from_pretrained('{folder}').save_pretrained('{folder}')\""
    )


def load_weights(folder: Path, auto_class: Any, expected: str) -> tuple[Any, list[str], list[str]]:
    """Loads a model's weights from safetensors, on the CPU, in single precision.

    Args:
        folder: The model's folder.
        auto_class: The class of transformers that loads it.
        expected: Names the kind in errors.

    Returns:
        The model; the names of its tensors that the files lack; the names of the files' tensors that it lacks.

    Raises:
        ModelError: They are damaged.
    """
    try:
        model, report = auto_class.from_pretrained(
            folder, **LOCAL_ONLY, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # transformers raises what its many parts raise
        raise ModelError(
            f"The weights in {folder} cannot be loaded: {one_line(error)}. Expected {expected}."
        ) from error
    return model, sorted(report["missing_keys"]), sorted(report["unexpected_keys"])


def check_tensors(folder: Path, missing: Sequence[str], foreign: Sequence[str]) -> None:
    """Raises `ModelError` where tensors that matter are missing or foreign: the output would be noise."""
    faults = [
        f"{len(names)} tensors are {fault} ({', '.join(names[:_NUM_NAMED])})"
        for names, fault in ((missing, "missing"), (foreign, "foreign"))
        if names
    ]
    if faults:
        raise ModelError(
            f"The weights in {folder} do not fit its config.json: {' and '.join(faults)}. Fetch or convert it again."
        )


def has_vocabulary(folder: Path, tokenizer: Any) -> bool:
    """Tells whether a tokenizer's files are there: without them transformers makes one that knows no word."""
    return any((folder / name).is_file() for name in vocabulary_files(tokenizer))


def vocabulary_files(tokenizer: Any) -> list[str]:
    """Returns the names of the files that a tokenizer's vocabulary may be in."""
    return sorted({"tokenizer.json", *tokenizer.vocab_files_names.values()})
