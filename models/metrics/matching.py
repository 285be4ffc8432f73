"""Does an image show what its prompt says? A captioner describes it, and a text model compares the two texts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from diptych.models.base import CaptionModel, Model, TextModel


class ImageAndPrompt(NamedTuple):
    """What is compared.

    Attributes:
        image: Encoded.
        prompt: What it should show.
    """

    image: bytes
    prompt: str


class Match(NamedTuple):
    """How near an image is to its prompt.

    Attributes:
        caption: What the captioner says of the image.
        similarity: Cosine of the vectors of caption and prompt, -1 to 1; 0 where no word of one is known.
    """

    caption: str
    similarity: float


class _Prepared(NamedTuple):
    images: Any
    prompts: Any


class Matcher(Model[ImageAndPrompt, Match]):
    """A captioner and a text model."""

    def __init__(self, captioner: CaptionModel, text: TextModel) -> None:
        self._captioner, self._text = captioner, text
        self.digest = f"{captioner.digest} {text.digest}"
        self.batch_size = captioner.batch_size

    def prepare(self, inputs: Sequence[ImageAndPrompt]) -> _Prepared:
        """Decodes images, and tokenises prompts."""
        images = self._captioner.prepare([item.image for item in inputs])
        return _Prepared(images, self._text.prepare([item.prompt for item in inputs]))

    def predict(self, prepared: _Prepared) -> list[Match]:
        """Describes images, and compares."""
        captions = [result.candidates[0] for result in self._captioner.predict(prepared.images)]
        said = self._text.predict(self._text.prepare(captions))
        asked = self._text.predict(prepared.prompts)
        found = cosines([vector.values for vector in said], [vector.values for vector in asked])
        return list(map(Match, captions, found.tolist()))


def cosines(
    left: Sequence[np.ndarray[Any, Any]], right: Sequence[np.ndarray[Any, Any]]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Returns the cosine of each pair of vectors, 0 where one is zero."""
    a, b = np.stack(left).astype(np.float64), np.stack(right).astype(np.float64)  # (N, D)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.divide((a * b).sum(1), norms, out=np.zeros(len(a)), where=norms > 0)
