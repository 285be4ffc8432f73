import re
from pathlib import Path

import datasets
import pytest

from pipelines import demo as demo_module
from pipelines.cli import main
from pipelines.demo import demo
from pipelines.verify import Findings, verify
from transforms.errors import DiptychError, OptionError, OutputError

REPOSITORY = Path(__file__).parents[2]


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_draws_prepares_verifies_and_says_where_to_look(tmp_path, capsys):
    out = tmp_path / "my demo"
    assert main(["demo", f"--output={out}", "--scenes=40", "--seed=3"]) == 0
    shown = capsys.readouterr().out
    for line in (
        f"1. drawing 40 captioned scenes to {out}/data",
        f"2. diptych prepare --input {out}/data/coco --output {out}/out",
        "   read      40 rows",
        f"   written   40 to {out}/out/images",
        "   rejected  0",
        f"3. diptych verify {out}/out",
        "   images: 2 shards, 2 files: 40 rows read = 40 written + 0 rejected",
        "   complete and sound",
    ):
        assert line in shown.splitlines()
    assert {path.name for path in out.iterdir()} == {"data", "out", "sheet.png"}
    assert {path.name for path in (out / "data").iterdir()} == {
        "coco",
        "flickr30k",
        "webdataset",
        "scenes.json",
    }
    assert verify(str(out / "out")).problems == []


def test_what_it_says_at_the_end_works(tmp_path, capsys):
    demo(str(tmp_path / "demo"), num_scenes=10)
    code = re.search(r"^ +(datasets\.load_dataset\(.*)$", capsys.readouterr().out, re.MULTILINE)
    assert code
    image = eval(code[1], {"datasets": datasets})
    assert image.size == (224, 224)
    image.close()


def test_is_the_same_each_time_and_does_nothing_twice(tmp_path, capsys):
    for name in ("one", "two"):
        demo(str(tmp_path / name), seed=5, num_scenes=12)
    assert files_in(tmp_path / "one") == files_in(tmp_path / "two")
    demo(str(tmp_path / "one"), seed=5, num_scenes=12)
    assert "nothing to do: an earlier run has finished this" in capsys.readouterr().out
    demo(str(tmp_path / "three"), seed=6, num_scenes=12)
    assert files_in(tmp_path / "one") != files_in(tmp_path / "three")


def test_another_demo_in_the_same_place_is_refused(tmp_path):
    demo(str(tmp_path), num_scenes=12)
    with pytest.raises(OptionError, match="to be drawn there; remove the folder"):
        demo(str(tmp_path), num_scenes=13)


@pytest.mark.parametrize(("seed", "num_scenes"), [(0, 9), (-1, 10)])
def test_bounds_are_said(tmp_path, seed, num_scenes):
    with pytest.raises(OptionError, match=f"num_scenes is {num_scenes} and seed {seed}; draw at least 10"):
        demo(str(tmp_path), seed, num_scenes)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file/data cannot be written"):
        demo(str(tmp_path / "file"), num_scenes=10)


def test_an_unsound_result_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_module, "verify", lambda _: Findings(["a file is gone"], {}))
    with pytest.raises(DiptychError, match="is not what it should be"):
        demo(str(tmp_path / "demo"), num_scenes=10)
    assert "PROBLEM a file is gone" in capsys.readouterr().out
