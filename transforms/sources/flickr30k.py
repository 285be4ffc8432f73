"""Flickr30k and Flickr8k captions: token files and the csv shapes they go round in (Young et al. 2014)."""

import csv
import dataclasses
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, ClassVar, NamedTuple

from transforms.errors import InputError
from transforms.sources.annotations import AnnotationSource
from transforms.sources.parts import Bad, Caption, Image

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

_IMAGE_COLUMNS = ("image", "image_name", "filename", "file_name")
_CAPTION_COLUMNS = ("caption", "comment", "raw")
_NUMBER_COLUMN = "comment_number"

_TOKEN = re.compile(r"(?P<image>[^\t]*?)(?:#(?P<number>\d{1,9}))?\t(?P<text>.*)", re.S)
_NO_SECOND_SEPARATOR = re.compile(r"\s*(?P<number>\d{1,9})\s+(?P<text>\S.*)", re.S)
_NUMBER = re.compile(r"\s*\d{1,9}\s*")
# What is before the first separator tells the shape: a header's name, or an image's, maybe with `#0`
_FIRST_FIELD = re.compile(
    rf"\s*(?:(?:{'|'.join((*_IMAGE_COLUMNS, 'raw'))})|\"?[^\t|,]+\.\w{{2,5}}(?:#\d+)?)\"? *([\t|,])", re.I
)
# An image's line inside a quoted caption: the quote before it was never closed
_SWALLOWED_LINE = re.compile(r"\n[^\n,]+\.(?:jpe?g|png),", re.I)

_LINES_TO_TELL = 100

_Parts = Iterator[Caption | Bad]


@dataclasses.dataclass(frozen=True)
class Flickr30kSource(AnnotationSource):
    """Caption files with a line a caption. A row is an image, in the order in which the lines name them.

    Which of the shapes a file has is told from its lines:

    - `NAME.jpg#0<TAB>caption`: `results_20130124.token`, `Flickr8k.token.txt`
    - `NAME.jpg| 0| caption`: Kaggle's `results.csv`
    - `NAME.jpg,caption`, quoted: Kaggle's `captions.txt`; with a header also other orders of the columns, and
      `raw` with a JSON list of captions (Hugging Face's `flickr_annotations_30k.csv`)
    """

    captions_name_images: ClassVar[bool] = True

    def folders(self, name: str) -> Sequence[str]:
        """Returns the places where the data sets have been published or unpacked."""
        return FOLDERS

    def parts(self, url: str, file: IO[bytes]) -> Iterator[Image | Caption | Bad]:
        """Parses the lines; one that cannot be parsed is `Bad`."""
        # A lone carriage return does not end a line
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="\n")
        separator = _separator(url, itertools.islice(text, _LINES_TO_TELL))
        text.seek(0)
        yield from {"\t": _tokens, "|": _piped, ",": _csv}[separator](text)
        text.detach()  # the file is the caller's to close


def _separator(url: str, lines: Iterable[str]) -> str:
    blank = True
    for line in lines:
        if match := _FIRST_FIELD.match(line):
            return match[1]
        blank = blank and not line.strip()
    if blank:
        return "\t"
    raise InputError(
        f"{url} has no captions that can be told: expected lines such as 'NAME.jpg#0<TAB>caption', "
        "'NAME.jpg| 0| caption' or 'NAME.jpg,caption'."
    )


def _tokens(lines: Iterable[str]) -> _Parts:
    for ordinal, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = _TOKEN.fullmatch(line.rstrip("\r\n"))
        if match and match["image"].strip():
            yield Caption(match["image"].strip(), int(match["number"] or 0), match["text"])
        else:
            yield _bad(ordinal, "NAME.jpg#0<TAB>caption", line)


def _piped(lines: Iterable[str]) -> _Parts:
    for ordinal, line in enumerate(lines, 1):
        image, *fields = (field.strip() for field in line.split("|", 2))
        if (not image and not fields) or image.lower() in _IMAGE_COLUMNS:
            continue
        if image and len(fields) == 2 and _NUMBER.fullmatch(fields[0]):
            yield Caption(image, int(fields[0]), fields[1])
        elif image and len(fields) == 1 and (match := _NO_SECOND_SEPARATOR.fullmatch(fields[0])):
            # As `2199200615.jpg| 4   A dog runs across the grass .` in the published file
            yield Caption(image, int(match["number"]), match["text"], repaired=True)
        else:
            yield _bad(ordinal, "NAME.jpg| 0| caption", line)


def _csv(lines: Iterable[str]) -> _Parts:
    reader = csv.reader(lines)
    columns = None
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Bad(f"lines {first} to {reader.line_num}: {error}")
            continue
        if not any(field.strip() for field in row):
            continue
        if columns is None:
            columns = _columns(row)
            if columns.header:
                continue
        yield from _csv_row(row, columns, first, reader.line_num)


class _Columns(NamedTuple):
    """Where a csv file has what."""

    image: int
    caption: int
    number: int | None
    num_columns: int
    header: bool
    json: bool


def _columns(row: Sequence[str]) -> _Columns:
    """Returns the columns that a header names; without a header, `image,caption`."""
    names = [name.strip().lower() for name in row]
    image = next((names.index(name) for name in _IMAGE_COLUMNS if name in names), None)
    caption = next((names.index(name) for name in _CAPTION_COLUMNS if name in names), None)
    if image is None or caption is None:
        return _Columns(0, 1, None, 2, header=False, json=False)
    number = names.index(_NUMBER_COLUMN) if _NUMBER_COLUMN in names else None
    return _Columns(image, caption, number, len(names), header=True, json=names[caption] == "raw")


def _csv_row(row: list[str], columns: _Columns, first: int, last: int) -> _Parts:
    if columns.caption == columns.num_columns - 1 and len(row) > columns.num_columns:
        row = [*row[: columns.caption], ",".join(row[columns.caption :])]  # a comma that was not quoted
    if len(row) != columns.num_columns or not row[columns.image].strip():
        yield _bad(first, "NAME.jpg,caption", ",".join(row))
        return
    image, caption = row[columns.image].strip(), row[columns.caption]
    number = row[columns.number].strip() if columns.number is not None else "0"
    if _SWALLOWED_LINE.search(caption):
        yield Bad(f"lines {first} to {last}: a quote that is opened in line {first} is not closed there")
    elif columns.json:
        yield from _json_captions(image, caption, first)
    elif not _NUMBER.fullmatch(number):
        yield _bad(first, "a number of the caption", number)
    else:
        yield Caption(image, int(number), caption)


def _json_captions(image: str, encoded: str, line: int) -> _Parts:
    try:
        captions = json.loads(encoded)
    except ValueError:
        captions = None
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        yield _bad(line, "a JSON list of captions", encoded)
        return
    for number, caption in enumerate(captions):
        yield Caption(image, number, caption.encode("utf-8", "replace").decode())


def _bad(line: int, expected: str, found: str) -> Bad:
    return Bad(f"line {line}: expected {expected}, found {found.strip()[:80]!r}")
