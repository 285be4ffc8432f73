import io
import os
import pickle

import datasets
import fsspec
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.transforms.chunk import Reject
from diptych.transforms.errors import InputError, OptionError
from diptych.transforms.schemas import IMAGE
from diptych.transforms.sources.base import ColumnNames, InputFile, Row
from diptych.transforms.sources.sharded.parquet import ParquetSource

JPEG = b"\xff\xd8\xff\xe0 not really a picture \xff\xd9"


def source_of(path, **options):
    columns = ColumnNames(*(options.pop(f"{name}_column", None) for name in ("image", "caption", "key")))
    return ParquetSource((str(path),), os.path.dirname(path), columns=columns, **options)


def shard_of(path, **options):
    (shard,) = source_of(path, **options).shards("", 0)
    return shard


def write(path, columns, schema=None, check=True, **options):
    pq.write_table(pa.table(columns, schema=schema), path, **options)
    return shard_of(path) if check else None


def columns(count, start=0):
    return {
        "key": [f"{i:04d}" for i in range(start, start + count)],
        "image": [JPEG + bytes([i % 256]) * 700 for i in range(start, start + count)],
        "captions": [[f"caption {i}.{n}" for n in range(i % 3)] for i in range(start, start + count)],
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "shard.parquet"


def test_img2dataset_columns(path):
    table = {
        "url": ["http://a", "http://b"],
        "key": ["000000000", "000000001"],
        "status": ["success", "failed_to_download"],
        "error_message": [None, "HTTP Error 404: Not Found"],
        "caption": ["one\ncaption", "two"],
        "width": [224, None],
        "jpg": [JPEG, None],
    }
    write(path, table)
    first, second = shard_of(path, metadata_columns=("url", "width")).rows()
    assert first == Row(
        "000000000",
        JPEG,
        "000000000.jpg",
        ["one\ncaption"],
        "shard.parquet",
        0,
        {"url": "http://a", "width": "224"},
    )
    assert (second.key, second.row, second.reason) == ("000000001", 1, "missing_image")
    assert "HTTP Error 404" in second.message


def test_hugging_face_images(path):
    pictures = [PIL.Image.fromarray(np.full((8, 8, 3), i, np.uint8)) for i in range(5)]
    data = {"image": pictures, "text": [f"text {i}" for i in range(5)], "image_id": list(range(5))}
    datasets.Dataset.from_dict(data).cast_column("image", datasets.Image()).to_parquet(path)
    rows = list(shard_of(path).rows())
    assert [(row.key, row.captions) for row in rows] == [(str(i), [f"text {i}"]) for i in range(5)]
    assert np.asarray(PIL.Image.open(io.BytesIO(rows[3].image)))[0, 0, 0] == 3
    assert rows[0].path == "0.png"


@pytest.mark.parametrize(
    ("feature", "value"),
    [
        (datasets.Sequence({"raw": datasets.Value("string")}), {"raw": ["a", "b"]}),
        (
            [{"raw": datasets.Value("string"), "sentid": datasets.Value("int64")}],
            [{"raw": t, "sentid": 1} for t in "ab"],
        ),
        (datasets.LargeList(datasets.Value("large_string")), ["a", "b"]),
        ({"raw": [datasets.Value("string")]}, {"raw": ["a", "b"]}),
    ],
    ids=["sequence", "list", "large", "struct"],
)
def test_hugging_face_sentences(path, feature, value):
    features = datasets.Features({"image": datasets.Image(), "sentences": feature})
    data = {"image": [{"bytes": JPEG, "path": "a.jpg"}], "sentences": [value]}
    datasets.Dataset.from_dict(data, features=features).to_parquet(path)
    (row,) = shard_of(path).rows()
    assert row.captions == ["a", "b"]


def test_hugging_face_images_that_are_only_a_path(path):
    image = [{"bytes": None, "path": "/x/a.jpg"}, {"bytes": JPEG, "path": "/x/b.jpg"}, None]
    write(path, {"image": pa.array(image, IMAGE), "id": [1, 2, 3]})
    first, second, third = shard_of(path).rows()
    assert (first.reason, first.key) == ("missing_image", "1")
    assert "/x/a.jpg" in first.message
    assert (second.path, second.captions, second.row) == ("b.jpg", [], 1)
    assert (third.reason, third.row) == ("missing_image", 2)


def test_diptych_output(path):
    image = pa.array([{"bytes": JPEG, "path": "a.jpg"}], IMAGE)
    shard = write(path, {"key": ["train/a"], "image": image, "captions": [["one", "two"]], "row": [7]})
    (row,) = shard.rows()
    assert row == Row("train/a", JPEG, "a.jpg", ["one", "two"], "shard.parquet", 0, {})


def test_struct_with_bytes_alone(path):
    (row,) = write(path, {"img": [{"bytes": b"\x89PNG"}]}).rows()
    assert (row.key, row.path, row.image) == ("shard-00000000", "shard-00000000.png", b"\x89PNG")


def test_null_and_empty_keys_are_numbered(path):
    rows = list(write(path, {"key": ["a", None, ""], "jpg": [JPEG] * 3}).rows())
    assert [row.key for row in rows] == ["a", "shard-00000001", "shard-00000002"]


def test_named_columns(path):
    table = {"image": [JPEG], "photo": [b"photo"], "alt": ["alt"], "note": ["note"], "key": ["k"], "nr": [5]}
    write(path, table)
    named = {"image_column": "photo", "caption_column": "note", "key_column": "nr"}
    (row,) = shard_of(path, **named).rows()
    assert (row.image, row.captions, row.key) == (b"photo", ["note"], "5")


def test_a_missing_column_is_told_at_planning(path):
    write(path, {"image": [JPEG], "n": [0.5]})
    with pytest.raises(OptionError, match=r"no column 'x'.*image \(binary\), n \(double\).*--key_column"):
        source_of(path, key_column="x").shards("", 0)
    with pytest.raises(OptionError, match=r"no column 'x'.*--metadata_columns"):
        source_of(path, metadata_columns=("x",)).shards("", 0)
    pq.write_table(pa.table({"n": [1]}), path)
    with pytest.raises(OptionError, match="--image_column"):
        source_of(path).shards("", 0)


@pytest.mark.parametrize(
    ("table", "named", "reason"),
    [
        ({"other": [1, 2]}, {}, "missing_image"),
        ({"image": [JPEG, JPEG]}, {"caption": "alt"}, "bad_annotation"),
        ({"image": [JPEG, JPEG], "alt": [1, 2]}, {"caption": "alt"}, "bad_annotation"),
        ({"image": [JPEG, JPEG]}, {"key": "alt"}, "bad_annotation"),
        ({"image": [1, 2]}, {"image": "image"}, "missing_image"),
    ],
)
def test_a_column_that_a_later_file_lacks_costs_its_rows(tmp_path, table, named, reason):
    pq.write_table(pa.table({"image": [JPEG], "alt": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table(table), tmp_path / "b.parquet")
    pq.write_table(pa.table({"alt": ["c"], "image": [JPEG]}), tmp_path / "c.parquet")
    urls = tuple(f"{tmp_path}/{name}.parquet" for name in "abc")
    first, second, third = ParquetSource(urls, str(tmp_path), columns=ColumnNames(**named)).shards("", 0)
    assert [record.image for record in (*first.rows(), *third.rows())] == [JPEG, JPEG]
    records = list(second.rows())
    assert [(record.row, record.reason) for record in records] == [(0, reason), (1, reason)]
    assert records[1].message.startswith("b.parquet, row 1: b.parquet has ")
    assert list(second.rows(skip=1)) == records[1:]


def test_files_without_rows_need_no_columns(tmp_path):
    pq.write_table(pa.table({"image": pa.nulls(0)}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"")
    pq.write_table(pa.table({}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"n": [1]}), tmp_path / "d.parquet")
    urls = [f"{tmp_path}/{name}.parquet" for name in "abcd"]
    shards = ParquetSource(tuple(urls[:3]), str(tmp_path)).shards("", 0)
    assert [[record.reason for record in shard.rows()] for shard in shards] == [[], ["shard_truncated"], []]
    with pytest.raises(OptionError, match=r"d\.parquet has no column"):
        ParquetSource(tuple(urls), str(tmp_path)).shards("", 0)


def test_metadata_that_a_file_lacks_is_null(tmp_path):
    pq.write_table(pa.table({"image": [JPEG], "url": ["u"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [JPEG]}), tmp_path / "b.parquet")
    urls = (f"{tmp_path}/a.parquet", f"{tmp_path}/b.parquet")
    rows = [
        row for shard in ParquetSource(urls, str(tmp_path), ("url",)).shards("", 0) for row in shard.rows()
    ]
    assert [row.metadata for row in rows] == [{"url": "u"}, {"url": None}]


def test_memory_files_and_names(path):
    write(path, columns(300), row_group_size=100)
    fsspec.filesystem("memory").pipe("/parquet/train/a.parquet", path.read_bytes())
    source = ParquetSource(("memory://parquet/train/a.parquet",), "memory://parquet")
    assert source.inputs() == [InputFile("train/a.parquet", path.stat().st_size)]
    (shard,) = source.shards("", 0)
    assert (shard.name, shard.num_rows) == ("train__a", None)
    assert [row._replace(source="shard.parquet") for row in shard.rows()] == list(shard_of(path).rows())


def test_shards_travel_small(path):
    shard = write(path, columns(2))
    assert len(pickle.dumps(shard)) < 1000
    assert list(pickle.loads(pickle.dumps(shard)).rows()) == list(shard.rows())


def test_rows_across_row_groups_and_batches(path):
    shard = write(path, columns(200), row_group_size=90)
    rows = list(shard.rows())
    expected = columns(200)
    assert [row.key for row in rows] == expected["key"]
    assert [row.image for row in rows] == expected["image"]
    assert [row.captions for row in rows] == expected["captions"]
    assert [row.row for row in rows] == list(range(200))


def test_duplicate_keys_are_lost(path):
    _, second = write(path, {"key": ["a", "a"], "jpg": [JPEG, JPEG]}).rows()
    assert (second.reason, second.row) == ("duplicate_key", 1)


def test_an_empty_table_has_no_rows(path):
    assert list(write(path, {"jpg": pa.array([], pa.binary())}).rows()) == []


def test_a_shard_that_is_gone_stops_the_job(path):
    shard = write(path, columns(2))
    os.remove(path)
    with pytest.raises(InputError, match="is not there"):
        list(shard.rows())
    with pytest.raises(InputError, match="is not there"):
        source_of(path).shards("", 0)


def damaged_file(path):
    """Writes 3 row groups of 50 rows in pages of a few rows, and damages row 73."""
    options = {"row_group_size": 50, "data_page_size": 2000, "write_batch_size": 2}
    # Statistics would hold whole images, in front of the data.
    options |= {"use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    rows = list(write(path, columns(150), compression="none", **options).rows())
    data = bytearray(path.read_bytes())
    data[data.index(rows[73].image) + 100] ^= 1
    path.write_bytes(data)
    return rows


def test_a_corrupt_page_costs_the_rest_of_its_row_group(path):
    rows = damaged_file(path)
    records = list(shard_of(path).rows())
    (at,) = [index for index, record in enumerate(records) if isinstance(record, Reject)]
    lost = records[at]
    # A page has a few rows; those before it in the batch are given.
    assert 73 - 4 <= at <= 73
    assert records[:at] == rows[:at]
    assert records[at + 1 :] == rows[100:]
    assert (lost.row, lost.reason) == (at, "shard_corrupt")
    assert f"shard.parquet, row group 1, row {at - 50} of its 50" in lost.message
    assert f"{100 - at} rows are lost" in lost.message


def test_skipping_over_a_corrupt_page(path):
    damaged_file(path)
    shard = shard_of(path)
    records = list(shard.rows())
    for skip in range(0, len(records) + 2, 3):
        assert list(shard.rows(skip=skip)) == records[skip:]


def test_cut_anywhere(path):
    shard = write(path, columns(4))
    data = path.read_bytes()
    for length in (*range(0, 20), *range(20, len(data), 13), len(data) - 1):
        path.write_bytes(data[:length])
        (lost,) = shard.rows()
        assert lost.row == 0
        assert lost.reason == ("shard_truncated" if length >= 4 or not length else "shard_corrupt")


@pytest.mark.parametrize("data", [b"<!DOCTYPE html>" * 9, b"version https://git-lfs.github.com/spec/v1\n"])
def test_not_parquet(path, data):
    path.write_bytes(data)
    (lost,) = shard_of(path).rows()
    assert (lost.reason, lost.row) == ("shard_corrupt", 0)
    assert lost.message == f"shard.parquet: not Parquet: it begins with {data[:60]!r}"


def test_a_damaged_footer(path):
    write(path, columns(2))
    data = path.read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    path.write_bytes(data[: -8 - length] + bytes(length) + data[-8:])
    (lost,) = shard_of(path).rows()
    assert lost.reason == "shard_corrupt"
    assert f"its footer, before byte {len(data)}, is damaged" in lost.message


@settings(max_examples=200)
@given(st.data())
def test_any_damage_to_the_data_is_survived(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damage.parquet"
    shard = write(path, columns(30), row_group_size=10, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    at = data.draw(st.integers(4, end - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    records = list(shard.rows())
    skip = data.draw(st.integers(0, 31))
    assert list(shard.rows(skip=skip)) == records[skip:]
    assert {record.reason for record in records if isinstance(record, Reject)} <= {
        "shard_corrupt",
        "duplicate_key",
    }


def test_images_of_skipped_rows_are_told_from_missing_ones(path):
    shard = write(path, {"key": list("abcab"), "jpg": [JPEG, None, JPEG, JPEG, JPEG]})
    records = list(shard.rows())
    assert [record.reason if isinstance(record, Reject) else "" for record in records] == [
        "",
        "missing_image",
        "",
        "duplicate_key",
        "",
    ]
    for skip in range(6):
        assert list(shard.rows(skip=skip)) == records[skip:]


class TestWithoutImages:
    def test_their_column_is_not_read(self, path):
        table = columns(5)
        table["image"][2] = None
        write(path, table, compression="none", use_dictionary=False)
        whole = path.read_bytes()
        start = whole.index(JPEG)
        path.write_bytes(whole[:start] + bytes(2000) + whole[start + 2000 :])
        rows = list(shard_of(path, with_images=False).rows())
        assert [(row.key, row.image, row.row) for row in rows] == [(f"{i:04d}", b"", i) for i in range(5)]
        assert [list(row.captions) for row in rows] == table["captions"]

    def test_there_need_be_none(self, path):
        write(path, {"id": [7], "text": ["a"], "note": ["b"]}, check=False)
        (row,) = shard_of(path, with_images=False, metadata_columns=("note",)).rows()
        assert (row.key, row.captions, row.metadata) == ("7", ["a"], {"note": "b"})
        with pytest.raises(OptionError, match="has no column image"):
            shard_of(path)

    def test_rows_of_a_key_are_one(self, path):
        write(path, {"id": [1, 1, 2], "text": list("abc"), "image": [JPEG, JPEG, JPEG]}, check=False)
        rows = list(shard_of(path, with_images=False).rows())
        assert [(row.key, row.captions) for row in rows] == [("1", ["a", "b"]), ("2", ["c"])]

    def test_rows_without_keys_are_rows_of_their_own(self, path):
        write(path, {"text": list("aab"), "image": [JPEG, JPEG, JPEG]}, check=False)
        assert [row.captions for row in shard_of(path, with_images=False).rows()] == [["a"], ["a"], ["b"]]


def test_notes_are_those_of_the_first_file(path):
    write(path, {"image": [JPEG], "text": [1]})
    assert source_of(path).column_notes() == (
        f"{path}: column 'text' is of type int64, which holds no captions, so the rows have no captions. "
        "--caption_column names another.",
    )
    path.write_bytes(b"")
    assert source_of(path).column_notes() == ()
    assert ParquetSource((), str(path)).column_notes() == ()


def test_several_images_and_captions_that_are_not_utf8_are_counted(path):
    image = pa.array([[{"bytes": JPEG, "path": None}] * 3], pa.list_(IMAGE))
    text = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"]).buffers())
    (row,) = write(path, {"images": image, "text": text}).rows()
    assert (row.captions, row.counters) == (["café"], {"images_passed_over": 2, "captions_not_utf8": 1})


def test_names_with_dots_and_twice(path):
    names = ["image", "image.caption", "text", "text"]
    arrays = [pa.array([JPEG]), pa.array([5]), pa.array(["first"]), pa.array(["second"])]
    pq.write_table(pa.Table.from_arrays(arrays, names=names), path)
    (row,) = shard_of(path, key_column="image.caption").rows()
    assert (row.key, row.image, row.captions) == ("5", JPEG, ["first"])


class TestStrict:
    @pytest.mark.parametrize("damage", ["page", "footer"])
    def test_damage_is_an_error_with_the_remedy(self, path, damage):
        write(path, columns(5), compression="none", write_page_checksum=True)
        whole = bytearray(path.read_bytes())
        whole[whole.index(JPEG) + 5 if damage == "page" else -5] ^= 1
        path.write_bytes(whole)
        assert isinstance(list(shard_of(path).rows())[-1], Reject)
        with pytest.raises(
            InputError, match=r"shard\.parquet is damaged: .* Run `diptych verify` on its output"
        ):
            list(shard_of(path, strict=True).rows())

    def test_what_is_whole_is_read_as_ever(self, path):
        write(path, columns(5))
        assert list(shard_of(path, strict=True).rows()) == list(shard_of(path).rows())


@pytest.mark.parametrize("column", ["image", "caption", "url"])
@pytest.mark.parametrize("compression", ["zstd", "gzip"])
def test_a_giant_value_of_few_bytes_costs_its_row_group(path, column, compression):
    """100 MB that are packed into some KB: what is refused is known from the headers of the pages."""
    rows = {"image": [JPEG + b"1", JPEG + b"2", JPEG + b"3"]}
    rows |= {name: ["a", "b", "c"] for name in ("caption", "url")}
    rows[column][1] = (b"\0" if column == "image" else "x") * (100 << 20)
    pq.write_table(pa.table(rows), path, row_group_size=1, compression=compression, use_dictionary=False)
    assert os.path.getsize(path) < 8 << 20
    first, lost, last = shard_of(path, metadata_columns=("url",)).rows()
    assert (first.captions, lost.reason, last.captions) == (["a"], "shard_corrupt", ["c"])
    assert "packed as no images or texts are has 1048576" in lost.message
