"""COCO captions: `captions_*.json` with a folder of images (Lin et al. 2014; Chen et al. 2015)."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import IO, Any, ClassVar

from diptych.transforms.errors import InputError, OptionError
from diptych.transforms.sources.planned.annotations import (
    AnnotationSource,
    is_ref,
    metadata_values,
    not_an_object,
    show,
)
from diptych.transforms.sources.planned.entries import BadEntry, Caption, Image, key_of
from diptych.transforms.sources.text.json_stream import JsonEntries

_ENOUGH_TO_TELL = 1000


@dataclasses.dataclass(frozen=True)
class CocoSource(AnnotationSource):
    """COCO caption annotations. A row is an image of `images`, in that order.

    `columns` names fields: `image` of an image's entry with its file (`file_name`), `key` of an image's entry with its
    key (None makes it of the file's name), `caption` of an annotation (`caption`).
    """

    format: ClassVar[str] = "coco"

    column_flags: ClassVar[frozenset[str]] = frozenset(
        {"image_column", "caption_column", "key_column", "metadata_columns"}
    )

    def folders(self, name: str) -> Sequence[str]:
        """Returns the places that the name tells, `val2017` for `captions_val2017.json`, and `images`."""
        match = re.match(r"(?:captions|image_info)_(.+)\.json(?:\.gz)?$", name)
        own = (
            [folder.format(match[1]) for folder in ("../{}", "../images/{}", "{}", "images/{}")]
            if match
            else []
        )
        return [*own, "../images", "images"]

    def parts(self, url: str, file: IO[bytes]) -> Iterator[Image | Caption | BadEntry]:
        """Parses `images` and `annotations`, whichever stands first."""
        entries = JsonEntries(url, file)
        images, captions = _Fields(), _Fields()
        for place, entry in entries.read("images", "annotations"):
            if place == "images":
                yield self._image(entry, images.add(entry))
            else:
                yield self._caption(entry, captions.add(entry))
                if captions.num_entries == _ENOUGH_TO_TELL and self._caption_field not in captions.names:
                    break
        self._check(url, entries, images, captions)

    @property
    def _image_field(self) -> str:
        return self.columns.image or "file_name"

    @property
    def _caption_field(self) -> str:
        return self.columns.caption or "caption"

    def _image(self, entry: Any, row: int) -> Image | BadEntry:
        if not isinstance(entry, dict):
            return not_an_object("image", row, entry, row)
        ref, path = entry.get("id"), entry.get(self._image_field)
        if not is_ref(ref) or not isinstance(path, str) or not path:
            return BadEntry(
                f"image {row} needs an id and a {self._image_field}; it has {show(ref)} and {show(path)}", row
            )
        key = key_of(entry, self.columns.key) if self.columns.key else None
        if self.columns.key and key is None:
            return BadEntry(
                f"image {row} needs a {self.columns.key} for its key; it has {show(entry.get(self.columns.key))}",
                row,
            )
        return Image(row, ref, path, metadata_values(entry, self.metadata_columns), key=key)

    def _caption(self, entry: Any, ordinal: int) -> Caption | BadEntry:
        if not isinstance(entry, dict):
            return not_an_object("annotation", ordinal, entry)
        ref, text = entry.get("image_id"), entry.get(self._caption_field)
        if not is_ref(ref) or not isinstance(text, str):
            return BadEntry(
                f"annotation {ordinal} needs an image_id and a {self._caption_field}; "
                f"it has {show(ref)} and {show(text)}"
            )
        return Caption(ref, ordinal, text)

    def _check(self, url: str, entries: JsonEntries, images: "_Fields", captions: "_Fields") -> None:
        """Checks that the file was an annotation at all.

        Raises:
            InputError: It was not.
            OptionError: It has no such field as the options name.
        """
        wanted = [
            ("image_column", self.columns.image, images),
            ("caption_column", self.columns.caption, captions),
            ("key_column", self.columns.key, images),
            *(("metadata_columns", name, images) for name in self.metadata_columns),
        ]
        for flag, field, fields in wanted:
            if field and fields.num_entries and field not in fields.names:
                raise OptionError(
                    f"--{flag} {field}: no entry of {'annotations' if fields is captions else 'images'} in {url} "
                    f"has such a field. They have {', '.join(fields.names) or 'none'}: name one of those."
                )
        is_captions = captions.names.keys() >= {"image_id", self._caption_field} or not captions.num_entries
        is_images = images.names.keys() >= {"id", self._image_field} or not images.num_entries
        if "images" not in entries.fields or not is_captions or not is_images:
            raise _not_captions(url, entries.describe(), self._hint(captions, is_captions))

    def _hint(self, captions: "_Fields", is_captions: bool) -> str:
        if is_captions or "image_id" not in captions.names:
            return ""
        return " Where another field of annotations holds the captions, name it with --caption_column."


class _Fields:
    """The fields that the entries of a list have.

    Attributes:
        num_entries: How many entries there were.
        names: The fields' names, in the order in which they come up.
    """

    def __init__(self) -> None:
        self.num_entries = 0
        self.names: dict[str, None] = {}

    def add(self, entry: Any) -> int:
        """Adds an entry; returns its ordinal."""
        if (
            isinstance(entry, dict)
            and not entry.keys() <= self.names.keys()
            and len(self.names) < _ENOUGH_TO_TELL
        ):
            self.names |= dict.fromkeys(map(str, entry))
        self.num_entries += 1
        return self.num_entries - 1


def _not_captions(url: str, description: str, hint: str) -> InputError:
    return InputError(
        f"{url} is not a COCO caption annotation: expected an object with images (id, file_name) "
        f"and annotations (image_id, caption); it is {description}. Use captions_*.json, not instances_*.json.{hint}"
    )
