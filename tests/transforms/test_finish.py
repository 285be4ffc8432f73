import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from hypothesis import given
from hypothesis import strategies as st

from diptych.transforms import finish as finish_module
from diptych.transforms.errors import DiptychError, OutputError, TooManyRejects
from diptych.transforms.fingerprint import digest
from diptych.transforms.finish import (
    Expected,
    FinishJob,
    Totals,
    check_rejects,
    finish,
    read_success,
    sum_by_dataset,
)
from diptych.transforms.inference.failures import FailureLimit
from diptych.transforms.output_layout import RECORDS, SUCCESS
from diptych.transforms.sink import Claim, Commit
from diptych.transforms.storage import write_whole


def commit_of(index: int, last: bool = False, shard: str = "a", dataset: str = "images") -> Commit:
    rejected = {"read": {"missing_image": 1}, "image": {"corrupt": 2, "empty": index}}
    return Commit(dataset, shard, index, last, 3, 10 + index, 7, rejected, {"captions_read": index}, "f" * 16)


COMMITS = [commit_of(0), commit_of(1, True), commit_of(0, True, "b")]
TOTALS = Totals(
    shards=2,
    files=3,
    read=31,
    written=21,
    rejected={"corrupt": 6, "empty": 1, "missing_image": 3},
    counters={"captions_read": 1},
)


class TestTotals:
    def test_commits_add_up(self):
        totals = Totals()
        for commit in COMMITS:
            totals = totals.add(commit)
        assert totals == TOTALS

    @given(st.permutations(COMMITS), st.integers(0, 3))
    def test_in_any_order_and_grouping(self, commits, split):
        parts = [
            sum_by_dataset({"images": Totals().add(commit)} for commit in part)
            for part in (commits[:split], commits[split:])
        ]
        assert sum_by_dataset(parts) == {"images": TOTALS}

    def test_nothing_is_nothing(self):
        assert sum_by_dataset([]) == {}

    def test_data_sets_are_apart(self):
        parts = [
            {"images": TOTALS},
            {"captions": Totals(read=1)},
            {"captions": Totals(read=2), "images": TOTALS},
        ]
        assert sum_by_dataset(parts) == {"images": TOTALS.merge(TOTALS), "captions": Totals(read=3)}

    @pytest.mark.parametrize(
        ("totals", "problem"),
        [
            (Totals(2, 5, 10, 9, {"corrupt": 1}), None),
            (Totals(1, 5, 10, 9, {"corrupt": 1}), "1 of 2 shards are complete"),
            (Totals(2, 5, 10, 9), "10 rows were read, but 9 written and 0 rejected"),
            (Totals(2, 5, 10, 9, {"corrupt": 2}), "10 rows were read, but 9 written and 2 rejected"),
        ],
    )
    def test_the_sums_are_checked(self, totals, problem):
        assert totals.problem(2) == problem


RECORD = f"{RECORDS}/images.success.json"


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


class TestFinish:
    def test_writes_the_totals_and_clears_up(self, tmp_path):
        for name in ("_plan/run/a.arrow", "_plan/run-1a/b.arrow", "_tmp/run/half", "images/a-00000.parquet"):
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).touch()
        totals = finish(
            {"images": TOTALS}, str(tmp_path), {"images": Expected(2, {"unlisted_images": 4})}, "run"
        )["images"]
        assert {path.name for path in tmp_path.iterdir()} == {SUCCESS, RECORDS, "images"}
        assert totals.counters == {"captions_read": 1, "unlisted_images": 4}
        assert json.loads((tmp_path / SUCCESS).read_text()) == {
            "images": {
                "counters": {"captions_read": 1, "unlisted_images": 4},
                "files": 3,
                "read": 31,
                "rejected": {"corrupt": 6, "empty": 1, "missing_image": 3},
                "shards": 2,
                "size_bytes": 0,
                "written": 21,
            }
        }
        assert read_success(str(tmp_path)) == {"images": totals}

    def test_what_others_are_at_work_with_stays(self, tmp_path):
        for name in ("_plan/other/a.arrow", "_tmp/other/half"):
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).touch()
        before = names_in(tmp_path)
        finish({"images": TOTALS}, str(tmp_path), {"images": Expected(2)}, "run")
        assert before <= names_in(tmp_path)

    def test_clearing_up_may_fail(self, tmp_path, monkeypatch):
        def refuse(*_: object) -> None:
            raise OutputError("no")

        monkeypatch.setattr(finish_module, "delete_working", refuse)
        finish({"images": TOTALS}, str(tmp_path), {"images": Expected(2)}, "run")
        assert read_success(str(tmp_path)) == {"images": TOTALS}

    @pytest.mark.parametrize(
        ("taken_over", "size_bytes", "message"),
        [
            (False, 12, None),
            (True, 12, r"has 0 files of 0 bytes, and the run .* 3 of 12: .* again, without --overwrite; it"),
            (
                False,
                13,
                r"has 3 files of 12 bytes, and the run wrote or found 3 of 13: .*\(a-00000\.parquet, ",
            ),
        ],
    )
    def test_the_files_are_those_of_the_run(self, tmp_path, taken_over, size_bytes, message):
        """Files that are none of its own are told by their footers, which are read only where the sizes differ."""
        claim = Claim("_records/source.job.json", "images", digest({}), taken_over)
        write_whole(str(tmp_path), claim.name, b'{"images": {}}')
        for name in ("a-00000", "a-00001", "b-00000"):
            write_whole(str(tmp_path), f"images/{name}.parquet", b"data")
        totals = {"images": dataclasses.replace(TOTALS, size_bytes=size_bytes)}
        with pytest.raises(OutputError, match=message) if message else contextlib.nullcontext():
            finish(totals, str(tmp_path), {"images": Expected(2, claim=claim)}, "run")
        assert (read_success(str(tmp_path)) is None) == bool(message)

    @pytest.mark.parametrize(("rejected", "is_refused"), [(28, False), (29, False), (30, True)])
    def test_a_share_is_compared_as_it_is_written(self, rejected, is_refused):
        """0.29 * 100 is less than 29."""
        totals = {"images": Totals(1, 1, 100, 100 - rejected, {"corrupt": rejected})}
        with pytest.raises(TooManyRejects) if is_refused else contextlib.nullcontext():
            check_rejects(totals, "out", 0.29)

    @pytest.mark.parametrize("num_shards", [1, 3])
    def test_what_is_not_complete_is_not_called_so(self, tmp_path, num_shards):
        (tmp_path / "_plan").mkdir()
        with pytest.raises(
            OutputError, match=rf"not complete: 2 of {num_shards} shards .* Run the same command"
        ):
            finish({"images": TOTALS}, str(tmp_path), {"images": Expected(num_shards)}, "run")
        assert {path.name for path in tmp_path.iterdir()} == {"_plan"}

    def test_the_totals_of_other_data_sets_stay(self, tmp_path):
        finish({"images": TOTALS}, str(tmp_path), {"images": Expected(2)}, "run")
        finish({"captions": TOTALS}, str(tmp_path), {"captions": Expected(2, {"x": 1})}, "run")
        assert read_success(str(tmp_path)) == {
            "images": TOTALS,
            "captions": TOTALS.merge(Totals(counters={"x": 1})),
        }

    def test_where_the_model_failed_too_often_nothing_is_finished(self, tmp_path):
        class Limit(FailureLimit):
            def check_totals(self, rejected: Mapping[str, int], written: int, root: str) -> None:
                raise DiptychError(f"{rejected['empty']} {written} {root} {self.max_rate}")

        with pytest.raises(DiptychError, match=f"^1 21 {tmp_path} 0.5$"):
            finish(
                {"captions": TOTALS},
                str(tmp_path),
                {"captions": Expected(2, limit=Limit("caption", 0.5))},
                "run",
            )
        assert names_in(tmp_path) == set()

    def test_several_data_sets_are_finished_at_once_or_not_at_all(self, tmp_path):
        found = {"images": TOTALS, "captions": TOTALS}
        with pytest.raises(OutputError, match=r"captions is not complete: 2 of 3 shards are complete"):
            finish(found, str(tmp_path), {"images": Expected(2), "captions": Expected(3)}, "run")
        with pytest.raises(OutputError, match=r"generated is not complete: 0 of 2 shards are complete"):
            finish(found, str(tmp_path), {"images": Expected(2), "generated": Expected(2)}, "run")
        assert names_in(tmp_path) == set()
        finish(found, str(tmp_path), {"images": Expected(2), "captions": Expected(2)}, "run")
        assert read_success(str(tmp_path)) == found

    def test_again_it_is_the_same(self, tmp_path):
        finish({"images": TOTALS}, str(tmp_path), {"images": Expected(2)}, "run")
        first = (tmp_path / SUCCESS).read_bytes()
        finish({"images": TOTALS}, str(tmp_path), {"images": Expected(2)}, "run")
        assert (tmp_path / SUCCESS).read_bytes() == first


class TestFinishJob:
    def run(self, root: Path, commits: list[Commit], num_shards: int, *flags: str) -> None:
        with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner", *flags])) as pipeline:
            created = pipeline | beam.Create(commits).with_output_types(Commit)
            _ = created | FinishJob(
                str(root), {"images": Expected(num_shards, {"unlisted_images": 4})}, "run"
            )

    @pytest.mark.parametrize("flags", [(), ("--direct_num_workers=2",), ("--direct_runner_bundle_repeat=2",)])
    def test_adds_up_whatever_the_bundles(self, tmp_path, flags):
        self.run(tmp_path, COMMITS, 2, *flags)
        assert names_in(tmp_path) == {SUCCESS, RECORD}
        found = json.loads((tmp_path / SUCCESS).read_text())["images"]
        assert Totals(**found) == TOTALS.merge(Totals(counters={"unlisted_images": 4}))

    def test_no_commits_at_all_are_noticed(self, tmp_path):
        with pytest.raises(OutputError, match="0 of 2 shards are complete"):
            self.run(tmp_path, [], 2)
        assert names_in(tmp_path) == set()
