import gzip
import io
import json
import os
import pickle
import tarfile
import tracemalloc

import fsspec
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from transforms.errors import InputError
from transforms.sources import tar
from transforms.sources.base import InputFile, Lost, Row
from transforms.sources.webdataset import WebdatasetSource

JPEG = b"\xff\xd8\xff\xe0 not really a picture \xff\xd9"


def shard_of(path, metadata_columns=()):
    source = WebdatasetSource((str(path),), os.path.dirname(path), metadata_columns)
    (shard,) = source.shards("", 0)
    return shard


def write(path, samples, **options):
    with webdataset.TarWriter(str(path), encoder=False, **options) as writer:
        for sample in samples:
            writer.write(sample)
    return shard_of(path)


def write_members(path, members, format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return shard_of(path)


def samples(count):
    return [
        {"__key__": f"{i:04d}", "jpg": JPEG + os.urandom(200 * i), "txt": f"caption {i}".encode()}
        for i in range(count)
    ]


def one(path, *members):
    (record,) = write_members(path, [(f"k.{name}", data) for name, data in members]).rows()
    return record


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "shard.tar")


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz", "s.tgz"])
def test_reads_what_webdataset_writes(tmp_path, name):
    written = samples(20)
    shard = write(tmp_path / name, written, compress=not name.endswith(".tar"))
    rows = list(shard.rows())
    assert all(isinstance(row, Row) for row in rows)
    assert [(row.key, row.image) for row in rows] == [(s["__key__"], s["jpg"]) for s in written]
    assert rows[3] == Row("0003", written[3]["jpg"], "0003.jpg", ["caption 3"], name, 3, {})


def test_reads_webdatasets_shard_writer_with_folders_in_keys(tmp_path):
    with webdataset.ShardWriter(f"{tmp_path}/part-%02d.tar", maxcount=3, encoder=False, verbose=0) as writer:
        for sample in samples(7):
            writer.write({**sample, "__key__": f"train/{sample['__key__']}"})
    urls = tuple(sorted(f"{tmp_path}/{name}" for name in os.listdir(tmp_path)))
    shards = WebdatasetSource(urls, str(tmp_path)).shards("", 0)
    assert [shard.name for shard in shards] == ["part-00", "part-01", "part-02"]
    rows = [row for shard in shards for row in shard.rows()]
    assert [row.key for row in rows] == [f"train/{i:04d}" for i in range(7)]
    assert [row.row for row in rows] == [0, 1, 2, 0, 1, 2, 0]
    assert rows[0].path == "0000.jpg"


def test_gzip_is_told_by_its_bytes_not_its_name(tmp_path):
    write(tmp_path / "a.tar.gz", samples(3), compress=True)
    os.rename(tmp_path / "a.tar.gz", tmp_path / "b.tar")
    write(tmp_path / "c.tar", samples(3))
    os.rename(tmp_path / "c.tar", tmp_path / "d.tar.gz")
    for name in ("b.tar", "d.tar.gz"):
        assert [row.key for row in shard_of(tmp_path / name).rows()] == ["0000", "0001", "0002"]


def test_source_names_inputs_and_shards_below_the_root(tmp_path):
    os.makedirs(tmp_path / "train")
    write(tmp_path / "train" / "0.tar", samples(1))
    source = WebdatasetSource((f"{tmp_path}/train/0.tar",), str(tmp_path))
    (file,) = source.inputs()
    assert file == InputFile("train/0.tar", os.path.getsize(tmp_path / "train" / "0.tar"))
    (shard,) = source.shards("", 0)
    assert (shard.name, shard.size_bytes, shard.num_rows) == ("train__0", file.size_bytes, None)
    assert next(iter(shard.rows())).source == "train/0.tar"


def test_memory_files(tmp_path):
    write(tmp_path / "a.tar", samples(5))
    fsspec.filesystem("memory").pipe("/wds/a.tar", (tmp_path / "a.tar").read_bytes())
    (shard,) = WebdatasetSource(("memory://wds/a.tar",), "memory://wds").shards("", 0)
    assert list(shard.rows()) == list(shard_of(tmp_path / "a.tar").rows())


def test_shards_travel_small(path):
    shard = write(path, samples(2))
    assert len(pickle.dumps(shard)) < 1000
    assert list(pickle.loads(pickle.dumps(shard)).rows()) == list(shard.rows())


def test_json_captions(path):
    fields = {"captions": ["a", "b\nb", " "], "caption": "c"}
    assert one(path, ("jpg", JPEG), ("json", json.dumps(fields).encode()), ("txt", b"d")).captions == [
        "a",
        "b\nb",
    ]
    # img2dataset's own: the caption with its line ends is in the .json.
    assert one(path, ("jpg", JPEG), ("json", b'{"caption": "a\\nb"}'), ("txt", b"a\nb")).captions == ["a\nb"]
    assert one(path, ("jpg", JPEG), ("json", b'\xef\xbb\xbf{"caption": ["a", 1, "b"]}')).captions == [
        "a",
        "b",
    ]
    assert one(path, ("jpg", JPEG), ("json", b'{"caption": "caf\xe9"}')).captions == ["caf\ufffd"]
    assert one(path, ("jpg", JPEG), ("json", b'{"caption": "\\ud83d"}')).captions == ["?"]


@pytest.mark.parametrize(
    "data", [b"{", b"[1]", b'"caption"', b"", b'{"caption": null}', b"[" * 100_000, b"9" * 9999]
)
def test_json_that_holds_no_caption_falls_back_to_text(path, data):
    assert one(path, ("jpg", JPEG), ("json", data), ("txt", b"text")).captions == ["text"]


def test_text_captions(path):
    assert one(path, ("jpg", JPEG)).captions == []
    assert one(path, ("jpg", JPEG), ("txt", b" \n\r\n")).captions == []
    text = "\ufeffone\r\ntwo\x0c still two\u2028 and still\n\n three\r".encode() + b"f\xe9"
    expected = ["one", "two\x0c still two\u2028 and still", " three", "f\ufffd"]
    assert one(path, ("txt", text), ("jpg", JPEG)).captions == expected
    assert one(path, ("caption", b"c"), ("txt", b"t"), ("jpg", JPEG)).captions == ["t", "c"]


def test_metadata(path):
    fields = {"url": "http://é", "width": 3, "tags": ["é"], "none": None}
    write_members(path, [("k.jpg", JPEG), ("k.json", json.dumps(fields).encode()), ("l.jpg", JPEG)])
    columns = ("url", "width", "tags", "none", "absent")
    first, second = shard_of(path, columns).rows()
    assert first.metadata == {"url": "http://é", "width": "3", "tags": '["é"]', "none": None, "absent": None}
    assert second.metadata == dict.fromkeys(columns)


@pytest.mark.parametrize("extension", ["jpg", "JPEG", "png", "webp", "gif", "bmp", "tif", "TIFF"])
def test_image_extensions(path, extension):
    row = one(path, (extension, JPEG))
    assert (row.image, row.path) == (JPEG, f"k.{extension.lower()}")


def test_sample_without_an_image_is_lost(path):
    fields = {"status": "failed_to_download", "error_message": "HTTP Error 404"}
    members = [("a.json", json.dumps(fields).encode()), ("a.txt", b"x"), ("b.jpg", JPEG), ("c.seg.png", JPEG)]
    first, second, third = write_members(path, members).rows()
    assert (first.key, first.row, first.reason) == ("a", 0, "missing_image")
    assert "json, txt" in first.message
    assert "HTTP Error 404" in first.message
    assert (second.key, second.row) == ("b", 1)
    assert (third.reason, third.key) == ("missing_image", "c")


def test_members_that_belong_to_no_sample_are_ignored(path):
    members = [
        ("__MACOSX/._a.jpg", b"x"),
        ("._a.jpg", b"x"),
        (".hidden", b"x"),
        ("./a.jpg", JPEG),
        ("README", b"x"),
        ("a.txt", b"t"),
        ("trailing.", b"x"),
    ]
    (row,) = write_members(path, members).rows()
    assert (row.key, row.captions) == ("a", ["t"])


def test_a_sample_that_comes_again_is_lost(path):
    members = [("a.jpg", JPEG), ("a.txt", b"1"), ("a.jpg", b"again"), ("a.txt", b"2"), ("b.jpg", JPEG)]
    first, second, third, fourth = write_members(path, [*members, ("a.jpg", b"late")]).rows()
    assert (first.captions, third.key) == (["1"], "b")
    assert (second.reason, second.row, second.data) == ("duplicate_key", 1, b"again")
    assert (fourth.reason, fourth.row, fourth.data) == ("duplicate_key", 3, b"late")


def test_an_empty_archive_has_no_rows(path):
    assert list(write_members(path, []).rows()) == []


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "data", [b"<html>" * 200, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"]
)
def test_not_a_tar(tmp_path, data, packed):
    path = tmp_path / "a.tar"
    path.write_bytes(gzip.compress(data) if packed else data)
    (lost,) = shard_of(path).rows()
    assert isinstance(lost, Lost)
    assert (lost.reason, lost.row, lost.key) == ("shard_corrupt", 0, "")
    assert lost.message.startswith("a.tar, byte 0")
    assert repr(data[:20])[1:-1] in lost.message


def test_an_empty_file_is_a_truncated_tar(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    (lost,) = shard_of(tmp_path / "a.tar").rows()
    assert lost.reason == "shard_truncated"


def test_a_shard_that_is_gone_stops_the_job(path):
    shard = write(path, samples(2))
    os.remove(path)
    with pytest.raises(InputError, match="is not there"):
        list(shard.rows())


def test_cut_anywhere(path):
    """At each length: the rows before the cut, and one loss, unless the cut is between members."""
    rows = list(write(path, samples(3)).rows())
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    starts = [member.offset for member in members]
    end = members[-1].offset_data + 512
    shard = shard_of(path)
    for length in range(os.path.getsize(path), 0, -1):
        os.truncate(path, length)
        records = list(shard.rows())
        if length in starts:
            # Nothing tells whether the last sample had more members.
            assert [(r.key, r.row) for r in records] == [(r.key, r.row) for r in rows[: len(records)]]
            assert not any(isinstance(record, Lost) for record in records)
        elif length >= end:
            assert records == rows
        else:
            *before, lost = records
            num_begun = sum(member.offset_data <= length for member in members[::2])
            assert before == rows[: max(0, num_begun - 1)]
            assert (lost.row, lost.key) == (len(before), f"{len(before):04d}" if num_begun else "")
            # Of a piece of the first name nobody can tell what it was.
            assert lost.reason == "shard_truncated" or (lost.reason == "shard_corrupt" and length < 100)


def test_gzip_cut_anywhere(tmp_path):
    path = tmp_path / "a.tar.gz"
    rows = list(write(path, samples(3), compress=True).rows())
    shard, data = shard_of(path), path.read_bytes()
    fewest = 0
    for length in range(4, len(data)):
        path.write_bytes(data[:length])
        *before, lost = shard.rows()
        assert before == rows[: len(before)]
        assert len(before) >= fewest
        fewest = len(before)
        assert (lost.reason, lost.row) == ("shard_truncated", len(before))
    assert fewest == len(rows) - 1


@pytest.mark.parametrize("packed", [True, False])
def test_damage_in_the_middle(tmp_path, packed):
    path = tmp_path / "a.tar"
    rows = list(write(path, samples(40)).rows())
    data = bytearray(gzip.compress(path.read_bytes(), mtime=0) if packed else path.read_bytes())
    if packed:
        data[len(data) // 2 : len(data) // 2 + 500] = bytes(500)
    else:
        start = data.index(b"0020.jpg")
        data[start + 10] = 1
    path.write_bytes(data)
    *before, lost = shard_of(path).rows()
    # gzip has one checksum, at its end: it may give damaged bytes before it says so.
    num_whole = 27 if packed else len(before)
    assert before[:num_whole] == rows[:num_whole]
    assert (lost.reason, lost.row) == ("shard_corrupt", len(before))
    assert "a.tar, byte " in lost.message
    assert ("of the unpacked tar" in lost.message) == packed
    if not packed:
        # The sample before the damage may have gone on behind it.
        assert (lost.row, lost.key, lost.data) == (19, "0019", rows[19].image)
        assert f"byte {start}:" in lost.message


@given(st.data())
def test_skipping_rows_changes_nothing_else(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "skip.tar"
    member = st.tuples(st.sampled_from("abcde"), st.sampled_from(["jpg", "txt", "json"]))
    members = data.draw(st.lists(member, max_size=12))
    shard = write_members(path, [(f"{key}.{extension}", JPEG) for key, extension in members])
    os.truncate(path, data.draw(st.integers(1, os.path.getsize(path))))
    records = list(shard.rows())
    for skip in range(len(records) + 2):
        assert list(shard.rows(skip=skip)) == records[skip:]


def test_skipped_images_are_not_read(tmp_path, monkeypatch):
    shard = write(tmp_path / "a.tar", samples(10))
    read, read_up_to = [], tar.read_up_to
    monkeypatch.setattr(tar, "read_up_to", lambda file, size: read.append(size) or read_up_to(file, size))
    assert len(list(shard.rows(skip=8))) == 2
    assert sum(size > 200 for size in read) == 2


def test_an_oversize_member_costs_one_row(path, monkeypatch):
    monkeypatch.setattr("transforms.sources.webdataset.MAX_RECORD_BYTES", 1000)
    members = [("a.jpg", JPEG), ("b.jpg", bytes(1001)), ("b.txt", b"x"), ("c.jpg", JPEG)]
    shard = write_members(path, members)
    first, second, third = shard.rows()
    assert (first.key, third.key) == ("a", "c")
    assert (second.key, second.row, second.reason) == ("b", 1, "record_corrupt")
    assert "1001 bytes" in second.message
    assert list(shard.rows(skip=1)) == [second, third]


names = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0./"), min_size=1, max_size=150
).filter(lambda name: name != "__MACOSX")


@given(
    st.lists(st.tuples(names, names), min_size=1, max_size=5, unique=True),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_keys_are_webdatasets_own(tmp_path_factory, keys, format):
    path = tmp_path_factory.getbasetemp() / "keys.tar"
    shard = write_members(path, [(f"{folder}/{stem}.jpg", JPEG) for folder, stem in keys], format)
    rows = list(shard.rows())
    expected = [webdataset.tariterators.base_plus_ext(f"{folder}/{stem}.jpg")[0] for folder, stem in keys]
    assert [row.key for row in rows] == expected
    assert [row.path for row in rows] == [f"{stem}.jpg" for _, stem in keys]


def test_memory_is_bounded(tmp_path):
    shard = write(tmp_path / "a.tar", [{"__key__": f"{i}", "jpg": bytes(1 << 20)} for i in range(20)])
    tracemalloc.start()
    assert sum(len(row.image) for row in shard.rows()) == 20 << 20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 << 20
