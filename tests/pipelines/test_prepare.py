import contextlib
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from kills import EVERY_THIRD_KILL, check_kills, files_in

from diptych.pipelines.cli import main
from diptych.pipelines.demo_data import layouts
from diptych.pipelines.demo_data.layouts import SceneFolders, write_data_set
from diptych.pipelines.lifecycle.launch import DatasetSpec, Job
from diptych.pipelines.lifecycle.output_folder import State
from diptych.pipelines.options.prepare import PrepareOptions
from diptych.pipelines.prepare import prepare, prepare_graph
from diptych.pipelines.runners.run_pipeline import new_pipeline
from diptych.pipelines.verify import verify
from diptych.transforms import sink as sink_module
from diptych.transforms.chunk import ChunkCoder
from diptych.transforms.errors import InputError, NothingWritten, OutputError, TooManyRejects
from diptych.transforms.schemas import images_schema
from diptych.transforms.sources.base import Shard
from diptych.transforms.sources.open import SourceOptions, open_source
from diptych.transforms.sources.sharded.webdataset import WebdatasetShard

REPOSITORY = Path(__file__).parents[2]
CHUNK_ROWS = 5


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> SceneFolders:
    """300 scenes; the tar files hold 30 each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "_SHARD_SCENES", 30)
        return write_data_set(str(tmp_path_factory.mktemp("scenes") / "data"), 300, seed=1)


@pytest.fixture(scope="module")
def undisturbed(scenes: SceneFolders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed")
    run(scenes.webdataset, out)
    return files_in(out)


def run(data: Path | str, out: Path | str, chunk_rows: int = CHUNK_ROWS, **options: Any) -> State:
    """Runs the job in this process; returns what it found."""
    options = {"inputs": (str(data),), "output": str(out), "chunk_rows": chunk_rows, "quiet": True} | options
    return prepare(PrepareOptions(**options)).state


def rows_in(folder: Path, *columns: str) -> list[tuple[Any, ...]]:
    table = pyarrow.dataset.dataset(folder / "images").to_table(columns=list(columns))
    return sorted(zip(*(table.column(name).to_pylist() for name in columns), strict=True))


def rejects_in(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("rejects/*/*")) for row in pq.read_table(path).to_pylist()]


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def jpegs_of(scenes: SceneFolders) -> list[Path]:
    return sorted((scenes.flickr30k / "flickr30k-images").iterdir())


class TestTheSameCommandElsewhere:
    """What another process with the same command has brought to its end is not taken for more than it is."""

    def run_beside(self, monkeypatch: pytest.MonkeyPatch, data: Path, out: Path, **options: Any) -> None:
        def fail(*_: Any) -> None:
            patch.undo()
            run(data, out)
            raise OutputError("the files of the other are in the way")

        patch = pytest.MonkeyPatch()
        patch.setattr("diptych.pipelines.lifecycle.launch.run_pipeline", fail)
        try:
            run(data, out, **options)
        finally:
            patch.undo()

    @pytest.fixture
    def half_bad(self, scenes: SceneFolders, tmp_path: Path) -> Path:
        good = jpegs_of(scenes)[0].read_bytes()
        return write_tar(tmp_path / "a.tar", {"0.jpg": good, "1.jpg": b"junk"})

    def test_it_is_done(self, half_bad, tmp_path, monkeypatch):
        self.run_beside(monkeypatch, half_bad, tmp_path / "out")
        assert rows_in(tmp_path / "out", "key") == [("0",)]

    def test_its_rejects_may_be_too_many(self, half_bad, tmp_path, monkeypatch):
        with pytest.raises(TooManyRejects, match=r"1 of 2 rows"):
            self.run_beside(monkeypatch, half_bad, tmp_path / "out", max_reject_rate=0.1)

    def test_it_did_not_retry(self, half_bad, tmp_path, monkeypatch):
        with pytest.raises(OutputError, match="in the way"):
            self.run_beside(monkeypatch, half_bad, tmp_path / "out", retry_rejects=("not_an_image",))


class TestKilled:
    """Killed anywhere and run again, the output is an undisturbed run's: every name, every byte."""

    def check(self, tmp_path: Path, step: int, **options: Any) -> int:
        run(out=tmp_path / "undisturbed", **options)
        (tmp_path / "kills").mkdir()
        expected = files_in(tmp_path / "undisturbed")
        return check_kills(tmp_path / "kills", lambda out: run(out=out, **options), expected, step=step)

    @EVERY_THIRD_KILL
    def test_at_changes_of_the_file_system(self, scenes, tmp_path, step):
        good = [path.read_bytes() for path in jpegs_of(scenes)[:4]]
        data = tmp_path / "data"
        data.mkdir()
        write_tar(
            data / "a.tar",
            {"0.jpg": good[0], "1.jpg": b"junk", "2.txt": b"alone", "3.jpg": good[1], "4.jpg": good[2]},
        )
        write_tar(data / "b.tar", {"0.jpg": good[3]})
        # Three data files, two files of rejects, two records and what shows them, before and in their places; folders
        assert self.check(tmp_path, step, data=data, chunk_rows=3) > 2 * 9 / step

    @EVERY_THIRD_KILL
    def test_at_changes_of_the_file_system_with_a_plan(self, tmp_path, monkeypatch, step):
        data = write_data_set(str(tmp_path / "data"), 10, seed=1).coco
        (tmp_path / "temporary").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
        annotation = data / "annotations" / "captions_val2017.json"
        assert self.check(tmp_path, step, data=annotation) > 2 * 6 / step

    @pytest.mark.parametrize("num_files", [1, 7, 25, 55])
    def test_by_the_system(self, scenes, tmp_path, undisturbed, num_files):
        command = [sys.executable, "-m", "diptych", "prepare", f"--input={scenes.webdataset}"]
        command += [f"--output={tmp_path}", f"--chunk_rows={CHUNK_ROWS}", "--quiet"]
        images = tmp_path / "images"
        with subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True) as process:
            while process.poll() is None and not (images.is_dir() and len(os.listdir(images)) >= num_files):
                time.sleep(0.001)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert num_files <= len(os.listdir(images)) < 60
        assert (tmp_path / "_SUCCESS.json").exists() is False
        assert run(scenes.webdataset, tmp_path) is State.RESUMED
        assert files_in(tmp_path) == undisturbed

    def test_a_finished_shard_is_not_read_again(self, scenes, tmp_path, monkeypatch, undisturbed):
        run(scenes.webdataset, tmp_path)
        (tmp_path / "_SUCCESS.json").unlink()
        (tmp_path / "images" / "train-00003-00004.parquet").unlink()
        read: list[tuple[str, int]] = []
        records = WebdatasetShard.records

        def spy(shard: WebdatasetShard, skip: int) -> Iterator[Any]:
            read.append((shard.name, skip))
            return records(shard, skip)

        monkeypatch.setattr(WebdatasetShard, "records", spy)
        assert run(scenes.webdataset, tmp_path) is State.RESUMED
        assert read == [("train-00003", 4 * CHUNK_ROWS)]
        assert files_in(tmp_path) == undisturbed


class TestDone:
    def test_a_second_run_changes_nothing_and_reads_no_shard(
        self, scenes, tmp_path, monkeypatch, undisturbed
    ):
        run(scenes.webdataset, tmp_path)
        before = {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}
        monkeypatch.setattr(WebdatasetShard, "records", lambda *_: pytest.fail("a shard was read"))
        assert run(scenes.webdataset, tmp_path) is State.DONE
        assert {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]} == before
        assert files_in(tmp_path) == undisturbed

    @pytest.mark.parametrize("name", ["train-00000-00000", "train-00004-00002", "val-00000-00005"])
    def test_a_data_file_that_was_deleted_is_made_again(self, scenes, tmp_path, undisturbed, name):
        run(scenes.webdataset, tmp_path)
        (tmp_path / "images" / f"{name}.parquet").unlink()
        assert any(f"images/{name}.parquet" in problem for problem in verify(str(tmp_path)).problems)
        assert run(scenes.webdataset, tmp_path) is State.RESUMED
        assert files_in(tmp_path) == undisturbed
        assert verify(str(tmp_path)).problems == []

    def test_another_option_input_or_version_is_refused(self, scenes, tmp_path, monkeypatch):
        shards = tmp_path / "shards"
        shutil.copytree(scenes.webdataset, shards)
        out = tmp_path / "out"
        run(shards / "*0.tar", out)
        before = files_in(out)
        with pytest.raises(OutputError, match=r"options.chunk_rows is 5 there and 6 here"):
            run(shards / "*0.tar", out, chunk_rows=6)
        with pytest.raises(OutputError, match=r"inputs.files is 2 there and 10 here"):
            run(shards, out)
        with (shards / "val-00000.tar").open("ab") as tar:
            tar.write(bytes(10240))
        with pytest.raises(OutputError, match=r"inputs.size_bytes is \d+ there and \d+ here"):
            run(shards / "*0.tar", out)
        assert files_in(out) == before
        assert run(shards / "*0.tar", out, overwrite=True) is State.FRESH

    @pytest.mark.parametrize("is_done", [True, False])
    def test_overwriting_what_has_a_plan(self, scenes, tmp_path, is_done):
        annotation = scenes.coco / "annotations" / "captions_val2017.json"
        run(annotation, tmp_path / "out")
        expected = files_in(tmp_path / "out")
        if not is_done:
            shutil.rmtree(tmp_path / "out" / "images")
            (tmp_path / "out" / "_SUCCESS.json").unlink()
        assert run(annotation, tmp_path / "out", overwrite=True) is State.FRESH
        assert files_in(tmp_path / "out") == expected
        run(annotation, tmp_path / "out", overwrite=True, chunk_rows=3)
        run(annotation, tmp_path / "out", overwrite=True)
        assert files_in(tmp_path / "out") == expected

    def test_the_same_data_elsewhere_is_the_same_input(self, scenes, tmp_path, undisturbed):
        shutil.copytree(scenes.webdataset, tmp_path / "copy")
        run(tmp_path / "copy", tmp_path / "out")
        assert files_in(tmp_path / "out") == undisturbed
        assert run(scenes.webdataset, tmp_path / "out") is State.DONE

    def test_a_file_of_another_run_is_not_taken_for_a_commit(self, scenes, tmp_path):
        shard = scenes.webdataset / "val-00000.tar"
        run(shard, tmp_path / "other", chunk_rows=6)
        run(shard, tmp_path / "out")
        name = "images/val-00000-00001.parquet"
        shutil.copy(tmp_path / "other" / name, tmp_path / "out" / name)
        (tmp_path / "out" / "_SUCCESS.json").unlink()
        with pytest.raises(
            OutputError, match=r"val-00000-00001\.parquet is not as this job wrote it: it is of run"
        ):
            run(shard, tmp_path / "out")


def fail_cleanly(capsys: pytest.CaptureFixture[str], data: Path, out: Path) -> str:
    """Runs the command; returns its one paragraph."""
    code = main(["prepare", f"--input={data}", f"--output={out}", f"--chunk_rows={CHUNK_ROWS}", "--quiet"])
    shown = capsys.readouterr()
    assert (code, shown.out) == (1, "")
    assert shown.err.startswith("diptych: ")
    assert shown.err.count("\n") == 1
    return shown.err


def check_readable(out: Path, expected: dict[str, bytes], cache: Path) -> None:
    """What is committed is what it should be, and other readers get along with it."""
    found = {name: data for name, data in files_in(out).items() if not name.startswith(("_plan/", "_tmp/"))}
    assert found.items() <= expected.items()
    assert "_SUCCESS.json" not in found
    assert not any(name.startswith("_tmp/") for name in files_in(out))
    count = pyarrow.dataset.dataset(out / "images").count_rows()
    assert count > 0
    data_dir = str(out / "images")
    assert (
        len(datasets.load_dataset("parquet", data_dir=data_dir, split="train", cache_dir=str(cache))) == count
    )


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system in memory, again with other options where it is there."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount_with(options: str) -> Path:
        again = "remount," if os.path.ismount(folder) else ""
        command = ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"this user may not mount a file system: {done.stderr.strip()}")
        return folder

    yield mount_with
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


class TestFaults:
    """A fault outside is one paragraph, what is there stays readable, and the next run completes it."""

    def test_a_full_disk(self, scenes, tmp_path, undisturbed, mount, capsys):
        out = mount("size=1m") / "out"
        assert "No space left on device" in fail_cleanly(capsys, scenes.webdataset, out)
        check_readable(out, undisturbed, tmp_path)
        fail_cleanly(capsys, scenes.webdataset, out)
        mount("size=50m")
        assert run(scenes.webdataset, out) is State.RESUMED
        assert files_in(out) == undisturbed

    def test_a_limit_on_files(self, scenes, tmp_path, undisturbed):
        sizes = sorted(len(data) for name, data in undisturbed.items() if name.startswith("images/"))
        limit = sizes[-3]
        command = [sys.executable, "-m", "diptych", "prepare", f"--input={scenes.webdataset}"]
        command += [f"--output={tmp_path}/out", f"--chunk_rows={CHUNK_ROWS}"]
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert "cannot be written: File too large. Nothing that was committed is lost" in done.stderr
        check_readable(tmp_path / "out", undisturbed, tmp_path)
        assert run(scenes.webdataset, tmp_path / "out") is State.RESUMED
        assert files_in(tmp_path / "out") == undisturbed

    def test_an_output_that_may_not_be_written(self, scenes, mount, capsys):
        folder = mount("ro,size=1m")
        assert "Read-only file system" in fail_cleanly(capsys, scenes.webdataset, folder / "out")
        assert list(folder.iterdir()) == []

    def test_an_output_that_becomes_unwritable(
        self, scenes, tmp_path, undisturbed, mount, monkeypatch, capsys
    ):
        out = mount("size=50m") / "out"
        after_commits(monkeypatch, 10, lambda: mount("ro"))
        assert "Read-only file system" in fail_cleanly(capsys, scenes.webdataset, out)
        mount("rw,size=50m")
        check_readable(out, undisturbed, tmp_path)
        assert run(scenes.webdataset, out) is State.RESUMED
        assert files_in(out) == undisturbed

    def test_a_file_where_a_folder_is_needed(self, scenes, tmp_path, undisturbed, capsys):
        (tmp_path / "images").write_text("mine")
        assert "cannot be written: Not a directory" in fail_cleanly(capsys, scenes.webdataset, tmp_path)
        assert (tmp_path / "images").read_text() == "mine"
        (tmp_path / "images").unlink()
        run(scenes.webdataset, tmp_path)
        assert files_in(tmp_path) == undisturbed

    @pytest.mark.parametrize("layout", ["webdataset", "flickr30k"])
    def test_an_input_that_disappears(self, scenes, tmp_path, monkeypatch, capsys, layout):
        data, out, away = (tmp_path / name for name in ("data", "out", "away"))
        shutil.copytree(getattr(scenes, layout), data)
        run(data, tmp_path / "undisturbed")
        expected = files_in(tmp_path / "undisturbed")

        def take_away() -> None:
            begun = {path.name.rpartition("-")[0] for path in (out / "images").iterdir()}
            away.mkdir()
            for path in data.iterdir():
                if path.stem not in begun and path.suffix != ".token":
                    path.rename(away / path.name)

        after_commits(monkeypatch, 10, take_away)
        error = fail_cleanly(capsys, data, out)
        assert re.search(rf"{data}/\S+ is not there. It was expected as an input: put it back", error)
        check_readable(out, expected, tmp_path)
        assert len(list((out / "images").iterdir())) >= 10
        for path in away.iterdir():
            path.rename(data / path.name)
        assert run(data, out) is State.RESUMED
        assert files_in(out) == expected


def after_commits(monkeypatch: pytest.MonkeyPatch, count: int, act: Callable[[], object]) -> None:
    """Does something, once, when so many chunks are committed."""
    commits = itertools.count(1)
    commit = sink_module.commit_chunk

    def commit_and_act(*args: Any) -> Any:
        done = commit(*args)
        if next(commits) == count:
            act()
        return done

    monkeypatch.setattr(sink_module, "commit_chunk", commit_and_act)


BAD = {
    "empty": b"",
    "not_an_image": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n",
    "truncated": None,
}


class TestBadRows:
    @pytest.mark.parametrize("layout", ["webdataset", "files"])
    def test_cost_themselves_and_no_neighbour(self, scenes, tmp_path, layout):
        jpegs = {path.name: path.read_bytes() for path in jpegs_of(scenes)}
        reasons = {}
        damaged = dict(jpegs)
        for ordinal, name in enumerate(sorted(jpegs)[7::30]):
            reason = sorted(BAD)[ordinal % 3]
            content = BAD[reason]
            damaged[name] = jpegs[name][: len(jpegs[name]) // 2] if content is None else content
            reasons[name.removesuffix(".jpg")] = reason
        assert len(reasons) == 10
        for folder, content in (("good", jpegs), ("damaged", damaged)):
            (tmp_path / folder).mkdir()
            if layout == "webdataset":
                write_tar(tmp_path / folder / "all.tar", content)
            else:
                for name, data in content.items():
                    (tmp_path / folder / name).write_bytes(data)
            run(tmp_path / folder, tmp_path / f"{folder}-out", chunk_rows=20)
        columns = ("key", "row", "sha256", "phash", "width", "height")
        good = rows_in(tmp_path / "good-out", *columns)
        assert len(good) == 300
        assert rows_in(tmp_path / "damaged-out", *columns) == [row for row in good if row[0] not in reasons]
        rejects = rejects_in(tmp_path / "damaged-out")
        assert {reject["key"]: reject["reason"] for reject in rejects} == reasons
        assert len(rejects) == 10
        assert all(reject["message"] for reject in rejects)
        assert verify(str(tmp_path / "damaged-out")).problems == []
        success = json.loads((tmp_path / "damaged-out" / "_SUCCESS.json").read_text())["images"]
        assert (success["read"], success["written"]) == (300, 290)
        assert success["rejected"] == {"empty": 4, "not_an_image": 3, "truncated": 3}


class TestInputs:
    def test_one_row_without_caption(self, scenes, tmp_path):
        jpeg = jpegs_of(scenes)[0].read_bytes()
        run(write_tar(tmp_path / "one.tar", {"a.jpg": jpeg}), tmp_path / "out")
        assert rows_in(tmp_path / "out", "key", "captions") == [("a", [])]

    def test_an_empty_tar(self, tmp_path):
        run(write_tar(tmp_path / "none.tar", {}), tmp_path / "out")
        assert verify(str(tmp_path / "out")).problems == []
        assert rows_in(tmp_path / "out", "key") == []

    def test_an_empty_folder(self, tmp_path):
        (tmp_path / "in").mkdir()
        with pytest.raises(InputError, match="in holds no data of any format"):
            run(tmp_path / "in", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_shard_of_rejects_alone(self, scenes, tmp_path):
        members = {f"{number}.jpg": b"junk" for number in range(12)}
        (tmp_path / "in").mkdir()
        write_tar(tmp_path / "in" / "bad.tar", members)
        shutil.copy(scenes.webdataset / "val-00000.tar", tmp_path / "in")
        run(tmp_path / "in", tmp_path / "out")
        assert len(rejects_in(tmp_path / "out")) == 12
        assert verify(str(tmp_path / "out")).problems == []

    def test_a_run_that_writes_nothing_fails_and_keeps_what_it_committed(self, tmp_path):
        tar = write_tar(tmp_path / "bad.tar", {f"{number}.jpg": b"junk" for number in range(12)})
        for _ in range(2):
            with pytest.raises(
                NothingWritten, match=r"12 rows were read and none was written .*not_an_image 12"
            ):
                run(tar, tmp_path / "out")
            assert len(rejects_in(tmp_path / "out")) == 12
            assert not (tmp_path / "out" / "_SUCCESS.json").exists()

    def test_more_rejects_than_may_be_fail_and_a_higher_bar_ends_it(self, scenes, tmp_path):
        jpeg = jpegs_of(scenes)[0].read_bytes()
        tar = write_tar(
            tmp_path / "in.tar", {"0.jpg": jpeg} | {f"{number}.jpg": b"x" for number in range(1, 4)}
        )
        with pytest.raises(
            TooManyRejects, match=r"3 of 4 rows .*more than --max_reject_rate 0\.5 of them: not_an_i"
        ):
            run(tar, tmp_path / "out", max_reject_rate=0.5)
        run(tar, tmp_path / "out", max_reject_rate=0.75)
        assert verify(str(tmp_path / "out")).problems == []
        with pytest.raises(TooManyRejects):
            run(tar, tmp_path / "out", max_reject_rate=0.5)

    def test_names_of_every_kind(self, scenes, tmp_path):
        jpeg = jpegs_of(scenes)[0].read_bytes()
        folder = tmp_path / "Bilder für später" / "日本 [1]*"
        folder.mkdir(parents=True)
        for name in ("a b.jpg", "ü.jpg", "#%?.jpg", "猫.JPG", "-.jpg"):
            (folder / name).write_bytes(jpeg)
        tar = write_tar(tmp_path / "Bilder für später" / "shärd 1.tar", {"é è.jpg": jpeg})
        out = tmp_path / "aus gabe"
        for data, number in ((tar, 1), (folder, 5)):
            run(data, out / str(number))
            assert len(rows_in(out / str(number), "key")) == number
            assert verify(str(out / str(number))).problems == []
            assert all(name.isascii() for name in files_in(out / str(number)))

    @pytest.mark.parametrize("chunk_rows", [1, 7, 300, 100_000])
    def test_the_rows_do_not_depend_on_the_chunks(self, scenes, tmp_path, undisturbed, chunk_rows):
        shards = scenes.webdataset / "val-*.tar"
        run(shards, tmp_path, chunk_rows=chunk_rows)
        assert len(list((tmp_path / "images").iterdir())) == -(-30 // chunk_rows)
        names = [name for name in undisturbed if name.startswith("images/val-")]
        tables = [pq.read_table(io.BytesIO(undisturbed[name])) for name in sorted(names)]
        found = [pq.read_table(path) for path in sorted((tmp_path / "images").iterdir())]
        assert pa.concat_tables(found).equals(pa.concat_tables(tables))

    def test_several_inputs_and_one_named_twice(self, scenes, tmp_path, undisturbed):
        shards = sorted(map(str, scenes.webdataset.glob("*.tar")))
        run("", tmp_path / "one_by_one", inputs=(*reversed(shards), shards[0]))
        assert files_in(tmp_path / "one_by_one") == undisturbed
        run("", tmp_path / "globs", inputs=(f"{scenes.webdataset}/train*", f"{scenes.webdataset}/*.tar"))
        assert files_in(tmp_path / "globs") == undisturbed

    def test_every_layout_has_the_same_rows(self, scenes, tmp_path):
        found = {}
        for layout in ("coco", "flickr30k", "webdataset"):
            run(getattr(scenes, layout), tmp_path / layout, chunk_rows=50)
            found[layout] = rows_in(
                tmp_path / layout, "key", "sha256", "phash", "captions", "width", "height"
            )
        assert len(found["coco"]) == 300
        assert found["coco"] == found["webdataset"] == found["flickr30k"]

    def test_an_earlier_output_is_an_input(self, scenes, tmp_path):
        run(scenes.webdataset / "val-00000.tar", tmp_path / "first")
        run(tmp_path / "first", tmp_path / "second", chunk_rows=50)
        assert rows_in(tmp_path / "second", "key", "captions") == rows_in(
            tmp_path / "first", "key", "captions"
        )


class TestOutputs:
    @pytest.mark.parametrize("form", ["{}/", "file://{}", "{}/x/..", "{}//"])
    def test_every_way_to_name_it_is_the_same(self, scenes, tmp_path, undisturbed, form):
        (tmp_path / "out" / "x").mkdir(parents=True)
        run(scenes.webdataset, form.format(tmp_path / "out"))
        assert files_in(tmp_path / "out") == undisturbed
        assert run(scenes.webdataset, tmp_path / "out") is State.DONE

    def test_relative_to_where_the_command_runs(self, scenes, tmp_path, undisturbed, monkeypatch):
        monkeypatch.chdir(tmp_path)
        run(scenes.webdataset, "out")
        assert files_in(tmp_path / "out") == undisturbed

    def test_inside_the_input(self, scenes, tmp_path, undisturbed):
        shutil.copytree(scenes.webdataset, tmp_path / "data")
        out = tmp_path / "data" / "out"
        run(tmp_path / "data", out)
        assert files_in(out) == undisturbed
        assert run(tmp_path / "data", out) is State.DONE

    def test_in_an_object_store(self, scenes, undisturbed):
        run(scenes.webdataset, "memory://bucket/out")
        fs = fsspec.filesystem("memory")
        found = {name.removeprefix("/bucket/out/"): fs.cat(name) for name in fs.find("/bucket/out")}
        assert found == undisturbed
        assert run(scenes.webdataset, "memory://bucket/out") is State.DONE
        assert verify("memory://bucket/out").problems == []


class TestLaws:
    @pytest.fixture
    def graph(self, scenes, tmp_path):
        options = PrepareOptions((str(scenes.webdataset),), str(tmp_path))
        shards: list[Shard] = open_source(options.inputs, "auto", SourceOptions()).shards("", 10)
        pipeline = new_pipeline(())
        about = {"job": "prepare", "versions": {"diptych": "1"}}
        job = Job({"images": DatasetSpec(images_schema())}, about, 10, options)
        sinks = job.sinks({name: claim.record() for name, claim in job.claims().items()})
        prepare_graph(pipeline, shards, job, options, sinks)
        return pipeline.to_runner_api()

    def test_reading_to_writing_is_one_fused_stage(self, graph):
        _, stages = FnApiRunner().create_stages(graph)
        of_step = {transform.unique_name: stage.name for stage in stages for transform in stage.transforms}
        steps = (
            "ReadShards/Read/ParDo(_Read)",
            "PrepareRows/CleanCaptions/Clean",
            "PrepareRows/ResizeImages/Resize",
            "WriteChunks/Write",
        )
        assert len({of_step[step] for step in steps}) == 1
        assert of_step["Shards/Impulse"] != of_step["WriteChunks/Write"] != of_step["FinishJob/Finish"]

    def test_chunks_have_their_coder(self, graph):
        coders = {
            collection.unique_name.lstrip("0123456789"): graph.components.coders[
                collection.coder_id
            ].spec.payload
            for collection in graph.components.pcollections.values()
        }
        for step in (
            "ReadShards/Read/ParDo(_Read)",
            "PrepareRows/CleanCaptions/Clean",
            "PrepareRows/ResizeImages/Resize",
        ):
            assert b"ChunkCoder" in coders[f"{step}.None"]
        assert b"ChunkCoder" not in coders["WriteChunks/Write.None"]

    @pytest.mark.parametrize("flags", [(), ("--direct_num_workers=2",), ("--direct_runner_bundle_repeat=2",)])
    def test_no_chunk_is_ever_coded(self, scenes, tmp_path, monkeypatch, undisturbed, flags):
        monkeypatch.setattr(ChunkCoder, "encode", lambda *_: pytest.fail("a chunk was encoded"))
        monkeypatch.setattr(ChunkCoder, "decode", lambda *_: pytest.fail("a chunk was decoded"))
        run(scenes.webdataset, tmp_path, beam_args=flags)
        assert files_in(tmp_path) == undisturbed

    def test_nothing_is_left_open(self, scenes, tmp_path):
        run(scenes.webdataset / "val-00000.tar", tmp_path / "first")
        threads, handles = threading.active_count(), len(os.listdir("/proc/self/fd"))
        run(scenes.webdataset, tmp_path / "out", chunk_rows=2)
        assert threading.active_count() == threads
        assert len(os.listdir("/proc/self/fd")) == handles


def test_overwrite_keeps_the_old_output_where_the_new_cannot_be_planned(scenes, tmp_path):
    out = tmp_path / "out"
    run(scenes.webdataset, out)
    before = files_in(out)
    annotation = str(scenes.coco / "annotations/captions_val2017.json")
    wrong = SourceOptions(images=str(tmp_path / "nowhere"))
    with pytest.raises(InputError):
        prepare(PrepareOptions((annotation,), str(out), source=wrong, overwrite=True, quiet=True))
    assert files_in(out) == before
