"""Shards to chunks: what is committed is skipped, what comes next is read ahead."""

import dataclasses
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import apache_beam as beam
import pyarrow as pa
from apache_beam.pvalue import DoOutputsTuple, PCollection, TaggedOutput
from apache_beam.typehints.decorators import no_annotations

from diptych.models.files.location import redacted
from diptych.transforms.arrow_binary import BinaryBuilder
from diptych.transforms.chunk import Chunk, ChunkKey, Reject, add_counts, concat, reject_batch
from diptych.transforms.progress import progress
from diptych.transforms.schemas import RAW_TEXT, raw_schema
from diptych.transforms.sink import Commit, Sink, committed, read_commit
from diptych.transforms.sources.base import Record, Row, Shard
from diptych.transforms.sources.sharded.prepared_captions import TextShard

# A chunk also ends here, so that photos of many megabytes do not add up
_MAX_CHUNK_BYTES = 64 << 20

_T = TypeVar("_T")


def read_chunks(
    shard: Shard, chunk_rows: int, schema: pa.Schema, done: Sequence[Commit] = (), keep_bytes: bool = False
) -> Iterator[Chunk]:
    """Yields the chunks of a shard that are not committed yet.

    A chunk ends after `chunk_rows` records or 64 MiB of images, so its place depends on nothing but the input.

    Args:
        shard: What to read.
        chunk_rows: Most records a chunk.
        schema: `raw_schema` of the rows, or `RAW_TEXT`: the images are not read then.
        done: The commits of the shard's first chunks.
        keep_bytes: Whether a reject keeps the original bytes.
    """
    chunk = _ChunkBuilder(ChunkKey(shard.name, len(done)), schema, shard.input)
    for record in shard.rows(
        skip=sum(commit.records for commit in done), with_images="image" in schema.names
    ):
        if chunk.num_records >= chunk_rows or chunk.num_bytes >= _MAX_CHUNK_BYTES:
            yield chunk.finish(last=False)
            chunk = _ChunkBuilder(ChunkKey(shard.name, chunk.key.index + 1), schema, shard.input)
        if isinstance(record, Reject) and not keep_bytes:
            record = record._replace(data=None)
        chunk.append(record)
    yield chunk.finish(last=True)


def read_text_chunks(shard: TextShard, chunk_rows: int, done: Sequence[Commit] = ()) -> Iterator[Chunk]:
    """Yields the chunks of captions of a shard that are not committed yet, as `read_chunks` cuts them.

    Args:
        shard: What to read.
        chunk_rows: Most rows a chunk.
        done: The commits of the shard's first chunks.
    """
    key, parts = ChunkKey(shard.name, len(done)), [pa.RecordBatch.from_pylist([], schema=RAW_TEXT)]
    num_rows = num_bytes = 0
    no_rejects = reject_batch(shard.name, "read", ())
    for batch in shard.batches(skip=sum(commit.records for commit in done)):
        while len(batch):
            if num_rows >= chunk_rows or num_bytes >= _MAX_CHUNK_BYTES:
                yield Chunk(key, concat(parts), no_rejects, last=False, input=shard.input)
                key, parts = ChunkKey(shard.name, key.index + 1), parts[:1]
                num_rows = num_bytes = 0
            part = batch.slice(0, chunk_rows - num_rows)
            batch = batch.slice(len(part))
            parts.append(part)
            num_rows, num_bytes = num_rows + len(part), num_bytes + part.nbytes
    yield Chunk(key, concat(parts), no_rejects, last=True, input=shard.input)


class _ChunkBuilder:
    """A chunk that is filled record by record."""

    def __init__(self, key: ChunkKey, schema: pa.Schema, input: str) -> None:
        self.key, self._schema, self._input = key, schema, input
        self._has_images = "image" in schema.names
        self.images = BinaryBuilder()
        self._rows: list[Row] = []
        self._rejects: list[Reject] = []
        self._num_other_bytes = 0
        self._counters: dict[str, int] = {}

    @property
    def num_records(self) -> int:
        return len(self._rows) + len(self._rejects)

    @property
    def num_bytes(self) -> int:
        return self.images.num_bytes + self._num_other_bytes

    def append(self, record: Record) -> None:
        if record.counters:
            self._counters = add_counts(self._counters, record.counters)
        if isinstance(record, Row):
            if self._has_images:
                self.images.append(record.image)
            self._num_other_bytes += sum(map(len, record.captions))
            self._rows.append(record._replace(image=b""))  # it is in the column now
        else:
            self._rejects.append(record._replace(message=redacted(record.message)))
            self._num_other_bytes += len(record.data or b"")

    def finish(self, last: bool) -> Chunk:
        columns = [self._column(field) for field in self._schema]
        rows = pa.RecordBatch.from_arrays(columns, schema=self._schema)
        rejects = reject_batch(self.key.shard, "read", self._rejects)
        return Chunk(self.key, rows, rejects, last, self._counters, input=self._input)

    def _column(self, field: pa.Field) -> pa.Array:
        if field.name == "image":
            return self.images.finish()
        if field.name in Row._fields:
            return pa.array([getattr(row, field.name) for row in self._rows], field.type)
        return pa.array([row.metadata.get(field.name) for row in self._rows], field.type)


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
        sinks: Where the chunks are going; what is committed in all of them is skipped.
        chunk_rows: Most rows a chunk.
        metadata_columns: Names of the source's own columns to carry.
        keep_bytes: Whether a reject keeps the original bytes.
        with_images: Whether the images are wanted; without them, rows are of schema `RAW_TEXT`.
    """

    sinks: tuple[Sink, ...]
    chunk_rows: int
    metadata_columns: tuple[str, ...] = ()
    keep_bytes: bool = False
    with_images: bool = True

    # Beam takes no hint for several outputs, and would say so each time; the decorator is not typed
    @no_annotations  # type: ignore[untyped-decorator]
    def expand(self, shards: PCollection[Shard]) -> DoOutputsTuple:
        """Reads; the outputs are `chunks` and `committed`."""
        schema = raw_schema(self.metadata_columns) if self.with_images else RAW_TEXT
        read = _Read(self.sinks, self.chunk_rows, schema, self.keep_bytes)
        return shards | "Read" >> beam.ParDo(read).with_output_types(Chunk).with_outputs(
            "committed", main="chunks"
        )


class _Read(beam.DoFn):
    def __init__(self, sinks: tuple[Sink, ...], chunk_rows: int, schema: pa.Schema, keep_bytes: bool) -> None:
        self._sinks, self._chunk_rows, self._schema, self._keep_bytes = sinks, chunk_rows, schema, keep_bytes

    def process(self, shard: Shard) -> Iterator[Any]:  # a union of outputs would become the type of each
        # as far as all data sets are: what one of them has beyond that is written again, the same
        done = []
        for commits in zip(*(committed(sink, shard.name, shard.input) for sink in self._sinks), strict=False):
            if self._is_to_retry(commits):
                break
            done.append(commits[0])
            yield from _found(commits)
        if not (done and done[-1].last):
            yield from self._chunks(shard, done)
        progress.reading(shard.name, 1.0)

    def _chunks(self, shard: Shard, done: list[Commit]) -> Iterator[Any]:
        """Yields the chunks after those that are done; of those that are committed later, the commits."""
        records, num_bytes = sum(commit.records for commit in done), 0
        has_files = all(sink.has_files for sink in self._sinks)
        if isinstance(shard, TextShard):
            chunks = read_text_chunks(shard, self._chunk_rows, done)
        else:
            chunks = read_chunks(shard, self._chunk_rows, self._schema, done, self._keep_bytes)
        for chunk in read_ahead(chunks):
            records += chunk.num_records
            num_bytes += chunk.rows.nbytes
            commits = self._commits(chunk) if has_files else []
            # an image that is there by now may end a chunk earlier: what follows it has other rows then
            has_files = has_files and all(commit.records == chunk.num_records for commit in commits)
            if commits and has_files and not self._is_to_retry(commits):
                yield from _found(commits)
            else:
                yield chunk
            progress.reading(shard.name, _fraction(shard, records, num_bytes))

    def _commits(self, chunk: Chunk) -> list[Commit]:
        """Returns the commits of a chunk if all data sets have one, else none."""
        commits = [read_commit(sink, chunk.key, chunk.input) for sink in self._sinks]
        return [commit for commit in commits if commit] if all(commits) else []

    def _is_to_retry(self, commits: Sequence[Commit]) -> bool:
        return any(map(Sink.is_to_retry, self._sinks, commits))


def _found(commits: Sequence[Commit]) -> Iterator[Any]:
    """Yields the commits of a chunk that an earlier run wrote."""
    first = commits[0]
    progress.committed(first.shard, first.index, first.read, first.rejects(), resumed=True)
    for commit in commits:
        yield TaggedOutput("committed", commit)


def _fraction(shard: Shard, records: int, num_bytes: int) -> float:
    if shard.num_rows:
        return records / shard.num_rows
    return num_bytes / shard.size_bytes if shard.size_bytes else 0.0
