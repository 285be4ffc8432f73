from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.transforms import skip_done
from diptych.transforms.chunk import Chunk, ChunkKey, reject_batch
from diptych.transforms.errors import InputError
from diptych.transforms.skip_done import DoneKeys, drop_done, write_done_keys


def write_keys(path, keys):
    table = pa.table({"key": pa.array(keys, pa.string()), "caption": [""] * len(keys)})
    pq.write_table(table, path, write_page_checksum=True, use_dictionary=False)
    return str(path)


@pytest.fixture
def opened(tmp_path):
    def open_keys(*files):
        names = [write_keys(tmp_path / f"{number}.parquet", keys) for number, keys in enumerate(files)]
        url = str(tmp_path / "plan" / "done.keys")
        return write_done_keys(names, url), DoneKeys(url)

    return open_keys


def test_keys_of_all_files_each_once(opened):
    number, done = opened(["a", "b", "b"], ["b", "é", "日本"], [])
    assert number == 4
    asked = ["日本", "x", "a", "", "é", "b", "aa"]
    assert done.are_done(asked).tolist() == [True, False, True, False, True, True, False]
    assert done.are_done([]).tolist() == []


def test_no_keys_at_all(opened):
    number, done = opened()
    assert number == 0
    assert done.are_done(["a"]).tolist() == [False]


def test_more_keys_than_are_held_at_a_time(opened, monkeypatch):
    monkeypatch.setattr(skip_done, "_PART_BYTES", 64)
    keys = [f"key-{number}" for number in range(20_000)]
    number, done = opened(*(keys[start::40] for start in range(40)))
    assert number == 20_000
    assert done.are_done(keys).all()
    assert not done.are_done([f"{key}x" for key in keys]).any()


@given(known=st.lists(st.text(max_size=5)), asked=st.lists(st.text(max_size=5)))
def test_as_a_set_would(tmp_path_factory, known, asked):
    folder = tmp_path_factory.mktemp("keys")
    known, asked = ([key.encode("utf-8", "replace").decode() for key in keys] for keys in (known, asked))
    write_done_keys([write_keys(folder / "a.parquet", known)], str(folder / "done.keys"))
    found = DoneKeys(str(folder / "done.keys")).are_done(asked + known)
    assert found.tolist() == [key in {*known} for key in asked + known]


def test_a_chunk_without_what_is_done(opened):
    _, done = opened(["b", "d"])
    rows = pa.record_batch({"key": ["a", "b", "c", "d"], "row": [0, 1, 2, 3]})
    chunk = Chunk(ChunkKey("s", 0), rows, reject_batch("s", "read", ()), last=True, counters={"x": 1})
    left = drop_done(chunk, done)
    assert left.rows.to_pydict() == {"key": ["a", "c"], "row": [0, 2]}
    assert (left.num_read, left.num_records, left.last) == (2, 4, True)
    assert left.counters == {"x": 1, "done_before": 2}
    assert drop_done(left, done).num_records == 4


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"a\.parquet is damaged: "):
        write_done_keys([str(tmp_path / "a.parquet")], str(tmp_path / "done.keys"))
    assert not (tmp_path / "done.keys").exists()
    whole = Path(write_keys(tmp_path / "a.parquet", [f"key {number}" for number in range(1000)]))
    data = bytearray(whole.read_bytes())
    data[500:600] = bytes(100)
    whole.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.parquet is damaged: "):
        write_done_keys([str(whole)], str(tmp_path / "done.keys"))
    assert np.array_equal(sorted(tmp_path.iterdir()), [tmp_path / "a.parquet"])
