"""`KIND:LOCATION`, and the one place that knows which class is behind a kind."""

import dataclasses
import threading
from typing import Any

from models.base import CaptionOptions, Model, TextOptions
from models.compute import compute
from models.errors import ModelError

TEXT_KINDS = ("word2vec", "bert")
CAPTION_KINDS = ("cnn-lstm", "cnn-rnn", "hf")


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Names a model and what is asked of it; it travels to the workers, the model does not.

    Attributes:
        kind: One of `TEXT_KINDS` or `CAPTION_KINDS`.
        location: Path, fsspec URL, or name on the Hugging Face hub.
        options: What is asked of it.
        device: `auto`, `cpu`, `cuda` or `cuda:N`, chosen where the model is loaded.
    """

    kind: str
    location: str
    options: TextOptions | CaptionOptions
    device: str = "auto"

    def __str__(self) -> str:
        return f"{self.kind}:{self.location}"


_loaded: dict[ModelSpec, Model[Any, Any]] = {}
_lock = threading.Lock()


def load_model(spec: ModelSpec) -> Model[Any, Any]:
    """Returns the model, loaded once a process.

    Raises:
        ModelError: It cannot be loaded, or is of another kind.
    """
    with _lock:
        if spec not in _loaded:
            _loaded[spec] = compute(_load, spec)
        return _loaded[spec]


def _load(spec: ModelSpec) -> Model[Any, Any]:
    # imported here: a job pays only for the libraries of its own model
    if isinstance(spec.options, TextOptions):
        if spec.kind == "word2vec":
            from models.word2vec import Word2Vec

            return Word2Vec.load(spec.location, spec.options)
        if spec.kind == "bert":
            from models.bert import Bert

            return Bert.load(spec.location, spec.options, spec.device)
    else:
        if spec.kind in ("cnn-lstm", "cnn-rnn"):
            from models.captioner import Captioner

            return Captioner.load(spec.location, spec.options, spec.device, kind=spec.kind)
        if spec.kind == "hf":
            from models.huggingface import HuggingFaceCaptioner

            return HuggingFaceCaptioner.load(spec.location, spec.options, spec.device)
    kinds = TEXT_KINDS if isinstance(spec.options, TextOptions) else CAPTION_KINDS
    raise ModelError(
        f"--model {spec} is of kind {spec.kind!r}. Expected KIND:LOCATION with one of {', '.join(kinds)}."
    )
