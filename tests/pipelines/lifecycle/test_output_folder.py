import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kills import files_in

from diptych.pipelines.lifecycle.output_folder import (
    DatasetClaim,
    State,
    check_output,
    clean_up,
    read_jobs,
    refuse_overlap,
    start_writing,
    take_output,
)
from diptych.pipelines.options.prepare import PrepareOptions
from diptych.transforms.chunk import Chunk, ChunkKey, Reject, reject_batch
from diptych.transforms.errors import InputError, OptionError, OutputError
from diptych.transforms.fingerprint import digest, fingerprint, options_to_json
from diptych.transforms.finish import SUCCESS, Expected, Totals, finish, read_success
from diptych.transforms.output_layout import JOB, data_files, read_json, shard_of
from diptych.transforms.schemas import images_schema
from diptych.transforms.sink import Sink, commit_chunk
from diptych.transforms.sources.base import InputFile
from diptych.transforms.storage import write_whole


def print_of(**options: Any) -> dict[str, Any]:
    return fingerprint("prepare", [InputFile("a.tar", 10)], {"size": 224, **options})


def open_output(
    root: str, dataset: str, fingerprint: dict[str, Any], overwrite: bool, reads_own_images: bool = False
) -> State:
    """Does with a folder what a job does before it reads anything."""
    claim = DatasetClaim(dataset, fingerprint, overwrite, reads_own_images)
    state = check_output(root, claim)
    if state is State.DONE:
        clean_up(root, claim)
    else:
        take_output(root, claim)
    return state


def start(root: str, shards: list[str]) -> None:
    start_writing(root, DatasetClaim("images", print_of()), shards)


def write_output(folder: Path, run_fingerprint: dict[str, Any], *, success: bool = True) -> None:
    """Writes what a run of two shards would: three data files and the rejects of one."""
    sink = Sink(str(folder), "images", {"fingerprint": digest(run_fingerprint)}, images_schema())
    open_output(str(folder), "images", run_fingerprint, overwrite=False)
    totals = Totals()
    for shard, index, last in (("a", 0, False), ("a", 1, True), ("b", 0, True)):
        rejects = reject_batch(shard, "read", [Reject("", 0, "missing_image", "m")] if index else [])
        rows = pa.RecordBatch.from_pylist([{"key": "k"}] if shard == "b" else [], schema=images_schema())
        totals = totals.add(commit_chunk(sink, Chunk(ChunkKey(shard, index), rows, rejects, last)))
    if success:
        finish({"images": totals}, str(folder), {"images": Expected(2)}, digest(run_fingerprint))


def names_in(folder: Path) -> set[str]:
    return set(files_in(folder))


class TestFingerprint:
    def test_holds_what_decides_the_output(self):
        found = fingerprint("prepare", [InputFile("b", 2), InputFile("a", 1, "abc")], {"size": 224})
        assert found["job"] == "prepare"
        assert (found["inputs"]["files"], found["inputs"]["size_bytes"]) == (2, 3)
        assert found["options"] == {"size": 224}
        assert {"diptych", "pyarrow", "opencv-python-headless"} <= set(found["versions"])

    def test_does_not_depend_on_the_order_of_the_files(self):
        files = [InputFile("b", 2), InputFile("a", 1, "abc"), InputFile("c", 3)]
        prints = [digest(fingerprint("j", order, {})) for order in itertools.permutations(files)]
        assert len(set(prints)) == 1
        assert len(prints[0]) == 16

    def test_each_part_of_it_tells(self):
        files = [InputFile("a", 1), InputFile("b", 2)]
        prints = [
            fingerprint("j", files, {"x": 1}),
            fingerprint("k", files, {"x": 1}),
            fingerprint("j", files, {"x": 2}),
            fingerprint("j", files[:1], {"x": 1}),
            fingerprint("j", [InputFile("c", 1), files[1]], {"x": 1}),
            fingerprint("j", [InputFile("a", 2), InputFile("b", 1)], {"x": 1}),
            fingerprint("j", [InputFile("a", 1, "abc"), files[1]], {"x": 1}),
        ]
        assert len({digest(found) for found in prints}) == len(prints)

    def test_options_become_json(self):
        values = options_to_json(PrepareOptions(inputs=("a",), output="b"))
        assert values["resize"]["size_px"] == 224
        assert json.loads(json.dumps(values)) == values


class TestOpenOutput:
    @pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
    def test_a_new_folder_gets_the_fingerprint(self, tmp_path, make):
        make(tmp_path / "out")
        assert open_output(str(tmp_path / "out"), "images", print_of(), False) is State.FRESH
        assert names_in(tmp_path / "out") == {JOB, RECORD}
        assert read_jobs(str(tmp_path / "out")) == {"images": print_of()}

    def test_what_is_there_is_gone_on_with(self, tmp_path):
        write_output(tmp_path, print_of(), success=False)
        before = files_in(tmp_path)
        assert open_output(str(tmp_path), "images", print_of(), False) is State.RESUMED
        assert files_in(tmp_path) == before

    def test_what_is_done_is_left_alone(self, tmp_path):
        write_output(tmp_path, print_of())
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        for folder in ("_plan", "_tmp"):  # of a run that was killed as it cleared up
            (tmp_path / folder / digest(print_of())).mkdir(parents=True)
        assert open_output(str(tmp_path), "images", print_of(), False) is State.DONE
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    @pytest.mark.parametrize("missing", ["a-00000", "a-00001", "b-00000"])
    def test_a_data_file_that_was_deleted_is_missed(self, tmp_path, missing):
        write_output(tmp_path, print_of())
        (tmp_path / "images" / f"{missing}.parquet").unlink()
        assert open_output(str(tmp_path), "images", print_of(), False) is State.RESUMED
        start(str(tmp_path), ["a", "b"])
        assert SUCCESS not in names_in(tmp_path)

    @pytest.mark.parametrize("success", [True, False])
    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (print_of(size=32), "options.size is 224 there and 32 here"),
            (print_of(pad=[1, 2]), r"options.pad is None there and \[1, 2\] here"),
            (
                fingerprint("prepare", [InputFile("b.tar", 11)], {"size": 224}),
                "inputs.size_bytes is 10 there and 11",
            ),
            (
                fingerprint("embed", [InputFile("a.tar", 10)], {"size": 224}),
                "job is 'prepare' there and 'embed' here",
            ),
            ({**print_of(), "versions": {}}, "versions.diptych is .* there and None here"),
        ],
    )
    def test_the_output_of_another_run_is_refused_with_both_values(self, tmp_path, other, message, success):
        write_output(tmp_path, print_of(), success=success)
        before = files_in(tmp_path)
        with pytest.raises(OutputError, match=message):
            open_output(str(tmp_path), "images", other, False)
        assert files_in(tmp_path) == before

    def test_a_run_that_wrote_no_row_may_be_at_work(self, tmp_path):
        open_output(str(tmp_path), "images", print_of(metadata="misspelt"), False)
        with pytest.raises(OutputError, match=r"another run \(which has not written a file yet.*--overwrite"):
            open_output(str(tmp_path), "images", print_of(), False)
        assert open_output(str(tmp_path), "images", print_of(), True) is State.FRESH
        assert names_in(tmp_path) == {JOB, RECORD}
        assert read_jobs(str(tmp_path)) == {"images": print_of()}

    def test_an_output_of_an_earlier_version_is_gone_on_with(self, tmp_path):
        write_output(tmp_path, print_of())
        shutil.rmtree(tmp_path / "_records")
        assert open_output(str(tmp_path), "images", print_of(), False) is State.DONE
        claim = open_output(str(tmp_path), "captions", print_of(beam=3), False, True)
        assert claim is State.FRESH
        assert set(read_jobs(str(tmp_path))) == {"images", "captions"}
        assert set(read_success(str(tmp_path))) == {"images"}
        assert open_output(str(tmp_path), "images", print_of(), False) is State.DONE

    def test_overwriting_deletes_what_a_run_wrote_and_nothing_else(self, tmp_path):
        write_output(tmp_path, print_of())
        (tmp_path / "notes.txt").touch()
        assert open_output(str(tmp_path), "images", print_of(size=32), True) is State.FRESH
        assert names_in(tmp_path) == {JOB, RECORD, "notes.txt"}
        assert read_jobs(str(tmp_path)) == {"images": print_of(size=32)}

    @pytest.mark.parametrize(
        "name", ["mine.parquet", "train-00000-of-00001.parquet", "photo.jpg", "c-00000.parquet"]
    )
    @pytest.mark.parametrize("overwrite", [True, False])
    def test_a_foreign_file_is_neither_deleted_nor_mixed_in(self, tmp_path, name, overwrite):
        write_output(tmp_path, print_of())
        pq.write_table(pa.table({"key": ["a"]}), tmp_path / "images" / name)
        before = files_in(tmp_path)

        def go():
            assert open_output(str(tmp_path), "images", print_of(), overwrite) is State.RESUMED
            start(str(tmp_path), ["a", "b"])

        with pytest.raises(
            OutputError, match=f"images holds {name}, which this job did not write .* move it away"
        ):
            go()
        assert files_in(tmp_path) == before

    @pytest.mark.parametrize(
        "name", ["images/mine.parquet", "images/photo.jpg", "rejects/read/a-00000.parquet"]
    )
    def test_a_folder_of_somebody_else_is_refused(self, tmp_path, name):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
        with pytest.raises(OutputError, match=f"has no {JOB}, so no job of Diptych owns it"):
            open_output(str(tmp_path), "images", print_of(), True)
        assert names_in(tmp_path) == {name}

    def test_hidden_files_are_not_data(self, tmp_path):
        (tmp_path / "images").mkdir()
        for name in (".DS_Store", "_SUCCESS"):
            (tmp_path / "images" / name).touch()
        write_output(tmp_path, print_of())
        assert open_output(str(tmp_path), "images", print_of(), False) is State.DONE

    def test_a_file_in_the_way_is_named(self, tmp_path):
        (tmp_path / "out").touch()
        with pytest.raises(OutputError, match=r"out is a file\. --output must be a folder"):
            open_output(str(tmp_path / "out"), "images", print_of(), False)
        with pytest.raises(OutputError, match="cannot be written: Not a directory"):
            open_output(str(tmp_path / "out" / "below"), "images", print_of(), False)

    @pytest.mark.parametrize(
        ("name", "remedy"),
        [
            ("_records/source.job.json", "Delete the output folder"),
            (SUCCESS, "Delete it and run again"),
        ],
    )
    @pytest.mark.parametrize("content", ["", "{", "\0", '{"images": ', '{"images": {"rows": 1}}', "[1]"])
    def test_a_damaged_file_says_what_to_do(self, tmp_path, name, remedy, content):
        write_output(tmp_path, print_of())
        (tmp_path / name).write_text(content)
        if name == RECORD and content.endswith("}"):
            remedy = "holds the images of another run"
        with pytest.raises(OutputError, match=remedy):
            open_output(str(tmp_path), "images", print_of(), False)

    def test_in_an_object_store(self):
        root = "memory://job/out"
        assert open_output(root, "images", print_of(), False) is State.FRESH
        assert open_output(root, "images", print_of(), False) is State.RESUMED
        assert open_output(root, "images", print_of(size=1), True) is State.FRESH
        assert read_jobs(root) == {"images": print_of(size=1)}


def test_what_is_done_is_told_by_number_and_size_of_the_files(tmp_path):
    """A file that another run put in the place of one is of another size."""
    write_output(tmp_path, print_of())
    claim = DatasetClaim("images", print_of())
    assert check_output(str(tmp_path), claim) is State.DONE
    with open(tmp_path / "images" / "a-00000.parquet", "ab") as file:
        file.write(b"x")
    assert check_output(str(tmp_path), claim) is State.RESUMED


RECORD = "_records/source.job.json"


class Killed(BaseException):
    """Stands for the end of the process: from here on, nothing may change on disk."""


NUM_EVENTS = 17
"""What overwriting the output of `write_output` asks of the file system."""


class TestKilledWhileOverwriting:
    @pytest.mark.parametrize("kill_at", range(NUM_EVENTS))
    @pytest.mark.parametrize("overwrite_again", [True, False])
    def test_the_next_run_starts_or_goes_on_cleanly(self, tmp_path, monkeypatch, kill_at, overwrite_again):
        write_output(tmp_path, print_of())
        whole = files_in(tmp_path)
        events = itertools.count()

        def patch(name):
            real = getattr(os, name)

            def act(*args, **kwargs):
                if next(events) >= kill_at:
                    raise Killed
                return real(*args, **kwargs)

            monkeypatch.setattr(os, name, act)

        for name in ("remove", "unlink", "rmdir", "replace"):
            patch(name)
        with pytest.raises(Killed):
            open_output(str(tmp_path), "images", print_of(), True)
        monkeypatch.undo()
        left = names_in(tmp_path)
        # What is left says whose it is, and never that it is whole
        assert SUCCESS not in left or left == set(whole)
        assert JOB in left or not any(name.startswith(("images/", "rejects/")) for name in left)
        if overwrite_again:
            open_output(str(tmp_path), "images", print_of(), True)
            assert {name for name in names_in(tmp_path) if not name.startswith("_tmp/")} == {JOB, RECORD}
        write_output(tmp_path, print_of())
        assert files_in(tmp_path) == whole

    def test_there_are_as_many_events_as_are_tried(self, tmp_path, monkeypatch):
        write_output(tmp_path, print_of())
        events = []
        for name in ("remove", "unlink", "rmdir", "replace"):
            real = getattr(os, name)
            monkeypatch.setattr(
                os, name, lambda *args, real=real, **kwargs: (events.append(args), real(*args, **kwargs))[1]
            )
        open_output(str(tmp_path), "images", print_of(), True)
        assert len(events) == NUM_EVENTS


class TestStartWriting:
    def test_what_an_overtaken_run_still_wrote_is_deleted(self, tmp_path):
        write_output(tmp_path, print_of(), success=False)
        claim = DatasetClaim("images", print_of(size=1), overwrite=True)
        (tmp_path / "images" / "note-00000.parquet").touch()
        with pytest.raises(OutputError, match=r"images holds note-00000\.parquet, which"):
            start_writing(str(tmp_path), claim, ["a"], taken_over=True)
        assert names_in(tmp_path / "images") == {"a-00000.parquet", "a-00001.parquet", "note-00000.parquet"}

    def test_takes_only_files_of_the_shards(self, tmp_path):
        write_output(tmp_path, print_of(), success=False)
        start(str(tmp_path), ["a", "b", "c"])
        with pytest.raises(OutputError, match=r"images holds b-00000\.parquet, which"):
            start(str(tmp_path), ["a"])

    def test_many_are_counted(self, tmp_path):
        (tmp_path / "images").mkdir()
        for number in range(7):
            (tmp_path / "images" / f"{number}.txt").touch()
        with pytest.raises(OutputError, match=r"holds 0\.txt, 1\.txt, 2\.txt and 4 more, which"):
            start(str(tmp_path), [])

    def test_the_whole_output_is_not_there(self, tmp_path):
        start(str(tmp_path / "none"), ["a"])


class TestDataFiles:
    def test_are_sorted_by_shard(self, tmp_path):
        names = [
            "a-00000-00000.parquet",
            "a-00000.parquet",
            "a-00001.parquet",
            "a-100000.parquet",
            "b.parquet",
        ]
        for name in names:
            (tmp_path / name).touch()
        assert data_files(str(tmp_path.parent), tmp_path.name) == [
            "b.parquet",
            "a-00000.parquet",
            "a-00001.parquet",
            "a-100000.parquet",
            "a-00000-00000.parquet",
        ]

    def test_of_no_folder_are_none(self, tmp_path):
        (tmp_path / "file").touch()
        assert data_files(str(tmp_path), "missing") == data_files(str(tmp_path), "file") == []
        assert data_files("memory://nowhere", "images") == []

    def test_are_those_that_are_there_now(self):
        root = "memory://listing/out"
        assert data_files(root, "images") == []
        write_whole(root, "images/a-00000.parquet", b"")
        assert data_files(root, "images") == ["a-00000.parquet"]

    @pytest.mark.parametrize(
        ("name", "shard"),
        [
            (ChunkKey("a", 0).file_name(), "a"),
            (ChunkKey("a-00000", 123456).file_name(), "a-00000"),
            ("a-0000.parquet", ""),
            ("-00000.parquet", ""),
            ("a-00000.parquet.crc", ""),
        ],
    )
    def test_say_their_shard(self, name, shard):
        assert shard_of(name) == shard


class TestRefuseOverlap:
    @pytest.mark.parametrize(
        "url",
        [
            "out",
            "out/",
            "./out",
            "other/../out",
            "out/images",
            "out/images/*.parquet",
            "out/rejects/read",
            "link",
        ],
    )
    def test_a_job_does_not_read_what_it_writes(self, tmp_path, monkeypatch, url):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "out").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "out")
        with pytest.raises(OptionError, match=r"is where .* is read from"):
            refuse_overlap([url], "out")
        with pytest.raises(OptionError, match=r"is where .* is read from"):
            refuse_overlap(["elsewhere", str(tmp_path / url)], f"file://{tmp_path}/out/")

    @pytest.mark.parametrize("url", ["data", ".", "out2", "out/data", "out/images2/*.tar", "gs://out"])
    def test_it_may_read_beside_and_around(self, tmp_path, monkeypatch, url):
        monkeypatch.chdir(tmp_path)
        refuse_overlap([url] if "://" not in url else ["memory://out"], "out")

    def test_in_an_object_store(self):
        with pytest.raises(OptionError):
            refuse_overlap(["memory://b/out/images"], "memory://b/out")
        refuse_overlap(["memory://b/output"], "memory://b/out")


class TestReadJson:
    def test_gives_none_where_there_is_none(self, tmp_path):
        assert read_json(str(tmp_path), JOB) is None
        (tmp_path / "file").touch()
        assert read_json(str(tmp_path / "file"), JOB) is None
        assert read_success(str(tmp_path)) is None

    def test_a_folder_instead_is_an_error(self, tmp_path):
        (tmp_path / JOB).mkdir()
        with pytest.raises(InputError, match=f"{JOB} cannot be read: Is a directory"):
            read_json(str(tmp_path), JOB)
