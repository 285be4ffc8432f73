"""What the training of a VAE or a GAN reads again and again, on disk: small images, and vectors of their captions.

N images, M captions in all, S side in pixels, T text vector.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diptych.models.base import TextModel
from diptych.models.errors import ModelError
from diptych.models.pixels import decode_pixels
from diptych.models.training.cache import CaptionCache, Encoding, Layout, SplitRows, open_cache

_Array = np.ndarray[Any, Any]


class ImageData:
    """The rows of one split.

    Attributes:
        mean: (T,) mean of the text vectors.
        whitening: (T, T) matrix that gives vectors less the mean a variance of 1 in all directions.
    """

    def __init__(self, cache: CaptionCache, folder: Path, dim: int) -> None:
        self._cache, self._dim = cache, dim
        counts = [len(texts) for texts in cache.all_captions()]
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self._path = folder / "vectors.bin"

    def __len__(self) -> int:
        return len(self._cache)

    def write_vectors(self, text: TextModel) -> None:
        """Writes the vectors of all captions, unless they are there."""
        num_bytes = int(self._ends[-1]) * self._dim * 4
        if not (self._path.exists() and self._path.stat().st_size == num_bytes):
            partial = self._path.with_name(".vectors.tmp")
            try:
                with open(partial, "wb") as file:
                    for captions in _batched(self._texts(), text.batch_size):
                        vectors = text.predict(text.prepare(captions))
                        file.write(np.stack([vector.values for vector in vectors]).astype("<f4").data)
                partial.replace(self._path)
            except OSError as error:
                raise ModelError(
                    f"{self._path} cannot be written: {error.strerror or error}. It takes {num_bytes / 1e6:.0f} MB: "
                    "make room, or name another place with `cache`."
                ) from error
        self._vectors = np.memmap(self._path, "<f4", "r", shape=(int(self._ends[-1]), self._dim))
        self.mean, self.whitening = _spread(self._vectors)

    def _texts(self) -> Iterator[str]:
        for captions in self._cache.all_captions():
            for words in captions:
                yield words[0]

    def load(self, rows: Sequence[int], draws: Sequence[float], mirrored: Sequence[bool]) -> "ImageBatch":
        """Returns rows in memory, each with one of its captions.

        Args:
            rows: Ordinals.
            draws: From 0 to 1, which caption of each.
            mirrored: Which are mirrored.
        """
        pixels = self._cache.images[0][np.asarray(rows)]
        for i in np.flatnonzero(mirrored):
            pixels[i] = pixels[i, :, ::-1].copy()
        starts, ends = self._starts[rows], self._ends[rows]
        chosen = starts + (np.asarray(draws) * (ends - starts)).astype(np.int64)
        return ImageBatch(torch.from_numpy(pixels), torch.from_numpy(self._vectors[chosen]))

    def captions(self, row: int) -> list[str]:
        """Returns the captions of a row."""
        return [words[0] for words in self._cache.captions([row])[0]]


# Directions in which vectors vary less than this share of the largest deviation say nothing: they are not enlarged.
_LEAST_DEVIATION = 0.02


def _spread(vectors: _Array) -> tuple[Tensor, Tensor]:
    """Returns the mean of (M, T) vectors and their whitening, read a part at a time."""
    dim = vectors.shape[1]
    total, squares = np.zeros(dim), np.zeros((dim, dim))
    parts = range(0, len(vectors), 4096)
    for start in parts:
        total += vectors[start : start + 4096].sum(0, dtype=np.float64)
    mean = total / len(vectors)
    for start in parts:
        off = vectors[start : start + 4096] - mean
        squares += off.T @ off
    variances, axes = np.linalg.eigh(squares / len(vectors))
    deviations = np.sqrt(np.maximum(variances, 0))
    least = max(1e-6, _LEAST_DEVIATION * float(deviations[-1]))
    whitening = axes / np.maximum(deviations, least)
    return torch.from_numpy(mean).float(), torch.from_numpy(whitening).float()


class ImageBatch(NamedTuple):
    """Rows that are ready for the device.

    Attributes:
        pixels: (N, S, S, 3) uint8.
        text_vectors: (N, T) float32.
    """

    pixels: Tensor
    text_vectors: Tensor


def open_image_data(
    folder: Path,
    identity: str,
    size_px: int,
    text: TextModel,
    rows: SplitRows,
) -> ImageData:
    """Returns a split's images and text vectors, and caches them first where they are not cached yet.

    Args:
        folder: The split's own folder, named like the split.
        identity: Identifies the data.
        size_px: S.
        text: The text model that makes the vectors.
        rows: The rows of the split.

    Raises:
        ModelError: There is no room for it, it cannot be written, or no row has a caption.
    """
    with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="decode") as pool:

        def encode(images: Sequence[bytes]) -> list[_Array]:
            return [np.stack(list(pool.map(lambda data: decode_pixels(data, size_px), images)))]

        encoding = Encoding(Layout((size_px, size_px, 3), "uint8"), encode, _whole)
        cache = open_cache(folder, f"{identity} {text.digest}", rows, encoding)
    data = ImageData(cache, folder, text.dim)
    data.write_vectors(text)
    return data


def _whole(caption: str) -> list[str]:
    return [caption] if caption.strip() else []


def _batched(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def epoch_batches(
    data: ImageData, epoch: int, first: int, batch_size: int, seed: int, flips: bool
) -> Iterator[ImageBatch]:
    """Yields the full batches of an epoch from one on; a thread prepares the next one.

    Args:
        data: The rows to train on.
        epoch: The ordinal of the epoch; it decides every draw, together with the seed.
        first: The ordinal of the first batch.
        batch_size: N.
        seed: The seed of every draw.
        flips: Mirror half of the images.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(data))
    size = min(batch_size, len(data))

    def load(number: int) -> ImageBatch:
        draw = np.random.default_rng((seed, epoch, number))
        rows = order[number * size : (number + 1) * size]
        mirrored = draw.random(len(rows)) < (0.5 if flips else 0.0)
        return data.load(rows.tolist(), draw.random(len(rows)).tolist(), mirrored.tolist())

    with ThreadPoolExecutor(1, thread_name_prefix="load") as pool:
        ahead = None
        for number in range(first, len(data) // size):
            ready, ahead = ahead, pool.submit(load, number)
            if ready is not None:
                yield ready.result()
        if ahead is not None:
            yield ahead.result()
