"""The disk cache of what a training reads again and again: images as the network takes them, captions as words.

The images are one array in a file, mapped and not read whole: features of a frozen encoder, (N, L, D) float16, or
pixels, (N, S, S, 3) uint8. The captions are an Arrow file, mapped as well.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from diptych.models.errors import ModelError, one_line
from diptych.models.files.weights import write_file
from diptych.models.metrics.ptb_tokenizer import tokenize
from diptych.models.training.data import Batch, CaptionData, OnProgress, Progress

_Array = np.ndarray[Any, Any]
_Split = TypeVar("_Split")
_META, _CAPTIONS = "cache.json", "captions.arrow"
_OWN = re.compile(r"(cache\.json|captions\.arrow|(pictures-\d+|vectors)\.bin)(\..*)?|\..*\.tmp")
_SCHEMA = pa.schema([("key", pa.string()), ("captions", pa.list_(pa.list_(pa.string())))])


class Layout(NamedTuple):
    """The shape of one image in the cache.

    Attributes:
        shape: The shape of the image's array.
        dtype: The type of its values.
        views: The number of arrays of images: 2 with a mirrored one.
    """

    shape: tuple[int, ...]
    dtype: str
    views: int = 1

    def num_bytes(self, num_rows: int) -> int:
        """Returns the disk space of so many images."""
        return int(num_rows * self.views * np.prod(self.shape) * np.dtype(self.dtype).itemsize)


class Encoding(NamedTuple):
    """The way from rows to the cache.

    Attributes:
        layout: The layout of an image.
        encode: Turns encoded images into an array for each view, (N, …) each.
        split_caption: Cuts a caption into words; a caption without words is left out.
    """

    layout: Layout
    encode: Callable[[Sequence[bytes]], Sequence[_Array]]
    split_caption: Callable[[str], list[str]] = tokenize


class SplitRows(NamedTuple):
    """The rows of a split that is to be cached.

    Attributes:
        batches: Yields the rows.
        num_rows: The most rows that it yields.
        on_rows: Receives the number of rows read so far.
    """

    batches: Callable[[], Iterable[Batch]]
    num_rows: int
    on_rows: Callable[[int], None]


class CaptionCache:
    """The rows of one split that have a caption.

    Attributes:
        images: An array for each view, (N, …), mapped.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        meta = json.loads((folder / _META).read_bytes())
        shape = (meta["rows"], *layout.shape)
        self.images = [
            np.memmap(_images_path(folder, view), layout.dtype, "r", shape=shape)
            for view in range(layout.views)
        ]
        self._captions = pa.ipc.open_file(pa.memory_map(str(folder / _CAPTIONS)))
        self._starts = meta["starts"]

    def __len__(self) -> int:
        return len(self.images[0])

    def captions(self, rows: Sequence[int]) -> list[list[list[str]]]:
        """Returns the captions of rows, as words."""
        captions = []
        for row in rows:
            batch = int(np.searchsorted(self._starts, row, side="right")) - 1
            column = self._captions.get_batch(batch).column("captions")
            captions.append(column[row - self._starts[batch]].as_py())
        return captions

    def all_captions(self) -> Iterator[list[list[str]]]:
        """Yields the captions of each row, in order."""
        for batch in range(self._captions.num_record_batches):
            yield from self._captions.get_batch(batch).column("captions").to_pylist()


def open_splits(
    data: CaptionData, folder: Path, open_split: Callable[[Path, SplitRows], _Split], on_progress: OnProgress
) -> tuple[_Split, _Split]:
    """Returns the caches of the training rows and of the validation rows.

    Args:
        data: The rows.
        folder: The local folder of both caches.
        open_split: Opens one of them, in a folder of its own.
        on_progress: Receives the progress of reading.
    """

    def open_one(name: str, batches: Callable[[], Iterable[Batch]], num_rows: int) -> _Split:
        def on_rows(done: int) -> None:
            on_progress(Progress("reading", 0, done, num_rows))

        return open_split(folder / name, SplitRows(batches, num_rows, on_rows))

    train = open_one("train", data.train, data.num_train)
    return train, open_one("validation", data.validation, data.num_validation)


def open_cache(folder: Path, identity: str, rows: SplitRows, encoding: Encoding) -> CaptionCache:
    """Returns a split's cache, and writes it first where there is none.

    Args:
        folder: The split's own folder, named like the split.
        identity: Identifies the data and the encoding.
        rows: The rows of the split.
        encoding: The way from rows to the cache.

    Raises:
        ModelError: No row has a caption, there is no room for the cache, or it cannot be written.
    """
    layout = encoding.layout
    identity = f"{identity} {tuple(layout)}"
    try:
        meta = json.loads((folder / _META).read_bytes())
        is_there = meta["identity"] == identity
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        is_there = False
    if not is_there:
        try:
            _empty(folder)
            _check_room(folder, layout.num_bytes(rows.num_rows))
            meta = {"identity": identity, **_write(folder, rows, encoding)}
        except OSError as error:
            raise ModelError(
                f"the cache {folder} cannot be written: {error.strerror or error}. It takes "
                f"{layout.num_bytes(rows.num_rows) / 1e9:.1f} GB: make room, or name another place with `cache`."
            ) from error
        write_file(folder / _META, json.dumps(meta).encode())
    if not meta["rows"]:
        raise ModelError(
            f"none of the {rows.num_rows} {folder.name} rows has a caption. The model learns from images with "
            "captions: give some, or another `validation`."
        )
    return CaptionCache(folder, layout)


def _images_path(folder: Path, view: int) -> Path:
    return folder / f"pictures-{view}.bin"


def _empty(folder: Path) -> None:
    """Makes an empty folder, or empties one that holds only an earlier cache."""
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(folder.iterdir())
    foreign = [file.name for file in files if not _OWN.fullmatch(file.name) or file.is_dir()]
    if foreign:
        raise ModelError(
            f"{folder} is where the cache would be, but it holds {', '.join(foreign[:3])}, which no training put "
            "there. Name another folder with `cache`."
        )
    for file in files:
        file.unlink()


def _check_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ModelError(
            f"the cache {folder} takes {num_bytes / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free there. Make "
            "room, or name another place with `cache`."
        )


def _write(folder: Path, rows: SplitRows, encoding: Encoding) -> dict[str, Any]:
    """Writes images and captions; returns the number of rows, and the row that each batch of captions starts at."""
    layout = encoding.layout
    num_read, starts = 0, [0]
    views = [open(_images_path(folder, view), "wb") for view in range(layout.views)]  # noqa: SIM115
    try:
        with (
            pa.OSFile(str(folder / _CAPTIONS), "wb") as file,
            pa.ipc.new_file(file, _SCHEMA) as writer,
        ):
            for batch in rows.batches():
                captions = _split_captions(batch, encoding)
                kept = [i for i, of_image in enumerate(captions) if of_image]
                num_read += len(captions)
                rows.on_rows(num_read)
                if not kept:
                    continue
                for view, images in zip(views, _encode(batch, kept, encoding), strict=True):
                    view.write(np.ascontiguousarray(images, layout.dtype).data)
                columns = [[batch.keys[i] for i in kept], [captions[i] for i in kept]]
                writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
                starts.append(starts[-1] + len(kept))
    finally:
        for view in views:
            view.close()
    return {"rows": starts.pop(), "starts": starts}


def _split_captions(batch: Batch, encoding: Encoding) -> list[list[list[str]]]:
    """Returns the captions of each image as words, without those that have none."""
    return [
        [words for caption in captions if (words := encoding.split_caption(caption))]
        for captions in batch.captions
    ]


def _encode(batch: Batch, kept: list[int], encoding: Encoding) -> Sequence[_Array]:
    try:
        return encoding.encode([batch.images[i] for i in kept])
    except (ValueError, OSError) as error:
        raise ModelError(
            f"an image among {batch.keys[kept[0]]} … {batch.keys[kept[-1]]} cannot be decoded ({one_line(error)}). "
            "Expected images as `diptych prepare` writes them: run `diptych verify` on the data."
        ) from error
