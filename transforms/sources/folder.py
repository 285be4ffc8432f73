"""Where an annotation's images lie: a folder, a tar or a zip, listed once and read from many threads.

Members of an archive are read as byte ranges of it. fsspec's own `tar://` shares one file object between
threads (they read each other's bytes), and reads the whole archive again wherever it is opened.
"""

import contextlib
import os
import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from transforms import storage
from transforms.errors import InputError
from transforms.sources.ahead import Get, fetch_ahead

_ZIP_HEADER_BYTES = 30


class Member(NamedTuple):
    """A file of an image folder, and how to get it.

    Attributes:
        path: Path below the folder, or in the archive.
        size_bytes: Bytes to read; None where finding it out would cost a request a file.
        offset: Where they start in the archive; None in a folder.
        packed_bytes: Of a zip's member: how many of them are the file as stored, after its header.
    """

    path: str
    size_bytes: int | None = None
    offset: int | None = None
    packed_bytes: int | None = None


def is_archive(url: str) -> bool:
    """Tells whether a URL is an archive of images rather than a folder, by its name."""
    return url.lower().endswith((".tar", ".zip", *_PACKED_TAR))


def members(url: str, *, sizes: bool = False) -> Iterator[Member]:
    """Lists the files of a folder (with its sub-folders) or archive, in no particular order.

    Args:
        url: A folder, or a `.tar` or `.zip`.
        sizes: Ask for the size of each file even where that is a request a file.

    Raises:
        InputError: It is not there, may not be read, or is an archive that cannot be.
    """
    with storage.input_errors(url):
        fs, path = storage.locate(url)
        if is_archive(url) and not storage.is_folder(fs, path):
            yield from _archive_members(url, fs, path)
        elif isinstance(fs, LocalFileSystem):
            yield from _local_members(path, sizes)
        else:
            start = len(path.rstrip("/")) + 1
            for _, _, files in fs.walk(path, detail=True, on_error="raise"):
                yield from (Member(info["name"][start:], info["size"]) for info in files.values())
            fs.invalidate_cache(path)  # a store's client keeps the whole listing otherwise


def fetch(url: str, wanted: Sequence[Member]) -> Iterator[bytes | None]:
    """Yields the bytes of files in the order asked.

    On stores with a latency they are fetched side by side (`fetch_ahead`). A member of a zip that cannot be unpacked
    gives None.

    Raises:
        InputError: A file is gone, or may not be read.
    """
    fs, path = storage.locate(url)
    if fs.async_impl:
        found = fetch_ahead(
            ((member.size_bytes or 0, _request(fs, path, member)) for member in wanted), fs.loop
        )
    else:
        found = (bytes(fs.cat_file(name, **extent)) for name, extent in (_extent(path, m) for m in wanted))
    with contextlib.closing(found):
        for member in wanted:
            with storage.input_errors(storage.join(url, member.path)):
                data = next(found)
            yield data if member.packed_bytes is None else _unpack(data, member.packed_bytes)


def _extent(path: str, member: Member) -> tuple[str, dict[str, int]]:
    """Returns the file of a store that holds a member, and which part of it."""
    if member.offset is None:
        return f"{path.rstrip('/')}/{member.path}", {}
    return path, {"start": member.offset, "end": member.offset + (member.size_bytes or 0)}


def _request(fs: fsspec.AbstractFileSystem, path: str, member: Member) -> Get:
    name, extent = _extent(path, member)
    # else s3fs asks for the size of each file before it reads it
    whole = {"max_concurrency": 1} if "s3" in fs.protocol and not extent else {}

    async def get() -> bytes:
        if extent and not member.size_bytes:  # for an empty range S3 gives all there is
            return b""
        return bytes(await fs._cat_file(name, **extent, **whole))

    return get


def _local_members(top: str, sizes: bool) -> Iterator[Member]:
    # Not fsspec's listing: it holds a folder's entries all at once, with a stat of each.
    pending = [""]
    seen: set[tuple[int, int]] = set()
    while pending:
        below = pending.pop()
        folder = os.path.join(top, below)
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link back up
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                path = posixpath.join(below, entry.name)
                if entry.is_dir():
                    pending.append(path)
                elif entry.is_file():
                    yield Member(path, entry.stat().st_size if sizes else None)


_PACKED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def _archive_members(url: str, fs: fsspec.AbstractFileSystem, path: str) -> Iterator[Member]:
    if url.lower().endswith(_PACKED_TAR):
        raise InputError(
            f"--images {url} is a compressed tar, which can only be read from its start. "
            "Unpack it and name the folder, or make it a plain .tar or a .zip."
        )
    try:
        with fs.open(path, "rb") as file:
            if url.lower().endswith(".tar"):
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for info in tar:
                        tar.members = []  # type: ignore[attr-defined]  # or it keeps every header it has read
                        if info.isreg() and not info.issparse():
                            yield Member(posixpath.normpath(info.name), info.size, info.offset_data)
            else:
                with zipfile.ZipFile(file) as archive:
                    yield from _zip_members(url, archive)
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise InputError(
            f"--images {url} cannot be read as an archive: {error}. It may be cut off: fetch it again, "
            "or name a folder with the images."
        ) from error


def _zip_members(url: str, archive: zipfile.ZipFile) -> Iterator[Member]:
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    ends = [*(info.header_offset for info in infos[1:]), archive.start_dir]
    for info, end in zip(infos, ends, strict=True):
        if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16):
            continue
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(
                f"--images {url}: {info.filename!r} is encrypted or packed in a way other than deflate. "
                "Unpack the archive and name the folder."
            )
        path = posixpath.normpath(info.filename)
        yield Member(path, end - info.header_offset, info.header_offset, info.compress_size)


def _unpack(extent: bytes, packed_bytes: int) -> bytes | None:
    """Returns a zip member's file; `extent` reaches from its local header to the next one's."""
    name_bytes = int.from_bytes(extent[26:28], "little")
    extra_bytes = int.from_bytes(extent[28:30], "little")
    start = _ZIP_HEADER_BYTES + name_bytes + extra_bytes
    packed = extent[start : start + packed_bytes]
    if int.from_bytes(extent[8:10], "little") == zipfile.ZIP_STORED:
        return packed
    try:
        return zlib.decompress(packed, -zlib.MAX_WBITS)
    except zlib.error:
        return None
