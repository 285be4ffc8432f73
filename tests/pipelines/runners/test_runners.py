"""The same files, byte by byte, whatever the runner and the store."""

from __future__ import annotations

import asyncio
import io
import json
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import fsspec
import pytest
from kills import files_in

from diptych.models.files import object_stores
from diptych.pipelines.demo_data import layouts
from diptych.pipelines.demo_data.layouts import SceneFolders, write_data_set
from diptych.pipelines.lifecycle.output_folder import State
from diptych.pipelines.options.prepare import PrepareOptions
from diptych.pipelines.prepare import prepare
from diptych.pipelines.verify import verify
from diptych.transforms.errors import InputError, OutputError
from diptych.transforms.sources.planned import prefetch

if TYPE_CHECKING:
    from conftest import Bucket
    from flaky_proxy import FlakyProxy

CHUNK_ROWS = 7


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> SceneFolders:
    """60 scenes in four tar files, and a tar file of rejects."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "_SHARD_SCENES", 20)
        folders = write_data_set(str(tmp_path_factory.mktemp("scenes") / "data"), 60, seed=1)
    with tarfile.open(folders.webdataset / "bad.tar", "w") as tar:
        for number in range(9):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = number
            tar.addfile(info, io.BytesIO(bytes(number)))
    return folders


@pytest.fixture(scope="module")
def local(scenes: SceneFolders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("local")
    run(str(scenes.webdataset), str(out))
    return files_in(out)


def run(data: str, out: str) -> State:
    return prepare(PrepareOptions((data,), out, chunk_rows=CHUNK_ROWS, quiet=True)).state


def objects_in(url: str) -> dict[str, bytes]:
    fs, path = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return {name[len(path) + 1 :]: fs.cat_file(name) for name in fs.find(path)}


def command(data: str | Path, out: str | Path, *flags: str) -> list[str]:
    argv = ["prepare", f"--input={data}", f"--output={out}", f"--chunk_rows={CHUNK_ROWS}", *flags]
    return [sys.executable, "-c", "from diptych.pipelines.cli import main; raise SystemExit(main())", *argv]


class TestFlink:
    @pytest.fixture
    def flags(self, flink_jar: str) -> list[str]:
        flags = ["--runner=FlinkRunner", "--flink_master=[local]", f"--flink_job_server_jar={flink_jar}"]
        return [
            *flags,
            "--environment_type=LOOPBACK",
            "--parallelism=2",
            "--job_server_jvm_properties=-Xmx512m",
        ]

    def test_a_run_that_stopped_is_gone_on_with_to_the_same_files(
        self, scenes, local, tmp_path, run_command, flags
    ):
        for name in ("_job.json", "images/train-00000-00000.parquet", "images/train-00001-00002.parquet"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(local[name])
        done = run_command(command(scenes.webdataset, tmp_path, *flags))
        assert done.returncode == 0, done.stderr
        assert "read      69 rows\n" in done.stdout
        assert "13 rows were there from before" in done.stdout
        assert files_in(tmp_path) == local

    def test_a_failure_is_one_paragraph_and_the_next_run_completes(
        self, scenes, local, tmp_path, run_command, flags
    ):
        # Where a worker looks for what is committed, it finds something that it cannot read
        obstacle = tmp_path / "images" / "train-00001-00001.parquet"
        (tmp_path / "_job.json").write_bytes(local["_job.json"])
        obstacle.mkdir(parents=True)
        (tmp_path / "images" / "train-00001-00000.parquet").write_bytes(
            local["images/train-00001-00000.parquet"]
        )
        done = run_command(command(scenes.webdataset, tmp_path, *flags))
        assert (done.returncode, done.stdout) == (1, "")
        [error] = [line for line in done.stderr.splitlines() if " shards, " not in line]
        assert error.startswith(f"diptych: {obstacle} cannot be read: Is a directory. ")
        obstacle.rmdir()
        assert {
            name: data for name, data in files_in(tmp_path).items() if "_tmp" not in name
        }.items() <= local.items()
        assert run(str(scenes.webdataset), str(tmp_path)) is State.RESUMED
        assert files_in(tmp_path) == local


@pytest.fixture
def filled(bucket: Bucket, scenes: SceneFolders) -> str:
    """A bucket with the tar files below `data`."""
    fill(bucket.url, scenes)
    return bucket.url


def fill(url: str, scenes: SceneFolders) -> None:
    fs, top = fsspec.core.url_to_fs(url)
    for path in sorted(scenes.webdataset.iterdir()):
        fs.pipe_file(f"{top}/data/{path.name}", path.read_bytes())


def fill_coco(url: str, scenes: SceneFolders) -> str:
    """Puts an annotation and its images, an object each, into a bucket; returns the annotation's path."""
    fs, top = fsspec.core.url_to_fs(url)
    annotation = scenes.coco / "annotations" / "captions_train2017.json"
    for path in [annotation, *(scenes.coco / "train2017").iterdir()]:
        fs.pipe_file(f"{top}/coco/{path.relative_to(scenes.coco)}", path.read_bytes())
    return str(annotation.relative_to(scenes.coco))


class TestStores:
    def test_from_and_to_a_bucket_in_a_process_of_its_own(self, filled, bucket, local, run_command):
        done = run_command(command(f"{filled}/data", f"{filled}/out"), env=bucket.env)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"written   60 to {filled}/out/images" in done.stdout
        assert objects_in(f"{filled}/out") == local

    def test_it_goes_on_and_is_verified_as_on_a_disk(self, filled, scenes, local, tmp_path):
        out = f"{filled}/out"
        assert run(f"{filled}/data/*.tar", out) is State.FRESH
        assert objects_in(out) == local
        assert verify(out).problems == []
        assert run(f"{filled}/data", out) is State.DONE
        fs, _ = fsspec.core.url_to_fs(out)
        fs.rm_file(f"{out}/images/train-00001-00001.parquet")
        assert any("images/train-00001-00001.parquet" in problem for problem in verify(out).problems)
        assert run(f"{filled}/data", out) is State.RESUMED
        assert objects_in(out) == local
        # One end alone may be in the bucket
        run(f"{filled}/data", str(tmp_path / "down"))
        assert files_in(tmp_path / "down") == local
        run(str(scenes.webdataset), f"{filled}/up")
        assert objects_in(f"{filled}/up") == local

    def test_an_annotation_is_planned_in_the_bucket(self, bucket, scenes, tmp_path):
        annotation = fill_coco(bucket.url, scenes)
        run(f"{bucket.url}/coco/{annotation}", f"{bucket.url}/out")
        run(str(scenes.coco / annotation), str(tmp_path))
        assert objects_in(f"{bucket.url}/out") == files_in(tmp_path)
        assert json.loads(files_in(tmp_path)["_SUCCESS.json"])["images"]["written"] == 54

    def test_what_is_not_there_is_named(self, filled, scenes, tmp_path):
        with pytest.raises(InputError, match=f"{filled}/nothing is not there"):
            run(f"{filled}/nothing", str(tmp_path / "out"))
        with pytest.raises(InputError, match=r"has no _job\.json"):
            verify(f"{filled}/data")
        none = f"{filled.partition('://')[0]}://diptych-none/out"
        with pytest.raises(OutputError, match=rf"{none}/_records/source\.job\.json cannot be written"):
            run(str(scenes.webdataset), none)


class TestBadDays:
    """A store that refuses, drops, cuts off or never answers some requests."""

    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(object_stores, "SILENCE_S", 1.0)
        monkeypatch.setattr(prefetch, "SLOW_S", 0.3)
        # what their clients wait before they ask again
        monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=lambda _: asyncio.sleep(0.01)))
        monkeypatch.setattr("botocore.retryhandler.random", SimpleNamespace(random=lambda: 0.0))

    def test_nothing_is_lost(self, flaky_bucket: tuple[Bucket, FlakyProxy], scenes, local, tmp_path):
        bucket, proxy = flaky_bucket
        fill(bucket.url, scenes)
        annotation = fill_coco(bucket.url, scenes)
        run(str(scenes.coco / annotation), str(tmp_path / "coco"))
        proxy.requests.clear()
        proxy.failing, proxy.hanging = 0.08, 0.02
        run(f"{bucket.url}/data", f"{bucket.url}/out")
        run(f"{bucket.url}/coco/{annotation}", f"{bucket.url}/coco-out")
        proxy.failing = proxy.hanging = 0.0
        assert objects_in(f"{bucket.url}/out") == local
        assert objects_in(f"{bucket.url}/coco-out") == files_in(tmp_path / "coco")
        assert min(proxy.counts[kind] for kind in ("hanging", "unavailable", "busy", "reset")) > 0

    def test_each_image_is_one_request(
        self, flaky_bucket: tuple[Bucket, FlakyProxy], scenes, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(prefetch, "SLOW_S", 60.0)  # the emulator may be slow
        bucket, proxy = flaky_bucket
        annotation = fill_coco(bucket.url, scenes)
        proxy.requests.clear()
        run(f"{bucket.url}/coco/{annotation}", f"{bucket.url}/coco-out")
        asked = [path for _, _, path in proxy.requests if path.endswith(".jpg")]
        assert len(asked) == len(set(asked)) > 10

    def test_a_store_that_is_gone_is_one_paragraph_and_nothing_is_lost(
        self, flaky_bucket: tuple[Bucket, FlakyProxy], scenes, local
    ):
        bucket, proxy = flaky_bucket
        fill(bucket.url, scenes)
        run(f"{bucket.url}/data", f"{bucket.url}/out")
        fs, _ = fsspec.core.url_to_fs(f"{bucket.url}/out")
        fs.rm_file(f"{bucket.url}/out/images/train-00001-00001.parquet")
        proxy.failing = 1.0
        with pytest.raises(
            (InputError, OutputError), match=f"{bucket.url}.* cannot be (read|written): "
        ) as found:
            run(f"{bucket.url}/data", f"{bucket.url}/out")
        assert "\n" not in str(found.value)
        proxy.failing = 0.0
        assert run(f"{bucket.url}/data", f"{bucket.url}/out") is State.RESUMED
        assert objects_in(f"{bucket.url}/out") == local
