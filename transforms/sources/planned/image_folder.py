"""Where an annotation's images lie: a folder, a tar or a zip, listed once and read from many threads.

Members of an archive are read as byte ranges of it. fsspec's own `tar://` shares one file object between
threads (they read each other's bytes), and reads the whole archive again wherever it is opened.
"""

import contextlib
import errno
import os
import posixpath
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from diptych.models.files.location import without_query
from diptych.transforms import storage
from diptych.transforms.errors import InputError
from diptych.transforms.schemas import MAX_IMAGE_BYTES
from diptych.transforms.sources.archives.links import Links, normalise
from diptych.transforms.sources.archives.shard_file import ShardDamage, open_shard
from diptych.transforms.sources.archives.tar import TarReader
from diptych.transforms.sources.archives.zip import ZipError, unpack_entry, zip_entries
from diptych.transforms.sources.planned.prefetch import Get, fetch_ahead

# Of files that are asked for by name to see whether their folder is there
_MOST_OTHERS = 100


class ImageFile(NamedTuple):
    """A file of an image folder, and how to get it.

    Attributes:
        path: Path below the folder, or in the archive.
        size_bytes: Bytes to read; None where finding it out would cost a request a file.
        offset: Where they start in the archive; None in a folder.
        packed_bytes: Of a zip's member: how many of them are the file as stored, after its header.
        crc32: Of a zip's member: its checksum.
    """

    path: str
    size_bytes: int | None = None
    offset: int | None = None
    packed_bytes: int | None = None
    crc32: int | None = None


class Unreadable(NamedTuple):
    """A file that is there and cannot be read.

    Attributes:
        message: Why, as in "X has …".
    """

    message: str


class Absent(NamedTuple):
    """A file that is gone since it was listed, or that this user may not read, while others of its folder are there.

    Attributes:
        message: Why, as in "X is …".
    """

    message: str


def is_archive(url: str) -> bool:
    """Tells whether a URL is an archive of images rather than a folder, by its name."""
    return without_query(url).lower().endswith((".tar", ".zip", *_PACKED_TAR))


def is_image_archive(url: str) -> bool:
    """Tells whether a URL is an archive whose images can be read, by its name."""
    return without_query(url).lower().endswith((".tar", ".zip"))


def members(url: str, *, sizes: bool = False) -> Iterator[ImageFile]:
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
                yield from (ImageFile(info["name"][start:], info["size"]) for info in files.values())
            fs.invalidate_cache(path)  # a store's client keeps the whole listing otherwise


def fetch(
    url: str, wanted: Sequence[ImageFile], others: Sequence[ImageFile] = ()
) -> Iterator[bytes | Unreadable | Absent]:
    """Yields the bytes of files in the order asked, or why one cannot be read.

    On stores with a latency they are fetched side by side (`fetch_ahead`). Files that cannot be had are held back until
    another is, so that a folder that is away does not look like as many files that are.

    Args:
        url: The folder or archive.
        wanted: The files.
        others: Files of it that are not wanted now, to see by whether it is there.

    Raises:
        InputError: The archive is gone, or all of several files are, or the store does not answer.
    """
    missing: list[Absent] = []
    last = None
    for member, content in zip(wanted, _fetch(url, wanted), strict=True):
        if isinstance(content, Absent):
            missing.append(content)
            continue
        yield from missing
        missing.clear()
        last = member
        yield content
    if missing:
        _check_folder(url, [last] if last else others[:_MOST_OTHERS], len(missing))
        yield from missing


def _check_folder(url: str, members: Sequence[ImageFile], num_missing: int) -> None:
    """Checks that one of these files is there; a single missing one needs no other to vouch for the folder.

    Raises:
        InputError: None is, or the store does not answer.
    """
    fs, path = storage.locate(url)
    with storage.input_errors(url):
        fs.invalidate_cache()
        if any(storage.exists(fs, _extent(path, member)[0]) for member in members):
            return
        if members or num_missing > 1:
            fs.info(path)  # of a folder that is gone there is no more to say
    if members or num_missing > 1:
        raise InputError(
            f"Images that were listed in {url} when the job was planned are gone, or may not be read: {num_missing} in "
            "a row, and none of the others is there. See that the folder is there (mounted, not moved) and may be "
            "read, and run the same command again."
        )


def _fetch(url: str, wanted: Sequence[ImageFile]) -> Iterator[bytes | Unreadable | Absent]:
    fs, path = storage.locate(url)
    contents: Generator[bytes | Unreadable | Absent, None, None]
    if fs.async_impl:
        requests = (
            (member.size_bytes or 0, _request(fs, path, member))
            for member in wanted
            if not _is_too_large(member.size_bytes)
        )
        contents = fetch_ahead(requests, fs.loop)
    else:
        contents = (
            _read(fs, *_extent(path, member)) for member in wanted if not _is_too_large(member.size_bytes)
        )
    with contextlib.closing(contents):
        for member in wanted:
            if _is_too_large(member.size_bytes):
                yield _too_large(member.size_bytes)
                continue
            with storage.input_errors(storage.join(url, member.path)):
                data = next(contents)
            yield _unpack(data, member) if isinstance(data, bytes) else data


def _absence(error: OSError) -> Absent | None:
    """Returns what an error says of one file; None where it is of the disk, the network or the store."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return Absent("is gone since the job was planned")
    if isinstance(error, PermissionError) or storage.is_refusal(error):
        return Absent("may not be read: this user lacks the right")
    if error.errno in (errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG):
        return Absent(f"cannot be read: {os.strerror(error.errno)}")
    return None


def _read(fs: fsspec.AbstractFileSystem, name: str, extent: dict[str, int]) -> bytes | Unreadable | Absent:
    try:
        if not extent and isinstance(fs, LocalFileSystem):
            size = os.stat(name).st_size
            if _is_too_large(size):
                return _too_large(size)
        return bytes(fs.cat_file(name, **extent))
    except OSError as error:
        absence = None if extent else _absence(error)
        if absence is None:
            raise
        return absence


def _unpack(data: bytes, member: ImageFile) -> bytes | Unreadable:
    if member.packed_bytes is None:
        return data
    try:
        return unpack_entry(data, member.packed_bytes, member.crc32 or 0, MAX_IMAGE_BYTES)
    except ZipError as error:
        return Unreadable(str(error))


def _is_too_large(size_bytes: int | None) -> bool:
    return size_bytes is not None and size_bytes > MAX_IMAGE_BYTES


def _too_large(size_bytes: int | None) -> Unreadable:
    return Unreadable(f"has {size_bytes} bytes; at most {MAX_IMAGE_BYTES} are read")


def _extent(path: str, member: ImageFile) -> tuple[str, dict[str, int]]:
    """Returns the file of a store that holds a member, and which part of it."""
    if member.offset is None:
        return f"{path.rstrip('/')}/{member.path}", {}
    return path, {"start": member.offset, "end": member.offset + (member.size_bytes or 0)}


def _request(fs: fsspec.AbstractFileSystem, path: str, member: ImageFile) -> Get[bytes | Absent]:
    name, extent = _extent(path, member)
    # else s3fs asks for the size of each file before it reads it
    whole = {"max_concurrency": 1} if "s3" in fs.protocol and not extent else {}

    async def get() -> bytes | Absent:
        if extent and not member.size_bytes:  # for an empty range S3 gives all there is
            return b""
        try:
            return bytes(await fs._cat_file(name, **extent, **whole))
        except OSError as error:
            absence = None if extent else _absence(error)
            if absence is None:
                raise
            return absence

    return get


def _local_members(top: str, sizes: bool) -> Iterator[ImageFile]:
    # Not fsspec's listing: it holds a folder's entries all at once, with a stat of each.
    pending, linked = [""], list[str]()
    seen: set[tuple[int, int]] = set()
    while pending or linked:
        if not pending:  # a folder that links lead to as well has the names that it really has
            linked.sort(reverse=True)
            pending.append(linked.pop())
        below = pending.pop()
        folder = os.path.join(top, below)
        with storage.input_errors(folder):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    path = posixpath.join(below, entry.name)
                    if _is_folder(entry):
                        (linked if entry.is_symlink() else pending).append(path)
                    elif entry.is_symlink() or entry.is_file():
                        yield ImageFile(path, _size(entry) if sizes else None)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _size(entry: os.DirEntry[str]) -> int:
    """Returns the size of a file; 0 of a link that leads nowhere, which is found out when it is read."""
    try:
        return entry.stat().st_size
    except OSError:
        return 0


_PACKED_TAR = (
    *(f".tar.{kind}" for kind in ("gz", "bz2", "xz", "zst", "lz4")),
    *(".tgz", ".tbz", ".tbz2", ".txz", ".tzst"),
)


def _archive_members(url: str, fs: fsspec.AbstractFileSystem, path: str) -> Iterator[ImageFile]:
    if without_query(url).lower().endswith(_PACKED_TAR):
        raise InputError(
            f"--images {url} is a compressed tar, which can only be read from its start. "
            "Unpack it and name the folder, or make it a plain .tar or a .zip."
        )
    try:
        if without_query(url).lower().endswith(".tar"):
            yield from _tar_members(url)
        else:
            with fs.open(path, "rb") as file:
                for entry in zip_entries(file):
                    yield ImageFile(entry.path, entry.size_bytes, *entry[1:2], *entry[3:])
    except (ShardDamage, ZipError) as error:
        raise InputError(
            f"--images {url} cannot be read as an archive: {error}. It may be cut off: fetch it again, "
            "or name a folder with the images."
        ) from error


def _tar_members(url: str) -> Iterator[ImageFile]:
    links = Links()
    with open_shard(url) as file:
        tar = TarReader(file)
        while (name := tar.next()) is not None:
            if tar.link is not None:
                links.add(name, tar.link)
            elif not tar.unreadable:
                yield ImageFile(normalise(name), tar.size, tar.payload_offset)
    if not links:
        return
    # Again: to remember where each member lies, for links that may come, would take the memory of a long list.
    names = links.resolved()
    with open_shard(url) as file:
        tar = TarReader(file)
        while (name := tar.next()) is not None:
            if tar.link is None and not tar.unreadable:
                for other, link in names.get(normalise(name), ()):
                    if link.may_be(tar.offset):
                        yield ImageFile(other, tar.size, tar.payload_offset)
