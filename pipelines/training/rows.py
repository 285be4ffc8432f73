"""Rows to train on and rows to validate by, from wherever they come: always prepared ones, read in one order."""

import dataclasses
import hashlib
import itertools
import os
import posixpath
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from diptych.models.training.data import Batch
from diptych.pipelines.options.prepare import PrepareOptions
from diptych.pipelines.options.train import RowSource, TrainOptions
from diptych.pipelines.prepare import prepare
from diptych.transforms.errors import InputError, OptionError
from diptych.transforms.fingerprint import fingerprint
from diptych.transforms.images.resize import ResizeOptions
from diptych.transforms.prepared import PreparedImages, is_output
from diptych.transforms.sources.open import open_source

# For a training that reads no pictures: small ones are made, and read past, faster
_UNSEEN_SIZE_PX = 32


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows that have a caption, of prepared images or of a part of them.

    Attributes:
        parts: The prepared images.
        num_rows: How many rows.
        num_captions: How many captions those have.
        held_out: With a share, whether these are the rows that are held out, or the others; None without a share.
        share: Of the rows that are held out.
    """

    parts: tuple[PreparedImages, ...]
    num_rows: int = 0
    num_captions: int = 0
    held_out: bool | None = None
    share: float = 0.0

    def counted(self) -> "Rows":
        """Returns the same with the rows counted, by reading keys and captions once."""
        num_rows = num_captions = 0
        for _, captions in self._columns(()):
            num_rows += len(captions)
            num_captions += sum(map(len, captions))
        return dataclasses.replace(self, num_rows=num_rows, num_captions=num_captions)

    def batches(self) -> Iterator[Batch]:
        """Yields keys, images and captions, in the order of the data."""
        for batch, captions in self._columns(("image",)):
            images = batch.column("image").field("bytes").to_pylist()
            yield Batch(batch.column("key").to_pylist(), images, captions)

    def captions(self) -> Iterator[str]:
        """Yields every caption, in the order of the data."""
        for _, captions in self._columns(()):
            yield from itertools.chain.from_iterable(captions)

    def _columns(self, more: Sequence[str]) -> Iterator[tuple[pa.RecordBatch, list[list[str]]]]:
        for part in self.parts:
            for batch in part.rows(("key", "captions", *more)):
                captions = batch.column("captions").to_pylist()
                keys = batch.column("key").to_pylist()
                kept = [i for i, key in enumerate(keys) if captions[i] and self._is_ours(key)]
                if kept:
                    yield batch.take(pa.array(kept)), [captions[i] for i in kept]

    def _is_ours(self, key: str) -> bool:
        return self.held_out is None or is_held_out(key, self.share) == self.held_out


def is_held_out(key: str, share: float) -> bool:
    """Tells whether a row is for validation: by its key alone, whatever rows are beside it."""
    number = int.from_bytes(hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest(), "big")
    return number < share * 2**64


def describe(source: RowSource) -> dict[str, Any]:
    """Returns what stands for the rows of a source, as JSON values; no row is read.

    Raises:
        InputError: An input is not there.
        OptionError: The options do not go with it.
    """
    if _is_prepared(source):
        parts = [PreparedImages.open(url) for url in source.inputs]
        return {"images": [part.fingerprint for part in parts], "rows": sum(part.num_rows for part in parts)}
    opened = open_source(source.inputs, source.format, source.source)
    options = dataclasses.asdict(source.source)
    if source.source.images:  # where the folder is says nothing about the rows
        options["images"] = posixpath.basename(source.source.images.rstrip("/"))
    given = {name: value for name, value in options.items() if value}
    return {**fingerprint("prepare", opened.inputs(), {})["inputs"], **given}


def _is_prepared(source: RowSource) -> bool:
    found = [is_output(url) for url in source.inputs]
    if all(found):
        if source.source.split or source.source.images:
            flag = (
                f"--split {source.source.split}"
                if source.source.split
                else f"--images {source.source.images}"
            )
            raise OptionError(f"{flag} goes with an annotation file; {source.inputs[0]} is prepared already.")
        return True
    if any(found):
        prepared = source.inputs[found.index(True)]
        raise OptionError(
            f"{prepared} is an output of Diptych, and {source.inputs[found.index(False)]} is not. Give inputs of one "
            "kind: prepare the latter first."
        )
    return False


def open_rows(options: TrainOptions, folder: Path) -> tuple[Rows, Rows]:
    """Returns the rows to train on and those to validate by; what is not prepared is prepared first.

    Args:
        options: Of the training.
        folder: Local folder for what is prepared; a call after one that was killed goes on with it.

    Raises:
        DiptychError: The input cannot be read, or the folder not written.
        InputError: There are no rows with captions to train on, or none to validate by.
    """
    if options.validation is None:
        parts = _prepared(options.rows, folder / "train", options)
        share = options.validation_share
        train, validation = (Rows(parts, held_out=held_out, share=share) for held_out in (False, True))
    else:
        train = Rows(_prepared(options.rows, folder / "train", options))
        validation = Rows(_prepared(options.validation, folder / "validation", options))
    train, validation = train.counted(), validation.counted()
    _check_counts(options, train.num_rows, validation.num_rows)
    return train, validation


def _prepared(source: RowSource, folder: Path, options: TrainOptions) -> tuple[PreparedImages, ...]:
    if _is_prepared(source):
        return tuple(map(PreparedImages.open, source.inputs))
    size_px = options.size_px or _UNSEEN_SIZE_PX
    asked = PrepareOptions(
        inputs=source.inputs,
        output=os.fspath(folder),
        format=source.format,
        source=source.source,
        resize=ResizeOptions(size_px=size_px),
        quiet=options.quiet,
    )
    prepare(asked)
    return (PreparedImages.open(asked.output),)


def _check_counts(options: TrainOptions, num_train: int, num_validation: int) -> None:
    names = ", ".join(options.rows.inputs)
    if options.validation is None and num_train + num_validation == 0:
        raise InputError(
            f"{names} holds no row with a caption, so there is nothing to learn from. Expected images with captions: "
            "see the rejects, or check --caption_column."
        )
    if num_train == 0:
        what = "no row with a caption to train on" if options.validation else "no row that is not held out"
        raise InputError(f"{names} leaves {what}. Give more rows, or a smaller --validation_share.")
    if num_validation == 0 and options.validation is not None:
        raise InputError(
            f"{', '.join(options.validation.inputs)} holds no row with a caption, so nothing can be validated. Give "
            "others with --validation, or hold out a --validation_share."
        )
    if num_validation == 0:
        raise InputError(
            f"Of the {num_train:,} rows of {names} none is held out by --validation_share {options.validation_share}. "
            "Raise it, or give rows to validate by with --validation."
        )


def forget(folder: Path) -> None:
    """Deletes what `open_rows` prepared."""
    shutil.rmtree(folder, ignore_errors=True)
