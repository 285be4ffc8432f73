import argparse
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image

from diptych.models import spec as spec_module
from diptych.models.base import CaptionModel, Captions
from diptych.models.captioning.encoder import create_encoder
from diptych.models.text.word2vec import Word2Vec
from diptych.pipelines.cli import main
from diptych.pipelines.evaluate_images import _chosen, _Made, _other_prompt, evaluate_images, table
from diptych.pipelines.options.evaluate import (
    EvaluateImagesOptions,
    add_evaluate_images_flags,
    evaluate_images_options,
)
from diptych.transforms.errors import InputError, OptionError, OutputError

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def png(colour, noise, size_px=20):
    pixels = np.full((size_px, size_px, 3), colour, np.float64) + noise.normal(0, 20, (size_px, size_px, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write(folder, dataset, rows):
    """Writes what a job that has finished leaves: two files."""
    (folder / dataset).mkdir(parents=True)
    half = len(rows) // 2
    for index, part in enumerate((rows[:half], rows[half:])):
        path = folder / dataset / f"a-{index:05}.parquet"
        pq.write_table(pa.Table.from_pylist(part), path, write_page_checksum=True)
    success = folder / "_SUCCESS.json"
    totals = json.loads(success.read_bytes()) if success.exists() else {}
    totals[dataset] = {"shards": 1, "files": 2, "read": len(rows), "written": len(rows)}
    success.write_text(json.dumps(totals))
    (folder / "_job.json").write_text("{}")
    return str(folder)


def made(num=40, samples=2, seed=0):
    noise = np.random.default_rng(seed)
    names = [*COLOURS]
    return [
        {
            "key": f"k{row // samples}",
            "prompt_index": 0,
            "sample": row % samples,
            "prompt": f"a {names[row // samples % 2]} square",
            "image": png(COLOURS[names[row // samples % 2]], noise),
        }
        for row in range(num)
    ]


def real(num=30, seed=1, colours=((255, 0, 0), (0, 0, 255))):
    noise = np.random.default_rng(seed)
    return [{"key": f"r{i}", "image": png(colours[i % len(colours)], noise, 30)} for i in range(num)]


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    write(folder, "generated", made())
    return write(folder, "images", real())


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("network") / "weights.safetensors"
    state = create_encoder("timm:test_resnet", 224).network.state_dict()
    safetensors.torch.save_file({name: value.clone().contiguous() for name, value in state.items()}, path)
    return {"features": "timm:test_resnet", "feature_weights": str(path), "device": "cpu"}


class Says(CaptionModel):
    """Says which channel of an image is the strongest."""

    digest, batch_size, feature_dim = "s" * 16, 8, None

    def prepare(self, inputs):
        return [np.asarray(Image.open(io.BytesIO(data))).mean((0, 1)) for data in inputs]

    def predict(self, prepared):
        return [Captions(("red" if pixel[0] > pixel[2] else "blue",), (0.0,)) for pixel in prepared]


@pytest.fixture
def match(tmp_path, monkeypatch):
    (tmp_path / "words").mkdir()
    Word2Vec(["red", "blue"], np.eye(2, dtype=np.float32)).save(tmp_path / "words")
    load = spec_module._load
    monkeypatch.setattr(spec_module, "_load", lambda spec: Says() if spec.kind == "hf" else load(spec))
    monkeypatch.setattr(spec_module, "_loaded", {})
    return [f"--match_with=hf:says-{tmp_path.name}", f"--match_by=word2vec:{tmp_path / 'words'}"]


def parse(*flags):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_evaluate_images_flags(parser)
    return evaluate_images_options(parser.parse_args(flags))


class TestScores:
    def test_what_they_are_of(self, out, network):
        report = evaluate_images(EvaluateImagesOptions(out, **network))
        assert (report["num_made"], report["num_real"], report["size_px"]) == (40, 30, 20)
        assert report["features"].startswith("timm:test_resnet (")
        assert report["num_prompts_with_several"] == 20
        assert report["input"].endswith("out/generated")
        assert report["references"].endswith("out/images")

    def test_images_like_the_real_ones_are_nearer(self, out, network, tmp_path):
        write(tmp_path / "green", "images", real(colours=((0, 255, 0),)))
        near = evaluate_images(EvaluateImagesOptions(out, **network))["scores"]
        far = evaluate_images(EvaluateImagesOptions(out, references=str(tmp_path / "green"), **network))[
            "scores"
        ]
        assert near["fid"] < far["fid"]
        assert near["kid"] < far["kid"]

    def test_spread(self, out, network):
        scores = evaluate_images(EvaluateImagesOptions(out, **network))["scores"]
        assert 0.02 < scores["within_prompt_pixels"] < 0.2 < scores["between_prompts_pixels"]
        assert scores["within_prompt_features"] < scores["between_prompts_features"]

    def test_real_ones_as_a_yardstick(self, out, network, tmp_path):
        write(tmp_path / "others", "images", real(seed=9))
        options = EvaluateImagesOptions(
            out, "images", references=str(tmp_path / "others"), size_px=24, **network
        )
        report = evaluate_images(options)
        assert (report["num_made"], report["num_real"], report["size_px"]) == (30, 30, 24)
        assert "within_prompt_pixels" not in report["scores"]

    def test_of_some_images_alone(self, out, network):
        report = evaluate_images(EvaluateImagesOptions(out, max_images=7, **network))
        assert (report["num_made"], report["num_real"]) == (7, 7)

    def test_those_some_are_of_all_prompts(self, tmp_path):
        rows = [row | {"prompt_index": i // 2 % 5} for i, row in enumerate(made(40, samples=10))]
        out = write(tmp_path, "generated", rows)
        found = [
            row.name for row in _chosen(out, "generated", 8)
        ]  # of 4 keys, 5 prompts each, 2 samples of each
        assert found == [(f"k{key}", index) for key, index in ((0, 0), (1, 0), (2, 0), (3, 0)) for _ in "ab"]
        assert len([*_chosen(out, "generated", 7)]) == 7
        assert len([*_chosen(out, "generated", 100)]) == len([*_chosen(out, "generated", None)]) == 40

    def test_a_prompt_is_compared_with_that_of_another_key(self):
        batch = [_Made(("a", 0), "x", b""), _Made(("a", 1), "y", b""), _Made(("b", 0), "z", b"")]
        assert [_other_prompt(batch, i) for i in range(3)] == ["z", "z", "x"]
        assert _other_prompt(batch[:2], 0) is None

    def test_match(self, out, network, match, tmp_path):
        flags = [f"--features={network['features']}", f"--feature_weights={network['feature_weights']}"]
        report = evaluate_images(parse(f"--input={out}", "--device=cpu", *flags, *match))
        scores = report["scores"]
        assert scores["match"] == 1
        assert scores["match_gain_low"] == scores["match_gain"] == scores["match_gain_high"] == 1
        assert (report["num_matched"], report["num_not_matched"]) == (40, 0)

    def test_from_the_command_line(self, out, network, match, capsys, tmp_path):
        flags = [f"--{name}={value}" for name, value in network.items()]
        argv = ["evaluate", "images", f"--input={out}", *flags, *match]
        assert main([*argv, f"--scores={tmp_path / 'scores.json'}"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"40 images of {out}/generated against 30 of {out}/images, at 20 px")
        assert any(line.startswith("FID  ") for line in lines)
        assert main([*argv, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report == json.loads((tmp_path / "scores.json").read_bytes())
        assert table(report).splitlines() == lines


class TestWhatCannotBe:
    def test_no_generated_images(self, tmp_path, network):
        out = write(tmp_path / "out", "images", real())
        with pytest.raises(InputError, match="holds no generated images, or not all"):
            evaluate_images(EvaluateImagesOptions(out, **network))

    def test_no_real_images(self, tmp_path, network):
        out = write(tmp_path / "out", "generated", made())
        with pytest.raises(InputError, match="holds no images"):
            evaluate_images(EvaluateImagesOptions(out, **network))

    def test_nothing_at_all(self, tmp_path, network):
        with pytest.raises(InputError, match="holds no generated images"):
            evaluate_images(EvaluateImagesOptions(str(tmp_path), **network))

    def test_a_damaged_file(self, out, network, tmp_path):
        path = tmp_path / "out/generated/a-00000.parquet"
        data = bytearray(path.read_bytes())
        data[100:400] = bytes(300)
        path.write_bytes(data)
        with pytest.raises((OutputError, InputError), match=r"cannot be (read|decoded)"):
            evaluate_images(EvaluateImagesOptions(out, **network))

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--match_with=hf:x"], "--match_with is hf:x. It must be a captioner beside a text model"),
            (["--match_by=bert:x"], "--match_with is bert:x. It must be a captioner beside a text model"),
            (["--match_with=bert:x", "--match_by=bert:x"], "--match_with is 'bert:x'"),
            (["--size=4"], "--size is 4"),
            (["--max_images=1"], "--max_images is 1"),
            (["--dataset=images"], "--dataset is images. It must be beside others to score it against"),
            (["--features="], "--features is ''"),
        ],
    )
    def test_flags(self, flags, message):
        with pytest.raises(OptionError, match=message):
            parse("--input=a", *flags)
