"""Values of a Parquet batch: images, captions, keys and metadata as Python objects, whatever their layout."""

import base64
import binascii
import posixpath
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diptych.transforms.schemas import MAX_IMAGE_BYTES
from diptych.transforms.sources.archives.shard_file import to_text
from diptych.transforms.sources.base import MAX_TEXT_BYTES
from diptych.transforms.sources.sharded.columns import (
    CAPTION_FIELDS,
    FILE_NAME_COLUMNS,
    IMAGE_FIELDS,
    field_of,
    is_binary,
    is_list,
    is_string,
    plain,
)
from diptych.transforms.sources.text.encoding import decode

_DATA_URL = re.compile(r"data:[^,]{0,100};base64,", re.I)
_SHOWN_CHARS = 200
# Images of a larger batch become Python objects one after the other
_MAX_COPY_BYTES = 32 << 20
# What is shorter holds no image, though base64 might be what a path such as `train/cat` is
_MIN_BASE64_CHARS = 64


class Image(NamedTuple):
    """The image of a row.

    Attributes:
        data: The encoded image; None where there is none.
        path: Its path where the file says one.
        problem: Why there is none, where that shows.
        reason: What the row is rejected for without it.
        num_others: Images of the row beside it.
    """

    data: bytes | None
    path: str | None = None
    problem: str = ""
    reason: str = "missing_image"
    num_others: int = 0


class CaptionColumn(NamedTuple):
    """The captions of some rows.

    Attributes:
        texts: Those of each row that are more than blanks.
        num_not_utf8: How many of a row were in another encoding than UTF-8, 16 or 32, by the row's index.
        problems: Why those of a row are not read, by its index.
    """

    texts: list[list[str]]
    num_not_utf8: dict[int, int]
    problems: dict[int, str]


def validate(batch: pa.RecordBatch) -> None:
    """Checks that lists end inside their values: Arrow ends the process over those of a damaged page that do not.

    Raises:
        pyarrow.ArrowInvalid: One does not.
    """
    batch.validate()
    for array in batch.columns:
        _validate_views(array)


def images(batch: pa.RecordBatch, column: str | None) -> Iterator[Image]:
    """Yields the image of each row, made when it is asked for.

    Args:
        batch: Rows of the file.
        column: The image column; None where it was not read: all images are empty then.
    """
    if column is None:
        yield from [Image(b"")] * batch.num_rows
        return
    array = _storage(_column(batch, column))
    if is_list(array.type) and pa.types.is_struct(array.type.value_type):
        for row in array:
            yield _first_image([] if row.as_py() is None else row.values)
    else:
        yield from _images(array)


def keys(batch: pa.RecordBatch, column: str | None) -> list[str]:
    """Returns the key of each row, empty where it has none. A file name loses its extension.

    Bytes that are not UTF-8, as those of a UUID, become hexadecimal digits.
    """
    if column is None:
        return [""] * batch.num_rows
    array = _column(batch, column)
    if is_binary(plain(array.type)):
        texts = ["" if value is None else _key_text(value) for value in array.to_pylist()]
    else:
        texts = ["" if value is None else str(value) for value in values(array)]
    if column.lower() in FILE_NAME_COLUMNS:
        texts = [posixpath.splitext(text)[0] for text in texts]
    return texts


def captions(batch: pa.RecordBatch, column: str | None) -> CaptionColumn:
    """Returns the captions of each row."""
    if column is None:
        return CaptionColumn([[] for _ in range(batch.num_rows)], {}, {})
    array = _caption_array(_column(batch, column))
    problems = {}
    if _num_bytes(array) > MAX_TEXT_BYTES:
        sizes = {
            row: size
            for row in range(len(array))
            if (size := _num_bytes(array.slice(row, 1))) > MAX_TEXT_BYTES
        }
        problems = {
            row: f"its captions have {size:,} bytes; at most {MAX_TEXT_BYTES:,} are read"
            for row, size in sizes.items()
        }
    if problems:
        rows = [[] if row in problems else _objects(array.slice(row, 1))[0] for row in range(len(array))]
    else:
        rows = _objects(array)
    return _captions(rows, problems)


def metadata(batch: pa.RecordBatch, column: str | None) -> list[Any]:
    """Returns the column's values as Python objects; None for each row where there is no such column."""
    if column is None:
        return [None] * batch.num_rows
    array = _column(batch, column)
    # Python's datetime has no nanoseconds.
    return values(array.cast(pa.string()) if pa.types.is_timestamp(array.type) else array)


def values(array: pa.Array) -> list[Any]:
    """Returns Python values; binary becomes text, and what is not UTF-8 replacement characters."""
    if is_string(array.type):
        try:
            return list(array.to_pylist())
        except UnicodeDecodeError:
            pass
    return [_text(value) for value in _objects(array)]


def _validate_views(array: pa.Array) -> None:
    """Checks list views, whose ends Arrow checks only together with the text of all values."""
    if pa.types.is_list_view(array.type) or pa.types.is_large_list_view(array.type):
        offsets, sizes = (part.to_numpy().astype(np.int64) for part in (array.offsets, array.sizes))
        if len(array) and (
            min(offsets.min(), sizes.min()) < 0 or (offsets + sizes).max() > len(array.values)
        ):
            raise pa.ArrowInvalid("a list ends behind its values")
    if pa.types.is_struct(array.type):
        for index in range(array.type.num_fields):
            _validate_views(array.field(index))
    elif is_list(array.type):
        _validate_views(array.values)


def _images(array: pa.Array) -> Iterator[Image]:
    """Yields the images of an array that is no list of structs."""
    paths: list[Any] = [None] * len(array)
    if pa.types.is_struct(array.type):
        name = field_of(array.type, IMAGE_FIELDS) or "bytes"
        if array.type.get_field_index("path") >= 0:
            paths = values(pc.struct_field(array, "path"))
        array = _storage(pc.struct_field(array, name))
    type = plain(array.type)
    if is_binary(type) and not pa.types.is_dictionary(array.type) and array.nbytes <= _MAX_COPY_BYTES:
        yield from map(Image, array.to_pylist(), paths)
        return
    decode: Callable[[pa.Scalar], Image] = _image_of_bytes
    if is_string(type):
        decode = _image_of_text
    elif is_list(type):
        decode = _image_of_list
    # A value that is large, or occurs often, is a Python object once at a time
    for scalar, path in zip(array, paths, strict=True):
        yield decode(scalar)._replace(path=path)


def _first_image(array: pa.Array | list[Any]) -> Image:
    if not len(array):
        return Image(None, problem="its list of images is empty")
    return next(_images(array.slice(0, 1)))._replace(num_others=len(array) - 1)  # type: ignore[union-attr]


def _image_of_bytes(value: pa.Scalar) -> Image:
    scalar = value.value if isinstance(value, pa.DictionaryScalar) else value
    if not scalar.is_valid:
        return Image(None)
    data = scalar.as_buffer()
    return _too_large(len(data)) if len(data) > MAX_IMAGE_BYTES else Image(data.to_pybytes())


def _image_of_list(value: pa.Scalar) -> Image:
    if not value.is_valid:
        return Image(None)
    numbers = value.values
    if len(numbers) > MAX_IMAGE_BYTES:
        return _too_large(len(numbers))
    if numbers.null_count:
        return Image(None, problem="has a list of bytes with nulls in it", reason="record_corrupt")
    return Image(numbers.to_numpy(zero_copy_only=False).tobytes())


def _image_of_text(value: pa.Scalar) -> Image:
    """Returns an image that is base64, alone or in a data URL."""
    text = _objects(pa.array([value.as_py()]) if value.is_valid else pa.nulls(1))[0]
    if not text:
        return Image(None)
    if len(text) > MAX_IMAGE_BYTES:
        return _too_large(len(text))
    is_data_url = _DATA_URL.match(text)
    with_base64 = text[is_data_url.end() :] if is_data_url else text
    shown = text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"
    try:
        data = base64.b64decode("".join(with_base64.split()), validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if data and (is_data_url or len(text) >= _MIN_BASE64_CHARS):
        return Image(data)
    return Image(None, problem=f"holds no image but a text: {shown!r}. Expected the image's bytes")


def _too_large(size: int) -> Image:
    return Image(
        None, problem=f"has {size} bytes; at most {MAX_IMAGE_BYTES} are read", reason="record_corrupt"
    )


def _key_text(value: Any) -> str:
    if not isinstance(value, bytes):
        return str(value)  # a UUID
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.hex()


def _caption_array(array: pa.Array) -> pa.Array:
    """Returns captions as an array of texts or of lists of texts, out of the structs that they are in."""
    array = _storage(array)
    if pa.types.is_struct(array.type):
        array = pc.struct_field(array, field_of(array.type, CAPTION_FIELDS) or "")
    return array


def _num_bytes(array: pa.Array) -> int:
    """Returns the size of texts, also of those that a dictionary holds once."""
    flat = array.flatten() if is_list(array.type) else array
    if not pa.types.is_dictionary(flat.type):
        return int(array.nbytes)
    lengths = pc.binary_length(flat.dictionary.cast(pa.large_binary()))
    return int(pc.sum(lengths.take(flat.indices)).as_py() or 0) + 4 * len(flat)


def _captions(rows: list[Any], problems: dict[int, str]) -> CaptionColumn:
    texts, num_not_utf8 = [], {}
    for index, row in enumerate(rows):
        items = row if isinstance(row, list) else [row]
        if items and not isinstance(items[0], str):
            items, number = _as_texts(items)
            if number:
                num_not_utf8[index] = number
        texts.append([text for text in items if text and text.strip()])
    return CaptionColumn(texts, num_not_utf8, problems)


def _as_texts(items: list[Any]) -> tuple[list[str | None], int]:
    """Returns texts of structs and bytes, and how many were in another encoding than UTF-8, 16 or 32."""
    texts: list[str | None] = []
    num_not_utf8 = 0
    for item in items:
        if isinstance(item, dict):
            item = next((item[name] for name in CAPTION_FIELDS if name in item), None)
        if isinstance(item, bytes):
            item, is_utf = decode(item)
            num_not_utf8 += not is_utf
        texts.append(item)
    return texts, num_not_utf8


def _objects(array: pa.Array) -> list[Any]:
    """Returns Python objects, texts that are not UTF-8 as bytes."""
    try:
        return list(array.to_pylist())
    except UnicodeDecodeError:
        return list(array.cast(_as_binary(array.type)).to_pylist())


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return to_text(value)
    if isinstance(value, dict):
        return {name: _text(item) for name, item in value.items()}
    return [_text(item) for item in value] if isinstance(value, list) else value


def _as_binary(type: pa.DataType) -> pa.DataType:
    type = plain(type)
    if is_list(type):
        return pa.list_(_as_binary(type.value_type))
    if pa.types.is_struct(type):
        return pa.struct([(field.name, _as_binary(field.type)) for field in type])
    return pa.binary() if is_string(type) else type


def _storage(array: pa.Array) -> pa.Array:
    return array.storage if isinstance(array, pa.ExtensionArray) else array


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    return batch.column(batch.schema.names.index(name))
