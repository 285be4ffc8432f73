"""The whole thing on data that it draws itself: `diptych demo`. No network, no account.

diptych demo --output demo
"""

import argparse
import os
import time
from pathlib import Path

from pipelines.contact_sheet import contact_sheet
from pipelines.options import PrepareOptions
from pipelines.prepare import prepare
from pipelines.scene_folders import SceneFolders, write_data_set
from pipelines.summary import summary
from pipelines.verify import verify
from transforms.errors import DiptychError, OptionError
from transforms.storage import output_errors


def add_demo_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `diptych demo`."""
    parser.add_argument("--output", default="demo", metavar="DIR", help="local folder (default demo)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawings (default 0)")
    parser.add_argument(
        "--scenes", type=int, default=3000, metavar="N", help="how many to draw (default 3000)"
    )


def demo(output: str, seed: int = 0, num_scenes: int = 3000) -> None:
    """Draws a data set, prepares it, verifies the result, and says where to look.

    Args:
        output: A local folder: the data go to `data`, the result to `out` in it.
        seed: Of the drawings.
        num_scenes: How many.

    Raises:
        OptionError: A number is out of bounds, or `output` holds another demo.
        OutputError: The folder cannot be written.
    """
    start = time.monotonic()
    data, out = Path(output) / "data", os.path.join(output, "out")
    print(f"1. drawing {num_scenes:,} captioned scenes to {data}", flush=True)
    folders = _draw(data, num_scenes, seed)
    print(f"   {time.monotonic() - start:.1f} s, as COCO, Flickr30k and WebDataset")
    print(f"2. diptych prepare --input {folders.coco} --output {out}", flush=True)
    start = time.monotonic()
    result = prepare(PrepareOptions(inputs=(str(folders.coco),), output=out))
    print(_indent(summary(result, time.monotonic() - start)))
    print(f"3. diptych verify {out}", flush=True)
    findings = verify(out)
    print(_indent("\n".join(findings.lines())))
    if findings.problems:
        raise DiptychError(
            f"{out} is not what it should be, see above. Delete {output} and run the demo again."
        )
    sheet = os.path.join(output, "sheet.png")
    with output_errors(sheet):
        contact_sheet(out).save(sheet)
    print(f"Look at {sheet}, or with Hugging Face datasets (pip install datasets):")
    print(
        f'   datasets.load_dataset("parquet", data_files="{out}/images/*.parquet", split="train")[0]["image"]'
    )


def _draw(data: Path, num_scenes: int, seed: int) -> SceneFolders:
    try:
        with output_errors(str(data)):
            return write_data_set(str(data), num_scenes, seed)
    except ValueError as error:
        raise OptionError(f"The demo cannot be drawn: {error}.") from error


def _indent(text: str) -> str:
    return "\n".join(f"   {line}" for line in text.splitlines())
