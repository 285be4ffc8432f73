"""The interface of models: steps that the pipeline runs in parallel, with one result per row."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar, cast

import numpy as np

Input = TypeVar("Input")
Output = TypeVar("Output")


class Model(abc.ABC, Generic[Input, Output]):
    """A loaded model.

    Its steps may be called from any thread; the pipeline makes one call of a model's `predict` at a time. Steps keep no
    state between calls, and the result of a row does not depend on the other rows (up to rounding).

    Attributes:
        digest: The digest of all that determines the results: weights, configuration, options.
        batch_size: The default number of rows in a micro-batch.
    """

    digest: str
    batch_size: int

    @abc.abstractmethod
    def prepare(self, inputs: Sequence[Input]) -> Any:
        """Prepares one micro-batch on the CPU (decode, tokenise, stack).

        Raises:
            Exception: An input cannot be prepared; the pipeline determines which.
        """

    @abc.abstractmethod
    def predict(self, prepared: Any) -> Sequence[Any]:
        """Runs the model on a prepared micro-batch; returns one result per input, in order, in host memory.

        Raises:
            torch.OutOfMemoryError: The device is too small for the micro-batch; the pipeline halves it.
        """

    def finish(self, predicted: Any) -> Output:
        """Completes one result of `predict` on the CPU (encode).

        Raises:
            Exception: The row fails.
        """
        return cast(Output, predicted)

    def cost(self, item: Input) -> int:
        """Returns the relative cost of an input; micro-batches are made of inputs of similar cost."""
        return 0


class TextVector(NamedTuple):
    """A caption's vector.

    Attributes:
        values: (d,) float32; zero where no word is known.
        known: Whether the model knows any word of the caption.
    """

    values: np.ndarray[Any, np.dtype[np.float32]]
    known: bool = True


class TextModel(Model[str, TextVector]):
    """A model that turns text into vectors.

    Attributes:
        dim: The length of the vectors.
    """

    dim: int


class Captions(NamedTuple):
    """A captioner's result for an image.

    Attributes:
        candidates: The captions, the best first.
        scores: The log-probability of each candidate, the sum over its tokens, natural logarithm.
        features: (d,) float32, the encoder's pooled vector; None where not requested.
    """

    candidates: tuple[str, ...]
    scores: tuple[float, ...]
    features: np.ndarray[Any, np.dtype[np.float32]] | None = None


class CaptionModel(Model[bytes, Captions]):
    """A model that turns encoded images (JPEG, PNG, …) into captions.

    Attributes:
        feature_dim: The length of `Captions.features`; None where features are not requested.
    """

    feature_dim: int | None


class Prompt(NamedTuple):
    """The input of an image model.

    Attributes:
        text: The description of the image.
        seed: 64 bits that determine the image's noise, in any batch and any order.
    """

    text: str
    seed: int


class GeneratedImage(NamedTuple):
    """An image model's result.

    Attributes:
        data: The image, encoded as PNG or JPEG.
        fault: The reason to reject it: `no_known_word` (of the prompt), `flagged` (blanked by the model's own safety
            checker); else None.
    """

    data: bytes
    fault: str | None = None


class ImageModel(Model[Prompt, GeneratedImage]):
    """A model that turns text into images.

    Attributes:
        size_px: The images' (width, height).
        text_model: `KIND:LOCATION` of the text model that it depends on; None where it includes its own.
    """

    size_px: tuple[int, int]
    text_model: str | None = None


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """The options of a text model.

    Attributes:
        pooling: `mean` or `cls`, for models that configure none themselves; None is `mean`.
        normalize: Whether vectors are scaled to length 1.
    """

    pooling: str | None = None
    normalize: bool = False


@dataclasses.dataclass(frozen=True)
class CaptionOptions:
    """The options of a captioner.

    Attributes:
        beam_width: The number of hypotheses kept at each step; 1 is greedy search.
        num_captions: The number of candidates per image, at most `beam_width`.
        max_words: The length of the longest caption, in words (`hf`: new tokens).
        length_penalty: The exponent in log-probability / length ** length_penalty, by which hypotheses are ranked; None
            is the kind's default.
        no_repeat_ngram: The size of n-grams that may not occur twice; 0 allows any.
        features: Whether the encoder's pooled vectors are returned too.
        generation: Further flags for `generate` of a Hugging Face model, as (name, value).
    """

    beam_width: int = 3
    num_captions: int = 1
    max_words: int = 20
    length_penalty: float | None = None
    no_repeat_ngram: int = 0
    features: bool = False
    generation: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """The options of an image model.

    Attributes:
        size_px: The side of the images; None is the model's default.
        image_format: The encoding, `png` (lossless) or `jpeg`.
        quality: The JPEG quality, 1 to 100.
        text_model: `KIND:LOCATION` of the text model that the model was trained with, where it has moved since.
        settings: Arguments of a diffusers pipeline's call, as (name, value).
    """

    size_px: int | None = None
    image_format: Literal["png", "jpeg"] = "png"
    quality: int = 95
    text_model: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()


def tuples_to_lists(value: Any) -> Any:
    """Returns a value with lists for its tuples: options are hashed, so they hold tuples, but libraries want lists."""
    return [tuples_to_lists(item) for item in value] if isinstance(value, tuple) else value
