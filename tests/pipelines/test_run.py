"""`run` from end to end, on drawn scenes, with small models of every kind: what it writes is what the jobs write."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from kills import check_kills, files_in

from diptych.models import spec as spec_module
from diptych.models.base import CaptionOptions, ImageOptions, TextOptions
from diptych.models.captioning.captioner import CaptionNetwork
from diptych.models.captioning.decoder import Decoder, DecoderConfig
from diptych.models.captioning.encoder import create_encoder
from diptych.models.captioning.vocabulary import Vocabulary
from diptych.models.generation.generator import Generator, GeneratorConfig
from diptych.models.generation.image_generator import save_generator
from diptych.models.spec import ModelSpec
from diptych.models.text.text_model import TextModelRef
from diptych.models.text.word2vec import Word2Vec
from diptych.pipelines.caption import caption
from diptych.pipelines.cli import main
from diptych.pipelines.demo_data import layouts
from diptych.pipelines.demo_data.layouts import SceneFolders, write_data_set
from diptych.pipelines.demo_data.scenes import COLOURS, SHAPES
from diptych.pipelines.embed import embed
from diptych.pipelines.generate import generate
from diptych.pipelines.lifecycle.output_folder import State
from diptych.pipelines.options.generate import GenerateOptions
from diptych.pipelines.options.models import ModelJobOptions
from diptych.pipelines.options.prepare import PrepareOptions
from diptych.pipelines.options.run import RunOptions
from diptych.pipelines.prepare import prepare
from diptych.pipelines.run import run
from diptych.pipelines.verify import verify
from diptych.transforms.errors import InputError, OptionError, OutputError
from diptych.transforms.finish import read_success
from diptych.transforms.images import resize
from diptych.transforms.images.resize import ResizeOptions

DATASETS = ("images", "embeddings", "captions", "generated")
CHUNK_ROWS = 7
SIZE = ResizeOptions(size_px=48)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> SceneFolders:
    """30 scenes; the tar files hold 12 each at most."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "_SHARD_SCENES", 12)
        return write_data_set(str(tmp_path_factory.mktemp("scenes") / "data"), 30, seed=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSpec]:
    """Models with random weights, saved, one for each job."""
    home = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    names = [*COLOURS, *SHAPES]
    (home / "words").mkdir()
    vectors = np.random.default_rng(0).standard_normal((len(names), 4)).astype(np.float32)
    words = Word2Vec(names, vectors)
    words.save(home / "words")
    source = TextModelRef.of(f"word2vec:{home / 'words'}", TextOptions(), words.digest)
    config = GeneratorConfig(size_px=16, text_dim=4, latent_dim=3, condition_dim=4, channels=4)
    save_generator(home / "vae", "vae", Generator(config), source)
    vocabulary = Vocabulary.build(dict.fromkeys(names, 1), 1)
    encoder = create_encoder("timm:test_resnet", 32)
    shape = DecoderConfig("lstm", True, len(vocabulary), encoder.dim, encoder.num_regions, 8, 8, 8)
    CaptionNetwork(encoder, Decoder(shape), vocabulary).save(home / "captioner")
    return {
        "embed": ModelSpec("word2vec", str(home / "words"), TextOptions(), "cpu"),
        "caption": ModelSpec("cnn-lstm", str(home / "captioner"), CaptionOptions(max_words=4), "cpu"),
        "generate": ModelSpec("vae", str(home / "vae"), ImageOptions(), "cpu"),
    }


def options_of(data: object, out: Path, models: dict[str, ModelSpec], **options: Any) -> RunOptions:
    job: dict[str, Any] = {
        "inputs": (str(data),),
        "output": str(out),
        "chunk_rows": CHUNK_ROWS,
        "quiet": True,
        **options,
    }
    asked = {**job, "overwrite": False}
    return RunOptions(
        **job,
        resize=SIZE,
        embed=ModelJobOptions(**asked, model=models["embed"]),
        caption=ModelJobOptions(**asked, model=models["caption"]),
        generate=GenerateOptions(**asked, model=models["generate"], images_per_prompt=2, seed=3),
    )


def rows_in(folder: Path, dataset: str) -> list[dict[str, Any]]:
    rows = pyarrow.dataset.dataset(folder / dataset).to_table().to_pylist()
    names = ("key", "caption_index", "prompt_index", "sample")
    return sorted(rows, key=lambda row: tuple(row.get(name, 0) for name in names))


@pytest.fixture(scope="module")
def undisturbed(scenes, models, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    assert run(options_of(scenes.webdataset, out, models)).state is State.FRESH
    return out


class TestRun:
    def test_the_rows_are_those_of_the_jobs_one_after_the_other(self, scenes, models, undisturbed, tmp_path):
        job: dict[str, Any] = {"chunk_rows": CHUNK_ROWS, "quiet": True}
        out = str(tmp_path)
        prepare(PrepareOptions((str(scenes.webdataset),), out, resize=SIZE, **job))
        embed(ModelJobOptions((out,), out, model=models["embed"], **job))
        caption(ModelJobOptions((out,), out, model=models["caption"], **job))
        generate(GenerateOptions((out,), out, model=models["generate"], images_per_prompt=2, seed=3, **job))
        for dataset in DATASETS:
            assert rows_in(undisturbed, dataset) == rows_in(tmp_path, dataset)
        ours, theirs = read_success(str(undisturbed)), read_success(out)
        assert ours.keys() == theirs.keys() == {*DATASETS}
        for dataset, totals in ours.items():
            of_files = {name: getattr(totals, name) for name in ("shards", "files", "size_bytes")}
            assert totals == dataclasses.replace(theirs[dataset], **of_files)

    def test_all_of_it_is_verified(self, undisturbed):
        found = verify(str(undisturbed))
        assert found.problems == []
        totals = read_success(str(undisturbed))
        assert {name: total.written for name, total in totals.items()} == {
            **{"images": 30, "embeddings": 150, "captions": 30, "generated": 300}
        }

    def test_each_image_is_decoded_once_and_each_model_loaded_once(
        self, scenes, models, tmp_path, monkeypatch
    ):
        decoded, loaded = [], []
        decode, load = resize.decode, spec_module._load
        monkeypatch.setattr(resize, "decode", lambda data, *args: decoded.append(1) or decode(data, *args))
        monkeypatch.setattr(spec_module, "_load", lambda spec: loaded.append(spec.kind) or load(spec))
        monkeypatch.setattr(spec_module, "_loaded", {})
        run(options_of(scenes.webdataset, tmp_path, models))
        assert len(decoded) == 30
        assert sorted(loaded) == ["cnn-lstm", "vae", "word2vec"]

    @pytest.mark.parametrize("flags", [("--direct_num_workers=2",), ("--direct_runner_bundle_repeat=2",)])
    def test_the_runner_decides_no_byte(self, scenes, models, undisturbed, tmp_path, flags):
        run(options_of(scenes.webdataset, tmp_path, models, beam_args=flags))
        assert files_in(tmp_path) == files_in(undisturbed)

    def test_reading_to_writing_is_one_fused_stage(self, scenes, models, tmp_path, monkeypatch):
        pipelines = []
        monkeypatch.setattr(
            "diptych.pipelines.lifecycle.launch.run_pipeline", lambda pipeline, *_: pipelines.append(pipeline)
        )
        with pytest.raises(OutputError, match="record of its images"):  # nothing ran
            run(options_of(scenes.webdataset, tmp_path, models))
        _, stages = FnApiRunner().create_stages(pipelines[0].to_runner_api())
        of_step = {transform.unique_name: stage.name for stage in stages for transform in stage.transforms}
        steps = ["ReadShards/Read/ParDo(_Read)", "WriteChunks/Write"]
        steps += [f"{name}/WriteChunks/Write" for name in ("Embed", "Caption", "Generate")]
        assert len({of_step[step] for step in steps}) == 1

    def test_a_bad_image_costs_its_rows_and_no_others(self, scenes, models, tmp_path):
        (tmp_path / "in").mkdir()
        good = sorted((scenes.flickr30k / "flickr30k-images").iterdir())[:2]
        for path in good:
            shutil.copy(path, tmp_path / "in")
        (tmp_path / "in" / "bad.jpg").write_bytes(b"junk")
        run(options_of(tmp_path / "in", tmp_path / "out", models))
        totals = read_success(str(tmp_path / "out"))
        assert totals["images"].rejected == {"not_an_image": 1}
        assert totals["captions"].written == 2
        assert totals["embeddings"].rejected == totals["generated"].rejected == {"no_caption": 2}
        assert verify(str(tmp_path / "out")).problems == []


class TestAgain:
    def test_a_second_run_has_nothing_to_do(self, scenes, models, undisturbed):
        before = files_in(undisturbed)
        assert run(options_of(scenes.webdataset, undisturbed, models)).state is State.DONE
        assert files_in(undisturbed) == before

    @pytest.mark.parametrize("dataset", DATASETS)
    def test_a_data_file_that_was_deleted_is_made_again(self, scenes, models, undisturbed, tmp_path, dataset):
        out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
        sorted((out / dataset).iterdir())[2].unlink()
        assert run(options_of(scenes.webdataset, out, models)).state is State.RESUMED
        assert files_in(out) == files_in(undisturbed)

    def test_another_option_of_a_model_is_refused_and_overwrites_on_request(
        self, scenes, models, undisturbed, tmp_path
    ):
        out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
        other = {
            **models,
            "embed": ModelSpec("word2vec", models["embed"].location, TextOptions(normalize=True)),
        }
        with pytest.raises(Exception, match=r"options.embed.model.digest is '\w+' there and '\w+' here"):
            run(options_of(scenes.webdataset, out, other))
        assert files_in(out) == files_in(undisturbed)
        assert run(options_of(scenes.webdataset, out, other, overwrite=True)).state is State.FRESH
        assert rows_in(out, "captions") == rows_in(undisturbed, "captions")
        assert rows_in(out, "embeddings") != rows_in(undisturbed, "embeddings")
        assert verify(str(out)).problems == []

    def test_a_model_that_cannot_be_loaded_fails_before_anything(self, scenes, models, tmp_path):
        other = {**models, "generate": ModelSpec("gan", models["generate"].location, ImageOptions())}
        with pytest.raises(
            InputError, match=r"is of kind 'vae'\. Expected a folder with a model of kind gan"
        ):
            run(options_of(scenes.webdataset, tmp_path / "out", other))
        assert not (tmp_path / "out").exists()


class Killed(BaseException):
    """Stands for the end of the process."""


class TestKilled:
    @pytest.mark.parametrize("step", [9, pytest.param(3, marks=pytest.mark.long)])
    def test_wherever_it_is_the_next_run_completes_it(self, scenes, models, tmp_path, step):
        """Ends runs at changes of the file system: the output is an undisturbed run's in the end."""
        (tmp_path / "in").mkdir()
        table = {
            "key": ["a", "b", "c"],
            "image": [
                {"bytes": path.read_bytes(), "path": None}
                for path in sorted((scenes.flickr30k / "flickr30k-images").iterdir())[:3]
            ],
            "caption": ["a red star", None, "two blue moons"],
        }
        table["image"][2]["bytes"] = b"junk"
        pq.write_table(pa.table(table), tmp_path / "in" / "a.parquet")
        job = {"chunk_rows": 2}
        run(options_of(tmp_path / "in", tmp_path / "undisturbed", models, **job))
        expected = files_in(tmp_path / "undisturbed")
        num_states = check_kills(
            tmp_path, lambda out: run(options_of(tmp_path / "in", out, models, **job)), expected, step=step
        )
        assert num_states > 2 * 4 * 3 / step


class TestCommandLine:
    def test_says_what_it_did(self, scenes, models, undisturbed, tmp_path, capsys):
        out = tmp_path / "out"
        argv = ["run", f"--input={scenes.webdataset}", f"--output={out}", "--size=48", "--chunk_rows=7"]
        argv += [f"--{job}={spec}" for job, spec in models.items()]
        argv += ["--device=cpu", "--max_words=4", "--images_per_prompt=2", "--seed=3"]
        assert main(argv) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == ["read      30 rows", f"written   30 to {out}/images"]
        assert f"written   300 to {out}/generated" in lines
        assert [line for line in lines if line.startswith("took")] == [lines[-1]]
        assert files_in(out) == files_in(undisturbed)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ([], "--embed is not there. It must be given with a model, or --caption, or --generate"),
            (["--embed=hf:x"], "--embed is 'hf:x'. It must be KIND:LOCATION, where KIND is word2vec or bert"),
            (["--caption=bert:x"], "--caption is 'bert:x'"),
            (["--generate=vae"], "--generate is 'vae'"),
            (["--embed=word2vec:x", "--batch_size=0"], "--batch_size is 0"),
        ],
    )
    def test_a_mistake_is_one_paragraph(self, scenes, tmp_path, capsys, flags, message):
        argv = ["run", f"--input={scenes.webdataset}", f"--output={tmp_path / 'out'}", *flags]
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("diptych: ")
        assert error.count("\n") == 1
        assert message in error

    def test_metadata_columns_are_the_images_own(self, scenes, models, tmp_path):
        jpeg = next((scenes.flickr30k / "flickr30k-images").iterdir()).read_bytes()
        table = pa.table({"key": ["a"], "image": [jpeg], "caption": ["red"], "licence": ["free"]})
        (tmp_path / "in").mkdir()
        pq.write_table(table, tmp_path / "in" / "a.parquet")
        argv = ["run", f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}", "--quiet"]
        argv += [f"--embed={models['embed']}", "--metadata_columns=licence"]
        assert main(argv) == 0
        names = pq.read_schema(next((tmp_path / "out/images").iterdir())).names
        assert "licence" in names
        assert json.loads((tmp_path / "out/_SUCCESS.json").read_bytes()).keys() == {"images", "embeddings"}


FLAGS = ("--size=48", "--chunk_rows=7", "--device=cpu", "--max_words=4", "--images_per_prompt=2", "--seed=3")


class TestRunners:
    """The same on Flink, and with data and models in a bucket."""

    def test_flink(self, scenes, models, undisturbed, tmp_path, run_command, flink_jar):
        flink = ["--runner=FlinkRunner", "--flink_master=[local]", f"--flink_job_server_jar={flink_jar}"]
        flink += ["--environment_type=LOOPBACK", "--parallelism=2", "--job_server_jvm_properties=-Xmx512m"]
        command = [sys.executable, "-m", "diptych", "run", *FLAGS, *flink]
        command += [f"--input={scenes.webdataset}", f"--output={tmp_path / 'out'}"]
        command += [f"--{job}={spec}" for job, spec in models.items()]
        done = run_command(command, timeout_s=200)
        assert done.returncode == 0, done.stderr
        assert files_in(tmp_path / "out") == files_in(undisturbed)

    def test_a_bucket(self, scenes, models, undisturbed, gcs, monkeypatch, tmp_path):
        monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "cache"))
        fs = fsspec.filesystem("gs")
        for path in scenes.webdataset.iterdir():
            fs.pipe_file(f"{gcs.url}/data/{path.name}", path.read_bytes())
        home = Path(models["embed"].location).parent
        for path in home.rglob("*"):
            if path.is_file():
                fs.pipe_file(f"{gcs.url}/models/{path.relative_to(home)}", path.read_bytes())
        out = f"{gcs.url}/out"
        argv = ["run", *FLAGS, "--quiet", f"--input={gcs.url}/data", f"--output={out}"]
        for job, spec in models.items():
            argv.append(f"--{job}={spec.kind}:{gcs.url}/models/{Path(spec.location).name}")
        # the VAE remembers where its text model was on the disk
        argv.append(f"--text_model=word2vec:{gcs.url}/models/words")
        assert main(argv) == 0
        fs.invalidate_cache()
        fs.get(out.removeprefix("gs://"), str(tmp_path / "down"), recursive=True)
        for dataset in DATASETS:
            assert rows_in(tmp_path / "down", dataset) == rows_in(undisturbed, dataset)
        there, here = (
            {
                name: dataclasses.replace(totals, size_bytes=0)
                for name, totals in read_success(str(out)).items()
            }
            for out in (tmp_path / "down", undisturbed)
        )
        assert there == here  # the models of the one were elsewhere, as its files say
        assert verify(out).problems == []


def test_options_without_a_model() -> None:
    with pytest.raises(OptionError, match="--embed is not there"):
        RunOptions(("a",), "b")
