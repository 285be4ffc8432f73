"""Opens Parquet files for reading in bounded memory, and tells what is wrong with one that cannot be opened."""

import contextlib
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from diptych.models.errors import one_line
from diptych.transforms import storage
from diptych.transforms.errors import InputError
from diptych.transforms.sources.archives.shard_file import ShardDamage
from diptych.transforms.sources.sharded.parquet_footer import ENCRYPTED, is_encrypted

READ_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What Arrow raises of a file that is damaged; an OSError with a number is the file system's."""

_BUFFER_BYTES = 1 << 20
_REMOTE_BLOCK_BYTES = 4 << 20
_MAGIC = b"PAR1"
_SHORTEST_BYTES = 12


def damaged_output(url: str, message: str) -> InputError:
    """Returns the error of a damaged file of an earlier output."""
    return InputError(
        f"{url} is damaged: {message} Run `diptych verify` on its output, delete the files that it names, and run the "
        "job that wrote them again."
    )


@contextlib.contextmanager
def open_file(url: str, block_bytes: int = _REMOTE_BLOCK_BYTES) -> Iterator[pa.NativeFile]:
    """Opens a file for Arrow, which reads some places of it in turn.

    Args:
        url: Where it is.
        block_bytes: How much of it is fetched at a time, on a store.

    Raises:
        InputError: The file is gone or may not be read; also when that shows only while it is being read.
    """
    fs, path = storage.locate(url)
    with storage.input_errors(url), contextlib.ExitStack() as stack:
        if isinstance(fs, LocalFileSystem):
            yield stack.enter_context(pa.OSFile(path, "rb"))
            return
        # Columns are read side by side, so one readahead window would be fetched anew at each turn.
        cache = {"cache_type": "blockcache", "cache_options": {"maxblocks": 8}}
        raw = stack.enter_context(fs.open(path, "rb", block_size=block_bytes, **cache))
        yield stack.enter_context(pa.PythonFile(raw, mode="r"))


@contextlib.contextmanager
def open_parquet(url: str, block_bytes: int = _REMOTE_BLOCK_BYTES) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file; arguments and `InputError` are those of `open_file`.

    Raises:
        ShardDamage: Its footer is not there or damaged.
    """
    with open_file(url, block_bytes) as file:
        yield parquet_file(file)


def parquet_file(file: pa.NativeFile) -> pq.ParquetFile:
    """Returns an open file as Parquet.

    Raises:
        ShardDamage: Its footer is not there or damaged.
    """
    try:
        parquet = pq.ParquetFile(
            file, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
        )
        _ = parquet.schema_arrow.names  # raises where a name is not UTF-8
        return parquet
    except READ_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _footer_damage(file, error) from error


def _footer_damage(file: pa.NativeFile, error: Exception) -> ShardDamage:
    size = file.size()
    file.seek(0)
    head = file.read(60)
    file.seek(max(0, size - len(_MAGIC)))
    if not head:
        return ShardDamage("shard_truncated", "the file is empty")
    if is_encrypted(head):
        return ShardDamage("shard_corrupt", ENCRYPTED)
    if not head.startswith(_MAGIC):
        return ShardDamage("shard_corrupt", f"not Parquet: it begins with {head!r}")
    if size < _SHORTEST_BYTES or file.read() != _MAGIC:
        return ShardDamage("shard_truncated", f"it ends at byte {size} without a footer")
    return ShardDamage("shard_corrupt", f"its footer, before byte {size}, is damaged: {one_line(error)}")
