"""The captions of an earlier output, column-wise: a text model is fast, and must not wait for Python objects."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from diptych.transforms.schemas import RAW_TEXT
from diptych.transforms.sources.archives.shard_file import ShardDamage
from diptych.transforms.sources.base import InputFile, Record, Row, Shard
from diptych.transforms.sources.sharded.parquet_file import damaged_output, open_parquet
from diptych.transforms.sources.sharded.sharded_source import ShardedSource

_BATCH_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class TextSource(ShardedSource):
    """Captions of a Diptych output. They are clean already, and keys occur once."""

    format: ClassVar[str] = "text"

    def shard(self, name: str, file: InputFile, url: str) -> "TextShard":
        """Returns the shard of a file."""
        return TextShard(name, file.size_bytes, None, url, file.name)


@dataclasses.dataclass(frozen=True)
class TextShard(Shard):
    """One file.

    Attributes:
        url: Where it is.
        source: Its path below the input root.
    """

    url: str
    source: str

    @property
    def input(self) -> str:
        """The file's path below the input root."""
        return self.source

    def batches(self, skip: int) -> Iterator[pa.RecordBatch]:
        """Yields the rows after the first `skip`, of schema `RAW_TEXT`.

        Raises:
            InputError: The file is gone, or damaged: it can be made again, so nothing of it need be lost.
        """
        first_row = 0
        try:
            with open_parquet(self.url) as file:
                for batch in file.iter_batches(_BATCH_ROWS, columns=["key", "captions"], use_threads=False):
                    rows = _rows(batch, first_row)
                    first_row += len(batch)
                    if first_row > skip:
                        yield rows.slice(max(0, skip - (first_row - len(batch))))
        except (ShardDamage, pa.ArrowException, KeyError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise damaged_output(self.url, f"{error}.") from error

    def records(self, skip: int) -> Iterator[Record]:
        """Yields the rows, as any shard does; `batches` is the faster way."""
        for batch in self.batches(0):
            for row in batch.to_pylist():
                yield Row(row["key"], b"", "", row["captions"], self.source, row["row"])


def _rows(batch: pa.RecordBatch, first_row: int) -> pa.RecordBatch:
    rows = pa.array(range(first_row, first_row + len(batch)), pa.int64())
    columns = [batch["key"], pc.cast(batch["captions"], RAW_TEXT.field("captions").type), rows]
    return pa.RecordBatch.from_arrays(columns, schema=RAW_TEXT)
