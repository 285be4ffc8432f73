"""Images of every format but JPEG to pixels, through Pillow."""

import io
import operator
import re
import struct
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from transforms.raster import BadImage, Limits, Pixels, Raster

warnings.filterwarnings("ignore", module=r"PIL\.")  # what Pillow warns of is decided here, row by row

# What Pillow may open, by signature: others have none (TGA), run programs (EPS) or hide another size inside (ICO)
_SIGNATURES = {
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "WEBP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "GIF": re.compile(rb"GIF8[79]a"),
    "BMP": re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL),
    "TIFF": re.compile(rb"II[*+]\0|MM\0[*+]"),
    "AVIF": re.compile(rb"....ftypavi[fs]", re.DOTALL),
    "JPEG2000": re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n"),
}
Image.MAX_IMAGE_PIXELS = None  # `Limits` decides
PngImagePlugin.MAX_TEXT_CHUNK = (
    16 << 20
)  # some editors' metadata and some ICC profiles are over Pillow's 1 MB
TiffImagePlugin.READ_LIBTIFF = True  # Pillow's own reader mixes up the bytes of planar 16-bit samples


def decode_pillow(data: bytes, limits: Limits) -> Raster:
    """Decodes an image that is no JPEG; `transforms.decode.decode` has the arguments.

    Raises:
        BadImage: It is damaged, no image, of a kind that cannot become 8-bit RGB, or out of bounds.
    """
    name = next((name for name, signature in _SIGNATURES.items() if signature.match(data)), None)
    if name is None:
        raise _not_an_image(data)
    Image.init()
    if name not in Image.OPEN:
        raise BadImage("unsupported", f"this Pillow does not read {name}")
    try:
        with Image.open(io.BytesIO(data), formats=[name]) as image:
            limits.check(*image.size)
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                _check_tiff(image.tag_v2, len(data), limits)
            elif image.format == "PNG":
                _check_png(data)
                _scale_transparency(image, bits=data[24])
            profile = image.info.get("icc_profile")
            image.load()
            orientation = _pillow_orientation(image)
            pixels = _to_8_bit(image)
    except BadImage:
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything
        if "truncated" in str(error).lower() or _is_cut(data):
            reason = "truncated"
        else:
            is_odd = name == "TIFF" and isinstance(error, UnidentifiedImageError)
            reason = "unsupported" if is_odd else "corrupt"
        raise BadImage(reason, f"a {name} of {len(data)} bytes: {type(error).__name__}: {error}") from error
    height, width = pixels.shape[:2]
    if orientation >= 5:
        width, height = height, width
    return Raster(pixels, width, height, orientation, profile)


def _check_png(data: bytes) -> None:
    """Raises `BadImage` where a checksum is wrong: Pillow does not look at those of the pixels."""
    view, position = memoryview(data), 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data) or kind == b"IEND":
            break
        is_critical = kind[:1].isupper()
        if is_critical and zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(
            data[end - 4 : end], "big"
        ):
            raise BadImage("corrupt", f"PNG: the checksum of a chunk {kind!r} is wrong")
        position = end


def _scale_transparency(image: Image.Image, bits: int) -> None:
    """Scales the transparent grey of a PNG as its samples are: Pillow compares it with the scaled ones."""
    transparent = image.info.get("transparency")
    if image.mode == "L" and isinstance(transparent, int):
        image.info["transparency"] = transparent * 255 // (2**bits - 1)


def _check_tiff(tags: Mapping[int, Any], num_bytes: int, limits: Limits) -> None:
    """Raises `BadImage` where a TIFF breaks off, or where Pillow would make of it something that it is not."""
    tile_width, tile_height = tags.get(322, 0), tags.get(323, 0)
    if tile_width * tile_height > limits.max_pixels:
        raise BadImage("too_many_pixels", f"TIFF with tiles of {tile_width}x{tile_height}")
    for offsets, counts in ((273, 279), (324, 325)):
        if max(map(operator.add, tags.get(offsets, ()), tags.get(counts, ())), default=0) > num_bytes:
            raise BadImage("truncated", f"TIFF of {num_bytes} bytes: pixels lie beyond its end")
    bits, formats = tags.get(258, (1,)), tags.get(339, (1,))
    if not {*bits} <= {1, 2, 4, 8, 16} or not {*formats} <= {1, 4}:  # unsigned or undefined
        raise BadImage("unsupported", f"TIFF with samples of {bits} bits, format {formats}: what is white?")


def _pillow_orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as in _orientation
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_8_bit(image: Image.Image) -> Pixels:
    """Returns a loaded image as (H, W) grey, (H, W, 3) RGB or (H, W, 4) CMYK, uint8."""
    if image.mode.startswith("I;16"):
        return _grey_16_to_8_bit(image)
    if image.has_transparency_data:
        is_grey = image.mode in ("1", "L", "LA", "La")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("L" if is_grey else "RGB")
    if image.mode in ("L", "RGB", "CMYK"):
        return np.asarray(image)
    if image.mode in ("I", "F"):
        raise BadImage("unsupported", f"{image.format} with samples of more than 16 bits")
    if image.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        image = (
            ImageCms.profileToProfile(image, lab, ImageCms.createProfile("sRGB"), outputMode="RGB") or image
        )
    return np.asarray(image.convert("RGB"))


def _grey_16_to_8_bit(image: Image.Image) -> Pixels:
    samples = np.asarray(image)
    pixels = ((samples.astype(np.uint32) * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(262) == 0:  # zero is white
        pixels = np.invert(pixels)
    transparent = image.info.get("transparency")
    return pixels if transparent is None else np.where(samples == transparent, np.uint8(255), pixels)


def _not_an_image(data: bytes) -> BadImage:
    """Returns what bytes are that have no image's signature."""
    head = data[:512].lstrip(b"\xef\xbb\xbf\r\n\t ").lower()
    if head.startswith(b"version https://git-lfs"):
        what = "a Git LFS pointer: fetch the file itself (git lfs pull)"
    elif head.startswith(b"# xet version"):
        what = "a Xet pointer: fetch the file itself (git xet checkout)"
    elif head.startswith((b"<!doctype html", b"<html", b"<?xml", b"<svg")):
        what = "HTML, XML or SVG"
    else:
        what = f"no known image signature, it begins with {data[:16]!r}"
    return BadImage("not_an_image", f"{len(data)} bytes: {what}")


def _is_cut(data: bytes) -> bool:
    """Returns whether a file of a known format lacks its end."""
    if data.startswith((b"\xff\xd8", b"\0\0\0\x0cjP")):
        return b"\xff\xd9" not in data[-64:]
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-64:]
    if data.startswith(b"RIFF"):
        return len(data) < 12 or struct.unpack_from("<I", data, 4)[0] + 8 > len(data)
    if data.startswith(b"GIF8"):
        return b";" not in data[-4:]
    if data.startswith((b"II", b"MM")):
        return _is_cut_tiff(data)
    if data[4:8] == b"ftyp":
        return _is_cut_avif(data)
    return data.startswith(b"BM") and (len(data) < 6 or struct.unpack_from("<I", data, 2)[0] > len(data))


_TIFF_VALUE_BYTES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


def _is_cut_tiff(data: bytes) -> bool:
    """Returns whether the first directory, or a value that it refers to, lies beyond the end (TIFF 6.0, section 2)."""
    order, is_big = "<" if data.startswith(b"II") else ">", b"+" in data[2:4]
    offset, number = struct.Struct(order + "IQ"[is_big]), struct.Struct(order + "HQ"[is_big])
    try:
        (start,) = offset.unpack_from(data, offset.size)
        for i in range(number.unpack_from(data, start)[0]):
            entry = start + number.size + i * (4 + 2 * offset.size)
            (kind,) = struct.unpack_from(order + "H", data, entry + 2)
            (count,), (value,) = (
                offset.unpack_from(data, entry + 4 + offset.size * field) for field in (0, 1)
            )
            num_bytes = count * _TIFF_VALUE_BYTES.get(kind, 1)
            if num_bytes > offset.size and value + num_bytes > len(data):
                return True
    except (struct.error, OverflowError):
        return True
    return False


def _is_cut_avif(data: bytes) -> bool:
    """Returns whether the last box lacks its end (ISO/IEC 14496-12, 4.2)."""
    position = 0
    while len(data) - position >= 8 and (size := int.from_bytes(data[position : position + 4], "big")) >= 8:
        position += size
    return position != len(data) or b"mdat" not in data
