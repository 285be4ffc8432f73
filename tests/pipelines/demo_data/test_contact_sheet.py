import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageColor

from diptych.pipelines.demo_data.contact_sheet import (
    _CELL_PX,
    _GAP_PX,
    _GIVEN,
    _IMAGE_PX,
    _SAID,
    contact_sheet,
)


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture
def out(tmp_path):
    """An output with three images, two of them captioned, and three made of two prompts."""
    rows = {
        "images": [
            {"key": f"k{i}", "image": png(colour), "captions": ["what people said"]}
            for i, colour in enumerate(("red", "green", "blue"))
        ],
        "captions": [{"key": f"k{i}", "caption": "what a model says"} for i in range(2)],
        "generated": [
            {"key": key, "prompt": f"draw {key}", "image": png(colour)}
            for key, colour in (("p0", "yellow"), ("p0", "black"), ("p1", "cyan"))
        ],
    }
    for dataset, values in rows.items():
        (tmp_path / dataset).mkdir()
        table = pa.Table.from_pylist(values)
        pq.write_table(table, tmp_path / dataset / "a-00000.parquet", write_page_checksum=True)
    (tmp_path / "_job.json").write_text("{}")
    totals = {dataset: {"files": 1, "written": len(values)} for dataset, values in rows.items()}
    (tmp_path / "_SUCCESS.json").write_text(json.dumps(totals))
    return tmp_path


def colour_at(sheet, row, column):
    middle = _GAP_PX + _IMAGE_PX // 2
    return sheet.getpixel((column * _CELL_PX + middle, row * (_IMAGE_PX + _GAP_PX) + middle))


def colours_right_of(sheet, row, column):
    """Returns the colours of the text beside an image."""
    left, top = column * _CELL_PX + _GAP_PX + _IMAGE_PX, row * (_IMAGE_PX + _GAP_PX) + _GAP_PX
    part = sheet.crop((left + 2, top, (column + 1) * _CELL_PX, top + _IMAGE_PX))
    return {tuple(pixel) for pixel in np.asarray(part).reshape(-1, 3).tolist()}


def test_images_beside_captions_then_prompts_beside_images(out):
    sheet = contact_sheet(str(out), columns=2)
    cells = {(0, 0): "red", (0, 1): "green", (1, 0): "blue", (2, 0): "yellow", (2, 1): "cyan"}
    for place, colour in cells.items():
        assert colour_at(sheet, *place) == ImageColor.getrgb(colour)
    said, given = ImageColor.getrgb(_SAID), ImageColor.getrgb(_GIVEN)
    assert {said, given} <= colours_right_of(sheet, 0, 0)
    assert said not in colours_right_of(sheet, 1, 0)  # of that image nothing was said
    assert (0, 0, 0) in colours_right_of(sheet, 2, 0)
    assert sheet.height == 3 * (_IMAGE_PX + _GAP_PX) + _GAP_PX


def test_no_more_than_asked_for(out):
    sheet = contact_sheet(str(out), num_images=1, columns=2)
    assert sheet.height == 2 * (_IMAGE_PX + _GAP_PX) + _GAP_PX
    assert colour_at(sheet, 0, 1) == (255, 255, 255)
