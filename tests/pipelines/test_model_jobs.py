"""`embed`, `caption` and `generate` from end to end, on drawn scenes, with small models."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from fake_models import TROUBLE, FakeCaptions, FakeText, use_fakes
from kills import check_kills, files_in
from PIL import Image

from diptych.models import spec as spec_module
from diptych.models.base import CaptionOptions, ImageOptions, Prompt, TextOptions
from diptych.models.errors import ModelError
from diptych.models.spec import ModelSpec
from diptych.models.text.word2vec import Word2Vec
from diptych.pipelines.caption import caption
from diptych.pipelines.cli import main
from diptych.pipelines.demo_data import layouts
from diptych.pipelines.demo_data.layouts import SceneFolders, write_data_set
from diptych.pipelines.embed import embed, embed_branch
from diptych.pipelines.generate import generate
from diptych.pipelines.lifecycle.launch import Job
from diptych.pipelines.lifecycle.model_job import model_graph
from diptych.pipelines.lifecycle.output_folder import State, read_jobs
from diptych.pipelines.options.generate import GenerateOptions
from diptych.pipelines.options.models import ModelJobOptions
from diptych.pipelines.options.prepare import PrepareOptions
from diptych.pipelines.prepare import prepare
from diptych.pipelines.runners.run_pipeline import new_pipeline
from diptych.pipelines.verify import verify
from diptych.transforms.clean import CleanCaptions, CleanOptions
from diptych.transforms.errors import (
    DeviceError,
    DiptychError,
    InputError,
    NothingWritten,
    OptionError,
    OutputError,
)
from diptych.transforms.finish import read_success
from diptych.transforms.inference.generate import sample_seed
from diptych.transforms.schemas import captions_schema, embeddings_schema, generated_schema
from diptych.transforms.sources.base import ColumnNames
from diptych.transforms.sources.open import SourceOptions, open_source
from diptych.transforms.sources.sharded.prepared_captions import TextShard

REPOSITORY = Path(__file__).parents[2]
CHUNK_ROWS = 7


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fakes(monkeypatch)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> SceneFolders:
    """50 scenes; the tar files hold 20 each at most."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "_SHARD_SCENES", 20)
        return write_data_set(str(tmp_path_factory.mktemp("scenes") / "data"), 50, seed=1)


@pytest.fixture(scope="module")
def prepared_once(scenes: SceneFolders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare(PrepareOptions((str(scenes.webdataset),), str(out), chunk_rows=10, quiet=True))
    return out


@pytest.fixture
def prepared(prepared_once: Path, tmp_path: Path) -> Path:
    """A copy of the prepared scenes, to add to."""
    shutil.copytree(prepared_once, tmp_path / "prepared")
    return tmp_path / "prepared"


def run(job: str, data: Path | str, out: Path | str, **options: Any) -> State:
    """Runs a job with a fake model in this process; returns what it found."""
    options = {
        "inputs": (str(data),),
        "output": str(out),
        "model": MODELS[job],
        "chunk_rows": CHUNK_ROWS,
        "quiet": True,
    } | options
    if job == "generate":
        return generate(GenerateOptions(**{"images_per_prompt": 2, **options})).state
    return {"embed": embed, "caption": caption}[job](ModelJobOptions(**options)).state


DATASETS = {"embed": "embeddings", "caption": "captions", "generate": "generated"}
MODELS = {
    "embed": ModelSpec("bert", "fake", TextOptions()),
    "caption": ModelSpec("hf", "fake", CaptionOptions()),
    "generate": ModelSpec("diffusers", "fake", ImageOptions()),
}
OTHERS = {
    "embed": ModelSpec("bert", "fake", TextOptions(normalize=True)),
    "caption": ModelSpec("hf", "fake", CaptionOptions(features=True)),
    "generate": ModelSpec("diffusers", "fake", ImageOptions(quality=50)),
}
"""The same with other options."""


def table_in(folder: Path, dataset: str) -> pa.Table:
    return pyarrow.dataset.dataset(folder / dataset).to_table()


def rows_in(folder: Path, dataset: str) -> list[dict[str, Any]]:
    rows = table_in(folder, dataset).to_pylist()
    return sorted(rows, key=_name)


def _name(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name, 0) for name in ("key", "caption_index", "prompt_index", "sample"))


def problems(out: Path) -> list[str]:
    return verify(str(out)).problems


class TestEmbed:
    def test_a_row_per_caption_with_its_vector(self, prepared):
        assert run("embed", prepared, prepared) is State.FRESH
        table = table_in(prepared, "embeddings")
        assert table.schema.remove_metadata().equals(embeddings_schema(3))
        images = {row["key"]: row["captions"] for row in table_in(prepared, "images").to_pylist()}
        assert len(table) == sum(map(len, images.values())) == 250
        model = FakeText(ModelSpec("bert", "", TextOptions()))
        for row in table.to_pylist():
            assert row["caption"] == images[row["key"]][row["caption_index"]]
            (expected,) = model.predict(model.prepare([row["caption"]]))
            assert row["embedding"] == expected.values.tolist()
        assert problems(prepared) == []

    @pytest.mark.parametrize("layout", ["webdataset", "coco"])
    def test_raw_data_give_the_same_rows(self, scenes, prepared, tmp_path, layout):
        run("embed", prepared, prepared)
        run("embed", getattr(scenes, layout), tmp_path / "raw")
        assert rows_in(tmp_path / "raw", "embeddings") == rows_in(prepared, "embeddings")
        assert problems(tmp_path / "raw") == []

    def test_raw_captions_are_cleaned_and_no_image_is_needed(self, tmp_path):
        table = {"id": [1, 2], "text": [["A  <b>dog</b>", "A dog", "ok"], [" "]]}
        (tmp_path / "in").mkdir()
        pq.write_table(pa.table(table), tmp_path / "in" / "a.parquet")
        run("embed", tmp_path / "in", tmp_path / "out")
        rows = rows_in(tmp_path / "out", "embeddings")
        assert [(row["key"], row["caption_index"], row["caption"]) for row in rows] == [
            ("1", 0, "A dog"),
            ("1", 1, "ok"),
        ]
        (lost,) = pq.read_table(tmp_path / "out/rejects/embed/a-00000.parquet").to_pylist()
        assert (lost["key"], lost["row"], lost["reason"]) == ("2", 1, "no_caption")
        totals = read_success(str(tmp_path / "out"))["embeddings"]
        assert (totals.read, totals.written, totals.rejected) == (3, 2, {"no_caption": 1})
        assert problems(tmp_path / "out") == []

    def test_an_annotation_without_its_images(self, scenes, tmp_path):
        """The rows are those with images, and no image folder need be there."""
        run("embed", scenes.coco, tmp_path / "beside")
        shutil.copytree(scenes.coco / "annotations", tmp_path / "alone")
        run("embed", tmp_path / "alone", tmp_path / "out")
        assert rows_in(tmp_path / "out", "embeddings") == rows_in(tmp_path / "beside", "embeddings")
        shutil.copy(scenes.flickr30k / "results_20130124.token", tmp_path)
        run("embed", tmp_path / "results_20130124.token", tmp_path / "lines")
        assert {row["key"] for row in rows_in(tmp_path / "lines", "embeddings")} == {
            row["key"] for row in rows_in(tmp_path / "out", "embeddings")
        }

    def test_the_columns_that_the_user_names(self, tmp_path):
        (tmp_path / "in").mkdir()
        pq.write_table(pa.table({"nr": [1], "words": ["x"], "text": ["y"]}), tmp_path / "in" / "a.parquet")
        source = SourceOptions(columns=ColumnNames(caption="words", key="nr"))
        run("embed", tmp_path / "in", tmp_path / "out", source=source)
        assert [(row["key"], row["caption"]) for row in rows_in(tmp_path / "out", "embeddings")] == [
            ("1", "x")
        ]

    def test_word2vec_flags_captions_of_which_it_knows_no_word(self, prepared, tmp_path):
        folder = tmp_path / "model"
        folder.mkdir()
        Word2Vec(["red", "blue"], np.array([[1, 2], [3, 4]], np.float32)).save(folder)
        model = ModelSpec("word2vec", str(folder), TextOptions())
        run("embed", prepared, prepared, model=model)
        table = table_in(prepared, "embeddings")
        assert table.schema.remove_metadata().equals(embeddings_schema(2, flags_unknown=True))
        rows = table.to_pylist()
        knows = [any(word in ("red", "blue") for word in row["caption"].lower().split()) for row in rows]
        assert 0 < sum(knows) < len(rows)
        assert [not row["no_known_word"] for row in rows] == knows
        assert all((row["embedding"] == [0, 0]) is row["no_known_word"] for row in rows)
        totals = read_success(str(prepared))["embeddings"]
        assert totals.counters["captions_without_known_word"] == len(rows) - sum(knows)

    def test_the_prepared_images_are_not_read(self, prepared):
        for path in (prepared / "images").iterdir():
            metadata = pq.read_metadata(path).row_group(0)
            column = next(
                metadata.column(i)
                for i in range(metadata.num_columns)
                if metadata.column(i).path_in_schema == "image.bytes"
            )
            data = bytearray(path.read_bytes())
            start = column.data_page_offset + 100
            end = column.data_page_offset + column.total_compressed_size
            data[start:end] = bytes(end - start)
            path.write_bytes(data)
        run("embed", prepared, prepared)
        assert len(table_in(prepared, "embeddings")) == 250
        with pytest.raises(InputError, match=r"is damaged: .* Run `diptych verify` on its output"):
            run("caption", prepared, prepared)


class TestCaption:
    def test_of_prepared_images(self, prepared):
        assert run("caption", prepared / "images", prepared) is State.FRESH
        table = table_in(prepared, "captions")
        assert table.schema.remove_metadata().equals(captions_schema())
        images = {row["key"]: row for row in table_in(prepared, "images").to_pylist()}
        assert len(table) == len(images) == 50
        for row in table.to_pylist():
            image = images[row["key"]]
            name = hashlib.sha256(image["image"]["bytes"]).hexdigest()
            assert (row["caption"], row["candidates"]) == (name, [name, name[:3]])
            assert (row["scores"], row["references"]) == ([-0.5, -1.0], image["captions"])
        assert problems(prepared) == []

    def test_raw_images_are_resized_as_prepare_does(self, scenes, prepared, tmp_path):
        run("caption", prepared, prepared)
        run("caption", scenes.webdataset, tmp_path / "raw")
        assert rows_in(tmp_path / "raw", "captions") == rows_in(prepared, "captions")

    def test_an_image_that_is_none_never_gets_to_the_model(self, scenes, tmp_path):
        (tmp_path / "in").mkdir()
        good = next((scenes.flickr30k / "flickr30k-images").iterdir()).read_bytes()
        for name, data in (("a.jpg", b"junk"), ("b.jpg", good)):
            (tmp_path / "in" / name).write_bytes(data)
        run("caption", tmp_path / "in", tmp_path / "out")
        totals = read_success(str(tmp_path / "out"))["captions"]
        assert (totals.read, totals.written, totals.rejected) == (2, 1, {"not_an_image": 1})

    def test_features_are_written_where_asked_for(self, prepared):
        model = ModelSpec("hf", "fake", CaptionOptions(features=True))
        run("caption", prepared, prepared, model=model)
        table = table_in(prepared, "captions")
        assert table.schema.remove_metadata().equals(captions_schema(2))
        assert table["features"].to_pylist() == [[1, 1]] * 50


class TestGenerate:
    def prompts(self, path: Path, text: str = "a red square\n\nein blauer Kreis\n") -> Path:
        path.write_text(text)
        return path

    def test_a_row_per_image_with_its_prompt(self, tmp_path):
        run("generate", self.prompts(tmp_path / "in.txt"), tmp_path / "out", images_per_prompt=3, seed=5)
        table = table_in(tmp_path / "out", "generated")
        assert table.schema.remove_metadata().equals(generated_schema())
        rows = rows_in(tmp_path / "out", "generated")
        assert [(row["key"], row["sample"], row["prompt"]) for row in rows] == [
            *[("in-00000000", sample, "a red square") for sample in range(3)],
            *[("in-00000002", sample, "ein blauer Kreis") for sample in range(3)],
        ]
        for row in rows:
            assert row["seed"] == sample_seed(5, row["key"], row["prompt_index"], row["sample"])
            wanted = hashlib.sha256(repr(Prompt(row["prompt"], row["seed"])).encode()).digest()[:3]
            assert Image.open(io.BytesIO(row["image"]["bytes"])).getpixel((0, 0)) == tuple(wanted)
            assert row["image"]["path"] == f"{row['key']}_{row['prompt_index']}_{row['sample']}.png"
        totals = read_success(str(tmp_path / "out"))["generated"]
        assert (totals.read, totals.written, totals.rejected) == (7, 6, {"bad_annotation": 1})
        assert problems(tmp_path / "out") == []

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("in.jsonl", '{"key": "a", "prompt": "a red square"}\n"two"\n'),
            ("in.csv", "key,prompt\na,a red square\nb,two\n"),
            ("in.tsv", "key\tprompt\na\ta red square\nb\ttwo\n"),
            ("in.txt", "a red square\ntwo\n"),
        ],
    )
    def test_prompts_of_any_format_are_found_out(self, tmp_path, name, text):
        run("generate", self.prompts(tmp_path / name, text), tmp_path / "out", images_per_prompt=1)
        assert [row["prompt"] for row in rows_in(tmp_path / "out", "generated")] == ["a red square", "two"]

    def test_captions_of_an_output_are_prompts(self, prepared):
        run("generate", prepared, prepared)
        captions = {row["key"]: row["captions"] for row in table_in(prepared, "images").to_pylist()}
        rows = rows_in(prepared, "generated")
        assert len(rows) == 2 * 250
        assert all(row["prompt"] == captions[row["key"]][row["prompt_index"]] for row in rows)

    def test_more_images_of_a_prompt_leave_the_first_as_they_are(self, tmp_path):
        source = self.prompts(tmp_path / "in.txt")
        found = []
        for number in (1, 4):
            run("generate", source, tmp_path / f"out-{number}", images_per_prompt=number)
            rows = rows_in(tmp_path / f"out-{number}", "generated")
            found.append([row for row in rows if row["sample"] == 0])
        assert found[0] == found[1]

    def test_the_seed_changes_all_images(self, tmp_path):
        source = self.prompts(tmp_path / "in.txt")
        images = []
        for seed in (0, 1):
            run("generate", source, tmp_path / f"out-{seed}", seed=seed)
            images.append({row["image"]["bytes"] for row in rows_in(tmp_path / f"out-{seed}", "generated")})
        assert images[0].isdisjoint(images[1])

    def test_those_that_do_not_show_their_prompt_are_rejected(self, tmp_path, monkeypatch):
        """The captioner says `red` of images whose red is the strongest, else `blue`."""

        def look(self: FakeCaptions, inputs: Sequence[bytes]) -> list[str]:
            pixels = [Image.open(io.BytesIO(data)).getpixel((0, 0)) for data in inputs]
            return ["red" if red > 127 else "blue" for red, _, _ in pixels]

        monkeypatch.setattr(FakeCaptions, "prepare", look)
        (tmp_path / "model").mkdir()
        Word2Vec(["red", "blue"], np.eye(2, dtype=np.float32)).save(tmp_path / "model")
        match = {
            "min_match": 0.5,
            "match_with": ModelSpec("hf", "fake", CaptionOptions()),
            "match_by": ModelSpec("word2vec", str(tmp_path / "model"), TextOptions()),
        }
        source = self.prompts(tmp_path / "in.txt", "red\nblue\n" * 10)
        run("generate", source, tmp_path / "out", images_per_prompt=4, **match)
        table = table_in(tmp_path / "out", "generated")
        assert table.schema.remove_metadata().equals(generated_schema(with_match=True))
        rows = table.to_pylist()
        assert 20 < len(rows) < 60
        assert all(row["caption"] == row["prompt"] and row["match"] == 1 for row in rows)
        totals = read_success(str(tmp_path / "out"))["generated"]
        assert (totals.read, totals.rejected) == (80, {"low_match": 80 - len(rows)})
        assert problems(tmp_path / "out") == []

    def test_a_match_without_a_text_model(self, tmp_path):
        match = {"min_match": 0.5, "match_with": ModelSpec("hf", "fake", CaptionOptions())}
        with pytest.raises(OptionError, match=r"has no text model for that\. Name one with --match_by"):
            run("generate", self.prompts(tmp_path / "in.txt"), tmp_path / "out", **match)
        assert not (tmp_path / "out").exists()

    def test_large_images_make_smaller_chunks(self):
        options = GenerateOptions(("a",), "b", model=MODELS["generate"], chunk_rows=250, images_per_prompt=4)
        assert options.rows_per_chunk((64, 64)) == 250
        assert options.rows_per_chunk((512, 512)) == 15
        with pytest.raises(
            OptionError, match=r"--images_per_prompt is 4\. It must be at most 2 at this size"
        ):
            options.rows_per_chunk((8000, 8000))

    @pytest.mark.parametrize(
        ("flags", "code", "message"),
        [
            (["--model=vex:x"], 2, "where KIND is vae, gan or diffusers"),
            (["--model=vae:nowhere"], 1, "There is no model at 'nowhere'"),
            (["--model=diffusers:fake", "--images_per_prompt=0"], 2, "--images_per_prompt is 0"),
            (["--model=diffusers:fake", "--seed=-1"], 2, "--seed is -1"),
            (["--model=diffusers:fake", "--size=4"], 2, "--size is 4"),
            (["--model=diffusers:fake", "--quality=0"], 2, "--quality is 0"),
            (["--model=diffusers:fake", "--text_model=word2vec:x"], 2, "--text_model is word2vec:x"),
            (["--model=vae:x", "--text_model=words"], 2, "--text_model is words. It must be KIND:LOC"),
            (["--model=diffusers:fake", "--min_match=0.5"], 2, "beside a captioner"),
            (["--model=diffusers:fake", "--match_with=hf:fake"], 2, "beside a --min_match"),
            (["--model=diffusers:fake", "--match_by=bert:fake"], 2, "beside --match_with"),
            (["--model=diffusers:fake", "--min_match=2", "--match_with=hf:fake"], 2, "--min_match is 2"),
            (["--model=diffusers:fake", "--setting=x"], 2, "'x' is not NAME=VALUE"),
        ],
    )
    def test_a_mistake_is_one_paragraph(self, tmp_path, capsys, flags, code, message):
        source = self.prompts(tmp_path / "in.txt")
        assert main(["generate", f"--prompts={source}", f"--output={tmp_path / 'out'}", *flags]) == code
        error = capsys.readouterr().err
        assert error.startswith("diptych: ")
        assert error.count("\n") == 1
        assert message in error
        assert not (tmp_path / "out").exists()

    def test_from_the_command_line(self, tmp_path, capsys):
        source = self.prompts(tmp_path / "in.txt")
        argv = ["generate", f"--prompts={source}", f"--output={tmp_path / 'out'}", "--model=diffusers:fake"]
        assert main([*argv, "--images_per_prompt=2", "--image_format=jpeg"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == ["read      5 images", f"written   4 to {tmp_path / 'out'}/generated"]


@pytest.mark.parametrize("job", DATASETS)
class TestBoth:
    def test_the_files_name_the_model(self, prepared, job):
        run(job, prepared, prepared)
        path = sorted((prepared / DATASETS[job]).iterdir())[0]
        about = json.loads(pq.read_metadata(path).metadata[b"diptych"])
        assert (about["job"], about["model"]) == (job, str(MODELS[job]))
        assert about["model_digest"] == read_jobs(str(prepared))[DATASETS[job]]["options"]["model"]["digest"]

    def test_datasets_opens_the_folder(self, prepared, tmp_path, job):
        run(job, prepared, prepared, model=OTHERS[job])
        found = datasets.load_dataset(
            "parquet",
            data_files=f"{prepared}/{DATASETS[job]}/*.parquet",
            split="train",
            cache_dir=str(tmp_path / "cache"),
        )
        column, feature = {
            "embed": ("embedding", datasets.List(datasets.Value("float32"), length=3)),
            "caption": ("features", datasets.List(datasets.Value("float32"), length=2)),
            "generate": ("image", datasets.Image()),
        }[job]
        assert found.features[column] == feature
        if job == "generate":
            found = found.cast_column("image", datasets.Image(decode=False))
        assert sorted(found, key=_name) == rows_in(prepared, DATASETS[job])

    @pytest.mark.parametrize(
        "options",
        [
            {"batch_size": 1},
            {"batch_size": 1000},
            {"chunk_rows": 3},
            {"beam_args": ("--direct_num_workers=2",)},
            {"beam_args": ("--direct_runner_bundle_repeat=2",)},
        ],
    )
    def test_nothing_but_the_data_decides_the_rows(self, scenes, prepared, tmp_path, job, options):
        run(job, prepared, prepared)
        run(job, scenes.webdataset, tmp_path / "raw", **options)
        assert rows_in(tmp_path / "raw", DATASETS[job]) == rows_in(prepared, DATASETS[job])
        assert problems(tmp_path / "raw") == []

    @pytest.mark.parametrize("flags", [("--direct_num_workers=2",), ("--direct_runner_bundle_repeat=2",)])
    def test_nor_the_runner_a_byte(self, prepared, tmp_path, job, flags):
        shutil.copytree(prepared, tmp_path / "other")
        run(job, prepared, prepared)
        run(job, tmp_path / "other", tmp_path / "other", beam_args=flags)
        assert files_in(tmp_path / "other") == files_in(prepared)

    def test_a_second_run_has_nothing_to_do(self, prepared, job, monkeypatch):
        run(job, prepared, prepared)
        before = files_in(prepared)
        monkeypatch.setattr(TextShard, "batches", lambda *_: pytest.fail("a shard was read"))
        assert run(job, prepared, prepared, batch_size=2, max_failure_rate=1.0) is State.DONE
        assert files_in(prepared) == before

    def test_a_data_file_that_was_deleted_is_made_again(self, prepared, job):
        run(job, prepared, prepared)
        before = files_in(prepared)
        sorted((prepared / DATASETS[job]).iterdir())[3].unlink()
        assert any("lacks" in problem or "shards" in problem for problem in problems(prepared))
        assert run(job, prepared, prepared) is State.RESUMED
        assert files_in(prepared) == before

    def test_another_model_or_option_is_refused_with_both_values(self, prepared, job):
        run(job, prepared, prepared)
        before = files_in(prepared)
        with pytest.raises(OutputError, match=r"options.chunk_rows is 7 there and 8 here"):
            run(job, prepared, prepared, chunk_rows=8)
        model = OTHERS[job]
        with pytest.raises(OutputError, match=r"options.model.digest is '\w+' there and '\w+' here"):
            run(job, prepared, prepared, model=model)
        assert files_in(prepared) == before
        assert run(job, prepared, prepared, model=model, overwrite=True) is State.FRESH
        assert problems(prepared) == []

    def test_a_model_that_cannot_be_loaded_fails_before_anything(self, prepared, job, monkeypatch):
        def fail(spec: ModelSpec) -> None:
            raise ModelError("fake is not there. Name another.")

        before = files_in(prepared)
        monkeypatch.setattr(spec_module, "_load", fail)
        with pytest.raises(InputError, match=r"^fake is not there\. Name another\.$"):
            run(job, prepared, prepared)
        assert files_in(prepared) == before

    def test_an_output_that_is_not_finished_is_no_input(self, prepared, job, tmp_path):
        (prepared / "_SUCCESS.json").unlink()
        for out in (prepared, tmp_path / "out"):
            with pytest.raises(InputError, match="holds no images, or not all"):
                run(job, prepared, out)

    def test_an_output_elsewhere_is_read_as_it_is(self, prepared, tmp_path, job):
        run(job, prepared, tmp_path / "out")
        assert set(read_jobs(str(tmp_path / "out"))) == {DATASETS[job]}
        run(job, prepared, prepared)
        assert rows_in(tmp_path / "out", DATASETS[job]) == rows_in(prepared, DATASETS[job])
        assert problems(tmp_path / "out") == []

    @pytest.mark.parametrize("name", ["embeddings", "captions", "rejects"])
    def test_what_a_job_writes_it_does_not_read(self, prepared, job, name):
        run("embed", prepared, prepared)
        run("caption", prepared, prepared)
        (prepared / "rejects").mkdir(exist_ok=True)
        with pytest.raises(OptionError, match=r"is where .* is read from"):
            run(job, prepared / name, prepared)


@pytest.mark.parametrize("job", DATASETS)
class TestKilled:
    def test_wherever_it_is_the_next_run_completes_it(self, scenes, tmp_path, job, monkeypatch):
        """Ends runs at every other change of the file system: the output is an undisturbed run's in the end."""
        good = sorted((scenes.flickr30k / "flickr30k-images").iterdir())[:3]
        with tarfile.open(tmp_path / "in.tar", "w") as tar:
            for number, path in enumerate(good):
                for name, data in ((f"{number}.jpg", path.read_bytes()), (f"{number}.txt", b"a\nb\nc")):
                    if name != "1.txt":
                        info = tarfile.TarInfo(name)
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
        base = tmp_path / "base"
        prepare(PrepareOptions((str(tmp_path / "in.tar"),), str(base), chunk_rows=2, quiet=True))
        shutil.copytree(base, tmp_path / "undisturbed")
        run(job, tmp_path / "undisturbed", tmp_path / "undisturbed")
        expected = files_in(tmp_path / "undisturbed")
        (tmp_path / "kills").mkdir()
        num_states = check_kills(
            tmp_path / "kills",
            lambda out: run(job, out, out),
            expected,
            lambda out: shutil.copytree(base, out),
            step=2,
        )
        assert num_states > 2 * 2


def test_killed_by_the_system(prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    Word2Vec(["red", "blue"], np.array([[1, 2], [3, 4]], np.float32)).save(folder)
    whole = tmp_path / "whole"
    shutil.copytree(prepared, whole)
    options = {"model": ModelSpec("word2vec", str(folder), TextOptions()), "chunk_rows": 1}
    run("embed", whole, whole, **options)
    command = [sys.executable, "-m", "diptych", "embed", f"--input={prepared}", f"--output={prepared}"]
    command += [f"--model=word2vec:{folder}", "--chunk_rows=1", "--quiet"]
    written = prepared / "embeddings"
    with subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True) as process:
        while process.poll() is None and not (written.is_dir() and len(os.listdir(written)) >= 5):
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len(os.listdir(written)) < 50
    assert run("embed", prepared, prepared, **options) is State.RESUMED
    assert files_in(prepared) == files_in(whole)


class TestModelFailures:
    def test_a_device_that_dies_ends_the_job_and_rejects_nothing(self, prepared, tmp_path, monkeypatch):
        run("embed", prepared, tmp_path / "whole")
        calls = itertools.count()
        predict = FakeText.predict

        def predict_until_it_dies(model: FakeText, batch: list[bytes]) -> list[Any]:
            if next(calls) >= 10:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return predict(model, batch)

        with monkeypatch.context() as patch:
            patch.setattr(FakeText, "predict", predict_until_it_dies)
            with pytest.raises(DeviceError, match="illegal memory access"):
                run("embed", prepared, tmp_path / "out")
        assert not (tmp_path / "out" / "rejects").exists()
        assert len(list((tmp_path / "out" / "embeddings").iterdir())) > 0
        assert run("embed", prepared, tmp_path / "out") is State.RESUMED
        assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")

    def test_one_caption_costs_one_row(self, tmp_path):
        texts = [[f"caption {number}", "another"] for number in range(30)]
        texts[11][1] = TROUBLE
        table = pa.table({"key": [f"k{number}" for number in range(30)], "captions": texts})
        pq.write_table(table, tmp_path / "a.parquet")
        run("embed", tmp_path / "a.parquet", tmp_path / "out")
        assert len(rows_in(tmp_path / "out", "embeddings")) == 59
        (path,) = (tmp_path / "out/rejects").rglob("*.parquet")
        (lost,) = pq.read_table(path).to_pylist()
        assert (path.parent.name, lost["stage"], lost["reason"]) == ("embed", "embed", "model_error")
        assert (lost["key"], lost["row"]) == ("k11", 11)
        assert lost["message"] == "ValueError: cannot read 'a trouble'"
        assert problems(tmp_path / "out") == []

    def test_one_photo_costs_one_row(self, prepared, monkeypatch):
        image = table_in(prepared, "images").to_pylist()[17]
        digest = hashlib.sha256(image["image"]["bytes"]).hexdigest()
        monkeypatch.setattr(FakeCaptions, "trouble", frozenset([digest]))
        run("caption", prepared, prepared)
        rows = rows_in(prepared, "captions")
        assert len(rows) == 49
        assert image["key"] not in {row["key"] for row in rows}
        assert os.listdir(prepared / "rejects") == ["caption"]
        assert problems(prepared) == []

    @pytest.mark.parametrize("count", [2, 100])
    def test_too_many_stop_the_job_and_the_next_run_as_well(self, tmp_path, count):
        texts = ["fine", *(f"{TROUBLE} {number}" for number in range(count))]
        pq.write_table(pa.table({"captions": texts}), tmp_path / "a.parquet")
        for _ in range(2):
            with pytest.raises(DiptychError, match=r"more than --max_failure_rate 0\.1 .*'a trouble \d+'"):
                run("embed", tmp_path / "a.parquet", tmp_path / "out")
            assert read_success(str(tmp_path / "out")) is None
        assert run("embed", tmp_path / "a.parquet", tmp_path / "out", max_failure_rate=1.0) is State.RESUMED
        assert problems(tmp_path / "out") == []


class TestSeveralDataSets:
    @pytest.fixture
    def full(self, prepared):
        run("embed", prepared, prepared)
        run("caption", prepared, prepared)
        return prepared

    def test_each_keeps_what_the_others_left(self, full):
        assert (
            set(read_jobs(str(full))) == set(read_success(str(full))) == {"images", "embeddings", "captions"}
        )
        assert list(verify(str(full)).lines()) == [
            "captions: 6 shards, 10 files: 50 rows read = 50 written + 0 rejected",
            "embeddings: 6 shards, 10 files: 250 rows read = 250 written + 0 rejected",
            "images: 4 shards, 6 files: 50 rows read = 50 written + 0 rejected",
            "complete and sound",
        ]

    def test_prepare_finds_its_images_done(self, full, scenes):
        before = files_in(full)
        options = PrepareOptions((str(scenes.webdataset),), str(full), chunk_rows=10, quiet=True)
        assert prepare(options).state is State.DONE
        assert files_in(full) == before

    def test_an_image_file_that_is_made_again_changes_nothing(self, full, scenes):
        before = files_in(full)
        sorted((full / "images").iterdir())[1].unlink()
        options = PrepareOptions((str(scenes.webdataset),), str(full), chunk_rows=10, quiet=True)
        with pytest.raises(InputError, match="holds no images, or not all"):
            run("caption", full, full)
        assert prepare(options).state is State.RESUMED
        assert files_in(full) == before
        assert run("caption", full, full) is State.DONE

    def test_overwriting_one_leaves_the_others(self, full, monkeypatch):
        image = table_in(full, "images").to_pylist()[3]
        digest = hashlib.sha256(image["image"]["bytes"]).hexdigest()
        before = {name: data for name, data in files_in(full).items() if name.startswith(("im", "em"))}
        monkeypatch.setattr(FakeCaptions, "trouble", frozenset([digest]))
        assert run("caption", full, full, chunk_rows=3, overwrite=True) is State.FRESH
        assert len(list((full / "rejects/caption").iterdir())) == 1
        assert problems(full) == []
        monkeypatch.undo()
        monkeypatch.setattr(spec_module, "_loaded", {})
        monkeypatch.setattr(spec_module, "_load", FakeCaptions)
        assert run("caption", full, full, overwrite=True) is State.FRESH
        after = files_in(full)
        assert {name: data for name, data in after.items() if name.startswith(("im", "em"))} == before
        assert not any(name.startswith("rejects/") for name in after)
        assert problems(full) == []

    def test_overwriting_the_images_deletes_what_was_made_from_them(self, full, scenes):
        options = PrepareOptions((str(scenes.webdataset),), str(full), quiet=True, overwrite=True)
        assert prepare(options).state is State.FRESH
        assert set(read_jobs(str(full))) == set(read_success(str(full))) == {"images"}
        assert {name.split("/")[0] for name in files_in(full)} == {
            "images",
            "_job.json",
            "_SUCCESS.json",
            "_records",
        }

    def test_other_images_are_refused(self, full, scenes):
        before = files_in(full)
        with pytest.raises(OutputError, match="holds the images of another run"):
            prepare(PrepareOptions((str(scenes.webdataset),), str(full), quiet=True))
        assert files_in(full) == before

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_data_set_of_another_input_is_refused(self, full, scenes, overwrite):
        shutil.rmtree(full / "captions")
        before = files_in(full)
        with pytest.raises(OutputError, match=r"holds embeddings, images, made from another input than this"):
            run("caption", scenes.webdataset, full, overwrite=overwrite)
        assert files_in(full) == before

    def test_raw_data_sets_do_not_share_an_output(self, scenes, tmp_path):
        run("embed", scenes.webdataset, tmp_path)
        with pytest.raises(OutputError, match="holds embeddings, made from another input than this"):
            run("caption", scenes.webdataset, tmp_path)
        with pytest.raises(OutputError, match="holds embeddings, made from another input than this"):
            prepare(PrepareOptions((str(scenes.webdataset),), str(tmp_path), quiet=True))
        prepare(PrepareOptions((str(scenes.webdataset),), str(tmp_path), quiet=True, overwrite=True))
        assert set(read_jobs(str(tmp_path))) == {"images"}

    def test_rejects_without_a_caption_belong_to_the_embeddings(self, scenes, tmp_path):
        jpeg = next((scenes.flickr30k / "flickr30k-images").iterdir()).read_bytes()
        (tmp_path / "in").mkdir()
        for name, data in (("a.jpg", jpeg), ("b.jpg", b"junk")):
            (tmp_path / "in" / name).write_bytes(data)
        out = tmp_path / "out"
        prepare(PrepareOptions((str(tmp_path / "in"),), str(out), quiet=True))
        with pytest.raises(NothingWritten, match="no_caption 1"):
            run("embed", out, out)
        assert sorted(name for name in files_in(out) if name.startswith("rejects")) == [
            "rejects/embed/files-00000-00000-00000.parquet",
            "rejects/image/files-00000-00000.parquet",
        ]
        with pytest.raises(NothingWritten):
            run("embed", out, out, chunk_rows=1, overwrite=True)
        assert [problem for problem in problems(out) if "_SUCCESS.json" not in problem] == []
        (out / "rejects/embed/files-00000-00000-00000.parquet").unlink()
        assert any("rejects/embed/files-00000-00000-00000.parquet holds {}" in p for p in problems(out))

    def test_two_jobs_that_want_captions_keep_their_rejects_apart(self, scenes, tmp_path):
        jpegs = sorted((scenes.flickr30k / "flickr30k-images").iterdir())[:3]
        (tmp_path / "in").mkdir()
        for path in jpegs:
            shutil.copy(path, tmp_path / "in")
        out = tmp_path / "out"
        prepare(PrepareOptions((str(tmp_path / "in"),), str(out), quiet=True))
        with pytest.raises(NothingWritten):
            run("embed", out, out, chunk_rows=3)
        before = files_in(out)
        with pytest.raises(NothingWritten):
            run("generate", out, out, chunk_rows=2)
        rejects = {name: data for name, data in before.items() if name.startswith("rejects/embed")}
        assert rejects.items() <= files_in(out).items()
        assert [problem for problem in problems(out) if "_SUCCESS.json" not in problem] == []

    def test_a_data_set_that_has_only_begun_is_not_complete(self, full):
        jobs = read_jobs(str(full))
        shutil.rmtree(full / "captions")
        values = json.loads((full / "_SUCCESS.json").read_text())
        del values["captions"]
        (full / "_SUCCESS.json").write_text(json.dumps(values))
        assert set(jobs) == {"images", "embeddings", "captions"}
        assert ["captions is not in" in problem for problem in problems(full)] == [True]

    def test_a_damaged_file_of_any_is_found(self, full):
        for dataset in ("captions", "embeddings"):
            path = sorted((full / dataset).iterdir())[0]
            whole = path.read_bytes()
            path.write_bytes(whole[:-1])
            assert any(f"{dataset}/{path.name} cannot be read" in problem for problem in problems(full))
            table = pq.read_table(io.BytesIO(whole))
            pq.write_table(pa.concat_tables([table.slice(0, 1), table.slice(0, len(table) - 1)]), path)
            assert any(f"{dataset} of shard" in p and "1 keys twice" in p for p in problems(full))
            path.write_bytes(whole)
        assert problems(full) == []


class TestCommandLine:
    @pytest.fixture
    def model(self, tmp_path):
        folder = tmp_path / "model"
        folder.mkdir()
        Word2Vec(["red", "blue"], np.array([[1, 2], [3, 4]], np.float32)).save(folder)
        return folder

    def test_embed_says_what_it_did(self, prepared, model, capsys):
        argv = ["embed", f"--input={prepared}", f"--output={prepared}", f"--model=word2vec:{model}"]
        assert main(argv) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == ["read      250 captions", f"written   250 to {prepared}/embeddings"]
        assert lines[2] == "rejected  0"
        assert "captions without known word" in lines[3]
        assert lines[-1].endswith(" captions/s")
        assert main(argv) == 0
        assert capsys.readouterr().out.endswith("nothing to do: an earlier run has finished this\n")

    @pytest.mark.parametrize(
        ("flags", "code", "message"),
        [
            (["--model=word2vex:x"], 2, "--model is 'word2vex:x'. It must be KIND:LOCATION"),
            (["--model=hf:x"], 2, "where KIND is word2vec or bert"),
            (["--model=word2vec"], 2, "It must be KIND:LOCATION"),
            (["--model=word2vec:"], 2, "It must be KIND:LOCATION"),
            (["--model=word2vec:nowhere"], 1, "There is no model at 'nowhere'"),
            (["--model=word2vec:MODEL", "--pooling=cls"], 2, "--pooling cls does not go with word2vec"),
            (["--model=word2vec:MODEL", "--device=gpu"], 2, "--device is gpu"),
            (["--model=word2vec:MODEL", "--batch_size=0"], 2, "--batch_size is 0"),
            (["--model=word2vec:MODEL", "--max_failure_rate=2"], 2, "--max_failure_rate is 2"),
            ([], 2, "required: --model"),
            (["--model=word2vec:MODEL", "--metadata_columns=a"], 2, "--metadata_columns=a is no flag"),
        ],
    )
    def test_a_mistake_is_one_paragraph(self, prepared, model, capsys, monkeypatch, flags, code, message):
        monkeypatch.chdir(prepared.parent)
        before = files_in(prepared)
        argv = ["embed", "--input=prepared", "--output=prepared", *flags]
        assert main([arg.replace("MODEL", str(model)) for arg in argv]) == code
        error = capsys.readouterr().err
        assert error.startswith("diptych: ")
        assert error.count("\n") == 1
        assert message in error
        assert files_in(prepared) == before

    def test_caption_from_the_command_line(self, prepared, capsys):
        argv = ["caption", f"--input={prepared}", f"--output={prepared}", "--model=hf:fake", "--features"]
        assert main(argv) == 0
        assert "read      50 rows" in capsys.readouterr().out
        assert table_in(prepared, "captions").schema.names[-1] == "features"


class TestLaws:
    @pytest.fixture
    def graph(self, scenes, tmp_path):
        spec = ModelSpec("bert", "fake", TextOptions())
        options = ModelJobOptions((str(scenes.webdataset),), str(tmp_path), model=spec)
        shards = open_source(options.inputs, "auto", SourceOptions()).shards("", 10)
        pipeline = new_pipeline(())
        branch = embed_branch(options, pipeline)
        about = {"job": "embed", "versions": {"diptych": "1"}}
        job = Job({"embeddings": branch.written}, about, 10, options)
        before = {"CleanCaptions": CleanCaptions(CleanOptions())}
        sinks = job.sinks({name: claim.record() for name, claim in job.claims().items()})
        model_graph(pipeline, shards, job, sinks, branch, before, with_images=False)
        return pipeline.to_runner_api()

    def test_reading_to_writing_is_one_fused_stage(self, graph):
        _, stages = FnApiRunner().create_stages(graph)
        of_step = {transform.unique_name: stage.name for stage in stages for transform in stage.transforms}
        steps = (
            "ReadShards/Read/ParDo(_Read)",
            "CleanCaptions/Clean",
            "MakeDataset/ExplodeCaptions/Explode",
            "MakeDataset/RunModel/Prepare",
            "MakeDataset/RunModel/Infer/BeamML_RunInference",
            "MakeDataset/WriteChunks/Write",
        )
        assert len({of_step[step] for step in steps}) == 1

    def test_chunks_have_their_coder(self, graph):
        coders = {
            collection.unique_name: graph.components.coders[collection.coder_id].spec.payload
            for collection in graph.components.pcollections.values()
        }
        found = [payload for name, payload in coders.items() if "RunModel/" in name]
        assert len(found) == 2
        assert all(b"ChunkCoder" in payload for payload in found)
