"""ICC profiles to sRGB (IEC 61966-2-1), with one transform a profile and thread."""

import functools
import io
import threading

import numpy as np
from PIL import Image, ImageCms

from transforms.decode import Pixels

_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_SPACES = {1: "GRAY", 3: "RGB", 4: "CMYK"}
# Profiles whose effect is at most this many of 255 steps on any colour are sRGB by another name
_SAME_STEPS = 3


def to_srgb(pixels: Pixels, profile: bytes | None) -> tuple[Pixels, bool]:
    """Converts pixels to sRGB.

    Args:
        pixels: (H, W) grey, (H, W, 3) RGB or (H, W, 4) CMYK.
        profile: The ICC profile they are in. A broken one, or one of another colour space, is ignored.

    Returns:
        (H, W, 3) RGB, and whether the profile changed anything.
    """
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    transform = _transform(profile, channels, threading.get_ident()) if profile else None
    if transform is None and channels == 3:
        return pixels, False
    if transform is None and channels == 1:
        return np.repeat(pixels[..., None], 3, axis=2), False
    image = Image.fromarray(np.ascontiguousarray(pixels), _MODES[channels])
    if transform is None:
        return np.asarray(image.convert("RGB")), False
    return np.asarray(ImageCms.applyTransform(image, transform)), True


@functools.lru_cache(maxsize=256)
def _transform(profile: bytes, channels: int, thread: int) -> ImageCms.ImageCmsTransform | None:
    """Returns the transform of a profile to sRGB, or None where there is nothing to do.

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
    if channels == 3:
        steps = np.linspace(0, 255, 9).astype(np.uint8)
        colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
        after = np.asarray(ImageCms.applyTransform(Image.fromarray(colours, "RGB"), transform))
        if np.abs(after.astype(int) - colours).max() <= _SAME_STEPS:
            return None
    return transform
