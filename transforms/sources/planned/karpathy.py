"""Karpathy's splits: `dataset_{coco,flickr8k,flickr30k}.json` (Karpathy and Fei-Fei 2015)."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, ClassVar

from diptych.transforms import storage
from diptych.transforms.errors import InputError, OptionError
from diptych.transforms.sources.planned.annotations import (
    AnnotationSource,
    metadata_values,
    not_an_object,
    show,
)
from diptych.transforms.sources.planned.entries import BadEntry, Caption, Image, key_of
from diptych.transforms.sources.planned.flickr30k import FOLDERS
from diptych.transforms.sources.text.json_stream import JsonEntries

_COCO_FOLDERS = ("train2014", "val2014")


@dataclasses.dataclass(frozen=True)
class KarpathySource(AnnotationSource):
    """Karpathy's JSON. A row is an image of `images` in the splits asked for; `row` is its ordinal among all.

    `columns` names fields: `image` of an image's entry with its whole path (`filepath` and `filename`), `key` of an
    image's entry with its key (None makes it of the file's name), `caption` of a sentence, a text or a list of words
    (`raw`, else `tokens`).

    Attributes:
        split: Splits to take, with commas between them (`train,restval`); None for all.
    """

    format: ClassVar[str] = "karpathy"

    split: str | None = None

    column_flags: ClassVar[frozenset[str]] = frozenset(
        {"image_column", "caption_column", "key_column", "metadata_columns"}
    )

    def folders(self, name: str) -> Sequence[str]:
        """Returns the places of the three data sets' own layouts."""
        coco = [above + folder for above in ("", "../", "images/", "../images/") for folder in _COCO_FOLDERS]
        return [*coco, *FOLDERS]

    def find_images(self, annotation: str) -> str:
        """Returns the image folder; COCO's is the one above `val2014`, which `filepath` names."""
        found = super().find_images(annotation)
        above, _, name = found.rpartition("/")
        given = self.images is not None and storage.locate(self.images)[1] == storage.locate(found)[1]
        return above if name in _COCO_FOLDERS and not given else found

    def options(self) -> dict[str, object]:
        """Returns the options that decide the plan."""
        return {**super().options(), "split": self.split}

    def parts(self, url: str, file: IO[bytes]) -> Iterator[Image | Caption | BadEntry]:
        """Parses `images`, with the captions in their `sentences`."""
        wanted = None if self.split is None else {name.strip() for name in self.split.split(",")} - {""}
        entries = JsonEntries(url, file)
        splits: set[str] = set()
        fields: dict[str, set[str]] = {"images": set(), "sentences": set()}
        row = -1
        for row, (_, entry) in enumerate(entries.read("images")):
            if not isinstance(entry, dict):
                yield not_an_object("image", row, entry, row)
                continue
            split = entry.get("split")
            splits.add(split if isinstance(split, str) else "(none)")
            fields["images"] |= entry.keys()
            for sentence in entry["sentences"] if isinstance(entry.get("sentences"), list) else ():
                fields["sentences"] |= sentence.keys() if isinstance(sentence, dict) else set()
            yield from self._image(entry, row, wanted is None or (isinstance(split, str) and split in wanted))
        self._check_fields(url, fields)
        if "images" not in entries.fields or (row >= 0 and self._image_field not in fields["images"]):
            raise InputError(
                f"{url} is not one of Karpathy's data sets: expected an object with images (filename, split, "
                f"sentences), as in dataset_coco.json; it is {entries.describe()}."
            )
        if wanted is not None and not wanted <= splits:
            raise OptionError(
                f"--split {self.split}: {url} has no split {', '.join(sorted(wanted - splits))}. "
                f"It has {', '.join(sorted(splits)) or 'no images at all'}."
            )

    @property
    def _image_field(self) -> str:
        return self.columns.image or "filename"

    def _check_fields(self, url: str, fields: Mapping[str, set[str]]) -> None:
        wanted = [
            ("image_column", self.columns.image, "images"),
            ("caption_column", self.columns.caption, "sentences"),
            ("key_column", self.columns.key, "images"),
            *(("metadata_columns", name, "images") for name in self.metadata_columns),
        ]
        for flag, field, place in wanted:
            if field and fields[place] and field not in fields[place]:
                raise OptionError(
                    f"--{flag} {field}: no entry of {place} in {url} has such a field. "
                    f"They have {', '.join(sorted(fields[place]))}: name one of those."
                )

    def _image(self, entry: dict[str, Any], row: int, wanted: bool) -> Iterator[Image | Caption | BadEntry]:
        name = entry.get(self._image_field)
        if not isinstance(name, str) or not name:
            yield BadEntry(f"image {row} has no {self._image_field}, but {show(name)}", row)
            return
        folder = None if self.columns.image else entry.get("filepath")
        path = "/".join(part for part in (folder, name) if isinstance(part, str)).lstrip("/")
        key = key_of(entry, self.columns.key) if self.columns.key else None
        if self.columns.key and key is None:
            value = show(entry.get(self.columns.key))
            yield BadEntry(
                f"image {row}, {path}, needs a {self.columns.key} for its key; it has {value}", row
            )
            return
        yield Image(row, row, path, metadata_values(entry, self.metadata_columns), wanted, key)
        sentences = entry.get("sentences") if wanted else None
        if sentences is not None and not isinstance(sentences, list):
            yield BadEntry(f"image {row}, {path}, has sentences that are no list: {show(sentences)}")
            return
        for ordinal, sentence in enumerate(sentences or ()):
            text = self._text(sentence)
            if text is None:
                lacks = (
                    f"no {self.columns.caption}" if self.columns.caption else "neither raw text nor tokens"
                )
                yield BadEntry(f"sentence {ordinal} of image {row}, {path}, has {lacks}: {show(sentence)}")
            else:
                yield Caption(row, ordinal, text)

    def _text(self, sentence: Any) -> str | None:
        """Returns a sentence's text; its tokens with spaces between them where it has none."""
        if not isinstance(sentence, dict):
            return None
        text, tokens = sentence.get(self.columns.caption or "raw"), sentence.get("tokens")
        if self.columns.caption:
            tokens = text
        if isinstance(text, str):
            return text
        return " ".join(map(str, tokens)) if isinstance(tokens, list) else None
