"""What decoding gives, and the bounds that it keeps."""

import dataclasses
from typing import Any

import numpy as np

from diptych.transforms.schemas import MAX_IMAGE_BYTES

# The largest profiles of presses have some 3 MB
MAX_PROFILE_BYTES = 8 << 20

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class BadImage(Exception):
    """An image that is rejected.

    Attributes:
        reason: One of `diptych.transforms.schemas.REASONS["image"]`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds on an image, checked before a pixel is decoded.

    Attributes:
        max_pixels: Largest width times height.
        min_side_px: Smallest shorter side.
        max_aspect_ratio: Largest ratio of the longer to the shorter side.
        max_image_bytes: Most bytes of the encoded image.
    """

    max_pixels: int = 50_000_000
    min_side_px: int = 16
    max_aspect_ratio: float = 10.0
    max_image_bytes: int = MAX_IMAGE_BYTES

    def check_bytes(self, num_bytes: int) -> None:
        """Raises `BadImage` where an encoded image of so many bytes is out of bounds."""
        if num_bytes == 0:
            raise BadImage("empty", "the image has no bytes")
        if num_bytes > self.max_image_bytes:
            raise BadImage(
                "too_many_bytes", f"an image of {num_bytes} bytes: at most {self.max_image_bytes} are decoded"
            )

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
