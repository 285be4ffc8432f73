import gzip
import os
import pickle
import struct
import zlib

import fsspec
import google_crc32c
import pytest
import tfrecord
from hypothesis import given
from hypothesis import strategies as st

from diptych.transforms.errors import InputError, OptionError
from diptych.transforms.sources.base import ColumnNames, InputFile, Row
from diptych.transforms.sources.sharded.example_features import IMAGE_FEATURES
from diptych.transforms.sources.sharded.tfrecord import TfrecordSource

JPEG = b"\xff\xd8\xff\xe0 not really a picture \xff\xd9"


def shard_of(path, metadata_columns=(), **columns):
    columns = ColumnNames(**columns)
    (shard,) = TfrecordSource((str(path),), os.path.dirname(path), metadata_columns, columns=columns).shards(
        "", 0
    )
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
    assert row.captions == ["é\nwhole", "ÿ", "last"]


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
    row, _ = write(path, [example, {"absent": (b"a", "byte")}], columns).rows()
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
    monkeypatch.setattr("diptych.transforms.sources.sharded.tfrecord._MAX_RECORD_BYTES", 1000)
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


def text(*values):
    return [value.encode() for value in values], "byte"


@pytest.mark.parametrize(
    ("features", "captions"),
    [
        ({"captions/text": text("a", "b"), "captions/id": ([1, 2], "int")}, ["a", "b"]),
        ({"image/captions": text("a")}, ["a"]),
        (
            {"caption/0": text("a"), "caption/1": text("b"), "caption/10": text("c"), "caption/2": text("d")},
            list("abdc"),
        ),
        ({"caption_1": text("b"), "caption_0": text("a")}, ["a", "b"]),
        ({"image/caption0": text("a")}, ["a"]),
        ({"caption": text("a"), "caption_0": text("b")}, ["a"]),
        ({"caption": ([1], "int"), "text": text("a")}, ["a"]),
        ({"image/class/text": text("dog"), "image/object/class/text": text("cat")}, []),
        ({"image/caption_ids": ([1, 2], "int")}, []),
    ],
    ids=str,
)
def test_captions_of_other_writers(path, features, captions):
    (row,) = write(path, [{"image": (JPEG, "byte"), **features}]).rows()
    assert row.captions == captions


def test_captions_that_are_not_utf8_are_counted(path):
    captions = (["\ufffd".encode(), b"caf\xe9", b"ok"], "byte")
    (row,) = write(path, [{"jpg": (JPEG, "byte"), "caption": captions}]).rows()
    assert (row.captions, row.counters) == (["\ufffd", "café", "ok"], {"captions_not_utf8": 1})


@pytest.mark.parametrize("key", ["image/id", "image/source_id", "image/image_id", "id"])
def test_other_keys(path, key):
    (row,) = write(path, [{"image/encoded": (JPEG, "byte"), key: (7, "int")}]).rows()
    assert row.key == "7"


@pytest.mark.parametrize(
    ("words", "caption"),
    [
        (["<S>", "A", "man", ".", "</S>"], ["A man ."]),
        (["a", "man", "runs"], ["a man runs"]),
        (["a man", "a dog runs"], ["a man", "a dog runs"]),
        (["man"], ["man"]),
        ([], []),
    ],
)
def test_sequence_examples(path, words, caption):
    context = {"image/image_id": (9, "int"), "image/data": (JPEG, "byte")}
    lists = {"image/caption": ([word.encode() for word in words], "byte")} if words else {}
    lists["image/caption_ids"] = ([1, 2], "int")
    writer = tfrecord.TFRecordWriter(str(path))
    writer.write(
        context, {name: ([[value] for value in values], kind) for name, (values, kind) in lists.items()}
    )
    writer.close()
    (row,) = shard_of(path).rows()
    assert (row.key, row.image, row.captions) == ("9", JPEG, caption)


def test_an_image_that_is_raw_pixels_is_told(path):
    sides = {"image/height": (4, "int"), "image/width": (5, "int")}
    shard = write(path, [{"image/encoded": (bytes(60), "byte"), **sides}, {"image": (JPEG, "byte"), **sides}])
    lost, row = shard.rows()
    assert lost.reason == "missing_image"
    assert "the image is 60 raw pixels (5 x 4); expected an encoded image" in lost.message
    assert row.image == JPEG


def test_an_image_of_numbers_is_told(path):
    (lost,) = write(path, [{"image": ([0.5] * 12, "float")}]).rows()
    assert "feature 'image' holds 12 numbers; expected the bytes of an image" in lost.message


def test_of_several_images_the_others_are_counted(path):
    (row,) = write(path, [{"image": ([JPEG, JPEG + b"2"], "byte"), "caption": text("a")}]).rows()
    assert (row.image, row.counters) == (JPEG, {"images_passed_over": 1})


def test_a_record_a_caption(path):
    written = [{"image_id": (1, "int"), "jpg": (JPEG, "byte"), "caption": text(name)} for name in "abc"]
    written.append({"image_id": (2, "int"), "jpg": (JPEG, "byte"), "caption": text("d")})
    shard = write(path, [*written, written[0]])
    first, second, lost = shard.rows()
    assert (first.key, first.captions, first.counters) == ("1", ["a", "b", "c"], {"captions_joined": 2})
    assert (second.key, second.row) == ("2", 3)
    assert (lost.reason, lost.row) == ("duplicate_key", 4)
    for skip in range(4):
        assert list(shard.rows(skip=skip)) == [first, second, lost][skip:]


class TestNamedColumns:
    def test_they_are_read(self, path):
        example = {
            "jpg": (b"1", "byte"),
            "photo": (JPEG, "byte"),
            "caption": text("a"),
            "alt": text("b"),
            "nr": (5, "int"),
        }
        write(path, [example])
        (row,) = shard_of(path, image="photo", caption="alt", key="nr").rows()
        assert (row.image, row.captions, row.key) == (JPEG, ["b"], "5")

    @pytest.mark.parametrize("role", ["image", "caption", "key"])
    def test_one_that_no_record_has_is_refused(self, path, role):
        write(path, examples(3))
        with pytest.raises(
            OptionError,
            match=rf"--{role}_column x: the first 3 records of .* Expected one of theirs: caption, jpg, key\.",
        ):
            shard_of(path, **{role: "x"})

    def test_metadata_that_no_record_has_are_refused(self, path):
        with pytest.raises(OptionError, match="--metadata_columns x: the first 3 records of "):
            write(path, examples(3), ("caption", "x"))

    def test_records_that_lack_one(self, path):
        whole = {"photo": (JPEG, "byte"), "alt": text("b"), "nr": (5, "int")}
        write(
            path,
            [whole, *({k: v for k, v in whole.items() if k != name} | {"n": (1, "int")} for name in whole)],
        )
        first, no_image, no_caption, no_key = shard_of(path, image="photo", caption="alt", key="nr").records(
            0
        )
        assert first.captions == ["b"]
        assert no_image.reason == "missing_image"
        assert (no_caption.captions, no_caption.counters) == ([], {"rows_without_caption_column": 1})
        assert no_key.reason == "bad_annotation"
        assert "no feature 'nr' that can be a key" in no_key.message

    def test_a_file_without_records_refuses_nothing(self, path):
        write(path, [])
        assert list(shard_of(path, image="x").rows()) == []


@pytest.mark.parametrize("level", [0, 1, 6, 9])
@pytest.mark.parametrize("wbits", [15, 31, 9])
def test_compression_of_every_kind(path, level, wbits):
    rows = list(write(path, examples(20)).rows())
    packer = zlib.compressobj(level, wbits=wbits)
    packed = packer.compress(path.read_bytes()) + packer.flush()
    path.write_bytes(packed)
    assert list(shard_of(path).rows()) == rows
    path.write_bytes(packed[:-30])
    *before, lost = shard_of(path).rows()
    assert before == rows[: len(before)]
    assert lost.reason == "shard_truncated"


def test_texts_that_may_be_captions_are_noted(tmp_path, path):
    image = {"image/encoded": (JPEG, "byte"), "image/filename": (b"the first.jpg", "byte")}
    source = TfrecordSource((str(path),), str(tmp_path))
    write(
        path, [{**image, "prompt": (b"a red dog", "byte"), "label": (b"dog", "byte"), "number": ([1], "int")}]
    )
    assert source.column_notes() == (
        f"{path}: no feature has a usual name of captions, so the rows have none. If they are in one of 'prompt', "
        "name it with --caption_column.",
    )
    write(path, [{**image, "prompt": (b"a red dog", "byte"), "caption": (b"a dog", "byte")}])
    assert source.column_notes() == ()
    path.write_bytes(b"nonsense")
    assert source.column_notes() == ()
