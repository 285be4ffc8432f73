"""A tar reader for one pass over shards of small members.

The standard library's `tarfile` costs 50 us a member, keeps every member in memory, and takes a damaged
header in the middle of a file for its end, which would lose rows in silence. This one walks the headers and
reads a payload only when asked.
"""

import contextlib
import io

from transforms.sources.shardfile import ShardDamage, pass_over, read_up_to

_BLOCK_BYTES = 512
_ZEROS = bytes(_BLOCK_BYTES)
_CHECKSUM_OF_BLANKS = 8 * ord(" ")
_MAX_EXTENSION_BYTES = 1 << 20
# Type flags: a regular file ("7": contiguous, which nobody tells apart); kinds that never have a payload
# (links, devices, folders, pipes); headers that describe the member after them.
_REGULAR = frozenset(b"0\x007")
_NO_PAYLOAD = frozenset(b"123456")
_GNU_LONG_NAME = ord("L")
_PAX = frozenset(b"xX")
_ABOUT_OTHERS = frozenset(b"gK")
_DESCRIBES_NEXT = _PAX | {_GNU_LONG_NAME, ord("K")}
_GNU_SPARSE = ord("S")


class TarReader:
    """Regular files in a tar (ustar, GNU, pax), one after the other.

    The file may end without the end-of-archive mark, at the end of a member. Archives one after the other,
    each with its mark, read as one. Links, folders, devices and sparse files are passed over.

    Attributes:
        offset: Where the header that was read last begins, in bytes (of the unpacked tar).
        size: Size of the current member's payload, in bytes.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self.offset = 0
        self.size = 0
        self._file = file
        self._end = 0
        self._unread = 0
        self._padding = 0

    def next(self) -> str | None:
        """Returns the name of the next regular file, None at the end of the archive.

        Raises:
            ShardDamage: A header is damaged, or the file ends inside a member.
        """
        name, size, sparse, described = None, None, False, False
        while (header := self._header()) is not None:
            kind = header[156]
            stated = _number(header[124:136])
            described = kind in _DESCRIBES_NEXT
            if kind in _REGULAR:
                name = name or _name(header)
                self._begin(stated if size is None else size)
                if not sparse and not name.endswith("/"):
                    return name
                name, size, sparse = None, None, False
            elif kind == _GNU_LONG_NAME:
                name = _text(self._extension(stated).rstrip(b"\0"))
            elif kind in _PAX:
                keywords = _pax_keywords(self._extension(stated))
                name = _text(keywords[b"path"]) if b"path" in keywords else name
                size = _decimal(keywords[b"size"]) if b"size" in keywords else size
                sparse = any(keyword.startswith(b"GNU.sparse.") for keyword in keywords)
            elif kind in _ABOUT_OTHERS:
                self._begin(stated)
            else:
                self._pass_over(kind, header, stated if size is None else size)
                name, size, sparse = None, None, False
        if described:
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

    def _begin(self, size: int) -> None:
        self.size = self._unread = size
        self._padding = -size % _BLOCK_BYTES
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

    def _extension(self, size: int) -> bytes:
        if size > _MAX_EXTENSION_BYTES:
            raise ShardDamage("shard_corrupt", f"a tar extension header claims {size} bytes")
        self._begin(size)
        return self.read()

    def _pass_over(self, kind: int, header: bytes, size: int) -> None:
        if kind == _GNU_SPARSE:
            more = header[482]
            while more:
                block = self._file.read(_BLOCK_BYTES)
                if len(block) < _BLOCK_BYTES:
                    raise ShardDamage("shard_truncated", "the tar ends in the map of a sparse file")
                self._end += _BLOCK_BYTES
                more = block[504]
        self._begin(0 if kind in _NO_PAYLOAD else size)


def _cut(found: int | None, size: int) -> ShardDamage:
    there = "" if found is None else f" after {found}"
    return ShardDamage("shard_truncated", f"the tar ends in a member of {size} bytes{there}")


def _check(header: bytes, offset: int) -> None:
    if len(header) == _BLOCK_BYTES:
        checksum = sum(header) - sum(header[148:156]) + _CHECKSUM_OF_BLANKS
        with contextlib.suppress(ShardDamage):
            if _number(header[148:156]) == checksum:
                return
    elif offset or b"\0" in header or not header:
        raise ShardDamage("shard_truncated", f"the tar ends in a header, after {len(header)} bytes")
    if offset:
        raise ShardDamage("shard_corrupt", f"there is no tar header where one must be, but {header[:32]!r}")
    raise ShardDamage("shard_corrupt", f"not a tar: it begins with {header[:60]!r}")


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
    while data := data.lstrip(b"\0"):
        digits, _, _ = data.partition(b" ")
        length = _decimal(digits)
        keyword, equals, value = data[len(digits) + 1 : length - 1].partition(b"=")
        if not equals or length > len(data):
            raise ShardDamage("shard_corrupt", f"a pax header has {data[:32]!r} where a keyword must be")
        keywords[keyword] = value
        data = data[length:]
    return keywords


def _decimal(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise ShardDamage("shard_corrupt", f"a pax header has {digits[:32]!r} where a number must be")
    return int(digits)
