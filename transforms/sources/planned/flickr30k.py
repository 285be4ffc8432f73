"""Flickr30k and Flickr8k captions: token files and the csv shapes they go round in (Young et al. 2014)."""

import dataclasses
import io
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import IO, ClassVar

from diptych.models.files.location import redacted
from diptych.transforms import storage
from diptych.transforms.errors import OptionError
from diptych.transforms.sources.base import ColumnNames
from diptych.transforms.sources.planned.annotations import AnnotationSource
from diptych.transforms.sources.planned.entries import BadEntry, Caption, Fields, Image
from diptych.transforms.sources.text.encoding import Line, find_encoding, lines
from diptych.transforms.sources.text.tables import (
    CERTAIN,
    IMAGE_EXTENSION,
    IMAGE_NAMES,
    Record,
    Table,
    column_notes,
    find_table,
    is_header,
    list_of_texts,
    names_images,
    records,
)

_BESIDE = (
    "flickr30k-images",
    "flickr30k_images/flickr30k_images",
    "flickr30k_images",
    "Flicker8k_Dataset/Flicker8k_Dataset",  # sic, as published
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
    "images",
    "Images",
)
FOLDERS = tuple(above + folder for above in ("", "../") for folder in _BESIDE)
"""Where the data sets have their images, relative to the captions' folder."""

_TOKEN = re.compile(r"(?P<image>[^\t]*?)(?:#(?P<number>\d{1,9}))?\t(?P<text>.*)", re.S)
_NO_SECOND_SEPARATOR = re.compile(r"\s*(?P<number>\d{1,9})\s+(?P<text>\S.*)", re.S)
_NUMBER = re.compile(r"\s*\d{1,9}(?:\.0)?\s*")
_TOKEN_LINE = re.compile(r"\s*[^\t|,]+(?:#\d+|\.\w{2,5})\t")
_PIPED_LINE = re.compile(r"\s*[^|\t]+\.\w{2,5}\|\s*\d+\s*(?:\||\s\S)")

_SPACED = re.compile(
    rf"(?P<image>\S+\.{IMAGE_EXTENSION})(?:#(?P<number>\d{{1,9}}))? +(?P<text>\S.*)", re.I | re.S
)

_LINES_TO_TELL = 100
_HEAD_BYTES = 1 << 16

_Parts = Iterator[Caption | Fields | BadEntry]


@dataclasses.dataclass(frozen=True)
class Flickr30kSource(AnnotationSource):
    """Caption files with a line a caption. A row is an image, in the order in which the lines name them.

    Which of the shapes a file has is told from its lines:

    - `NAME.jpg#0<TAB>caption`: `results_20130124.token`, `Flickr8k.token.txt`
    - `NAME.jpg| 0| caption`: Kaggle's `results.csv`
    - `NAME.jpg caption`, where a blank is all that parts them
    - a table of any delimiter and order of columns (`diptych.transforms.sources.text.tables`): Kaggle's `captions.txt`;
      a caption may be a list of captions, in JSON or Python (Hugging Face's `flickr_annotations_30k.csv`)
    """

    format: ClassVar[str] = "flickr30k"

    captions_name_images: ClassVar[bool] = True

    column_flags: ClassVar[frozenset[str]] = frozenset(
        {"image_column", "caption_column", "key_column", "metadata_columns"}
    )

    def folders(self, name: str) -> Sequence[str]:
        """Returns the places where the data sets have been published or unpacked."""
        return FOLDERS

    def column_notes(self) -> tuple[str, ...]:
        """Returns what the first lines say of columns that might have been meant and are not read."""
        notes = []
        for url in self.annotations:
            fs, path = storage.locate(url)
            with storage.input_errors(url), fs.open(path, "rb") as file:
                start = io.BytesIO(file.read(_HEAD_BYTES))
            head = [
                line.text for line in itertools.islice(lines(start, find_encoding(start)), _LINES_TO_TELL)
            ]
            if len(start.getvalue()) == _HEAD_BYTES:
                head = head[:-1] or head  # the last line may be cut off
            if _shape(head) is None:
                notes += column_notes(redacted(url), head, self.columns, self.metadata_columns)
        return tuple(notes)

    def parts(self, url: str, file: IO[bytes]) -> Iterator[Image | Caption | Fields | BadEntry]:
        """Parses the lines; one that cannot be parsed is `BadEntry`."""
        encoding = find_encoding(file)
        head = [line.text for line in itertools.islice(lines(file, encoding), _LINES_TO_TELL)]
        file.seek(0)
        wants_columns = self.columns != ColumnNames() or bool(self.metadata_columns)
        shape = _shape(head)
        if shape and wants_columns:
            raise OptionError(
                f"{url} has lines as {shape[1]!r}, which have no columns to name: leave out --image_column, "
                "--caption_column, --key_column and --metadata_columns."
            )
        if shape:
            yield from shape[0](lines(file, encoding))
            return
        if not any(line.strip() for line in head):
            return
        table = find_table(url, head, self.columns, self.metadata_columns)
        if table is None:
            raise OptionError(
                f"{url} has no captions that can be told: expected lines such as 'NAME.jpg#0<TAB>caption', "
                f"'NAME.jpg| 0| caption' or 'NAME.jpg,caption', found {head[0].strip()[:80]!r}. Name its columns with "
                "--image_column and --caption_column."
            )
        yield from _table(lines(file, encoding), table)


def is_of_images(head: Sequence[str]) -> bool:
    """Tells whether the first lines of a text are captions of images, in any of the shapes."""
    return _shape(head) is not None or names_images(head)


def _shape(head: Sequence[str]) -> tuple[Callable[[Iterator[Line]], "_Parts"], str] | None:
    """Returns the parser of lines that are no table, with an example of them; None of a table."""
    filled = [line for line in head if line.strip()]
    if filled and _TOKEN_LINE.match(filled[0]):
        return _tokens, "NAME.jpg#0<TAB>caption"
    if sum(bool(_PIPED_LINE.match(line)) for line in filled[:2]):
        return _piped, "NAME.jpg| 0| caption"
    body = filled[1:] if filled and is_header(filled[0].split()) else filled
    if body and sum(_SPACED.fullmatch(line) is not None for line in body) >= CERTAIN * len(body):
        return _spaced, "NAME.jpg caption"
    return None


def _tokens(lines: Iterator[Line]) -> _Parts:
    for ordinal, (line, is_utf, _) in enumerate(lines, 1):
        if not line.strip():
            continue
        match = _TOKEN.fullmatch(line)
        if match and match["image"].strip():
            image, number = match["image"].strip(), int(match["number"] or 0)
            yield Caption(image, number, match["text"], redecoded=not is_utf)
        else:
            yield _bad(ordinal, "NAME.jpg#0<TAB>caption", line)


def _spaced(lines: Iterator[Line]) -> _Parts:
    for ordinal, (line, is_utf, _) in enumerate(lines, 1):
        if match := _SPACED.fullmatch(line):
            yield Caption(match["image"], int(match["number"] or 0), match["text"], redecoded=not is_utf)
        elif line.strip() and not (ordinal == 1 and is_header(line.split())):
            yield _bad(ordinal, "NAME.jpg caption", line)


def _piped(lines: Iterator[Line]) -> _Parts:
    for ordinal, (line, is_utf, _) in enumerate(lines, 1):
        image, *fields = (field.strip() for field in line.split("|", 2))
        if (not image and not fields) or image.lower() in IMAGE_NAMES:
            continue
        if image and len(fields) == 2 and _NUMBER.fullmatch(fields[0]):
            yield Caption(image, int(float(fields[0])), fields[1], redecoded=not is_utf)
        elif image and len(fields) == 1 and (match := _NO_SECOND_SEPARATOR.fullmatch(fields[0])):
            # As `2199200615.jpg| 4   A dog runs across the grass .` in the published file
            yield Caption(image, int(match["number"]), match["text"], repaired=True)
        else:
            yield _bad(ordinal, "NAME.jpg| 0| caption", line)


def _table(lines: Iterator[Line], table: Table) -> _Parts:
    for ordinal, record in enumerate(records(lines, table)):
        if ordinal == 0 and table.has_header:
            continue
        yield from _record(record, table)


def _record(record: Record, table: Table) -> _Parts:
    row = record.fields
    if record.fault:
        yield BadEntry(f"line {record.line}: {record.fault}: {record.text.strip()[:80]!r}")
        return
    if len(row) != table.num_columns or not row[table.image].strip():
        expected = f"{table.num_columns} fields with the name of an image"
        yield _bad(record.line, expected, table.dialect.delimiter.join(row))
        return
    image, captions = row[table.image].strip(), [row[place] for place in table.captions]
    number = row[table.number].strip() if table.number is not None else "0"
    if table.key is not None or table.metadata:
        key = row[table.key].strip() or None if table.key is not None else None
        yield Fields(image, [row[place] for place in table.metadata], key)
    if not _NUMBER.fullmatch(number):
        yield _bad(record.line, "a number of the caption", number)
        return
    for caption in captions:
        if table.has_lists:
            yield from _listed_captions(image, caption, record.line)
        elif caption.strip() or len(captions) == 1:
            yield Caption(image, int(float(number)), caption, redecoded=not record.is_utf)


def _listed_captions(image: str, encoded: str, line: int) -> _Parts:
    captions = list_of_texts(encoded)
    if captions is None:
        yield _bad(line, "a list of captions", encoded)
        return
    for number, caption in enumerate(captions):
        yield Caption(image, number, caption.encode("utf-8", "replace").decode())


def _bad(line: int, expected: str, found: str) -> BadEntry:
    return BadEntry(f"line {line}: expected {expected}, found {found.strip()[:80]!r}")
