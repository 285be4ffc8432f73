"""A picture of a data set: images beside what a captioner says of them, and what people said, on one sheet."""

import io
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from pipelines.evaluate import read_candidates
from transforms.errors import InputError
from transforms.storage import join, locate

_IMAGE_PX, _TEXT_PX, _GAP_PX = 160, 250, 12
_LINE_CHARS, _MAX_LINES, _LINE_PX = 38, 9, 17
_SAID, _GIVEN = "#0b5fa5", "#777777"


def contact_sheet(output: str, num_images: int = 12, columns: int = 3) -> Image.Image:
    """Returns the first images of an output folder beside their captions; a captioner's, if there is one, comes first.

    Args:
        output: The output folder of a job that wrote `images`, and perhaps of one that wrote `captions` of them.
        num_images: How many, at most.
        columns: How many in a row.
    """
    rows = [row for row, _ in zip(_rows(output), range(num_images), strict=False)]
    said = _said(output, [row["key"] for row in rows])
    cell_px = _IMAGE_PX + _TEXT_PX + 2 * _GAP_PX
    height = -(-max(len(rows), 1) // columns) * (_IMAGE_PX + _GAP_PX) + _GAP_PX
    sheet = Image.new("RGB", (columns * cell_px + _GAP_PX, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, row in enumerate(rows):
        left, top = i % columns * cell_px + _GAP_PX, i // columns * (_IMAGE_PX + _GAP_PX) + _GAP_PX
        picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        sheet.paste(picture.resize((_IMAGE_PX, _IMAGE_PX), Image.Resampling.LANCZOS), (left, top))
        lines = [(line, _SAID) for line in textwrap.wrap(said.get(row["key"], ""), _LINE_CHARS)]
        for caption in row["captions"]:
            wrapped = textwrap.wrap(caption, _LINE_CHARS, initial_indent="- ", subsequent_indent="  ")
            lines += [(line, _GIVEN if said else "black") for line in wrapped]
        for number, (line, colour) in enumerate(lines[:_MAX_LINES]):
            place = left + _IMAGE_PX + _GAP_PX, top + number * _LINE_PX
            draw.text(place, line, colour, font)
    return sheet


def _said(output: str, keys: Sequence[str]) -> dict[str, str]:
    """Returns what a captioner says of images, by key; nothing where none was asked."""
    try:
        return {found.key: found.caption for found in read_candidates(output) if found.key in {*keys}}
    except InputError:
        return {}


def _rows(output: str) -> Iterator[dict[str, Any]]:
    fs, path = locate(join(output, "images"))
    for name in sorted(fs.ls(path, detail=False)):
        with fs.open(name, "rb") as file:
            for batch in pq.ParquetFile(file).iter_batches(16, columns=["key", "image", "captions"]):
                yield from batch.to_pylist()
