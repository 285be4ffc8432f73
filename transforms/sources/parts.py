"""What the parsers of annotations give: images, captions, and what cannot be used, as the file has them."""

import posixpath
from collections.abc import Sequence
from typing import NamedTuple

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

Ref = int | float | str
"""How captions refer to their image: an id, or a name."""


class Image(NamedTuple):
    """An image that an annotation lists.

    Attributes:
        row: Its ordinal in the annotation.
        ref: What captions call it.
        path: Its file, below the image folder.
        metadata: Values of the metadata columns.
        wanted: False for an image that is known but not asked for (another split).
        key: Its key; None for one made of its path.
    """

    row: int
    ref: Ref
    path: str
    metadata: Sequence[str | None] = ()
    wanted: bool = True
    key: str | None = None


class Caption(NamedTuple):
    """A caption in an annotation.

    Attributes:
        ref: The image it belongs to.
        ordinal: Its number among the captions of the image.
        text: The caption, as it stands.
        repaired: Whether its line was damaged in a way that could be undone.
    """

    ref: Ref
    ordinal: int
    text: str
    repaired: bool = False


class Bad(NamedTuple):
    """A part of an annotation that cannot be used: a reject.

    Attributes:
        message: What was found, and where.
        row: Ordinal of the image, where it is an image's entry.
        key: Identity of the image where known.
        reason: One of `transforms.schemas.REASONS`.
    """

    message: str
    row: int | None = None
    key: str = ""
    reason: str = "bad_annotation"


def stem(path: str) -> str:
    """Returns a file's name without folders (Windows' too) and extension: the key of its image."""
    return posixpath.splitext(posixpath.basename(path.replace("\\", "/")))[0]


def is_image(path: str) -> bool:
    """Tells whether a file is an image by its extension."""
    return path.lower().endswith(IMAGE_EXTENSIONS)
