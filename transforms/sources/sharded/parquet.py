"""Parquet shards: img2dataset's, Hugging Face's, an earlier Diptych output, or any with named columns."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

import pyarrow as pa

from diptych.models.files.location import redacted
from diptych.transforms.chunk import Reject
from diptych.transforms.sources.archives.shard_file import ShardDamage
from diptych.transforms.sources.base import ColumnNames, InputFile, Record, Shard
from diptych.transforms.sources.sharded.columns import (
    ColumnError,
    Columns,
    check_metadata,
    column_notes,
    find_columns,
)
from diptych.transforms.sources.sharded.joined import DUPLICATE_HINT, join_captions, numbered_key
from diptych.transforms.sources.sharded.parquet_file import (
    damaged_output,
    open_file,
    open_parquet,
    parquet_file,
)
from diptych.transforms.sources.sharded.parquet_footer import read_row_groups
from diptych.transforms.sources.sharded.parquet_rows import RowReader
from diptych.transforms.sources.sharded.sharded_source import ShardedSource

# Files whose footers are looked at before a job begins, as long as they have no rows or are damaged
_NUM_CHECKED = 8


@dataclasses.dataclass(frozen=True)
class ParquetSource(ShardedSource):
    """Parquet files with encoded images in a column.

    Attributes:
        with_images: Whether the images are read. Without them every row has empty bytes, and there need be no
            such column.
        strict: Whether damage is an error: an earlier output can be made again, so nothing of it need be lost.
    """

    format: ClassVar[str] = "parquet"

    with_images: bool = True
    strict: bool = False

    def shard(self, name: str, file: InputFile, url: str) -> "ParquetShard":
        """Returns the shard of a file."""
        fields = name, file.size_bytes, None, url, file.name
        return ParquetShard(*fields, self.metadata_columns, self.columns, self.with_images, self.strict)

    def check(self, shards: Sequence[Shard]) -> None:
        """Checks the first files for the columns, until one has shown that they are there."""
        any(shard.check_columns() for shard in shards[:_NUM_CHECKED] if isinstance(shard, ParquetShard))

    def column_notes(self) -> tuple[str, ...]:
        """Returns what the first file says of columns that might have been meant and are not read."""
        if not self.urls:
            return ()
        chosen = [name for name, column in vars(self.columns).items() if column]
        with contextlib.suppress(ShardDamage, ColumnError), open_parquet(self.urls[0]) as file:
            columns = find_columns(file.schema_arrow, self.urls[0], self.columns, ())
            return tuple(column_notes(file.schema_arrow, redacted(self.urls[0]), columns, chosen))
        return ()


@dataclasses.dataclass(frozen=True)
class ParquetShard(Shard):
    """One Parquet file.

    Attributes:
        url: Where it is.
        source: Its path below the input root.
        metadata_columns: Columns to keep as metadata.
        columns: The columns that the user names: of the images (binary, or a struct with `bytes`), of the captions
            (a string or a list of strings; there need be none), and of the keys (strings or integers; without any, rows
            are numbered). Without a name, a column with a usual one is taken
            (`diptych.transforms.sources.sharded.columns`).
        with_images: As in `ParquetSource`.
        strict: As in `ParquetSource`.
        joins_captions: Whether rows of one image that follow each other become one row.
    """

    url: str
    source: str
    metadata_columns: tuple[str, ...] = ()
    columns: ColumnNames = ColumnNames()
    with_images: bool = True
    strict: bool = False
    joins_captions: bool = True

    duplicate_hint: ClassVar[str] = DUPLICATE_HINT

    @property
    def input(self) -> str:
        """The file's path below the input root."""
        return self.source

    def check_columns(self) -> bool:
        """Checks the columns from the file's footer; returns whether they could be.

        A file that is damaged says nothing, its reader will; one without rows need not have any columns.

        Raises:
            OptionError: A column is missing or of a type that cannot be used.
        """
        with contextlib.suppress(ShardDamage), open_parquet(self.url) as file:
            if file.metadata.num_rows:
                self._columns(file.schema_arrow)
                check_metadata(file.schema_arrow, self.url, self.metadata_columns)
                return True
        return False

    def records(self, skip: int) -> Iterator[Record]:
        """Yields the rows in order. One whose image is null is lost as `missing_image`.

        A damaged page costs the rest of its row group, which is one `shard_corrupt`; reading goes on with the
        next. Of a file without a column that is needed, every row is lost: the job's first file may have it. The images
        of skipped rows are there too: by them it shows which rows are one.

        Raises:
            InputError: The file is damaged, and the source is strict.
            ColumnError: A column is missing, and the source is strict.
        """
        with contextlib.ExitStack() as stack:
            handle = stack.enter_context(open_file(self.url))
            num_lost = ""
            try:
                file = parquet_file(handle)
                num_lost = f". {file.metadata.num_rows} rows are lost"
                row_groups = read_row_groups(handle)
            except ShardDamage as damage:
                yield self._lost(0, damage.reason, f"{self.source}: {damage}{num_lost}")
                return
            try:
                columns = self._columns(file.schema_arrow)
            except ColumnError as error:
                yield from self._all_lost(file.metadata.num_rows, error)
                return
            reader = RowReader(
                self.name, self.source, self.metadata_columns, handle, file, row_groups, columns
            )
            records = self._undamaged(reader.records()) if self.strict else reader.records()
            if self.joins_captions and columns.caption is not None:
                records = join_captions(records, self.name)
            yield from records

    def _undamaged(self, records: Iterator[Record]) -> Iterator[Record]:
        for record in records:
            if isinstance(record, Reject) and record.reason == "shard_corrupt":
                raise damaged_output(self.url, record.message)
            yield record

    def _all_lost(self, num_rows: int, error: ColumnError) -> Iterator[Record]:
        if self.strict:
            raise error
        for row in range(num_rows):
            yield Reject(
                numbered_key(self.name, row), row, error.reason, f"{self.source}, row {row}: {error}"
            )

    def _lost(self, row: int, reason: str, message: str) -> Reject:
        if self.strict:
            raise damaged_output(self.url, message)
        return Reject("", row, reason, message)

    def _columns(self, schema: pa.Schema) -> Columns:
        return find_columns(schema, self.source, self.columns, self.metadata_columns, self.with_images)
