import io
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import tifffile
from pictures import exif, picture, save, save_tiff

from diptych.transforms.images.decode import BadImage, Limits, decode
from diptych.transforms.images.tiff import exif_orientation, is_bomb

ANY = Limits(min_side_px=1)


def overlapping(num_tags: int, num_bytes: int, is_big: bool = False) -> bytes:
    """A directory whose values are all of the same bytes."""
    entry = "<HHQQ" if is_big else "<HHII"
    head = b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, num_tags)
    if not is_big:
        head = b"II*\0\x08\0\0\0" + struct.pack("<H", num_tags)
    entries = b"".join(struct.pack(entry, 1000 + i, 1, num_bytes, 8) for i in range(num_tags))
    return head + entries + bytes(num_bytes)


@pytest.mark.parametrize("is_big", [False, True])
def test_tags_that_overlap_are_found(is_big: bool) -> None:
    data = overlapping(50, 10_000, is_big)
    assert is_bomb(data)
    with pytest.raises(BadImage, match="tags") as raised:
        decode(data, ANY)
    assert raised.value.reason == "corrupt"


def test_millions_of_numbers_are_found() -> None:
    for kind, expected in ((3, True), (4, True), (1, False), (7, False)):
        entry = struct.pack("<HHII", 0x112, kind, 5_000_000 // {3: 2, 4: 4}.get(kind, 1), 100)
        assert is_bomb(b"II*\0\x08\0\0\0\1\0" + entry + bytes(6_000_000)) is expected


@pytest.mark.timeout(60)
def test_millions_of_tags_and_headers_cost_no_time() -> None:
    tags = b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 1 << 40) + b"\xe8\3\1\0\1\0\0\0" * 2_500_000
    assert not is_bomb(tags)
    avif = save(picture(), "AVIF")
    with pytest.raises(BadImage, match="no writer"):
        decode(avif + b"II*\0\x08\0\0\0" * 2_000_000, ANY)


def test_the_tags_of_writers_are_no_bomb() -> None:
    for data in (
        save(picture(), "TIFF", exif=exif(6), icc_profile=bytes(10_000)),
        save_tiff(picture(), photometric="rgb", tile=(16, 16), description="x" * 5_000),
        save_tiff(picture(), photometric="rgb", bigtiff=True, rowsperstrip=1),
        exif(6).tobytes()[6:],
    ):
        assert not is_bomb(data)


@pytest.mark.parametrize(
    "data", [b"", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff", b"II+\0" + b"\xff" * 12]
)
def test_what_is_cut_is_no_bomb(data: bytes) -> None:
    assert not is_bomb(data)
    assert exif_orientation(data) == 1


def test_orientation_of_exif() -> None:
    for orientation in range(1, 9):
        assert exif_orientation(exif(orientation).tobytes()) == orientation
    assert exif_orientation(b"Exif\0\0" + exif(6).tobytes()) == 6
    assert exif_orientation(b"Exif\0\0" + overlapping(900, 40_000) + b"\x12\1") == 1


def multipage(first: dict[str, Any], second: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(picture(), photometric="rgb", **first)
        writer.write(np.roll(picture(), 99), photometric="rgb", **second)
    return buffer.getvalue()


def test_the_thumbnail_of_a_raw_photo_is_not_taken_for_it() -> None:
    dng = save_tiff(picture(), photometric="rgb", extratags=[(50706, "B", 4, b"\1\4\0\0", True)])
    subfiles = multipage({"subfiletype": 1, "subifds": 1}, {})
    for data in (dng, subfiles, multipage({"subfiletype": 1}, {})):
        with pytest.raises(BadImage, match="raw photo") as raised:
            decode(data, ANY)
        assert raised.value.reason == "unsupported"


def test_pages_and_pyramids_are_no_raw_photos() -> None:
    pyramid = multipage({"subifds": 1}, {"subfiletype": 1})
    for data in (multipage({}, {}), pyramid, save_tiff(picture(), photometric="rgb", subfiletype=1)):
        assert np.array_equal(decode(data, ANY).pixels, picture())


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_exif_that_overlaps_costs_no_memory(file_format: str) -> None:
    num_bytes = 60_000 if file_format == "JPEG" else 600_000
    tags = overlapping(min(30_000, num_bytes // 24), num_bytes // 2) + b"\x12\1"
    data = with_exif(file_format, b"Exif\0\0" + tags)
    code = """
import resource, sys
from diptych.transforms.images.decode import BadImage, Limits, decode
decode_limits = Limits(min_side_px=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode(sys.stdin.buffer.read(), decode_limits)
except BadImage as error:
    assert error.reason == "corrupt"
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    unit = 1024**2 if sys.platform == "darwin" else 1024
    assert int(done.stdout) / unit < 60


def with_exif(file_format: str, payload: bytes) -> bytes:
    """A file with EXIF that no writer makes."""
    if file_format != "AVIF":
        return save(picture(), file_format, exif=payload)
    room = exif(6)
    room[270] = "x" * len(payload)
    data = save(picture(), "AVIF", exif=room.tobytes())
    at = data.index(room.tobytes()[6:14])
    return data[:at] + payload[6:] + data[at + len(payload) - 6 :]
