"""What people said of the images: an annotation's captions by key, to score a captioner against. No image is read."""

from typing import NamedTuple

from transforms.errors import InputError
from transforms.sources import SourceOptions, open_source
from transforms.sources.annotations import AnnotationSource
from transforms.sources.coco import CocoSource
from transforms.sources.parts import Caption, Image, Ref, stem
from transforms.storage import input_errors, locate

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
    it does where images are prepared.

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
    references = References({}, {}, 0)
    seen: set[str] = set()
    for annotation in source.annotations:
        keys, texts, num_bad = _read(source, annotation)
        for ref, key in keys.items():
            said = [text for text in texts.get(ref, ()) if text.strip()]
            if key not in seen and said:
                references.captions[key] = said
            if key not in seen and isinstance(source, CocoSource):
                references.image_ids[key] = ref
            seen.add(key)
        references = references._replace(num_bad=references.num_bad + num_bad)
    return references


def _read(source: AnnotationSource, url: str) -> tuple[dict[Ref, str], dict[Ref, list[str]], int]:
    """Returns the keys and the captions by what the annotation calls an image, and a count of its bad parts."""
    texts: dict[Ref, list[str]] = {}
    keys: dict[Ref, str] = {}
    num_bad = 0
    with input_errors(url):
        fs, path = locate(url)
        with fs.open(path, "rb") as file:
            for part in source.parts(url, file):
                if isinstance(part, Caption):
                    texts.setdefault(part.ref, []).append(part.text)
                elif not isinstance(part, Image):
                    num_bad += 1
                elif part.wanted:
                    keys.setdefault(part.ref, stem(part.path))
    if source.captions_name_images:
        keys = {ref: stem(str(ref)) for ref in texts}
    return keys, texts, num_bad
