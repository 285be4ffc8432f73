"""The same files, byte by byte, whatever the runner and the store."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import pytest

from pipelines import scene_folders
from pipelines.job import State
from pipelines.options import PrepareOptions
from pipelines.prepare import prepare
from pipelines.scene_folders import SceneFolders, write_data_set
from pipelines.verify import verify
from transforms.errors import InputError, OutputError
from transforms.storage import join

if TYPE_CHECKING:
    from conftest import Gcs

CHUNK_ROWS = 7


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> SceneFolders:
    """60 scenes in four tar files, and a tar file of rejects."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene_folders, "_SHARD_SCENES", 20)
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


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def objects_in(url: str) -> dict[str, bytes]:
    fs, path = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return {name[len(path) + 1 :]: fs.cat_file(name) for name in fs.find(path)}


def command(data: str | Path, out: str | Path, *flags: str) -> list[str]:
    argv = ["prepare", f"--input={data}", f"--output={out}", f"--chunk_rows={CHUNK_ROWS}", *flags]
    return [sys.executable, "-c", "from pipelines.cli import main; raise SystemExit(main())", *argv]


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
        assert "7 rows were there from before" in done.stdout
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
def bucket(gcs: Gcs, scenes: SceneFolders) -> str:
    """A bucket with the tar files below `data` and the COCO layout below `coco`."""
    fs = fsspec.filesystem("gs")
    for path in sorted(scenes.webdataset.iterdir()):
        fs.pipe_file(f"{gcs.url}/data/{path.name}", path.read_bytes())
    return gcs.url


class TestGcs:
    def test_from_and_to_a_bucket_in_a_process_of_its_own(self, bucket, gcs, local, run_command):
        done = run_command(command(f"{bucket}/data", f"{bucket}/out"), env=gcs.env)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"written   60 to {bucket}/out/images" in done.stdout
        assert objects_in(f"{bucket}/out") == local

    def test_it_goes_on_and_is_verified_as_on_a_disk(self, bucket, scenes, local, tmp_path):
        out = f"{bucket}/out"
        assert run(f"{bucket}/data/*.tar", out) is State.FRESH
        assert objects_in(out) == local
        assert verify(out).problems == []
        assert run(f"{bucket}/data", out) is State.DONE
        fs = fsspec.filesystem("gs")
        fs.rm_file(f"{out}/images/train-00001-00001.parquet")
        assert any("images/train-00001-00001.parquet" in problem for problem in verify(out).problems)
        assert run(f"{bucket}/data", out) is State.RESUMED
        assert objects_in(out) == local
        # One end alone may be in the bucket
        run(f"{bucket}/data", str(tmp_path / "down"))
        assert files_in(tmp_path / "down") == local
        run(str(scenes.webdataset), f"{bucket}/up")
        assert objects_in(f"{bucket}/up") == local

    def test_an_annotation_is_planned_in_the_bucket(self, bucket, scenes, tmp_path):
        fs = fsspec.filesystem("gs")
        for path in [
            scenes.coco / "annotations" / "captions_val2017.json",
            *(scenes.coco / "val2017").iterdir(),
        ]:
            fs.pipe_file(join(bucket, "coco", str(path.relative_to(scenes.coco))), path.read_bytes())
        annotation = "annotations/captions_val2017.json"
        run(f"{bucket}/coco/{annotation}", f"{bucket}/out")
        run(str(scenes.coco / annotation), str(tmp_path))
        assert objects_in(f"{bucket}/out") == files_in(tmp_path)
        assert json.loads(files_in(tmp_path)["_SUCCESS.json"])["images"]["written"] == 6

    def test_what_is_not_there_is_named(self, bucket, scenes, tmp_path):
        with pytest.raises(InputError, match=f"{bucket}/nothing is not there"):
            run(f"{bucket}/nothing", str(tmp_path / "out"))
        with pytest.raises(InputError, match=r"has no _job\.json"):
            verify(f"{bucket}/data")
        with pytest.raises(OutputError, match=r"gs://diptych-none/out/_job\.json cannot be written"):
            run(str(scenes.webdataset), "gs://diptych-none/out")
