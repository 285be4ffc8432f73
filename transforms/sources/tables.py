"""Tables of captions as text: the delimiter, the quotes and the columns are found from the header and the first lines.

`csv.Sniffer` takes the commonest letter of a caption for the delimiter; here a delimiter is right when a column of
what it gives names images.
"""

import contextlib
import csv
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from transforms.errors import OptionError
from transforms.sources.base import ColumnNames
from transforms.sources.encoding import Line

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
_IMAGE = re.compile(r'"?[^"]*\.(?:jpe?g|png|gif|bmp|webp|tiff?|jfif|jpe|avif|heic|jp2)(?:[?#][^"]*)?"?', re.I)
_NUMBER = re.compile(r"\s*\d{1,9}(?:\.0)?\s*")
# Lines that a quoted caption may go over
_MAX_QUOTED_LINES = 50
_MAX_FIELD_CHARS = 1 << 20


class Dialect(NamedTuple):
    """How a table's lines are cut.

    Attributes:
        delimiter: What is between fields.
        escape: What a quote in a quoted field has before it; None where it is doubled.
    """

    delimiter: str
    escape: str | None = None


class Table(NamedTuple):
    """Where a table has what.

    Attributes:
        dialect: How its lines are cut.
        image: Place of the images' names.
        caption: Place of the captions.
        number: Place of the captions' numbers; None where there are none.
        key: Place of the keys; None where they are made of the images' names.
        metadata: Places of the metadata columns.
        num_columns: How many columns a line has.
        has_header: Whether the first line names the columns.
        is_json: Whether a caption is a JSON list of captions.
    """

    dialect: Dialect
    image: int
    caption: int
    number: int | None
    key: int | None
    metadata: tuple[int, ...]
    num_columns: int
    has_header: bool
    is_json: bool


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
    """Returns the dialect whose fields name images in most of the first lines, or whose first line is a header."""

    def score(delimiter: str) -> tuple[int, int]:
        rows = list(_rows(head, Dialect(delimiter)))
        rows = [row for row in rows if len(row) > 1]
        images = max((sum(_names_image(row, place) for row in rows) for place in range(6)), default=0)
        is_header = bool(rows) and _header_columns(rows[0]) is not None
        return images + is_header, len(rows)

    delimiter = max(_DELIMITERS, key=lambda delimiter: (score(delimiter), -_DELIMITERS.index(delimiter)))
    text = "\n".join(head)
    return Dialect(delimiter, "\\" if '\\"' in text and '""' not in text else None)


def _rows(head: Sequence[str], dialect: Dialect) -> Iterator[list[str]]:
    for line in head:
        with contextlib.suppress(csv.Error):
            if line.strip():
                yield cut(line, dialect)


def _names_image(row: Sequence[str], place: int) -> bool:
    return place < len(row) and _IMAGE.fullmatch(row[place].strip()) is not None


def cut(line: str, dialect: Dialect) -> list[str]:
    """Returns the fields of a line; a quote that is not closed in it goes on to its end."""
    escape = dialect.escape
    reader = csv.reader(
        [line], delimiter=dialect.delimiter, escapechar=escape, doublequote=escape is None, strict=False
    )
    return next(reader, [])


def is_open(text: str, dialect: Dialect) -> bool:
    """Tells whether a quoted field that begins in a text does not end in it."""
    delimiter = re.escape(dialect.delimiter)
    inside = r"(?:[^\"\\]|\\.)" if dialect.escape else r"(?:[^\"]|\"\")"
    # whole fields from the start, then one that is quoted and has no end
    pattern = (
        rf"(?:(?:\s*\"{inside}*+\"[^{delimiter}]*+|(?!\s*\")[^{delimiter}]*+){delimiter})*+\s*\"{inside}*+"
    )
    return re.fullmatch(pattern, text, re.S) is not None


def _header_columns(row: Sequence[str]) -> tuple[int | None, int | None] | None:
    """Returns the places of image and caption by their usual names; None of a row that is no header."""
    names = [name.strip().lower() for name in row]
    image = next((names.index(name) for name in IMAGE_NAMES if name in names), None)
    caption = next((names.index(name) for name in CAPTION_NAMES if name in names), None)
    return None if image is None and caption is None else (image, caption)


def names_images(head: Sequence[str]) -> bool:
    """Tells whether the first lines of a text are those of a table of images: most name one, or a header says so."""
    rows = list(_rows(head, find_dialect(head)))
    if not rows:
        return True
    columns = _header_columns(rows[0])
    if columns is not None and None not in columns and len(rows) == 1:
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
    rows = list(_rows(head, dialect))
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
    header = [name.strip() for name in first] if has_header else []
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
    return Table(
        dialect,
        image,
        caption,
        number,
        header.index(names.key) if names.key else None,
        tuple(header.index(name) for name in metadata),
        len(first),
        has_header,
        has_header and lowered[caption] == "raw",
    )


def _only_text(url: str, first: Sequence[str], rows: Sequence[Sequence[str]], image: int) -> int:
    """Returns the only column that holds text, beside that of the images and those of numbers."""
    places = range(len(first))
    texts = [
        place
        for place in places
        if place != image
        and any(len(row) > place and row[place].strip() and not _NUMBER.fullmatch(row[place]) for row in rows)
    ]
    # commas in a caption that is not quoted look like columns
    if texts and (len(texts) == 1 or (len(first) == 2 and image == 0)):
        return texts[0]
    if not texts:
        return 1 if image == 0 else 0
    raise OptionError(
        f"{url} has several columns that may be the captions; its first line is {list(first)}. Name the one with "
        "--caption_column (a file without a header needs one)."
    )


def records(lines: Iterator[Line], table: Table, with_blank: bool = False) -> Iterator[Record]:
    """Yields the records of a table; a quote that is never closed costs its own line, and none that follows.

    Args:
        lines: The table's lines.
        table: Where it has what.
        with_blank: Whether a blank line is a record with a fault, rather than none.
    """
    pending: list[tuple[int, Line]] = []
    numbered = enumerate(lines, 1)
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
        used: int | None = 0
        if len(line.text) <= _MAX_FIELD_CHARS and is_open(line.text, table.dialect):
            used = _closing(line, pending, numbered, table)
        if used is None:
            yield Record([], number, line.text, line.is_utf, "a quote is opened and not closed")
            continue
        parts = [line, *(following for _, following in pending[:used])]
        del pending[:used]
        is_utf = all(part.is_utf for part in parts)
        try:
            fields = _cut_lines([part.text for part in parts], table.dialect)
        except csv.Error as error:
            yield Record([], number, line.text, is_utf, str(error))
        else:
            yield Record(_whole(fields, table), number, line.text, is_utf)


def _whole(fields: list[str], table: Table) -> list[str]:
    """Returns the fields of a record whose last one, a caption, has delimiters in it and no quotes."""
    if len(fields) <= table.num_columns or table.caption != table.num_columns - 1:
        return fields
    return [*fields[: table.caption], table.dialect.delimiter.join(fields[table.caption :])]


def _closing(
    line: Line, pending: list[tuple[int, Line]], numbered: Iterator[tuple[int, Line]], table: Table
) -> int | None:
    """Returns how many of the lines after one close its quote; None where they do not, or are records themselves."""
    text = line.text
    for used in range(1, _MAX_QUOTED_LINES + 1):
        if len(pending) < used:
            if (item := next(numbered, None)) is None:
                return None
            pending.append(item)
        following = pending[used - 1][1].text
        if _is_record(following, table):
            return None
        text += "\n" + following
        if not is_open(text, table.dialect):
            return used if _is_strict(text, table) else None
    return None


def _is_strict(text: str, table: Table) -> bool:
    """Tells whether each quote of a record stands where one may: else it closes on the next one's opening quote."""
    with contextlib.suppress(csv.Error):
        return len(_cut_lines(text.split("\n"), table.dialect, strict=True)) >= table.num_columns
    return False


def _is_record(line: str, table: Table) -> bool:
    """Tells whether a line is a whole record by itself: in the image's place there is the name of one."""
    with contextlib.suppress(csv.Error):
        row = cut(line, table.dialect)
        return len(row) >= table.num_columns and _names_image(row, table.image)
    return False


def _cut_lines(lines: Sequence[str], dialect: Dialect, strict: bool = False) -> list[str]:
    escape = dialect.escape
    ended = [*(f"{line}\n" for line in lines[:-1]), lines[-1]]
    reader = csv.reader(
        ended, delimiter=dialect.delimiter, escapechar=escape, doublequote=escape is None, strict=strict
    )
    return next(reader, [])
