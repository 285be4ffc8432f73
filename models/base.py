"""What every model is to the pipeline: steps that it overlaps, and results one a row."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar, cast

import numpy as np

Input = TypeVar("Input")
Output = TypeVar("Output")


class Model(abc.ABC, Generic[Input, Output]):
    """A model that is loaded and ready.

    Its steps may be called from any thread; the pipeline never calls `predict` of one model twice at a time. None
    may keep anything between calls, and the result of a row does not depend on the rows beside it (up to rounding).

    Attributes:
        digest: Stands for everything that decides the results: weights, configuration, options.
        batch_size: Rows of a micro-batch, unless the user says otherwise.
    """

    digest: str
    batch_size: int

    @abc.abstractmethod
    def prepare(self, inputs: Sequence[Input]) -> Any:
        """Does what the CPU can do ahead (decode, tokenise, stack) for one micro-batch.

        Raises:
            Exception: An input cannot be prepared; the pipeline finds out which.
        """

    @abc.abstractmethod
    def predict(self, prepared: Any) -> Sequence[Any]:
        """Runs the model on what `prepare` returned; gives one result an input, in order, on the host.

        Raises:
            torch.OutOfMemoryError: The device is too small for the micro-batch; the pipeline halves it.
        """

    def finish(self, predicted: Any) -> Output:
        """Does what the CPU can do afterwards (encode) for one of the results of `predict`.

        Raises:
            Exception: It cannot be done; that row fails.
        """
        return cast(Output, predicted)

    def cost(self, item: Input) -> int:
        """Returns what an input costs relative to others: micro-batches are made of inputs of about one cost."""
        return 0


class TextVector(NamedTuple):
    """A caption's vector.

    Attributes:
        values: (d,) float32.
        known: False where the model knows no word of the caption: `values` is zero then.
    """

    values: np.ndarray[Any, np.dtype[np.float32]]
    known: bool = True


class TextModel(Model[str, TextVector]):
    """Text to vectors.

    Attributes:
        dim: Length of the vectors.
    """

    dim: int


class Captions(NamedTuple):
    """What a captioner says of an image.

    Attributes:
        candidates: Captions, the best first.
        scores: Log-probability of each candidate, the sum over its tokens, natural logarithm.
        features: (d,) float32, the encoder's pooled vector; None where not asked for.
    """

    candidates: tuple[str, ...]
    scores: tuple[float, ...]
    features: np.ndarray[Any, np.dtype[np.float32]] | None = None


class CaptionModel(Model[bytes, Captions]):
    """Encoded images (JPEG, PNG, …) to captions.

    Attributes:
        feature_dim: Length of `Captions.features`; None where features were not asked for.
    """

    feature_dim: int | None


class Prompt(NamedTuple):
    """What an image is to be made of.

    Attributes:
        text: What is to be seen.
        seed: 64 bits that decide all that is drawn for the image: the same in any batch, in any order.
    """

    text: str
    seed: int


class GeneratedImage(NamedTuple):
    """An image that was made.

    Attributes:
        data: Encoded, as PNG or JPEG.
        fault: Why it is none to keep: `no_known_word` (of the prompt), `flagged` (blanked by the model's own safety
            checker); None of all others.
    """

    data: bytes
    fault: str | None = None


class ImageModel(Model[Prompt, GeneratedImage]):
    """Text to images.

    Attributes:
        size_px: (width, height) of the images.
        text_model: `KIND:LOCATION` of the text model whose vectors it draws from; None where it brings its own.
    """

    size_px: tuple[int, int]
    text_model: str | None = None


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """What the user asks of a text model.

    Attributes:
        pooling: `mean` or `cls`, of models that say nothing of it themselves; None is `mean`.
        normalize: Scale vectors to length 1.
    """

    pooling: str | None = None
    normalize: bool = False


@dataclasses.dataclass(frozen=True)
class CaptionOptions:
    """What the user asks of a captioner.

    Attributes:
        beam_width: Hypotheses kept at each step; 1 is greedy.
        num_captions: Candidates an image, at most `beam_width`.
        max_words: Longest caption, in words (`hf`: new tokens).
        length_penalty: Hypotheses compare by log-probability / length ** length_penalty; None takes the kind's own.
        no_repeat_ngram: No n-gram of this size occurs twice; 0 allows any.
        features: Also return the encoder's pooled vectors.
        generation: More flags for `generate` of a Hugging Face model, as (name, value).
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
    """What the user asks of a model that makes images.

    Attributes:
        size_px: Side of the images; None takes the model's own.
        image_format: `png` (lossless) or `jpeg`.
        quality: JPEG quality, 1 to 100.
        text_model: `KIND:LOCATION` of the text model that a model was trained with, where it lies elsewhere now.
        settings: Settings of a diffusers pipeline's call, as (name, value).
    """

    size_px: int | None = None
    image_format: Literal["png", "jpeg"] = "png"
    quality: int = 95
    text_model: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()


def tuples_to_lists(value: Any) -> Any:
    """Returns a value of options, which are hashed, with lists for its tuples: libraries refuse those."""
    return [tuples_to_lists(item) for item in value] if isinstance(value, tuple) else value
