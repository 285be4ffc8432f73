import bz2
import io
import struct
import tracemalloc
import zipfile
import zlib

import pytest
import zstandard

from diptych.transforms.sources.archives.zip import ZipError, unpack_entry, zip_entries

DATA = {"1.jpg": b"one" * 500, "sub/2.jpg": b"two", "empty.jpg": b""}
BITS = {"magic": 0, "flags": 6, "method": 8, "name size": 26}
METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]


def write(files=DATA, method=zipfile.ZIP_DEFLATED, **options):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            with archive.open(name, "w", **options) as file:
                file.write(data)
    return bytearray(buffer.getvalue())


def read(data, max_bytes=10_000):
    """Returns the files, and what is said of those that cannot be read."""
    files = {}
    for entry in zip_entries(io.BytesIO(data)):
        extent = bytes(data[entry.offset : entry.offset + entry.size_bytes])
        try:
            files[entry.path] = unpack_entry(extent, entry.packed_bytes, entry.crc32, max_bytes)
        except ZipError as error:
            files[entry.path] = str(error)
    return files


def directory_of(data, ordinal=0):
    """Returns where an entry of the central directory begins."""
    at = -1
    for _ in range(ordinal + 1):
        at = data.index(b"PK\x01\x02", at + 1)
    return at


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("force_zip64", [False, True])
def test_every_method_and_zip64(method, force_zip64):
    assert read(write(method=method, force_zip64=force_zip64)) == DATA


def test_zstd_members():
    packed = zstandard.compress(DATA["1.jpg"])
    data = write({"1.jpg": packed}, zipfile.ZIP_STORED)
    for at in (8, directory_of(data) + 10):
        struct.pack_into("<H", data, at, 93)
    for at in (14, directory_of(data) + 16):
        struct.pack_into("<I", data, at, zlib.crc32(DATA["1.jpg"]))
    assert read(data) == {"1.jpg": DATA["1.jpg"]}


@pytest.mark.parametrize("method", METHODS)
def test_a_damaged_member_costs_one_row(method):
    data = write(method=method)
    data[30 + len("1.jpg") + 12] ^= 0x55
    files = read(data)
    assert {**files, "1.jpg": DATA["1.jpg"]} == DATA
    assert "CRC-32" in files["1.jpg"] or "cannot be unpacked" in files["1.jpg"]


def test_a_wrong_checksum_is_named():
    data = write(method=zipfile.ZIP_STORED)
    data[35] ^= 1
    good, bad = zlib.crc32(DATA["1.jpg"]), zlib.crc32(bytes(data[35:1535]))
    assert read(data)["1.jpg"] == f"its CRC-32 is {bad:08x}, where the zip says {good:08x}"


@pytest.mark.parametrize(
    ("flags", "method", "message"),
    [(1, 8, "is encrypted"), (0, 9, "method 9 \\(deflate64\\)"), (0, 99, "method 99 \\(unknown\\)")],
)
def test_a_member_that_nobody_can_unpack_costs_one_row(flags, method, message):
    data = write()
    at = directory_of(data)
    data[6], data[8], data[at + 8], data[at + 10] = flags, method, flags, method
    files = read(data)
    assert files["sub/2.jpg"] == b"two"
    with pytest.raises(ZipError, match=message):
        unpack_entry(bytes(data), 10, 0, 100)
    for ordinal in range(3):
        at = directory_of(data, ordinal)
        data[at + 8], data[at + 10] = flags, method
    with pytest.raises(ZipError, match=f"'1.jpg', like all others in it, is .*{message.removeprefix('is ')}"):
        read(data)


def test_a_directory_that_leads_astray_costs_the_rows():
    data = write()
    struct.pack_into("<I", data, directory_of(data, 1) + 42, 7)
    assert "no zip header where one must be" in read(data)["sub/2.jpg"]
    assert read(data)["empty.jpg"] == b""
    data = write(method=zipfile.ZIP_STORED)
    struct.pack_into("<II", data, directory_of(data, 1) + 20, 5000, 5000)
    assert read(data)["sub/2.jpg"] == "its data reach into the next member"


@pytest.mark.parametrize("data", [b"", b"PK", b"<html>", bytes(100), b"PK\x05\x06" + b"\xff" * 18])
def test_not_a_zip(data):
    with pytest.raises(ZipError):
        list(zip_entries(io.BytesIO(data)))


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_bomb_is_not_unpacked(method):
    data = write({"1.jpg": bytes(50_000_000), "2.jpg": b"two"}, method)
    tracemalloc.start()
    files = read(data, 2_000_000)
    assert tracemalloc.get_traced_memory()[1] < 16_000_000  # LZMA has a dictionary of 8 MiB
    tracemalloc.stop()
    assert files == {"1.jpg": "unpacks to more than the 2000000 bytes that are read", "2.jpg": b"two"}


def test_no_more_is_read_than_a_member_can_have():
    data = write({"1.jpg": b"one", "2.jpg": bytes(1_000_000), "3.jpg": b"three"}, zipfile.ZIP_STORED)
    at, after = directory_of(data, 1), directory_of(data, 2)
    del data[at:after]  # as a program that deletes a member leaves it
    struct.pack_into("<HHI", data, len(data) - 14, 2, 2, len(data) - 22 - directory_of(data))
    first, last = zip_entries(io.BytesIO(data))
    assert (first.path, last.path) == ("1.jpg", "3.jpg")
    assert first.size_bytes < 140_000
    assert read(data) == {"1.jpg": b"one", "3.jpg": b"three"}


@pytest.mark.parametrize(
    ("name", "is_utf8", "extra", "path"),
    [
        ("é.jpg".encode(), True, b"", "é.jpg"),
        ("é.jpg".encode(), False, b"", "é.jpg"),
        ("猫.jpg".encode(), False, b"", "猫.jpg"),
        (b"\x82.jpg", False, b"", "é.jpg"),
        (b"\x82.jpg", False, "猫.jpg".encode(), "猫.jpg"),
        (b"sub\\1.jpg", False, b"", "sub/1.jpg"),
        (b"/abs/1.jpg", False, b"", "abs/1.jpg"),
        (b"../../1.jpg", False, b"", "1.jpg"),
        (b"./a//b/../1.jpg", False, b"", "a/1.jpg"),
    ],
)
def test_names(name, is_utf8, extra, path):
    info = zipfile.ZipInfo("x" * len(name))
    if extra:
        field = b"\1" + struct.pack("<I", zlib.crc32(name)) + extra
        info.extra = struct.pack("<HH", 0x7075, len(field)) + field
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(info, b"data")
    data = bytearray(buffer.getvalue().replace(b"x" * len(name), name))
    if is_utf8:
        data[7] |= 8
        data[directory_of(data) + 9] |= 8
    assert read(data) == {path: b"data"}


def test_folders_are_no_files():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.mkdir("folder")
        archive.writestr("windows\\", b"")
        archive.writestr("folder/1.jpg", b"one")
    assert read(buffer.getvalue()) == {"folder/1.jpg": b"one"}


def test_data_that_end_too_early():
    packed = bz2.compress(b"one")[:-4]
    data = write({"1.jpg": packed}, zipfile.ZIP_STORED)
    data[8] = data[directory_of(data) + 10] = zipfile.ZIP_BZIP2
    assert read(data) == {"1.jpg": "cannot be unpacked (its data end too early)"}
