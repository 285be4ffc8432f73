"""A picture of a data set: images beside their captions, on one sheet."""

import io
import textwrap
from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from transforms.storage import join, locate

_IMAGE_PX, _TEXT_PX, _GAP_PX = 160, 250, 12
_LINE_CHARS, _MAX_LINES = 38, 9


def contact_sheet(output: str, num_images: int = 12, columns: int = 3) -> Image.Image:
    """Returns the first images of an output folder beside their captions.

    Args:
        output: The output folder of a job that wrote `images`.
        num_images: How many, at most.
        columns: How many in a row.
    """
    rows = [row for row, _ in zip(_rows(output), range(num_images), strict=False)]
    cell_px = _IMAGE_PX + _TEXT_PX + 2 * _GAP_PX
    height = -(-max(len(rows), 1) // columns) * (_IMAGE_PX + _GAP_PX) + _GAP_PX
    sheet = Image.new("RGB", (columns * cell_px + _GAP_PX, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, row in enumerate(rows):
        left, top = i % columns * cell_px + _GAP_PX, i // columns * (_IMAGE_PX + _GAP_PX) + _GAP_PX
        picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        sheet.paste(picture.resize((_IMAGE_PX, _IMAGE_PX), Image.Resampling.LANCZOS), (left, top))
        lines = [
            line
            for caption in row["captions"]
            for line in textwrap.wrap(caption, _LINE_CHARS, initial_indent="- ", subsequent_indent="  ")
        ]
        draw.multiline_text(
            (left + _IMAGE_PX + _GAP_PX, top), "\n".join(lines[:_MAX_LINES]), "black", font, spacing=3
        )
    return sheet


def _rows(output: str) -> Iterator[dict[str, Any]]:
    fs, path = locate(join(output, "images"))
    for name in sorted(fs.ls(path, detail=False)):
        with fs.open(name, "rb") as file:
            for batch in pq.ParquetFile(file).iter_batches(16, columns=["image", "captions"]):
                yield from batch.to_pylist()
