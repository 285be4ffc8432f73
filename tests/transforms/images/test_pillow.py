"""Formats that Pillow reads with the help of others: HEIC by a plug-in, AVIF, WebP."""

import hashlib
import io
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from pictures import HEIGHT, WIDTH, Array, alpha, exif, grey, over_white, picture, save, wide
from PIL import Image
from profiles import SRGB_PROFILE

from diptych.transforms.images import pillow
from diptych.transforms.images.decode import BadImage, Limits, decode

pillow_heif = pytest.importorskip("pillow_heif")
pillow_heif.register_heif_opener()  # and its writer

ANY = Limits(min_side_px=1, max_aspect_ratio=1e6)
FORMATS = ("HEIF", "AVIF", "WEBP")
# How a picture is stored so that an EXIF orientation shows it upright
STORED: dict[int, Callable[[Array], Array]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[::-1],
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
}


def decoded(data: bytes) -> Array:
    pixels = decode(data, ANY).pixels
    assert pixels.dtype == np.uint8
    return pixels.astype(int)


def ten_bits(mode: str, pixels: Array) -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_bytes(mode, (WIDTH, HEIGHT), pixels.tobytes()).save(buffer, quality=95)
    return buffer.getvalue()


def heic_files() -> Iterator[tuple[str, bytes, Array]]:
    rgba = np.dstack([picture(), alpha()])
    yield "rgb", save(picture(), "HEIF", quality=95), picture()
    yield "4:4:4", save(picture(), "HEIF", quality=95, chroma=444), picture()
    yield "lossless", save(picture(), "HEIF", quality=-1, chroma=444, matrix_coefficients=0), picture()
    yield "grey", save(grey(), "HEIF", quality=95), grey()
    yield "rgba", save(rgba, "HEIF", quality=95), over_white(picture(), alpha())
    yield "10 bits", ten_bits("RGB;16", wide(picture())), picture()
    yield "10 bits, grey", ten_bits("I;16L", wide(grey())), grey()
    yield "10 bits, rgba", ten_bits("RGBA;16", wide(rgba)), over_white(picture(), alpha())
    second = Image.fromarray(picture(seed=1))
    yield "two images", save(picture(), "HEIF", quality=95, save_all=True, append_images=[second]), picture()


@pytest.mark.parametrize(
    ("data", "expected"), [pytest.param(data, pixels, id=name) for name, data, pixels in heic_files()]
)
def test_heic_is_decoded(data: bytes, expected: Array) -> None:
    raster = decode(data, ANY)
    assert (raster.width, raster.height, raster.orientation, raster.profile) == (WIDTH, HEIGHT, 1, None)
    assert raster.pixels.shape == expected.shape
    assert np.abs(decoded(data) - expected).mean() < 1.5


def test_the_primary_image_of_a_heic_is_decoded() -> None:
    images = [Image.fromarray(picture(seed=seed)) for seed in range(3)]
    data = save(images[0], "HEIF", quality=95, save_all=True, append_images=images[1:], primary_index=1)
    assert np.abs(decoded(data) - picture(seed=1)).mean() < 1.5


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("orientation", STORED)
def test_orientation(file_format: str, orientation: int) -> None:
    options = {"lossless": True} if file_format == "WEBP" else {"quality": 95}
    data = save(STORED[orientation](picture()), file_format, exif=exif(orientation).tobytes(), **options)
    raster = decode(data, ANY)
    assert (raster.width, raster.height) == (WIDTH, HEIGHT)
    assert raster.orientation == (1 if file_format == "HEIF" else orientation)  # libheif turns it itself
    assert np.abs(STORED[raster.orientation](picture()) - raster.pixels.astype(int)).mean() < 2


@pytest.mark.parametrize("file_format", FORMATS)
def test_profile(file_format: str) -> None:
    assert decode(save(picture(), file_format, icc_profile=SRGB_PROFILE), ANY).profile == SRGB_PROFILE


@pytest.mark.parametrize("file_format", FORMATS)
def test_what_is_cut_is_truncated(file_format: str) -> None:
    data = save(picture(), file_format)
    for end in range(20, len(data) - 8, 41):
        with pytest.raises(BadImage) as raised:
            decode(data[:end], ANY)
        assert raised.value.reason == "truncated", end


@pytest.mark.parametrize("file_format", FORMATS)
def test_limits(file_format: str) -> None:
    data = save(picture(), file_format)
    for limits, reason in (
        (Limits(max_pixels=WIDTH * HEIGHT - 1), "too_many_pixels"),
        (Limits(min_side_px=HEIGHT + 1), "too_small"),
        (Limits(max_image_bytes=len(data) - 1), "too_many_bytes"),
    ):
        with pytest.raises(BadImage) as raised:
            decode(data, limits)
        assert raised.value.reason == reason
    decode(data, Limits(max_pixels=WIDTH * HEIGHT, max_image_bytes=len(data)))


def test_threads_change_nothing() -> None:
    files = [save(picture(400, 600), file_format, quality=80) for file_format in FORMATS] * 20

    def digest(data: bytes) -> str:
        return hashlib.sha256(decode(data, ANY).pixels.tobytes()).hexdigest()

    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(digest, files))
    assert digests == [digest(data) for data in files[:3]] * 20


def test_without_the_plug_in_a_heic_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = save(picture(), "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF")
    pillow._formats.cache_clear()
    try:
        with pytest.raises(BadImage, match=r"HEIC.*diptych\[heif\]") as raised:
            decode(data, ANY)
        assert raised.value.reason == "unsupported"
        assert np.abs(decoded(save(picture(), "AVIF", quality=95)) - picture()).mean() < 2
    finally:
        pillow._formats.cache_clear()


@pytest.mark.parametrize(
    "options", [{"quality": 80}, {"lossless": True, "exact": True}, {"quality": 5, "method": 0}]
)
@pytest.mark.parametrize("channels", [3, 4])
def test_a_webp_is_decoded_as_pillow_decodes_it(options: dict[str, int], channels: int) -> None:
    pixels = picture(301, 207) if channels == 3 else np.dstack([picture(301, 207), picture(301, 207, 1, 1)])
    data = save(pixels, "WEBP", **options)
    with Image.open(io.BytesIO(data)) as image:
        expected = pillow._to_8_bit(image)
    assert np.array_equal(decoded(data), expected)


def test_strips_leave_no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    rgba = np.dstack([picture(), alpha()])
    palette = Image.fromarray(picture()).quantize(16)
    files = [
        *(save(pixels, "PNG") for pixels in (picture(), grey(), rgba, wide(grey()))),
        save(palette, "PNG", transparency=3),
        save(Image.fromarray(grey() > 99), "PNG"),
        save(rgba, "WEBP", lossless=True),
        save(picture(), "WEBP", lossless=True),
        save(Image.fromarray(picture(channels=4), "CMYK"), "TIFF"),
    ]
    whole = [decoded(data) for data in files]
    for num_pixels in (1, 1_000):
        monkeypatch.setattr(pillow, "_STRIP_PIXELS", num_pixels)
        for data, expected in zip(files, whole, strict=True):
            assert np.array_equal(decoded(data), expected)
