"""Rows of an open Parquet file, read in bounded memory; damage costs no more than it must."""

import dataclasses
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from diptych.models.errors import one_line
from diptych.transforms.chunk import Reject
from diptych.transforms.schemas import MAX_IMAGE_BYTES
from diptych.transforms.sources.archives.shard_file import (
    MAX_RECORD_BYTES,
    ShardDamage,
    image_name,
    metadata_text,
)
from diptych.transforms.sources.base import Record, Row
from diptych.transforms.sources.sharded.column_values import Image, captions, images, keys, metadata, validate
from diptych.transforms.sources.sharded.columns import Columns
from diptych.transforms.sources.sharded.joined import numbered_key
from diptych.transforms.sources.sharded.parquet_file import READ_ERRORS
from diptych.transforms.sources.sharded.parquet_footer import ColumnChunk, Pages, read_pages

_BATCH_ROWS = 64
_TEXT_BATCH_ROWS = 1024
_BATCH_BYTES = 4 << 20
# So much a batch may hold where each of its rows is a value of a dictionary
_WORST_BATCH_BYTES, _WORST_TEXT_BATCH_BYTES = 64 << 20, 256 << 20
# So much the lists of a row group may hold where their values are those of a dictionary
_MAX_LISTS_BYTES = 4 << 30


@dataclasses.dataclass(frozen=True)
class RowReader:
    """Reads the rows of a file.

    Attributes:
        shard: The shard's name, of which the keys of rows without one are made.
        source: The file's path below the input root.
        metadata_columns: Names of the metadata columns.
        handle: The open file.
        file: The same as Parquet.
        row_groups: Its column chunks.
        columns: The columns to read.
    """

    shard: str
    source: str
    metadata_columns: tuple[str, ...]
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
        place = f"{self.source}, row group {group}, row {num_rows} of its {total}"
        problem = one_line(damage) if damage else "there are no more"
        message = f"{place}: {problem}. {total - num_rows} rows are lost."
        yield Reject("", first_row + num_rows, "shard_corrupt", message)

    def _batch(self, batch: pa.RecordBatch, first_row: int) -> Iterator[Record]:
        every_key = keys(batch, self.columns.key)
        texts = captions(batch, self.columns.caption)
        errors = metadata(batch, self.columns.error)
        fields = [metadata(batch, name) for name in self.columns.metadata]
        for index, image in enumerate(images(batch, self.columns.image)):
            row = first_row + index
            key = every_key[index] or numbered_key(self.shard, row)
            if image.data is None:
                yield Reject(key, row, image.reason, self._without_image(image, row, errors[index]))
                continue
            if index in texts.problems:
                message = f"{self.source}, row {row}: {texts.problems[index]}"
                yield Reject(key, row, "bad_annotation", message, image.data)
                continue
            name = image.path.rpartition("/")[2] if image.path else ""
            yield Row(
                key,
                image.data,
                name or image_name(key, image.data),
                texts.texts[index],
                self.source,
                row,
                dict(
                    zip(
                        self.metadata_columns,
                        [metadata_text(field[index]) for field in fields],
                        strict=True,
                    )
                ),
                _counters(image.num_others, texts.num_not_utf8.get(index, 0)),
            )

    def _without_image(self, image: Image, row: int, error: object) -> str:
        message = f"{self.source}, row {row}: column {self.columns.image} {image.problem or 'has no bytes'}"
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
    for largest_bytes, most_bytes, kind in (
        (pages.largest_bytes, MAX_RECORD_BYTES, ""),
        (pages.largest_tight_bytes, MAX_IMAGE_BYTES, " packed as no images or texts are"),
    ):
        if largest_bytes > most_bytes:
            message = f"a page of column {chunk.path}{kind} has {largest_bytes} bytes; at most {most_bytes} are read"
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
