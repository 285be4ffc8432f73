"""The element: the only thing that flows between transforms is a chunk of rows, with its own rejects."""

import dataclasses
import json
import struct
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.coders.typecoders import registry

from diptych.transforms.schemas import REJECTS


@dataclasses.dataclass(frozen=True, order=True)
class ChunkKey:
    """Names a chunk, and so its output file.

    Attributes:
        shard: Stable, unique name of the shard it was read from.
        index: Ordinal of the chunk in its shard.
    """

    shard: str
    index: int

    def file_name(self) -> str:
        """Returns the name of the Parquet file that this chunk becomes."""
        return f"{self.shard}-{self.index:05d}.parquet"


class Reject(NamedTuple):
    """A row that goes to the rejects.

    Attributes:
        key: Identity of the image, empty where unknown.
        row: Ordinal of the row in its input file.
        reason: One of `diptych.transforms.schemas.REASONS`.
        message: What was found, for people.
        data: The original bytes, or None.
        counters: What the reader had to mend or leave out beside this row, by name.
    """

    key: str
    row: int
    reason: str
    message: str
    data: Any = None
    counters: Mapping[str, int] = {}


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Rows, and the rows that were lost on their way: together, all the rows that were read.

    Attributes:
        key: Names the chunk.
        rows: The rows that are still good.
        rejects: The dead letters, of schema `REJECTS`.
        last: Whether this is the last chunk of its shard.
        counters: What the transforms did to the rows, by name.
        records: Records of the shard that it was read from; None where each is a row.
        input: What its shard was read from.
    """

    key: ChunkKey
    rows: pa.RecordBatch
    rejects: pa.RecordBatch
    last: bool
    counters: Mapping[str, int] = dataclasses.field(default_factory=dict)
    records: int | None = None
    input: str = ""

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    @property
    def num_read(self) -> int:
        """Number of rows that were read for this chunk: the good and the rejected."""
        return int(self.rows.num_rows + self.rejects.num_rows)

    @property
    def num_records(self) -> int:
        """Number of records of the shard that became this chunk: what a run that goes on skips by."""
        return self.num_read if self.records is None else self.records

    def advance(
        self,
        stage: str,
        rows: pa.RecordBatch,
        rejects: Iterable[Reject] = (),
        counters: Mapping[str, int] | None = None,
    ) -> "Chunk":
        """Returns the chunk after a stage.

        Args:
            stage: The stage that did this, one of `REASONS`.
            rows: The rows that are left.
            rejects: The rows that the stage rejected.
            counters: What the stage did, added to the chunk's own.
        """
        lost = reject_batch(self.key.shard, stage, rejects)
        if len(rows) + len(lost) != len(self.rows):
            raise AssertionError(
                f"stage {stage!r} turned {len(self.rows)} rows into {len(rows)} and {len(lost)} rejects"
            )
        return dataclasses.replace(
            self,
            rows=rows,
            rejects=concat([self.rejects, lost]),
            counters=add_counts(self.counters, counters or {}),
        )

    def branch(self) -> "Chunk":
        """Returns the chunk as a job would read it from the output: its rows alone; `num_records` stays."""
        return dataclasses.replace(
            self,
            rejects=reject_batch(self.key.shard, "read", ()),
            counters={},
            records=self.num_records,
        )

    def leave_out(self, rows: pa.RecordBatch, counters: Mapping[str, int]) -> "Chunk":
        """Returns the chunk with some of its rows, as if the others had not been read; `num_records` stays.

        Args:
            rows: The rows that are left.
            counters: What was left out, added to the chunk's own.
        """
        counts = add_counts(self.counters, counters)
        return dataclasses.replace(self, rows=rows, counters=counts, records=self.num_records)

    def explode(self, stage: str, rows: pa.RecordBatch, rejects: Iterable[Reject] = ()) -> "Chunk":
        """Returns the chunk after a stage that makes several rows of one; `num_records` stays.

        Args:
            stage: The stage that did this, one of `REASONS`.
            rows: The rows made.
            rejects: The rows of which none could be made.
        """
        lost = reject_batch(self.key.shard, stage, rejects)
        return dataclasses.replace(
            self, rows=rows, rejects=concat([self.rejects, lost]), records=self.num_records
        )


def reject_batch(shard: str, stage: str, rejects: Iterable[Reject]) -> pa.RecordBatch:
    """Returns rejects of one stage as a batch of schema `REJECTS`."""
    rejects = list(rejects)
    columns = [
        [r.key for r in rejects],
        [shard] * len(rejects),
        [r.row for r in rejects],
        [stage] * len(rejects),
        [r.reason for r in rejects],
        [r.message for r in rejects],
        [r.data for r in rejects],
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, REJECTS, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=REJECTS)


def concat(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    """Returns batches of one schema as one batch; a single one that is not empty is not copied."""
    filled = [batch for batch in batches if len(batch)]
    return pa.concat_batches(filled) if len(filled) > 1 else (filled or batches)[0]


def take_rows(rows: pa.RecordBatch, kept: list[int]) -> pa.RecordBatch:
    """Returns the rows at these ordinals, without a copy where that is all of them."""
    return rows if len(kept) == len(rows) else rows.take(pa.array(np.asarray(kept, np.int64)))


def add_counts(left: Mapping[str, int], right: Mapping[str, int]) -> dict[str, int]:
    """Returns the sum of two sets of counters; a counter that is zero is left out."""
    total = {name: left.get(name, 0) + right.get(name, 0) for name in sorted({*left, *right})}
    return {name: count for name, count in total.items() if count}


class ChunkCoder(beam.coders.Coder):
    """Chunk as a header and two Arrow IPC streams: a slice of a batch is coded as the slice, not its parent."""

    _LENGTHS = struct.Struct("<QQ")

    def encode(self, value: Chunk) -> bytes:
        """Returns the chunk as bytes."""
        header = json.dumps(
            [
                value.key.shard,
                value.key.index,
                value.last,
                dict(value.counters),
                value.records,
                value.input,
            ],
            sort_keys=True,
        ).encode()
        rows = _to_ipc(value.rows)
        lengths = self._LENGTHS.pack(len(header), len(rows))
        return b"".join([lengths, header, rows, _to_ipc(value.rejects)])

    def decode(self, encoded: bytes) -> Chunk:
        """Returns the chunk that `encode` was given."""
        header_bytes, rows_bytes = self._LENGTHS.unpack_from(encoded)
        start = self._LENGTHS.size
        buffer = pa.py_buffer(encoded)
        shard, index, last, counters, records, input = json.loads(encoded[start : start + header_bytes])
        rows = buffer.slice(start + header_bytes, rows_bytes)
        rejects = buffer.slice(start + header_bytes + rows_bytes)
        return Chunk(
            ChunkKey(shard, index), _from_ipc(rows), _from_ipc(rejects), last, counters, records, input
        )

    def estimate_size(self, value: Chunk) -> int:
        """Returns about the encoded size in bytes, without encoding."""
        return int(value.rows.nbytes + value.rejects.nbytes)

    def is_deterministic(self) -> bool:
        """Returns True: equal chunks have equal bytes."""
        return True

    def to_type_hint(self) -> type[Chunk]:
        """Returns the type that is coded."""
        return Chunk


def _to_ipc(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def _from_ipc(buffer: pa.Buffer) -> pa.RecordBatch:
    return pa.ipc.open_stream(buffer).read_next_batch()


registry.register_coder(Chunk, ChunkCoder)
