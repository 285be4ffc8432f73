"""ICC profiles to sRGB (IEC 61966-2-1).

Nearly every RGB profile is three curves and a matrix (ICC.1:2022, 8.3.3). Those are applied here with tables, a tenth
of the cost of Little CMS, after a comparison with Little CMS on sample colours; all others are left to it.
"""

import functools
import io
import struct
import threading
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageCms

from transforms.decode import Pixels

_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_SPACES = {1: "GRAY", 3: "RGB", 4: "CMYK"}
# Profiles whose effect is at most this many of 255 steps on any colour are sRGB by another name
_SAME_STEPS = 3
# Tables may differ from Little CMS by its own rounding
_TABLE_STEPS = 2

_Array = np.ndarray[Any, Any]
_Convert = Callable[[Pixels], Pixels]


def to_srgb(pixels: Pixels, profile: bytes | None) -> tuple[Pixels, bool]:
    """Converts pixels to sRGB.

    Args:
        pixels: (H, W) grey, (H, W, 3) RGB or (H, W, 4) CMYK.
        profile: The ICC profile they are in. A broken one, or one of another colour space, is ignored.

    Returns:
        (H, W, 3) RGB, and whether the profile changed anything.
    """
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    convert = _converter(profile, channels, threading.get_ident()) if profile else None
    if convert is not None:
        return convert(np.ascontiguousarray(pixels)), True
    if channels == 3:
        return pixels, False
    if channels == 1:
        return np.repeat(pixels[..., None], 3, axis=2), False
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels), "CMYK").convert("RGB")), False


@functools.lru_cache(maxsize=256)
def _converter(profile: bytes, channels: int, thread: int) -> _Convert | None:
    """Returns what converts pixels of a profile to sRGB, or None where there is nothing to do.

    The thread is part of the cache's key: a transform of Little CMS keeps its last colour and is not shared.
    """
    del thread
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES[channels]:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), _MODES[channels], "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None

    def convert(pixels: Pixels) -> Pixels:
        image = Image.fromarray(pixels, _MODES[channels])
        return np.asarray(ImageCms.applyTransform(image, transform))

    if channels != 3:
        return convert
    colours = _sample_colours()
    expected = convert(colours).astype(int)
    if np.abs(expected - colours).max() <= _SAME_STEPS:
        return None
    by_tables = _matrix_converter(profile)
    if by_tables and np.abs(by_tables(colours) - expected).max() <= _TABLE_STEPS:
        return by_tables
    return convert


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


def _tags(profile: bytes) -> dict[bytes, bytes]:
    """Returns the tags of a profile (ICC.1:2022, 7.3)."""
    count = min(struct.unpack_from(">I", profile, 128)[0], 100)
    entries = (struct.unpack_from(">4sII", profile, 132 + 12 * i) for i in range(count))
    return {name: profile[offset : offset + size] for name, offset, size in entries}


def _curve(tag: bytes) -> _Array:
    """Returns a tone curve at 256 steps, 0 to 1 (ICC.1:2022, 10.6 and 10.18).

    Raises:
        ValueError: It is of an unknown type.
    """
    at = np.arange(256) / 255
    if tag[:4] == b"curv":
        (count,) = struct.unpack_from(">I", tag, 8)
        if count <= 1:
            return at ** (struct.unpack_from(">H", tag, 12)[0] / 256) if count else at
        table = np.frombuffer(tag, ">u2", count, 12) / 65535
        return np.interp(at, np.linspace(0, 1, count), table)
    if tag[:4] != b"para":
        raise ValueError(f"a curve of type {tag[:4]!r}")
    kind = struct.unpack_from(">H", tag, 8)[0]
    values = [value / 65536 for value in struct.unpack_from(f">{(1, 3, 4, 5, 7)[kind]}i", tag, 12)]
    g, a, b, c, d, e, f = values + [1.0, 0.0, 0.0, 0.0, 0.0, 0.0][len(values) - 1 :]
    if kind in (1, 2):  # below -b/a the curve is the constant c, which is no slope here
        c, d, e, f = 0.0, -b / a if a else 0.0, c if kind == 2 else 0.0, c if kind == 2 else 0.0
    return np.clip(np.where(at >= d, np.maximum(a * at + b, 0) ** g + e, c * at + f), 0, 1)
