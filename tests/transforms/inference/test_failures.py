from pathlib import Path

import pyarrow as pa
import pytest

from diptych.transforms.chunk import Chunk, ChunkKey, Reject, reject_batch
from diptych.transforms.errors import DiptychError
from diptych.transforms.inference.failures import FailureCount, FailureLimit
from diptych.transforms.schemas import captions_schema, generated_schema
from diptych.transforms.sink import Sink, commit_chunk


@pytest.mark.parametrize(
    ("failures", "rows", "rate", "expected"),
    [
        (2, 20, 0.1, False),
        (3, 20, 0.1, True),
        (19, 19, 0.1, False),
        (1, 1, 0.0, True),
        (0, 100, 0.0, False),
        (100, 100, 1.0, False),
    ],
)
def test_while_it_runs_a_job_needs_some_rows_to_tell(
    failures: int, rows: int, rate: float, expected: bool
) -> None:
    assert FailureLimit("embed", rate).exceeded(failures, rows) is expected


@pytest.mark.parametrize(
    ("failures", "written", "rate", "fails"),
    [
        (0, 10, 0.0, False),
        (1, 3, 0.1, False),
        (1, 3, 0.0, True),
        (1, 0, 0.1, True),
        (2, 2, 0.1, True),
        (2, 18, 0.1, False),
        (5, 0, 1.0, False),
    ],
)
def test_in_the_end_a_few_rows_are_enough(
    tmp_path: Path, failures: int, written: int, rate: float, fails: bool
) -> None:
    lost = [Reject("k", number, "model_error", f"trouble {number}") for number in range(failures)]
    rows = pa.RecordBatch.from_pylist([], schema=captions_schema())
    sink = Sink(str(tmp_path), "captions", {"fingerprint": ""}, captions_schema())
    commit_chunk(sink, Chunk(ChunkKey("s", 0), rows, reject_batch("s", "caption", lost), True))
    rejected = {"model_error": failures, "no_caption": 1000}
    limit = FailureLimit("caption", rate)
    if not fails:
        limit.check_totals(rejected, written, str(tmp_path))
        return
    message = (
        rf"{failures} of {failures + written} rows, more than --max_failure_rate {rate:g} .* trouble 0\."
    )
    with pytest.raises(DiptychError, match=message):
        limit.check_totals(rejected, written, str(tmp_path))


def test_rows_that_the_model_rejects_for_what_they_are_are_rows_that_it_has_seen(tmp_path: Path) -> None:
    lost = [Reject("k", 0, "low_match", "far"), Reject("k", 1, "model_error", "trouble")]
    rows = pa.RecordBatch.from_pylist([], schema=generated_schema())
    sink = Sink(str(tmp_path), "generated", {"fingerprint": ""}, generated_schema())
    commit_chunk(sink, Chunk(ChunkKey("s", 0), rows, reject_batch("s", "generate", lost), True))
    limit = FailureLimit("generate", 0.1)
    limit.check_totals({"model_error": 3, "low_match": 977, "bad_annotation": 5}, 20, str(tmp_path))
    with pytest.raises(DiptychError, match=r"fails on 3 of 23 rows, .* The first: trouble\."):
        limit.check_totals({"model_error": 3, "bad_annotation": 977}, 20, str(tmp_path))


def test_the_count_names_the_first() -> None:
    count = FailureCount(FailureLimit("embed", 0.1))
    count.add(15, ["first", "second"])
    count.add(5, [])
    with pytest.raises(DiptychError, match=r"fails on 3 of 25 rows, .* The first: first"):
        count.add(5, ["third"])


def test_a_model_that_goes_bad_late_is_noticed_as_soon() -> None:
    count = FailureCount(FailureLimit("embed", 0.1))
    for _ in range(4000):
        count.add(25, [])
    for number in range(4):
        count.add(25, [f"trouble {number}"] * 25)
    with pytest.raises(DiptychError, match=r"fails on 125 of 1000 rows, .* The first: trouble 0"):
        count.add(25, ["trouble 4"] * 25)


def test_failures_that_are_spread_out_stay_below_the_limit() -> None:
    count = FailureCount(FailureLimit("embed", 0.1))
    for number in range(10_000):
        count.add(25, [f"trouble {number}"] * (2 + number % 2))
    assert not count._limit.exceeded(count._failures, count._rows)
    assert count._rows <= 1025
