"""COCO captions: `captions_*.json` with a folder of images (Lin et al. 2014; Chen et al. 2015)."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import IO, Any, TypeGuard

from transforms.errors import InputError
from transforms.sources.annotations import AnnotationSource, json_items, json_keys, metadata_values
from transforms.sources.parts import Bad, Caption, Image, Ref

_ENOUGH_TO_TELL = 1000


@dataclasses.dataclass(frozen=True)
class CocoSource(AnnotationSource):
    """COCO caption annotations. A row is an image of `images`, in that order."""

    def folders(self, name: str) -> Sequence[str]:
        """Returns the places that the name tells, `val2017` for `captions_val2017.json`, and `images`."""
        match = re.match(r"(?:captions|image_info)_(.+)\.json$", name)
        own = (
            [folder.format(match[1]) for folder in ("../{}", "../images/{}", "{}", "images/{}")]
            if match
            else []
        )
        return [*own, "../images", "images"]

    def parts(self, url: str, file: IO[bytes]) -> Iterator[Image | Caption | Bad]:
        """Parses `images` and `annotations`, whichever stands first."""
        num_images = num_captions = num_bad_images = num_bad_captions = 0
        for place, entry in json_items(url, file, "images.item", "annotations.item"):
            part: Image | Caption | Bad
            if place == "images.item":
                part = self._image(entry, num_images)
                num_images += 1
                num_bad_images += isinstance(part, Bad)
            else:
                part = _caption(entry, num_captions)
                num_captions += 1
                num_bad_captions += isinstance(part, Bad)
                if num_captions == num_bad_captions == _ENOUGH_TO_TELL:
                    break
            yield part
        if (num_captions and num_captions == num_bad_captions) or (
            num_images and num_images == num_bad_images
        ):
            raise _not_captions(url)
        if not num_images and not num_captions and "images" not in json_keys(file):
            raise _not_captions(url)

    def _image(self, entry: Any, row: int) -> Image | Bad:
        if not isinstance(entry, dict):
            return Bad(f"image {row} is not an object", row)
        ref, path = entry.get("id"), entry.get("file_name")
        if not _is_ref(ref) or not isinstance(path, str) or not path:
            return Bad(f"image {row} needs an id and a file_name; it has {ref!r} and {path!r}", row)
        return Image(row, ref, path, metadata_values(entry, self.metadata_columns))


def _caption(entry: Any, ordinal: int) -> Caption | Bad:
    if not isinstance(entry, dict):
        return Bad(f"annotation {ordinal} is not an object")
    ref, text = entry.get("image_id"), entry.get("caption")
    if not _is_ref(ref) or not isinstance(text, str):
        return Bad(f"annotation {ordinal} needs an image_id and a caption; it has {ref!r} and {text!r}")
    return Caption(ref, ordinal, text)


def _is_ref(value: object) -> TypeGuard[Ref]:
    return isinstance(value, int | float | str) and not isinstance(value, bool)


def _not_captions(url: str) -> InputError:
    return InputError(
        f"{url} is not a COCO caption annotation: expected an object with images (id, file_name) "
        "and annotations (image_id, caption). Use captions_*.json, not instances_*.json."
    )
