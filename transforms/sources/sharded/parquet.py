"""Parquet shards: img2dataset's, Hugging Face's, an earlier Diptych output, or any with named columns."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import pyarrow as pa

from diptych.models.files.location import redacted
from diptych.transforms.sources.archives.shard_file import ShardDamage, input_files
from diptych.transforms.sources.base import InputFile, Lost, Record, Shard, Source, shard_names
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

# Files whose footers are looked at before a job begins, as long as they have no rows or are damaged
_NUM_CHECKED = 8


@dataclasses.dataclass(frozen=True)
class ParquetSource(Source):
    """Parquet files with encoded images in a column.

    Attributes:
        urls: The shard files, sorted.
        root: The input root; shards are named by their path below it.
        metadata_columns: Columns to keep as metadata.
        with_images: Whether the images are read. Without them every row has empty bytes, and there need be no
            such column.
        strict: Whether damage is an error: an earlier output can be made again, so nothing of it need be lost.
    """

    urls: tuple[str, ...]
    root: str
    metadata_columns: tuple[str, ...] = ()
    with_images: bool = True
    strict: bool = False

    column_flags: ClassVar[frozenset[str]] = frozenset(
        {"image_column", "caption_column", "key_column", "metadata_columns"}
    )

    def inputs(self) -> list[InputFile]:
        """Returns the shard files with their sizes."""
        return input_files(self.urls, self.root)

    def shards(self, plan_folder: str, rows_per_shard: int) -> list[Shard]:
        """Returns a shard for each file, once the first file has shown that the columns are there.

        Raises:
            OptionError: A column is missing or of a type that cannot be used.
        """
        files = self.inputs()
        names = shard_names(file.name for file in files)
        shards = [
            ParquetShard(
                name,
                file.size_bytes,
                None,
                url,
                file.name,
                self.metadata_columns,
                self.columns.image,
                self.columns.caption,
                self.columns.key,
                self.with_images,
                self.strict,
            )
            for name, file, url in zip(names, files, self.urls, strict=True)
        ]
        any(shard.check_columns() for shard in shards[:_NUM_CHECKED])
        return list(shards)

    def column_notes(self) -> tuple[str, ...]:
        """Returns what the first file says of columns that might have been meant and are not read."""
        if not self.urls:
            return ()
        chosen = [
            name for name, column in zip(("image", "caption", "key"), self._chosen, strict=True) if column
        ]
        with contextlib.suppress(ShardDamage, ColumnError), open_parquet(self.urls[0]) as file:
            columns = find_columns(file.schema_arrow, self.urls[0], *self._chosen, ())
            return tuple(column_notes(file.schema_arrow, redacted(self.urls[0]), columns, chosen))
        return ()

    @property
    def _chosen(self) -> tuple[str | None, str | None, str | None]:
        return self.columns.image, self.columns.caption, self.columns.key


@dataclasses.dataclass(frozen=True)
class ParquetShard(Shard):
    """One Parquet file.

    Attributes:
        url: Where it is.
        source: Its path below the input root.
        metadata_columns: Columns to keep as metadata.
        image_column: Column of the images: binary, or a struct with `bytes`. None here and below takes a
            column with a usual name (`diptych.transforms.sources.sharded.columns`).
        caption_column: Column of the captions: a string or a list of strings. There need be none.
        key_column: Column of the keys: strings or integers. Where there is none, rows are numbered.
        with_images: As in `ParquetSource`.
        strict: As in `ParquetSource`.
        joins_captions: Whether rows of one image that follow each other become one row.
    """

    url: str
    source: str
    metadata_columns: tuple[str, ...] = ()
    image_column: str | None = None
    caption_column: str | None = None
    key_column: str | None = None
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
            if isinstance(record, Lost) and record.reason == "shard_corrupt":
                raise damaged_output(self.url, record.message)
            yield record

    def _all_lost(self, num_rows: int, error: ColumnError) -> Iterator[Record]:
        if self.strict:
            raise error
        for row in range(num_rows):
            yield Lost(numbered_key(self.name, row), row, error.reason, f"{self.source}, row {row}: {error}")

    def _lost(self, row: int, reason: str, message: str) -> Lost:
        if self.strict:
            raise damaged_output(self.url, message)
        return Lost("", row, reason, message)

    def _columns(self, schema: pa.Schema) -> Columns:
        chosen = self.image_column, self.caption_column, self.key_column
        return find_columns(schema, self.source, *chosen, self.metadata_columns, self.with_images)
