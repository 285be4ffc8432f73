"""JPEG 2000 (ITU T.800): what Pillow does not look at in its header."""

import struct

import cv2
import numpy as np

from diptych.transforms.images.raster import BadImage, Limits, Pixels

_CODESTREAM = b"\xff\x4f\xff\x51"
_CODING_STYLE, _COMPONENT_CODING_STYLE, _TILE = 0x52, 0x53, 0x90
_MAX_COMPONENTS = 5
# OpenJPEG needs some 15 bytes a pixel: pictures beyond this are decoded at a reduced scale where that is enough
_LARGE_PIXELS = 1 << 24


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


def halvings(data: bytes, size: tuple[int, int], shorter_px: int, longer_px: int) -> int:
    """Returns how often a large picture may be halved while it is decoded.

    Args:
        data: The file.
        size: Width and height, in pixels.
        shorter_px: The shorter side of the result need not be longer than this; 0 decodes in full.
        longer_px: The same for the longer side.
    """
    if not (shorter_px or longer_px) or size[0] * size[1] <= _LARGE_PIXELS:
        return 0
    number = 0
    while min(size) >> number + 1 >= max(1, shorter_px) and max(size) >> number + 1 >= longer_px:
        number += 1
    return min(number, _num_levels(data))


def is_deep(data: bytes) -> bool:
    """Tells whether several components have samples of more than 8 bits: Pillow makes black of their white."""
    start = data.find(_CODESTREAM)
    num_components, depth = struct.unpack_from(">HB", data, start + 40)
    return num_components > 1 and (depth & 0x7F) >= 8


def decode_deep(data: bytes, mode: str) -> Pixels:
    """Decodes samples of more than 8 bits with OpenCV, which takes no notice of damage: Pillow must have found none.

    Args:
        data: The file.
        mode: Pillow's name of its colours.

    Returns:
        (H, W, 3) RGB or (H, W, 4) RGBA, uint8.

    Raises:
        BadImage: OpenCV knows no such components.
    """
    bits = (data[data.find(_CODESTREAM) + 42] & 0x7F) + 1
    samples = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)  # BGR or BGRA
    if mode not in ("RGB", "RGBA") or samples is None or samples.ndim != 3 or samples.dtype != np.uint16:
        raise BadImage("unsupported", f"JPEG 2000 of several components of {bits} bits")
    pixels: Pixels = np.empty(samples.shape, np.uint8)
    most = 2**bits - 1
    for i in range(len(samples)):  # row by row, so that nothing else is large
        row = np.minimum(samples[i], most).astype(np.uint32)
        pixels[i] = (row * 255 + most // 2) // most
    conversion = cv2.COLOR_BGR2RGB if pixels.shape[-1] == 3 else cv2.COLOR_BGRA2RGBA
    return np.asarray(cv2.cvtColor(pixels, conversion), np.uint8)


def _num_levels(data: bytes) -> int:
    """Returns the resolutions below the full one that all components have (A.6.1), 0 where that is not told."""
    position = data.find(_CODESTREAM) + 2
    while 2 <= position <= len(data) - 10:
        marker = data[position + 1]
        if marker == _CODING_STYLE:
            return data[position + 9]
        if marker in (_COMPONENT_CODING_STYLE, _TILE):
            break
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return 0


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
