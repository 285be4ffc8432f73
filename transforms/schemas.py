"""Every schema and every reject reason, declared in one place and checked at the boundaries."""

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

MAX_IMAGE_BYTES = 64 << 20
"""The largest file that is read as an image: a larger one costs its row, not the memory of the job."""

REASONS = {
    "read": {
        "missing_image": "the annotation or sample names an image that is not there",
        "unknown_image": "captions refer to an image that the annotation does not list",
        "duplicate_key": "a key that occurred before",
        "bad_annotation": "an annotation row that cannot be parsed",
        "record_corrupt": "a record whose checksum or encoding is wrong",
        "shard_truncated": "a shard that ends in the middle of a record",
        "shard_corrupt": "a shard that cannot be read on from some place",
    },
    "text": {"no_caption": "no caption is left after cleaning, and one is required"},
    "image": {
        "empty": "no bytes at all",
        "not_an_image": "the bytes are something else (a pointer file, HTML, text)",
        "truncated": "the image ends before its last pixel",
        "corrupt": "the image is damaged",
        "unsupported": "an image of a kind that cannot be turned into 8-bit RGB",
        "too_many_pixels": "more pixels than --max_pixels",
        "too_many_bytes": "more bytes than --max_image_bytes",
        "too_small": "a side shorter than --min_side_px",
        "aspect_ratio": "longer to shorter side above --max_aspect_ratio",
    },
    "embed": {
        "model_error": "the model fails on this row",
        "no_caption": "no caption is left after cleaning",
    },
    "caption": {"model_error": "the model fails on this row"},
    "generate": {
        "model_error": "the model fails on this row",
        "no_caption": "no prompt is left after cleaning",
        "no_known_word": "the model's text vectors know no word of the prompt",
        "flagged": "the model's own safety checker blanked the image",
        "low_match": "the image does not show its prompt, by --min_match",
    },
}

REJECTS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("bytes", pa.binary()),
    ]
)

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


_RAW_FIELDS = [
    pa.field("key", pa.string(), nullable=False),
    pa.field("image", pa.binary(), nullable=False),
    pa.field("path", pa.string(), nullable=False),
    pa.field("captions", pa.list_(pa.string()), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    pa.field("row", pa.int64(), nullable=False),
]
RAW_COLUMNS = tuple(field.name for field in _RAW_FIELDS)

RAW_TEXT = pa.schema([field for field in _RAW_FIELDS if field.name in ("key", "captions", "row")])
"""Rows as they come from a source for a job that needs no images."""

TEXTS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption_index", pa.int32(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
    ]
)
"""A row per caption: what a text model gets."""


PROMPTS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("prompt_index", pa.int32(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("seed", pa.uint64(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
    ]
)
"""A row per image that is to be made: what a model that makes images gets."""


def raw_schema(metadata_columns: Sequence[str] = ()) -> pa.Schema:
    """Returns the schema of rows as they come from a source: encoded images, raw captions."""
    return pa.schema([*_RAW_FIELDS, *(pa.field(name, pa.string()) for name in metadata_columns)])


def images_schema(
    metadata_columns: Sequence[str] = (), size_px: int = 224, pixels: str | None = None
) -> pa.Schema:
    """Returns the schema of `OUT/images`.

    Args:
        metadata_columns: Names of the source's own columns to carry, as strings.
        size_px: Side of the images.
        pixels: Type of the tensor column, `uint8` or `float32`, or None for no such column.
    """
    fields = [
        pa.field("key", pa.string()),
        pa.field("image", IMAGE),
        pa.field("captions", pa.list_(pa.string())),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("sha256", pa.string()),
        pa.field("phash", pa.uint64()),
        pa.field("source", pa.string()),
        pa.field("row", pa.int64()),
        *(pa.field(name, pa.string()) for name in metadata_columns),
    ]
    if pixels:
        dtype = {"uint8": pa.uint8(), "float32": pa.float32()}[pixels]
        fields.append(pa.field("pixels", pa.fixed_shape_tensor(dtype, [3, size_px, size_px])))
    return pa.schema(fields)


def embeddings_schema(dim: int, flags_unknown: bool = False) -> pa.Schema:
    """Returns the schema of `OUT/embeddings`.

    Args:
        dim: Length of the vectors.
        flags_unknown: Whether there is a column that flags captions of which the model knows no word.
    """
    fields = [
        pa.field("key", pa.string()),
        pa.field("caption_index", pa.int32()),
        pa.field("caption", pa.string()),
        pa.field("embedding", pa.list_(pa.float32(), dim)),
    ]
    if flags_unknown:
        fields.append(pa.field("no_known_word", pa.bool_()))
    return pa.schema(fields)


def captions_schema(feature_dim: int | None = None) -> pa.Schema:
    """Returns the schema of `OUT/captions`.

    Args:
        feature_dim: Length of the encoder's pooled vectors, or None for no such column.
    """
    fields = [
        pa.field("key", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("candidates", pa.list_(pa.string())),
        pa.field("scores", pa.list_(pa.float32())),
        pa.field("references", pa.list_(pa.string())),
    ]
    if feature_dim is not None:
        fields.append(pa.field("features", pa.list_(pa.float32(), feature_dim)))
    return pa.schema(fields)


def generated_schema(with_match: bool = False) -> pa.Schema:
    """Returns the schema of `OUT/generated`.

    Args:
        with_match: Whether there are columns with what a captioner says of the image, and how near that is to the
            prompt.
    """
    fields = [
        pa.field("key", pa.string()),
        pa.field("prompt_index", pa.int32()),
        pa.field("sample", pa.int32()),
        pa.field("prompt", pa.string()),
        pa.field("image", IMAGE),
        pa.field("seed", pa.uint64()),
    ]
    if with_match:
        fields += [pa.field("caption", pa.string()), pa.field("match", pa.float32())]
    return pa.schema(fields)


def huggingface_info(schema: pa.Schema) -> str:
    """Returns the value of the schema metadata key `huggingface`, by which `datasets` knows pictures from structs."""
    known = {
        field.name: _feature(field.type)
        for field in schema
        if not isinstance(field.type, pa.BaseExtensionType)
    }
    return json.dumps({"info": {"features": known}})


def _feature(dtype: pa.DataType) -> Any:
    if dtype == IMAGE:
        return {"_type": "Image"}
    if pa.types.is_fixed_size_list(dtype):
        return {"feature": _feature(dtype.value_type), "length": dtype.list_size, "_type": "List"}
    if pa.types.is_list(dtype):
        return {"feature": _feature(dtype.value_type), "_type": "List"}
    return {"dtype": {"float": "float32"}.get(str(dtype), str(dtype)), "_type": "Value"}
