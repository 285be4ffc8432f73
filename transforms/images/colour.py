"""ICC profiles to sRGB (IEC 61966-2-1).

Nearly every RGB profile is three curves and a matrix (ICC.1:2022, 8.3.3). Those are applied here with tables, a tenth
of the cost of Little CMS, after a comparison with Little CMS on sample colours; all others are left to it.
"""

import collections
import hashlib
import io
import struct
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageCms

from diptych.transforms.images.raster import MAX_PROFILE_BYTES, Pixels

_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_SPACES = {1: "GRAY", 3: "RGB", 4: "CMYK"}
# Profiles whose effect is at most this many of 255 steps on any colour are sRGB by another name
_SAME_STEPS = 3
# Tables may differ from Little CMS by its own rounding
_TABLE_STEPS = 2

# Of conversions that a thread keeps: at most so many, and so many bytes; a press's table of 17^4 colours has 0.5 MB
_MAX_KEPT, _MAX_KEPT_BYTES = 256, 16 << 20
_LITTLE_CMS_BYTES, _TABLES_BYTES = 1 << 20, 70_000

_Array = np.ndarray[Any, Any]
_Convert = Callable[[Pixels], Pixels]


def to_srgb(pixels: Pixels, profile: bytes | None) -> tuple[Pixels, bool]:
    """Converts pixels to sRGB.

    Args:
        pixels: (H, W) grey, (H, W, 3) RGB or (H, W, 4) CMYK.
        profile: The ICC profile they are in. A broken one, a giant or one of another colour space is ignored.

    Returns:
        (H, W, 3) RGB, and whether the profile changed anything.
    """
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    convert = _converters.of(profile, channels) if profile and len(profile) <= MAX_PROFILE_BYTES else None
    if convert is not None:
        return convert(np.ascontiguousarray(pixels)), True
    if channels == 3:
        return pixels, False
    if channels == 1:
        return np.repeat(pixels[..., None], 3, axis=2), False
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels), "CMYK").convert("RGB")), False


class _Converters(threading.local):
    """The conversions that this thread used last; a transform of Little CMS keeps its last colour and is not shared.

    Bounded by bytes as well as by number: a data set may have as many profiles as images.
    """

    def __init__(self) -> None:
        self._kept: collections.OrderedDict[tuple[bytes, int], _Conversion] = collections.OrderedDict()
        self._num_bytes = 0

    def of(self, profile: bytes, channels: int) -> "_Convert | None":
        """Returns what converts pixels of a profile to sRGB, or None where there is nothing to do."""
        key = hashlib.sha256(profile).digest(), channels
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key].convert
        conversion = _conversion(profile, channels)
        self._kept[key] = conversion
        self._num_bytes += conversion.num_bytes
        while self._num_bytes > _MAX_KEPT_BYTES or len(self._kept) > _MAX_KEPT:
            self._num_bytes -= self._kept.popitem(last=False)[1].num_bytes
        return conversion.convert


_converters = _Converters()


class _Conversion(NamedTuple):
    """A conversion to sRGB.

    Attributes:
        convert: What converts pixels, or None where there is nothing to do.
        num_bytes: About how much memory it holds.
    """

    convert: "_Convert | None"
    num_bytes: int


def _conversion(profile: bytes, channels: int) -> _Conversion:
    """Returns the conversion of pixels of a profile to sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES[channels]:
            return _Conversion(None, 0)
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), _MODES[channels], "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return _Conversion(None, 0)

    def convert(pixels: Pixels) -> Pixels:
        image = Image.fromarray(pixels, _MODES[channels])
        return np.asarray(ImageCms.applyTransform(image, transform))

    by_little_cms = _Conversion(convert, len(profile) + _LITTLE_CMS_BYTES)
    if channels != 3:
        return by_little_cms
    colours = _sample_colours()
    expected = convert(colours).astype(int)
    if np.abs(expected - colours).max() <= _SAME_STEPS:
        return _Conversion(None, 0)
    by_tables = _matrix_converter(profile)
    if by_tables and np.abs(by_tables(colours) - expected).max() <= _TABLE_STEPS:
        return _Conversion(by_tables, _TABLES_BYTES)
    return by_little_cms


def _sample_colours() -> Pixels:
    """Returns (1, N, 3) colours that tell profiles apart: a grid, and each step of each channel."""
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
    ramp = np.arange(256, dtype=np.uint8)[:, None]
    ramps = [ramp * np.array(channels, np.uint8) for channels in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    return np.concatenate([grid, *ramps])[None]


# Primaries of sRGB, adapted to D50 as profiles hold them (columns R, G, B; IEC 61966-2-1, Bradford)
_SRGB_D50 = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def _matrix_converter(profile: bytes) -> _Convert | None:
    """Returns the conversion of a profile of three curves and a matrix, or None where it is another kind."""
    try:
        tags = _tags(profile)
        if any(name.startswith(b"A2B") for name in tags):
            return None
        with np.errstate(all="ignore"):  # curves of nonsense compare badly in `_converter`
            curves = np.stack(
                [_curve(tags[name]) for name in (b"rTRC", b"gTRC", b"bTRC")], axis=-1
            )  # (256, 3)
        columns = [np.array(struct.unpack_from(">3i", tags[name], 8)) for name in (b"rXYZ", b"gXYZ", b"bXYZ")]
    except (LookupError, ValueError, struct.error):
        return None
    curves = np.nan_to_num(curves)
    matrix = np.linalg.inv(_SRGB_D50) @ np.stack(columns, axis=-1) / 65536
    linear = np.rint(curves * 65535).astype(np.uint16)[None]  # (1, 256, 3)
    light = np.arange(65536) / 65535
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    gamma = np.rint(encoded * 255).astype(np.uint8)  # (65536,)
    weights = matrix.astype(np.float32)

    def convert(pixels: Pixels) -> Pixels:
        # OpenCV before 4.13 has no tables of 16 bits
        return gamma.take(cv2.transform(cv2.LUT(pixels, linear), weights))

    return convert


def _tags(profile: bytes) -> dict[bytes, memoryview]:
    """Returns the tags of a profile (ICC.1:2022, 7.3): views, because all may be of the same bytes."""
    view = memoryview(profile)
    count = min(struct.unpack_from(">I", profile, 128)[0], 100)
    entries = (struct.unpack_from(">4sII", profile, 132 + 12 * i) for i in range(count))
    return {name: view[offset : offset + size] for name, offset, size in entries}


def _curve(tag: memoryview) -> _Array:
    """Returns a tone curve at 256 steps, 0 to 1 (ICC.1:2022, 10.6 and 10.18).

    Raises:
        ValueError: It is of an unknown type.
    """
    at, kind_name = np.arange(256) / 255, bytes(tag[:4])
    if kind_name == b"curv":
        (count,) = struct.unpack_from(">I", tag, 8)
        if count <= 1:
            return at ** (struct.unpack_from(">H", tag, 12)[0] / 256) if count else at
        table = np.frombuffer(tag, ">u2", count, 12) / 65535
        return np.interp(at, np.linspace(0, 1, count), table)
    if kind_name != b"para":
        raise ValueError(f"a curve of type {kind_name!r}")
    kind = struct.unpack_from(">H", tag, 8)[0]
    values = [value / 65536 for value in struct.unpack_from(f">{(1, 3, 4, 5, 7)[kind]}i", tag, 12)]
    g, a, b, c, d, e, f = values + [1.0, 0.0, 0.0, 0.0, 0.0, 0.0][len(values) - 1 :]
    if kind in (1, 2):  # below -b/a the curve is the constant c, which is no slope here
        c, d, e, f = 0.0, -b / a if a else 0.0, c if kind == 2 else 0.0, c if kind == 2 else 0.0
    return np.clip(np.where(at >= d, np.maximum(a * at + b, 0) ** g + e, c * at + f), 0, 1)
