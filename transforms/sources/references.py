"""What people said of the images: an annotation's captions by key, to score a captioner against. No image is read."""

from typing import NamedTuple

from diptych.transforms.errors import InputError
from diptych.transforms.sources.open import SourceOptions, open_source
from diptych.transforms.sources.planned.annotations import AnnotationSource
from diptych.transforms.sources.planned.coco import CocoSource
from diptych.transforms.sources.planned.entries import Ref

FORMATS = ("coco", "flickr30k", "karpathy")


class References(NamedTuple):
    """The captions of an annotation.

    Attributes:
        captions: Of each image by its key, which is the one that every job gives it; as they stand in the file.
        image_ids: COCO's id of each image that the annotation lists, by key; empty for other formats.
        num_bad: Parts of the annotation that cannot be used.
    """

    captions: dict[str, list[str]]
    image_ids: dict[str, Ref]
    num_bad: int


def read_references(url: str, format: str = "auto", split: str | None = None) -> References:
    """Reads the captions of an annotation: COCO's, Karpathy's, or a file of lines as Flickr30k's.

    An image without captions has no entry in `captions`. Of two images with one key the first counts, as
    it does where images are prepared; entries of one file are one, and ids that differ in type alone are the same.

    Args:
        url: The file, a folder with it, or a glob.
        format: One of `FORMATS`, or `auto`.
        split: Splits of a Karpathy file, separated by commas; None reads all.

    Raises:
        InputError: It is not there, or no annotation.
        OptionError: Its format cannot be told, or it has no such split.
    """
    source = open_source([url], format, SourceOptions(split=split))
    if not isinstance(source, AnnotationSource):
        raise InputError(
            f"--references {url} is no annotation that can be told. Expected captions_*.json of COCO, dataset_*.json "
            "of Karpathy, or a token or csv file of Flickr's: name the file, or its format with --format."
        )
    references, seen = References({}, {}, 0), set[str]()
    for annotation in source.annotations:
        with source.open_plan_builder(annotation, None) as draft:
            refs = dict(draft.refs()) if isinstance(source, CocoSource) else {}
            keys: set[str] = set()
            for entry in draft.entries():
                captions = [text for text in entry.captions if text.strip()]
                if entry.key not in seen and entry.reason is None and captions:
                    references.captions[entry.key] = captions
                if entry.reason is None:
                    keys.add(entry.key)
                references = references._replace(
                    num_bad=references.num_bad + (entry.reason == "bad_annotation")
                )
        references.image_ids.update({key: ref for key, ref in refs.items() if key not in seen})
        seen |= keys
    return references
