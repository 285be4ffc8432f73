"""The batches that a captioner learns from: pictures out of the cache, captions as numbers."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diptych.models.captioning.encoder import Encoder
from diptych.models.captioning.vocabulary import END, PAD, START, Vocabulary
from diptych.models.pixels import decode_pixels
from diptych.models.training.cache import CaptionCache, Layout
from diptych.models.training.options import CaptionerTraining

_BATCH_ROWS = 64  # where no gradient is wanted

_Array = np.ndarray[Any, Any]


class Pictures:
    """Images to what the cache keeps, and from there to regions.

    Attributes:
        layout: Of a picture in the cache: features of a frozen encoder, or pixels.
    """

    def __init__(self, encoder: Encoder, options: CaptionerTraining, device: torch.device) -> None:
        self._encoder, self._options, self._device = encoder, options, device
        self._pool = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="decode")
        size = options.encoder_size_px
        if options.fine_tune:
            self.layout = Layout((size, size, 3), "uint8")
        else:
            self.layout = Layout((encoder.num_regions, encoder.dim), "float16", 2 if options.flips else 1)

    def encode(self, images: Sequence[bytes]) -> list[_Array]:
        """Returns an array of encoded images for each view of the cache."""
        size = self._options.encoder_size_px
        pixels = np.stack(list(self._pool.map(lambda data: decode_pixels(data, size), images)))
        if self._options.fine_tune:
            return [pixels]
        return [self._features(view) for view in (pixels, pixels[:, :, ::-1])[: self.layout.views]]

    def _features(self, pixels: _Array) -> _Array:
        tensor = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)
        with torch.inference_mode():
            parts = [self._encoder(part.to(self._device)) for part in torch.split(tensor, _BATCH_ROWS)]
        return torch.cat(parts).cpu().numpy().astype(np.float16)

    def load(self, split: CaptionCache, rows: Sequence[int], mirrored: Sequence[bool]) -> Tensor:
        """Returns rows of the cache, in memory."""
        last = len(split.pictures) - 1
        found = np.stack(
            [split.pictures[min(last, int(flip))][row] for row, flip in zip(rows, mirrored, strict=True)]
        )
        if self._options.fine_tune:
            for i in np.flatnonzero(mirrored):
                found[i] = found[i, :, ::-1].copy()
        return torch.from_numpy(found)

    def regions(self, loaded: Tensor) -> Tensor:
        """Returns (N, L, D) regions of what `load` gave, on the device."""
        loaded = loaded.to(self._device, non_blocking=True)
        return self._encoder(loaded.permute(0, 3, 1, 2)) if self._options.fine_tune else loaded.float()


class Step(NamedTuple):
    """A batch that is ready for the device.

    Attributes:
        pictures: As `Pictures.load` gives them.
        owners: (B,) the picture of each caption.
        words: (B, T + 1) from `START` to `END`, then `PAD`.
    """

    pictures: Tensor
    owners: Tensor
    words: Tensor


class Steps:
    """Makes steps of the rows of a cache.

    Args:
        pictures: Of all splits.
        vocabulary: That captions are counted in.
        options: Batch size, longest caption, mirroring and the seed of all that is drawn.
    """

    def __init__(self, pictures: Pictures, vocabulary: Vocabulary, options: CaptionerTraining) -> None:
        self._pictures, self._vocabulary, self._options = pictures, vocabulary, options

    def epoch(self, split: CaptionCache, epoch: int, at: int, captions_per_image: int) -> Iterator[Step]:
        """Yields the steps of an epoch of training from one on, the next one made ready in the background.

        Args:
            split: To train on.
            epoch: From 0; the order and all that is drawn follow from it and the seed.
            at: The first step.
            captions_per_image: Captions of each picture, drawn; 0 takes all.
        """
        options = self._options
        order = np.random.default_rng((options.seed, epoch)).permutation(len(split))
        starts = range(at * options.batch_size, len(order), options.batch_size)
        rows = (order[start : start + options.batch_size].tolist() for start in starts)

        def load(number: int, rows: list[int]) -> Step:
            draw = np.random.default_rng((options.seed, epoch, number))
            flips = draw.random(len(rows)) < (0.5 if options.flips else 0.0)
            captions = split.captions(rows)
            if most := captions_per_image:
                captions = [[texts[i] for i in draw.permutation(len(texts))[:most]] for texts in captions]
            return self._load(split, rows, captions, flips.tolist())

        with ThreadPoolExecutor(1, thread_name_prefix="load") as pool:
            ahead = None
            for number, chosen in enumerate(rows, at):
                ready, ahead = ahead, pool.submit(load, number, chosen)
                if ready is not None:
                    yield ready.result()
            if ahead is not None:
                yield ahead.result()

    def validation(self, split: CaptionCache) -> Iterator[tuple[Step, list[list[list[str]]]]]:
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
    ) -> Step:
        numbered = [self.number(texts) for texts in captions]
        flat = [[START, *numbers] for texts in numbered for numbers in texts]
        # in numpy: a second thread that computes with torch makes OpenMP let the first one's threads sleep
        words = np.full((len(flat), max(map(len, flat))), PAD)
        for i, numbers in enumerate(flat):
            words[i, : len(numbers)] = numbers
        owners = np.repeat(np.arange(len(rows)), [len(texts) for texts in numbered])
        pictures = self._pictures.load(split, rows, mirrored)
        return Step(pictures, torch.from_numpy(owners), torch.from_numpy(words))
