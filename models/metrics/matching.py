"""Measures how well an image matches its prompt: a text model compares a captioner's caption with the prompt."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from diptych.models.base import CaptionModel, Model, TextModel


class ImageAndPrompt(NamedTuple):
    """An image and the prompt to compare it with.

    Attributes:
        image: The encoded image.
        prompt: The text that it should show.
    """

    image: bytes
    prompt: str


class Match(NamedTuple):
    """The match of an image and its prompt.

    Attributes:
        caption: The captioner's caption of the image.
        similarity: The cosine of the vectors of caption and prompt, -1 to 1; 0 where no word of one is known.
    """

    caption: str
    similarity: float


class _Prepared(NamedTuple):
    images: Any
    prompts: Any


class Matcher(Model[ImageAndPrompt, Match]):
    """Compares images with prompts by a captioner and a text model."""

    def __init__(self, captioner: CaptionModel, text: TextModel) -> None:
        self._captioner, self._text = captioner, text
        self.digest = f"{captioner.digest} {text.digest}"
        self.batch_size = captioner.batch_size

    def prepare(self, inputs: Sequence[ImageAndPrompt]) -> _Prepared:
        """Decodes images and tokenises prompts."""
        images = self._captioner.prepare([item.image for item in inputs])
        return _Prepared(images, self._text.prepare([item.prompt for item in inputs]))

    def predict(self, prepared: _Prepared) -> list[Match]:
        """Captions images and compares the captions with the prompts."""
        captions = [result.candidates[0] for result in self._captioner.predict(prepared.images)]
        caption_vectors = self._text.predict(self._text.prepare(captions))
        prompt_vectors = self._text.predict(prepared.prompts)
        similarities = cosines(
            [vector.values for vector in caption_vectors], [vector.values for vector in prompt_vectors]
        )
        return list(map(Match, captions, similarities.tolist()))


def cosines(
    left: Sequence[np.ndarray[Any, Any]], right: Sequence[np.ndarray[Any, Any]]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Returns the cosine of each pair of vectors (D,), or 0 where one of them is zero."""
    a, b = np.stack(left).astype(np.float64), np.stack(right).astype(np.float64)  # (N, D)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.divide((a * b).sum(1), norms, out=np.zeros(len(a)), where=norms > 0)
