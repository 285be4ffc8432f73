import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from pictures import HEIGHT, WIDTH, exif, palette_image, picture, png, png_chunk, png_rows, save
from PIL import Image
from profiles import SRGB_PROFILE

from diptych.transforms.images.decode import BadImage, Limits, Raster, decode
from diptych.transforms.images.png import essential_parts

ANY = Limits(min_side_px=1, max_aspect_ratio=1e6)
SIZE = (WIDTH, HEIGHT)


def with_wrong_checksum(chunk: bytes) -> bytes:
    return chunk[:-1] + bytes([chunk[-1] ^ 1])


def decoded_with(*chunks: bytes) -> Raster:
    return decode(png(SIZE, 8, 2, png_rows(picture()), *chunks), ANY)


ANCILLARY = {
    "tEXt": b"Comment\0hello",
    "zTXt": b"Comment\0\0" + zlib.compress(b"hello"),
    "iTXt": b"Comment\0\0\0\0\0hello",
    "iCCP": b"sRGB\0\0" + zlib.compress(SRGB_PROFILE),
    "gAMA": struct.pack(">I", 45455),
    "cHRM": struct.pack(">8I", *[31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000]),
    "sRGB": b"\0",
    "pHYs": struct.pack(">IIB", 2835, 2835, 1),
    "tIME": struct.pack(">HBBBBB", 2024, 1, 1, 0, 0, 0),
    "bKGD": bytes(6),
    "sBIT": b"\x08\x08\x08",
    "hIST": bytes(2),
    "eXIf": exif(6).tobytes()[6:],
    "tRNS": struct.pack(">3H", *picture()[5, 5]),
    "acTL": struct.pack(">II", 2, 0),
    "orNT": b"\6",
    "vpAg": bytes(9),
}


@pytest.mark.parametrize("kind", ANCILLARY)
def test_a_wrong_checksum_of_an_ancillary_chunk_costs_nothing(kind: str) -> None:
    """libpng warns of it, and leaves the chunk out: so does what OpenCV and browsers show."""
    chunk = with_wrong_checksum(png_chunk(kind.encode(), ANCILLARY[kind]))
    raster = decoded_with(chunk)
    assert np.array_equal(raster.pixels, picture())
    assert (raster.profile, raster.orientation) == (None, 1)


@pytest.mark.parametrize("kind", ANCILLARY)
@pytest.mark.parametrize("content", [b"", b"\0", b"\xff" * 5, bytes(300), b"x\0\5" + bytes(20)])
def test_a_malformed_ancillary_chunk_costs_nothing(kind: str, content: bytes) -> None:
    raster = decoded_with(png_chunk(kind.encode(), content))
    assert np.array_equal(raster.pixels, picture())


def test_sound_chunks_are_heeded() -> None:
    assert decoded_with(png_chunk(b"iCCP", ANCILLARY["iCCP"])).profile == SRGB_PROFILE
    assert decoded_with(png_chunk(b"eXIf", ANCILLARY["eXIf"])).orientation == 6
    assert tuple(decoded_with(png_chunk(b"tRNS", ANCILLARY["tRNS"])).pixels[5, 5]) == (255, 255, 255)
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="3"/>'
    assert decoded_with(png_chunk(b"iTXt", xmp)).orientation == 3
    packed = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b'<x tiff:Orientation="3"/>')
    assert decoded_with(png_chunk(b"iTXt", packed)).orientation == 3
    hexadecimal = b"\nexif\n     99\n" + exif(8).tobytes().hex().encode()
    raw = b"Raw profile type exif\0\0" + zlib.compress(hexadecimal)
    assert decoded_with(png_chunk(b"zTXt", raw)).orientation == 8


def test_the_first_of_two_chunks_counts() -> None:
    one, two = (png_chunk(b"eXIf", exif(orientation).tobytes()[6:]) for orientation in (6, 3))
    assert decoded_with(one, two).orientation == 6
    assert decoded_with(with_wrong_checksum(one), two).orientation == 3


@pytest.mark.parametrize("name", ["zTXt", "iTXt", "iCCP", "XMP", "raw"])
def test_a_text_or_a_profile_that_unpacks_to_gigabytes_costs_nothing(name: str) -> None:
    packer = zlib.compressobj(9)
    packed = b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(200)), packer.flush()])
    kind, head = {
        "zTXt": (b"zTXt", b"history\0\0"),
        "iTXt": (b"iTXt", b"history\0\1\0\0\0"),
        "iCCP": (b"iCCP", b"sRGB\0\0"),
        "XMP": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0"),
        "raw": (b"zTXt", b"Raw profile type exif\0\0"),
    }[name]
    raster = decoded_with(png_chunk(kind, head + packed))
    assert np.array_equal(raster.pixels, picture())
    assert (raster.profile, raster.orientation) == (None, 1)


def test_many_texts_cost_nothing() -> None:
    text = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20)))
    assert np.array_equal(decoded_with(*[text] * 500).pixels, picture())


def test_exif_whose_tags_overlap_costs_nothing() -> None:
    entries = b"".join(struct.pack("<HHII", 50_000 + i % 10_000, 7, 400_000, 8) for i in range(30_000))
    tags = b"II*\0\x08\0\0\0" + struct.pack("<H", 30_000) + entries + b"\x12\1" + bytes(500_000)
    raster = decoded_with(png_chunk(b"eXIf", tags))
    assert raster.orientation == 1


def test_later_frames_are_left_out() -> None:
    frames = [Image.fromarray(np.roll(picture(), shift)) for shift in range(5)]
    data = save(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert b"fdAT" in data
    assert b"fdAT" not in essential_parts(data).data
    assert np.array_equal(decode(data, ANY).pixels, picture())


def test_a_png_without_metadata_is_not_copied() -> None:
    data = save(picture(), "PNG")
    assert essential_parts(data).data is data


def test_damage_behind_the_pixels_costs_nothing() -> None:
    whole = png(SIZE, 8, 2, png_rows(picture()))
    end = whole.rindex(b"IEND") - 4
    text = png_chunk(b"tEXt", b"Comment\0hello")
    for tail in (
        with_wrong_checksum(text) + whole[end:],
        text[:-6],
        with_wrong_checksum(text),
        b"",
        whole[end:-2],
    ):
        data = whole[:end] + tail
        assert np.array_equal(decode(data, ANY).pixels, picture())
        by_opencv = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert by_opencv is None or np.array_equal(by_opencv[..., ::-1], picture())


def test_millions_of_chunks_are_not_read() -> None:
    with pytest.raises(BadImage, match="chunks") as raised:
        decoded_with(png_chunk(b"tIME", b"") * 200_000)
    assert raised.value.reason == "corrupt"
    assert np.array_equal(decoded_with(png_chunk(b"tIME", b"") * 20_000).pixels, picture())


def test_apples_own_form_is_named() -> None:
    data = png(SIZE, 8, 2, png_rows(picture()))
    with pytest.raises(BadImage, match="CgBI") as raised:
        decode(data[:8] + png_chunk(b"CgBI", b"\x50\0\x20\6") + data[8:], ANY)
    assert raised.value.reason == "unsupported"


@pytest.mark.parametrize("chunk", [b"IHDR", b"PLTE", b"IDAT"])
def test_a_wrong_checksum_of_a_critical_chunk_is_damage(chunk: bytes) -> None:
    data = save(palette_image(), "PNG")
    at = data.index(chunk)
    end = at + 4 + int.from_bytes(data[at - 4 : at], "big")
    with pytest.raises(BadImage, match="checksum") as raised:
        decode(data[:end] + bytes(4) + data[end + 4 :], ANY)
    assert raised.value.reason == "corrupt"
    assert np.array_equal(decode(data, ANY).pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
