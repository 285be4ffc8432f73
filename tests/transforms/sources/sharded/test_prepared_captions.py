import dataclasses
import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diptych.transforms.errors import InputError
from diptych.transforms.schemas import IMAGE, RAW_TEXT
from diptych.transforms.sources.base import InputFile, Row
from diptych.transforms.sources.sharded import prepared_captions
from diptych.transforms.sources.sharded.prepared_captions import TextSource

COUNT = 10


@pytest.fixture
def path(tmp_path):
    """A file as `diptych prepare` writes it."""
    columns = {
        "key": [f"k{number}" for number in range(COUNT)],
        "image": pa.array([{"bytes": b"JPEG" * 100, "path": "x.jpg"}] * COUNT, IMAGE),
        "captions": [[f"caption {number}.{i}" for i in range(number % 3)] for number in range(COUNT)],
        "row": [100 + number for number in range(COUNT)],
    }
    pq.write_table(
        pa.table(columns), tmp_path / "a-00000.parquet", write_page_checksum=True, compression="none"
    )
    return tmp_path / "a-00000.parquet"


def shard_of(path):
    (shard,) = TextSource((str(path),), os.path.dirname(path)).shards("", 0)
    return shard


def test_a_file_is_a_shard(path):
    source = TextSource((str(path),), os.path.dirname(path))
    assert source.inputs() == [InputFile("a-00000.parquet", path.stat().st_size)]
    shard = shard_of(path)
    assert (shard.name, shard.source) == ("a-00000", "a-00000.parquet")
    assert pickle.loads(pickle.dumps(shard)) == shard


@pytest.mark.parametrize("batch_rows", [1, 3, 10, 1024])
@pytest.mark.parametrize("skip", [0, 1, 3, 9, 10, 11])
def test_rows_come_from_any_place_on(path, monkeypatch, batch_rows, skip):
    monkeypatch.setattr(prepared_captions, "_BATCH_ROWS", batch_rows)
    batches = list(shard_of(path).batches(skip))
    assert all(batch.schema.equals(RAW_TEXT) for batch in batches)
    assert all(len(batch) for batch in batches)
    assert [row for batch in batches for row in batch.to_pylist()] == [
        {"key": f"k{n}", "captions": [f"caption {n}.{i}" for i in range(n % 3)], "row": n}
        for n in range(skip, COUNT)
    ]


def test_it_is_a_shard_as_any(path):
    rows = list(shard_of(path).rows(skip=8))
    assert rows == [
        Row("k8", b"", "", ["caption 8.0", "caption 8.1"], "a-00000.parquet", 8),
        Row("k9", b"", "", [], "a-00000.parquet", 9),
    ]


def test_images_are_not_read(path):
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"JPEG", b"JUNK"))
    assert sum(map(len, shard_of(path).batches(0))) == COUNT


@pytest.mark.parametrize("damage", ["page", "footer", "short", "columns"])
def test_damage_is_an_error_with_the_remedy(path, damage):
    whole = bytearray(path.read_bytes())
    if damage == "page":
        whole[whole.index(b"caption 4.0")] ^= 1
    elif damage == "footer":
        whole[-5] ^= 1
    elif damage == "columns":
        pq.write_table(pa.table({"key": ["a"]}), path)
        whole = bytearray(path.read_bytes())
    path.write_bytes(whole[:100] if damage == "short" else whole)
    with pytest.raises(InputError, match=r"a-00000\.parquet is damaged: .* Run `diptych verify`"):
        list(shard_of(path).batches(0))


def test_a_file_that_is_gone_is_named(path):
    shard = dataclasses.replace(shard_of(path), url=f"{path}.gone")
    with pytest.raises(InputError, match=r"gone is not there"):
        list(shard.batches(0))
