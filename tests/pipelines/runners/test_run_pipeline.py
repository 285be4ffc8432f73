import os
import tempfile
import time
from collections.abc import Callable

import apache_beam as beam
import pytest
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

from diptych.pipelines.lifecycle.output_folder import State
from diptych.pipelines.lifecycle.result import Result
from diptych.pipelines.runners import run_pipeline as runner
from diptych.pipelines.runners.run_pipeline import new_pipeline, run_pipeline
from diptych.transforms.errors import DiptychError, InputError, OptionError, OutputError
from diptych.transforms.finish import Expected, Totals, finish
from diptych.transforms.progress import Snapshot, progress


class TestNewPipeline:
    def test_runs_in_this_process_unless_told_otherwise(self):
        assert isinstance(new_pipeline(()).runner, FnApiRunner)
        assert isinstance(new_pipeline(("--direct_num_workers=2",)).runner, FnApiRunner)

    @pytest.mark.parametrize(
        "flags", [["--runner=BundleBasedDirectRunner"], ["--runner", "BundleBasedDirectRunner"]]
    )
    def test_takes_the_runner_that_is_named(self, flags):
        assert type(new_pipeline(flags).runner).__name__ == "BundleBasedDirectRunner"

    def test_a_run_leaves_no_temporary_folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        run_pipeline(pipeline_that(str), 1, quiet=True)
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize(
        ("flag", "message"),
        [("--runner=Nope", "Unexpected pipeline runner: Nope"), ("--runner=Dataflow", "project")],
    )
    def test_beams_refusal_is_one_line(self, flag, message):
        with pytest.raises(OptionError, match=message) as raised:
            new_pipeline([flag])
        assert "\n" not in str(raised.value)


def pipeline_that(act: Callable[[int], object], *flags: str) -> beam.Pipeline:
    pipeline = new_pipeline(flags)
    _ = pipeline | beam.Create([1]) | beam.Map(act)
    return pipeline


class TestRunPipeline:
    @pytest.mark.parametrize("kind", [DiptychError, InputError, OutputError, OptionError])
    @pytest.mark.parametrize("flags", [(), ("--direct_num_workers=2",)])
    def test_a_workers_error_comes_as_it_was_raised(self, kind, flags):
        def fail(_):
            raise kind("x/a.tar is not there. Put it back.")

        with pytest.raises(DiptychError) as raised:
            run_pipeline(pipeline_that(fail, *flags), 1, quiet=True)
        assert type(raised.value) is kind
        assert str(raised.value) == "x/a.tar is not there. Put it back."

    def test_a_bug_stays_what_it_is(self):
        with pytest.raises(ZeroDivisionError):
            run_pipeline(pipeline_that(lambda _: 1 // 0), 1, quiet=True)

    def test_progress_begins_anew(self):
        progress.committed("a", 0, 5, 1)
        run_pipeline(pipeline_that(str), 1, quiet=True)
        assert progress.snapshot() == Snapshot()

    def test_quiet_shows_nothing(self, capsys, monkeypatch):
        monkeypatch.setattr(runner, "_LINE_S", 0.001)
        run_pipeline(pipeline_that(lambda _: time.sleep(0.1)), 1, quiet=True)
        assert capsys.readouterr() == ("", "")
        run_pipeline(pipeline_that(lambda _: time.sleep(0.1)), 1, quiet=False)
        assert capsys.readouterr().err.startswith("diptych: 0/1 shards, 0 rows, 0 rows/s, 0 rejects\n")


TRACEBACK = """Traceback (most recent call last):
  File "apache_beam/runners/common.py", line 1512, in process
diptych.transforms.errors.InputError: gs://b/a.tar is not there. Put it back.

During handling of the above exception, another exception occurred:

diptych.transforms.errors.{}: gs://b/a.tar is not there. Put it back. [while running 'ReadShards/Read']
"""


class TestErrorsInText:
    @pytest.mark.parametrize("name", ["InputError", "OutputError"])
    def test_a_workers_error_is_found_in_a_runners(self, name):
        for text in (
            TRACEBACK.format(name),
            "Job failed: java.lang.Exception: " + repr(TRACEBACK.format(name)),
        ):
            found = runner._worker_error(text)
            assert type(found).__name__ == name
            assert str(found) == "gs://b/a.tar is not there. Put it back."

    def test_there_may_be_none(self):
        assert runner._worker_error("java.lang.OutOfMemoryError: Java heap space") is None

    def test_a_runner_outside_speaks_for_itself(self):
        flags = ("--runner=PortableRunner", "--job_endpoint=localhost:1")
        pipeline = new_pipeline(flags)
        found = runner._runner_error(pipeline, RuntimeError("the job server\nis gone"))
        assert str(found).startswith("PortableRunner failed: the job server is gone. Check its flags")
        assert (
            runner._runner_error(pipeline, RuntimeError("Traceback (most recent call last): a bug")) is None
        )
        assert runner._runner_error(new_pipeline(()), RuntimeError("a bug")) is None

    def test_a_job_server_that_is_not_there_is_one_paragraph(self):
        flags = ("--runner=PortableRunner", "--job_endpoint=localhost:1", "--job_server_timeout=1")
        with pytest.raises(DiptychError, match="PortableRunner failed: "):
            run_pipeline(pipeline_that(str, *flags, "--environment_type=LOOPBACK"), 1, quiet=True)


class TestDescribe:
    @pytest.mark.parametrize(
        ("snapshot", "text"),
        [
            (Snapshot(), "0/4 shards, 0 rows, 0 rows/s, 0 rejects"),
            (
                Snapshot(rows=30_000, rejects=12, shards=1.5),
                "1/4 shards, 30,000 rows, 1,500 rows/s, 12 rejects, 0:33 left",
            ),
            (
                Snapshot(rows=30_000, resumed=10_000, shards=2.0),
                "2/4 shards, 30,000 rows, 1,000 rows/s, 0 rejects, 10,000 from before, 0:20 left",
            ),
            (Snapshot(rows=100, shards=0.02), "0/4 shards, 100 rows, 5 rows/s, 0 rejects"),
            (Snapshot(rows=1_000, shards=0.04), "0/4 shards, 1,000 rows, 50 rows/s, 0 rejects, 33:00 left"),
        ],
    )
    def test_says_how_far_it_is(self, snapshot, text):
        assert runner._describe(snapshot, 4, 20.0) == text


class TestProgress:
    def test_a_chunk_that_is_replayed_counts_once(self):
        progress.start()
        for index, resumed in ((0, True), (1, False), (0, True), (1, True), (2, False)):
            progress.committed("a", index, 10, 1, resumed)
        progress.committed("b", 0, 5, 0)
        progress.reading("a", 0.5)
        progress.reading("b", 7.0)
        assert progress.snapshot() == Snapshot(rows=35, resumed=10, rejects=3, shards=1.5)


class TestResult:
    def test_is_what_the_folder_holds(self, tmp_path):
        totals = {"images": Totals(1, 1, 2, 2)}
        finish(totals, str(tmp_path), {"images": Expected(1)}, "run")
        finish({"captions": Totals(1, 1, 3, 3)}, str(tmp_path), {"captions": Expected(1)}, "run")
        assert Result.of(str(tmp_path), State.DONE, ["images"]) == Result(str(tmp_path), State.DONE, totals)
        assert sorted(os.listdir(tmp_path)) == ["_SUCCESS.json", "_records"]

    def test_a_record_that_is_gone_is_not_taken_for_nothing(self, tmp_path):
        with pytest.raises(
            OutputError, match="the record of its images is gone since: another run took the output"
        ):
            Result.of(str(tmp_path), State.FRESH, ["images"])
        assert Result.of(str(tmp_path), State.FRESH, ["images"], ran=False).totals == {"images": Totals()}
