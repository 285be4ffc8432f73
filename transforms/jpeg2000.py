"""JPEG 2000 (ITU T.800): what Pillow does not look at in its header."""

import struct

from transforms.raster import BadImage, Limits

_CODESTREAM = b"\xff\x4f\xff\x51"
_MAX_COMPONENTS = 5


def check_codestream(data: bytes, limits: Limits) -> None:
    """Raises `BadImage` where the codestream (A.5.1) is out of bounds, whatever the file's header says.

    Args:
        data: The file.
        limits: Bounds on its size.
    """
    start = data.find(_CODESTREAM)
    if start < 0 or len(data) < start + 42:
        return
    right, bottom, left, top = struct.unpack_from(">4I", data, start + 8)
    limits.check(max(0, right - left), max(0, bottom - top))
    (num_components,) = struct.unpack_from(">H", data, start + 40)
    if num_components > _MAX_COMPONENTS:
        raise BadImage("unsupported", f"JPEG 2000 of {num_components} components")


def profile_of(data: bytes) -> bytes | None:
    """Returns the ICC profile in the header of a JP2 file (I.5.3.3), or None."""
    header = _box(data, 12, len(data), b"jp2h")
    colour = header and _box(data, *header, b"colr")
    if not colour or data[colour[0] : colour[0] + 1] != b"\2":
        return None
    return data[colour[0] + 3 : colour[1]] or None


def _box(data: bytes, position: int, end: int, name: bytes) -> tuple[int, int] | None:
    """Returns where the content of the first box of a name starts and ends."""
    while position + 8 <= end:
        length, kind = struct.unpack_from(">I4s", data, position)
        start = position + 8
        if length == 1 and position + 16 <= end:
            (length,) = struct.unpack_from(">Q", data, start)
            start += 8
        stop = min(position + length, end) if length else end
        if kind == name:
            return start, stop
        if length < 8 or kind == b"jp2c":
            return None
        position = stop
    return None
