"""The same input gives the same files, rejects too, in another process with another hash seed and other addresses."""

import io
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diptych.transforms.schemas import REASONS

REPOSITORY = Path(__file__).parents[2]
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "PCX")


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Returns bytes as a bad disk or a broken download gives them."""
    kind = draw.randrange(5)
    if kind == 0:
        return data[: draw.randrange(len(data))]
    if kind == 1:
        return bytes(draw.randrange(256) for _ in range(draw.randrange(200)))
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 30)):
        changed[draw.randrange(min(len(data), 600 if kind == 2 else len(data)))] = draw.randrange(256)
    return bytes(changed)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A tar and a folder of images in ten formats, most of them damaged, with captions that are odd as well."""
    draw = random.Random(7)
    whole = []
    for number, format in enumerate(FORMATS):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format)
        whole.append(buffer.getvalue())
    folder = tmp_path / "data"
    (folder / "tars").mkdir(parents=True)
    (folder / "files").mkdir()
    for number in range(80):
        image = whole[number % len(whole)]
        path = folder / "files" / f"{number:03d}.{'jpg' if number % 2 else 'png'}"
        path.write_bytes(image if number % 4 == 0 else damaged(image, draw))
    with tarfile.open(folder / "tars" / "a.tar", "w") as tar:
        for number in range(120):
            image = whole[number % len(whole)]
            caption = draw.choice(["a <b>dog</b>", "caf\xe9", "\udcff", "<PERSON> runs", "", "狗"])
            members = {"jpg": image if number % 4 == 0 else damaged(image, draw)}
            members["txt"] = caption.encode("utf-8", "surrogateescape")
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{number:04d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return folder


def prepare(data: Path, out: Path, hash_seed: int) -> dict[str, bytes]:
    command = [sys.executable, "-m", "diptych", "prepare", f"--input={data}", f"--output={out}"]
    command += ["--quiet", "--chunk_rows=7", "--keep_rejected_bytes"]
    # An address that a message quotes differs with what was allocated before
    env = os.environ | {"PYTHONHASHSEED": str(hash_seed), "DIPTYCH_TEST_PADDING": "x" * 4096 * hash_seed}
    subprocess.run(command, cwd=REPOSITORY, env=env, check=True, timeout=100)
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["tars", "files"])
def test_two_processes_write_the_same_bytes(data, tmp_path, kind):
    first = prepare(data / kind, tmp_path / "first", 1)
    second = prepare(data / kind, tmp_path / "second", 2)
    assert first == second
    assert sum(name.startswith("rejects/image/") for name in first) > 5
    assert {name.split("/")[1] for name in first if name.startswith("rejects/")} <= set(REASONS)
