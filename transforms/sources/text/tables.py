"""Tables of captions as text: the delimiter, the quotes and the columns are found from the header and the first lines.

`csv.Sniffer` takes the commonest letter of a caption for the delimiter; here a delimiter is right when a column of
what it gives names images.
"""

import ast
import contextlib
import csv
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from diptych.transforms.errors import OptionError
from diptych.transforms.sources.base import ColumnNames
from diptych.transforms.sources.text.encoding import Line

IMAGE_NAMES = (
    *(
        "image",
        "image_name",
        "filename",
        "file_name",
        "filepath",
        "file_path",
        "image_path",
        "img_path",
        "path",
    ),
    *("image_file", "img", "img_name", "photo", "picture", "file", "image_id", "name", "url", "image_url"),
)
CAPTION_NAMES = (
    *(
        "caption",
        "captions",
        "comment",
        "text",
        "sentence",
        "description",
        "title",
        "raw",
        "txt",
        "alt",
        "alt_text",
    ),
    *("caption_text", "label_text"),
)
NUMBER_NAMES = ("comment_number", "caption_number", "caption_index", "sentid")
_DELIMITERS = ",\t;|"
_NO_DELIMITERS = frozenset(" \"'._-/\\:#@%&()+?=")
_NAMED_DELIMITER = re.compile(r"sep=(.)\s*", re.I)
IMAGE_EXTENSION = r"(?:jpe?g|png|gif|bmp|webp|tiff?|jfif|jpe|avif|heic|jp2)"
_IMAGE = re.compile(rf'"?[^"]*\.{IMAGE_EXTENSION}(?:[?#][^"]*)?"?', re.I)
_BACKSLASHES = re.compile(r"\\+(?![\\\"])")
_PYTHON_TEXT = r"""\s*(?:'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+")\s*"""
_PYTHON_LIST = re.compile(
    rf"\s*\[{_PYTHON_TEXT}(?:,{_PYTHON_TEXT})*+,?\s*\]\s*", re.S
)  # numpy's has no commas
_NUMBER = re.compile(r"\s*\d{1,9}(?:\.0)?\s*")
CERTAIN = 0.8
"""The share of lines that have to fit a form which text without images may have by chance."""
# Lines that a quoted caption may go over
_MAX_QUOTED_LINES = 1000
_MAX_FIELD_CHARS = 1 << 20


class Dialect(NamedTuple):
    """How a table's lines are cut.

    Attributes:
        delimiter: What is between fields.
        escape: What a quote may have before it instead of being doubled; before anything else it is text.
    """

    delimiter: str
    escape: str | None = None


class Table(NamedTuple):
    """Where a table has what.

    Attributes:
        dialect: How its lines are cut.
        num_before: How many lines there are before it.
        image: Place of the images' names.
        captions: Places of the captions: several where columns of one name hold them.
        number: Place of the captions' numbers; None where there are none.
        key: Place of the keys; None where they are made of the images' names.
        metadata: Places of the metadata columns.
        num_columns: How many columns a line has.
        has_header: Whether the first line names the columns.
        has_lists: Whether each caption is a list of captions.
    """

    dialect: Dialect
    num_before: int
    image: int
    captions: tuple[int, ...]
    number: int | None
    key: int | None
    metadata: tuple[int, ...]
    num_columns: int
    has_header: bool
    has_lists: bool


class Record(NamedTuple):
    """A record of a table.

    Attributes:
        fields: Its fields; none where there is a fault.
        line: Ordinal of its first line, from 1.
        text: Its first line.
        is_utf: Whether its lines were in UTF-8, 16 or 32.
        fault: Why it cannot be cut into fields; empty where it can.
    """

    fields: list[str]
    line: int
    text: str
    is_utf: bool
    fault: str = ""


def find_dialect(head: Sequence[str]) -> Dialect:
    """Returns the dialect whose fields name images in most of the first lines, or whose first line is a header.

    A delimiter that is seldom one is taken where nearly every line has the name of an image in the same place.
    """
    num_before, delimiter = _before_table(head)
    head = head[num_before:]
    if delimiter is None:
        scores = {delimiter: _score(head, delimiter) for delimiter in _DELIMITERS}
        delimiter = max(scores, key=lambda name: scores[name])
        filled = [line for line in head if line.strip()]
        if 2 * scores[delimiter][0] < len(filled):
            marks = [char for char in dict.fromkeys(filled[0]) if not char.isalnum()]
            others = [char for char in marks if char not in _NO_DELIMITERS]
            delimiter = next((other for other in others if _is_certain(head, other)), delimiter)
    text, inside = "\n".join(head), rf'[^\n"{re.escape(delimiter)}]'
    num_doubled = len(re.findall(rf'{inside}""|""{inside}', text))  # and no empty field
    is_doubled = num_doubled > 0 and num_doubled >= text.count('\\"')
    return Dialect(delimiter, None if is_doubled else "\\")


def _before_table(head: Sequence[str]) -> tuple[int, str | None]:
    """Returns how many lines are before a table (blank, Excel's `sep=;`, comments), and the delimiter they name."""
    delimiter = None
    for number, line in enumerate(head):
        if match := _NAMED_DELIMITER.fullmatch(line):
            delimiter = match[1]
        elif line.strip() and not _is_comment(line):
            return number, delimiter
    return 0, delimiter


def _is_comment(line: str) -> bool:
    fields = re.split(rf"[{_DELIMITERS}]", line.lstrip("# "))
    is_record = _header_columns(fields) is not None or any(
        _names_image(fields, place) for place in range(len(fields))
    )
    return line.startswith("#") and not is_record


def _score(head: Sequence[str], delimiter: str) -> tuple[int, int]:
    rows = [row for row in _rows(head, Dialect(delimiter)) if len(row) > 1]
    images = max((sum(_names_image(row, place) for row in rows) for place in range(6)), default=0)
    is_header = bool(rows) and _header_columns(rows[0]) is not None
    return images + is_header, len(rows)


def _is_certain(head: Sequence[str], delimiter: str) -> bool:
    rows = list(_rows(head, Dialect(delimiter)))
    num_columns = len(rows[0])
    body = rows[1:] or rows
    whole = [row for row in body if len(row) == num_columns > 1]
    most = max((sum(_names_image(row, place) for row in whole) for place in range(num_columns)), default=0)
    return most >= CERTAIN * len(body)


def _rows(head: Sequence[str], dialect: Dialect) -> Iterator[list[str]]:
    """Yields the fields of the records in the first lines; the last may be cut off."""
    pending: list[str] = []
    for line in head:
        if pending and _is_row_of_image(line, dialect):
            pending = []  # of a quote that is never closed
        if not pending and not line.strip():
            continue
        was_open = bool(pending)
        pending.append(line)
        if not is_open(f'"{line}' if was_open else line, dialect):
            with contextlib.suppress(csv.Error):
                yield _cut_lines(pending, dialect)
            pending = []
    if pending:
        with contextlib.suppress(csv.Error):
            yield _cut_lines(pending, dialect)


def _is_row_of_image(line: str, dialect: Dialect) -> bool:
    with contextlib.suppress(csv.Error):
        row = cut(line, dialect)
        return len(row) > 1 and any(_names_image(row, place) for place in range(len(row)))
    return False


def _names_image(row: Sequence[str], place: int) -> bool:
    return place < len(row) and _IMAGE.fullmatch(row[place].strip()) is not None


def cut(line: str, dialect: Dialect) -> list[str]:
    """Returns the fields of a line; a quote that is not closed in it goes on to its end."""
    return _read([line], dialect)


def _read(lines: Sequence[str], dialect: Dialect, strict: bool = False) -> list[str]:
    if dialect.escape and any("\\" in line for line in lines):  # but before a quote, a backslash is text
        lines = [_BACKSLASHES.sub(r"\g<0>\g<0>", line) for line in lines]
    reader = csv.reader(lines, delimiter=dialect.delimiter, escapechar=dialect.escape, strict=strict)
    return next(reader, [])


def is_open(text: str, dialect: Dialect) -> bool:
    """Tells whether a quoted field that begins in a text does not end in it."""
    delimiter = re.escape(dialect.delimiter)
    inside = _inside_quotes(dialect)
    # whole fields from the start, then one that is quoted and has no end
    pattern = (
        rf"(?:(?:\s*\"{inside}*+\"[^{delimiter}]*+|(?!\s*\")[^{delimiter}]*+){delimiter})*+\s*\"{inside}*+"
    )
    return re.fullmatch(pattern, text, re.S) is not None


def _inside_quotes(dialect: Dialect) -> str:
    """Returns the pattern of a part of a quoted field."""
    return r"(?:[^\"\\]++|\"\"|\\.?)" if dialect.escape else r"(?:[^\"]++|\"\")"


def _header_columns(row: Sequence[str]) -> tuple[int | None, int | None] | None:
    """Returns the places of image and caption by their usual names; None of a row that is no header."""
    names = [_column_name(field).lower() for field in row]
    image = next((names.index(name) for name in IMAGE_NAMES if name in names), None)
    caption = next((names.index(name) for name in CAPTION_NAMES if name in names), None)
    return None if image is None and caption is None else (image, caption)


def _column_name(field: str) -> str:
    return field.strip().strip('"')


def is_header(row: Sequence[str]) -> bool:
    """Tells whether fields are the usual names of the images' and the captions' columns, with or without others."""
    columns = _header_columns(row)
    return columns is not None and None not in columns


def names_images(head: Sequence[str]) -> bool:
    """Tells whether the first lines of a text are those of a table of images: most name one, or a header says so."""
    rows = list(_rows(head[_before_table(head)[0] :], find_dialect(head)))
    if not rows:
        return True
    columns = _header_columns(rows[0])
    if is_header(rows[0]) and len(rows) == 1:
        return True
    body = rows[1:] if columns is not None else rows
    most = max((sum(_names_image(row, place) for row in body) for place in range(len(rows[0]))), default=0)
    return len(rows[0]) > 1 and 2 * most > len(body)


def find_table(url: str, head: Sequence[str], names: ColumnNames, metadata: Sequence[str]) -> Table | None:
    """Returns where a table has what, from its first lines; None where no column names images.

    Args:
        url: The file, for messages.
        head: Its first lines.
        names: The columns that the user names.
        metadata: The metadata columns that the user wants.

    Raises:
        OptionError: A column is not there, or it cannot be told which are meant.
    """
    dialect = find_dialect(head)
    num_before, _ = _before_table(head)
    rows = list(_rows(head[num_before:], dialect))
    if not rows:
        return None
    first, body = rows[0], rows[1:]
    wanted = [name for name in (names.image, names.caption, names.key, *metadata) if name]
    images = [sum(_names_image(row, place) for row in body) for place in range(len(first))]
    by_content = images.index(max(images)) if any(images) else None
    has_images = any(_names_image(first, place) for place in range(len(first)))
    has_header = not has_images and (
        bool(wanted) or _header_columns(first) is not None or by_content is not None
    )
    header = [_column_name(field) for field in first] if has_header else []
    if missing := [name for name in wanted if name not in header]:
        there = ", ".join(map(repr, header)) or "no header, so its columns have no names"
        raise OptionError(f"{url} has no column {missing[0]!r}; it has {there}. Name one of those.")
    if not has_header:
        by_content = next((place for place in range(len(first)) if _names_image(first, place)), None)
    image, caption = _header_columns(header) or (None, None)
    # what looks like names of images counts for more than what a column is called
    if by_content is not None and (image is None or not images[image]):
        image = by_content
    image = header.index(names.image) if names.image else image
    if image is None:
        return None
    if names.caption:
        caption = header.index(names.caption)
    elif caption is None or caption == image:
        caption = _only_text(url, first, body if has_header else rows, image)
    lowered = [name.lower() for name in header]
    number = next((lowered.index(name) for name in NUMBER_NAMES if name in lowered), None)
    if caption >= len(first):
        raise OptionError(
            f"{url} has one column only, {first[0]!r}, and none of captions. Expected the name of an image and a "
            "caption in each line."
        )
    return Table(
        dialect,
        num_before,
        image,
        _of_one_name(header, caption, exactly=names.caption is not None),
        number,
        header.index(names.key) if names.key else None,
        tuple(header.index(name) for name in metadata),
        len(first),
        has_header,
        _has_lists(
            [row[caption] for row in (body if has_header else rows) if len(row) > caption],
            lowered[caption:][:1],
        ),
    )


def _has_lists(captions: Sequence[str], name: Sequence[str]) -> bool:
    """Tells whether all captions are lists; of a column named `raw`, which is of lists, one is enough."""
    are_lists = [list_of_texts(caption) is not None for caption in captions]
    return any(are_lists) and (all(are_lists) or name == ["raw"])


def list_of_texts(encoded: str) -> list[str] | None:
    """Returns a list of texts that JSON or Python wrote; None of anything else."""
    try:
        texts = json.loads(encoded)
    except (ValueError, RecursionError):
        if not _PYTHON_LIST.fullmatch(encoded):
            return None
        try:
            texts = ast.literal_eval(encoded.strip())
        except (ValueError, SyntaxError, RecursionError):
            return None
    return texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else None


def _of_one_name(header: Sequence[str], place: int, exactly: bool) -> tuple[int, ...]:
    """Returns the places of all columns of a name, also of `NAME.1` that pandas makes of a second one."""
    if not header:
        return (place,)
    name = header[place] if exactly else header[place].lower()
    others = header if exactly else [re.sub(r"\.\d+$", "", other.lower()) for other in header]
    return tuple(other for other in range(len(header)) if other == place or others[other] == name)


def column_notes(url: str, head: Sequence[str], names: ColumnNames, metadata: Sequence[str]) -> list[str]:
    """Returns sentences on columns that might have been meant and are not read; arguments as of `find_table`."""
    table = find_table(url, head, names, metadata)
    if table is None or not table.has_header:
        return []
    rows = list(_rows(head[table.num_before :], table.dialect))
    header = [_column_name(field) for field in rows[0]]
    read = {table.image, table.key, *table.captions, *table.metadata}
    caption = header[table.captions[0]]
    others = [
        header[place]
        for place in range(len(header))
        if header[place].lower() in CAPTION_NAMES and place not in read and _holds_text(rows[1:], place)
    ]
    notes = []
    if others and not names.caption:
        there = ", ".join(map(repr, others))
        notes.append(
            f"{url}: the captions are those of column {caption!r}, not of {there}. --caption_column names another."
        )
    if len(table.captions) > 1:
        several = [header[place] for place in table.captions]
        choice = " --caption_column names one of them." if len({*several}) > 1 else ""
        notes.append(f"{url}: each of the columns {', '.join(map(repr, several))} holds a caption.{choice}")
    single = [place for place in (table.image, table.key, *table.metadata) if place is not None]
    for name in dict.fromkeys(header[place] for place in single):
        if header.count(name) > 1:
            notes.append(f"{url}: {header.count(name)} columns are named {name!r}. The first is read.")
    return notes


def _only_text(url: str, first: Sequence[str], rows: Sequence[Sequence[str]], image: int) -> int:
    """Returns the only column that holds text, beside that of the images and those of numbers."""
    places = range(len(first))
    texts = [place for place in places if place != image and _holds_text(rows, place)]
    # commas in a caption that is not quoted look like columns
    if texts and (len(texts) == 1 or (len(first) == 2 and image == 0)):
        return texts[0]
    if not texts:
        return 1 if image == 0 else 0
    raise OptionError(
        f"{url} has several columns that may be the captions; its first line is {list(first)}. Name the one with "
        "--caption_column (a file without a header needs one)."
    )


def _holds_text(rows: Sequence[Sequence[str]], place: int) -> bool:
    return any(len(row) > place and row[place].strip() and not _NUMBER.fullmatch(row[place]) for row in rows)


def records(lines: Iterator[Line], table: Table, with_blank: bool = False) -> Iterator[Record]:
    """Yields the records of a table; a quote that is never closed costs its own line, and none that follows.

    Args:
        lines: The table's lines.
        table: Where it has what.
        with_blank: Whether a blank line is a record with a fault, rather than none.
    """
    pending: list[tuple[int, Line]] = []
    numbered = itertools.islice(enumerate(lines, 1), table.num_before, None)
    while True:
        if not pending and (item := next(numbered, None)) is None:
            return
        elif not pending:
            pending.append(item)  # type: ignore[arg-type]  # it is not None here
        number, line = pending.pop(0)
        if not line.text.strip():
            if with_blank:
                yield Record([], number, line.text, line.is_utf, "expected a record, found a blank line")
            continue
        if line.is_cut:
            yield Record([], number, line.text, line.is_utf, "expected a record")
            continue
        used: int | None = 0
        if len(line.text) <= _MAX_FIELD_CHARS and is_open(line.text, table.dialect):
            used = _closing(line.text, pending, numbered, table)
        dialect = table.dialect
        if used is None and _is_closed_by_backslash(line.text, table):
            used, dialect = 0, _without_escape(dialect)
        if used is None:
            yield Record([], number, line.text, line.is_utf, "a quote is opened and not closed")
            continue
        parts = [line, *(following for _, following in pending[:used])]
        del pending[:used]
        is_utf = all(part.is_utf for part in parts)
        try:
            fields = _cut_record([part.text for part in parts], dialect, table.num_columns)
        except csv.Error as error:
            yield Record([], number, line.text, is_utf, str(error))
        else:
            yield Record(_whole(fields, table), number, line.text, is_utf)


def _whole(fields: list[str], table: Table) -> list[str]:
    """Returns the fields of a record whose last one, a caption, has delimiters in it and no quotes."""
    last = table.num_columns - 1
    if len(fields) <= table.num_columns or table.captions != (last,):
        return fields
    return [*fields[:last], table.dialect.delimiter.join(fields[last:])]


def _closing(
    first: str, pending: list[tuple[int, Line]], numbered: Iterator[tuple[int, Line]], table: Table
) -> int | None:
    """Returns how many of the lines after an open one close its quote; None where they do not, or are records."""
    for used in range(1, _MAX_QUOTED_LINES + 1):
        if len(pending) < used:
            if (item := next(numbered, None)) is None:
                return None
            pending.append(item)
        following = pending[used - 1][1].text
        if _is_record(following, table):
            return None
        if not is_open(f'"{following}', table.dialect):
            lines = [first, *(line.text for _, line in pending[:used])]
            return used if _is_strict(lines, table) else None
    return None


def _is_strict(lines: Sequence[str], table: Table) -> bool:
    """Tells whether each quote of a record stands where one may: else it closes on the next one's opening quote."""
    with contextlib.suppress(csv.Error):
        return len(_cut_lines(lines, table.dialect, strict=True)) >= table.num_columns
    return False


def _is_closed_by_backslash(line: str, table: Table) -> bool:
    """Tells whether a line is whole where its backslashes are text, as that of a path at the end of a field is."""
    plain = _without_escape(table.dialect)
    with contextlib.suppress(csv.Error):
        return not is_open(line, plain) and len(cut(line, plain)) == table.num_columns
    return False


def _without_escape(dialect: Dialect) -> Dialect:
    return dialect._replace(escape=None)


def _is_record(line: str, table: Table) -> bool:
    """Tells whether a line is a whole record by itself: in the image's place there is the name of one."""
    with contextlib.suppress(csv.Error):
        row = cut(line, table.dialect)
        return len(row) >= table.num_columns and _names_image(row, table.image)
    return False


def _cut_record(lines: Sequence[str], dialect: Dialect, num_columns: int) -> list[str]:
    """Returns the fields of a record; blanks before a quoted one are none of it, where it is one column."""
    fields = _cut_lines(lines, dialect)
    if any(' "' in line for line in lines) and any(
        field.startswith(" ") and field.lstrip().startswith('"') for field in fields
    ):
        delimiter = re.escape(dialect.delimiter)
        quoted = rf'"{_inside_quotes(dialect)}*+"\s*(?:{delimiter}|\Z)'
        text = re.sub(rf"(^|{delimiter}) +(?={quoted})", r"\1", "\n".join(lines))
        without_blanks = _cut_lines(text.split("\n"), dialect)
        if len(without_blanks) == num_columns:
            return without_blanks
    return fields


def _cut_lines(lines: Sequence[str], dialect: Dialect, strict: bool = False) -> list[str]:
    return _read([*(f"{line}\n" for line in lines[:-1]), lines[-1]], dialect, strict)
