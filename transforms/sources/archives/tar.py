"""A tar reader for one pass over shards of small members.

The standard library's `tarfile` costs 50 us a member, keeps every member in memory, and takes a damaged
header in the middle of a file for its end, which would lose rows in silence. This one walks the headers and
reads a payload only when asked.
"""

import contextlib
import io
import posixpath

from diptych.transforms.sources.archives.links import Link
from diptych.transforms.sources.archives.shard_file import ShardDamage, pass_over, read_up_to

_BLOCK_BYTES = 512
_ZEROS = bytes(_BLOCK_BYTES)
_CHECKSUM_OF_BLANKS = 8 * ord(" ")
_MAX_EXTENSION_BYTES = 64 << 10
_MAX_DIGITS = 20
# Type flags: a regular file ("7": contiguous, which nobody tells apart); kinds that never have a payload
# (links, devices, folders, pipes); headers that describe the member after them.
_REGULAR = frozenset(b"0\x007")
_NO_PAYLOAD = frozenset(b"123456")
_HARD_LINK = ord("1")
_SYMBOLIC_LINK = ord("2")
_FOLDER = ord("5")
_GNU_LONG_NAME = ord("L")
_GNU_LONG_LINK = ord("K")
_PAX = frozenset(b"xX")
_PAX_GLOBAL = ord("g")
_DESCRIBES_NEXT = _PAX | {_GNU_LONG_NAME, _GNU_LONG_LINK}
_GNU_SPARSE = ord("S")


class _Extensions:
    """What the headers before a member say of it, over its own header."""

    __slots__ = ("link", "name", "num_bytes", "size", "sparse")

    def __init__(self) -> None:
        self.num_bytes = 0
        self.name: str | None = None
        self.link: str | None = None
        self.size: int | None = None
        self.sparse = False

    def add_pax(self, keywords: dict[bytes, bytes]) -> None:
        if b"path" in keywords:
            self.name = _text(keywords[b"path"])
        if b"linkpath" in keywords:
            self.link = _text(keywords[b"linkpath"])
        if b"size" in keywords:
            self.size = _decimal(keywords[b"size"])
        if any(keyword.startswith(b"GNU.sparse.") for keyword in keywords):
            self.sparse = True
            if b"GNU.sparse.name" in keywords:
                self.name = _text(keywords[b"GNU.sparse.name"])


class TarReader:
    """Members of a tar (ustar, GNU, pax), one after the other; folders are passed over.

    The file may end without the end-of-archive mark, at the end of a member. Archives one after the other,
    each with its mark, read as one.

    Attributes:
        offset: Where the header that was read last begins, in bytes (of the unpacked tar).
        size: Size of the current member's payload, in bytes.
        payload_offset: Where the current member's payload begins, in bytes (of the unpacked tar).
        link: What the current member is a link to; None where it is no link.
        unreadable: Why the current member, neither a file nor a link, cannot be read; empty for those.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self.offset = 0
        self.size = 0
        self.payload_offset = 0
        self.link: Link | None = None
        self.unreadable = ""
        self._file = file
        self._end = 0
        self._unread = 0
        self._padding = 0

    def next(self) -> str | None:
        """Returns the name of the next member, None at the end of the archive.

        Raises:
            ShardDamage: A header is damaged, or the file ends inside a member.
        """
        extensions: _Extensions | None = None
        self.link, self.unreadable = None, ""
        while (header := self._header()) is not None:
            kind = header[156]
            size = _number(header[124:136])
            if kind in _DESCRIBES_NEXT:
                extensions = extensions or _Extensions()
                self._extend(extensions, kind, size)
                continue
            if kind == _PAX_GLOBAL:
                self._begin(size)
                continue
            if extensions is not None and extensions.num_bytes > _MAX_EXTENSION_BYTES:
                self.unreadable = (
                    f"has extension headers of {extensions.num_bytes:,} bytes, of which at most "
                    f"{_MAX_EXTENSION_BYTES:,} are read"
                )
            name = _name(header) if extensions is None or extensions.name is None else extensions.name
            if extensions is not None and extensions.size is not None:
                size = extensions.size
            if kind in _REGULAR:
                self._begin(size)
                if size or not name.endswith("/"):
                    if extensions is not None and extensions.sparse:
                        self.unreadable = "is stored as a sparse file"
                    return name
            elif kind == _FOLDER:
                self._begin(0)
            else:
                self._begin_other(kind, header, size, name, extensions)
                return name
            extensions = None
        if extensions is not None:
            raise ShardDamage(
                "shard_truncated", "the tar ends before the member that its last header describes"
            )
        return None

    def read(self) -> bytes:
        """Returns the current member's payload, once.

        Raises:
            ShardDamage: The file ends in it.
        """
        data = read_up_to(self._file, self.size)
        if len(data) < self.size:
            raise _cut(len(data), self.size)
        self._unread = 0
        return data

    def _extend(self, extensions: _Extensions, kind: int, size: int) -> None:
        extensions.num_bytes += size
        self._begin(size)
        if extensions.num_bytes > _MAX_EXTENSION_BYTES:
            return  # the next header passes over it
        data = self.read()
        if kind == _GNU_LONG_NAME:
            extensions.name = _text(data.partition(b"\0")[0])
        elif kind == _GNU_LONG_LINK:
            extensions.link = _text(data.partition(b"\0")[0])
        else:
            extensions.add_pax(_pax_keywords(data))

    def _begin(self, size: int) -> None:
        self.size = self._unread = size
        self._padding = -size % _BLOCK_BYTES
        self.payload_offset = self._end
        self._end += size + self._padding

    def _header(self) -> bytes | None:
        if self._unread and not pass_over(self._file, self._unread):
            raise _cut(None, self.size)
        block = self._file.read(self._padding + _BLOCK_BYTES)
        if len(block) < self._padding:
            raise _cut(self.size, self.size)
        header = block[self._padding :]
        ended = False
        while header and not header[0] and header == _ZEROS[: len(header)]:
            # The end-of-archive mark; its padding, or another archive, follows.
            self._end += len(header)
            ended = True
            header = self._file.read(_BLOCK_BYTES)
        self.offset = self._end
        self._unread = self._padding = 0
        if not header and (ended or self.offset):
            return None
        _check(header, self.offset)
        self._end += _BLOCK_BYTES
        return header

    def _begin_other(
        self, kind: int, header: bytes, size: int, name: str, extensions: _Extensions | None
    ) -> None:
        if kind in (_HARD_LINK, _SYMBOLIC_LINK):
            target = extensions.link if extensions is not None else None
            if target is None:
                target = _text(header[157:257].partition(b"\0")[0])
            # A symbolic link starts from its own folder, a hard link from the top.
            is_hard = kind == _HARD_LINK
            place = target if is_hard else posixpath.join(posixpath.dirname(name), target)
            self.link = Link(place, self.offset if is_hard else None)
        elif kind == _GNU_SPARSE:
            self.unreadable = "is stored as a sparse file"
            more = header[482]
            while more:
                block = self._file.read(_BLOCK_BYTES)
                if len(block) < _BLOCK_BYTES:
                    raise ShardDamage("shard_truncated", "the tar ends in the map of a sparse file")
                self._end += _BLOCK_BYTES
                more = block[504]
        else:
            self.unreadable = f"is no file, but of type {chr(kind)!r}"
        self._begin(0 if kind in _NO_PAYLOAD else size)


def _cut(found: int | None, size: int) -> ShardDamage:
    there = "" if found is None else f" after {found}"
    return ShardDamage("shard_truncated", f"the tar ends in a member of {size} bytes{there}")


def _check(header: bytes, offset: int) -> None:
    if len(header) == _BLOCK_BYTES:
        checksum = sum(header) - sum(header[148:156]) + _CHECKSUM_OF_BLANKS
        with contextlib.suppress(ShardDamage):
            stated = _number(header[148:156])
            # Some old writers added the bytes up as signed numbers.
            if stated == checksum or stated == checksum - 256 * _num_high(header):
                return
    elif offset or b"\0" in header or not header:
        raise ShardDamage("shard_truncated", f"the tar ends in a header, after {len(header)} bytes")
    if offset:
        raise ShardDamage("shard_corrupt", f"there is no tar header where one must be, but {header[:32]!r}")
    raise ShardDamage("shard_corrupt", f"not a tar: it begins with {header[:60]!r}")


def _num_high(header: bytes) -> int:
    return sum(byte > 127 for byte in header[:148] + header[156:])


def _number(field: bytes) -> int:
    """Returns a number from octal digits, or from GNU's base-256 form of large numbers."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        number = int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        number = -1
    if number < 0:
        raise ShardDamage("shard_corrupt", f"a tar header has {field!r} where a number must be")
    return number


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    # GNU's own magic ("ustar  ") has other things where ustar has the folder.
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return _text(name)


def _text(name: bytes) -> str:
    # Names that are not UTF-8 must stay apart from each other, so they keep their bytes, written out.
    return name.decode("utf-8", "backslashreplace")


def _pax_keywords(data: bytes) -> dict[bytes, bytes]:
    keywords = {}
    start = 0
    while start < len(data):
        if not data[start]:  # zeros may pad the records
            break
        blank = data.find(b" ", start, start + _MAX_DIGITS + 1)
        length = _decimal(data[start:blank] if blank > start else data[start : start + 32])
        end = start + length
        keyword, equals, value = data[blank + 1 : end - 1].partition(b"=")
        if not equals or end > len(data) or blank >= end:
            raise ShardDamage(
                "shard_corrupt", f"a pax header has {data[start : start + 32]!r} where a keyword must be"
            )
        keywords[keyword] = value
        start = end
    return keywords


def _decimal(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > _MAX_DIGITS:
        raise ShardDamage("shard_corrupt", f"a pax header has {digits[:32]!r} where a number must be")
    return int(digits)
