"""TIFF 6.0, and EXIF, which is one: what their first directory says, before anything is decoded."""

import itertools
import operator
import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from PIL import ExifTags, Image, TiffImagePlugin

from diptych.transforms.images.raster import BadImage, Limits

TiffImagePlugin.READ_LIBTIFF = True  # Pillow's own reader mixes up the bytes of planar 16-bit samples

_VALUE_BYTES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
# Values of a directory may overlap, but no writer makes them so: together they are no longer than the file
_MAX_OVERLAP = 4


# Numbers, as of where strips start, become Python's, of ten times the size: no picture within bounds has so many
_MAX_NUMBERS_BYTES = 4 << 20
# More tags than TIFF can count, which BigTIFF can
_MAX_TAGS = 1 << 16
# More headers in a file of boxes than chance and its EXIF make
_MAX_HEADERS = 20


class _Value(NamedTuple):
    """A value of a directory that does not fit its entry: whether it is of numbers, and where it lies."""

    is_numbers: bool
    offset: int
    num_bytes: int


def _values(data: bytes | memoryview) -> Iterator[_Value]:
    """Yields the values of the first directory that lie elsewhere (TIFF 6.0, section 2; BigTIFF).

    Raises:
        struct.error: The directory lies beyond the end.
        OverflowError: The same.
    """
    head = bytes(data[:4])
    order, is_big = "<" if head.startswith(b"II") else ">", b"+" in head[2:]
    offset, number = struct.Struct(order + "IQ"[is_big]), struct.Struct(order + "HQ"[is_big])
    (start,) = offset.unpack_from(data, offset.size)
    for i in range(min(number.unpack_from(data, start)[0], _MAX_TAGS)):
        entry = start + number.size + i * (4 + 2 * offset.size)
        (kind,) = struct.unpack_from(order + "H", data, entry + 2)
        (count,), (value,) = (offset.unpack_from(data, entry + 4 + offset.size * field) for field in (0, 1))
        num_bytes = count * _VALUE_BYTES.get(kind, 1)
        if num_bytes > offset.size:
            yield _Value(kind in _VALUE_BYTES, value, num_bytes)


def is_cut_tiff(data: bytes) -> bool:
    """Tells whether the first directory of a TIFF, or a value that it refers to, lies beyond the end."""
    try:
        return any(value.offset + value.num_bytes > len(data) for value in _values(data))
    except (struct.error, OverflowError):
        return True


def is_bomb(data: bytes | memoryview) -> bool:
    """Tells whether the values of the first directory are far longer than all data: Pillow copies each."""
    num_bytes = 0
    try:
        for value in _values(data):
            there = min(value.num_bytes, max(0, len(data) - value.offset))
            if value.is_numbers and there > _MAX_NUMBERS_BYTES:
                return True
            num_bytes += there
            if num_bytes > _MAX_OVERLAP * len(data):
                return True
    except (struct.error, OverflowError):
        pass  # what is there is within bounds; a reader says what is wrong with the rest
    return False


_HEADER = re.compile(rb"II[*+]\0|MM\0[*+]")


def check_directories(data: bytes) -> None:
    """Raises `BadImage` where the directory of a TIFF, or of EXIF in a file of boxes, is an attack.

    To be called before Pillow opens the file, which reads these at once.
    """
    view, is_tiff = memoryview(data), _HEADER.match(data)
    headers = itertools.islice(_HEADER.finditer(data), 1 if is_tiff else _MAX_HEADERS + 1)
    starts = [match.start() for match in headers]
    if len(starts) > _MAX_HEADERS or any(is_bomb(view[start:]) for start in starts):
        raise BadImage("corrupt", f"{len(data)} bytes with tags that no writer makes so long")


def check_tags(tags: Any, num_bytes: int, limits: Limits) -> None:
    """Raises `BadImage` where a TIFF breaks off, or where Pillow would make of it something that it is not.

    Args:
        tags: Pillow's directory of it.
        num_bytes: Length of the file.
        limits: Bounds on its size.
    """
    tile_width, tile_height = tags.get(322, 0), tags.get(323, 0)
    if tile_width * tile_height > limits.max_pixels:
        raise BadImage("too_many_pixels", f"TIFF with tiles of {tile_width}x{tile_height}")
    if 50706 in tags:
        raise BadImage("unsupported", "a camera's raw photo (DNG): develop it to JPEG first")
    if tags.get(254, 0) & 1 and (330 in tags or tags.next):
        message = "a TIFF whose first picture is a thumbnail, as of a camera's raw photo (NEF, ARW): convert it first"
        raise BadImage("unsupported", message)
    for offsets, counts in ((273, 279), (324, 325)):
        if max(map(operator.add, tags.get(offsets, ()), tags.get(counts, ())), default=0) > num_bytes:
            raise BadImage("truncated", f"TIFF of {num_bytes} bytes: pixels lie beyond its end")
    bits, formats = tags.get(258, (1,)), tags.get(339, (1,))
    if not {*bits} <= {1, 2, 4, 8, 16} or not {*formats} <= {1, 4}:  # unsigned or undefined
        raise BadImage("unsupported", f"TIFF with samples of {bits} bits, format {formats}: what is white?")


def exif_orientation(exif: bytes | None) -> int:
    """Returns the orientation in an EXIF payload (EXIF 3.0, 4.6.5.1), 1 where there is none or it is broken."""
    if not exif or (b"\x12\x01" not in exif and b"\x01\x12" not in exif):
        return 1
    try:
        while exif.startswith(b"Exif\0\0"):
            exif = exif[6:]
        if is_bomb(exif):
            return 1
        parsed = Image.Exif()
        parsed.load(exif)
        value = parsed.get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF raises nearly anything: it must not cost the picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1
