"""Loads a captioner that transformers saved, or says what is wrong with its folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from diptych.models.errors import ModelError, one_line
from diptych.models.files.pretrained import (
    LOCAL_ONLY,
    check_folder,
    check_tensors,
    has_vocabulary,
    load_weights,
    vocabulary_files,
)

# Rows of the embedding for each token, at most: a vocabulary may be rounded up for speed, with room for more words
_MOST_ROWS = 1.1
EXPECTED = "an image captioner (BLIP, GIT, ViT-GPT2, …) as transformers saves it, weights as safetensors"


def load_parts(folder: Path) -> tuple[Any, Callable[..., Any], Any]:
    """Loads a captioner.

    Returns:
        The model, on the CPU in single precision; the processor, which makes its inputs from images; the tokenizer,
        which makes text from its tokens.

    Raises:
        ModelError: The folder holds no such model, or one that is damaged or kept as a pickle.
    """
    check_folder(folder, transformers.AutoModelForImageTextToText, _captions_images, EXPECTED)
    images, tokenizer = _load_processor(folder)
    model = _load_model(folder)
    _check_vocabulary(folder, model, tokenizer)
    return model, images, tokenizer


def _captions_images(config: Any) -> bool:
    return type(config) in transformers.AutoModelForImageTextToText._model_mapping


def _load_processor(folder: Path) -> tuple[Callable[..., Any], Any]:
    """Returns the processor of images, and the tokenizer."""
    try:
        images, tokenizer = _read_processor(folder)
    except Exception as error:
        raise _no_processor(folder, one_line(error)) from error
    if tokenizer.vocab_files_names and not has_vocabulary(folder, tokenizer):
        raise _no_processor(folder, f"there is no {' or '.join(vocabulary_files(tokenizer))}")
    return images, tokenizer


def _read_processor(folder: Path) -> tuple[Callable[..., Any], Any]:
    processor = transformers.AutoProcessor.from_pretrained(folder, **LOCAL_ONLY)
    # Older models save the two apart: AutoProcessor then returns one of them, or something else
    if hasattr(processor, "image_processor") and hasattr(processor, "tokenizer"):
        return processor, processor.tokenizer
    images = transformers.AutoImageProcessor.from_pretrained(folder, **LOCAL_ONLY)
    return images, transformers.AutoTokenizer.from_pretrained(folder, **LOCAL_ONLY)


def _no_processor(folder: Path, why: str) -> ModelError:
    return ModelError(
        f"The processor in {folder} cannot be loaded: {why}. Expected preprocessor_config.json (or "
        "processor_config.json) and the tokenizer's files beside the weights: fetch them too."
    )


def _load_model(folder: Path) -> Any:
    model, *unmatched = load_weights(folder, transformers.AutoModelForImageTextToText, EXPECTED)
    # The pooler is for other tasks
    missing, foreign = ([name for name in names if "pooler." not in name] for names in unmatched)
    check_tensors(folder, missing, foreign)
    return model


def _check_vocabulary(folder: Path, model: Any, tokenizer: Any) -> None:
    num_rows = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    if num_rows is not None and not len(tokenizer) <= num_rows <= 8 + _MOST_ROWS * len(tokenizer):
        raise ModelError(
            f"The vocabulary in {folder} does not fit: the tokenizer has {len(tokenizer)} tokens, the model says "
            f"{num_rows}. Both must be of one training: fetch them again."
        )
