import copy
import dataclasses
import pickle
import re
from collections.abc import Callable

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.coders.typecoders import registry
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that, equal_to
from hypothesis import given
from hypothesis import strategies as st

from diptych.transforms.chunk import (
    Chunk,
    ChunkCoder,
    ChunkKey,
    Reject,
    add_counts,
    concat,
    reject_batch,
    take_rows,
)
from diptych.transforms.schemas import REJECTS, images_schema, raw_schema

# What Arrow and JSON can hold: everything but lone surrogates
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
CODER = ChunkCoder()


def raw_rows(captions: list[list[str]], image: bytes = b"image") -> pa.RecordBatch:
    count = len(captions)
    columns = [
        [f"k{i}" for i in range(count)],
        [image] * count,
        ["p.jpg"] * count,
        captions,
        ["a.tar"] * count,
        list(range(count)),
    ]
    fields = raw_schema()
    arrays = [pa.array(column, field.type) for column, field in zip(columns, fields, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=fields)


def no_rejects() -> pa.RecordBatch:
    return reject_batch("s", "read", [])


def chunk_of(rows: pa.RecordBatch, rejects: pa.RecordBatch | None = None, last: bool = False) -> Chunk:
    return Chunk(ChunkKey("s", 0), rows, no_rejects() if rejects is None else rejects, last)


def tensor_rows(count: int, size_px: int) -> pa.RecordBatch:
    """Rows of schema `images_schema`, of every nested type that is coded."""
    schema = images_schema(["note"], size_px, "uint8")
    pixels = pa.array(bytes(i % 251 for i in range(count * 3 * size_px**2)), pa.uint8())
    made = {
        "key": [f"k{i}" for i in range(count)],
        "image": [{"bytes": bytes([i]) * 500, "path": f"{i}.jpg"} for i in range(count)],
        "captions": [[f"caption {i}"] * (i % 3) for i in range(count)],
        "note": [None if i % 2 else f"note {i}" for i in range(count)],
        "phash": [2**64 - 1 - i for i in range(count)],
    }
    arrays = []
    for field in schema:
        if field.name == "pixels":
            storage = pa.FixedSizeListArray.from_arrays(pixels, 3 * size_px**2)
            arrays.append(pa.ExtensionArray.from_storage(field.type, storage))
        else:
            arrays.append(pa.array(made.get(field.name, [None] * count), field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def test_file_names() -> None:
    assert ChunkKey("a/b", 0).file_name() == "a/b-00000.parquet"
    assert ChunkKey("a", 12_345).file_name() == "a-12345.parquet"
    assert ChunkKey("a", 123_456).file_name() == "a-123456.parquet"


@given(st.lists(st.tuples(TEXT, st.integers(0, 10**7)), unique=True, min_size=2))
def test_file_names_are_unique_and_hold_their_key(keys: list[tuple[str, int]]) -> None:
    names = [ChunkKey(*key).file_name() for key in keys]
    assert len(set(names)) == len(names)
    for (shard, index), name in zip(keys, names, strict=True):
        found = re.fullmatch(r"(.*)-(\d{5,})\.parquet", name, re.DOTALL)
        assert found
        assert (found[1], int(found[2])) == (shard, index)


@given(st.lists(st.integers(0, 99_999), min_size=2))
def test_file_names_of_a_shard_sort_as_its_chunks_do(indices: list[int]) -> None:
    keys = [ChunkKey("s", index) for index in indices]
    assert [key.file_name() for key in sorted(keys)] == sorted(key.file_name() for key in keys)


def test_keys_hash_and_compare() -> None:
    assert ChunkKey("a", 1) == ChunkKey("a", 1)
    assert len({ChunkKey("a", 1), ChunkKey("a", 1), ChunkKey("a", 2), ChunkKey("b", 1)}) == 3
    assert sorted([ChunkKey("b", 0), ChunkKey("a", 10), ChunkKey("a", 9)]) == [
        ChunkKey("a", 9),
        ChunkKey("a", 10),
        ChunkKey("b", 0),
    ]


def test_length_is_the_rows_and_num_read_counts_the_rejects_too() -> None:
    rejects = reject_batch("s", "read", [Reject("k", 5, "missing_image", "m")])
    chunk = chunk_of(raw_rows([["a"], ["b"]]), rejects)
    assert (len(chunk), chunk.num_read) == (2, 3)


def test_advance_keeps_every_row_in_rows_or_rejects() -> None:
    before = reject_batch("s", "read", [Reject("k9", 9, "missing_image", "gone")])
    chunk = dataclasses.replace(
        chunk_of(raw_rows([["a"], ["b"], ["c"]]), before, last=True), counters={"b": 2, "a": 1}
    )
    after = chunk.advance(
        "image",
        take_rows(chunk.rows, [0, 2]),
        [Reject("k1", 1, "corrupt", "damaged", b"\xff")],
        {"b": 3, "c": 0},
    )
    assert (after.key, after.last, after.num_read) == (chunk.key, True, chunk.num_read)
    assert after.rows.column("key").to_pylist() == ["k0", "k2"]
    assert after.rejects.schema == REJECTS
    assert after.rejects.to_pylist() == [
        before.to_pylist()[0],
        {
            "key": "k1",
            "shard": "s",
            "row": 1,
            "stage": "image",
            "reason": "corrupt",
            "message": "damaged",
            "bytes": b"\xff",
        },
    ]
    assert after.counters == {"a": 1, "b": 5}
    assert chunk.counters == {"b": 2, "a": 1}
    assert chunk.rejects.num_rows == 1


@pytest.mark.parametrize(("kept", "num_rejects"), [([0], 0), ([0, 1], 1), ([], 1), ([0], 2)])
def test_advance_refuses_to_lose_or_invent_a_row(kept: list[int], num_rejects: int) -> None:
    chunk = chunk_of(raw_rows([["a"], ["b"]]))
    rejects = [Reject("k", 0, "no_caption", "m")] * num_rejects
    with pytest.raises(AssertionError, match=rf"'text' turned 2 rows into {len(kept)} and {num_rejects} "):
        chunk.advance("text", take_rows(chunk.rows, kept), rejects)


def test_taking_all_rows_copies_nothing() -> None:
    rows = raw_rows([["a"], ["b"]])
    assert take_rows(rows, [0, 1]) is rows
    assert take_rows(rows, [1]).column("key").to_pylist() == ["k1"]
    assert take_rows(rows, []).schema == rows.schema
    assert take_rows(rows, []).num_rows == 0


def test_concat() -> None:
    one, two = (reject_batch("s", "read", [Reject(key, 0, "bad_annotation", "m")]) for key in "ab")
    assert concat([no_rejects(), one]) is one
    assert concat([one, no_rejects(), two]).column("key").to_pylist() == ["a", "b"]
    assert concat([no_rejects(), no_rejects()]).num_rows == 0


@given(
    st.dictionaries(st.sampled_from("abc"), st.integers(-5, 5)),
    st.dictionaries(st.sampled_from("abc"), st.integers(-5, 5)),
)
def test_counts_add_up(left: dict[str, int], right: dict[str, int]) -> None:
    total = add_counts(left, right)
    assert {name: total.get(name, 0) for name in "abc"} == {
        name: left.get(name, 0) + right.get(name, 0) for name in "abc"
    }
    assert 0 not in total.values()
    assert list(total) == sorted(total)


@given(
    shard=TEXT,
    index=st.integers(0, 2**40),
    captions=st.lists(st.lists(TEXT)),
    image=st.binary(max_size=50),
    rejects=st.lists(st.tuples(TEXT, st.integers(0, 2**62), TEXT, st.none() | st.binary(max_size=50))),
    last=st.booleans(),
    counters=st.dictionaries(TEXT, st.integers(0, 2**62)),
)
def test_coder_round_trip(
    shard: str,
    index: int,
    captions: list[list[str]],
    image: bytes,
    rejects: list[tuple[str, int, str, bytes | None]],
    last: bool,
    counters: dict[str, int],
) -> None:
    lost = reject_batch(
        shard, "image", [Reject(key, row, "corrupt", text, data) for key, row, text, data in rejects]
    )
    chunk = Chunk(ChunkKey(shard, index), raw_rows(captions, image), lost, last, counters)
    decoded = CODER.decode(CODER.encode(chunk))
    assert decoded == chunk
    assert decoded.rows.schema == raw_schema()
    assert decoded.rejects.schema == REJECTS
    decoded.rows.validate(full=True)
    decoded.rejects.validate(full=True)


def test_coder_round_trip_of_nothing() -> None:
    for rows in (raw_rows([]), tensor_rows(0, 4), tensor_rows(3, 4).slice(3)):
        decoded = CODER.decode(CODER.encode(chunk_of(rows)))
        assert (decoded, len(decoded), decoded.rows.schema) == (chunk_of(rows), 0, rows.schema)


@given(st.integers(0, 40), st.integers(0, 40))
def test_coder_round_trip_of_a_slice(start: int, length: int) -> None:
    part = tensor_rows(40, 2).slice(start, length)
    decoded = CODER.decode(CODER.encode(chunk_of(part)))
    assert decoded.rows == part
    assert decoded.rows.to_pylist() == part.to_pylist()


@pytest.mark.parametrize(
    "make", [lambda: raw_rows([["x" * 100]] * 1000, b"y" * 1000), lambda: tensor_rows(250, 30)]
)
def test_a_slice_is_coded_as_the_slice(make: Callable[[], pa.RecordBatch]) -> None:
    rows = make()
    whole = CODER.encode(chunk_of(rows))
    part = CODER.encode(chunk_of(rows.slice(100, 10)))
    assert len(whole) > 500_000
    assert len(part) < 10 / len(rows) * len(whole) + 5_000
    # what is coded by default is the parent
    assert len(pickle.dumps(chunk_of(rows.slice(100, 10)))) > 500_000


def test_estimate_is_near_the_size_and_costs_no_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    rejects = reject_batch("s", "image", [Reject("k", 0, "corrupt", "m", b"z" * 100_000)])
    chunk = chunk_of(tensor_rows(250, 30), rejects)
    part = chunk_of(chunk.rows.slice(100, 10))
    sizes = [len(CODER.encode(each)) for each in (chunk, part)]
    monkeypatch.setattr(ChunkCoder, "encode", None)
    for each, size in zip((chunk, part), sizes, strict=True):
        assert abs(CODER.estimate_size(each) - size) < 5_000 + size // 20


def test_equal_chunks_have_equal_bytes() -> None:
    chunk = dataclasses.replace(chunk_of(raw_rows([["a"], ["b"]])), counters={"a": 1, "b": 2})
    same = dataclasses.replace(copy.deepcopy(chunk), counters={"b": 2, "a": 1})
    assert same == chunk
    assert CODER.is_deterministic()
    assert CODER.encode(same) == CODER.encode(chunk)


def test_coder_is_the_one_for_chunks() -> None:
    assert isinstance(registry.get_coder(Chunk), ChunkCoder)
    assert CODER.to_type_hint() is Chunk


def test_chunks_pickle() -> None:
    chunk = dataclasses.replace(chunk_of(tensor_rows(5, 4), last=True), counters={"a": 1})
    assert pickle.loads(pickle.dumps(chunk)) == chunk


def test_chunks_pass_through_a_shuffle() -> None:
    def describe(chunk: Chunk) -> tuple[str, list[str], int, bool]:
        return chunk.key.file_name(), chunk.rows.column("key").to_pylist(), chunk.num_read, chunk.last

    rejects = reject_batch("s", "read", [Reject("k", 5, "missing_image", "m")])
    rows = raw_rows([["a"], ["b"], ["c"]])
    chunks = [
        chunk_of(rows, rejects),
        dataclasses.replace(chunk_of(rows.slice(2)), key=ChunkKey("é/s", 7), last=True),
    ]
    with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
        found = (
            pipeline
            | beam.Create(chunks, reshuffle=False).with_output_types(Chunk)
            | beam.Reshuffle()
            | beam.Map(describe)
        )
        assert_that(
            found,
            equal_to(
                [("s-00000.parquet", ["k0", "k1", "k2"], 4, False), ("é/s-00007.parquet", ["k2"], 1, True)]
            ),
        )


def test_exploding_keeps_the_number_of_records() -> None:
    chunk = chunk_of(
        raw_rows([["a", "b"], [], ["c"]]), reject_batch("s", "read", [Reject("k", 9, "empty", "m")])
    )
    assert (chunk.num_read, chunk.num_records) == (4, 4)
    rows = take_rows(chunk.rows, [0, 0, 2])
    exploded = chunk.explode("text", rows, [Reject("k1", 1, "no_caption", "none")])
    assert (exploded.num_read, exploded.num_records, exploded.records) == (5, 4, 4)
    assert exploded.rejects["reason"].to_pylist() == ["empty", "no_caption"]
    fewer = exploded.advance("embed", take_rows(rows, [0, 1]), [Reject("k2", 2, "model_error", "m")])
    assert (fewer.num_read, fewer.num_records) == (5, 4)
    assert CODER.decode(CODER.encode(fewer)) == fewer


def test_a_branch_is_what_a_job_would_read_from_the_output() -> None:
    lost = reject_batch("s", "read", [Reject("k", 9, "empty", "m")])
    chunk = chunk_of(raw_rows([["a"], ["b"]]), lost).advance("image", raw_rows([["a"], ["b"]]), (), {"n": 2})
    branch = chunk.branch()
    assert branch.rows.equals(chunk.rows)
    assert (branch.num_read, len(branch.rejects), branch.counters) == (2, 0, {})
    assert branch.num_records == chunk.num_records == 3
    assert (branch.key, branch.last) == (chunk.key, chunk.last)
