"""Compressed streams, unpacked in pieces of a bounded size whatever the data claim."""

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Protocol

import zstandard

MAGIC_BYTES = 10
"""First bytes of a file that `compression_of` looks at."""

_GZIP_WBITS = 31
_XZ_MEMORY_BYTES = 128 << 20
_ZSTD_WINDOW_BYTES = 128 << 20
# A block of zstd that repeats a byte makes 128 KiB of four bytes: so much in at a time makes 32 MiB at most.
_ZSTD_INPUT_BYTES = 1 << 10
# A block, or the end of a file without one: `BZh` alone is too short to tell a packed file by.
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")
_MAGIC = {
    b"\x1f\x8b\x08": "gzip",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x50\x2a\x4d\x18": "zstd",  # a frame to pass over, with which pzstd begins a file
    b"\x04\x22\x4d\x18": "lz4",
}


class Decompressor(Protocol):
    """One compressed stream; the interface of `bz2` and `lzma`."""

    @property
    def eof(self) -> bool:
        """Whether all of the stream has been given."""

    @property
    def needs_input(self) -> bool:
        """Whether nothing more can be given without more input."""

    @property
    def unused_data(self) -> bytes:
        """Input behind the end of the stream."""

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        """Returns at most `max_length` bytes; `data` is empty unless input is needed."""


class Inflate:
    """Decompresses one gzip member, or deflated data without a header.

    Args:
        wbits: As in `zlib.decompressobj`.
    """

    def __init__(self, wbits: int = _GZIP_WBITS) -> None:
        self._stream = zlib.decompressobj(wbits)

    @property
    def eof(self) -> bool:
        """Whether all of the stream has been given."""
        return self._stream.eof

    @property
    def needs_input(self) -> bool:
        """Whether nothing more can be given without more input."""
        return not self._stream.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        """Input behind the end of the stream."""
        return self._stream.unused_data

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        """Returns at most `max_length` bytes; `data` is empty unless input is needed."""
        return self._stream.decompress(self._stream.unconsumed_tail or data, max_length)


class Unzstd:
    """Decompresses one zstd frame, a little input at a time: its library sets no bound to the output."""

    def __init__(self) -> None:
        self._frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()
        self._input = memoryview(b"")
        self._output = memoryview(b"")

    @property
    def eof(self) -> bool:
        """Whether all of the frame has been given."""
        return self._frame.eof and not self._output

    @property
    def needs_input(self) -> bool:
        """Whether nothing more can be given without more input."""
        return not self._input and not self._output

    @property
    def unused_data(self) -> bytes:
        """Input behind the end of the frame."""
        return bytes(self._frame.unused_data) + self._input

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        """Returns at most `max_length` bytes; `data` is empty unless input is needed."""
        self._input = self._input or memoryview(data)
        if not self._output and not self._frame.eof:
            piece, self._input = self._input[:_ZSTD_INPUT_BYTES], self._input[_ZSTD_INPUT_BYTES:]
            self._output = memoryview(self._frame.decompress(piece))
        output, self._output = self._output[:max_length], self._output[max_length:]
        return bytes(output)


DECOMPRESSORS: dict[str, Callable[[], Decompressor]] = {
    "gzip": Inflate,
    "zlib": lambda: Inflate(zlib.MAX_WBITS),
    "bzip2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY_BYTES),
    "zstd": Unzstd,
}
DECOMPRESSION_ERRORS = (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, EOFError, ValueError)


def compression_of(magic: bytes) -> str | None:
    """Returns how a file is compressed, told by its first bytes: `lz4`, a key of `DECOMPRESSORS`, or None."""
    if magic.startswith(b"BZh") and magic[4:10] in _BZIP2_BLOCKS:
        return "bzip2"
    return next((kind for begins, kind in _MAGIC.items() if magic.startswith(begins)), None)


def is_zlib(magic: bytes) -> bool:
    """Tells whether a file may begin with the header of zlib (RFC 1950): its method, and a checksum of five bits."""
    return len(magic) >= 2 and magic[0] & 0x8F == 0x08 and int.from_bytes(magic[:2], "big") % 31 == 0
