"""Pictures to test with, and writers of files that no library writes."""

import functools
import io
import re
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import tifffile
from PIL import Image

Array = np.ndarray[Any, Any]
HEIGHT, WIDTH = 49, 66


@functools.cache
def picture(height: int = HEIGHT, width: int = WIDTH, channels: int = 3, seed: int = 0) -> Array:
    """A picture of soft blobs and some grain, as photos have."""
    noise = np.random.default_rng(seed).normal(size=(height, width, channels)).astype(np.float32)
    blurred = [sigma * cv2.GaussianBlur(noise, (0, 0), sigma) for sigma in (1, 6, 24)]
    mixed = (0.1 * blurred[0] + blurred[1] + 3 * blurred[2]).reshape(height, width, channels)
    mixed = (mixed - mixed.min()) / (mixed.max() - mixed.min()) * 255
    return mixed.astype(np.uint8).squeeze()


def grey() -> Array:
    return picture(channels=1)


def alpha() -> Array:
    mask = picture(channels=1, seed=1).copy()
    mask[:10], mask[-10:] = 0, 255
    return mask


def over_white(pixels: Array, mask: Array) -> Array:
    share = (mask / 255.0).reshape(mask.shape + (1,) * (pixels.ndim - 2))
    return pixels * share + 255 * (1 - share)


def wide(pixels: Array) -> Array:
    """8-bit samples as the 16-bit samples that are the same shades."""
    return pixels.astype(np.uint16) * 257


def save(pixels: Array | Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.ascontiguousarray(pixels))
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def save_tiff(pixels: Array, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.ascontiguousarray(pixels), **options)
    return buffer.getvalue()


def exif(orientation: Any) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def palette_image(num_colours: int = 16) -> Image.Image:
    return Image.fromarray(picture()).quantize(num_colours)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(size: tuple[int, int], bits: int, colour: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG of a kind that Pillow does not write."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(rows))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *chunks, pixels, png_chunk(b"IEND", b"")])


def png_rows(pixels: Array) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in pixels.astype(pixels.dtype.newbyteorder(">")))


def tiff_tag(data: bytes, tag: int) -> tuple[int, int]:
    """Position and type of the entry of a tag in a little-endian TIFF."""
    (start,) = struct.unpack_from("<I", data, 4)
    for entry in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], 12):
        found, kind = struct.unpack_from("<HH", data, entry)
        if found == tag:
            return entry, kind
    raise KeyError(tag)


def with_tiff_tag(data: bytes, tag: int, value: int) -> bytes:
    entry, kind = tiff_tag(data, tag)
    return (
        data[: entry + 8]
        + struct.pack("<I" if kind == 4 else "<HH", *([value] if kind == 4 else [value, 0]))
        + (data[entry + 12 :])
    )


def jpeg_frame(data: bytes) -> int:
    """Position of the frame's marker."""
    found = re.search(rb"\xff[\xc0\xc1\xc2\xc9]\0", data)
    assert found
    return found.start()


def with_jpeg_size(data: bytes, width: int, height: int) -> bytes:
    at = jpeg_frame(data) + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]
