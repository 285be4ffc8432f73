import numpy as np
import pyarrow as pa
import pytest

from diptych.models.base import Captions
from diptych.transforms.chunk import Chunk, ChunkKey, reject_batch
from diptych.transforms.inference.caption import caption_task
from diptych.transforms.inference.run_model import Failure, add_results
from diptych.transforms.schemas import captions_schema, images_schema, raw_schema

IMAGES = {"raw": raw_schema(), "resized": images_schema()}


def chunk_of(kind: str) -> Chunk:
    """Three images, as a source has them or as they are after resizing."""
    made = {
        "key": ["a", "b", "c"],
        "image": [b"0", b"1", b"2"],
        "captions": [["one", "two"], [], ["three"]],
        "row": [5, 6, 7],
        "path": ["a.jpg"] * 3,
        "source": ["x.tar"] * 3,
    }
    if kind == "resized":
        made["image"] = [{"bytes": data, "path": "p"} for data in made["image"]]
    arrays = [pa.array(made.get(field.name, [None] * 3), field.type) for field in IMAGES[kind]]
    rows = pa.RecordBatch.from_arrays(arrays, schema=IMAGES[kind])
    return Chunk(ChunkKey("s", 0), rows, reject_batch("s", "read", []), True)


@pytest.mark.parametrize("kind", IMAGES)
def test_a_captioner_gets_the_images_as_they_are_encoded(kind: str) -> None:
    chunk = chunk_of(kind)
    assert caption_task(None).inputs(chunk.rows) == [b"0", b"1", b"2"]
    assert caption_task(None).inputs(chunk.rows.slice(1, 1)) == [b"1"]


@pytest.mark.parametrize("kind", IMAGES)
def test_captions_take_the_place_of_images(kind: str) -> None:
    results = [Captions(("x", "y"), (-0.5, -1.5)), Failure("why"), Captions(("z",), (-2.0,))]
    done = add_results(chunk_of(kind), results, caption_task(None))
    assert done.rows.schema.equals(captions_schema())
    assert done.rows.to_pylist() == [
        {
            "key": "a",
            "caption": "x",
            "candidates": ["x", "y"],
            "scores": [-0.5, -1.5],
            "references": ["one", "two"],
        },
        {"key": "c", "caption": "z", "candidates": ["z"], "scores": [-2.0], "references": ["three"]},
    ]
    (lost,) = done.rejects.to_pylist()
    assert (lost["key"], lost["row"], lost["stage"], lost["message"]) == ("b", 6, "caption", "why")


def test_features_are_a_column_where_asked_for() -> None:
    results = [Captions(("x",), (-1.0,), np.array([i, 1], np.float32)) for i in range(3)]
    done = add_results(chunk_of("raw"), results, caption_task(2))
    assert done.rows.schema.equals(captions_schema(2))
    assert done.rows["features"].to_pylist() == [[0, 1], [1, 1], [2, 1]]


def test_all_may_fail() -> None:
    done = add_results(chunk_of("raw"), [Failure("why")] * 3, caption_task(2))
    assert (len(done.rows), len(done.rejects)) == (0, 3)
