"""Features of a TFRecord's examples that hold images, captions and keys: found by name and kind, and taken out."""

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from diptych.transforms.sources.archives.shard_file import IMAGE_MAGIC, metadata_text, to_text
from diptych.transforms.sources.base import ColumnNames
from diptych.transforms.sources.sharded.tf_example import Example, feature_values
from diptych.transforms.sources.text.encoding import decode

# Names in use, the first present wins: img2dataset's, TensorFlow's own data sets' and models', and plain words.
IMAGE_FEATURES = (
    "jpg",
    "image/encoded",
    "image",
    "png",
    "image_raw",
    "jpeg",
    "webp",
    "image/data",
    "image_bytes",
)
CAPTION_FEATURES = (
    "caption",
    "captions",
    "txt",
    "text",
    "image/caption",
    "captions/text",
    "image/captions",
    "caption/text",
    "caption_text",
    "sentences",
    "image/text",
)
KEY_FEATURES = (
    "key",
    "__key__",
    "image_id",
    "image/filename",
    "image/image_id",
    "image/id",
    "image/source_id",
    "id",
    "filename",
)
_FILE_NAME_FEATURES = frozenset({"image/filename", "filename"})
# One of several features with a caption each, such as `caption_0` or `image/caption/3`
_NUMBERED = re.compile(r"(?:image/)?(?:captions?|text|txt|sentences?)[/_]?(\d{1,4})")
_SIDES = (("image/height", "image/width"), ("height", "width"))
_START, _END = "<S>", "</S>"


class Image(NamedTuple):
    """The image of an example.

    Attributes:
        data: The encoded image; None where there is none.
        problem: Why there is none.
        num_others: Images beside it.
    """

    data: bytes | None
    problem: str = ""
    num_others: int = 0


class Texts(NamedTuple):
    """The captions of an example.

    Attributes:
        captions: Those that are more than blanks.
        counters: What was mended or left out, by name.
    """

    captions: list[str]
    counters: Mapping[str, int]


def image_of(example: Example, chosen: str | None) -> Image:
    """Returns the image in the chosen feature, or in the first with a usual name."""
    features = example.features
    names = (chosen,) if chosen else IMAGE_FEATURES
    kind = ""
    for name in names:
        if name not in features:
            continue
        kind, values = feature_values(features[name])
        if kind == "bytes_list" and values:
            return _image(values, example)
        kind = f"feature {name!r} holds {_described(kind, len(values))}"
    there = ", ".join(sorted([*features, *example.feature_lists])) or "none"
    problem = kind or f"no image feature ({', '.join(names)}) among {there}"
    if "error_message" in features:
        problem += f"; its error_message: {feature_text(features['error_message'])}"
    return Image(None, problem)


def captions_of(example: Example, chosen: str | None) -> Texts:
    """Returns the captions in the chosen feature, or in those with usual names."""
    counters: dict[str, int] = {}
    if chosen and chosen not in example.features and chosen not in example.feature_lists:
        counters["rows_without_caption_column"] = 1
        return Texts([], counters)
    texts: list[str] = []
    for name in [chosen] if chosen else _caption_names(example):
        if name in example.features:
            texts += _decoded(example.features[name], counters)
        else:
            texts += _sequence(example.feature_lists[name].feature, counters)
    return Texts([text for text in texts if text.strip()], counters)


def key_of(example: Example, chosen: str | None) -> str:
    """Returns the key, empty where there is none. A file name loses its extension."""
    for name in (chosen,) if chosen else KEY_FEATURES:
        # Looking up a feature that is not there would make one.
        if name in example.features and (text := feature_text(example.features[name])):
            return posixpath.splitext(text)[0] if name in _FILE_NAME_FEATURES else text
    return ""


def feature_text(feature: Any) -> str | None:
    """Returns the value of a feature as text, several as JSON."""
    kind, found = feature_values(feature)
    values = [to_text(value) for value in found] if kind == "bytes_list" else list(found)
    return metadata_text(values[0] if len(values) == 1 else values or None)


def unused_texts(examples: Sequence[Example]) -> set[str]:
    """Returns the features with text that are neither keys nor images, where no example has a caption."""
    if any(captions_of(example, None).captions for example in examples):
        return set()
    texts = {name for example in examples for name, feature in example.features.items() if _is_text(feature)}
    return texts - {*KEY_FEATURES, *IMAGE_FEATURES}


def _is_text(feature: Any) -> bool:
    """Tells whether a feature holds words: texts with a blank in them."""
    kind, values = feature_values(feature)
    if kind != "bytes_list" or not values or values[0].startswith(IMAGE_MAGIC):
        return False
    try:
        return " " in bytes(values[0]).decode()
    except UnicodeDecodeError:
        return False


def missing_features(
    examples: Sequence[Example], columns: ColumnNames, metadata: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Yields flag and name of each chosen feature that no example has."""
    features = {name for example in examples for name in example.features}
    lists = {name for example in examples for name in example.feature_lists}
    for flag, name, names in (
        ("--image_column", columns.image, features),
        ("--caption_column", columns.caption, features | lists),
        ("--key_column", columns.key, features),
        *(("--metadata_columns", name, features) for name in metadata),
    ):
        if name is not None and name not in names:
            yield flag, name


def _caption_names(example: Example) -> list[str]:
    for name in CAPTION_FEATURES:
        if name in example.feature_lists or (
            name in example.features and feature_values(example.features[name])[0] in ("bytes_list", "")
        ):
            return [name]
    numbered = ((name, _NUMBERED.fullmatch(name)) for name in example.features)
    return sorted((name for name, match in numbered if match), key=lambda name: (len(name), name))


def _decoded(feature: Any, counters: dict[str, int]) -> list[str]:
    kind, values = feature_values(feature)
    if kind != "bytes_list":
        if values:
            counters["captions_not_text"] = counters.get("captions_not_text", 0) + len(values)
        return []
    texts = []
    for value in values:
        text, is_utf = decode(value)
        if not is_utf:
            counters["captions_not_utf8"] = counters.get("captions_not_utf8", 0) + 1
        texts.append(text)
    return texts


def _sequence(steps: Any, counters: dict[str, int]) -> list[str]:
    """Returns the captions of a feature list: one whose steps are its words, or one a step."""
    texts = [text for step in steps for text in _decoded(step, counters)]
    are_words = len(texts) > 2 and not any(" " in text.strip() for text in texts)
    if are_words or texts[:1] == [_START]:
        return [" ".join(text for text in texts if text not in (_START, _END))]
    return texts


def _image(values: Any, example: Example) -> Image:
    data = values[0]
    if not data.startswith(IMAGE_MAGIC):
        for names in _SIDES:
            sides = [feature_values(example.features[name])[1] for name in names if name in example.features]
            if len(sides) == 2 and all(len(side) == 1 for side in sides):
                height, width = sides[0][0], sides[1][0]
                if len(data) in (height * width, 3 * height * width, 4 * height * width) and data:
                    size = f"{width} x {height}"
                    return Image(
                        None, f"the image is {len(data)} raw pixels ({size}); expected an encoded image"
                    )
    return Image(data, num_others=len(values) - 1)


def _described(kind: str, number: int) -> str:
    kinds = {"float_list": "numbers", "int64_list": "whole numbers"}
    return f"{number} {kinds[kind]}; expected the bytes of an image" if kind in kinds else "nothing"
