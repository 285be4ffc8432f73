"""Parquet shards: img2dataset's, Hugging Face's, an earlier Diptych output, or any with named columns."""

import contextlib
import dataclasses
import posixpath
from collections.abc import Iterator
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from models.errors import one_line
from transforms import storage
from transforms.errors import InputError
from transforms.sources.base import InputFile, Lost, Record, Row, Shard, Source, shard_names
from transforms.sources.columns import Columns, captions, check_metadata, find_columns, images, keys, metadata
from transforms.sources.shardfile import ShardDamage, image_name, input_files, metadata_text

_BATCH_ROWS = 64
_TEXT_BATCH_ROWS = 1024
_BATCH_BYTES = 4 << 20
_BUFFER_BYTES = 1 << 20
_REMOTE_BLOCK_BYTES = 4 << 20
_MAGIC = b"PAR1"
_SHORTEST_BYTES = 12


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
        for shard in shards[:1]:
            shard.check_columns()
        return list(shards)


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
    """

    url: str
    source: str
    metadata_columns: tuple[str, ...] = ()
    image_column: str | None = None
    caption_column: str | None = None
    key_column: str | None = None
    with_images: bool = True
    strict: bool = False

    @property
    def input(self) -> str:
        """The file's path below the input root."""
        return self.source

    def check_columns(self) -> None:
        """Checks the columns from the file's footer. A file that is damaged says nothing: its reader will.

        Raises:
            OptionError: A column is missing or of a type that cannot be used.
        """
        with contextlib.suppress(ShardDamage), open_parquet(self.url) as file:
            self._columns(file)
            check_metadata(file.schema_arrow, self.url, self.metadata_columns)

    def records(self, skip: int) -> Iterator[Record]:
        """Yields the rows in order. One whose image is null is lost as `missing_image`.

        A damaged page costs the rest of its row group, which is one `shard_corrupt`; reading goes on with the
        next. Images of skipped rows are read, so that damage is found again, but not taken.

        Raises:
            OptionError: A column is missing or of a type that cannot be used.
            InputError: The file is damaged, and the source is strict.
        """
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(open_parquet(self.url))
            except ShardDamage as damage:
                yield self._lost(0, damage.reason, f"{self.source}: {damage}")
                return
            columns = self._columns(file)
            num_records = first_row = 0
            for group in range(file.num_row_groups):
                for record in self._group(file, group, columns, first_row, skip - num_records):
                    num_records += 1
                    yield record
                first_row += file.metadata.row_group(group).num_rows

    def _group(
        self, file: pq.ParquetFile, group: int, columns: Columns, first_row: int, skip: int
    ) -> Iterator[Record]:
        """Yields the records of a row group; `skip` and the damaged row count from its start."""
        total = file.metadata.row_group(group).num_rows
        num_rows = 0
        damage: Exception | None = None
        for batch_rows in (_batch_rows(file.metadata.row_group(group), columns), 1):
            # After damage once more, row by row: of the batch that it hit, the first rows may be whole.
            position = 0
            try:
                for batch in file.iter_batches(batch_rows, [group], columns.names, use_threads=False):
                    if position >= num_rows:
                        needed = position + batch.num_rows > skip
                        yield from self._batch(batch, columns, first_row + position, needed)
                        num_rows += batch.num_rows
                    position += batch.num_rows
                if num_rows == total:
                    return
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                damage = error
        place = f"{self.source}, row group {group}, row {num_rows} of its {total}"
        message = f"{place}: {damage or 'there are no more'}. {total - num_rows} rows are lost."
        yield self._lost(first_row + num_rows, "shard_corrupt", message)

    def _lost(self, row: int, reason: str, message: str) -> Lost:
        if self.strict:
            raise damaged_output(self.url, message)
        return Lost("", row, reason, message)

    def _batch(
        self, batch: pa.RecordBatch, columns: Columns, first_row: int, needed: bool
    ) -> Iterator[Record]:
        every_image, every_path = images(batch, columns.image, needed)
        every_key = keys(batch, columns.key)
        every_caption = captions(batch, columns.caption)
        errors = metadata(batch, columns.error)
        fields = [metadata(batch, name) for name in columns.metadata]
        for index, image in enumerate(every_image):
            row = first_row + index
            key = every_key[index] or f"{self.name}-{row:08d}"
            path = every_path[index]
            if image is None:
                message = f"{self.source}, row {row}: column {columns.image} has no bytes"
                message += f"; its path: {path}" if path else ""
                message += f"; its error_message: {errors[index]}" if errors[index] else ""
                yield Lost(key, row, "missing_image", message)
                continue
            texts = [metadata_text(field[index]) for field in fields]
            name = posixpath.basename(path) if path else image_name(key, image)
            values = dict(zip(self.metadata_columns, texts, strict=True))
            yield Row(key, image, name, every_caption[index], self.source, row, values)

    def _columns(self, file: pq.ParquetFile) -> Columns:
        asked = self.image_column, self.caption_column, self.key_column
        return find_columns(file.schema_arrow, self.url, *asked, self.metadata_columns, self.with_images)


def damaged_output(url: str, message: str) -> InputError:
    """Returns the error of a damaged file of an earlier output."""
    return InputError(
        f"{url} is damaged: {message} Run `diptych verify` on its output, delete the files that it names, and run the "
        "job that wrote them again."
    )


@contextlib.contextmanager
def open_parquet(url: str, block_bytes: int = _REMOTE_BLOCK_BYTES) -> Iterator[pq.ParquetFile]:
    """Opens a file for reading in bounded memory.

    Args:
        url: Where it is.
        block_bytes: How much of it is fetched at a time, on a store.

    Raises:
        InputError: The file is gone or may not be read; also when that shows only while it is being read.
        ShardDamage: Its footer is not there or damaged.
    """
    fs, path = storage.locate(url)
    with storage.input_errors(url), contextlib.ExitStack() as stack:
        if isinstance(fs, LocalFileSystem):
            file = stack.enter_context(pa.OSFile(path, "rb"))
        else:
            # Columns are read side by side, so one readahead window would be fetched anew at each turn.
            cache = {"cache_type": "blockcache", "cache_options": {"maxblocks": 8}}
            raw = stack.enter_context(fs.open(path, "rb", block_size=block_bytes, **cache))
            file = stack.enter_context(pa.PythonFile(raw, mode="r"))
        yield _read_footer(file)


def _read_footer(file: pa.NativeFile) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(
            file, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
        )
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        size = file.size()
        file.seek(0)
        head = file.read(60)
        file.seek(max(0, size - len(_MAGIC)))
        if not head:
            raise ShardDamage("shard_truncated", "the file is empty") from error
        if not head.startswith(_MAGIC):
            raise ShardDamage("shard_corrupt", f"not Parquet: it begins with {head!r}") from error
        if size < _SHORTEST_BYTES or file.read() != _MAGIC:
            raise ShardDamage("shard_truncated", f"it ends at byte {size} without a footer") from error
        raise ShardDamage(
            "shard_corrupt", f"its footer, before byte {size}, is damaged: {one_line(error)}"
        ) from error


def _batch_rows(group: pq.RowGroupMetaData, columns: Columns) -> int:
    """Returns the rows of a batch: fewer where rows are large, so that memory stays bounded."""
    parts = (group.column(index) for index in range(group.num_columns))
    wanted = tuple(f"{name}." for name in columns.names)
    size_bytes = sum(
        part.total_uncompressed_size for part in parts if f"{part.path_in_schema}.".startswith(wanted)
    )
    most = _BATCH_ROWS if columns.image else _TEXT_BATCH_ROWS
    return max(1, min(most, _BATCH_BYTES // max(1, size_bytes // max(1, group.num_rows))))
