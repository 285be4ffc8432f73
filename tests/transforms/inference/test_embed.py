import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that, equal_to

from diptych.models.base import TextVector
from diptych.transforms.chunk import Chunk, ChunkKey, Reject, reject_batch
from diptych.transforms.inference.embed import ExplodeCaptions, embed_task, explode_captions, vector_array
from diptych.transforms.inference.run_model import Failure, add_results
from diptych.transforms.schemas import RAW_TEXT, TEXTS, embeddings_schema


def chunk_of(captions: list[list[str]], first_row: int = 0) -> Chunk:
    columns = [
        [f"k{number}" for number in range(len(captions))],
        captions,
        [first_row + number for number in range(len(captions))],
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, RAW_TEXT, strict=True)]
    rejects = reject_batch("s", "read", [Reject("", 99, "missing_image", "m")])
    return Chunk(ChunkKey("s", 0), pa.RecordBatch.from_arrays(arrays, schema=RAW_TEXT), rejects, True)


def vector(*values: float, known: bool = True) -> TextVector:
    return TextVector(np.array(values, np.float32), known)


class TestExplode:
    def test_gives_a_row_a_caption(self):
        chunk = explode_captions(chunk_of([["a", "b"], ["c"], ["d", "e", "f"]], 7), "embed")
        assert chunk.rows.schema.equals(TEXTS)
        assert chunk.rows.to_pylist() == [
            {"key": key, "caption_index": index, "caption": caption, "row": row}
            for key, index, caption, row in [
                ("k0", 0, "a", 7),
                ("k0", 1, "b", 7),
                ("k1", 0, "c", 8),
                ("k2", 0, "d", 9),
                ("k2", 1, "e", 9),
                ("k2", 2, "f", 9),
            ]
        ]
        assert (chunk.num_read, chunk.num_records) == (7, 4)

    def test_an_image_without_captions_is_a_reject(self):
        chunk = explode_captions(chunk_of([[], ["c"], []], 7), "embed")
        assert chunk.rows["caption"].to_pylist() == ["c"]
        lost = chunk.rejects.to_pylist()[1:]
        assert [(r["key"], r["row"], r["stage"], r["reason"]) for r in lost] == [
            ("k0", 7, "embed", "no_caption"),
            ("k2", 9, "embed", "no_caption"),
        ]
        assert chunk.num_read == 4

    @pytest.mark.parametrize("captions", [[], [[]], [[], []]])
    def test_of_no_captions(self, captions):
        chunk = explode_captions(chunk_of(captions), "embed")
        assert chunk.rows.equals(pa.RecordBatch.from_pylist([], schema=TEXTS))
        assert (chunk.num_read, chunk.num_records) == (len(captions) + 1, len(captions) + 1)

    def test_of_a_slice(self):
        whole = chunk_of([["x"], ["a", "b"], [], ["c"], ["y"]])
        sliced = Chunk(whole.key, whole.rows.slice(1, 3), whole.rejects, True)
        rows = explode_captions(sliced, "embed").rows
        assert rows["caption"].to_pylist() == ["a", "b", "c"]
        assert rows["key"].to_pylist() == ["k1", "k1", "k3"]
        assert rows["caption_index"].to_pylist() == [0, 1, 0]

    def test_in_beam(self):
        with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
            chunks = pipeline | beam.Create([chunk_of([["a", "b"]])]).with_output_types(Chunk)
            captions = (
                chunks | ExplodeCaptions("embed") | beam.Map(lambda chunk: chunk.rows["caption"].to_pylist())
            )
            assert_that(captions, equal_to([["a", "b"]]))


class TestTask:
    def test_vectors_are_added_and_failures_rejected(self):
        chunk = explode_captions(chunk_of([["a", "b"], ["c"]]), "embed")
        task = embed_task(2, True)
        assert task.inputs(chunk.rows) == ["a", "b", "c"]
        results = [vector(1, 2), Failure("why"), vector(0, 0, known=False)]
        done = add_results(chunk, results, task)
        assert done.rows.schema.equals(embeddings_schema(2, True))
        assert done.rows.to_pylist() == [
            {"key": "k0", "caption_index": 0, "caption": "a", "embedding": [1, 2], "no_known_word": False},
            {"key": "k1", "caption_index": 0, "caption": "c", "embedding": [0, 0], "no_known_word": True},
        ]
        assert done.counters == {"captions_without_known_word": 1}
        lost = done.rejects.to_pylist()[-1]
        assert (lost["key"], lost["row"], lost["stage"], lost["reason"], lost["message"]) == (
            "k0",
            0,
            "embed",
            "model_error",
            "why",
        )

    def test_without_the_flag(self):
        chunk = explode_captions(chunk_of([["a"]]), "embed")
        done = add_results(chunk, [vector(1, 2, 3)], embed_task(3, False))
        assert done.rows.schema.equals(embeddings_schema(3))
        assert done.counters == {}

    def test_of_nothing(self):
        chunk = explode_captions(chunk_of([]), "embed")
        assert add_results(chunk, [], embed_task(3, True)).rows.schema.equals(embeddings_schema(3, True))


def test_vectors_become_lists_of_one_length() -> None:
    array = vector_array([np.array([1.5, 2], np.float32), np.array([3, 4], np.float32)], 2)
    assert array.type == pa.list_(pa.float32(), 2)
    assert array.to_pylist() == [[1.5, 2], [3, 4]]
    assert len(vector_array([], 5)) == 0
