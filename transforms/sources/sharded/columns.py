"""Columns of a Parquet file that hold images, captions and keys: found by name and type."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import pyarrow as pa

from diptych.transforms.errors import OptionError
from diptych.transforms.sources.base import ColumnNames

# Names in use, in any case; of the columns with a type that fits, the first wins.
IMAGE_COLUMNS = ("image", "jpg", "image_bytes", "img", "bytes", "png", "jpeg", "webp")
CAPTION_COLUMNS = ("captions", "caption", "text", "TEXT", "txt", "sentences", "raw", "alt", "alt_text")
KEY_COLUMNS = ("key", "__key__", "image_id", "id", "uid", "filename", "file_name")
CAPTION_FIELDS = ("raw", "caption", "text", "sentence", "captions")
"""Fields of a struct, or of the structs of a list, that hold captions."""
IMAGE_FIELDS = ("bytes", "src", "data", "base64", "url", "path")
"""Fields of a struct that hold an image, or say where it is."""
FILE_NAME_COLUMNS = frozenset({"filename", "file_name"})
_ERROR_COLUMN = "error_message"

_IMAGE_TYPES = "binary or struct<bytes: binary, path: string>"
_CAPTION_TYPES = "string or list<string>"
_KEY_TYPES = "string, binary or integer"


class ColumnError(OptionError):
    """A file has no column that is named or needed.

    Attributes:
        reason: What a row is rejected for where only some files lack the column.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


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


class _Role(NamedTuple):
    """What a column is for.

    Attributes:
        name: The first word of its flag.
        usual: Names in use.
        fits: Tests of a column's type, the best first.
        expected: The types that fit, in words.
        reason: What a row without it is rejected for.
    """

    name: str
    usual: Sequence[str]
    fits: Sequence[Callable[[pa.DataType], bool]]
    expected: str
    reason: str


def find_columns(
    schema: pa.Schema,
    url: str,
    names: ColumnNames,
    metadata: Sequence[str],
    with_images: bool = True,
) -> Columns:
    """Returns the columns of a file: those named, and of those left open the first with a usual name.

    Where no column has a usual name, a single one that holds images is taken.

    Args:
        schema: The file's schema.
        url: The file, for messages.
        names: The columns that the user names.
        metadata: Metadata columns; one that is not there is null.
        with_images: Whether the images are wanted; there need be none if not.

    Raises:
        ColumnError: A column that is named or needed is missing or of a type that cannot be used.
    """
    image = None
    if with_images:
        image = _find(schema, url, _IMAGE, names.image) or _only_image(schema, url)
    caption = _find(schema, url, _CAPTION, names.caption)
    if caption is None and not with_images:
        misfits = _usual(schema, _CAPTION)
        why = f"a column {misfits[0]!r}, but of type {_type(schema, misfits[0])}" if misfits else ""
        raise _mismatch(schema, url, _CAPTION, why or f"no column {', '.join(CAPTION_COLUMNS)}")
    return Columns(
        image,
        caption,
        _find(schema, url, _KEY, names.key),
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
            raise _mismatch(schema, url, _METADATA, f"no column {name!r}")


def column_notes(schema: pa.Schema, url: str, columns: Columns, chosen: Sequence[str]) -> list[str]:
    """Returns sentences on columns that might have been meant and are not read.

    Args:
        schema: The file's schema.
        url: The file.
        columns: Its columns that are read.
        chosen: Roles whose column the user names.
    """
    notes = []
    for role, column in ((_IMAGE, columns.image), (_CAPTION, columns.caption), (_KEY, columns.key)):
        others = [name for name in _usual(schema, role) if name != column]
        fitting = [name for name in others if any(fits(_type(schema, name)) for fits in role.fits)]
        if role.name in chosen or (role is _IMAGE and column is None):
            continue
        if column is None and others:
            effect = "the rows are numbered" if role is _KEY else "the rows have no captions"
            there = ", ".join(f"{name!r} is of type {_type(schema, name)}" for name in others)
            notes.append(
                f"{url}: column {there}, which holds no {role.name}s, so {effect}. --{role.name}_column names another."
            )
        elif role is not _KEY and fitting:
            there = ", ".join(map(repr, fitting))
            notes.append(
                f"{url}: the {role.name}s are those of column {column!r}, not of {there}. "
                f"--{role.name}_column names another."
            )
        elif role is _CAPTION and column is None:
            texts = [name for name in schema.names if _holds_captions(_type(schema, name))]
            notes += captions_note(url, "column", [name for name in texts if name not in columns.names])
    for name, count in sorted(Counter(schema.names).items()):
        if count > 1 and name in columns.names:
            notes.append(f"{url}: {count} columns are named {name!r}. The first is read.")
    return notes


def captions_note(url: str, kind: str, names: Iterable[str]) -> list[str]:
    """Returns a sentence on texts of a file without captions; none where there are no such texts.

    Args:
        url: The file.
        kind: What the names are names of.
        names: Names of texts that might be captions.
    """
    if not (there := ", ".join(map(repr, sorted(names)))):
        return []
    return [
        f"{url}: no {kind} has a usual name of captions, so the rows have none. If they are in one of {there}, name it "
        "with --caption_column."
    ]


def field_of(type: pa.DataType, names: Sequence[str]) -> str | None:
    """Returns the first of some names that is a field of a struct."""
    return next((name for name in names if type.get_field_index(name) >= 0), None)


def is_list(type: pa.DataType) -> bool:
    """Tells whether a type is a list of any layout."""
    tests = pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list
    views = pa.types.is_list_view, pa.types.is_large_list_view
    return any(test(type) for test in (*tests, *views))


def is_string(type: pa.DataType) -> bool:
    """Tells whether a type is text of any layout. A column without any value has no type of its own."""
    tests = pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null
    return any(test(type) for test in tests)


def is_binary(type: pa.DataType) -> bool:
    """Tells whether a type is bytes of any layout."""
    tests = pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view
    return any(test(type) for test in tests) or bool(pa.types.is_fixed_size_binary(type))


def plain(type: pa.DataType) -> pa.DataType:
    """Returns the type of the values, without dictionary or extension around it."""
    if isinstance(type, pa.BaseExtensionType):
        return plain(type.storage_type)
    return plain(type.value_type) if pa.types.is_dictionary(type) else type


def _find(schema: pa.Schema, url: str, role: _Role, chosen: str | None) -> str | None:
    if chosen is not None:
        if chosen not in schema.names:
            raise _mismatch(schema, url, role, f"no column {chosen!r}")
        type = _type(schema, chosen)
        if not any(fits(type) for fits in role.fits):
            raise _mismatch(schema, url, role, f"a column {chosen!r}, but of type {type}")
        return chosen
    usual = _usual(schema, role)
    return next((name for fits in role.fits for name in usual if fits(_type(schema, name))), None)


def _usual(schema: pa.Schema, role: _Role) -> list[str]:
    """Returns the columns with a usual name, the likeliest first."""
    by_name: dict[str, str] = {}
    for name in schema.names:
        by_name.setdefault(name.lower(), name)
    exact = [name for name in role.usual if name in schema.names]
    return list(dict.fromkeys([*exact, *(by_name[name] for name in role.usual if name in by_name)]))


def _only_image(schema: pa.Schema, url: str) -> str:
    """Returns the one column that holds images under a name of its own.

    Raises:
        ColumnError: None does, or several do.
    """
    for fits in (_is_image_struct, _holds_images):
        names = [name for name, type in zip(schema.names, schema.types, strict=True) if fits(type)]
        names = [name for name in names if name.lower() not in (*CAPTION_COLUMNS, *KEY_COLUMNS)]
        if len(names) == 1:
            return names[0]
        if names:
            what = f"several columns that hold images, {', '.join(map(repr, names))}"
            raise _mismatch(schema, url, _IMAGE, what)
    raise _mismatch(schema, url, _IMAGE, f"no column {', '.join(IMAGE_COLUMNS)}")


def _type(schema: pa.Schema, name: str) -> pa.DataType:
    return schema.types[schema.names.index(name)]


def _mismatch(schema: pa.Schema, url: str, role: _Role, problem: str) -> ColumnError:
    there = ", ".join(f"{name} ({type})" for name, type in zip(schema.names, schema.types, strict=True))
    return ColumnError(
        f"{url} has {problem}. Expected a column of {role.name} values ({role.expected}); its columns are: "
        f"{there or 'none'}. Name one with --{role.name}_column{'s' if role is _METADATA else ''}.",
        role.reason,
    )


def _holds_images(type: pa.DataType) -> bool:
    return _is_image_struct(type) or is_binary(plain(type)) or _is_bytes_list(plain(type))


def _is_image_struct(type: pa.DataType) -> bool:
    if is_list(type):
        type = type.value_type
    if not pa.types.is_struct(type):
        return False
    index = type.get_field_index("bytes")
    return index >= 0 and (is_binary(plain(type[index].type)) or _is_bytes_list(plain(type[index].type)))


def _is_bytes_list(type: pa.DataType) -> bool:
    return is_list(type) and (pa.types.is_uint8(type.value_type) or pa.types.is_int8(type.value_type))


def _may_hold_images(type: pa.DataType) -> bool:
    """Tells whether a type is of texts, which may hold an image as base64 or say where it is."""
    if pa.types.is_struct(type):
        name = field_of(type, IMAGE_FIELDS)
        return name is not None and is_string(plain(type.field(name).type))
    return is_string(plain(type))


def _holds_captions(type: pa.DataType) -> bool:
    type = plain(type)
    if is_list(type):
        type = plain(type.value_type)
        return is_string(type) or _is_caption_struct(type, is_string)
    # a list of structs, as `datasets` turns it around: a struct of lists
    return is_string(type) or _is_caption_struct(type, lambda kind: is_string(kind) or _is_text_list(kind))


def _is_caption_struct(type: pa.DataType, fits: Callable[[pa.DataType], bool]) -> bool:
    name = field_of(type, CAPTION_FIELDS) if pa.types.is_struct(type) else None
    return name is not None and fits(plain(type.field(name).type))


def _is_text_list(type: pa.DataType) -> bool:
    return is_list(type) and is_string(plain(type.value_type))


def _may_hold_captions(type: pa.DataType) -> bool:
    """Tells whether a type is bytes, as writers leave text that they do not mark as such."""
    type = plain(type)
    return is_binary(plain(type.value_type) if is_list(type) else type)


def _holds_keys(type: pa.DataType) -> bool:
    type = plain(type)
    is_whole = pa.types.is_integer(type) or (pa.types.is_decimal(type) and type.scale == 0)
    return bool(is_whole) or is_string(type) or is_binary(type)


_IMAGE = _Role("image", IMAGE_COLUMNS, (_holds_images, _may_hold_images), _IMAGE_TYPES, "missing_image")
_CAPTION = _Role(
    "caption", CAPTION_COLUMNS, (_holds_captions, _may_hold_captions), _CAPTION_TYPES, "bad_annotation"
)
_KEY = _Role("key", KEY_COLUMNS, (_holds_keys,), _KEY_TYPES, "bad_annotation")
_METADATA = _Role("metadata", (), (), "any type", "bad_annotation")
