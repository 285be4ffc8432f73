"""Specifies and loads the models of jobs; the one place that maps a kind to its class."""

import dataclasses
import os
import threading
from typing import Any, cast

from diptych.models.base import CaptionModel, CaptionOptions, ImageOptions, Model, TextModel, TextOptions
from diptych.models.errors import ModelError
from diptych.models.files.location import absolute_if_there, redacted
from diptych.models.model_thread import run_on_model_thread
from diptych.models.names import CAPTION_KINDS, IMAGE_KINDS, ModelName
from diptych.models.text.text_model import load_text_model


@dataclasses.dataclass(frozen=True)
class MatchOptions:
    """The two models that compare images with their prompts.

    Attributes:
        captioner: The model that captions an image.
        text: The model that compares the caption with the prompt.
    """

    captioner: "ModelSpec"
    text: "ModelSpec"


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Specifies a model and its options. It travels to the workers, which load the model themselves.

    Attributes:
        kind: One of `TEXT_KINDS`, `CAPTION_KINDS` or `IMAGE_KINDS`; or `match`, which is made of two.
        location: A path, an fsspec URL, or a name on the Hugging Face hub.
        options: The model's options.
        device: `auto`, `cpu`, `cuda` or `cuda:N`, resolved where the model is loaded.
    """

    kind: str
    location: str
    options: TextOptions | CaptionOptions | ImageOptions | MatchOptions
    device: str = "auto"

    def __str__(self) -> str:
        return redacted(f"{self.kind}:{self.location}")

    @property
    def name(self) -> str:
        """The kind and location, of a local path the last part only, so that it does not depend on the machine."""
        location = os.path.basename(self.location) if os.path.isabs(self.location) else self.location
        return redacted(f"{self.kind}:{location}")

    def absolute(self) -> "ModelSpec":
        """Returns the spec with its local paths made absolute, those of its options too; hub names are unchanged."""
        options = self.options
        if isinstance(options, MatchOptions):
            options = MatchOptions(options.captioner.absolute(), options.text.absolute())
        elif isinstance(options, ImageOptions) and options.text_model:
            text = ModelName.parse(options.text_model)
            text = text._replace(location=absolute_if_there(text.location))
            options = dataclasses.replace(options, text_model=str(text))
        return dataclasses.replace(self, location=absolute_if_there(self.location), options=options)


_loaded: dict[ModelSpec, Model[Any, Any]] = {}
_lock = threading.Lock()


def load_model(spec: ModelSpec) -> Model[Any, Any]:
    """Returns the model, which is loaded once per process.

    Raises:
        ModelError: It cannot be loaded, or is of another kind.
    """
    spec = spec.absolute()
    with _lock:
        if spec not in _loaded:
            run_on_model_thread(_load_once, spec)
        return _loaded[spec]


def _load_once(spec: ModelSpec) -> Model[Any, Any]:
    spec = spec.absolute()
    if spec not in _loaded:
        _loaded[spec] = _load(spec)
    return _loaded[spec]


def _load(spec: ModelSpec) -> Model[Any, Any]:
    # Imported here, so that a job loads the libraries of its own model only
    kinds: tuple[str, ...] = CAPTION_KINDS
    if isinstance(spec.options, TextOptions):
        return load_text_model(spec.kind, spec.location, spec.options, spec.device)
    if isinstance(spec.options, CaptionOptions):
        if spec.kind in ("cnn-lstm", "cnn-rnn"):
            from diptych.models.captioning.captioner import Captioner

            return Captioner.load(spec.location, spec.options, spec.device, kind=spec.kind)
        if spec.kind == "hf":
            from diptych.models.captioning.huggingface import HuggingFaceCaptioner

            return HuggingFaceCaptioner.load(spec.location, spec.options, spec.device)
    if isinstance(spec.options, MatchOptions):
        from diptych.models.metrics.matching import Matcher

        captioner, text = _load_once(spec.options.captioner), _load_once(spec.options.text)
        return Matcher(cast(CaptionModel, captioner), cast(TextModel, text))
    if isinstance(spec.options, ImageOptions):
        kinds = IMAGE_KINDS
        if spec.kind in ("vae", "gan"):
            from diptych.models.generation.image_generator import ImageGenerator

            def load_text(kind: str, location: str, options: TextOptions) -> TextModel:
                return cast(TextModel, _load_once(ModelSpec(kind, location, options, spec.device)))

            return ImageGenerator.load(spec.location, spec.options, spec.device, spec.kind, load_text)
        if spec.kind == "diffusers":
            from diptych.models.generation.diffusion import DiffusionPipeline

            return DiffusionPipeline.load(spec.location, spec.options, spec.device)
    raise ModelError(
        f"`model` {spec} is of kind {spec.kind!r}. Expected KIND:LOCATION with one of {', '.join(kinds)}."
    )
