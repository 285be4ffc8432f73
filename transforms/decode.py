"""Encoded images to 8-bit pixels: what an image is is decided from its header and pixels, never from its name.

JPEG, nearly all of what is read, goes through libjpeg-turbo (simplejpeg), at a reduced scale where the picture
stays larger than needed; everything else, and what libjpeg-turbo finds odd, goes through Pillow.
"""

import dataclasses
import io
import re
import struct
import threading
import warnings
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin, UnidentifiedImageError

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

warnings.filterwarnings("ignore", module=r"PIL\.")  # what Pillow warns of is decided here, row by row


class BadImage(Exception):
    """An image that is rejected.

    Attributes:
        reason: One of `transforms.schemas.REASONS["image"]`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds on the size of an image, checked in its header before a pixel is decoded.

    Attributes:
        max_pixels: Largest width times height.
        min_side_px: Smallest shorter side.
        max_aspect_ratio: Largest ratio of the longer to the shorter side.
    """

    max_pixels: int = 50_000_000
    min_side_px: int = 16
    max_aspect_ratio: float = 10.0

    def check(self, width: int, height: int) -> None:
        """Raises `BadImage` where an image of this size is out of bounds."""
        if width * height > self.max_pixels:
            raise BadImage("too_many_pixels", f"{width}x{height} is more than {self.max_pixels} pixels")
        if min(width, height) < self.min_side_px:
            raise BadImage("too_small", f"{width}x{height} has a side shorter than {self.min_side_px} px")
        ratio = max(width, height) / min(width, height)
        if ratio > self.max_aspect_ratio:
            raise BadImage(
                "aspect_ratio", f"{width}x{height}: 1:{ratio:.1f} is over 1:{self.max_aspect_ratio:g}"
            )


@dataclasses.dataclass(frozen=True)
class Raster:
    """Decoded pixels, not yet turned upright nor converted to sRGB: both are cheaper after resizing.

    Attributes:
        pixels: (H, W) grey, (H, W, 3) RGB or (H, W, 4) CMYK. It may lie in a buffer of this thread that the
            next `decode` overwrites.
        width: Width of the original, upright, in pixels.
        height: Height of the original, upright, in pixels.
        orientation: EXIF orientation, 1 to 8.
        profile: ICC profile of the pixels, or None.
    """

    pixels: Pixels
    width: int
    height: int
    orientation: int
    profile: bytes | None


def decode(data: bytes | memoryview, limits: Limits, shorter_px: int = 0, longer_px: int = 0) -> Raster:
    """Decodes an image to 8-bit grey, RGB or CMYK.

    Alpha is laid over white, 16-bit samples are scaled to 8, palettes are looked up, of an animation the first
    frame is taken. A JPEG is decoded at 1/2, 1/4 or 1/8 scale as long as it stays at least as large as asked
    for: libjpeg's reduced inverse DCT, which costs less and loses nothing visible.

    Args:
        data: The encoded image.
        limits: Bounds on its size.
        shorter_px: The shorter side of the result need not be longer than this; 0 decodes in full.
        longer_px: The same for the longer side.

    Raises:
        BadImage: With a reason from `transforms.schemas.REASONS["image"]`.
    """
    if len(data) == 0:
        raise BadImage("empty", "the image has no bytes")
    if bytes(data[:2]) == b"\xff\xd8":
        return _decode_jpeg(data, limits, shorter_px, longer_px)
    return _decode_pillow(data, limits)


# ITU T.81 marker codes: start of scan, and those without a length
_SOS, _BARE = 0xDA, frozenset({0x01, *range(0xD0, 0xD9)})
# What libjpeg warns of although no pixel is wrong
_HARMLESS = re.compile(
    r"extraneous bytes before marker|Invalid SOS|Unknown Adobe|unknown JFIF|progression", re.I
)
_DAMAGED = re.compile(r"premature end|corrupt|huffman", re.I)

_scratch = threading.local()


def _buffer(num_bytes: int) -> Pixels:
    """Returns this thread's buffer for decoded pixels: fresh memory for each photo costs a fifth of its decoding."""
    buffer: Pixels | None = getattr(_scratch, "pixels", None)
    if buffer is None or buffer.nbytes < num_bytes:
        buffer = np.empty(num_bytes, np.uint8)
        if num_bytes <= 48 << 20:  # a rare giant is not held on to
            _scratch.pixels = buffer
    return buffer


def _decode_jpeg(data: bytes | memoryview, limits: Limits, shorter_px: int, longer_px: int) -> Raster:
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return _decode_pillow(data, limits)
    limits.check(width, height)
    space, channels = {"Gray": ("GRAY", 1), "CMYK": ("CMYK", 4), "YCCK": ("CMYK", 4)}.get(colour, ("RGB", 3))
    scale = _reduced_scale(min(width, height), max(width, height), shorter_px, longer_px)
    rows, columns = -(-height * scale // 8), -(-width * scale // 8)
    try:
        pixels = simplejpeg.decode_jpeg(
            data,
            space,
            min_height=rows,
            min_width=columns,
            min_factor=1,
            buffer=_buffer(rows * columns * channels),
        )
    except ValueError as error:
        message = str(error)
        if _DAMAGED.search(message) and not _HARMLESS.search(message):
            reason = "truncated" if "end of JPEG file" in message else "corrupt"
            raise BadImage(reason, f"{width}x{height} JPEG: {message}") from error
        return _decode_pillow(data, limits)
    exif, profile, is_adobe = _jpeg_segments(data)
    orientation = _orientation(exif)
    if orientation >= 5:
        width, height = height, width
    if channels == 4 and is_adobe:  # Adobe stores the inks inverted
        np.invert(pixels, out=pixels)
    return Raster(pixels[..., 0] if channels == 1 else pixels, width, height, orientation, profile)


def _reduced_scale(shorter: int, longer: int, shorter_px: int, longer_px: int) -> int:
    """Returns the smallest scale, in eighths, at which both sides stay long enough.

    Only powers of two: libjpeg-turbo has no SIMD code for the scales between, and those are slower than none.
    """
    if not (shorter_px or longer_px):
        return 8
    return next((s for s in (1, 2, 4) if shorter * s >= 8 * shorter_px and longer * s >= 8 * longer_px), 8)


def _jpeg_segments(data: bytes | memoryview) -> tuple[bytes | None, bytes | None, bool]:
    """Returns a JPEG's EXIF payload (EXIF 3.0, 4.7.2), ICC profile (ICC.1:2022, B.4), and whether Adobe wrote it."""
    exif, profile, is_adobe = None, [], False
    position, end = 2, len(data) - 4
    while position < end:
        marker = data[position + 1]
        if data[position] != 0xFF or marker == _SOS:
            break
        if marker == 0xFF or marker in _BARE:
            position += 1 if marker == 0xFF else 2
            continue
        length = data[position + 2] << 8 | data[position + 3]
        if marker == 0xE1 and exif is None and data[position + 4 : position + 10] == b"Exif\0\0":
            exif = bytes(data[position + 4 : position + 2 + length])
        elif marker == 0xE2 and data[position + 4 : position + 16] == b"ICC_PROFILE\0":
            profile.append(bytes(data[position + 16 : position + 2 + length]))
        elif marker == 0xEE and data[position + 4 : position + 9] == b"Adobe":
            is_adobe = True
        position += 2 + length
    # each part begins with its number and their count
    return exif, b"".join(part[2:] for part in sorted(profile, key=lambda part: part[:1])) or None, is_adobe


def _orientation(exif: bytes | None) -> int:
    """Returns the EXIF orientation, 1 where there is none or it is broken."""
    if not exif or (b"\x12\x01" not in exif and b"\x01\x12" not in exif):
        return 1
    try:
        parsed = Image.Exif()
        parsed.load(exif)
        value = parsed.get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF raises nearly anything: it must not cost the picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _decode_pillow(data: bytes | memoryview, limits: Limits) -> Raster:
    data = bytes(data)
    try:
        with Image.open(io.BytesIO(data)) as image:
            limits.check(*image.size)
            profile = image.info.get("icc_profile")
            image.load()
            orientation = _pillow_orientation(image)
            pixels = _to_8_bit(image)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        if data[:4] in (b"II*\0", b"MM\0*"):
            return _decode_tiff(data, limits)
        raise _unidentified(data) from error
    except Image.DecompressionBombError as error:
        raise BadImage("too_many_pixels", str(error)) from error
    except Exception as error:  # decoders of damaged files raise nearly anything
        reason = "truncated" if "truncated" in str(error).lower() or _is_cut(data) else "corrupt"
        raise BadImage(reason, f"{type(error).__name__}: {error}") from error
    height, width = pixels.shape[:2]
    if orientation >= 5:
        width, height = height, width
    return Raster(pixels, width, height, orientation, profile)


def _pillow_orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as in _orientation
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_8_bit(image: Image.Image) -> Pixels:
    """Returns a loaded image as (H, W) grey, (H, W, 3) RGB or (H, W, 4) CMYK, uint8."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    if image.mode in ("L", "RGB", "CMYK"):
        return np.asarray(image)
    if image.mode.startswith("I"):  # 16 bits, also where Pillow holds them in 32
        samples = np.asarray(image).astype(np.int64)
        if samples.min() < 0 or samples.max() > 0xFFFF:
            raise BadImage("unsupported", f"{image.format} with samples of more than 16 bits")
        return ((samples * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8)
    if image.mode == "F":
        raise BadImage("unsupported", f"{image.format} with floating-point samples, whose white is unknown")
    if image.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        image = (
            ImageCms.profileToProfile(image, lab, ImageCms.createProfile("sRGB"), outputMode="RGB") or image
        )
    return np.asarray(image.convert("RGB"))


def _decode_tiff(data: bytes, limits: Limits) -> Raster:
    """Decodes the TIFFs that Pillow does not know (planar or 16-bit RGB, say) with OpenCV's libtiff."""
    try:
        file = io.BytesIO(data)
        directory = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
        file.seek(directory.next)
        directory.load(file)
        size = int(directory[256]), int(directory[257])
    except Exception as error:  # a broken directory raises nearly anything
        raise BadImage("corrupt", f"TIFF directory: {type(error).__name__}: {error}") from error
    limits.check(*size)
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is None:
        raise BadImage("unsupported", f"{size[0]}x{size[1]} TIFF of a kind that no decoder here reads")
    return Raster(np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.uint8), *size, 1, None)


_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"RIFF": "WebP",
}


def _unidentified(data: bytes) -> BadImage:
    """Returns why no decoder knows these bytes."""
    for signature, name in _SIGNATURES.items():
        if data.startswith(signature) and (name != "WebP" or data[8:12] == b"WEBP"):
            reason = "truncated" if _is_cut(data) else "corrupt"
            return BadImage(reason, f"a {name} of {len(data)} bytes with an unreadable header")
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
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in data[-64:]
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-64:]
    if data.startswith(b"RIFF"):
        return len(data) < 12 or struct.unpack_from("<I", data, 4)[0] + 8 > len(data)
    if data.startswith(b"GIF8"):
        return b";" not in data[-4:]
    return data.startswith(b"BM") and (len(data) < 6 or struct.unpack_from("<I", data, 2)[0] > len(data))
