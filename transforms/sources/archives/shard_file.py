"""Shard files as streams: found below the input root, read once from start to end, unpacked where packed.

Formats whose files are shards (tar, TFRecord) share how a file is opened, what damage in it is, and how much
of it may be in memory at a time.
"""

import contextlib
import io
import json
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from diptych.models.files.location import redacted
from diptych.transforms import storage
from diptych.transforms.errors import InputError
from diptych.transforms.schemas import MAX_IMAGE_BYTES
from diptych.transforms.sources.archives.compression import (
    DECOMPRESSION_ERRORS,
    DECOMPRESSORS,
    MAGIC_BYTES,
    compression_of,
    is_zlib,
)
from diptych.transforms.sources.base import InputFile

# The longest record or member that is read as one; Beam and Arrow stop at 2 GiB a buffer.
MAX_RECORD_BYTES = 1 << 30

_BUFFER_BYTES = 1 << 20
_REMOTE_BLOCK_BYTES = 4 << 20
_PACKED_BYTES = 1 << 16
# No file is as long: where a damaged length says so, a seek would be an error of the file system.
_MAX_SEEK_BYTES = 1 << 40
# A buffer of this size costs address space, and memory only as far as it is filled.
_WHOLE_READ_BYTES = MAX_IMAGE_BYTES
# What Arrow has unpacked in a call that meets damage is lost.
_LZ4_READ_BYTES = 8 << 10
# What images begin with, for naming one whose source does not.
_IMAGE_MAGIC = {
    b"\xff\xd8": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
}


class ShardDamage(Exception):
    """A shard that cannot be read on; whoever reads it makes a `Reject` record of this.

    Attributes:
        reason: `shard_truncated` or `shard_corrupt`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def input_files(urls: Sequence[str], root: str) -> list[InputFile]:
    """Returns name below `root` and size of each file.

    Raises:
        InputError: A file is gone or may not be read, or its name is no text.
    """
    files = []
    for url in urls:
        fs, path = storage.locate(url)
        with storage.input_errors(url):
            size_bytes = int(fs.info(path)["size"] or 0)
        name = storage.relative_name(url, root) or posixpath.basename(redacted(path))
        if name != encodable(name):
            shown = name.encode("utf-8", "backslashreplace").decode()
            raise InputError(
                f"The input file {shown} has a name that is not UTF-8. Rename it, and run again."
            )
        files.append(InputFile(name, size_bytes))
    return files


@contextlib.contextmanager
def open_shard(url: str) -> Iterator[io.BufferedReader]:
    """Opens a file for sequential reading in large blocks.

    Raises:
        InputError: The file is gone or may not be read; also when that shows only while it is being read.
    """
    fs, path = storage.locate(url)
    with storage.input_errors(url):
        if isinstance(fs, LocalFileSystem):
            raw: Any = io.FileIO(path)
        else:
            raw = fs.open(path, "rb", block_size=_REMOTE_BLOCK_BYTES)
        file = io.BufferedReader(raw, _BUFFER_BYTES)
        with file:
            yield file


def unpacked(file: io.BufferedReader, with_zlib: bool = False) -> io.BufferedReader:
    """Returns the content of a compressed file, told by its first bytes; any other as it is.

    Args:
        file: Its content may be of gzip, bzip2, xz, zstd or lz4.
        with_zlib: Whether it may be of zlib too, whose two bytes other files may begin with.
    """
    magic = file.peek(MAGIC_BYTES)
    kind = compression_of(magic) or ("zlib" if with_zlib and is_zlib(magic) else None)
    if kind is None:
        return file
    raw = _UnpackLz4(file) if kind == "lz4" else _Unpack(file, kind)
    return io.BufferedReader(raw, _BUFFER_BYTES)


def read_up_to(file: BinaryIO, size: int) -> bytes:
    """Reads `size` bytes, or what is left of the file; a length that lies costs no memory."""
    if size <= _WHOLE_READ_BYTES:
        return file.read(size)
    pieces = []
    while size > 0 and (piece := file.read(min(size, _WHOLE_READ_BYTES))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def pass_over(file: io.BufferedReader, size: int) -> bool:
    """Passes over `size` bytes; returns whether they were all there."""
    if size > _MAX_SEEK_BYTES:
        return False
    if size and file.seekable():
        # A seek beyond the end succeeds: only reading the last byte tells.
        file.seek(size - 1, io.SEEK_CUR)
        return len(file.read(1)) == 1
    while size > 0 and (piece := file.read(min(size, _BUFFER_BYTES))):
        size -= len(piece)
    return size == 0


IMAGE_MAGIC = (*_IMAGE_MAGIC, b"RIFF")
"""What images begin with."""


def image_name(key: str, image: bytes) -> str:
    """Returns a file name for an image that has none: the key's last part, and what the first bytes say."""
    extension = next((name for magic, name in _IMAGE_MAGIC.items() if image.startswith(magic)), "jpg")
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        extension = "webp"
    return f"{posixpath.basename(key)}.{extension}"


def to_text(data: bytes) -> str:
    """Decodes UTF-8 with or without BOM; what is not UTF-8 becomes replacement characters."""
    return data.decode("utf-8-sig", "replace")


def encodable(text: str) -> str:
    """Returns text that UTF-8 can hold: JSON may escape half a surrogate pair, which becomes `?`."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def metadata_text(value: Any) -> str | None:
    """Returns a metadata value as text: a string as it is, anything else as JSON."""
    if value is None:
        return None
    if isinstance(value, bytes):
        return to_text(value)
    return encodable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


class _Unpack(io.RawIOBase):
    """Unpacks compressed streams one after the other, with zeros in between.

    The standard library's file objects throw away what they had unpacked in the call that meets the end of a
    truncated file; here every byte before the damage is given first.
    """

    def __init__(self, file: BinaryIO, kind: str) -> None:
        self._file = file
        self._kind = kind
        self._stream = DECOMPRESSORS[kind]()
        self._packed = b""
        self._between = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while True:
            if not self._packed and self._stream.needs_input and not self._next_input():
                return 0
            packed, self._packed = self._packed, b""
            try:
                data = self._stream.decompress(packed, len(buffer))
            except DECOMPRESSION_ERRORS as error:
                message = f"the {self._kind} data is damaged ({error})"
                raise ShardDamage("shard_corrupt", message) from error
            if self._stream.eof:
                self._packed = self._stream.unused_data.lstrip(b"\0")
                self._stream = DECOMPRESSORS[self._kind]()
                self._between = not self._packed
            if data:
                buffer[: len(data)] = data
                return len(data)

    def _next_input(self) -> bool:
        self._packed = self._file.read(_PACKED_BYTES)
        while self._between and self._packed:
            # Zeros may pad the file behind a member.
            self._packed = self._packed.lstrip(b"\0")
            self._between = not self._packed
            self._packed = self._packed or self._file.read(_PACKED_BYTES)
        if not self._packed and not self._between:
            raise ShardDamage("shard_truncated", f"the {self._kind} data ends too early")
        return bool(self._packed)


class _UnpackLz4(io.RawIOBase):
    """Unpacks lz4 frames one after the other."""

    def __init__(self, file: BinaryIO) -> None:
        self._stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), "lz4")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            data = self._stream.read(min(len(buffer), _LZ4_READ_BYTES))
        except (OSError, pa.ArrowException) as error:
            if "Truncated" in str(error):
                raise ShardDamage("shard_truncated", "the lz4 data ends too early") from error
            raise ShardDamage("shard_corrupt", f"the lz4 data is damaged ({error})") from error
        buffer[: len(data)] = data
        return len(data)
