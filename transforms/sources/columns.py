"""Columns of a Parquet file that hold images, captions and keys: found, checked, and taken out."""

import posixpath
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from transforms.errors import OptionError
from transforms.sources.shardfile import to_text

# Names in use; of the columns with a type that fits, the first wins.
IMAGE_COLUMNS = ("image", "jpg", "image_bytes", "img", "bytes")
CAPTION_COLUMNS = ("captions", "caption", "text", "TEXT", "txt", "sentences", "raw", "alt")
KEY_COLUMNS = ("key", "__key__", "image_id", "id", "uid", "filename", "file_name")
_FILE_NAME_COLUMNS = frozenset({"filename", "file_name"})
_ERROR_COLUMN = "error_message"

_IMAGE_TYPES = "binary or struct<bytes: binary, path: string>"
_CAPTION_TYPES = "string or list<string>"
_KEY_TYPES = "string, binary or integer"


class Columns(NamedTuple):
    """Names of the columns to read; None where the file has no such column.

    Attributes:
        image: Encoded images; None where they are not wanted.
        caption: Captions.
        key: Keys.
        error: Why an image is not there, as img2dataset says it.
        metadata: The metadata columns asked for, in their order.
    """

    image: str | None
    caption: str | None
    key: str | None
    error: str | None
    metadata: tuple[str | None, ...]

    @property
    def names(self) -> list[str]:
        """All columns to read, each once."""
        return list(dict.fromkeys(name for name in (*self[:4], *self.metadata) if name is not None))


def find_columns(
    schema: pa.Schema,
    url: str,
    image: str | None,
    caption: str | None,
    key: str | None,
    metadata: Sequence[str],
    with_images: bool = True,
) -> Columns:
    """Returns the columns of a file: those named, and of those left open the first with a usual name.

    Args:
        schema: The file's schema.
        url: The file, for messages.
        image: Column of the images, or None.
        caption: Column of the captions, or None.
        key: Column of the keys, or None.
        metadata: Metadata columns; one that is not there is null.
        with_images: Whether the images are wanted; there need be none if not.

    Raises:
        OptionError: A column that is named or needed is missing or of a type that cannot be used.
    """
    if with_images:
        image = _find(schema, url, "image", image, IMAGE_COLUMNS, _holds_images, _IMAGE_TYPES)
        if image is None:
            raise _mismatch(schema, url, "image", f"no column {', '.join(IMAGE_COLUMNS)}", _IMAGE_TYPES)
    caption = _find(schema, url, "caption", caption, CAPTION_COLUMNS, _holds_captions, _CAPTION_TYPES)
    if caption is None and not with_images:
        why = f"no column {', '.join(CAPTION_COLUMNS)}"
        raise _mismatch(schema, url, "caption", why, _CAPTION_TYPES)
    return Columns(
        image if with_images else None,
        caption,
        _find(schema, url, "key", key, KEY_COLUMNS, _holds_keys, _KEY_TYPES),
        _ERROR_COLUMN if _ERROR_COLUMN in schema.names else None,
        tuple(name if name in schema.names else None for name in metadata),
    )


def check_metadata(schema: pa.Schema, url: str, names: Sequence[str]) -> None:
    """Checks that the metadata columns asked for are there.

    Raises:
        OptionError: One is not.
    """
    for name in names:
        if name not in schema.names:
            raise _mismatch(schema, url, "metadata", f"no column {name!r}", "any type")


def images(
    batch: pa.RecordBatch, column: str | None, needed: bool
) -> tuple[list[bytes | None], list[str | None]]:
    """Returns image and path of each row, None where null.

    Args:
        batch: Rows of the file.
        column: The image column; None where it was not read: all images are empty then.
        needed: Whether the images' bytes are wanted; if not, those that are there are empty.
    """
    paths: list[str | None] = [None] * batch.num_rows
    if column is None:
        return [b""] * batch.num_rows, paths
    array = _column(batch, column)
    if pa.types.is_struct(array.type):
        if "path" in [field.name for field in array.type]:
            paths = values(pc.struct_field(array, "path"))
        array = pc.struct_field(array, "bytes")
    if needed:
        return array.to_pylist(), paths
    return [b"" if valid else None for valid in array.is_valid().to_pylist()], paths


def keys(batch: pa.RecordBatch, column: str | None) -> list[str]:
    """Returns the key of each row, empty where it has none. A file name loses its extension."""
    if column is None:
        return [""] * batch.num_rows
    texts = ["" if value is None else str(value) for value in values(_column(batch, column))]
    return [posixpath.splitext(text)[0] for text in texts] if column in _FILE_NAME_COLUMNS else texts


def captions(batch: pa.RecordBatch, column: str | None) -> list[list[str]]:
    """Returns the captions of each row that are more than blanks."""
    if column is None:
        return [[] for _ in range(batch.num_rows)]
    lists = [[value] if isinstance(value, str) else value or [] for value in values(_column(batch, column))]
    return [[text for text in texts if text and text.strip()] for texts in lists]


def metadata(batch: pa.RecordBatch, column: str | None) -> list[Any]:
    """Returns the column's values as Python objects; None for each row where there is no such column."""
    if column is None:
        return [None] * batch.num_rows
    array = _column(batch, column)
    # Python's datetime has no nanoseconds.
    return values(array.cast(pa.string()) if pa.types.is_timestamp(array.type) else array)


def values(array: pa.Array) -> list[Any]:
    """Returns Python values; binary becomes text, and what is not UTF-8 replacement characters."""
    try:
        found = array.to_pylist()
    except UnicodeDecodeError:
        found = array.cast(_as_binary(array.type)).to_pylist()
    return [_text(value) for value in found]


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return to_text(value)
    if isinstance(value, dict):
        return {name: _text(item) for name, item in value.items()}
    return [_text(item) for item in value] if isinstance(value, list) else value


def _as_binary(type: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(type):
        return _as_binary(type.value_type)
    if _is_list(type):
        return pa.list_(_as_binary(type.value_type))
    if pa.types.is_struct(type):
        return pa.struct([(field.name, _as_binary(field.type)) for field in type])
    return pa.binary() if _is_string(type) else type


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    return batch.column(batch.schema.names.index(name))


def _find(
    schema: pa.Schema,
    url: str,
    role: str,
    asked: str | None,
    usual: Sequence[str],
    fits: Callable[[pa.DataType], bool],
    expected: str,
) -> str | None:
    types = dict(zip(reversed(schema.names), reversed(schema.types), strict=True))
    if asked is not None:
        if asked not in types:
            raise _mismatch(schema, url, role, f"no column {asked!r}", expected)
        if not fits(types[asked]):
            raise _mismatch(schema, url, role, f"a column {asked!r}, but of type {types[asked]}", expected)
        return asked
    present = [name for name in usual if name in types]
    found = next((name for name in present if fits(types[name])), None)
    if found is None and present and role == "caption":
        what = f"a column {present[0]!r}, but of type {types[present[0]]}"
        raise _mismatch(schema, url, role, what, expected)
    return found


def _mismatch(schema: pa.Schema, url: str, role: str, found: str, expected: str) -> OptionError:
    there = ", ".join(f"{name} ({type})" for name, type in zip(schema.names, schema.types, strict=True))
    return OptionError(
        f"{url} has {found}. Expected a column of {role} values ({expected}); its columns are: {there}. "
        f"Name one with --{role}_column{'s' if role == 'metadata' else ''}."
    )


def _holds_images(type: pa.DataType) -> bool:
    if pa.types.is_struct(type):
        index = type.get_field_index("bytes")
        return index >= 0 and _is_binary(_plain(type.field(index).type))
    return _is_binary(_plain(type))


def _holds_captions(type: pa.DataType) -> bool:
    type = _plain(type)
    return _is_string(_plain(type.value_type) if _is_list(type) else type)


def _holds_keys(type: pa.DataType) -> bool:
    type = _plain(type)
    return pa.types.is_integer(type) or _is_string(type) or _is_binary(type)


def _plain(type: pa.DataType) -> pa.DataType:
    return type.value_type if pa.types.is_dictionary(type) else type


def _is_list(type: pa.DataType) -> bool:
    return bool(pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type))


def _is_string(type: pa.DataType) -> bool:
    # A column without any value has no type of its own.
    return bool(pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_null(type))


def _is_binary(type: pa.DataType) -> bool:
    return bool(pa.types.is_binary(type) or pa.types.is_large_binary(type))
