import contextlib
import io
import re
import subprocess
from pathlib import Path

import datasets
import pytest
from PIL import Image, ImageColor

from diptych.pipelines import demo as demo_module
from diptych.pipelines.cli import main
from diptych.pipelines.demo import _beside, demo
from diptych.pipelines.demo_data.contact_sheet import _GIVEN, _SAID
from diptych.pipelines.demo_data.layouts import write_data_set
from diptych.pipelines.evaluate_captions import read_candidates
from diptych.pipelines.options.demo import DemoOptions
from diptych.pipelines.verify import Findings, verify
from diptych.transforms.errors import DiptychError, OptionError, OutputError

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A demo that is done, and the path that it was given."""
    folder = tmp_path_factory.mktemp("home") / "my demo"
    demo(DemoOptions(str(folder), 3, 100))
    return folder


@pytest.fixture(scope="module")
def shown(folder):
    """What the command says where all of it is done already."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["demo", f"--output={folder}", "--scenes=100", "--seed=3"]) == 0
    return said.getvalue()


def test_says_what_it_does_and_what_comes_of_it(folder, shown):
    for line in (
        f"1. drawing 100 captioned scenes to {folder}/data, as COCO, Flickr30k and WebDataset",
        f"2. diptych prepare --input {folder}/data/coco/annotations/captions_train2017.json --output {folder}/train",
        "   read      90 rows",
        f"3. diptych train word2vec --input {folder}/train --output {folder}/models/word2vec --epochs 5 "
        "--vector_size 64 --patience 5",
        f"   written   50 to {folder}/out/embeddings",
        f"   written   10 to {folder}/out/captions",
        "   captions: 1 shards, 1 files: 10 rows read = 10 written + 0 rejected",
        f"   written   50 to {folder}/out/generated",
        "   generated: 1 shards, 1 files: 50 rows read = 50 written + 0 rejected",
        "   complete and sound",
    ):
        assert line in shown.splitlines()
    assert shown.count("nothing to do: an earlier run has finished this") == 2
    assert re.search(r"colour and shape are right in \d+ of 10 captions", shown)
    assert re.search(r"^train vae, captioner +\d+\.\d s", shown, re.MULTILINE)
    assert {path.name for path in folder.iterdir()} == {"data", "train", "models", "out", "sheet.png"}
    assert verify(str(folder / "out")).problems == []


def test_its_commands_are_those_of_the_command_line(shown, capsys):
    commands = re.findall(
        r"^(?:\d+\.|   and beside it:) diptych ((?:train|run|evaluate images) .*)$", shown, re.MULTILINE
    )
    assert len(commands) == 6
    for command in commands:
        arguments = [
            argument.replace("my_demo", "my demo")
            for argument in command.replace("my demo", "my_demo").split()
        ]
        if arguments[0] == "train" and arguments[1] != "word2vec":
            arguments.append("--device=cpu")
        # a flag that differed would be another training, or another run: refused
        assert main(arguments) == 0
        assert arguments[0] == "evaluate" or "nothing to do" in capsys.readouterr().out


def test_what_it_says_at_the_end_works(shown):
    code = re.search(r"^ +(datasets\.load_dataset\(.*)$", shown, re.MULTILINE)
    assert code
    image = eval(code[1], {"datasets": datasets})
    assert image.size == (224, 224)
    image.close()


def test_the_sheet_shows_what_the_captioner_says(folder):
    with Image.open(folder / "sheet.png") as sheet:
        colours = {colour for _, colour in sheet.getcolors(1 << 24)}
    assert {ImageColor.getrgb(_SAID), ImageColor.getrgb(_GIVEN)} <= colours


def test_the_captioner_has_learnt_something(folder):
    [candidate, *_] = read_candidates(str(folder / "out"))
    assert {*candidate.caption.split()} & {"a", "the", "there"}


def test_another_demo_in_the_same_place_is_refused(tmp_path):
    write_data_set(str(tmp_path / "data"), 100, seed=0)
    with pytest.raises(OptionError, match="to be drawn there; remove the folder"):
        demo(DemoOptions(str(tmp_path), num_scenes=101))


@pytest.mark.parametrize(("seed", "num_scenes", "message"), [(0, 99, "--scenes is 99"), (-1, 100, "seed -1")])
def test_bounds_are_said(tmp_path, seed, num_scenes, message):
    with pytest.raises(OptionError, match=message):
        demo(DemoOptions(str(tmp_path), seed, num_scenes))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file/data cannot be written"):
        demo(DemoOptions(str(tmp_path / "file"), num_scenes=100))


class TestBeside:
    def test_what_fails_is_said(self, tmp_path):
        nowhere = str(tmp_path / "nowhere")
        failing = ["train", "word2vec", "--input", nowhere, "--output", str(tmp_path / "model")]
        with (
            pytest.raises(DiptychError, match=r"diptych train word2vec .* failed: .*nowhere"),
            _beside(failing),
        ):
            pass

    def test_it_ends_with_what_it_is_beside(self, monkeypatch):
        started = []
        popen = subprocess.Popen
        monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[0])
        with pytest.raises(KeyError), _beside(["train", "--help"]):
            raise KeyError
        assert started[0].returncode is not None


def test_an_unsound_result_fails(folder, monkeypatch, capsys):
    monkeypatch.setattr(demo_module, "verify", lambda _: Findings(["a file is gone"], {}))
    with pytest.raises(DiptychError, match="is not what it should be"):
        demo(DemoOptions(str(folder), 3, 100))
    assert "PROBLEM a file is gone" in capsys.readouterr().out
