import gzip
import os
import pickle
import struct

import fsspec
import google_crc32c
import pytest
import tfrecord
from hypothesis import given
from hypothesis import strategies as st

from transforms.errors import InputError
from transforms.sources.base import InputFile, Row
from transforms.sources.example_features import IMAGE_FEATURES
from transforms.sources.tfrecord import TfrecordSource

JPEG = b"\xff\xd8\xff\xe0 not really a picture \xff\xd9"


def shard_of(path, metadata_columns=()):
    (shard,) = TfrecordSource((str(path),), os.path.dirname(path), metadata_columns).shards("", 0)
    return shard


def write(path, examples, metadata_columns=()):
    writer = tfrecord.TFRecordWriter(str(path))
    for example in examples:
        writer.write(example)
    writer.close()
    return shard_of(path, metadata_columns)


def examples(count):
    return [
        {
            "key": (f"{i:04d}".encode(), "byte"),
            "jpg": (JPEG + os.urandom(50 * i), "byte"),
            "caption": ([f"caption {i}.{n}".encode() for n in range(i % 3)] or [b""], "byte"),
        }
        for i in range(count)
    ]


def frame(data, length=None):
    head = struct.pack("<Q", len(data) if length is None else length)
    return head + masked(head) + data + masked(data)


def masked(data):
    crc = google_crc32c.value(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "shard.tfrecord"


def test_reads_what_the_writer_wrote(path):
    written = examples(20)
    rows = list(write(path, written).rows())
    assert [(row.key, row.image) for row in rows] == [
        (f"{i:04d}", e["jpg"][0]) for i, e in enumerate(written)
    ]
    assert rows[2] == Row(
        "0002", written[2]["jpg"][0], "0002.jpg", ["caption 2.0", "caption 2.1"], "shard.tfrecord", 2, {}
    )
    assert rows[0].captions == []


def test_gzip_and_memory_and_names(tmp_path, path):
    rows = list(write(path, examples(5)).rows())
    packed = gzip.compress(path.read_bytes())
    fsspec.filesystem("memory").pipe("/tfrecord/train/a.tfrecord.gz", packed)
    source = TfrecordSource(("memory://tfrecord/train/a.tfrecord.gz",), "memory://tfrecord")
    assert source.inputs() == [InputFile("train/a.tfrecord.gz", len(packed))]
    (shard,) = source.shards("", 0)
    assert (shard.name, shard.size_bytes, shard.num_rows) == ("train__a", len(packed), None)
    assert [row._replace(source="shard.tfrecord") for row in shard.rows()] == rows


def test_a_length_that_looks_like_gzip_is_a_length(tmp_path, path):
    size = int.from_bytes(b"\x1f\x8b\x08", "little")
    overhead = len(tfrecord.TFRecordWriter.serialize_tf_example({"jpg": (bytes(size), "byte")})) - size
    shard = write(path, [{"jpg": (bytes(size - overhead), "byte")}])
    assert path.read_bytes()[:3] == b"\x1f\x8b\x08"
    (row,) = shard.rows()
    assert len(row.image) == size - overhead


def test_shards_travel_small(path):
    shard = write(path, examples(2))
    assert len(pickle.dumps(shard)) < 1000
    assert list(pickle.loads(pickle.dumps(shard)).rows()) == list(shard.rows())


@pytest.mark.parametrize("name", IMAGE_FEATURES)
def test_image_features(path, name):
    (row,) = write(path, [{"key": (b"k", "byte"), name: (JPEG, "byte")}]).rows()
    assert (row.image, row.path) == (JPEG, "k.jpg")


@pytest.mark.parametrize("name", ["caption", "captions", "txt", "text", "image/caption"])
def test_caption_features(path, name):
    texts = ["é\nwhole".encode(), b"", b"\xff", b"last"]
    (row,) = write(path, [{"jpg": (JPEG, "byte"), name: (texts, "byte")}]).rows()
    assert row.captions == ["é\nwhole", "\ufffd", "last"]


@pytest.mark.parametrize(
    ("feature", "key"),
    [
        ({"key": (b"a/b.c", "byte")}, "a/b.c"),
        ({"__key__": (b"k", "byte")}, "k"),
        ({"image_id": (139, "int")}, "139"),
        ({"image/filename": (b"train/1.2.jpg", "byte")}, "train/1.2"),
        ({"key": (b"", "byte"), "image_id": (7, "int")}, "7"),
        ({}, "shard-00000000"),
    ],
)
def test_keys(path, feature, key):
    (row,) = write(path, [{"jpg": (b"\x89PNG", "byte"), **feature}]).rows()
    assert (row.key, row.path) == (key, f"{key.rpartition('/')[2]}.png")


def test_metadata(path):
    example = {
        "jpg": (JPEG, "byte"),
        "url": ("é".encode(), "byte"),
        "width": (3, "int"),
        "score": (0.5, "float"),
        "tags": ([b"a", b"b"], "byte"),
    }
    columns = ("url", "width", "score", "tags", "absent")
    (row,) = write(path, [example], columns).rows()
    assert row.metadata == {"url": "é", "width": "3", "score": "0.5", "tags": '["a", "b"]', "absent": None}


def test_record_without_an_image_is_lost(path):
    lost_one = {"key": (b"k", "byte"), "error_message": (b"HTTP Error 404", "byte"), "jpg": (1, "int")}
    first, second, third = write(path, [lost_one, {}, *examples(1)]).rows()
    assert (first.key, first.row, first.reason) == ("k", 0, "missing_image")
    assert "HTTP Error 404" in first.message
    assert (second.key, second.row, second.reason) == ("shard-00000001", 1, "missing_image")
    assert (third.key, third.row) == ("0000", 2)


def test_duplicate_keys_are_lost(path):
    third = list(write(path, examples(2) + examples(1)).rows())[2]
    assert (third.reason, third.row, third.key) == ("duplicate_key", 2, "0000")


def test_an_empty_file_has_no_records(path):
    assert list(write(path, []).rows()) == []


@pytest.mark.parametrize("data", [b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_not_a_tfrecord(tmp_path, data):
    for content in (data, gzip.compress(data)):
        (tmp_path / "a.tfrecord").write_bytes(content)
        (lost,) = shard_of(tmp_path / "a.tfrecord").rows()
        assert (lost.reason, lost.row) == ("shard_corrupt", 0)
        assert f"not a TFRecord: it begins with {data[:12]!r}" in lost.message


def test_a_shard_that_is_gone_stops_the_job(path):
    shard = write(path, examples(1))
    os.remove(path)
    with pytest.raises(InputError, match="is not there"):
        list(shard.rows())


@pytest.mark.parametrize("where", ["data", "crc"])
def test_a_corrupt_record_costs_one_row(path, where):
    rows = list(write(path, examples(5)).rows())
    data = bytearray(path.read_bytes())
    starts = record_starts(data)
    data[data.index(b"0002") if where == "data" else starts[3] - 2] ^= 1
    path.write_bytes(data)
    records = list(shard_of(path).rows())
    assert records[:2] + records[3:] == rows[:2] + rows[3:]
    assert (records[2].row, records[2].reason) == (2, "record_corrupt")
    assert f"shard.tfrecord, byte {starts[2]}:" in records[2].message


def record_starts(data):
    starts = [0]
    while starts[-1] < len(data):
        starts.append(starts[-1] + 16 + struct.unpack_from("<Q", data, starts[-1])[0])
    return starts


def test_a_record_that_is_no_example_costs_one_row(tmp_path, path):
    write(path, examples(1))
    data = path.read_bytes()
    path.write_bytes(data + frame(b"\x0a\xff\xff") + frame(data[12:-4].replace(b"0000", b"0001")))
    first, second, third = shard_of(path).rows()
    assert (first.key, third.key) == ("0000", "0001")
    assert (second.row, second.reason) == (1, "record_corrupt")


def test_a_corrupt_length_ends_the_shard(path):
    rows = list(write(path, examples(5)).rows())
    data = bytearray(path.read_bytes())
    start = record_starts(data)[3]
    data[start + 1] ^= 1
    path.write_bytes(data)
    *before, lost = shard_of(path).rows()
    assert before == rows[:3]
    assert (lost.reason, lost.row) == ("shard_corrupt", 3)
    assert f"byte {start}: the CRC of a length is wrong" in lost.message


@pytest.mark.parametrize("length", [1 << 29, 1 << 31, 1 << 45, (1 << 64) - 1])
@pytest.mark.parametrize("packed", [True, False])
def test_a_length_beyond_the_end_costs_no_memory(path, length, packed):
    write(path, examples(1))
    data = path.read_bytes() + frame(b"data", length)
    path.write_bytes(gzip.compress(data) if packed else data)
    first, lost = shard_of(path).rows()
    assert (first.key, lost.row, lost.reason) == ("0000", 1, "shard_truncated")


def test_an_oversize_record_costs_one_row(path, monkeypatch):
    monkeypatch.setattr("transforms.sources.tfrecord._MAX_RECORD_BYTES", 1000)
    big = {"key": (b"big", "byte"), "jpg": (bytes(1000), "byte")}
    first, second, third = write(path, [examples(1)[0], big, examples(2)[1]]).rows()
    assert (first.key, third.key) == ("0000", "0001")
    assert (second.row, second.reason) == (1, "record_corrupt")


def test_cut_anywhere(path):
    rows = list(write(path, examples(8)).rows())
    starts = record_starts(path.read_bytes())
    shard = shard_of(path)
    for length in reversed(range(starts[-1])):
        os.truncate(path, length)
        records = list(shard.rows())
        num_whole = sum(start <= length for start in starts) - 1
        assert records[:num_whole] == rows[:num_whole]
        if length in starts:
            assert len(records) == num_whole
        else:
            (lost,) = records[num_whole:]
            assert (lost.reason, lost.row) == ("shard_truncated", num_whole)
            assert f"byte {starts[num_whole]}:" in lost.message


def test_gzip_cut_anywhere(tmp_path, path):
    rows = list(write(path, examples(5)).rows())
    packed = gzip.compress(path.read_bytes())
    shard = shard_of(path)
    for length in range(3, len(packed)):
        path.write_bytes(packed[:length])
        *before, lost = shard.rows()
        assert before == rows[: len(before)]
        assert (lost.reason, lost.row) == ("shard_truncated", len(before))


@given(st.data())
def test_skipping_rows_changes_nothing_else(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "skip.tfrecord"
    picks = data.draw(st.lists(st.sampled_from([{}, {"jpg": (JPEG, "byte")}, *examples(3)]), max_size=8))
    shard = write(path, picks)
    content = bytearray(path.read_bytes())
    if content:
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    records = list(shard.rows())
    for skip in range(len(records) + 2):
        assert list(shard.rows(skip=skip)) == records[skip:]
