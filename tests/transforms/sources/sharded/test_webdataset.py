import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import random
import tarfile
import tracemalloc

import fsspec
import pyarrow as pa
import pytest
import webdataset
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from diptych.transforms.chunk import Reject
from diptych.transforms.errors import InputError, OptionError
from diptych.transforms.sources.archives import tar, tar_index
from diptych.transforms.sources.archives.shard_file import open_shard, unpacked
from diptych.transforms.sources.archives.tar import TarReader
from diptych.transforms.sources.archives.tar_index import TarIndex
from diptych.transforms.sources.base import ColumnNames, InputFile, Row
from diptych.transforms.sources.open import SourceOptions, open_source
from diptych.transforms.sources.sample import split_name
from diptych.transforms.sources.sharded.webdataset import WebdatasetSource

JPEG = b"\xff\xd8\xff\xe0 not really a picture \xff\xd9"


def shard_of(path, metadata_columns=(), **columns):
    names = ColumnNames(**columns)
    source = WebdatasetSource((str(path),), os.path.dirname(path), metadata_columns, columns=names)
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
            if isinstance(data, str):
                info.type, info.linkname, data = LINKS[data[0]], data[1:], b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return shard_of(path)


LINKS = {"=": tarfile.LNKTYPE, "~": tarfile.SYMTYPE}


def pack(path, is_packed):
    """Compresses a tar where asked; its name stays."""
    if is_packed:
        with open(path, "rb+") as file:
            data = file.read()
            file.seek(0)
            file.truncate()
            file.write(gzip.compress(data, 1))


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


PACKERS = {
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: b"".join(
        zstandard.compress(data[at : at + 9999]) for at in range(0, len(data), 9999)
    ),
    "lz4": lambda data: pa.Codec("lz4").compress(data, asbytes=True),
}


@pytest.mark.parametrize("extension", PACKERS)
def test_compressed_shards(tmp_path, extension):
    rows = list(write(tmp_path / "a.tar", samples(40)).rows())
    packed = PACKERS[extension]((tmp_path / "a.tar").read_bytes())
    path = tmp_path / f"b.tar.{extension}"
    path.write_bytes(packed)
    source = open_source([str(tmp_path / f"*.{extension}")], "auto", SourceOptions())
    (shard,) = source.shards("", 0)
    assert shard.name == "b"
    assert list(shard.rows()) == [row._replace(source=path.name) for row in rows]
    path.write_bytes(packed[: len(packed) // 2])
    *before, lost = shard.rows()
    assert [row.image for row in before] == [row.image for row in rows[: len(before)]]
    assert lost.reason == "shard_truncated"
    assert len(before) > 15 or extension == "bz2"  # its blocks are of 900 kB


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
    assert one(path, ("jpg", JPEG), ("json", b'{"caption": "caf\xe9"}')).captions == ["café"]
    assert one(path, ("jpg", JPEG), ("json", b'{"caption": "a", "n": %s}' % (b"9" * 5000))).captions == ["a"]
    assert one(path, ("jpg", JPEG), ("json", b'{"caption": "\\ud83d"}')).captions == ["?"]


@pytest.mark.parametrize("data", [b"{", b"", b"[" * 100_000, b'{"a":' + b"[" * 20_000])
def test_damaged_json_is_counted_or_lost(path, data):
    row = one(path, ("jpg", JPEG), ("json", data), ("txt", b"text"))
    assert (row.captions, row.counters) == (["text"], {"broken_json": 1})
    lost = one(path, ("jpg", JPEG), ("json", data))
    assert (lost.reason, lost.counters) == ("bad_annotation", {"broken_json": 1})


@pytest.mark.parametrize("data", [b"9" * 9999, b"[1]", b'"caption"', b"null"])
def test_json_that_has_no_fields_is_counted(path, data):
    row = one(path, ("jpg", JPEG), ("json", data), ("txt", b"text"))
    assert (row.captions, row.counters) == (["text"], {"json_without_fields": 1})
    assert one(path, ("jpg", JPEG), ("json", b'{"caption": null}'), ("txt", b"text")).captions == ["text"]


def test_text_captions(path):
    assert one(path, ("jpg", JPEG)).captions == []
    assert one(path, ("jpg", JPEG), ("txt", b" \n\r\n")).captions == []
    text = "\ufeffone\r\ntwo\x0c still two\u2028 and still\n\n three\r".encode() + b"f\xe9"
    expected = ["one", "two\x0c still two\u2028 and still", " three", "f\ufffd"]
    assert one(path, ("txt", text), ("jpg", JPEG)).captions == expected
    assert one(path, ("caption", b"c"), ("txt", b"t"), ("jpg", JPEG)).captions == ["t", "c"]
    assert one(path, ("txt", "fête".encode("utf-16")), ("jpg", JPEG)).captions == ["fête"]
    assert one(path, ("txt", "Собака".encode("cp1251")), ("jpg", JPEG)).captions == ["Собака"]


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
    assert "--image_column seg.png" in third.message


def test_members_that_belong_to_no_sample_are_counted(path):
    members = [
        ("__MACOSX/._a.jpg", b"x"),
        ("._a.jpg", b"x"),
        (".hidden", b"x"),
        ("./a.jpg", JPEG),
        ("README", b"x"),
        ("a.txt", b"t"),
        ("__index__", b"x"),
        ("trailing.", b"x"),
    ]
    (row,) = write_members(path, members).rows()
    assert (row.key, row.captions, row.counters) == ("a", ["t"], {"members_passed_over": 6})


def test_a_tar_without_samples_is_lost(path):
    (lost,) = write_members(path, [("README", b"x"), ("LICENSE", b"x")]).rows()
    assert (lost.reason, lost.key, lost.counters) == ("missing_image", "", {"members_passed_over": 2})
    assert "none of its 2 members" in lost.message
    assert "'README'" in lost.message


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
    assert isinstance(lost, Reject)
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
            assert not any(isinstance(record, Reject) for record in records)
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
    monkeypatch.setattr("diptych.transforms.sources.sample.MAX_IMAGE_BYTES", 1000)
    monkeypatch.setattr("diptych.transforms.sources.sample.MAX_TEXT_BYTES", 100)
    members = [
        ("a.jpg", JPEG),
        ("b.jpg", bytes(1001)),
        ("b.txt", b"x"),
        ("c.jpg", JPEG),
        ("c.txt", bytes(101)),
    ]
    shard = write_members(path, [*members, ("d.jpg", JPEG)])
    first, second, third, fourth = shard.rows()
    assert (first.key, fourth.key) == ("a", "d")
    assert (second.key, second.row, second.reason) == ("b", 1, "record_corrupt")
    assert "its jpg has 1001 bytes" in second.message
    assert (third.reason, third.message) == ("record_corrupt", "its txt has 101 bytes; at most 100 are read")
    assert list(shard.rows(skip=1)) == [second, third, fourth]


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


@pytest.mark.parametrize("is_packed", [False, True])
def test_links_are_followed_inside_the_tar(path, is_packed):
    members = [
        ("a.jpg", JPEG),
        ("a.txt", b"one"),
        ("b.jpg", "=a.jpg"),
        ("b.txt", "~./a.txt"),
        ("d/c.jpg", "~../a.jpg"),
        ("d/d.jpg", "=d/c.jpg"),
        ("e.jpg", "~later/z.jpg"),
        ("f.jpg", "~folder/z.jpg"),
        ("folder", "~later"),
        ("later/z.jpg", JPEG + b"later"),
    ]
    shard = write_members(path, members)
    pack(path, is_packed)
    rows = list(shard.rows())
    assert [(row.key, row.image) for row in rows] == [
        *((key, JPEG) for key in ("a", "b", "d/c", "d/d")),
        *((key, JPEG + b"later") for key in ("e", "f", "later/z")),
    ]
    assert [row.captions for row in rows[:2]] == [["one"], ["one"]]
    assert [row.counters for row in rows if row.counters] == [{"members_passed_over": 1}]
    for skip in range(len(rows)):
        assert list(shard.rows(skip)) == rows[skip:]


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("kind", ["jpg", "txt"])
def test_a_hard_link_is_to_the_last_member_before_it_and_a_symbolic_one_to_the_last(path, is_packed, kind):
    """As tarfile and GNU tar unpack an archive to which a name was added again."""
    links = ["=a.bin", "~a.bin"]
    members = [("a.bin", JPEG + b"1"), (f"b1.{kind}", links[0]), (f"b2.{kind}", links[1])]
    members += [("a.bin", JPEG + b"2"), (f"b3.{kind}", links[0]), (f"b4.{kind}", links[1])]
    members += [("a.bin", JPEG + b"3"), (f"b5.{kind}", links[0])]
    write_members(path, members)
    with tarfile.open(path) as archive:
        expected = [
            archive.extractfile(member).read() for member in archive if member.islnk() or member.issym()
        ]
    pack(path, is_packed)
    reading = TarIndex(path, split_name, lambda _: 1 << 20)
    with open_shard(path) as file:
        tar = TarReader(unpacked(file))
        found = [reading.follow(tar.link, 1 << 20) for _ in iter(tar.next, None) if tar.link]
    assert found == expected
    assert [data[-1:] for data in found] == [b"1", b"3", b"2", b"3", b"3"]


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(
    "target",
    ["=gone.jpg", "~../../blobs/x", "~/etc/passwd", "~b.jpg", "~c.jpg", "~" + "x/" * 3000, "~", "~."],
)
def test_a_link_that_leads_nowhere_is_a_missing_image(path, target, is_packed):
    shard = write_members(path, [("a.jpg", JPEG), ("b.jpg", target), ("c.jpg", "~b.jpg"), ("d.jpg", JPEG)])
    pack(path, is_packed)
    records = list(shard.rows())
    assert [getattr(record, "reason", record.key) for record in records] == [
        "a",
        "missing_image",
        "missing_image",
        "d",
    ]
    assert "its jpg is a link to " in records[1].message


def test_a_text_that_is_a_link_to_nowhere_costs_its_sample(path):
    first, second = write_members(path, [("a.jpg", JPEG), ("a.txt", "=gone"), ("b.jpg", JPEG)]).rows()
    assert (first.reason, first.message) == (
        "missing_image",
        "its txt is a link to gone, which is not in the tar",
    )
    assert second.key == "b"


def test_links_far_back_in_a_compressed_tar_are_named(path, monkeypatch):
    monkeypatch.setattr(tar_index, "_MAX_INDEX_BYTES", 100)
    shard = write_members(path, [("a.jpg", bytes(200)), ("b.jpg", "=a.jpg")])
    assert [row.image for row in shard.rows()] == [bytes(200)] * 2
    pack(path, True)
    _, lost = shard.rows()
    assert (lost.reason, lost.key) == ("record_corrupt", "b")
    assert "unpack the tar" in lost.message


def test_a_file_given_to_tar_twice_is_a_link_to_itself(path):
    first, second = write_members(path, [("a.jpg", JPEG), ("a.jpg", "=a.jpg")]).rows()
    assert (first.image, second.reason) == (JPEG, "duplicate_key")


def test_links_on_a_store_cost_a_request_each(path):
    write_members(path, [("a.jpg", JPEG), *((f"{i}.jpg", "=a.jpg") for i in range(5))])
    fsspec.filesystem("memory").put(path, "/links/a.tar")
    (shard,) = WebdatasetSource(("memory://links/a.tar",), "memory://links").shards("", 0)
    assert [row.image for row in shard.rows()] == [JPEG] * 6


def texts_of(kind, keys):
    captions = {key: f"caption {key}".encode() for key in keys}
    if kind == "json":
        return [(f"{key}.json", json.dumps({"caption": captions[key].decode()}).encode()) for key in keys]
    return [(f"{key}.txt", captions[key]) for key in keys]


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("order", ["images first", "texts first", "sorted by extension"])
def test_samples_that_lie_in_several_places_are_joined(path, order, is_packed):
    keys = [f"{i:02d}" for i in range(20)]
    images = [(f"{key}.jpg", JPEG + key.encode()) for key in keys]
    members = {
        "images first": images + texts_of("txt", keys[::-1]),
        "texts first": texts_of("json", keys) + images,
        "sorted by extension": [(f"{key}.cls", b"7") for key in keys] + images + texts_of("txt", keys),
    }[order]
    shard = write_members(path, members)
    pack(path, is_packed)
    rows = list(shard.rows())
    assert [(row.key, row.image) for row in rows] == [(key, JPEG + key.encode()) for key in keys]
    assert [row.captions for row in rows] == [[f"caption {key}"] for key in keys]
    assert [row.row for row in rows] == list(range(20))
    assert rows[3].counters == {"samples_joined": 1}
    for skip in (1, 7, 19, 20):
        assert list(shard.rows(skip)) == rows[skip:]


def test_what_cannot_be_joined_is_named(path, monkeypatch):
    monkeypatch.setattr(tar_index, "_MAX_INDEX_BYTES", 100)
    keys = ["a", "b", "c"]
    shard = write_members(path, [(f"{key}.jpg", JPEG) for key in keys] + texts_of("txt", keys))
    records = list(shard.rows())
    assert [record.key for record in records] == keys + keys
    assert [record.reason for record in records[3:]] == ["duplicate_key"] * 3
    assert "txt of this sample do not follow its other members" in records[3].message


def test_a_member_that_comes_after_its_whole_sample_is_named(path):
    members = [
        ("a.jpg", JPEG),
        ("a.txt", b"x"),
        ("b.jpg", JPEG),
        ("b.txt", b"x"),
        ("a.json", b"{}"),
        ("c.jpg", JPEG),
    ]
    records = list(write_members(path, members).rows())
    assert [record.key for record in records] == ["a", "b", "a", "c"]
    assert records[2].reason == "duplicate_key"


def test_a_scattered_sample_without_image_is_lost_once(path):
    members = [("a.txt", b"x"), ("b.jpg", JPEG), ("a.json", b"{}"), ("b.txt", b"y")]
    first, second = write_members(path, members).rows()
    assert (first.key, first.reason) == ("a", "missing_image")
    assert "json, txt" in first.message
    assert (second.key, second.captions) == ("b", ["y"])


def test_every_member_is_in_a_record_or_a_counter(tmp_path):
    """Members of any kind in any order: each image and text is a row's, a reject's, or counted."""
    rng = random.Random(4)
    extensions = ["jpg", "txt", "json", "png", "cls", "left.jpg", "en.txt"]
    for _ in range(80):
        members = {f"{rng.choice('abc')}.{rng.choice(extensions)}" for _ in range(rng.randrange(1, 9))}
        members = rng.sample(sorted(members), len(members))
        shard = write_members(tmp_path / "a.tar", [(name, b'{"caption": "x"}') for name in members])
        records = list(shard.rows())
        given = sum(isinstance(record, Row) for record in records)
        lost = sum(record.reason == "duplicate_key" for record in records if isinstance(record, Reject))
        passed_over = sum(record.counters.get("images_passed_over", 0) for record in records)
        messages = " ".join(record.message for record in records if isinstance(record, Reject))
        num_images = sum(name.endswith(("jpg", "png")) for name in members)
        num_named = given + lost + passed_over + messages.count("jpg") + messages.count("png")
        assert num_images <= num_named, (members, records)
        assert {record.key for record in records} == {name[0] for name in members}
        for skip in range(len(records)):
            assert list(shard.rows(skip)) == records[skip:]


def test_several_images_of_a_sample(path):
    row = one(path, ("jpg", JPEG), ("png", b"other"), ("seg.png", b"mask"), ("txt", b"t"))
    assert (row.image, row.path, row.counters) == (JPEG, "k.jpg", {"images_passed_over": 2})
    write_members(path, [("k.left.JPG", b"l"), ("k.right.jpg", b"r"), ("l.jpg", JPEG)])
    first, second, third = shard_of(path).rows()
    assert [(lost.reason, lost.key, lost.row) for lost in (first, second)] == [
        ("missing_image", "k", 0),
        ("missing_image", "k", 1),
    ]
    assert ("left.jpg may be" in first.message, "right.jpg may be" in second.message) == (True, True)
    assert (third.key, third.row) == ("l", 2)
    left, lost = shard_of(path, image="left.jpg").rows()
    assert (left.image, left.path, left.counters) == (b"l", "k.left.jpg", {"images_passed_over": 1})
    assert (lost.key, lost.reason) == ("l", "missing_image")


@pytest.mark.parametrize(
    "name", ["a.b.jpg", "a.jpg", "d.e/a.jpg", "A.JPG", "x/y.z/a.b.c.jpeg", "a..jpg", "ä.ö.jpg"]
)
def test_names_with_dots_are_cut_as_webdataset_cuts_them(path, name):
    (record,) = write_members(path, [(name, JPEG)]).rows()
    key, extension = webdataset.tariterators.base_plus_ext(name)
    assert record.key == key
    assert isinstance(record, Row) == ("." not in extension)


def test_dotted_names_that_clash_are_each_lost(path):
    records = list(write_members(path, [("p.1.jpg", JPEG), ("p.1.txt", b"x"), ("p.2.jpg", JPEG)]).rows())
    assert [(record.key, record.reason) for record in records] == [("p", "missing_image")] * 2
    first, second = write_members(path, [("p.jpg", JPEG), ("p.jpeg", JPEG), ("p.JPG", JPEG)]).rows()
    assert (first.counters, second.reason) == ({"images_passed_over": 1}, "duplicate_key")


def test_texts_that_are_not_utf8_are_counted(path):
    assert one(path, ("jpg", JPEG), ("txt", b"caf\xe9")).counters == {"captions_not_utf8": 1}
    assert one(path, ("jpg", JPEG), ("txt", "caf\u00e9".encode())).counters == {}
    assert one(path, ("jpg", JPEG), ("json", b'{"caption": "caf\xe9"}')).counters == {"captions_not_utf8": 1}


def test_captions_that_are_left_out_are_counted(path):
    fields = json.dumps({"captions": ["a", 1, None, ["b"]]}).encode()
    row = one(path, ("jpg", JPEG), ("json", fields), ("txt", b"another"), ("en.txt", b"x"))
    assert (row.captions, row.counters) == (["a"], {"captions_not_text": 2, "texts_passed_over": 2})


def test_chosen_fields(path):
    fields = json.dumps({"uid": 7, "long": ["one", "two"], "caption": "short"}).encode()
    write_members(
        path, [("a.jpg", JPEG), ("a.json", fields), ("a.en.txt", b"en"), ("b.jpg", JPEG), ("b.json", b"{}")]
    )
    first, second = shard_of(path, caption="long").rows()
    assert (first.key, first.captions) == ("a", ["one", "two"])
    assert (second.captions, second.counters) == ([], {"rows_without_caption_column": 1})
    assert next(iter(shard_of(path, caption="en.txt").rows())).captions == ["en"]
    first, second = shard_of(path, key="uid").rows()
    assert (first.key, first.path) == ("7", "a.jpg")
    assert (second.key, second.reason) == ("b", "bad_annotation")
    options = SourceOptions(columns=ColumnNames(caption="long", key="uid"), metadata_columns=("caption",))
    (shard,) = open_source([path], "auto", options).shards("", 0)
    row = next(iter(shard.rows()))
    assert (row.key, row.captions, row.metadata) == ("7", ["one", "two"], {"caption": "short"})


@pytest.mark.parametrize("column", ["image", "caption", "key"])
def test_a_column_that_no_sample_has_is_refused(path, column):
    write_members(path, [("a.jpg", JPEG), ("a.json", b'{"uid": 7}')])
    with pytest.raises(OptionError, match=f"--{column}_column zzz: the first 1 samples of .* have no such"):
        shard_of(path, **{column: "zzz"})


@pytest.mark.parametrize("kind", ["jpg", "txt"])
def test_a_sparse_member_costs_its_sample(path, kind):
    info = tarfile.TarInfo(f"a.{kind}")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": f"a.{kind}"}
    info.size = 512
    with tarfile.open(path, "w") as archive:
        archive.addfile(info, io.BytesIO(bytes(512)))
    write_members(path + "2", [("a.png", JPEG), ("b.jpg", JPEG)])
    with open(path, "rb+") as file, open(path + "2", "rb") as other:
        file.seek(os.path.getsize(path))
        file.write(other.read())
    first, second = shard_of(path).rows()
    assert (first.key, first.reason) == ("a", "record_corrupt")
    assert f"its {kind} is stored as a sparse file" in first.message
    assert second.key == "b"


def test_fields_that_may_be_captions_are_noted(tmp_path, path):
    source = WebdatasetSource((str(path),), str(tmp_path))
    write_members(path, [("a.jpg", JPEG), ("a.json", b'{"prompt": "a red dog", "uid": "7", "width": 3}')])
    assert source.column_notes() == (
        f"{path}: no field has a usual name of captions, so the rows have none. If they are in one of 'prompt', "
        "name it with --caption_column.",
    )
    write_members(path, [("a.jpg", JPEG), ("a.txt", b"a dog"), ("a.json", b'{"prompt": "a red dog"}')])
    assert source.column_notes() == ()
    write_members(path, [("a.jpg", JPEG), ("b.jpg", JPEG)])
    assert source.column_notes() == ()
