"""Archives with random damage, read by the project's readers and by the standard library's.

A member that the standard library reads whole must come with the same bytes, or be named as lost; no damage may
hang a reader, or raise anything but its own errors.
"""

import bz2
import gzip
import io
import lzma
import os
import random
import stat
import struct
import tarfile
import time
import zipfile
import zlib

import pyarrow as pa
import pytest
import zstandard

from diptych.transforms.chunk import Reject
from diptych.transforms.sources.archives.shard_file import ShardDamage
from diptych.transforms.sources.archives.tar import TarReader
from diptych.transforms.sources.archives.zip import ZipError, unpack_entry, zip_entries
from diptych.transforms.sources.sharded.webdataset import WebdatasetSource

QUICK, LONG, SHARDS = 2000, 100_000, 150
_MAX_BYTES = 1 << 20
_BLOCK = 512


def tar_seeds(rng):
    """Yields small tars of every format, with links, long names, sparse files and global headers."""
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        headers = {"comment": "of all"} if format == tarfile.PAX_FORMAT else None
        with tarfile.open(fileobj=buffer, mode="w", format=format, pax_headers=headers) as tar:
            for ordinal in range(6):
                name = f"{ordinal:02d}" + "n" * (94 * (ordinal == 2)) + ".jpg"
                if format != tarfile.USTAR_FORMAT and ordinal == 3:
                    name = "folder/" * 30 + "é.jpg"
                info = tarfile.TarInfo(name)
                info.size = rng.choice([0, 5, 512, 700, 1500])
                if ordinal == 4:
                    info.type, info.linkname, info.size = tarfile.SYMTYPE, "00.jpg", 0
                elif format == tarfile.PAX_FORMAT and ordinal == 5:
                    info.pax_headers = {"size": str(info.size), "SCHILY.xattr.user.x": "y" * 50}
                tar.addfile(info, io.BytesIO(rng.randbytes(info.size)))
        yield buffer.getvalue()
    info = tarfile.TarInfo("big.jpg")
    info.size = 8 << 30
    yield info.tobuf(tarfile.GNU_FORMAT) + bytes(2048)


def zip_seeds(rng):
    """Yields small zips of every method, with sizes before and behind the data, and with zip64 fields."""
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        for is_stream in (False, True):
            buffer = io.BytesIO()
            target = _Pipe(buffer) if is_stream else buffer
            with zipfile.ZipFile(target, "w", method) as archive:
                for ordinal in range(5):
                    name = f"é/{ordinal}.jpg" if ordinal % 2 else f"{ordinal}.jpg"
                    with archive.open(name, "w", force_zip64=ordinal == 3) as member:
                        member.write(rng.randbytes(rng.choice([0, 5, 300])) + bytes(rng.choice([0, 900])))
            yield buffer.getvalue()


class _Pipe(io.RawIOBase):
    def __init__(self, buffer):
        self.buffer = buffer

    def writable(self):
        return True

    def write(self, data):
        return self.buffer.write(data)


def mutate(rng, data, mutate_framing):
    """Returns data with a few bytes changed, taken out, put in or cut off, often in what frames the members."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        kind = rng.randrange(7)
        at = rng.randrange(len(data) + 1)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            del data[at : at + rng.choice([1, 4, 512])]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.choice([1, 4, 512]))
        elif kind == 3:
            other = rng.randrange(len(data) + 1)
            data[at : at + 64] = data[other : other + 64]
        elif kind == 4 and at < len(data):
            data[at] = rng.choice([0, 0xFF, 0x80, 0x30, data[at] ^ (1 << rng.randrange(8))])
        elif kind == 5:
            mutate_framing(rng, data)
        elif data:
            data[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 0xFFFFFFFF, 0x7FFFFFFF, len(data)]))
        if not data:
            break
    return bytes(data)


def _mutate_tar_header(rng, data):
    """Changes a field of a tar header, and mends the checksum so that the change is believed."""
    start = rng.randrange(len(data) // _BLOCK + 1) * _BLOCK
    block = data[start : start + _BLOCK]
    if len(block) < _BLOCK:
        return
    field, size = rng.choice([(124, 12), (156, 1), (0, 100), (157, 100), (257, 8), (345, 155), (482, 1)])
    values = [
        b"\x80" + b"\xff" * (size - 1),
        b"\xff" * size,
        (b"\x80" + bytes(size) + b"\x05")[-size:],
        b"7" * size,
        b"-1",
        b"0" * size,
        rng.randbytes(size),
        bytes([rng.choice(b"01234567LKxgSXVDMN\0")]),
    ]
    value = rng.choice(values)[:size]
    block[field : field + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % (sum(block) & 0o777777)
    data[start : start + _BLOCK] = block
    if rng.random() < 0.3 and start + _BLOCK + 20 < len(data):
        record = rng.choice(
            [b"0 path=a\n", b"00000 path=a\n", b"6 size=", b"99999999999 path=a\n", b"12 size=-1\n"]
        )
        data[start + _BLOCK : start + _BLOCK + len(record)] = record


def _mutate_zip_field(rng, data):
    signature = rng.choice([b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08", b"PK\x06\x06"])
    at = data.find(signature, rng.randrange(len(data) + 1))
    if at >= 0:
        at += rng.randrange(4, 46)
        size = rng.choice([1, 2, 4])
        data[at : at + size] = rng.choice([bytes(size), b"\xff" * size, rng.randbytes(size)])


def read_tar(data):
    """Returns the members that are whole, and the damage that ended the reading, or None."""
    members = {}
    tar = TarReader(io.BufferedReader(io.BytesIO(data)))
    try:
        while (name := tar.next()) is not None:
            if tar.link is None and not tar.unreadable:
                members[tar.offset] = (name, tar.read() if tar.size <= _MAX_BYTES else None)
    except ShardDamage as damage:
        return members, damage, tar.offset
    return members, None, tar.offset


def check_tar(data):
    """Compares a tar's members with those that `tarfile` reads before it meets damage, or takes it for the end."""
    ours, damage, offset = read_tar(data)
    if b"\xff" in data and _may_hang_tarfile(data):
        return
    try:
        archive = tarfile.open(fileobj=io.BytesIO(data), mode="r:")  # noqa: SIM115
    except (tarfile.TarError, ValueError, OverflowError, IndexError, UnicodeError):
        return
    while True:
        try:
            info = archive.next()
        except (tarfile.TarError, ValueError, OverflowError, IndexError, UnicodeError):
            return
        # The standard library lets a damaged global header rename and resize every member.
        if info is None or archive.pax_headers.keys() & {"path", "size"}:
            return
        if info.isreg() and not info.issparse() and not info.name.endswith("/"):
            _compare(archive, info, ours, damage, offset)


def _compare(archive, info, ours, damage, offset):
    # Ours gives the place of the last header, which is the one before the payload.
    header = info.offset_data - _BLOCK
    if damage is not None and header >= offset:
        return
    try:
        data = archive.extractfile(info).read(_MAX_BYTES + 1)
    except (tarfile.TarError, ValueError, OverflowError):
        return
    if len(data) < info.size:
        return
    assert header in ours, (info.name, header, damage)
    name, payload = ours[header]
    assert payload is None or payload == data
    # Of a header whose magic is damaged we take the name alone, without a folder before it; of a long name as many
    # bytes as its header says.
    expected = info.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").strip("/")
    name = name.strip("/")
    is_same = expected.endswith(name[-20:]) or expected.startswith(name)
    assert is_same or "path" in info.pax_headers, (expected, name)


def _may_hang_tarfile(data):
    """Tells whether a size is negative, which sends the standard library's reader back for ever (CVE-2025-8194)."""
    return any(data[at + 124] == 0xFF for at in range(0, len(data) - _BLOCK, _BLOCK)) or b"size=-" in data


def check_zip(data):
    """Compares a zip's files with those that `zipfile` reads."""
    try:
        entries = list(zip_entries(io.BytesIO(data)))
    except ZipError:
        entries = None
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        infos = archive.infolist()
    except Exception:
        assert not entries
        return
    if entries is None:  # every member encrypted, or of a method that nobody reads
        assert not any(_zipfile_reads(archive, info) for info in infos)
        return
    ours = {}
    for entry in entries:
        extent = data[entry.offset : entry.offset + entry.size_bytes]
        try:
            ours[entry.offset, entry.crc32] = unpack_entry(
                extent, entry.packed_bytes, entry.crc32, _MAX_BYTES
            )
        except ZipError as error:
            ours[entry.offset, entry.crc32] = error
    for info in infos:
        content = ours.get((info.header_offset, info.CRC))
        expected = _zipfile_reads(archive, info)
        if isinstance(content, bytes) and expected is not None:
            assert content == expected
        if expected is not None and not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16):
            assert content is not None or info.filename.endswith(("/", "\\"))


def _zipfile_reads(archive, info):
    try:
        if info.file_size > _MAX_BYTES or info.is_dir():
            return None
        return archive.read(info)
    except Exception:
        return None


CHECKS = {
    "tar": (tar_seeds, _mutate_tar_header, check_tar),
    "zip": (zip_seeds, _mutate_zip_field, check_zip),
}


def fuzz(kind, seed, count):
    make_seeds, mutate_framing, check = CHECKS[kind]
    rng = random.Random(seed)
    seeds = list(make_seeds(rng))
    slowest = 0.0
    for ordinal in range(count):
        data = mutate(rng, rng.choice(seeds), mutate_framing)
        start = time.perf_counter()
        try:
            check(data)
        except Exception as error:
            raise AssertionError(f"{kind}, seed {seed}, mutation {ordinal}: {error!r}") from error
        slowest = max(slowest, time.perf_counter() - start)
    return slowest


@pytest.mark.parametrize("kind", CHECKS)
def test_damage_is_read_as_the_standard_library_reads_it(kind):
    fuzz(kind, 1, QUICK)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", CHECKS)
def test_much_damage(kind):
    fuzz(kind, int(os.environ.get("FUZZ_SEED", "2")), LONG)


@pytest.mark.parametrize("kind", CHECKS)
def test_the_seeds_are_read_whole(kind):
    make_seeds, _, check = CHECKS[kind]
    for data in make_seeds(random.Random(0)):
        check(data)
        if kind == "zip":
            for entry in zip_entries(io.BytesIO(data)):
                extent = data[entry.offset : entry.offset + entry.size_bytes]
                content = unpack_entry(extent, entry.packed_bytes, entry.crc32, _MAX_BYTES)
                assert zlib.crc32(content) == entry.crc32
        elif len(data) > 4096:
            members, damage, _ = read_tar(data)
            assert damage is None
            assert len(members) == 5


def write_samples(path):
    with tarfile.open(path, "w") as archive:
        for ordinal in range(8):
            for extension, data in (
                ("jpg", bytes([ordinal]) * 700),
                ("txt", b"t"),
                ("json", b'{"caption": "c"}'),
            ):
                info = tarfile.TarInfo(f"{ordinal}.{extension}")
                info.size = len(data)
                if ordinal == 5 and extension == "jpg":
                    info.type, info.linkname, info.size = tarfile.LNKTYPE, "1.jpg", 0
                archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("kind", ["plain", "gzip", "bzip2", "xz", "zstd", "lz4"])
def test_a_damaged_shard_gives_its_first_rows_and_at_most_one_loss_of_framing(tmp_path, kind):
    path = tmp_path / "a.tar"
    write_samples(path)
    pack = {
        "plain": bytes,
        "gzip": gzip.compress,
        "bzip2": bz2.compress,
        "xz": lzma.compress,
        "zstd": zstandard.compress,
        "lz4": lambda data: pa.Codec("lz4").compress(data, asbytes=True),
    }[kind]
    data = pack(path.read_bytes())
    (shard,) = WebdatasetSource((str(path),), str(tmp_path)).shards("", 0)
    rng = random.Random(5)
    for _ in range(SHARDS):
        path.write_bytes(mutate(rng, data, _mutate_tar_header))
        records = list(shard.rows())
        damage = [
            record for record in records if isinstance(record, Reject) and record.reason.startswith("shard_")
        ]
        assert damage == [record for record in records[-1:] if record in damage]
        assert all(", byte " in record.message for record in damage)
        assert list(shard.rows(3)) == records[3:]
