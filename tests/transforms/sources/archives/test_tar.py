import contextlib
import io
import tarfile
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.transforms.sources.archives.shard_file import ShardDamage
from diptych.transforms.sources.archives.tar import TarReader

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def write(members, format=tarfile.PAX_FORMAT, **options):
    """Writes (name, data) pairs, or TarInfo objects, with the standard library's writer."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, **options) as tar:
        for member in members:
            info, data = member if isinstance(member, tuple) else (member, b"")
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def reader(data):
    return TarReader(io.BufferedReader(io.BytesIO(data)))


def read(data):
    tar = reader(data)
    return [(name, tar.read()) for name in iter(tar.next, None) if tar.link is None and not tar.unreadable]


def others(data):
    """Returns the members that are no files: names, and targets or reasons."""
    tar = reader(data)
    members = [(name, tar.link, tar.unreadable) for name in iter(tar.next, None)]
    return [
        (name, link.target if link else unreadable)
        for name, link, unreadable in members
        if link or unreadable
    ]


def special(name, kind, linkname=""):
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = linkname
    return info


names = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=300
).filter(lambda name: name.rstrip("/") == name)


@given(st.lists(st.tuples(names, st.binary(max_size=1200)), max_size=5), st.sampled_from(FORMATS[1:]))
def test_reads_what_tarfile_writes(members, format):
    assert read(write(members, format)) == members


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["a.jpg", "folder/" * 20 + "a.jpg", "é" * 40 + ".jpg", "x" * 100])
def test_names_of_every_format(name, format):
    assert read(write([(name, b"data"), ("next.txt", b"")], format)) == [(name, b"data"), ("next.txt", b"")]


def test_names_that_are_not_utf8_stay_apart():
    data = write([("a\xe9", b"1"), ("a\xe8", b"2")], tarfile.GNU_FORMAT, encoding="latin-1")
    assert read(data) == [("a\\xe9", b"1"), ("a\\xe8", b"2")]


@pytest.mark.parametrize("format", FORMATS)
def test_other_kinds_of_members_are_named(format):
    members = [
        special("folder", tarfile.DIRTYPE),
        special("link" * 20, tarfile.SYMTYPE, "target" * 16),
        special("hard", tarfile.LNKTYPE, "a"),
        special("pipe", tarfile.FIFOTYPE),
        ("a", b"data"),
    ]
    data = write(members, format)
    assert read(data) == [("a", b"data")]
    assert others(data) == [
        ("link" * 20, "target" * 16),
        ("hard", "a"),
        ("pipe", "is no file, but of type '6'"),
    ]


@pytest.mark.parametrize("format", FORMATS[1:])
def test_links_lead_from_their_own_place(format):
    members = [
        special("a/b/" + "s" * 150, tarfile.SYMTYPE, "../" + "t" * 150),
        special("a/b/hard", tarfile.LNKTYPE, "h" * 150),
        ("a", b"data"),
    ]
    data = write(members, format)
    assert others(data) == [("a/b/" + "s" * 150, "a/b/../" + "t" * 150), ("a/b/hard", "h" * 150)]
    assert read(data) == [("a", b"data")]


def test_global_headers_name_no_member():
    data = write([("a", b"data")], pax_headers={"comment": "of all", "path": "not.this"})
    assert read(data) == [("a", b"data")]


def test_pax_sizes_overrule():
    info = tarfile.TarInfo("a")
    info.pax_headers = {"size": "4"}
    data = bytearray(write([(info, b"data"), ("b", b"")]))
    at = data.index(b"00000000004\0", 1024)
    data[at : at + 11] = b"00000000000"
    start = at - 124
    block = data[start : start + 512]
    block[148:156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    assert read(bytes(data)) == [("a", b"data"), ("b", b"")]


def test_sparse_files_are_named():
    # GNU tar's own old format: a header with a map, and one more block of map.
    sparse = bytearray(special("sparse", tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    sparse[124:136] = b"%011o\0" % 700
    sparse[482] = 1
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    data = bytes(sparse) + bytes(512) + b"x" * 700 + bytes(324) + write([("a", b"1")])
    assert read(data) == [("a", b"1")]
    assert read(write([("a", b"1")])[:1024] + data) == [("a", b"1"), ("a", b"1")]
    with pytest.raises(ShardDamage, match="map of a sparse file"):
        read(data[:600])
    info = tarfile.TarInfo("pax-sparse")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "sparse"}
    data = write([(info, b"1\n0\n5\n"), ("a", b"1")])
    assert read(data) == [("a", b"1")]
    assert others(data) == [("sparse", "is stored as a sparse file")]


def test_archives_one_after_the_other_read_as_one():
    assert read(write([("a", b"1")]) + write([("b", b"2")])) == [("a", b"1"), ("b", b"2")]


def test_payloads_are_read_only_on_request():
    tar = reader(write([("a", b"1" * 5000), ("b", b"2" * 512), ("c", b"3")]))
    assert (tar.next(), tar.size) == ("a", 5000)
    assert (tar.next(), tar.offset) == ("b", 512 + 5120)
    assert (tar.next(), tar.read(), tar.next()) == ("c", b"3", None)


def test_members_larger_than_memory_are_passed_over(tmp_path):
    size = 9 << 30
    big = tarfile.TarInfo("big")
    big.size = size
    path = tmp_path / "sparse.tar"
    with open(path, "wb") as file:
        file.write(big.tobuf(tarfile.GNU_FORMAT))
        file.seek(size, 1)
        file.write(write([("a", b"1")]))
    with open(path, "rb") as file:
        tar = TarReader(file)
        assert (tar.next(), tar.size) == ("big", size)
        assert (tar.next(), tar.read()) == ("a", b"1")


def test_an_empty_archive_has_no_members():
    assert read(write([])) == []
    assert read(bytes(512)) == []


def test_the_mark_may_be_missing_or_cut():
    data = write([("a", b"1")])
    for end in (1024, 1025, 1536, 2000):
        assert read(data[:end]) == [("a", b"1")]


@pytest.mark.parametrize("read_payload", [True, False])
@pytest.mark.parametrize(
    ("end", "message"),
    [
        (0, "ends in a header, after 0"),
        (200, "ends in a header, after 200"),
        (512, "ends in a member of 700 bytes"),
        (1211, "ends in a member of 700 bytes"),
        (1212, "ends in a member of 700 bytes"),
        (1535, "ends in a member of 700 bytes"),
        (1537, "ends in a header, after 1 bytes"),
    ],
)
def test_truncated(end, message, read_payload):
    tar = reader(write([("a", b"1" * 700), ("b", b"2")])[:end])
    with pytest.raises(ShardDamage, match=message) as caught:
        [tar.read() if read_payload else b"" for _ in iter(tar.next, None)]
    assert caught.value.reason == "shard_truncated"
    assert tar.offset == (1536 if end > 1536 else 0)


@pytest.mark.parametrize("at", [1024, 1024 + 130, 1024 + 150])
def test_a_damaged_header_is_not_the_end(at):
    data = bytearray(write([("a", b"1"), ("b", b"2")]))
    data[at] ^= 0x41
    tar = reader(bytes(data))
    assert tar.next() == "a"
    with pytest.raises(ShardDamage) as caught:
        tar.next()
    assert caught.value.reason == "shard_corrupt"
    assert tar.offset == 1024


def test_a_hole_in_the_file_is_not_its_end():
    data = bytearray(write([("a", b"1"), ("b", b"2" * 600), ("c", b"3")]))
    data[1024:1600] = bytes(576)
    with pytest.raises(ShardDamage, match="no tar header where one must be"):
        read(bytes(data))


@pytest.mark.parametrize(
    "data", [b"<!DOCTYPE html><html></html>", b"version https://git-lfs.github.com/spec/v1\n", b"x" * 9999]
)
def test_not_a_tar(data):
    with pytest.raises(ShardDamage, match="not a tar: it begins with") as caught:
        read(data)
    assert caught.value.reason == "shard_corrupt"


@pytest.mark.parametrize(
    "records", [b"nonsense", b"12 path=a", b"x path=a\n", b"99 path=a\n", b"9 novalue\n"]
)
def test_damaged_pax_headers(records):
    info = special("pax", tarfile.XHDTYPE)
    with pytest.raises(ShardDamage) as caught:
        read(write([(info, records), ("a", b"1")], tarfile.USTAR_FORMAT))
    assert caught.value.reason == "shard_corrupt"


def test_a_giant_extension_header_is_not_read():
    info = special("pax", tarfile.XHDTYPE)
    info.size = 1 << 33
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
        info.type = kind
        with pytest.raises(ShardDamage, match="the tar ends in a member of 8589934592 bytes"):
            read(info.tobuf(tarfile.GNU_FORMAT))


@pytest.mark.parametrize("size", [65_535, 65_536, 65_537, 100_000, 3 << 20])
def test_a_long_extension_header_costs_its_member_alone(size):
    """The bound is 64 KiB; what is longer is passed over, and its member is not called by a wrong name."""
    record = b"%d comment=" % size
    record += b"x" * (size - len(record) - 1) + b"\n"
    data = write([("a", b"1"), (special("pax", tarfile.XHDTYPE), record), ("b", b"2"), ("c", b"3")])
    whole = [("a", b"1"), ("b", b"2"), ("c", b"3")]
    assert read(data) == (whole if size <= 65_536 else [whole[0], whole[2]])
    long = f"has extension headers of {size:,} bytes, of which at most 65,536 are read"
    assert others(data) == ([] if size <= 65_536 else [("b", long)])


def test_many_extension_headers_of_one_member_are_not_read():
    headers = write([(special("pax", tarfile.XHDTYPE), b"13 comment=a\n")], tarfile.USTAR_FORMAT)[:1024] * 3
    assert read(headers + write([("a", b"1")])) == [("a", b"1")]
    bomb = write([(special("pax", tarfile.XHDTYPE), bytes(1 << 19))], tarfile.USTAR_FORMAT)[: 512 + (1 << 19)]
    assert others(bomb * 3 + write([("a", b"1")]))[0][1].startswith(
        "has extension headers of 1,572,864 bytes"
    )


@pytest.mark.parametrize("records", [b"0 path=a\n", b"00 path=a\n", b"1 path=a\n", b"2 path=a\n", b"3 =\n"])
def test_a_pax_record_without_length_ends_the_reading(records):
    data = write([(special("pax", tarfile.XHDTYPE), records), ("a", b"1")], tarfile.USTAR_FORMAT)
    with pytest.raises(ShardDamage, match="a pax header has"):
        read(data)


def test_a_pax_header_is_read_in_one_pass():
    """Each of thousands of records in a header copied the rest once, which was 100 MB."""
    records = b"".join(b"20 comment=%08d\n" % i for i in range(3_000))
    name = b"".join([records, b"14 path=a.jpg\n"])
    data = write([(special("pax", tarfile.XHDTYPE), name), ("b", b"1")], tarfile.USTAR_FORMAT)
    tracemalloc.start()
    assert read(data) == [("a.jpg", b"1")]
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("size", [b"\xff" * 12, b"-0000000001\0", b"\x80" + b"\xff" * 11, b"77777777777\0"])
def test_sizes_that_no_file_has_end_in_damage(size):
    header = bytearray(write([("a", b"1"), ("b", b"2")]))
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    with pytest.raises(ShardDamage):
        read(bytes(header))


def test_old_headers_are_read():
    """Version 7 knows no magic and ends a folder's name with a slash; some writers summed up signed bytes."""
    header = bytearray(write([("aé", b"1")], tarfile.USTAR_FORMAT))
    header[156:512] = bytes(356)
    header[148:156] = b" " * 8
    signed = sum(byte - 256 * (byte > 127) for byte in header[:512])
    header[148:156] = b"%06o\0 " % signed
    folder = bytearray(header[:512])
    folder[:4], folder[124:136] = b"dir/", b"00000000000\0"
    folder[148:156] = b" " * 8
    folder[148:156] = b"%06o\0 " % sum(byte - 256 * (byte > 127) for byte in folder)
    assert read(bytes(folder + header)) == [("aé", b"1")]


@given(st.binary(max_size=2000))
def test_any_bytes_end_in_members_or_damage(junk):
    for data in (junk, write([("a", b"1")])[:1024] + junk):
        with contextlib.suppress(ShardDamage):
            assert read(data)[:1] in ([], [("a", b"1")])
