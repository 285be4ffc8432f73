"""Do drawn images show their texts? A probe that has never seen a drawn image, for benchmarks/flickr8k_images.py.

It is a ridge regression from a network's features of real photos to the text vectors of their captions. An image is
scored by the cosine of what the probe says of it with the vector of its own text, less the mean of that with the texts
of other images: zero is what an image that knows nothing of its text gets. The probe learns from and looks at photos as
blurred as one likes (`BLUR_PX`): a small network's images have no fine detail, and a probe that goes by that would see
nothing but its absence. What real photos of another split get is the yardstick.

N images, S side in pixels, D features, T text vector.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pyarrow.dataset
import torch
from torch import Tensor
from torch.nn import functional

from diptych.models.base import TextModel
from diptych.models.metrics.image_scores import Features
from diptych.models.pixels import decode_pixels

BLUR_PX = 16
_INPUT_PX = 112
_BATCH = 64
_OTHERS = 8
_RIDGE = 3000.0


class Gain(NamedTuple):
    """How much better images match their own text than others'.

    Attributes:
        mean: Difference of cosines.
        half_width: Of its 95 % interval.
        num_images: N.
    """

    mean: float
    half_width: float
    num_images: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half_width:.4f} ({self.num_images:,} images)"


class TextProbe:
    """The regression.

    Args:
        features: Of images.
        text: Makes the vectors.
        train: Output of `diptych prepare`, whose images are learnt from, each with its first two captions.
    """

    def __init__(self, features: Features, text: TextModel, train: Path) -> None:
        self._features, self._text = features, text
        seen, told = self._read(train, "images", 2)
        self._centre, self._scale, self._mean = seen.mean(0), seen.std(0) + 1e-6, told.mean(0)
        inputs = ((seen - self._centre) / self._scale).double()  # (N, D)
        wanted = (told - self._mean).double()  # (N, T)
        gram = inputs.T @ inputs + _RIDGE * torch.eye(inputs.shape[1], dtype=torch.double)
        self._weights = torch.linalg.solve(gram, inputs.T @ wanted).float()  # (D, T)

    def gain(self, root: Path, dataset: str, most: int) -> Gain:
        """Looks at the images of an output, and the first caption or the prompt of each."""
        seen, told = self._read(root, dataset, 1, most)
        said = ((seen - self._centre) / self._scale) @ self._weights
        wanted = told - self._mean
        own = functional.cosine_similarity(said, wanted)
        others = [functional.cosine_similarity(said, wanted.roll(by, 0)) for by in range(1, _OTHERS + 1)]
        gains = own - torch.stack(others).mean(0)
        return Gain(float(gains.mean()), 1.96 * float(gains.std()) / len(gains) ** 0.5, len(gains))

    def _read(
        self, root: Path, dataset: str, num_texts: int, most: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns features (N, D) and mean text vectors (N, T)."""
        seen, told, size = [], [], self._text.batch_size
        for images, texts in _batches(root, dataset, num_texts):
            seen.append(self._features(np.stack([_blurred(image) for image in images])))
            flat = [text for own in texts for text in own]
            vectors = []
            for start in range(0, len(flat), size):
                found = self._text.predict(self._text.prepare(flat[start : start + size]))
                vectors += [vector.values for vector in found]
            counts = [len(own) for own in texts]
            parts = np.split(np.stack(vectors), np.cumsum(counts)[:-1])
            told.append(torch.from_numpy(np.stack([part.mean(0) for part in parts])).float())
            if most is not None and sum(map(len, seen)) >= most:
                break
        return torch.cat(seen)[:most], torch.cat(told)[:most]


def _batches(root: Path, dataset: str, num_texts: int) -> Iterator[tuple[list[bytes], list[list[str]]]]:
    """Yields images and the texts of each; of what was drawn the first sample of the first prompt of each key."""
    found = pyarrow.dataset.dataset(sorted((root / dataset).glob("*.parquet")), format="parquet")
    columns, chosen = ["image", "captions"], None
    if dataset == "generated":
        columns = ["image", "prompt"]
        chosen = (pyarrow.dataset.field("sample") == 0) & (pyarrow.dataset.field("prompt_index") == 0)
    for batch in found.to_batches(columns=columns, filter=chosen, batch_size=_BATCH):
        rows = batch.to_pylist()
        texts = [[row["prompt"]] if dataset == "generated" else row["captions"][:num_texts] for row in rows]
        kept = [(row["image"]["bytes"], own) for row, own in zip(rows, texts, strict=True) if own]
        if kept:
            yield [image for image, _ in kept], [own for _, own in kept]


def _blurred(image: bytes) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    """Returns (S, S, 3) RGB without anything finer than `BLUR_PX` to a side."""
    small = cv2.resize(decode_pixels(image, 64), (BLUR_PX, BLUR_PX), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, (_INPUT_PX, _INPUT_PX), interpolation=cv2.INTER_CUBIC), np.uint8)
