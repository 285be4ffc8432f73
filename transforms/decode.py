"""Encoded images to 8-bit pixels: what an image is is decided from its header and pixels, never from its name.

JPEG, nearly all of what is read, goes through libjpeg-turbo (simplejpeg), at a reduced scale where the picture
stays larger than needed, and only where libjpeg finds no damage; everything else goes through Pillow.
"""

import dataclasses
import io
import operator
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

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
        if min(width, height) < max(1, self.min_side_px):
            raise BadImage("too_small", f"{width}x{height} has a side shorter than {self.min_side_px} px")
        ratio = max(width, height) / min(width, height)
        if ratio > self.max_aspect_ratio:
            raise BadImage(
                "aspect_ratio", f"{width}x{height}: 1:{ratio:.1f} is over 1:{self.max_aspect_ratio:g}"
            )


@dataclasses.dataclass(frozen=True)
class Raster:
    """Decoded pixels, not yet turned upright nor converted to sRGB: both are cheaper on fewer pixels.

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
    if bytes(data[:3]) == b"\xff\xd8\xff":
        return _decode_jpeg(data, limits, shorter_px, longer_px)
    return _decode_pillow(bytes(data), limits)


# ITU T.81 marker codes (table B.1): scans, the end, frames that libjpeg-turbo decodes, those without a length
_SOS, _EOI = 0xDA, 0xD9
_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})
_PROGRESSIVE = frozenset({0xC2, 0xCA})
_OTHER_FRAMES = frozenset({0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF})
_BARE = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})
_SCAN_OR_END = re.compile(rb"\xff[\xd9\xda]")
_COLOUR_SPACES = {1: "GRAY", 3: "RGB", 4: "CMYK"}
# More passes over the picture than any encoder makes are an attack: each costs time and hardly a byte
_MAX_SCANS = 100
# Some encoders align the end marker with zeros: fewer than this are no damage
_MAX_PADDING_BYTES = 64

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
    header = _jpeg_header(data)
    width, height = header.width, header.height
    limits.check(width, height)
    _check_scans(data, header)
    scale = _reduced_scale(min(width, height), max(width, height), shorter_px, longer_px)
    size = -(-height * scale // 8), -(-width * scale // 8)
    try:
        pixels = _decode_scans(data, header, size)
    except ValueError:
        pixels = _decode_odd_scans(bytes(data), header, size)
    orientation = _orientation(header.exif)
    if orientation >= 5:
        width, height = height, width
    channels = pixels.shape[2]
    if channels == 4 and header.is_adobe:  # Adobe stores the inks inverted
        np.invert(pixels, out=pixels)
    return Raster(pixels[..., 0] if channels == 1 else pixels, width, height, orientation, header.profile)


def _reduced_scale(shorter: int, longer: int, shorter_px: int, longer_px: int) -> int:
    """Returns the smallest scale, in eighths, at which both sides stay long enough.

    Only powers of two: libjpeg-turbo has no SIMD code for the scales between, and those are slower than none.
    """
    if not (shorter_px or longer_px):
        return 8
    return next((s for s in (1, 2, 4) if shorter * s >= 8 * shorter_px and longer * s >= 8 * longer_px), 8)


@dataclasses.dataclass(frozen=True)
class _JpegHeader:
    """What a JPEG says before its first scan (ITU T.81, B.2).

    Attributes:
        frame: Code of the frame's marker.
        width: Width in pixels, before orientation.
        height: Height in pixels, before orientation.
        components: Identifiers of the components.
        sampling: Of each component, 16 times the horizontal plus the vertical factor.
        segments: (marker, start, end) of each segment; the last is the header of the first scan.
        exif: EXIF payload (EXIF 3.0, 4.7.2), or None.
        profile: ICC profile (ICC.1:2022, B.4), or None.
        is_adobe: Whether Adobe's marker is there.
    """

    frame: int
    width: int
    height: int
    components: bytes
    sampling: bytes
    segments: list[tuple[int, int, int]]
    exif: bytes | None
    profile: bytes | None
    is_adobe: bool


def _jpeg_header(data: bytes | memoryview) -> _JpegHeader:
    """Reads a JPEG's header as libjpeg does, which passes over what stands between segments."""
    frame, exif, is_adobe = None, None, False
    segments, profile = [], []
    position, end, marker = 2, len(data) - 4, 0
    while position <= end and marker != _SOS:
        marker = data[position + 1]
        if data[position] != 0xFF or marker == 0xFF:
            position += 1
            continue
        if marker in _BARE:
            position += 2
            continue
        if marker == _EOI:
            break
        start, position = position, position + 2 + (data[position + 2] << 8 | data[position + 3])
        segments.append((marker, start, position))
        if marker == 0xE1 and exif is None and data[start + 4 : start + 10] == b"Exif\0\0":
            exif = bytes(data[start + 4 : position])
        elif marker == 0xE2 and data[start + 4 : start + 16] == b"ICC_PROFILE\0":
            profile.append(bytes(data[start + 16 : position]))
        elif marker == 0xEE and data[start + 4 : start + 9] == b"Adobe":
            is_adobe = True
        elif marker in _FRAMES and frame is None and start + 10 <= position <= len(data):
            frame = _jpeg_frame(marker, bytes(data[start + 4 : position]))
        elif marker in _OTHER_FRAMES:
            raise BadImage("unsupported", f"a lossless or hierarchical JPEG (frame marker {marker:#x})")
    if frame is None or marker != _SOS or position > len(data):
        reason = "truncated" if _is_cut(bytes(data)) else "corrupt"
        raise BadImage(reason, f"a JPEG of {len(data)} bytes with an unreadable header")
    # each part of a profile begins with its number and their count
    parts = b"".join(part[2:] for part in sorted(profile, key=lambda part: part[:1]))
    return _JpegHeader(*frame, segments, exif, parts or None, is_adobe)


def _jpeg_frame(marker: int, parameters: bytes) -> tuple[int, int, int, bytes, bytes]:
    """Returns the first fields of `_JpegHeader` from a frame header (ITU T.81, B.2.2)."""
    precision, height, width, count = struct.unpack_from(">BHHB", parameters)
    if precision != 8 or count not in _COLOUR_SPACES:
        raise BadImage("unsupported", f"a JPEG of {count} components of {precision} bits")
    end = 6 + 3 * count
    if len(parameters) < end:
        raise BadImage(
            "corrupt", f"a JPEG of {count} components with a frame header of {len(parameters)} bytes"
        )
    return marker, width, height, parameters[6:end:3], parameters[7:end:3]


def _check_scans(data: bytes | memoryview, header: _JpegHeader) -> None:
    """Raises `BadImage` where a JPEG of several scans lacks some: libjpeg would take zeros for what they say."""
    _, start, end = header.segments[-1]
    is_progressive = header.frame in _PROGRESSIVE
    if not is_progressive and end - start >= 8 + 2 * len(header.components):
        return
    data, num_scans = bytes(data), 0
    missing_bits = {component: np.ones(64, int) for component in header.components}
    for match in _SCAN_OR_END.finditer(data, start):
        start = match.start()
        parameters = data[start + 4 : start + 4 + 12]
        spectrum = 1 + 2 * parameters[0] if parameters else 0
        if data[start + 1] == _EOI or len(parameters) < spectrum + 3:
            break
        first, last, approximation = parameters[spectrum : spectrum + 3] if is_progressive else (0, 63, 0)
        for component in parameters[1:spectrum:2]:
            if component in missing_bits:
                missing_bits[component][first : last + 1] = approximation & 15
        num_scans += 1
    if num_scans > _MAX_SCANS:
        raise BadImage("corrupt", f"{header.width}x{header.height} JPEG of {num_scans} scans")
    if any(bits.any() for bits in missing_bits.values()):
        raise BadImage("truncated", f"{header.width}x{header.height} JPEG that ends after {num_scans} scans")


def _decode_scans(
    data: bytes | memoryview, header: _JpegHeader, size: tuple[int, int], strict: bool = True
) -> Pixels:
    """Returns (H, W, C), of a size that is a reduced scale of the picture.

    Raises:
        ValueError: libjpeg cannot decode it or, where `strict`, warns of anything.
    """
    (rows, columns), channels = size, len(header.components)
    pixels = simplejpeg.decode_jpeg(
        data,
        _COLOUR_SPACES[channels],
        min_height=rows,
        min_width=columns,
        min_factor=1,
        buffer=_buffer(rows * columns * channels),
        strict=strict,
    )
    return np.asarray(pixels, np.uint8)


def _decode_odd_scans(data: bytes, header: _JpegHeader, size: tuple[int, int]) -> Pixels:
    """Decodes a JPEG that libjpeg warns of, unless it is damaged.

    libjpeg tells its first warning only. So what it would warn of without harm is set right first, and what it
    warns of then is damage, but for a few zeros after the last scan.
    """
    is_cut = b"\xff\xd9" not in data[header.segments[-1][1] :]
    data = _without_oddities(data, header)
    try:
        return _decode_scans(data, header, size)
    except ValueError as error:
        message = str(error)
    surplus = re.search(r"(\d+) extraneous bytes before marker 0xd9", message)
    if surplus and int(surplus[1]) < _MAX_PADDING_BYTES and bytes(int(surplus[1])) + b"\xff\xd9" in data:
        return _decode_scans(data, header, size, strict=False)
    luma, *chroma = header.sampling
    if luma not in (0x11, 0x12, 0x14, 0x21, 0x22, 0x41) or not {*chroma} <= {0x11, luma}:
        sampling = ", ".join(f"{factors >> 4}x{factors & 15}" for factors in header.sampling)
        raise BadImage("unsupported", f"a JPEG whose components are sampled {sampling}")
    reason = "truncated" if is_cut or "end of JPEG file" in message else "corrupt"
    raise BadImage(reason, f"{header.width}x{header.height} JPEG: {message}")


def _without_oddities(data: bytes, header: _JpegHeader) -> bytes:
    """Returns a JPEG without that in its header which libjpeg warns of although no pixel is wrong.

    That is bytes between segments, versions of JFIF and colour transforms of Adobe that do not exist, and the
    parameters of a sequential scan, which mean nothing (ITU T.81, B.2.3) and are anything from some cameras.
    """
    parts = [b"\xff\xd8"]
    for marker, start, end in header.segments:
        segment = bytearray(data[start:end])
        if marker == 0xE0 and segment[4:9] == b"JFIF\0" and len(segment) > 10:
            segment[9:11] = b"\1\1"
        elif marker == 0xEE and segment[4:9] == b"Adobe" and len(segment) > 15 and segment[15] > 2:
            segment[15] = 2 if len(header.components) == 4 else 1
        elif marker == _SOS and header.frame not in _PROGRESSIVE:
            segment[-3:] = b"\0\x3f\0"
        parts.append(bytes(segment))
    return b"".join([*parts, data[header.segments[-1][2] :]])


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


def _decode_pillow(data: bytes, limits: Limits) -> Raster:
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
