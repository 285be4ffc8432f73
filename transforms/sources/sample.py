"""Samples of a WebDataset shard: members of one key, and what they are to a row."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from diptych.transforms.schemas import MAX_IMAGE_BYTES
from diptych.transforms.sources.archives.links import Link, LinkError
from diptych.transforms.sources.archives.shard_file import encodable
from diptych.transforms.sources.archives.tar import TarReader
from diptych.transforms.sources.archives.tar_index import SampleParts, TarIndex
from diptych.transforms.sources.base import MAX_TEXT_BYTES, ColumnNames
from diptych.transforms.sources.planned.entries import IMAGE_EXTENSIONS
from diptych.transforms.sources.text.encoding import decode
from diptych.transforms.sources.text.json_stream import parse_json

_IMAGES = frozenset(extension[1:] for extension in IMAGE_EXTENSIONS)
_CAPTIONS = ("txt", "text", "caption")
_TEXTS = frozenset({"json", *_CAPTIONS})
# The library's own rule for members that are about the shard, such as `__index__`.
_ABOUT_SHARD = re.compile(r"__[^/]*__($|/)|__MACOSX/")


class SampleTexts(NamedTuple):
    """What the text members of a sample say.

    Attributes:
        captions: The captions, as they stand.
        fields: The object in the `.json` member; empty where there is none.
        counters: What had to be mended or left out, by name.
    """

    captions: list[str]
    fields: Mapping[str, Any]
    counters: Mapping[str, int]


class Sample:
    """The members of one sample that have been seen so far.

    Attributes:
        key: What the members' names begin with.
        members: The members by extension; only texts have their bytes.
        image: The image; None as long as there is none.
        image_extension: The image's extension; empty as long as there is none.
        other_images: Extensions of images that are not the sample's image.
        loss: Reason and message where a member cannot be read.
    """

    __slots__ = ("_columns", "image", "image_extension", "key", "loss", "members", "other_images")

    def __init__(self, key: str, columns: ColumnNames) -> None:
        self.key = key
        self.members: dict[str, bytes] = {}
        self.image: bytes | None = None
        self.image_extension = ""
        self.other_images: list[str] = []
        self.loss: tuple[str, str] | None = None
        self._columns = columns

    def add(self, extension: str, tar: TarReader, index: TarIndex, needed: bool) -> None:
        """Adds the reader's current member; of an image that is not needed, only that it is there."""
        self.members[extension] = b""
        if is_image(extension, self._columns) and not self.image_extension:
            self.image_extension = extension
            self.image = self._read(extension, tar, index, MAX_IMAGE_BYTES, needed)
        elif max_bytes := text_bytes(extension, self._columns):
            self.members[extension] = self._read(extension, tar, index, max_bytes, True) or b""
        elif extension.rpartition(".")[2] in _IMAGES:
            self.other_images.append(extension)

    def join(self, parts: SampleParts, index: TarIndex) -> None:
        """Adds the text members that lie elsewhere in the tar."""
        for extension in parts.extensions:
            if extension in self.members:
                continue
            text = parts.texts.get(extension, b"")
            if extension not in parts.texts and text_bytes(extension, self._columns):
                self._lose(extension, "record_corrupt", "cannot be read, or is too large")
            try:
                data = index.follow(text, MAX_TEXT_BYTES) if isinstance(text, Link) else text
            except LinkError as error:
                self._lose(extension, error.reason, f"is {error}")
                data = b""
            self.members[extension] = data
            if extension.rpartition(".")[2] in _IMAGES:
                self.other_images.append(extension)

    def texts(self) -> SampleTexts:
        """Returns captions, fields and counters of the text members."""
        counters: dict[str, int] = {}
        fields = _json_object(self.members["json"], counters) if "json" in self.members else {}
        if self._columns.caption is not None:
            captions = self._chosen_captions(self._columns.caption, fields, counters)
        else:
            captions = self._usual_captions(fields, counters)
        return SampleTexts(captions, fields, counters)

    def _read(
        self, extension: str, tar: TarReader, index: TarIndex, max_bytes: int, needed: bool
    ) -> bytes | None:
        if tar.link is not None:
            try:
                return index.follow(tar.link, max_bytes, needed)
            except LinkError as error:
                self._lose(extension, error.reason, f"is {error}")
        elif tar.unreadable:
            self._lose(extension, "record_corrupt", tar.unreadable)
        elif tar.size > max_bytes:
            self._lose(extension, "record_corrupt", f"has {tar.size} bytes; at most {max_bytes} are read")
        else:
            return tar.read() if needed else b""
        return None

    def _lose(self, extension: str, reason: str, message: str) -> None:
        self.loss = self.loss or (reason, f"its {extension} {message}")

    def _chosen_captions(self, name: str, fields: Mapping[str, Any], counters: dict[str, int]) -> list[str]:
        if name in fields:
            return _field_captions(fields[name], counters)
        if name.lower() in self.members:
            return _lines(_decode(self.members[name.lower()], counters))
        _count(counters, "rows_without_caption_column")
        return []

    def _usual_captions(self, fields: Mapping[str, Any], counters: dict[str, int]) -> list[str]:
        names = [name for name in _CAPTIONS if name in self.members]
        lines = [line for name in names for line in _lines(_decode(self.members[name], counters))]
        captions = _field_captions(fields.get("captions") or fields.get("caption"), counters)
        if captions and lines:
            # img2dataset writes the caption twice, as a text and as a field.
            joined = "\n".join(captions)
            if any(line.strip() not in joined for line in lines):
                _count(counters, "texts_passed_over")
        for extension in self.members:
            if extension not in _TEXTS and extension.rpartition(".")[2] in _TEXTS:
                _count(counters, "texts_passed_over")
        return captions or lines


def split_name(name: str) -> tuple[str, str]:
    """Returns key and extension of a member; an empty key where it belongs to no sample.

    webdataset's rule: the key ends at the first dot of the last path component. Hidden files (`._x` of macOS)
    have no key by it.
    """
    name = name.removeprefix("./")
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    if not stem or not extension or (name.startswith("__") and _ABOUT_SHARD.match(name)):
        return "", ""
    return folder + slash + stem, extension.lower()


def is_image(extension: str, columns: ColumnNames) -> bool:
    """Tells whether a member may be its sample's image: it is the one chosen, or has an image's extension alone."""
    return extension in _IMAGES if columns.image is None else extension == columns.image.lower()


def text_bytes(extension: str, columns: ColumnNames) -> int:
    """Returns the most bytes that are read of a member of text; 0 of any other."""
    is_text = extension in _TEXTS or (columns.caption is not None and extension == columns.caption.lower())
    return MAX_TEXT_BYTES if is_text else 0


def _count(counters: dict[str, int], name: str, number: int = 1) -> None:
    counters[name] = counters.get(name, 0) + number


def _decode(data: bytes, counters: dict[str, int]) -> str:
    text, is_utf = decode(data)
    if not is_utf:
        _count(counters, "captions_not_utf8")
    return text


def _json_object(data: bytes, counters: dict[str, int]) -> dict[str, Any]:
    try:
        value = parse_json(_decode(data, counters))
    except (ValueError, RecursionError):
        _count(counters, "broken_json")
        return {}
    if isinstance(value, dict):
        return value
    _count(counters, "json_without_fields")
    return {}


def _field_captions(value: Any, counters: dict[str, int]) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if num_others := sum(caption is not None and not isinstance(caption, str) for caption in values):
        _count(counters, "captions_not_text", num_others)
    return [encodable(caption) for caption in values if isinstance(caption, str) and caption.strip()]


def _lines(text: str) -> list[str]:
    # Only line ends part captions: str.splitlines would also cut at form feeds and Unicode separators.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line for line in lines if line.strip()]
