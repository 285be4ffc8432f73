"""Zip archives as ranges of bytes: listed once, and each member unpacked and checked by itself.

The standard library reads the directory; `zipfile` itself needs a file that one thread seeks in, and unpacks
whatever a member claims.
"""

import bz2
import io
import itertools
import lzma
import posixpath
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

from diptych.transforms.sources.archives.compression import (
    DECOMPRESSION_ERRORS,
    Decompressor,
    Inflate,
    Unzstd,
)
from diptych.transforms.sources.archives.links import Link, LinkError, Links, normalise

_HEADER_MAGIC = b"PK\x03\x04"
_HEADER_BYTES = 30
_MAX_NAME_BYTES = 2 * 0xFFFF
_ENCRYPTED = 1
_UTF8_NAME = 0x800
_UNICODE_PATH = 0x7075
_MAX_LINK_BYTES = 4096
_PIECE_BYTES = 1 << 20
_LZMA_MEMORY_BYTES = 128 << 20
_STORED, _DEFLATED, _BZIP2, _LZMA, _ZSTD, _XZ = 0, 8, 12, 14, 93, 95
_READABLE = frozenset({_STORED, _DEFLATED, _BZIP2, _LZMA, _ZSTD, _XZ})
_METHODS = {1: "shrink", 6: "implode", 9: "deflate64", 10: "implode", 96: "JPEG", 97: "WavPack", 98: "PPMd"}
# What `zipfile` raises of a directory that is damaged.
_DIRECTORY_ERRORS = (
    zipfile.BadZipFile,
    NotImplementedError,
    UnicodeError,
    struct.error,
    ValueError,
    OverflowError,
    MemoryError,
    EOFError,
)


class ZipEntry(NamedTuple):
    """A file in a zip.

    Attributes:
        path: Its path.
        offset: Where its header begins.
        size_bytes: Bytes from there on that hold header and data.
        packed_bytes: Size of the data as it is stored.
        crc32: Checksum of the file, by the directory.
    """

    path: str
    offset: int
    size_bytes: int
    packed_bytes: int
    crc32: int


class ZipError(Exception):
    """A zip, or a member of one, that cannot be read."""


def zip_entries(file: IO[bytes]) -> Iterator[ZipEntry]:
    """Yields the files of a zip in the order of its directory; links are files by the data that they lead to.

    Raises:
        ZipError: It is no whole zip, or none of its files can be unpacked.
    """
    try:
        archive = zipfile.ZipFile(file)
    except _DIRECTORY_ERRORS as error:
        raise ZipError(f"{error}") from error
    with archive:
        infos = [info for info in archive.infolist() if not _path(info).endswith("/")]
        if infos and not any(_is_readable(info.flag_bits, info.compress_type) for info in infos):
            first = infos[0]
            raise ZipError(
                f"{first.filename!r}, like all others in it, {_why_not(first.flag_bits, first.compress_type)}"
            )
        starts = sorted({info.header_offset for info in archive.infolist()})
        ends = dict(itertools.pairwise([*starts, archive.start_dir]))
        links = Links()
        for info in infos:
            if stat.S_ISLNK(info.external_attr >> 16):
                _add_link(archive, info, links)
            else:
                yield _entry(info, ends)
        if links:
            targets = links.resolved()
            for info in infos:
                if not stat.S_ISLNK(info.external_attr >> 16):
                    for path, _ in targets.get(_path(info), ()):
                        yield _entry(info, ends)._replace(path=path)


def unpack_entry(extent: bytes, packed_bytes: int, crc32: int, max_bytes: int) -> bytes:
    """Returns a member's file.

    Args:
        extent: The bytes from its header on.
        packed_bytes: Size of its data as it is stored.
        crc32: Its checksum.
        max_bytes: Most bytes that the file may have.

    Raises:
        ZipError: It cannot be unpacked, or is not what its checksum says.
    """
    if not extent.startswith(_HEADER_MAGIC) or len(extent) < _HEADER_BYTES:
        raise ZipError(f"there is no zip header where one must be, but {extent[:16]!r}")
    flags, method = struct.unpack_from("<HH", extent, 6)
    if not _is_readable(flags, method):
        raise ZipError(_why_not(flags, method))
    start = _HEADER_BYTES + sum(struct.unpack_from("<HH", extent, 26))
    packed = extent[start : start + packed_bytes]
    if len(packed) < packed_bytes:
        raise ZipError("its data reach into the next member")
    if method == _STORED:
        data = packed
        if len(data) > max_bytes:
            raise ZipError(f"has {len(data)} bytes; at most {max_bytes} are read")
    else:
        data = _unpack(packed, method, max_bytes)
    if zlib.crc32(data) != crc32:
        raise ZipError(f"its CRC-32 is {zlib.crc32(data):08x}, where the zip says {crc32:08x}")
    return data


def _unpack(packed: bytes, method: int, max_bytes: int) -> bytes:
    # One buffer that grows: pieces that are joined at the end would take the memory twice.
    unpacked = io.BytesIO()
    try:
        stream, packed = _decompressor(method, packed)
        data = stream.decompress(packed, _PIECE_BYTES)
        while data or not (stream.eof or stream.needs_input):
            unpacked.write(data)
            if unpacked.tell() > max_bytes:
                raise ZipError(f"unpacks to more than the {max_bytes} bytes that are read")
            data = stream.decompress(b"", _PIECE_BYTES) if not stream.eof else b""
    except (*DECOMPRESSION_ERRORS, struct.error) as error:
        raise ZipError(f"cannot be unpacked ({error})") from error
    if not stream.eof and method != _LZMA:  # which need not mark its end
        raise ZipError("cannot be unpacked (its data end too early)")
    return unpacked.getvalue()


def _decompressor(method: int, packed: bytes) -> tuple[Decompressor, bytes]:
    if method == _DEFLATED:
        return Inflate(-zlib.MAX_WBITS), packed
    if method == _BZIP2:
        return bz2.BZ2Decompressor(), packed
    if method == _ZSTD:
        return Unzstd(), packed
    if method == _XZ:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, _LZMA_MEMORY_BYTES), packed
    # Zip's own head of LZMA: a version, the size of the properties, and they: a byte and the size of the dictionary.
    (size,) = struct.unpack_from("<H", packed, 2)
    properties, dict_size = struct.unpack_from("<BI", packed, 4)
    if size != 5 or properties >= 9 * 5 * 5 or dict_size > _LZMA_MEMORY_BYTES:
        raise ValueError(f"LZMA with a dictionary of {dict_size} bytes")
    lc, rest = properties % 9, properties // 9
    options = {"id": lzma.FILTER_LZMA1, "dict_size": dict_size, "lc": lc, "lp": rest % 5, "pb": rest // 5}
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[options]), packed[9:]


def _is_readable(flags: int, method: int) -> bool:
    return not flags & _ENCRYPTED and method in _READABLE


def _why_not(flags: int, method: int) -> str:
    if flags & _ENCRYPTED:
        return "is encrypted"
    return f"is packed by method {method} ({_METHODS.get(method, 'unknown')}), not by deflate, bzip2, lzma or zstd"


def _entry(info: zipfile.ZipInfo, ends: dict[int, int]) -> ZipEntry:
    # What was deleted may lie between two members: no more is read than the member can have.
    most = _HEADER_BYTES + _MAX_NAME_BYTES + info.compress_size
    size_bytes = max(0, min(ends[info.header_offset] - info.header_offset, most))
    return ZipEntry(_path(info), info.header_offset, size_bytes, info.compress_size, info.CRC)


def _add_link(archive: zipfile.ZipFile, info: zipfile.ZipInfo, links: Links) -> None:
    path = _path(info)
    try:
        with archive.open(info) as file:
            target = file.read(_MAX_LINK_BYTES).decode()
    except (*_DIRECTORY_ERRORS, *DECOMPRESSION_ERRORS, RuntimeError, LinkError):
        return  # the link leads nowhere: what names it is told that there is no such image
    links.add(path, Link(posixpath.join(posixpath.dirname(path), target)))


def _path(info: zipfile.ZipInfo) -> str:
    """Returns a member's path: with slashes, below the archive, and as UTF-8 where its bytes are."""
    name = info.filename
    if not info.flag_bits & _UTF8_NAME and not name.isascii():
        name = _unicode_name(info.extra, name.encode("cp437"), name)
    if "/" not in name:
        name = name.replace("\\", "/")  # as old writers of Windows have it
    path = normalise(name).lstrip("/")
    while path.startswith("../"):
        path = path[3:]
    return path + "/" if name.endswith("/") else path


def _unicode_name(extra: bytes, raw: bytes, name: str) -> str:
    """Returns the name in Info-ZIP's extra field, or the raw name where it is UTF-8 without saying so."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == _UNICODE_PATH and len(field) > 5 and field[1:5] == zlib.crc32(raw).to_bytes(4, "little"):
            raw = field[5:]
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return name
