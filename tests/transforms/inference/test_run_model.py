import threading
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.metrics.metric import MetricsFilter
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that, equal_to

from diptych.models import spec as spec_module
from diptych.models.base import TextModel, TextOptions, TextVector
from diptych.models.errors import ModelError
from diptych.models.spec import ModelSpec
from diptych.transforms.chunk import Chunk, ChunkCoder, ChunkKey, reject_batch
from diptych.transforms.errors import DiptychError, InputError
from diptych.transforms.inference.run_model import ChunkModelHandler, RunModel, Task
from diptych.transforms.schemas import TEXTS


class Lengths(TextModel):
    """A text becomes its length; those with `bad` in them are trouble."""

    digest, batch_size, dim = "d" * 16, 4, 1

    def prepare(self, inputs: Sequence[str]) -> list[str]:
        return list(inputs)

    def predict(self, prepared: list[str]) -> list[TextVector]:
        if any("bad" in text for text in prepared):
            raise RuntimeError("bad row")
        return [TextVector(np.array([len(text)], np.float32), known=text != "") for text in prepared]


TASK = Task(
    "embed",
    lambda rows: rows.column("caption").to_pylist(),
    lambda rows, results: (
        rows.set_column(
            1,
            rows.schema.field(1),
            pa.array([int(result.values[0]) for result in results], pa.int32()),
        ),
        {"captions_without_known_word": sum(not result.known for result in results)},
    ),
)
"""Puts the length in the place of the ordinal."""


def chunk_of(index: int, texts: Sequence[str], shard: str = "s") -> Chunk:
    numbers = range(len(texts))
    columns = [[f"k{number}" for number in numbers], [0] * len(texts), texts, [10 + n for n in numbers]]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, TEXTS, strict=True)]
    rows = pa.RecordBatch.from_arrays(arrays, schema=TEXTS)
    return Chunk(ChunkKey(shard, index), rows, reject_batch(shard, "read", []), False, records=1)


def told(chunk: Chunk) -> tuple[Any, ...]:
    lost = zip(
        *(chunk.rejects[name].to_pylist() for name in ("key", "row", "stage", "reason", "message")),
        strict=True,
    )
    lengths = dict(zip(chunk.rows["caption"].to_pylist(), chunk.rows[1].to_pylist(), strict=True))
    return chunk.key.index, tuple(lengths.items()), tuple(lost), tuple(chunk.counters.items()), chunk.records


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    """A spec that loads `Lengths`."""
    monkeypatch.setattr(spec_module, "_load", lambda spec: Lengths())
    monkeypatch.setattr(spec_module, "_loaded", {})
    return ModelSpec("word2vec", "nowhere", TextOptions())


def run(
    chunks: list[Chunk], spec: ModelSpec, expected: list[Any], *flags: str, max_failure_rate: float = 0.5
) -> Any:
    pipeline = beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner", *flags]))
    created = pipeline | beam.Create(chunks, reshuffle=False).with_output_types(Chunk)
    run = created | RunModel(spec, TASK, max_failure_rate=max_failure_rate)
    assert_that(run | beam.Map(told), equal_to(expected))
    result = pipeline.run()
    result.wait_until_finish()
    return result


class TestInBeam:
    @pytest.mark.parametrize("flags", [(), ("--direct_num_workers=2",), ("--direct_runner_bundle_repeat=2",)])
    def test_every_chunk_gets_its_results(self, spec, flags):
        chunks = [chunk_of(index, [f"{number}" * index for number in range(9)]) for index in range(7)]
        expected = [
            (index, tuple((f"{n}" * index, index) for n in range(9)), (), (), 1) for index in range(1, 7)
        ]
        expected.append((0, (("", 0),), (), (("captions_without_known_word", 9),), 1))
        run(chunks, spec, expected, *flags)

    def test_a_row_that_fails_is_a_reject_of_the_stage(self, spec):
        lost = ("k1", 11, "embed", "model_error", "RuntimeError: bad row")
        run([chunk_of(0, ["a", "bad", "cc"])], spec, [(0, (("a", 1), ("cc", 2)), (lost,), (), 1)])

    def test_a_chunk_without_rows_stays_one(self, spec):
        run([chunk_of(3, [])], spec, [(3, (), (), (), 1)])

    def test_beams_own_metrics_count_rows(self, spec):
        result = run([chunk_of(0, ["a", "b"])], spec, [(0, (("a", 1), ("b", 1)), (), (), 1)])
        counters = result.metrics().query(MetricsFilter().with_name("num_inferences"))["counters"]
        assert [counter.committed for counter in counters] == [2]

    def test_the_model_is_loaded_once_and_before_any_row(self, spec, monkeypatch):
        loaded = []
        monkeypatch.setattr(spec_module, "_load", lambda spec: (loaded.append(spec), Lengths())[1])
        chunks = [chunk_of(index, ["a"]) for index in range(4)]
        run(chunks, spec, [(i, (("a", 1),), (), (), 1) for i in range(4)], "--direct_num_workers=2")
        assert loaded == [spec]

    def test_a_model_that_cannot_be_loaded_is_an_input_error(self, spec, monkeypatch):
        def fail(spec: ModelSpec) -> None:
            raise ModelError("nowhere is not there. Name another.")

        monkeypatch.setattr(spec_module, "_load", fail)
        with pytest.raises(InputError, match=r"nowhere is not there\. Name another\."):
            run([chunk_of(0, ["a"])], spec, [])

    def test_chunks_are_never_coded(self, spec, monkeypatch):
        class Source(beam.DoFn):
            def process(self, index: int) -> Iterator[Chunk]:
                yield chunk_of(index, ["a"])

        monkeypatch.setattr(ChunkCoder, "encode", lambda *_: pytest.fail("a chunk was encoded"))
        with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
            chunks = pipeline | beam.Create([0, 1]) | beam.ParDo(Source()).with_output_types(Chunk)
            run = chunks | RunModel(spec, TASK) | beam.Map(told)
            assert_that(run, equal_to([(i, (("a", 1),), (), (), 1) for i in range(2)]))

    def test_no_thread_is_left_behind_for_each_run(self, spec):
        run([chunk_of(0, ["a"])], spec, [(0, (("a", 1),), (), (), 1)])
        before = threading.active_count()
        for _ in range(3):
            run([chunk_of(0, ["a"])], spec, [(0, (("a", 1),), (), (), 1)])
        assert threading.active_count() == before


def chunks_with(bad: set[int], count: int, chunk_rows: int) -> list[Chunk]:
    texts = [f"bad {number}" if number in bad else f"{number}" for number in range(count)]
    return [
        chunk_of(index, texts[start : start + chunk_rows])
        for index, start in enumerate(range(0, count, chunk_rows))
    ]


class TestFailureRate:
    def run(self, chunks: list[Chunk], spec: ModelSpec, rate: float) -> None:
        with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
            created = pipeline | beam.Create(chunks, reshuffle=False).with_output_types(Chunk)
            _ = created | RunModel(spec, TASK, max_failure_rate=rate)

    @pytest.mark.parametrize(
        ("bad", "count", "rate"),
        [
            (set(), 100, 0.0),
            ({0, 1}, 20, 0.1),
            (set(range(19)), 19, 0.1),
            ({0}, 100, 0.01),
            (set(range(100)), 100, 1),
        ],
    )
    def test_as_many_as_may_be(self, spec, bad, count, rate):
        self.run(chunks_with(bad, count, count), spec, rate)

    @pytest.mark.parametrize(
        ("bad", "count", "chunk_rows", "rate", "failures", "rows"),
        [
            ({0, 1, 2}, 20, 20, 0.1, 3, 20),
            ({7}, 100, 10, 0.0, 1, 10),
            (set(range(50)), 1000, 10, 0.1, 20, 20),
            ({5, 95, 96}, 1000, 50, 0.02, 3, 100),
        ],
    )
    def test_more_end_the_run_with_the_first(self, spec, bad, count, chunk_rows, rate, failures, rows):
        message = rf"fails on {failures} of {rows} rows, more than --max_failure_rate {rate:g} .* first: "
        with pytest.raises(DiptychError, match=message + "RuntimeError: bad row"):
            self.run(chunks_with(bad, count, chunk_rows), spec, rate)


def test_a_worker_refuses_another_model_than_the_launcher_had(spec):
    right, wrong = (ChunkModelHandler(spec, TASK, None, 0.5, digest) for digest in ("d" * 16, "e" * 16))
    assert right.load_model().batch_size == 4
    with pytest.raises(InputError, match=r"is another model on a worker \(digest d{16}\) than .* \(e{16}\)"):
        wrong.load_model()
