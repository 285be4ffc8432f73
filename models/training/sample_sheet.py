"""A sheet of samples that shows the progress of a training: prompts, their real images, and the drawn ones."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from diptych.models.files.weights import write_file
from diptych.models.pixels import Pixels

_TEXT_PX, _GAP_PX, _LINE_PX, _LINE_CHARS, _MIN_SIDE_PX = 220, 6, 16, 34, 96


class SheetRow(NamedTuple):
    """A row of the sheet.

    Attributes:
        prompt: The prompt, written on the left.
        real: The image of the prompt's row, (S, S, 3).
        samples: The images drawn from the prompt, (S, S, 3) each.
    """

    prompt: str
    real: Pixels
    samples: Sequence[Pixels]


def write_sheet(path: Path, rows: Sequence[SheetRow]) -> None:
    """Writes a PNG with a row a prompt: the prompt, the real image, the samples; small images are enlarged.

    Raises:
        ModelError: The file cannot be written.
    """
    side = max(_MIN_SIDE_PX, rows[0].real.shape[0])
    columns = 1 + max(len(row.samples) for row in rows)
    width = _TEXT_PX + columns * (side + _GAP_PX) + 2 * _GAP_PX
    sheet = Image.new("RGB", (width, len(rows) * (side + _GAP_PX) + _GAP_PX), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, row in enumerate(rows):
        top = _GAP_PX + number * (side + _GAP_PX)
        for line, text in enumerate(textwrap.wrap(row.prompt, _LINE_CHARS)[: side // _LINE_PX]):
            draw.text((_GAP_PX, top + line * _LINE_PX), text, "black", font)
        for column, pixels in enumerate((row.real, *row.samples)):
            # The real image stands a little apart.
            left = _TEXT_PX + column * (side + _GAP_PX) + (_GAP_PX if column else 0)
            image = Image.fromarray(pixels)
            if image.width != side:
                image = image.resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(image, (left, top))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_file(path, buffer.getvalue())
