"""Parquet shards: img2dataset's, Hugging Face's, an earlier Diptych output, or any with named columns."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from transforms.sources.base import InputFile, Lost, Record, Row, Shard, Source, shard_names
from transforms.sources.column_values import Image, captions, images, keys, metadata, validate
from transforms.sources.columns import (
    ColumnError,
    Columns,
    check_metadata,
    column_notes,
    find_columns,
)
from transforms.sources.joined import DUPLICATE_HINT, join_captions, numbered_key
from transforms.sources.parquet_file import READ_ERRORS, damaged_output, open_file, open_parquet, parquet_file
from transforms.sources.parquet_footer import ColumnChunk, Pages, read_pages, read_row_groups
from transforms.sources.shardfile import MAX_RECORD_BYTES, ShardDamage, image_name, input_files, metadata_text

_BATCH_ROWS = 64
_TEXT_BATCH_ROWS = 1024
_BATCH_BYTES = 4 << 20
# So much a batch may hold where each of its rows is a value of a dictionary
_WORST_BATCH_BYTES, _WORST_TEXT_BATCH_BYTES = 64 << 20, 256 << 20
# So much the lists of a row group may hold where their values are those of a dictionary
_MAX_LISTS_BYTES = 4 << 30
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
            return tuple(column_notes(file.schema_arrow, self.urls[0], columns, chosen))
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
            column with a usual name (`transforms.sources.columns`).
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
            reading = _Reading(self, handle, file, row_groups, columns)
            if self.joins_captions and columns.caption is not None:
                yield from join_captions(reading.records(), self.name)
            else:
                yield from reading.records()

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


@dataclasses.dataclass(frozen=True)
class _Reading:
    """A file that is being read.

    Attributes:
        shard: The file's.
        handle: The open file.
        file: The same as Parquet.
        row_groups: Its column chunks.
        columns: The columns to read.
    """

    shard: ParquetShard
    handle: pa.NativeFile
    file: pq.ParquetFile
    row_groups: Sequence[Sequence[ColumnChunk]]
    columns: Columns

    def records(self) -> Iterator[Record]:
        """Yields a record for each row, and one for rows that are lost to damage."""
        first_row = 0
        for group in range(self.file.num_row_groups):
            yield from self._group(group, first_row)
            first_row += self.file.metadata.row_group(group).num_rows

    def _group(self, group: int, first_row: int) -> Iterator[Record]:
        """Yields the records of a row group; the damaged row counts from its start."""
        total = self.file.metadata.row_group(group).num_rows
        if total == 0:
            return
        num_rows = 0
        damage: Exception | None = None
        for is_again in (False, True):
            # After damage once more, row by row: of the batch that it hit, the first rows may be whole.
            position = 0
            try:
                batch_rows = self._batch_rows(group, total)
                for batch in self.file.iter_batches(
                    1 if is_again else batch_rows, [group], self.columns.names, use_threads=False
                ):
                    validate(batch)
                    if position >= num_rows:
                        yield from self._batch(batch, first_row + position)
                        num_rows += batch.num_rows
                    position += batch.num_rows
                if num_rows == total:
                    return
            except (*READ_ERRORS, ShardDamage) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                damage = error
                if isinstance(error, ShardDamage):
                    break
        place = f"{self.shard.source}, row group {group}, row {num_rows} of its {total}"
        message = f"{place}: {damage or 'there are no more'}. {total - num_rows} rows are lost."
        yield self.shard._lost(first_row + num_rows, "shard_corrupt", message)

    def _batch(self, batch: pa.RecordBatch, first_row: int) -> Iterator[Record]:
        every_key = keys(batch, self.columns.key)
        texts = captions(batch, self.columns.caption)
        errors = metadata(batch, self.columns.error)
        fields = [metadata(batch, name) for name in self.columns.metadata]
        for index, image in enumerate(images(batch, self.columns.image)):
            row = first_row + index
            key = every_key[index] or numbered_key(self.shard.name, row)
            if image.data is None:
                yield Lost(key, row, image.reason, self._without_image(image, row, errors[index]))
                continue
            if index in texts.problems:
                message = f"{self.shard.source}, row {row}: {texts.problems[index]}"
                yield Lost(key, row, "bad_annotation", message, image.data)
                continue
            name = image.path.rpartition("/")[2] if image.path else ""
            yield Row(
                key,
                image.data,
                name or image_name(key, image.data),
                texts.texts[index],
                self.shard.source,
                row,
                dict(
                    zip(
                        self.shard.metadata_columns,
                        [metadata_text(field[index]) for field in fields],
                        strict=True,
                    )
                ),
                _counters(image.num_others, texts.num_not_utf8.get(index, 0)),
            )

    def _without_image(self, image: Image, row: int, error: object) -> str:
        message = (
            f"{self.shard.source}, row {row}: column {self.columns.image} {image.problem or 'has no bytes'}"
        )
        message += f"; its path: {image.path}" if image.path else ""
        return message + (f"; its error_message: {error}" if error else "")

    def _batch_rows(self, group: int, num_rows: int) -> int:
        """Returns the rows of a batch: fewer where rows are large, so that memory stays bounded.

        Raises:
            ShardDamage: A page is too large to be read.
        """
        wanted = tuple(f"{name}." for name in self.columns.names)
        chunks = [chunk for chunk in self.row_groups[group] if f"{chunk.path}.".startswith(wanted)]
        value_bytes = 0
        for chunk in chunks:
            pages = read_pages(self.handle, chunk)
            _check_sizes(chunk, pages, num_rows)
            value_bytes += pages.value_bytes
        size_bytes = sum(chunk.size_bytes for chunk in chunks)
        rows, worst_bytes = (
            (_BATCH_ROWS, _WORST_BATCH_BYTES)
            if self.columns.image
            else (_TEXT_BATCH_ROWS, _WORST_TEXT_BATCH_BYTES)
        )
        rows = min(rows, worst_bytes // max(1, value_bytes))
        return max(1, min(rows, _BATCH_BYTES // max(1, size_bytes // max(1, num_rows))))


def _check_sizes(chunk: ColumnChunk, pages: Pages, num_rows: int) -> None:
    """Checks that a column chunk can be read in bounded memory.

    Raises:
        ShardDamage: A page is too large, or lists of values from a dictionary are: a row may have any number of them.
    """
    if pages.largest_bytes > MAX_RECORD_BYTES:
        message = f"a page of column {chunk.path} has {pages.largest_bytes} bytes; at most {MAX_RECORD_BYTES} are read"
        raise ShardDamage("shard_corrupt", message)
    size_bytes = chunk.num_values * pages.dictionary_bytes // max(1, pages.num_dictionary_values)
    if size_bytes > _MAX_LISTS_BYTES and num_rows < chunk.num_values:
        message = f"the lists in column {chunk.path} have about {size_bytes} bytes; at most {_MAX_LISTS_BYTES} are read"
        raise ShardDamage("shard_corrupt", message)


_NO_COUNTERS: dict[str, int] = {}


def _counters(num_images: int, num_not_utf8: int) -> dict[str, int]:
    if not num_images and not num_not_utf8:
        return _NO_COUNTERS
    counters = {"images_passed_over": num_images, "captions_not_utf8": num_not_utf8}
    return {name: count for name, count in counters.items() if count}
