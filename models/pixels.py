"""Decodes images to the pixels that a network reads."""

import io

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

Pixels = npt.NDArray[np.uint8]


def decode_pixels(data: bytes | memoryview, size_px: int) -> Pixels:
    """Decodes an image that `diptych prepare` wrote to (S, S, 3) RGB, squashed where it is of another shape.

    Args:
        data: The encoded image.
        size_px: S; 0 keeps the image's size.

    Raises:
        ValueError: simplejpeg cannot decode it.
        OSError: Pillow cannot decode it.
    """
    if bytes(data[:3]) == b"\xff\xd8\xff":
        pixels = simplejpeg.decode_jpeg(data, "RGB")
    else:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGB"))
    return resize_square(np.asarray(pixels, np.uint8), size_px) if size_px else np.asarray(pixels, np.uint8)


def resize_square(pixels: Pixels, size_px: int) -> Pixels:
    """Resizes an image (H, W, 3) to (S, S, 3), squashed where it is not square."""
    if pixels.shape[:2] == (size_px, size_px):
        return pixels
    smaller = min(pixels.shape[:2]) < size_px
    interpolation = cv2.INTER_CUBIC if smaller else cv2.INTER_AREA
    return np.asarray(cv2.resize(pixels, (size_px, size_px), interpolation=interpolation), np.uint8)
