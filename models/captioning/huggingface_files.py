"""A folder with a captioner as transformers saves it: checked, then loaded, or said what is wrong with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from diptych.models.errors import ModelError, one_line

_MOST_ROWS = 1.1  # a token: a vocabulary may be rounded up, for speed, and have room for words to come
# Not to be asked, in the middle of a night, whether to run the code that a model brings
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
EXPECTED = "an image captioner (BLIP, GIT, ViT-GPT2, …) as transformers saves it, weights as safetensors"


def load_parts(folder: Path) -> tuple[Any, Callable[..., Any], Any]:
    """Loads a captioner.

    Returns:
        The model, on the CPU in single precision; what makes its inputs of images; what makes text of its tokens.

    Raises:
        ModelError: The folder holds no such model, or one that is damaged or kept as a pickle.
    """
    _check_folder(folder)
    images, tokenizer = _load_processor(folder)
    model = _load_model(folder)
    _check_vocabulary(folder, model, tokenizer)
    return model, images, tokenizer


def _check_folder(folder: Path) -> None:
    """Raises `ModelError` unless a folder holds a model that makes text of images, with safetensors."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
    except Exception as error:
        raise ModelError(
            f"{folder} holds no model that can be loaded: {one_line(error)}. Expected {EXPECTED}."
        ) from error
    if type(config) not in transformers.AutoModelForImageTextToText._model_mapping:
        raise ModelError(
            f"The model in {folder} is of type {config.model_type!r}. Expected {EXPECTED}: name another."
        )
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        what = (
            f"only {pickles[0]}, a pickle, which is not loaded: it could run anything"
            if pickles
            else "no weights"
        )
        raise ModelError(
            f"{folder} holds {what}. Expected safetensors. Where you trust the model, convert it: python -c "
            f'"from transformers import AutoModelForImageTextToText as A; '
            f"A.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )


def _load_processor(folder: Path) -> tuple[Callable[..., Any], Any]:
    """Returns what makes inputs of images, and the tokenizer."""
    try:
        images, tokenizer = _read_processor(folder)
    except Exception as error:
        raise _no_processor(folder, one_line(error)) from error
    # Of some, transformers make one up that knows no word
    files = {*tokenizer.vocab_files_names.values(), "tokenizer.json"}
    if tokenizer.vocab_files_names and not any((folder / name).is_file() for name in files):
        raise _no_processor(folder, f"there is no {' or '.join(sorted(files))}")
    return images, tokenizer


def _read_processor(folder: Path) -> tuple[Callable[..., Any], Any]:
    processor = transformers.AutoProcessor.from_pretrained(folder, **_LOCAL)
    # Older models have the two, and nothing that joins them: then this is one of them, or neither
    if hasattr(processor, "image_processor") and hasattr(processor, "tokenizer"):
        return processor, processor.tokenizer
    images = transformers.AutoImageProcessor.from_pretrained(folder, **_LOCAL)
    return images, transformers.AutoTokenizer.from_pretrained(folder, **_LOCAL)


def _no_processor(folder: Path, why: str) -> ModelError:
    return ModelError(
        f"The processor in {folder} cannot be loaded: {why}. Expected preprocessor_config.json (or "
        "processor_config.json) and the tokenizer's files beside the weights: fetch them too."
    )


def _load_model(folder: Path) -> Any:
    try:
        model, found = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, **_LOCAL, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:
        raise ModelError(
            f"The weights in {folder} cannot be loaded: {one_line(error)}. Expected {EXPECTED}."
        ) from error
    # A pooler is for other tasks. Without anything else the captions would be noise.
    missing = sorted(name for name in found["missing_keys"] if "pooler." not in name)
    foreign = sorted(name for name in found["unexpected_keys"] if "pooler." not in name)
    for names, what in ((missing, "missing"), (foreign, "foreign")):
        if names:
            raise ModelError(
                f"The weights in {folder} do not fit its config.json: {len(names)} tensors are {what} "
                f"({', '.join(names[:3])}). Fetch or convert it again."
            )
    return model


def _check_vocabulary(folder: Path, model: Any, tokenizer: Any) -> None:
    num_rows = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    if num_rows is not None and not len(tokenizer) <= num_rows <= 8 + _MOST_ROWS * len(tokenizer):
        raise ModelError(
            f"The vocabulary in {folder} does not fit: the tokenizer has {len(tokenizer)} tokens, the model says "
            f"{num_rows}. Both must be of one training: fetch them again."
        )
