"""What the parsers of annotations give: images, captions, and what cannot be used, as the file has them."""

import errno
import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import fsspec

IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".jpe", ".jif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif", ".jp2", ".j2k", ".jpx", ".jxl"),
)
# Of files with other names the first bytes are looked at, but for those that are something else for sure
_OTHER_EXTENSIONS = frozenset(
    re.findall(
        r"\w+",
        "txt text caption json jsonl ndjson csv tsv md rst html htm xml yaml yml toml ini cfg log py ipynb sh js css "
        "pdf doc docx xls xlsx parquet arrow feather tfrecord tfrecords tfrec tar gz bz2 xz zst lz4 zip 7z rar npy npz "
        "pkl pt pth bin safetensors onnx h5 hdf5 db sqlite lock tmp part crc md5 sha256 mp3 wav mp4 mov avi mkv webm",
    )
)
_IMAGE_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|BM.{12}|II\*\0|MM\0\*|RIFF....WEBP|....ftyp(?:avi[fs]|hei[cfx]|mif1|msf1)"
    rb"|\0\0\0\x0c(?:jP  |JXL )|\xff\x4f\xff\x51|\xff\x0a",
    re.S,
)

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
        redecoded: Whether it was in another encoding than UTF-8.
    """

    ref: Ref
    ordinal: int
    text: str
    repaired: bool = False
    redecoded: bool = False


class Fields(NamedTuple):
    """What a line of captions says of its image beside them; the first line of an image counts.

    Attributes:
        ref: The image.
        metadata: Values of the metadata columns.
        key: The image's key; None for one made of its name.
    """

    ref: str
    metadata: Sequence[str | None]
    key: str | None


class BadEntry(NamedTuple):
    """A part of an annotation that cannot be used: a reject.

    Attributes:
        message: What was found, and where.
        row: Ordinal of the image, where it is an image's entry.
        key: Identity of the image where known.
        reason: One of `diptych.transforms.schemas.REASONS`.
    """

    message: str
    row: int | None = None
    key: str = ""
    reason: str = "bad_annotation"


class Noticed(NamedTuple):
    """What was noticed of a file beside its parts.

    Attributes:
        counters: What was mended or left out, by name.
        note: A sentence that the user is told; empty where there is none.
    """

    counters: Mapping[str, int] = {}
    note: str = ""


Part = Image | Caption | Fields | BadEntry | Noticed
"""What a parser of annotations yields."""


def stem(path: str) -> str:
    """Returns a file's name without folders (Windows' too) and extension: the key of its image."""
    return posixpath.splitext(posixpath.basename(path.replace("\\", "/")))[0]


def key_of(entry: Mapping[str, Any], field: str) -> str | None:
    """Returns the key that a field of an image's entry is, a text or a whole number; None where it is neither."""
    value = entry.get(field)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return str(value) or None


def is_image(path: str) -> bool:
    """Tells whether a file is an image by its extension."""
    return path.lower().endswith(IMAGE_EXTENSIONS)


def is_leftover(path: str) -> bool:
    """Tells whether a file is what a system or an editor leaves beside others: hidden folders, macOS's `._x.jpg`."""
    *folders, name = path.split("/")
    return name.startswith("._") or any(part.startswith(".") or part == "__MACOSX" for part in folders)


def may_be_image(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    """Tells whether a file whose name says nothing is an image, by its first bytes: one small read."""
    extension = posixpath.splitext(path)[1].lower().removeprefix(".")
    if extension in _OTHER_EXTENSIONS:
        return False
    try:
        return _IMAGE_MAGIC.match(fs.cat_file(path, start=0, end=32)) is not None
    except (PermissionError, IsADirectoryError, FileNotFoundError):
        return False
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False  # a link to itself
