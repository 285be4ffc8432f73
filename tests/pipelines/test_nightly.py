"""Jobs that run again and again over data that grow: each makes what is new."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.dataset
import pytest
from fake_models import TROUBLE, use_fakes

from diptych.models.base import CaptionOptions, ImageOptions, TextOptions
from diptych.models.spec import ModelSpec
from diptych.pipelines.caption import caption
from diptych.pipelines.cli import main
from diptych.pipelines.demo_data import layouts
from diptych.pipelines.demo_data.layouts import write_data_set
from diptych.pipelines.embed import embed
from diptych.pipelines.generate import generate
from diptych.pipelines.lifecycle import skip_done
from diptych.pipelines.lifecycle.output_folder import State, read_jobs
from diptych.pipelines.options.generate import GenerateOptions
from diptych.pipelines.options.models import ModelJobOptions
from diptych.pipelines.options.prepare import PrepareOptions
from diptych.pipelines.prepare import prepare
from diptych.pipelines.verify import verify
from diptych.transforms.errors import InputError, OutputError
from diptych.transforms.fingerprint import digest
from diptych.transforms.finish import read_success
from diptych.transforms.sources.base import ColumnNames
from diptych.transforms.sources.open import SourceOptions
from diptych.transforms.sources.sharded.parquet import ParquetShard
from diptych.transforms.sources.sharded.prepared_captions import TextShard

DATASETS = {"embed": "embeddings", "caption": "captions", "generate": "generated"}
MODELS = {
    "embed": ModelSpec("bert", "fake", TextOptions()),
    "caption": ModelSpec("hf", "fake", CaptionOptions()),
    "generate": ModelSpec("diffusers", "fake", ImageOptions()),
}


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fakes(monkeypatch)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Tar files of 20 scenes each, as one a night comes in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "_SHARD_SCENES", 20)
        folder = write_data_set(str(tmp_path_factory.mktemp("scenes") / "data"), 60, seed=1).webdataset
    return [path.read_bytes() for path in sorted(folder.glob("train-*.tar"))[:2]]


@pytest.fixture
def data(tmp_path: Path, shards: list[bytes]) -> Path:
    """A folder that the first night's tar file is in."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-0.tar").write_bytes(shards[0])
    return tmp_path / "data"


def run(job: str, data: Path | str, out: Path | str, earlier: str, **options: Any) -> State:
    options = {
        "inputs": (str(data),),
        "output": str(out),
        "model": MODELS[job],
        "chunk_rows": 7,
        "quiet": True,
        "skip_done_in": (earlier,),
    } | options
    if job == "generate":
        return generate(GenerateOptions(**options)).state
    return {"embed": embed, "caption": caption}[job](ModelJobOptions(**options)).state


def keys_in(root: Path | str, dataset: str) -> list[str]:
    fs, path = fsspec.core.url_to_fs(str(root))
    names = [name for name in fs.ls(f"{path}/{dataset}", detail=False) if name.endswith(".parquet")]
    table = pyarrow.dataset.dataset(names, filesystem=fs, format="parquet").to_table(["key"])
    return table.column("key").to_pylist()


@pytest.mark.parametrize("job", DATASETS)
def test_each_night_makes_what_is_new(job, data, shards, tmp_path):
    dataset, earlier = DATASETS[job], str(tmp_path / "nights" / "*")
    first, second, third = (tmp_path / "nights" / day for day in ("2026-11-20", "2026-11-21", "2026-11-22"))
    assert run(job, data, first, earlier) is State.FRESH
    (data / "train-1.tar").write_bytes(shards[1])
    run(job, data, second, earlier)
    run(job, data, third, earlier)
    old, new = keys_in(first, dataset), keys_in(second, dataset)
    assert len({*old}) == len({*new}) == 20
    assert not {*old} & {*new}
    assert keys_in(third, dataset) == []
    totals = read_success(str(second))[dataset]
    assert totals.counters["done_before"] == 20
    assert totals.read == totals.written
    assert read_success(str(third))[dataset].counters["done_before"] == 40
    assert [verify(str(night)).problems for night in (first, second, third)] == [[], [], []]
    assert not (second / "_plan").exists()
    # the same command once more has nothing to do, whatever came in between
    assert run(job, data, second, earlier) is State.DONE


@pytest.mark.parametrize("job", DATASETS)
def test_of_prepared_images_those_that_are_done_are_not_read(job, data, shards, tmp_path, monkeypatch):
    dataset, earlier = DATASETS[job], str(tmp_path / "nights" / "*")
    days = [tmp_path / "days" / "1", tmp_path / "days" / "2"]
    prepare(PrepareOptions((str(data),), str(days[0]), chunk_rows=7, quiet=True))
    run(job, days[0], tmp_path / "nights" / "1", earlier)
    (data / "train-0.tar").unlink()
    (data / "train-1.tar").write_bytes(shards[1])
    prepare(PrepareOptions((str(data),), str(days[1]), chunk_rows=7, quiet=True))
    read = []
    for shard, reads in ((ParquetShard, "records"), (TextShard, "batches")):
        real = getattr(shard, reads)
        monkeypatch.setattr(
            shard, reads, lambda self, skip, real=real: (read.append(self.url), real(self, skip))[1]
        )
    both = tuple(map(str, days))
    run(job, "", tmp_path / "nights" / "2", earlier, inputs=both)
    assert {Path(url).parents[1].name for url in read} == {"2"}
    names = sorted(path.name for path in (tmp_path / "nights" / "2" / dataset).glob("*.parquet"))
    assert len(names) == 3
    assert all("train-1" in name for name in names)
    totals = read_success(str(tmp_path / "nights" / "2"))[dataset]
    assert (totals.shards, totals.counters["done_before"]) == (3, 20)
    assert (
        totals.read == totals.written == (20 if job == "caption" else 100)
    )  # there are five captions an image
    run(job, "", tmp_path / "nights" / "3", earlier, inputs=both)
    assert run(job, "", tmp_path / "nights" / "3", earlier, inputs=both) is State.DONE
    assert read_success(str(tmp_path / "nights" / "3"))[dataset].counters == {"done_before": 40}
    assert [verify(str(tmp_path / "nights" / night)).problems for night in "123"] == [[], [], []]


def test_other_keys_than_those_of_the_preparation_are_looked_at_row_by_row(data, tmp_path):
    prepared, earlier = tmp_path / "prepared", str(tmp_path / "nights" / "*")
    prepare(PrepareOptions((str(data),), str(prepared), chunk_rows=7, quiet=True))
    run("caption", prepared, tmp_path / "nights" / "1", earlier)
    run(
        "caption",
        prepared,
        tmp_path / "nights" / "2",
        earlier,
        source=SourceOptions(columns=ColumnNames(key="sha256")),
    )
    assert len(keys_in(tmp_path / "nights" / "2", "captions")) == 20


def test_a_night_that_died_goes_on_with_what_it_left_out_at_first(data, shards, tmp_path, monkeypatch):
    earlier = str(tmp_path / "nights" / "*")
    first, second = tmp_path / "nights" / "1", tmp_path / "nights" / "2"
    run("embed", data, first, earlier)
    (data / "train-1.tar").write_bytes(shards[1])
    run("embed", data, tmp_path / "whole", earlier)
    run("embed", data, second, earlier)
    wanted = {path.name: path.read_bytes() for path in (second / "embeddings").iterdir()}
    for name in ("_SUCCESS.json", "embeddings/train-0-00001.parquet", "embeddings/train-1-00002.parquet"):
        (second / name).unlink()
    # as the run's first start left it
    plan = second / "_plan" / digest(read_jobs(str(second))["embeddings"])
    keys = plan / "done-embeddings.keys"
    skip_done.find_done(ModelJobOptions(**options_of(second, earlier)), "embeddings", str(plan))
    assert keys.exists()

    def refuse(*args: object) -> None:
        raise AssertionError("the keys are brought together once")

    monkeypatch.setattr(skip_done, "write_done_keys", refuse)
    assert run("embed", data, second, earlier) is State.RESUMED
    assert {path.name: path.read_bytes() for path in (second / "embeddings").iterdir()} == wanted


def test_what_a_model_failed_on_is_not_tried_again(tmp_path):
    for night, prompts in enumerate([["a", TROUBLE, *"bcdefghijk"], ["l"], []]):
        (tmp_path / f"{night}.txt").write_text("\n".join(prompts))
    for night in range(3):
        # the second night has everything before it, and the third nothing new at all
        read = tuple(str(tmp_path / f"{number}.txt") for number in range(night + 1))
        out = tmp_path / "nights" / str(night)
        run("generate", read[0], out, str(tmp_path / "nights" / "*"), inputs=read, format="prompts")
        totals = read_success(str(out))["generated"]
        assert (totals.written, totals.rejected) == [(11, {"model_error": 1}), (1, {}), (0, {})][night]


def test_a_night_that_is_refused_leaves_nothing_behind(data, tmp_path):
    earlier = str(tmp_path / "nights" / "*")
    run("embed", data, tmp_path / "nights" / "1", earlier)
    success = tmp_path / "nights" / "1" / "_SUCCESS.json"
    kept = success.read_bytes()
    success.unlink()
    with pytest.raises(InputError, match="holds no embeddings, or not all"):
        run("embed", data, tmp_path / "nights" / "2", earlier)
    success.write_bytes(kept)
    run("embed", data, tmp_path / "nights" / "3", earlier)
    assert sorted(path.name for path in (tmp_path / "nights").iterdir()) == ["1", "3"]


def options_of(out: Path, earlier: str) -> dict[str, Any]:
    return {"inputs": ("x",), "output": str(out), "model": MODELS["embed"], "skip_done_in": (earlier,)}


def test_an_earlier_night_that_is_not_complete_is_refused(data, tmp_path):
    first = tmp_path / "nights" / "1"
    run("embed", data, first, str(tmp_path / "nights" / "*"))
    (first / "_SUCCESS.json").unlink()
    with pytest.raises(
        InputError, match=rf"--skip_done_in names .*{first}, which holds no embeddings, or not all"
    ):
        run("embed", data, tmp_path / "nights" / "2", str(tmp_path / "nights" / "*"))
    with pytest.raises(InputError, match="holds no captions, or not all"):
        run("caption", data, tmp_path / "other", str(first))
    with pytest.raises(InputError, match="which holds no captions, or not all"):
        run("caption", data, tmp_path / "another", str(tmp_path / "nothing"))


def test_what_is_left_out_is_part_of_the_run(data, tmp_path):
    run("embed", data, tmp_path / "1", str(tmp_path / "none*"))
    run("embed", data, tmp_path / "2", str(tmp_path / "1"))
    with pytest.raises(OutputError, match="skip_done_in"):
        run("embed", data, tmp_path / "2", str(tmp_path / "none*"))


def test_in_a_bucket(data, shards, bucket):
    earlier = f"{bucket.url}/nights/*"
    run("embed", data, f"{bucket.url}/nights/1", earlier)
    (data / "train-1.tar").write_bytes(shards[1])
    run("embed", data, f"{bucket.url}/nights/2", earlier)
    old, new = (keys_in(f"{bucket.url}/nights/{night}", "embeddings") for night in "12")
    assert len({*old, *new}) == 40
    assert not {*old} & {*new}


def test_the_command(data, tmp_path, capsys):
    command = ["embed", f"--input={data}", "--model=bert:fake", "--chunk_rows=7"]
    command += [f"--skip_done_in={tmp_path / 'nights'}/*"]
    assert main([*command, f"--output={tmp_path / 'nights' / '1'}"]) == 0
    assert f"--skip_done_in {tmp_path / 'nights'}/* names no earlier output yet" in capsys.readouterr().err
    assert main([*command, f"--output={tmp_path / 'nights' / '2'}"]) == 0
    assert "done before 20\n" in capsys.readouterr().out
    job = json.loads((tmp_path / "nights" / "2" / "_job.json").read_text())
    assert job["embeddings"]["options"]["skip_done_in"] == [f"{tmp_path / 'nights'}/*"]


def test_a_line_for_machines(data, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["embed", f"--input={data}", "--model=bert:fake", f"--output={out}", "--summary=json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["outcome"], found["output"]) == ("done", str(out))
    assert found["datasets"] == json.loads((out / "_SUCCESS.json").read_text())
    assert main([*command, "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["outcome"] == "nothing_to_do"
    assert main([*command, "--normalize"]) == 1
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["outcome"] == "failed"
    assert "of another run" in found["error"]
    assert f"diptych: {found['error']}" in printed.err
