"""Rows that earlier outputs have: a job that runs every night leaves them out, and makes what is new.

The keys of all earlier outputs are brought together once, before the run, into one file of sorted digests. It lies
with the output until the run is done, so that a run that goes on after a crash leaves out the same rows. Memory does
not grow with their number: digests are sorted a part at a time, and a worker maps the file.
"""

import dataclasses
import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.pvalue import PCollection
from apache_beam.utils.shared import Shared
from fsspec.implementations.local import LocalFileSystem

from diptych.transforms.chunk import Chunk, take_rows
from diptych.transforms.sources.archives.shard_file import ShardDamage
from diptych.transforms.sources.base import Shard
from diptych.transforms.sources.sharded.parquet import ParquetShard
from diptych.transforms.sources.sharded.parquet_file import damaged_output, open_parquet
from diptych.transforms.sources.sharded.prepared_captions import TextShard
from diptych.transforms.storage import input_errors, locate, put_whole

# With 128 bits, two of a billion keys are alike with a chance of 1e-21
_DIGEST_BYTES = 16
_DIGEST = f"S{_DIGEST_BYTES}"
_PARTS = 256
_PART_BYTES = 1 << 16
_FILES_AT_ONCE = 16
# Of a file on a store so much is fetched at a time: its keys are a small part of it
_BLOCK_BYTES = 1 << 16

_Digests = np.ndarray[Any, Any]


def write_done_keys(files: Iterable[str], url: str) -> int:
    """Writes the digests of the keys of data files, sorted, each once.

    Args:
        files: URLs of data files, of any outputs.
        url: The file to write; it appears whole or not at all.

    Returns:
        How many keys there are.

    Raises:
        InputError: A file is gone, may not be read, or is damaged.
        OutputError: The store refused the file.
    """
    with tempfile.TemporaryDirectory(prefix="diptych-keys-") as scratch:
        _sort_into_parts(files, Path(scratch))
        whole, num_keys = Path(scratch, "whole"), 0
        with open(whole, "wb") as file:
            for number in range(_PARTS):
                part = Path(scratch, f"{number:02x}")
                digests = np.unique(np.fromfile(part, _DIGEST)) if part.exists() else np.empty(0, _DIGEST)
                file.write(digests.tobytes())
                num_keys += len(digests)
        put_whole(url, os.fspath(whole))
    return num_keys


def _sort_into_parts(files: Iterable[str], scratch: Path) -> None:
    """Writes digests to a file for each first byte."""
    pending = [bytearray() for _ in range(_PARTS)]

    def flush(number: int) -> None:
        with open(scratch / f"{number:02x}", "ab") as part:
            part.write(pending[number])
        pending[number].clear()

    with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="keys") as pool:
        rest = iter(files)
        while batch := list(itertools.islice(rest, _FILES_AT_ONCE)):
            for digest in itertools.chain.from_iterable(pool.map(_digests_of, batch)):
                number = digest[0]
                pending[number] += digest
                if len(pending[number]) >= _PART_BYTES:
                    flush(number)
    for number in range(_PARTS):
        if pending[number]:
            flush(number)


def _digests_of(url: str) -> list[bytes]:
    """Returns the digests of the keys of a data file, each once."""
    return [_digest(key) for key in dict.fromkeys(_keys_of(url))]


def _keys_of(url: str) -> list[str]:
    try:
        with open_parquet(url, _BLOCK_BYTES) as file:
            return list(file.read(columns=["key"]).column("key").to_pylist())
    except (ShardDamage, pa.ArrowException, KeyError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise damaged_output(url, f"{error}.") from error


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=_DIGEST_BYTES).digest()


class DoneKeys:
    """Tells which keys a file of digests holds.

    Args:
        path: Of the file, on this machine.
    """

    def __init__(self, path: str) -> None:
        is_empty = os.path.getsize(path) == 0  # what cannot be mapped
        self._digests: _Digests = np.empty(0, _DIGEST) if is_empty else np.memmap(path, _DIGEST, "r")

    def are_done(self, keys: list[str]) -> _Digests:
        """Returns (N,) bool."""
        asked = np.frombuffer(b"".join(map(_digest, keys)), _DIGEST)
        if not len(self._digests):
            return np.zeros(len(keys), bool)
        places = np.searchsorted(self._digests, asked)
        found = self._digests[np.minimum(places, len(self._digests) - 1)]
        return np.asarray(found == asked)


def open_done_keys(url: str) -> DoneKeys:
    """Opens what `write_done_keys` wrote; one on a store is copied to this machine.

    Raises:
        InputError: It is gone, or cannot be read.
    """
    with input_errors(url):
        fs, path = locate(url)
        if isinstance(fs, LocalFileSystem):
            return DoneKeys(path)
        with tempfile.TemporaryDirectory(prefix="diptych-keys-") as scratch:
            local = os.path.join(scratch, "keys")
            fs.get_file(path, local)
            return DoneKeys(local)  # stays mapped when its name is gone


def without_done_shards(shards: Iterable[Shard], done: DoneKeys) -> tuple[list[Shard], int]:
    """Leaves out data files of which nothing is new, so that nobody reads their images; only their keys are read here.

    Args:
        shards: Data files of an earlier output; others are kept.
        done: What is done.

    Returns:
        The shards that have something new, in their order, and how many rows the others have.
    """
    kept, num_done = [], 0

    def num_rows_if_done(shard: Shard) -> int | None:
        names_keys = isinstance(shard, ParquetShard) and shard.columns.key
        if not isinstance(shard, ParquetShard | TextShard) or names_keys:
            return None  # its rows may have other keys than its column `key` says
        keys = _keys_of(shard.url)
        return len(keys) if done.are_done(keys).all() else None

    with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="keys") as pool:
        rest = iter(shards)
        while batch := list(itertools.islice(rest, _FILES_AT_ONCE)):
            for shard, num_rows in zip(batch, pool.map(num_rows_if_done, batch), strict=True):
                if num_rows is None:
                    kept.append(shard)
                else:
                    num_done += num_rows
    return kept, num_done


@dataclasses.dataclass(eq=False)  # not frozen: Beam labels its transforms
class DropDone(beam.PTransform[PCollection[Chunk], PCollection[Chunk]]):
    """Leaves out rows that earlier outputs have; the counter `done_before` says how many.

    Attributes:
        url: Of the file that `write_done_keys` wrote.
    """

    url: str

    def expand(self, chunks: PCollection[Chunk]) -> PCollection[Chunk]:
        """Applies `drop_done`."""
        return chunks | "Drop" >> beam.ParDo(_Drop(self.url)).with_output_types(Chunk)


def drop_done(chunk: Chunk, done: DoneKeys) -> Chunk:
    """Returns a chunk without the rows whose keys are done; they count as not read."""
    are_done = done.are_done(chunk.rows.column("key").to_pylist())
    kept = np.flatnonzero(~are_done).tolist()
    return chunk.leave_out(take_rows(chunk.rows, kept), {"done_before": int(are_done.sum())})


class _Drop(beam.DoFn):
    def __init__(self, url: str) -> None:
        self._url, self._shared = url, Shared()
        self._done: DoneKeys | None = None

    def process(self, chunk: Chunk) -> Iterator[Chunk]:
        # not before there is a chunk: a run that is begun again when all is done has no keys any more
        if self._done is None:
            self._done = self._shared.acquire(lambda: open_done_keys(self._url))  # once a process
        yield drop_done(chunk, self._done)
