"""Images of every format but JPEG to pixels, through Pillow."""

import contextlib
import functools
import importlib
import io
import struct
import warnings
from collections.abc import Iterator

import cv2
import numpy as np
from PIL import AvifImagePlugin, ExifTags, Image, ImageCms, TiffImagePlugin, UnidentifiedImageError

from diptych.models.errors import one_line
from diptych.transforms.images.gif import without_long_extensions
from diptych.transforms.images.jpeg2000 import check_codestream, decode_deep, halvings, is_deep, profile_of
from diptych.transforms.images.png import essential_parts
from diptych.transforms.images.raster import BadImage, Limits, Pixels, Raster
from diptych.transforms.images.signatures import image_format
from diptych.transforms.images.tiff import check_directories, check_tags, is_bomb, is_cut_tiff

warnings.filterwarnings("ignore", module=r"PIL\.")  # what Pillow warns of is decided here, row by row

Image.MAX_IMAGE_PIXELS = None  # `Limits` decides
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the pool's threads are the parallelism
_HEIF_OPTIONS = {"decode_threads": 1, "thumbnails": False, "depth_images": False, "aux_images": False}

# Large images are converted in strips, so that no step holds all of them once more
_STRIP_PIXELS = 1 << 20
_WEBP_ANIMATION = 2  # a flag of its extended header


def decode_pillow(data: bytes, limits: Limits, shorter_px: int, longer_px: int) -> Raster:
    """Decodes an image that is no JPEG; `diptych.transforms.images.decode.decode` has the arguments.

    Raises:
        BadImage: It is damaged, no image, of a kind that cannot become 8-bit RGB, or out of bounds.
    """
    name = image_format(data)
    _check_is_read(name)
    try:
        return _READERS.get(name, _read)(name, data, limits, (shorter_px, longer_px))
    except BadImage:
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything
        is_unread = isinstance(error, UnidentifiedImageError)  # it names the buffer and nothing else
        if "truncated" in str(error).lower() or _is_cut(data):
            reason = "truncated"
        else:
            reason = "unsupported" if name == "TIFF" and is_unread else "corrupt"
        said = "its header cannot be read" if is_unread else one_line(error, with_type=True)
        raise BadImage(reason, f"a {name} of {len(data)} bytes: {said}") from error


def _read(name: str, data: bytes, limits: Limits, _: tuple[int, int]) -> Raster:
    if name == "GIF":
        data = without_long_extensions(data)
    elif name in ("TIFF", "AVIF", "HEIF"):
        check_directories(data)
    with Image.open(io.BytesIO(data), formats=[name]) as image:
        limits.check(*image.size)
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            check_tags(image.tag_v2, len(data), limits)
        profile = image.info.get("icc_profile")
        image.load()
        limits.check(*image.size)  # a HEIF may lie
        return _raster(_to_8_bit(image), image, image.size, profile)


def _read_png(name: str, data: bytes, limits: Limits, _: tuple[int, int]) -> Raster:
    data, profile = essential_parts(data)
    with Image.open(io.BytesIO(data), formats=[name]) as image:
        limits.check(*image.size)
        _scale_transparency(image, bits=data[24])
        image.load()
        return _raster(_to_8_bit(image), image, image.size, profile)


def _read_webp(name: str, data: bytes, limits: Limits, _: tuple[int, int]) -> Raster:
    with Image.open(io.BytesIO(data), formats=[name]) as image:
        limits.check(*image.size)
        profile = image.info.get("icc_profile")
        pixels = _still_webp(data)
        if pixels is None:
            image.load()
            pixels = _to_8_bit(image)
        return _raster(pixels, image, image.size, profile)


def _read_jpeg2000(name: str, data: bytes, limits: Limits, enough_px: tuple[int, int]) -> Raster:
    check_codestream(data, limits)
    with Image.open(io.BytesIO(data), formats=[name]) as image:
        size = image.size
        limits.check(*size)
        if is_deep(data):
            image.load()  # for its damage
            pixels = _to_8_bit(Image.fromarray(decode_deep(data, image.mode)))
        else:
            setattr(image, "reduce", halvings(data, size, *enough_px))  # noqa: B010 - elsewhere it is a method
            image.load()
            pixels = _to_8_bit(image)
        return _raster(pixels, image, size, profile_of(data))


_READERS = {"PNG": _read_png, "WEBP": _read_webp, "JPEG2000": _read_jpeg2000}


def _raster(pixels: Pixels, image: Image.Image, size: tuple[int, int], profile: bytes | None) -> Raster:
    orientation = _pillow_orientation(image)
    width, height = size if orientation < 5 else size[::-1]
    return Raster(pixels, width, height, orientation, profile)


@functools.cache
def _formats() -> frozenset[str]:
    """Returns the names of the formats that are read here, with a plug-in for HEIF where there is one."""
    Image.init()
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener(**_HEIF_OPTIONS)
    return frozenset(Image.OPEN)


def _check_is_read(name: str) -> None:
    if name in _formats():
        return
    if name == "HEIF":
        raise BadImage(
            "unsupported", "a HEIC image: pip install 'diptych[heif]' to read it, or convert it to JPEG"
        )
    raise BadImage("unsupported", f"a {name}, which this build of Pillow does not read")


def _scale_transparency(image: Image.Image, bits: int) -> None:
    """Scales the transparent grey of a PNG as its samples are: Pillow compares it with the scaled ones."""
    transparent = image.info.get("transparency")
    if image.mode == "L" and isinstance(transparent, int):
        image.info["transparency"] = transparent * 255 // (2**bits - 1)


def _pillow_orientation(image: Image.Image) -> int:
    exif = image.info.get("exif")
    try:
        if isinstance(exif, bytes) and is_bomb(exif.removeprefix(b"Exif\0\0")):
            return 1
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as in `exif_orientation`
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_8_bit(image: Image.Image) -> Pixels:
    """Returns a loaded image as (H, W) grey, (H, W, 3) RGB or (H, W, 4) CMYK, uint8."""
    if image.mode in ("I", "F"):
        raise BadImage("unsupported", f"{image.format} with samples of more than 16 bits")
    is_inverted = isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(262) == 0
    width, height = image.size
    if width * height <= _STRIP_PIXELS:
        return _strip_to_8_bit(image, is_inverted)
    pixels: Pixels | None = None
    for top, bottom in _strips(width, height):
        strip = _strip_to_8_bit(image.crop((0, top, width, bottom)), is_inverted)
        if pixels is None:
            pixels = np.empty((height, *strip.shape[1:]), np.uint8)
        pixels[top:bottom] = strip
    assert pixels is not None
    return pixels


def _strips(width: int, height: int) -> Iterator[tuple[int, int]]:
    """Yields the first row and the one behind the last of each strip."""
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


def _still_webp(data: bytes) -> Pixels | None:
    """Decodes a WebP that is no animation with OpenCV, which holds it once where Pillow holds it four times.

    Returns:
        (H, W, 3) RGB; None where it is an animation or damaged.
    """
    if data[12:16] == b"VP8X" and data[20] & _WEBP_ANIMATION:
        return None
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)  # BGR or BGRA
    if pixels is None:
        return None
    opaque = pixels if pixels.shape[2] == 3 else np.empty((*pixels.shape[:2], 3), np.uint8)
    for top, bottom in _strips(pixels.shape[1], pixels.shape[0]):
        if opaque is pixels:
            opaque[top:bottom] = pixels[top:bottom, :, ::-1]
        else:
            strip = Image.fromarray(np.ascontiguousarray(pixels[top:bottom, :, [2, 1, 0, 3]]), "RGBA")
            opaque[top:bottom] = _strip_to_8_bit(strip, is_inverted=False)
    return np.asarray(opaque, np.uint8)


def _strip_to_8_bit(image: Image.Image, is_inverted: bool) -> Pixels:
    """Converts a part of an image; of 16-bit grey, zero may be white."""
    if image.mode.startswith("I;16"):
        return _grey_16_to_8_bit(image, is_inverted)
    if image.has_transparency_data:
        is_grey = image.mode in ("1", "L", "LA", "La")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("L" if is_grey else "RGB")
    if image.mode in ("L", "RGB", "CMYK"):
        return np.asarray(image)
    if image.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        image = (
            ImageCms.profileToProfile(image, lab, ImageCms.createProfile("sRGB"), outputMode="RGB") or image
        )
    return np.asarray(image.convert("RGB"))


def _grey_16_to_8_bit(image: Image.Image, is_inverted: bool) -> Pixels:
    samples = np.asarray(image)
    pixels = ((samples.astype(np.uint32) * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8)
    if is_inverted:
        pixels = np.invert(pixels)
    transparent = image.info.get("transparency")
    return pixels if transparent is None else np.where(samples == transparent, np.uint8(255), pixels)


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
        return is_cut_tiff(data)
    if data[4:8] == b"ftyp":
        return _is_cut_avif(data)
    return data.startswith(b"BM") and (len(data) < 6 or struct.unpack_from("<I", data, 2)[0] > len(data))


def _is_cut_avif(data: bytes) -> bool:
    """Returns whether the last box lacks its end (ISO/IEC 14496-12, 4.2)."""
    position = 0
    while len(data) - position >= 8 and (size := int.from_bytes(data[position : position + 4], "big")) >= 8:
        position += size
    return position != len(data) or b"mdat" not in data
