"""The batches that a captioner learns from: images from the cache, captions as numbers."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diptych.models.captioning.encoder import Encoder
from diptych.models.captioning.vocabulary import END, PAD, START, Vocabulary
from diptych.models.pixels import decode_pixels
from diptych.models.training.cache import CaptionCache, Encoding, Layout
from diptych.models.training.options import CaptionerTraining

_BATCH_ROWS = 64  # without gradients

_Array = np.ndarray[Any, Any]


class ImageEncoder:
    """Encodes images for the cache, and cached images as regions.

    Attributes:
        encoding: The cache's encoding: features of a frozen encoder, or pixels.
    """

    def __init__(self, encoder: Encoder, options: CaptionerTraining, device: torch.device) -> None:
        self._encoder, self._options, self._device = encoder, options, device
        self._pool = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="decode")
        size = options.encoder_size_px
        if options.fine_tune:
            layout = Layout((size, size, 3), "uint8")
        else:
            layout = Layout((encoder.num_regions, encoder.dim), "float16", 2 if options.flips else 1)
        self.encoding = Encoding(layout, self.encode)

    def encode(self, images: Sequence[bytes]) -> list[_Array]:
        """Returns an array of encoded images for each view of the cache."""
        size = self._options.encoder_size_px
        pixels = np.stack(list(self._pool.map(lambda data: decode_pixels(data, size), images)))
        if self._options.fine_tune:
            return [pixels]
        return [self._features(view) for view in (pixels, pixels[:, :, ::-1])[: self.encoding.layout.views]]

    def _features(self, pixels: _Array) -> _Array:
        tensor = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)
        with torch.inference_mode():
            parts = [self._encoder(part.to(self._device)) for part in torch.split(tensor, _BATCH_ROWS)]
        return torch.cat(parts).cpu().numpy().astype(np.float16)

    def load(self, split: CaptionCache, rows: Sequence[int], mirrored: Sequence[bool]) -> Tensor:
        """Returns rows of the cache, in memory."""
        last = len(split.images) - 1
        images = np.stack(
            [split.images[min(last, int(flip))][row] for row, flip in zip(rows, mirrored, strict=True)]
        )
        if self._options.fine_tune:
            for i in np.flatnonzero(mirrored):
                images[i] = images[i, :, ::-1].copy()
        return torch.from_numpy(images)

    def regions(self, loaded: Tensor) -> Tensor:
        """Returns (N, L, D) regions of loaded images, on the device."""
        loaded = loaded.to(self._device, non_blocking=True)
        return self._encoder(loaded.permute(0, 3, 1, 2)) if self._options.fine_tune else loaded.float()


class CaptionBatch(NamedTuple):
    """A batch that is ready for the device.

    Attributes:
        images: The images as `ImageEncoder.load` returns them.
        image_index: (B,) the ordinal of each caption's image.
        words: (B, T + 1) from `START` to `END`, then `PAD`.
    """

    images: Tensor
    image_index: Tensor
    words: Tensor


class BatchLoader:
    """Makes batches of the rows of a cache.

    Args:
        encoder: Loads the images of all splits.
        vocabulary: The numbers of words.
        options: Batch size, longest caption, mirroring and the seed of every draw.
    """

    def __init__(self, encoder: ImageEncoder, vocabulary: Vocabulary, options: CaptionerTraining) -> None:
        self._encoder, self._vocabulary, self._options = encoder, vocabulary, options

    def epoch(
        self, split: CaptionCache, epoch: int, first: int, captions_per_image: int
    ) -> Iterator[CaptionBatch]:
        """Yields the batches of an epoch of training from one on; a thread prepares the next one.

        Args:
            split: The rows to train on.
            epoch: The ordinal of the epoch; it decides every draw, together with the seed.
            first: The ordinal of the first batch.
            captions_per_image: The number of captions drawn of each image; 0 takes all.
        """
        options = self._options
        order = np.random.default_rng((options.seed, epoch)).permutation(len(split))
        starts = range(first * options.batch_size, len(order), options.batch_size)
        rows = (order[start : start + options.batch_size].tolist() for start in starts)

        def load(number: int, rows: list[int]) -> CaptionBatch:
            draw = np.random.default_rng((options.seed, epoch, number))
            flips = draw.random(len(rows)) < (0.5 if options.flips else 0.0)
            captions = split.captions(rows)
            if most := captions_per_image:
                captions = [[texts[i] for i in draw.permutation(len(texts))[:most]] for texts in captions]
            return self._load(split, rows, captions, flips.tolist())

        with ThreadPoolExecutor(1, thread_name_prefix="load") as pool:
            ahead = None
            for number, chosen in enumerate(rows, first):
                ready, ahead = ahead, pool.submit(load, number, chosen)
                if ready is not None:
                    yield ready.result()
            if ahead is not None:
                yield ahead.result()

    def validation(self, split: CaptionCache) -> Iterator[tuple[CaptionBatch, list[list[list[str]]]]]:
        """Yields all rows of a split in order, and their captions."""
        for start in range(0, len(split), _BATCH_ROWS):
            rows = list(range(start, min(len(split), start + _BATCH_ROWS)))
            captions = split.captions(rows)
            yield self._load(split, rows, captions, [False] * len(rows)), captions

    def number(self, captions: Sequence[Sequence[str]]) -> list[list[int]]:
        """Returns captions as numbers, each with its end."""
        number, most = self._vocabulary.number, self._options.max_words
        return [[*(number(word) for word in words[:most]), END] for words in captions]

    def _load(
        self, split: CaptionCache, rows: list[int], captions: list[list[list[str]]], mirrored: list[bool]
    ) -> CaptionBatch:
        numbered = [self.number(texts) for texts in captions]
        flat = [[START, *numbers] for texts in numbered for numbers in texts]
        # With numpy: torch in a second thread would make OpenMP put the first one's threads to sleep.
        words = np.full((len(flat), max(map(len, flat))), PAD)
        for i, numbers in enumerate(flat):
            words[i, : len(numbers)] = numbers
        image_index = np.repeat(np.arange(len(rows)), [len(texts) for texts in numbered])
        images = self._encoder.load(split, rows, mirrored)
        return CaptionBatch(images, torch.from_numpy(image_index), torch.from_numpy(words))
