"""The data that a training reads, and the progress and history that it reports."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

SCORES = ("BLEU-1", "BLEU-4", "CIDEr")


class Batch(NamedTuple):
    """Some rows of a data set.

    Attributes:
        keys: The images' keys.
        images: The encoded images.
        captions: Any number of captions for each image.
    """

    keys: list[str]
    images: list[bytes]
    captions: list[list[str]]


@dataclasses.dataclass(frozen=True)
class CaptionData:
    """Images with captions, to train on and to choose the best epoch by.

    Attributes:
        train: Yields the rows to train on, in the same order each time.
        validation: Yields the rows to validate by, in the same order each time.
        num_train: The number of rows that `train` yields.
        num_validation: The number of rows that `validation` yields.
        fingerprint: Identifies the rows and their order.
    """

    train: Callable[[], Iterator[Batch]]
    validation: Callable[[], Iterator[Batch]]
    num_train: int
    num_validation: int
    fingerprint: str


class Progress(NamedTuple):
    """The progress of a training.

    Attributes:
        phase: `reading` (images into the cache), `training` or `validating`.
        epoch: The ordinal of the epoch, from 0.
        done: The rows done in this phase and epoch.
        total: All rows of this phase and epoch.
        loss: The mean training loss of the epoch so far; None before the first step.
        entry: The epoch's entry of the history, once the epoch is validated.
    """

    phase: str
    epoch: int
    done: int
    total: int
    loss: float | None = None
    entry: Mapping[str, float] = {}


OnProgress = Callable[[Progress], None]
"""Receives the progress of a training."""

History = list[dict[str, float]]
"""An entry for each epoch: `epoch` (from 1), `seconds`, and the metrics by name.

A captioner's metrics are `train_loss`, `validation_loss` (without label smoothing) and each of `SCORES`; self-critical
epochs have a `reward`, the mean CIDEr of the captions that were drawn, in place of `train_loss`."""
