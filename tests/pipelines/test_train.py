import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from PIL import Image

from diptych.models.base import CaptionOptions, TextOptions
from diptych.models.captioning.captioner import Captioner
from diptych.models.errors import ModelError
from diptych.models.text.word2vec import Word2Vec
from diptych.models.training import captioner
from diptych.models.training.data import CaptionData, History, Progress
from diptych.models.training.options import CaptionerTraining
from diptych.pipelines import train as train_module
from diptych.pipelines.cli import main
from diptych.pipelines.demo_data.layouts import SceneFolders, write_data_set
from diptych.pipelines.lifecycle.output_folder import DatasetClaim, check_output
from diptych.pipelines.options.prepare import PrepareOptions
from diptych.pipelines.options.train import add_train_flags, train_options
from diptych.pipelines.prepare import prepare
from diptych.transforms.errors import OutputError
from diptych.transforms.finish import read_success
from diptych.transforms.images.resize import ResizeOptions

SMALL = ("--encoder=squeezenet1_1", "--encoder_weights=none", "--fine_tune", "--encoder_size=64")
NUM_TRAIN, NUM_VAL = 54, 6


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> SceneFolders:
    return write_data_set(str(tmp_path_factory.mktemp("scenes") / "data"), NUM_TRAIN + NUM_VAL, 0)


@pytest.fixture(scope="module")
def prepared(scenes: SceneFolders, tmp_path_factory: pytest.TempPathFactory) -> str:
    output = str(tmp_path_factory.mktemp("prepared") / "out")
    annotations = str(scenes.coco / "annotations/captions_train2017.json")
    prepare(
        PrepareOptions(inputs=(annotations,), output=output, resize=ResizeOptions(size_px=64), quiet=True)
    )
    return output


class FakeTrainer:
    """Stands in for `train_captioner`: reads its data, writes a model, and can fail half way.

    Attributes:
        calls: What it was given: data, output, options, device, cache.
        keys: Of the rows that it read, by split, of the last call.
        error: What it raises when it has made a checkpoint.
        prepared: When each prepared file had been written, by call.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[CaptionData, Path, CaptionerTraining, str, Path | None]] = []
        self.keys: dict[str, list[str]] = {}
        self.error: BaseException | None = None
        self.prepared: list[dict[str, int]] = []

    def __call__(
        self,
        data: CaptionData,
        output: Path,
        options: CaptionerTraining,
        device: str,
        on_progress: Callable[[Progress], None],
        cache: Path | None = None,
    ) -> History:
        self.calls.append((data, output, options, device, cache))
        found = (output.parent / "prepared").rglob("*.parquet")
        self.prepared.append({path.name: path.stat().st_mtime_ns for path in found})
        for name, batches in (("train", data.train), ("validation", data.validation)):
            self.keys[name] = [key for batch in batches() for key in batch.keys]
        on_progress(Progress("training", 0, data.num_train, data.num_train, 2.5))
        on_progress(Progress("validating", 0, data.num_validation, data.num_validation))
        (output / "_checkpoint.safetensors").touch()
        if self.error is not None:
            raise self.error
        (output / "model.safetensors").write_bytes(b"weights")
        (output / "config.json").write_text('{"kind": "cnn-lstm"}')
        scores = {"BLEU-1": 0.5, "BLEU-4": 0.2, "seconds": 1.0}
        return [
            {"epoch": i, "train_loss": 2.5, "validation_loss": 2.6, "CIDEr": cider, **scores}
            for i, cider in enumerate((0.4, 0.7, 0.6), start=1)
        ]


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> FakeTrainer:
    fake = FakeTrainer()
    monkeypatch.setattr(captioner, "train_captioner", fake)
    return fake


def run(*flags: object) -> int:
    return main(["train", *map(str, flags)])


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestCaptioner:
    def test_from_prepared_rows(self, trainer, prepared, tmp_path, capsys):
        model = tmp_path / "model"
        assert run("captioner", "--input", prepared, "--output", model, "--validation_share=0.2", *SMALL) == 0
        ((data, _, options, device, cache),) = trainer.calls
        assert (data.num_train, data.num_validation) == tuple(map(len, trainer.keys.values()))
        assert data.num_train + data.num_validation == NUM_TRAIN
        assert data.num_validation > 0
        assert (options.encoder, device, cache) == ("squeezenet1_1", "auto", None)
        assert files(model) == [
            *("README.md", "_SUCCESS.json", "_job.json", "config.json", "loss.png", "model.safetensors"),
            "model_card.json",
        ]
        captured = capsys.readouterr()
        assert captured.out.splitlines()[:4] == [
            "trained   cnn-lstm; kept epoch 2: BLEU-1 0.500, BLEU-4 0.200, CIDEr 0.700, validation loss 2.600",
            f"model     {model}",
            f"curve     {model}/loss.png",
            f"card      {model}/README.md",
        ]
        assert (
            captured.out.splitlines()[-1]
            == f"next      diptych caption --model cnn-lstm:{model} --input SRC --output OUT"
        )
        assert f"{data.num_train:,} rows" in captured.err
        assert "epoch 1/15: train loss 2.500" in captured.err

    def test_card_and_curve(self, trainer, prepared, tmp_path):
        assert run("captioner", "--input", prepared, "--output", tmp_path / "m", "--quiet", *SMALL) == 0
        card = json.loads((tmp_path / "m" / "model_card.json").read_text())
        assert card["kind"] == "cnn-lstm"
        assert card["scores"] == {"validation_loss": 2.6, "BLEU-1": 0.5, "BLEU-4": 0.2, "CIDEr": 0.7}
        assert card["epochs"] == {"trained": 3, "best": 2}
        assert card["options"]["encoder"] == "squeezenet1_1"
        assert card["data"]["train"]["rows"] + card["data"]["validation"]["rows"] == NUM_TRAIN
        assert {"diptych", "torch"} < card["versions"].keys()
        assert len(card["digest"]) == 16
        read = huggingface_hub.ModelCard.load(tmp_path / "m" / "README.md")
        assert read.data.pipeline_tag == "image-to-text"
        with Image.open(tmp_path / "m" / "loss.png") as image:
            assert image.format == "PNG"

    def test_from_raw_rows_of_two_files(self, trainer, scenes, tmp_path):
        inputs = {name: scenes.coco / f"annotations/captions_{name}2017.json" for name in ("train", "val")}
        flags = [
            "captioner",
            "--input",
            inputs["train"],
            "--validation",
            inputs["val"],
            "--output",
            tmp_path / "m",
        ]
        assert run(*flags, "--quiet", *SMALL) == 0
        assert (len(trainer.keys["train"]), len(trainer.keys["validation"])) == (NUM_TRAIN, NUM_VAL)
        assert not {*trainer.keys["train"]} & {*trainer.keys["validation"]}
        assert "_training" not in files(tmp_path / "m")

    def test_two_splits_of_one_karpathy_file(self, trainer, scenes, tmp_path):
        names = sorted(path.name for path in (scenes.flickr30k / "flickr30k-images").iterdir())
        splits = ["train"] * 40 + ["val"] * 15 + ["test"] * 5
        images = [
            {
                "filename": name,
                "split": split,
                "imgid": i,
                "sentences": [{"raw": f"a scene {i}", "sentid": i}],
            }
            for i, (name, split) in enumerate(zip(names, splits, strict=True))
        ]
        annotations = tmp_path / "dataset_flickr8k.json"
        annotations.write_text(json.dumps({"images": images, "dataset": "flickr8k"}))
        flags = [
            "--input",
            annotations,
            "--images",
            scenes.flickr30k / "flickr30k-images",
            "--output",
            tmp_path / "m",
        ]
        assert run("captioner", *flags, "--split=train", "--validation_split=val", "--quiet", *SMALL) == 0
        assert (len(trainer.keys["train"]), len(trainer.keys["validation"])) == (40, 15)

    def test_cache_and_device_are_handed_on_and_decide_nothing(self, trainer, prepared, tmp_path, capsys):
        flags = ["captioner", "--input", prepared, "--output", tmp_path / "m", *SMALL]
        assert run(*flags, "--device=cpu", "--cache", tmp_path / "c", "--quiet") == 0
        assert trainer.calls[0][3:] == ("cpu", tmp_path / "c")
        assert run(*flags) == 0
        assert len(trainer.calls) == 1
        assert "nothing to do" in capsys.readouterr().out

    def test_the_same_data_has_the_same_fingerprint(self, trainer, prepared, tmp_path):
        for name, flags in (("a", []), ("b", ["--seed=1"]), ("c", ["--validation_share=0.3"])):
            assert (
                run("captioner", "--input", prepared, "--output", tmp_path / name, "--quiet", *SMALL, *flags)
                == 0
            )
        a, b, c = (call[0].fingerprint for call in trainer.calls)
        assert a == b != c

    def test_interrupted_and_gone_on_with(self, trainer, scenes, tmp_path):
        flags = ["captioner", "--input", scenes.webdataset, "--output", tmp_path / "m", "--quiet", *SMALL]
        trainer.error = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            run(*flags)
        assert "config.json" not in files(tmp_path / "m")
        trainer.error = None
        assert run(*flags, "--epochs=2") == 1
        calls = len(trainer.calls)
        assert run(*flags) == 0
        assert len(trainer.calls) == calls + 1
        assert trainer.prepared[-1] == trainer.prepared[0] != {}
        assert "config.json" in files(tmp_path / "m")


class TestRefused:
    def check(self, capsys: Any, code: int, message: str, *flags: object) -> None:
        assert run(*flags) == code
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error

    def test_other_options(self, trainer, prepared, tmp_path, capsys):
        flags = ["captioner", "--input", prepared, "--output", tmp_path / "m", *SMALL]
        assert run(*flags) == 0
        self.check(capsys, 1, "options.seed is 0 there and 1 here", *flags, "--seed=1")
        assert run(*flags, "--seed=1", "--overwrite") == 0
        assert json.loads((tmp_path / "m" / "model_card.json").read_text())["options"]["seed"] == 1

    @pytest.mark.parametrize(
        ("flags", "code", "message"),
        [
            (
                ["--encoder=resnet1", "--encoder_weights=none", "--fine_tune"],
                1,
                "torchvision has no network 'resnet1'",
            ),
            (["--encoder_weights=nowhere.safetensors"], 1, "There is no model at 'nowhere.safetensors'"),
            ([*SMALL, "--device=cuda:99"], 1, "--device cuda:99 is not there"),
            ([*SMALL, "--epochs=0"], 2, "--epochs is 0"),
            ([*SMALL, "--cbow"], 2, "unrecognized arguments: --cbow"),
            ([*SMALL, "--split=train"], 2, "--split train goes with"),
        ],
    )
    def test_before_an_old_model_is_touched(self, trainer, prepared, tmp_path, capsys, flags, code, message):
        same = ["captioner", "--input", prepared, "--output", tmp_path / "m"]
        assert run(*same, *SMALL, "--quiet") == 0
        before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
        self.check(capsys, code, message, *same, "--overwrite", *flags)
        assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before

    def test_inputs(self, trainer, prepared, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        output = ["--output", tmp_path / "m", *SMALL]
        self.check(capsys, 1, "is not there", "captioner", "--input", tmp_path / "nowhere", *output)
        self.check(
            capsys, 1, "holds no data of any format", "captioner", "--input", tmp_path / "empty", *output
        )
        self.check(capsys, 2, "is where", "captioner", "--input", tmp_path / "m", *output)
        assert not (tmp_path / "m").exists()
        assert trainer.calls == []

    def test_no_captions(self, trainer, tmp_path, capsys):
        Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
        flags = ["captioner", "--input", tmp_path / "a.png", "--output", tmp_path / "m", *SMALL]
        self.check(capsys, 1, "holds no row with a caption, so there is nothing to learn from", *flags)
        assert trainer.calls == []

    def test_an_output_that_cannot_be(self, trainer, prepared, tmp_path, capsys):
        (tmp_path / "file").touch()
        flags = ["captioner", "--input", prepared, *SMALL, "--output"]
        self.check(capsys, 1, "is a file", *flags, tmp_path / "file")
        self.check(capsys, 1, "cannot be written", *flags, tmp_path / "file" / "m")
        self.check(
            capsys,
            1,
            "is the output of another job",
            *flags,
            self.copy_job(prepared, tmp_path),
        )

    def copy_job(self, prepared: str, tmp_path: Path) -> Path:
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "_job.json").write_bytes(Path(prepared, "_job.json").read_bytes())
        return tmp_path / "other"

    def test_what_the_training_says(self, trainer, prepared, tmp_path, capsys):
        trainer.error = ModelError("the training diverged. Lower --learning_rate.")
        self.check(
            capsys,
            1,
            "diptych: the training diverged",
            "captioner",
            "--input",
            prepared,
            "--output",
            tmp_path / "m",
            *SMALL,
        )

    def test_no_model_is_named(self, capsys):
        self.check(capsys, 2, "MODEL", "--input", "a")


class TestForReal:
    def test_captioner(self, prepared, tmp_path, capsys):
        flags = [
            "--epochs=1",
            "--embedding_dim=8",
            "--hidden_dim=8",
            "--attention_dim=4",
            "--min_word_count=1",
        ]
        flags += ["--validation_share=0.2", "--max_words=4", "--beam_width=1"]
        assert run("captioner", "--input", prepared, "--output", tmp_path / "m", *SMALL, *flags) == 0
        out = capsys.readouterr().out
        assert "trained   cnn-lstm; kept epoch 1: BLEU-1 " in out
        card = json.loads((tmp_path / "m" / "model_card.json").read_text())
        assert card["history"][0]["validation_loss"] == card["scores"]["validation_loss"] > 0
        model = Captioner.load(str(tmp_path / "m"), CaptionOptions(max_words=4), "cpu", kind="cnn-lstm")
        with open(next(Path(tmp_path).rglob("loss.png")), "rb") as file:
            (captions,) = model.predict(model.prepare([file.read()]))
        assert len(captions.candidates) == 1

    def test_word_vectors(self, prepared, tmp_path, capsys):
        flags = ["--input", prepared, "--output", tmp_path / "m", "--epochs=2", "--vector_size=8"]
        assert run("word2vec", *flags) == 0
        captured = capsys.readouterr()
        assert "trained   word2vec; kept epoch 2: validation loss " in captured.out
        assert f"next      diptych embed --model word2vec:{tmp_path / 'm'} " in captured.out
        assert "epoch 2/2: train loss " in captured.err
        model = Word2Vec.load(str(tmp_path / "m"), TextOptions())
        (vector,) = model.predict(model.prepare(["a red circle"]))
        assert vector.known
        assert vector.values.shape == (8,)
        assert run("word2vec", *flags) == 0
        assert "nothing to do" in capsys.readouterr().out

    def test_word_vectors_without_a_word(self, prepared, tmp_path, capsys):
        flags = ["--input", prepared, "--output", tmp_path / "m", "--min_count=100000"]
        assert run("word2vec", *flags) == 1
        assert "Expected at least 2" in capsys.readouterr().err

    def test_killed_half_way_and_gone_on_with(self, prepared, tmp_path):
        flags = [
            "word2vec",
            "--input",
            prepared,
            "--epochs=40",
            "--patience=40",
            "--vector_size=16",
            "--quiet",
        ]
        assert run(*flags, "--output", tmp_path / "whole") == 0
        killed = tmp_path / "killed"
        command = [sys.executable, "-m", "diptych", "train", *flags, "--output", str(killed)]
        checkpoint = killed / "_training" / "model" / "checkpoint" / "_checkpoint.safetensors"
        with subprocess.Popen(command) as process:
            while process.poll() is None and not checkpoint.exists():
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert files(killed) == ["_job.json", "_training"]
        assert run(*flags, "--output", killed) == 0
        assert files(killed) == files(tmp_path / "whole")
        for name in ("vectors.safetensors", "words.json", "config.json", "model_card.json"):
            assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_gensim_and_torch_are_loaded_for_a_training_alone() -> None:
    code = "import sys; import diptych.pipelines.cli; print([m for m in ('torch', 'gensim') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_module_docstring_has_a_command_that_parses() -> None:
    (line,) = [line for line in (train_module.__doc__ or "").splitlines() if line.startswith("diptych ")]
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    add_train_flags(parser)
    options = train_options(parser.parse_args(shlex.split(line)[2:]))
    assert options.validation is not None
    assert options.output == "captioner"


def test_other_jobs_leave_the_folder_of_a_model_alone(tmp_path):
    folder = str(tmp_path / "model")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "_job.json").write_text('{"model": {}}')
    with pytest.raises(OutputError, match="is where `diptych train` wrote a model, or is at it"):
        check_output(folder, DatasetClaim("captions", {"job": "caption"}, overwrite=True))
    (tmp_path / "model" / "_SUCCESS.json").write_text('{"model": {"best_epoch": 1}}')
    with pytest.raises(OutputError, match="holds a model that `diptych train` wrote, not data sets"):
        read_success(folder)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("words")
    Word2Vec(["red", "blue", "star"], np.eye(3, 4, dtype=np.float32)).save(folder)
    return f"word2vec:{folder}"


class TestImageModels:
    def test_a_vae_and_a_gan_that_goes_on_with_it(self, prepared, words, tmp_path, capsys):
        flags = ("--input", prepared, "--text_model", words, "--epochs=1", "--batch_size=16", "--device=cpu")
        small = ("--size=16", "--channels=4", "--latent_dim=3")
        assert run("vae", *flags, *small, "--output", tmp_path / "vae") == 0
        shown = capsys.readouterr().out
        assert f"next      diptych generate --model vae:{tmp_path / 'vae'} --prompts SRC" in shown
        assert {"samples.png", "encoder.safetensors", "loss.png", "model_card.json"} <= {
            *files(tmp_path / "vae")
        }
        generator = ("--generator", f"vae:{tmp_path / 'vae'}")
        assert run("gan", *flags, *generator, "--output", tmp_path / "gan") == 0
        card = json.loads((tmp_path / "gan/model_card.json").read_text())
        assert (card["options"]["size_px"], card["options"]["channels"]) == (16, 4)  # of the VAE
        (tmp_path / "in.txt").write_text("a red star\n")
        for kind in ("vae", "gan"):
            argv = ["generate", f"--prompts={tmp_path / 'in.txt'}", f"--output={tmp_path / kind / 'out'}"]
            assert main([*argv, f"--model={kind}:{tmp_path / kind}", "--device=cpu", "--quiet"]) == 0
        # another shape than the generator has
        assert run("gan", *flags, *generator, "--size=32", "--output", tmp_path / "other") == 2
        assert "--size is 32. It must be left out, or 16, as --generator" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("flags", "code", "message"),
        [
            (["--text_model=word2vec:nowhere"], 1, "There is no model at 'nowhere'"),
            (["--text_model=WORDS", "--generator=gan:nowhere"], 1, "There is no model at 'nowhere'"),
            (["--text_model=WORDS", "--size=65"], 2, "--size is 65"),
        ],
    )
    def test_what_cannot_be_is_said_before_anything(
        self, prepared, words, tmp_path, capsys, flags, code, message
    ):
        flags = [flag.replace("WORDS", words) for flag in flags]
        assert run("gan", "--input", prepared, "--output", tmp_path / "model", *flags) == code
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
        assert not (tmp_path / "model").exists()
