"""Encoded images to 8-bit pixels: the format is detected from the bytes, never from the file name.

JPEG, nearly all of what is read, goes through libjpeg-turbo (simplejpeg), at a reduced scale where the picture
stays larger than needed, and only where libjpeg finds no damage; everything else goes through Pillow.
"""

from diptych.transforms.images.jpeg import decode_jpeg
from diptych.transforms.images.pillow import decode_pillow
from diptych.transforms.images.raster import BadImage, Limits, Pixels, Raster

__all__ = ["BadImage", "Limits", "Pixels", "Raster", "decode"]


def decode(data: bytes | memoryview, limits: Limits, shorter_px: int = 0, longer_px: int = 0) -> Raster:
    """Decodes an image to 8-bit grey, RGB or CMYK.

    Alpha is laid over white, 16-bit samples are scaled to 8, palettes are looked up, of an animation the first
    frame is taken. A JPEG is decoded at 1/2, 1/4 or 1/8 scale as long as it stays at least as large as asked
    for: libjpeg's reduced inverse DCT, which costs less and loses nothing visible; a large JPEG 2000 likewise.

    Args:
        data: The encoded image.
        limits: Bounds on its size.
        shorter_px: The shorter side of the result need not be longer than this; 0 decodes in full.
        longer_px: The same for the longer side.

    Raises:
        BadImage: With a reason from `diptych.transforms.schemas.REASONS["image"]`.
    """
    limits.check_bytes(len(data))
    if bytes(data[:3]) == b"\xff\xd8\xff":
        return decode_jpeg(data, limits, shorter_px, longer_px)
    return decode_pillow(bytes(data), limits, shorter_px, longer_px)
