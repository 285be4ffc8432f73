"""Shards to chunks: what is committed is skipped, what comes next is read ahead."""

import dataclasses
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import apache_beam as beam
import pyarrow as pa
from apache_beam.pvalue import DoOutputsTuple, PCollection, TaggedOutput

from transforms.binary import binary_array
from transforms.chunk import Chunk, ChunkKey, Reject, reject_batch
from transforms.progress import progress
from transforms.schemas import raw_schema
from transforms.sink import Commit, committed
from transforms.sources.base import Record, Row, Shard

# A chunk also ends here, so that photos of many megabytes do not add up
_MAX_CHUNK_BYTES = 64 << 20

_T = TypeVar("_T")


def read_chunks(
    shard: Shard, chunk_rows: int, schema: pa.Schema, done: Sequence[Commit] = ()
) -> Iterator[Chunk]:
    """Yields the chunks of a shard that are not committed yet.

    A chunk ends after `chunk_rows` records or 64 MiB of images, so its place depends on nothing but the input.

    Args:
        shard: What to read.
        chunk_rows: Most records a chunk.
        schema: `raw_schema` of the rows.
        done: The commits of the shard's first chunks.
    """
    index, rows_before = len(done), sum(commit.read for commit in done)
    records: list[Record] = []
    num_bytes = 0
    for record in shard.rows(skip=rows_before):
        if len(records) >= chunk_rows or num_bytes >= _MAX_CHUNK_BYTES:
            yield _chunk(ChunkKey(shard.name, index), records, schema, last=False)
            index, records, num_bytes = index + 1, [], 0
        records.append(record)
        num_bytes += len(record.image) if isinstance(record, Row) else 0
    yield _chunk(ChunkKey(shard.name, index), records, schema, last=True)


def _chunk(key: ChunkKey, records: list[Record], schema: pa.Schema, last: bool) -> Chunk:
    rows = [record for record in records if isinstance(record, Row)]
    rejects = [Reject(*record) for record in records if not isinstance(record, Row)]
    batch = pa.RecordBatch.from_arrays([_column(field, rows) for field in schema], schema=schema)
    return Chunk(key, batch, reject_batch(key.shard, "read", rejects), last)


def _column(field: pa.Field, rows: list[Row]) -> pa.Array:
    if field.name == "image":
        return binary_array([row.image for row in rows])
    if field.name in Row._fields:
        return pa.array([getattr(row, field.name) for row in rows], field.type)
    return pa.array([row.metadata.get(field.name) for row in rows], field.type)


def read_ahead(items: Iterator[_T], depth: int = 1) -> Iterator[_T]:
    """Yields the same items, made in a background thread that stays at most `depth` finished items ahead.

    An error comes after the items before it. Closing the generator ends the thread.
    """
    ready: queue.Queue[_T | BaseException | None] = queue.Queue(depth)
    closed = threading.Event()

    def put(item: _T | BaseException | None) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()


@dataclasses.dataclass(eq=False)  # not frozen: Beam labels its transforms
class ReadShards(beam.PTransform[PCollection[Shard], DoOutputsTuple]):
    """Shards to chunks of raw rows, and to the commits that were found.

    Attributes:
        root: The output folder whose commits are skipped.
        dataset: The data set in it.
        chunk_rows: Most rows a chunk.
        metadata_columns: Names of the source's own columns to carry.
    """

    root: str
    dataset: str
    chunk_rows: int
    metadata_columns: tuple[str, ...] = ()

    def expand(self, shards: PCollection[Shard]) -> DoOutputsTuple:
        """Reads; the outputs are `chunks` and `committed`."""
        read = _Read(self.root, self.dataset, self.chunk_rows, raw_schema(self.metadata_columns))
        return shards | "Read" >> beam.ParDo(read).with_output_types(Chunk).with_outputs(
            "committed", main="chunks"
        )


class _Read(beam.DoFn):
    def __init__(self, root: str, dataset: str, chunk_rows: int, schema: pa.Schema) -> None:
        self._root, self._dataset, self._chunk_rows, self._schema = root, dataset, chunk_rows, schema

    def process(self, shard: Shard) -> Iterator[Any]:  # a union of outputs would become the type of each
        done = []
        for commit in committed(self._root, self._dataset, shard.name):
            done.append(commit)
            progress.committed(commit.read, commit.rejects(), resumed=True)
            yield TaggedOutput("committed", commit)
        if done and done[-1].last:
            progress.reading(shard.name, 1.0)
            return
        rows, num_bytes = sum(commit.read for commit in done), 0
        for chunk in read_ahead(read_chunks(shard, self._chunk_rows, self._schema, done)):
            rows += chunk.num_read
            num_bytes += chunk.rows.nbytes
            yield chunk
            progress.reading(shard.name, _fraction(shard, rows, num_bytes))
        progress.reading(shard.name, 1.0)


def _fraction(shard: Shard, rows: int, num_bytes: int) -> float:
    if shard.num_rows:
        return rows / shard.num_rows
    return num_bytes / shard.size_bytes if shard.size_bytes else 0.0
