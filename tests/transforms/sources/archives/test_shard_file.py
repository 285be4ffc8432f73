import gzip
import io
import os
from types import SimpleNamespace

import fsspec
import pytest

from diptych.transforms import storage
from diptych.transforms.errors import InputError
from diptych.transforms.sources.archives.shard_file import (
    ShardDamage,
    image_name,
    input_files,
    metadata_text,
    open_shard,
    pass_over,
    read_up_to,
    to_text,
    unpacked,
)
from diptych.transforms.sources.base import InputFile


def buffered(data: bytes) -> io.BufferedReader:
    return io.BufferedReader(io.BytesIO(data))


def test_names_are_relative_to_the_root(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.tar").write_bytes(b"123")
    (tmp_path / "2.tar").write_bytes(b"")
    urls = [f"{tmp_path}/a/1.tar", f"file://{tmp_path}/2.tar"]
    assert input_files(urls, f"{tmp_path}/") == [InputFile("a/1.tar", 3), InputFile("2.tar", 0)]
    assert input_files(urls[:1], urls[0]) == [InputFile("1.tar", 3)]


def test_a_file_that_is_gone_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"no\.tar is not there"):
        input_files([f"{tmp_path}/no.tar"], str(tmp_path))
    with pytest.raises(InputError, match=r"no\.tar is not there"), open_shard("memory://nowhere/no.tar"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_an_input_error(tmp_path):
    path = tmp_path / "secret.tar"
    path.write_bytes(b"x")
    path.chmod(0)
    with pytest.raises(InputError, match="may not be read"), open_shard(str(path)):
        pass


def test_a_folder_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot be read"), open_shard(str(tmp_path)):
        pass


def test_open_reads_local_and_remote(tmp_path):
    data = os.urandom(3 << 20)
    (tmp_path / "x").write_bytes(data)
    fsspec.filesystem("memory").pipe("/shardfile/x", data)
    for url in (str(tmp_path / "x"), f"file://{tmp_path}/x", "memory://shardfile/x"):
        with open_shard(url) as file:
            assert file.read(10) == data[:10]
            assert pass_over(file, 2 << 20)
            assert file.read() == data[(2 << 20) + 10 :]


def test_gzip_members_and_padding_are_unpacked():
    data = os.urandom(200_000) + bytes(100_000)
    packed = gzip.compress(data[:150_000]) + gzip.compress(data[150_000:])
    assert unpacked(buffered(packed)).read() == data
    assert unpacked(buffered(packed + bytes(1000))).read() == data
    assert unpacked(buffered(gzip.compress(b"a") + bytes(200_000) + gzip.compress(b"b"))).read() == b"ab"
    assert unpacked(buffered(data)).read() == data


@pytest.mark.parametrize("length", [5, 12, 1000, 199_000, 200_010])
def test_truncated_gzip_gives_what_is_there_first(length):
    data = os.urandom(200_000)
    packed = gzip.compress(data)
    file = unpacked(buffered(packed[:length]))
    given = []
    with pytest.raises(ShardDamage, match="ends too early") as caught:
        given.extend(iter(lambda: file.read(100), b""))
    assert caught.value.reason == "shard_truncated"
    assert data.startswith(b"".join(given))
    assert 100 * len(given) > length - 500


def test_truncated_second_gzip_member():
    packed = gzip.compress(b"first") + gzip.compress(os.urandom(200_000))
    with pytest.raises(ShardDamage, match="ends too early"):
        unpacked(buffered(packed[:-9])).read()


def test_zeros_inside_a_gzip_member_are_not_padding():
    data = [b"first", bytes(300_000)]
    packed = b"".join(gzip.compress(part, compresslevel=0) for part in data)
    assert unpacked(buffered(packed)).read() == b"".join(data)


@pytest.mark.parametrize("place", ["crc", "body", "after"])
def test_damaged_gzip(place):
    packed = bytearray(gzip.compress(b"0123456789" * 1000 + os.urandom(1000)))
    if place == "after":
        packed += b"junk behind the end"
    else:
        packed[{"crc": -6, "body": 30}[place]] ^= 0xFF
    with pytest.raises(ShardDamage) as caught:
        unpacked(buffered(bytes(packed))).read()
    assert caught.value.reason == "shard_corrupt"


def test_pass_over_tells_whether_the_bytes_were_there():
    assert pass_over(buffered(b"12345"), 5)
    assert not pass_over(buffered(b"12345"), 6)
    assert not pass_over(buffered(b"12345"), 1 << 63)
    assert pass_over(buffered(b""), 0)
    packed = gzip.compress(b"12345")
    assert pass_over(unpacked(buffered(packed)), 5)
    assert not pass_over(unpacked(buffered(packed)), 6)


def test_read_up_to_takes_long_records_in_pieces():
    data = os.urandom(100) * (1 << 20)
    assert read_up_to(buffered(data), len(data)) == data
    assert read_up_to(buffered(b"short"), 1 << 62) == b"short"


def test_image_names():
    assert image_name("a/b", b"\xff\xd8\xff") == "b.jpg"
    assert image_name("b", b"\x89PNG\r\n") == "b.png"
    assert image_name("b", b"RIFF1234WEBPVP8 ") == "b.webp"
    assert image_name("b", b"") == "b.jpg"


def test_texts():
    assert to_text("\ufeffé".encode()) == "é"
    assert to_text(b"caf\xe9") == "caf\ufffd"
    assert metadata_text(None) is None
    assert metadata_text("é") == "é"
    assert metadata_text({"a": [1, "é"]}) == '{"a": [1, "é"]}'
    assert metadata_text("\ud83d!") == "?!"
    assert metadata_text(b"\xff") == "\ufffd"


def test_a_name_that_is_no_text_is_said(tmp_path):
    name = os.fsdecode(b"caf\xe9.tar")
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=r"The input file caf\\udce9\.tar has a name that is not UTF-8"):
        input_files([f"{tmp_path}/{name}"], str(tmp_path))


def test_a_signature_is_no_part_of_a_name(monkeypatch):
    monkeypatch.setattr(storage, "locate", lambda url: (SimpleNamespace(info=lambda path: {"size": 3}), url))
    urls = ["https://u:p@host/a/b.tar?sig=1/2", "https://host/a/b.tar?sig=3"]
    for root in ("https://host/a", "https://u:p@host/a", "https://host/a/b.tar?sig=1"):
        names = {file.name for file in input_files(urls, root)}
        assert names == {"b.tar"}
