"""What a training reads again and again, on disk: the pictures as the network takes them, the captions as words.

The pictures are one array in a file, mapped and not read whole: features of a frozen encoder, (N, L, D) float16, or
pixels, (N, S, S, 3) uint8. The captions are an Arrow file, mapped as well.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from diptych.models.errors import ModelError, one_line
from diptych.models.files.weights import write_file
from diptych.models.metrics.ptb_tokenizer import tokenize
from diptych.models.training.data import Batch

_Array = np.ndarray[Any, Any]
_OWN = re.compile(r"(cache\.json|captions\.arrow|(pictures-\d+|vectors)\.bin)(\..*)?|\..*\.tmp")
_CAPTIONS = pa.schema([("key", pa.string()), ("captions", pa.list_(pa.list_(pa.string())))])


class Layout(NamedTuple):
    """How one picture lies in the cache.

    Attributes:
        shape: Of one picture.
        dtype: Of its values.
        views: Arrays of pictures: as they are, and mirrored where that is wanted.
    """

    shape: tuple[int, ...]
    dtype: str
    views: int = 1

    def num_bytes(self, num_rows: int) -> int:
        """Returns how much disk so many pictures take."""
        return int(num_rows * self.views * np.prod(self.shape) * np.dtype(self.dtype).itemsize)


class CaptionCache:
    """The rows of one split that have a caption.

    Attributes:
        pictures: An array for each view, (N, …), mapped.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        meta = json.loads((folder / "cache.json").read_bytes())
        shape = (meta["rows"], *layout.shape)
        self.pictures = [
            np.memmap(folder / f"pictures-{view}.bin", layout.dtype, "r", shape=shape)
            if meta["rows"]
            else np.empty(shape)
            for view in range(layout.views)
        ]
        self._captions = pa.ipc.open_file(pa.memory_map(str(folder / "captions.arrow")))
        self._starts = meta["starts"]

    def __len__(self) -> int:
        return len(self.pictures[0])

    def captions(self, rows: Sequence[int]) -> list[list[list[str]]]:
        """Returns the captions of rows, as words."""
        found = []
        for row in rows:
            batch = int(np.searchsorted(self._starts, row, side="right")) - 1
            column = self._captions.get_batch(batch).column("captions")
            found.append(column[row - self._starts[batch]].as_py())
        return found

    def all_captions(self) -> Iterator[list[list[str]]]:
        """Yields the captions of each row, in order."""
        for batch in range(self._captions.num_record_batches):
            yield from self._captions.get_batch(batch).column("captions").to_pylist()


def open_cache(
    folder: Path,
    identity: str,
    layout: Layout,
    num_rows: int,
    batches: Callable[[], Iterable[Batch]],
    encode: Callable[[Sequence[bytes]], Sequence[_Array]],
    on_rows: Callable[[int], None],
    words: Callable[[str], list[str]] = tokenize,
) -> CaptionCache:
    """Returns a split's cache, made first where it is not there yet.

    Args:
        folder: Its own.
        identity: Stands for the data and for what makes pictures of them.
        layout: Of the pictures.
        num_rows: Rows that there may be.
        batches: Yields the rows.
        encode: Images to an array of pictures a view, (N, …) each.
        on_rows: Is told how many rows have been read.
        words: Cuts a caption; of one that gives nothing, nothing is kept.

    Raises:
        ModelError: There is no room for it, or it cannot be written.
    """
    identity = f"{identity} {tuple(layout)}"
    try:
        if json.loads((folder / "cache.json").read_bytes())["identity"] == identity:
            return CaptionCache(folder, layout)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        pass
    try:
        _empty(folder)
        _check_room(folder, layout.num_bytes(num_rows))
        meta = {"identity": identity, **_write(folder, layout, batches, encode, on_rows, words)}
    except OSError as error:
        raise ModelError(
            f"the cache {folder} cannot be written: {error.strerror or error}. It takes "
            f"{layout.num_bytes(num_rows) / 1e9:.1f} GB: make room, or name another place with --cache."
        ) from error
    write_file(folder / "cache.json", json.dumps(meta).encode())
    return CaptionCache(folder, layout)


def _empty(folder: Path) -> None:
    """Makes a folder that holds nothing, of one that holds no more than an earlier cache."""
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(folder.iterdir())
    foreign = [file.name for file in files if not _OWN.fullmatch(file.name) or file.is_dir()]
    if foreign:
        raise ModelError(
            f"{folder} is where the cache would be, but it holds {', '.join(foreign[:3])}, which no training put "
            "there. Name another folder with --cache."
        )
    for file in files:
        file.unlink()


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ModelError(
            f"the cache {folder} takes {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free there. Make "
            "room, or name another place with --cache."
        )


def _write(
    folder: Path,
    layout: Layout,
    batches: Callable[[], Iterable[Batch]],
    encode: Callable[[Sequence[bytes]], Sequence[_Array]],
    on_rows: Callable[[int], None],
    words: Callable[[str], list[str]],
) -> dict[str, Any]:
    """Writes pictures and captions; returns the number of rows, and where each batch of captions starts."""
    read, starts = 0, [0]
    views = [open(folder / f"pictures-{view}.bin", "wb") for view in range(layout.views)]  # noqa: SIM115
    try:
        with (
            pa.OSFile(str(folder / "captions.arrow"), "wb") as file,
            pa.ipc.new_file(file, _CAPTIONS) as writer,
        ):
            for batch in batches():
                captions = [[cut for text in texts if (cut := words(text))] for texts in batch.captions]
                kept = [i for i, texts in enumerate(captions) if texts]
                read += len(captions)
                on_rows(read)
                if not kept:
                    continue
                for view, pictures in zip(views, _encode(batch, kept, encode), strict=True):
                    view.write(np.ascontiguousarray(pictures, layout.dtype).data)
                columns = [[batch.keys[i] for i in kept], [captions[i] for i in kept]]
                writer.write_batch(pa.record_batch(columns, schema=_CAPTIONS))
                starts.append(starts[-1] + len(kept))
    finally:
        for view in views:
            view.close()
    return {"rows": starts.pop(), "starts": starts}


def _encode(
    batch: Batch, kept: list[int], encode: Callable[[Sequence[bytes]], Sequence[_Array]]
) -> Sequence[_Array]:
    try:
        return encode([batch.images[i] for i in kept])
    except (ValueError, OSError) as error:
        raise ModelError(
            f"an image among {batch.keys[kept[0]]} … {batch.keys[kept[-1]]} cannot be decoded ({one_line(error)}). "
            "Expected images as `diptych prepare` writes them: run `diptych verify` on the data."
        ) from error
