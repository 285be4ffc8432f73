"""Karpathy's splits: `dataset_{coco,flickr8k,flickr30k}.json` (Karpathy and Fei-Fei 2015)."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import IO, Any

from transforms import storage
from transforms.errors import InputError, OptionError
from transforms.sources.annotations import AnnotationSource, json_items, json_keys, metadata_values
from transforms.sources.flickr30k import FOLDERS
from transforms.sources.parts import Bad, Caption, Image

_COCO_FOLDERS = ("train2014", "val2014")


@dataclasses.dataclass(frozen=True)
class KarpathySource(AnnotationSource):
    """Karpathy's JSON. A row is an image of `images` in the splits asked for; `row` is its ordinal among all.

    Attributes:
        split: Splits to take, with commas between them (`train,restval`); None for all.
    """

    split: str | None = None

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

    def parts(self, url: str, file: IO[bytes]) -> Iterator[Image | Caption | Bad]:
        """Parses `images`, with the captions in their `sentences`."""
        wanted = None if self.split is None else {name.strip() for name in self.split.split(",")}
        num_images = num_bad = 0
        splits: set[str] = set()
        for row, (_, entry) in enumerate(json_items(url, file, "images.item")):
            num_images += 1
            if (
                not isinstance(entry, dict)
                or not isinstance(entry.get("filename"), str)
                or not entry["filename"]
            ):
                num_bad += 1
                yield Bad(f"image {row} has no filename", row)
                continue
            splits.add(str(entry.get("split")))
            yield from self._image(entry, row, wanted is None or entry.get("split") in wanted)
        if num_images == num_bad and (num_images or "images" not in json_keys(file)):
            raise InputError(
                f"{url} is not one of Karpathy's data sets: expected an object with images (filename, split, "
                "sentences), as in dataset_coco.json."
            )
        if wanted is not None and not wanted <= splits:
            raise OptionError(
                f"--split {self.split}: {url} has no split {', '.join(sorted(wanted - splits))}. "
                f"It has {', '.join(sorted(splits))}."
            )

    def _image(self, entry: dict[str, Any], row: int, wanted: bool) -> Iterator[Image | Caption | Bad]:
        path = "/".join(part for part in (entry.get("filepath"), entry["filename"]) if isinstance(part, str))
        yield Image(row, row, path.lstrip("/"), metadata_values(entry, self.metadata_columns), wanted)
        sentences = entry.get("sentences")
        for ordinal, sentence in enumerate(sentences if wanted and isinstance(sentences, list) else ()):
            text = _text(sentence)
            if text is None:
                yield Bad(f"sentence {ordinal} of image {row}, {path}, has neither raw text nor tokens")
            else:
                yield Caption(row, ordinal, text)


def _text(sentence: Any) -> str | None:
    if not isinstance(sentence, dict):
        return None
    raw, tokens = sentence.get("raw"), sentence.get("tokens")
    if isinstance(raw, str):
        return raw
    return " ".join(map(str, tokens)) if isinstance(tokens, list) else None
