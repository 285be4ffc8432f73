"""Parquet's own structures, as far as Arrow does not guard what it makes of them.

Arrow ends the process where a column chunk's metadata are encrypted or damaged and Python asks for them, and it says
nothing of how large the values of a dictionary are. The structures are in Thrift's compact encoding
(https://github.com/apache/parquet-format, https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md).
"""

import struct
from typing import Any, NamedTuple

import pyarrow as pa

from diptych.transforms.sources.archives.shard_file import ShardDamage

_MAGIC, _ENCRYPTED_MAGIC = b"PAR1", b"PARE"
_TAIL_BYTES = 8
# Most headers are short, but statistics in one may hold whole values
_HEADER_BYTES = (1 << 10, 16 << 20)
_PACKED_TIGHTLY, _MANY_BYTES = 50, 64 << 20
_DICTIONARY_PACKED_TIGHTLY = 4
_PARSE_ERRORS = (AttributeError, IndexError, KeyError, TypeError, ValueError, struct.error)
_MAX_DEPTH = 32
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 12
_INTEGERS = frozenset({4, 5, 6})
ENCRYPTED = "it is encrypted. Decrypt it, or leave it out"


class ColumnChunk(NamedTuple):
    """The values of a leaf column in a row group.

    Attributes:
        path: The column's path in the schema, joined by dots.
        num_values: How many they are, with nulls.
        size_bytes: Size of its pages, unpacked.
        packed_bytes: Size of its pages in the file.
        dictionary_offset: Place of its dictionary page in the file; None where there is none.
        data_offset: Place of its first data page.
    """

    path: str
    num_values: int
    size_bytes: int
    packed_bytes: int
    dictionary_offset: int | None
    data_offset: int


def read_row_groups(file: pa.NativeFile) -> list[list[ColumnChunk]]:
    """Returns the column chunks of each row group.

    Raises:
        ShardDamage: The file is encrypted, or its footer damaged.
    """
    size = file.size()
    tail = _read(file, max(0, size - _TAIL_BYTES), _TAIL_BYTES)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] == _ENCRYPTED_MAGIC:
        raise ShardDamage("shard_corrupt", ENCRYPTED)
    try:
        return _row_groups(_read(file, size - _TAIL_BYTES - length, length))
    except _PARSE_ERRORS as error:
        raise ShardDamage("shard_corrupt", f"its footer, before byte {size}, is damaged") from error


class Pages(NamedTuple):
    """What the headers of a column chunk's pages say.

    Attributes:
        dictionary_bytes: Unpacked size of its dictionary; 0 where there is none.
        packed_dictionary_bytes: Its size in the file.
        num_dictionary_values: How many values are in the dictionary.
        largest_bytes: Unpacked size of the largest page.
        largest_tight_bytes: Unpacked size of the largest page that is packed as images and texts seldom are.
    """

    dictionary_bytes: int
    packed_dictionary_bytes: int
    num_dictionary_values: int
    largest_bytes: int
    largest_tight_bytes: int

    @property
    def value_bytes(self) -> int:
        """Size of a value in the dictionary: of its largest possible where it is packed tightly, else of their mean.

        Values that are large and all the same, or nearly, pack well; images do not.
        """
        if self.dictionary_bytes > _DICTIONARY_PACKED_TIGHTLY * self.packed_dictionary_bytes:
            return self.dictionary_bytes
        return self.dictionary_bytes // max(1, self.num_dictionary_values)


def read_pages(file: pa.NativeFile, chunk: ColumnChunk) -> Pages:
    """Reads the header of a column chunk's first page, which is its dictionary if it has one.

    Where the pages are packed as images and texts seldom are, the headers of all are read.

    Raises:
        ShardDamage: A header is damaged.
    """
    first = chunk.data_offset if chunk.dictionary_offset is None else chunk.dictionary_offset
    are_packed_tightly = chunk.size_bytes >= max(_MANY_BYTES, _PACKED_TIGHTLY * chunk.packed_bytes)
    end = first + chunk.packed_bytes if are_packed_tightly else first + 1
    dictionary = 0, 0, 0
    largest, largest_tight, offset = 0, 0, first
    while offset < end:
        page, offset = _page(file, offset)
        largest = max(largest, page.size_bytes)
        if page.size_bytes >= _PACKED_TIGHTLY * page.packed_bytes:
            largest_tight = max(largest_tight, page.size_bytes)
        if page.num_dictionary_values is not None:
            dictionary = page.size_bytes, page.packed_bytes, page.num_dictionary_values
    return Pages(*dictionary, largest, largest_tight)


class _Page(NamedTuple):
    size_bytes: int
    packed_bytes: int
    num_dictionary_values: int | None


def _page(file: pa.NativeFile, offset: int) -> tuple[_Page, int]:
    """Returns what a page's header says, and the place after the page."""
    problem: Exception | None = None
    for length in _HEADER_BYTES:
        try:
            header, at = _struct(_read(file, offset, length), 0)
            size, packed_bytes = int(header[2]), int(header[3])
            num_values = int(header[7][1]) if 7 in header else None
        except _PARSE_ERRORS as error:
            problem = error
            continue
        if size < 0 or packed_bytes < 0:
            break
        return _Page(size, packed_bytes, num_values), offset + at + packed_bytes
    raise ShardDamage("shard_corrupt", f"the header of a page at byte {offset} is damaged") from problem


def is_encrypted(head: bytes) -> bool:
    """Tells from its first bytes whether a file is encrypted with its footer."""
    return head.startswith(_ENCRYPTED_MAGIC)


def _row_groups(footer: bytes) -> list[list[ColumnChunk]]:
    # the numbers are those of the fields in parquet.thrift
    metadata, _ = _struct(footer, 0)
    if 8 in metadata:  # encryption_algorithm
        raise ShardDamage("shard_corrupt", ENCRYPTED)
    return [[_column_chunk(fields) for fields in group[1]] for group in metadata[4]]


def _column_chunk(fields: dict[int, Any]) -> ColumnChunk:
    if 8 in fields or 9 in fields:  # crypto_metadata, encrypted_column_metadata
        raise ShardDamage("shard_corrupt", ENCRYPTED)
    column = fields[3]
    path = ".".join(name.decode("utf-8", "replace") for name in column[3])
    dictionary_offset = int(column[11]) if 11 in column else None
    num_values, size_bytes, packed_bytes = int(column[5]), int(column[6]), int(column[7])
    return ColumnChunk(path, num_values, size_bytes, packed_bytes, dictionary_offset, int(column[9]))


def _read(file: pa.NativeFile, offset: int, length: int) -> bytes:
    if offset < 0:
        raise ShardDamage("shard_corrupt", f"its footer's length, {length}, is that of a longer file")
    file.seek(offset)
    return bytes(file.read(length))


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Returns the fields of a struct by their numbers, and the place after it."""
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[at]) != _STOP:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(data, at)
        kind = head & 15
        if kind in (_TRUE, _FALSE):
            fields[number] = kind == _TRUE
        else:
            fields[number], at = _value(data, at, kind, depth)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in _INTEGERS:
        return _integer(data, at)
    if kind == _BINARY:
        length, at = _varint(data, at)
        if length > len(data) - at:
            raise ValueError("a text ends behind the data")
        return data[at : at + length], at + length
    if kind == _STRUCT:
        return _struct(data, at, depth + 1)
    if kind in (_LIST, _SET):
        return _list(data, at, depth)
    if kind in (_BYTE, _TRUE, _FALSE):
        return data[at], at + 1
    if kind == _DOUBLE:
        return struct.unpack_from("<d", data, at)[0], at + 8
    raise ValueError(f"no structure of Parquet has a field of type {kind}")


def _list(data: bytes, at: int, depth: int) -> tuple[list[Any], int]:
    head = data[at]
    length, at = head >> 4, at + 1
    if length == 15:
        length, at = _varint(data, at)
    if length > len(data) - at:
        raise ValueError("a list ends behind the data")
    values = []
    for _ in range(length):
        value, at = _value(data, at, head & 15, depth + 1)
        values.append(value)
    return values, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number has more than 64 bits")


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at
