"""A picture of a data set: images beside their captions, then prompts beside the images made of them, on one sheet."""

import io
import itertools
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from diptych.transforms.output_layout import data_files
from diptych.transforms.storage import join, locate

_IMAGE_PX, _TEXT_PX, _GAP_PX = 160, 250, 12
_CELL_PX = _IMAGE_PX + _TEXT_PX + 2 * _GAP_PX
_LINE_CHARS, _MAX_LINES, _LINE_PX = 38, 9, 17
_SAID, _GIVEN, _PLAIN = "#0b5fa5", "#777777", "black"


class _Cell(NamedTuple):
    """An image and the texts beside it, each with its colour."""

    image: bytes
    texts: list[tuple[str, str]]


def contact_sheet(output: str, num_images: int = 12, columns: int = 3) -> Image.Image:
    """Returns the first images of an output folder beside their captions; a captioner's, if there is one, comes first.

    Below them are the first images that were made from text, if there are any, beside their prompts.

    Args:
        output: The output folder of a job that wrote `images`, and perhaps of those that wrote `captions` of them and
            `generated` ones.
        num_images: How many of each, at most.
        columns: How many in a row.
    """
    parts = [_captioned(output, num_images), _generated(output, num_images)]
    rows = [part[i : i + columns] for part in parts for i in range(0, len(part), columns)]
    height = max(1, len(rows)) * (_IMAGE_PX + _GAP_PX) + _GAP_PX
    sheet = Image.new("RGB", (columns * _CELL_PX + _GAP_PX, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for (row, cells), column in itertools.product(enumerate(rows), range(columns)):
        if column < len(cells):
            left, top = column * _CELL_PX + _GAP_PX, row * (_IMAGE_PX + _GAP_PX) + _GAP_PX
            picture = Image.open(io.BytesIO(cells[column].image)).convert("RGB")
            sheet.paste(picture.resize((_IMAGE_PX, _IMAGE_PX), Image.Resampling.LANCZOS), (left, top))
            for number, (line, colour) in enumerate(_lines(cells[column].texts)):
                place = left + _IMAGE_PX + _GAP_PX, top + number * _LINE_PX
                draw.text(place, line, colour, font)
    return sheet


def _lines(texts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    lines = []
    for text, colour in texts:
        lines += [(line, colour) for line in textwrap.wrap(text, _LINE_CHARS, subsequent_indent="  ")]
    return lines[:_MAX_LINES]


def _captioned(output: str, number: int) -> list[_Cell]:
    rows = list(itertools.islice(_rows(output, "images", ["key", "image", "captions"]), number))
    said = _said(output, [row["key"] for row in rows])
    colour = _GIVEN if said else _PLAIN
    return [
        _Cell(
            row["image"]["bytes"],
            [
                *((text, _SAID) for text in [said.get(row["key"])] if text),
                *((f"- {caption}", colour) for caption in row["captions"]),
            ],
        )
        for row in rows
    ]


def _generated(output: str, number: int) -> list[_Cell]:
    """Returns images that were made from text, of a prompt each image alone."""
    cells: dict[str, _Cell] = {}
    for row in _rows(output, "generated", ["key", "prompt", "image"]):
        if row["key"] not in cells:
            cells[row["key"]] = _Cell(row["image"]["bytes"], [(row["prompt"], _PLAIN)])
        if len(cells) == number:
            break
    return list(cells.values())


def _said(output: str, keys: Sequence[str]) -> dict[str, str]:
    """Returns what a captioner says of images, by key; nothing where none has run."""
    rows = _rows(output, "captions", ["key", "caption"])
    return {row["key"]: row["caption"] for row in rows if row["key"] in {*keys}}


def _rows(output: str, dataset: str, columns: list[str]) -> Iterator[dict[str, Any]]:
    for name in data_files(output, dataset):
        fs, path = locate(join(output, dataset, name))
        with fs.open(path, "rb") as file:
            for batch in pq.ParquetFile(file).iter_batches(16, columns=columns):
                yield from batch.to_pylist()
