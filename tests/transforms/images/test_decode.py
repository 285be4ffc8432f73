import base64
import contextlib
import functools
import io
import itertools
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from pictures import (
    HEIGHT,
    WIDTH,
    Array,
    alpha,
    exif,
    grey,
    jpeg_frame,
    over_white,
    palette_image,
    picture,
    png,
    png_chunk,
    png_rows,
    save,
    save_tiff,
    wide,
    with_jpeg_size,
    with_tiff_tag,
)
from PIL import Image, ImageCms
from profiles import cmyk_profile

from diptych.transforms.images.colour import to_srgb
from diptych.transforms.images.decode import BadImage, Limits, Raster, decode
from diptych.transforms.schemas import REASONS

# Pillow warns of broken files while it finds out what they are
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

ANY = Limits(max_pixels=2_000_000, min_side_px=1, max_aspect_ratio=1e6)

# How a picture is stored so that an EXIF orientation shows it upright
STORED: dict[int, Callable[[Array], Array]] = {
    1: lambda picture: picture,
    2: lambda picture: picture[:, ::-1],
    3: lambda picture: picture[::-1, ::-1],
    4: lambda picture: picture[::-1],
    5: lambda picture: picture.swapaxes(0, 1),
    6: lambda picture: picture.swapaxes(0, 1)[::-1],
    7: lambda picture: picture.swapaxes(0, 1)[::-1, ::-1],
    8: lambda picture: picture.swapaxes(0, 1)[:, ::-1],
}

# By cjpeg of libjpeg-turbo, which Pillow cannot be made to write: pictures of 40x32
ARITHMETIC_JPEG = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxO"
    "UlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09P"
    "T09PT09PT0//yQARCAAgACgDASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwDRvzpnUOCnu3A2VtzDWg66hAp0BxSJ"
    "1LlqS/N0d12tHzdmNyuT+NKRKOIJJXdLxf3ChS3F6zocBlnwM/2VxugP4LDFzPRfqOhD4vVyF0OS422AI2J++/O/CRzKKzSUSgBH"
    "4y+RlxLt3Miuax2B4k/qwsD/2Q=="
)
SAMPLED_1X4_JPEG = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19i"
    "Z2hnPk1xeXBkeFxlZ2P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2Nj"
    "Y2NjY2NjY2P/wAARCAAgACgDARQAAhEBAxEB/8QAFwABAAMAAAAAAAAAAAAAAAAABAIDBf/EABwQAAMBAAMBAQAAAAAAAAAAAAAB"
    "AgMREyExUf/EABYBAQEBAAAAAAAAAAAAAAAAAAMEBf/EABkRAAMBAQEAAAAAAAAAAAAAAAABAgMxQf/aAAwDAQACEQMRAD8A0IfD"
    "KuxJAnryHbNVpALRm7VpT9A67gNLZC14HUopz0o0t7TbC1pywnZ6H0ppk9Q3w08rsbqTaTITogE6sCsqLZqvS6pEvNfhYrQDuYbz"
    "soTP/9k="
)
SAMPLED_4X2_JPEG = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1tdhbWGkJ6j"
    "q62rZ4C8ybqmx5moq6T/2wBDARweHigjKE4rK06kbl1upKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSk"
    "pKSkpKSkpKT/wAARCAAgACgDAUIAAhEBAxEB/8QAGAABAQEBAQAAAAAAAAAAAAAAAAMEAgH/xAAaEAEBAQEBAQEAAAAAAAAAAAAA"
    "AQIREgMh/8QAFgEBAQEAAAAAAAAAAAAAAAAABAUD/8QAHBEAAgEFAQAAAAAAAAAAAAAAAAERAgMEEiFB/9oADAMBAAIRAxEAPwDT"
    "m8dXX4z/AE1KzbbPXHG/ojd9rmzra7wVjV+ELAFfIAuzKJa7S1pP1+qTUOudI6vK8m6bWp4SsVSa5qAM3sAbRFST/9k="
)
THREE_SCANS_JPEG = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19i"
    "Z2hnPk1xeXBkeFxlZ2P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2Nj"
    "Y2NjY2NjY2P/wAARCAAgACgDASIAAhEBAxEB/8QAFwAAAwEAAAAAAAAAAAAAAAAAAgMEBf/EABwQAAMBAAMBAQAAAAAAAAAAAAAB"
    "AgMREyExUf/aAAgBAQAAPwDQh8MOrSn6Q72m2Z+pNUm/2JITruS1pywGkwHmvwpevJPpbE9no2dEMVoBsC14SaU0wZ1YzuZ//8QA"
    "FgEBAQEAAAAAAAAAAAAAAAAABQQD/8QAGREAAwEBAQAAAAAAAAAAAAAAAAECAxET/9oACAECEQA/AEbkP1fGYejGqJbhUTPJH//E"
    "ABcBAQADAAAAAAAAAAAAAAAAAAUBBAb/xAAZEQADAQEBAAAAAAAAAAAAAAAAAQMRIQL/2gAIAQMRAD8AmVMY7CurC6lwx0esfh45"
    "oinw/9k="
)


def decoded(data: bytes, limits: Limits = ANY) -> Array:
    """The pixels as RGB, or CMYK, of a type that holds differences."""
    pixels = decode(data, limits).pixels
    assert pixels.dtype == np.uint8
    return (np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels).astype(int)


def rejected(data: bytes, limits: Limits = ANY) -> BadImage | None:
    try:
        decode(data, limits)
    except BadImage as error:
        return error
    return None


def reason_of(data: bytes, limits: Limits = ANY) -> str | None:
    error = rejected(data, limits)
    if error is None:
        return None
    assert error.reason in REASONS["image"]
    assert str(error)
    return error.reason


# ---- what is decoded, and to what


def lossless_files() -> Iterator[tuple[str, bytes, Array]]:
    colour, mask = picture(), alpha()
    cyan = np.dstack([255 - colour, np.zeros_like(mask)])
    yield "png", save(colour, "PNG"), colour
    yield "bmp", save(colour, "BMP"), colour
    yield "webp", save(colour, "WEBP", lossless=True), colour
    yield "tiff", save(colour, "TIFF"), colour
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        yield f"tiff {compression}", save(colour, "TIFF", compression=compression), colour
    yield "tiff tiles", save_tiff(colour, tile=(32, 32), photometric="rgb"), colour
    yield "tiff big", save_tiff(colour, bigtiff=True, photometric="rgb"), colour
    planes = colour.transpose(2, 0, 1)
    yield "tiff planar", save_tiff(planes, photometric="rgb", planarconfig="separate"), colour
    yield "grey png", save(grey(), "PNG"), grey()
    yield "grey bmp", save(grey(), "BMP"), grey()
    yield "grey tiff", save(grey(), "TIFF"), grey()
    yield "grey gif", save(grey(), "GIF"), grey()
    yield "grey tiff, white is zero", save_tiff(255 - grey(), photometric="miniswhite"), grey()
    yield "1-bit png", save(Image.fromarray(grey() > 127), "PNG"), (grey() > 127) * 255
    yield "1-bit bmp", save(Image.fromarray(grey() > 127), "BMP"), (grey() > 127) * 255
    yield (
        "1-bit tiff",
        save(Image.fromarray(grey() > 127), "TIFF", compression="group4"),
        (grey() > 127) * 255,
    )
    looked_up = np.asarray(palette_image().convert("RGB"))
    for file_format in ("PNG", "GIF", "BMP", "TIFF"):
        yield f"palette {file_format}", save(palette_image(), file_format), looked_up
    yield "interlaced gif", save(palette_image(), "GIF", interlace=1), looked_up
    yield "16-bit grey png", save(wide(grey()), "PNG"), grey()
    yield "16-bit png by opencv", cv2.imencode(".png", wide(colour[..., ::-1]))[1].tobytes(), colour
    yield "16-bit tiff by opencv", cv2.imencode(".tiff", wide(colour[..., ::-1]))[1].tobytes(), colour
    for order in "<>":
        yield f"16-bit grey tiff {order}", save_tiff(wide(grey()), byteorder=order), grey()
        yield f"16-bit tiff {order}", save_tiff(wide(colour), byteorder=order, photometric="rgb"), colour
    inverted = wide(255 - grey())
    yield "16-bit grey tiff, white is zero", save_tiff(inverted, photometric="miniswhite"), grey()
    yield "16-bit planar tiff", save_tiff(wide(planes), photometric="rgb", planarconfig="separate"), colour
    yield (
        "16-bit planar tiff, deflated",
        save_tiff(wide(planes), photometric="rgb", planarconfig="separate", compression="zlib"),
        colour,
    )
    yield (
        "16-bit planar tiff, tiles",
        save_tiff(wide(planes), photometric="rgb", planarconfig="separate", tile=(32, 32)),
        colour,
    )
    yield "cmyk tiff", save(Image.fromarray(cyan, "CMYK"), "TIFF"), cyan
    yield "cmyk tiff by tifffile", save_tiff(cyan, photometric="separated"), cyan
    yield "16-bit cmyk tiff", save_tiff(wide(cyan), photometric="separated"), cyan


@pytest.mark.parametrize(
    ("data", "expected"), [pytest.param(data, pixels, id=name) for name, data, pixels in lossless_files()]
)
def test_lossless_files_are_decoded_to_their_very_pixels(data: bytes, expected: Array) -> None:
    raster = decode(data, ANY)
    assert (raster.height, raster.width, raster.orientation, raster.profile) == (HEIGHT, WIDTH, 1, None)
    found = decoded(data)
    assert np.array_equal(found, expected[..., None] * [1, 1, 1] if expected.ndim == 2 else expected)
    assert np.array_equal(decoded(data), decoded(bytes(memoryview(data))))


def transparent_files() -> Iterator[tuple[str, bytes, Array]]:
    colour, mask, shade = picture(), alpha(), grey()
    rgba, la = np.dstack([colour, mask]), np.dstack([shade, mask])
    yield "rgba png", save(rgba, "PNG"), over_white(colour, mask)
    yield "rgba webp", save(rgba, "WEBP", lossless=True, exact=True), over_white(colour, mask)
    yield "rgba tiff", save(rgba, "TIFF"), over_white(colour, mask)
    yield "la png", save(Image.fromarray(la, "LA"), "PNG"), over_white(shade, mask)
    yield "la tiff", save(Image.fromarray(la, "LA"), "TIFF"), over_white(shade, mask)
    yield (
        "16-bit rgba tiff",
        save_tiff(wide(rgba), photometric="rgb", extrasamples=["unassalpha"]),
        over_white(colour, mask),
    )
    premultiplied = np.dstack([np.rint(colour * (mask / 255.0)[..., None]).astype(np.uint8), mask])
    yield (
        "premultiplied tiff",
        save_tiff(premultiplied, photometric="rgb", extrasamples=["assocalpha"]),
        over_white(colour, mask),
    )
    size = (WIDTH, HEIGHT)
    yield "16-bit rgba png", png(size, 16, 6, png_rows(wide(rgba))), over_white(colour, mask)
    yield "16-bit la png", png(size, 16, 4, png_rows(wide(la))), over_white(shade, mask)
    image = palette_image()
    looked_up, index = np.asarray(image.convert("RGB")), np.asarray(image)
    yield (
        "palette png, one transparent",
        save(image, "PNG", transparency=3),
        over_white(looked_up, np.where(index == 3, 0, 255)),
    )
    yield (
        "palette gif, one transparent",
        save(image, "GIF", transparency=3),
        over_white(looked_up, np.where(index == 3, 0, 255)),
    )
    steps = bytes(range(0, 160, 10))
    yield (
        "palette png, each its own",
        save(image, "PNG", transparency=steps),
        over_white(looked_up, np.frombuffer(steps, np.uint8)[index]),
    )
    key = int(shade[5, 5])
    hole = np.where(shade == key, 255, shade)
    yield "grey png, one transparent", save(shade, "PNG", transparency=key), hole
    trns = png_chunk(b"tRNS", struct.pack(">H", key * 257))
    yield "16-bit grey png, one transparent", png(size, 16, 0, png_rows(wide(shade)), trns), hole
    red = colour[5, 5]
    trns = png_chunk(b"tRNS", struct.pack(">3H", *red))
    hole = np.where((colour == red).all(axis=2, keepdims=True), 255, colour)
    yield "rgb png, one transparent", png(size, 8, 2, png_rows(colour), trns), hole
    bits = grey() > 127
    packed = np.packbits(bits, axis=1)
    trns = png_chunk(b"tRNS", struct.pack(">H", 0))
    yield "1-bit png, black transparent", png(size, 1, 0, png_rows(packed), trns), np.full(bits.shape, 255)
    nibbles = np.arange(16, dtype=np.uint8)[None].repeat(4, axis=0)
    packed = nibbles[:, ::2] << 4 | nibbles[:, 1::2]
    trns = png_chunk(b"tRNS", struct.pack(">H", 7))
    yield (
        "4-bit png, one transparent",
        png((16, 4), 4, 0, png_rows(packed), trns),
        np.where(nibbles == 7, 255, nibbles.astype(int) * 17),
    )


@pytest.mark.parametrize(
    ("data", "expected"), [pytest.param(data, pixels, id=name) for name, data, pixels in transparent_files()]
)
def test_transparency_is_laid_over_white(data: bytes, expected: Array) -> None:
    raster = decode(data, ANY)
    assert raster.pixels.ndim in (2, 3)
    assert raster.pixels.shape[2:] in ((), (3,))
    expected = expected[..., None] * [1, 1, 1] if expected.ndim == 2 else expected
    # a premultiplied colour that is nearly transparent is known by a few steps only, as little as it shows
    assert np.abs(decoded(data) - expected).max() <= 2


def test_a_lab_tiff_is_decoded_to_colours() -> None:
    lab = ImageCms.profileToProfile(
        Image.fromarray(picture()),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    assert lab is not None
    difference = np.abs(decoded(save(lab, "TIFF")) - picture())
    assert difference.mean() < 3
    assert np.percentile(difference, 99) < 15


def jpegs() -> dict[str, bytes]:
    """JPEGs of many kinds, all of one size."""
    cmyk = Image.fromarray(picture(channels=4), "CMYK")
    kinds: dict[str, tuple[Array | Image.Image, dict[str, Any]]] = {
        "4:2:0": (picture(), {}),
        "4:4:4": (picture(), {"subsampling": 0}),
        "4:2:2": (picture(), {"subsampling": 1}),
        "rgb": (picture(), {"keep_rgb": True}),
        "grey": (grey(), {}),
        "cmyk": (cmyk, {}),
    }
    forms: dict[str, dict[str, Any]] = {
        "baseline": {},
        "optimized": {"optimize": True},
        "progressive": {"progressive": True},
        "restarts": {"restart_marker_blocks": 3},
        "progressive restarts": {"progressive": True, "restart_marker_blocks": 3},
    }
    return {
        f"{kind} {form}": save(pixels, "JPEG", quality=90, **options, **form_options)
        for (kind, (pixels, options)), (form, form_options) in itertools.product(kinds.items(), forms.items())
    }


JPEGS = jpegs()


@pytest.mark.parametrize("name", JPEGS)
def test_jpegs_are_decoded_as_pillow_decodes_them(name: str) -> None:
    with Image.open(io.BytesIO(JPEGS[name])) as image:
        expected = np.asarray(image).astype(int)
    raster = decode(JPEGS[name], ANY)
    assert (raster.height, raster.width, raster.orientation, raster.profile) == (HEIGHT, WIDTH, 1, None)
    assert raster.pixels.shape == expected.shape
    assert np.abs(raster.pixels - expected).max() <= 2


def with_adobe_transform(data: bytes, transform: int) -> bytes:
    at = data.index(b"Adobe\0") + 11
    assert data[at - 15 : at - 13] == b"\xff\xee"
    return data[:at] + bytes([transform]) + data[at + 1 :]


def test_ycck_is_decoded_as_pillow_decodes_it() -> None:
    data = with_adobe_transform(JPEGS["cmyk baseline"], 2)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image).astype(int)
    assert np.abs(decode(data, ANY).pixels - expected).max() <= 2
    assert np.abs(decode(JPEGS["cmyk baseline"], ANY).pixels - expected).max() > 50


def without_adobe(data: bytes) -> bytes:
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


@pytest.mark.parametrize("name", [name for name in JPEGS if name.startswith("cmyk")])
@pytest.mark.parametrize("profile", [None, cmyk_profile()])
@pytest.mark.parametrize("marker", ["none", "0", "1", "2", "9", "JFIF", "JFIF and 0", "JFIF and 2"])
def test_inks_are_read_as_pillow_and_opencv_read_them(name: str, profile: bytes | None, marker: str) -> None:
    """Nobody writes inks but as Adobe does, inverted: not even those who leave out its marker."""
    data = with_profile(JPEGS[name], profile)
    transform = marker.removeprefix("JFIF and ")
    data = with_adobe_transform(data, int(transform)) if transform.isdigit() else without_adobe(data)
    if "JFIF" in marker:
        data = data[:2] + b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0" + data[2:]
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "CMYK"
        expected = np.asarray(image).astype(int)
        as_rgb = np.asarray(image.convert("RGB")).astype(int)
    raster = decode(data, ANY)
    assert raster.profile == profile
    assert np.abs(raster.pixels - expected).max() <= 2
    by_opencv = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1].astype(int)
    assert np.abs(by_opencv - as_rgb).mean() < 3
    converted, _ = to_srgb(raster.pixels, profile)
    if profile is None:
        assert np.abs(converted - as_rgb).max() <= 3


@pytest.mark.parametrize("subsampling", [1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("transform", [None, 0, 2])
def test_inks_that_are_sampled_as_turbojpeg_does_not_know(
    subsampling: int, progressive: bool, transform: int | None
) -> None:
    cmyk = Image.fromarray(picture(channels=4), "CMYK")
    data = save(cmyk, "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
    data = data if transform is None else with_adobe_transform(data, transform)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image).astype(int)
    np.testing.assert_array_equal(decode(data, ANY).pixels, expected)
    small = decode(data, ANY, 8, 8)
    assert small.pixels.shape[0] < expected.shape[0]
    assert (small.height, small.width) == expected.shape[:2]
    for size in range(len(data) // 2, len(data) - 20, 97):
        with pytest.raises(BadImage):
            decode(data[:size], ANY)


def test_other_sampling_is_read_as_pillow_reads_it() -> None:
    data = base64.b64decode(SAMPLED_4X2_JPEG)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(decode(data, ANY).pixels, np.asarray(image))


def with_profile(data: bytes, profile: bytes | None) -> bytes:
    """A JPEG with an ICC profile that fits one segment."""
    if profile is None:
        return data
    content = b"ICC_PROFILE\0\1\1" + profile
    return data[:2] + b"\xff\xe2" + struct.pack(">H", 2 + len(content)) + content + data[2:]


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("transform", [None, 0, 1, 2, 9])
@pytest.mark.parametrize("identifiers", [b"\1\2\3", b"RGB", b"\0\1\2", b"abc"])
def test_adobes_transform_of_three_colours_is_read_as_pillow_reads_it(
    subsampling: int, transform: int | None, identifiers: bytes
) -> None:
    """Without JFIF's marker, libjpeg looks at Adobe's, then at the components' names."""
    data = save(picture(), "JPEG", quality=90, subsampling=subsampling)
    frame, scan = jpeg_frame(data), data.index(b"\xff\xda")
    named = bytearray(data)
    for i, identifier in enumerate(identifiers):
        named[frame + 10 + 3 * i] = named[scan + 5 + 2 * i] = identifier
    adobe = b"" if transform is None else b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform])
    data = bytes(named[:2]) + adobe + bytes(named[20:])
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image).astype(int)
    assert np.abs(decoded(data) - expected).max() <= 2


@pytest.mark.parametrize("text", [ARITHMETIC_JPEG, SAMPLED_1X4_JPEG, THREE_SCANS_JPEG])
def test_rare_jpegs_are_decoded_as_pillow_decodes_them(text: str) -> None:
    data = base64.b64decode(text)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB")).astype(int)
    assert expected.std() > 20
    assert np.abs(decoded(data) - expected).max() <= 2


@pytest.mark.parametrize(
    ("shorter_px", "longer_px", "scale"),
    [
        *[(0, 0, 8), (400, 0, 8), (201, 0, 8), (200, 0, 4), (101, 0, 4), (100, 0, 2), (51, 0, 2), (50, 0, 1)],
        *[(1, 0, 1), (0, 600, 8), (0, 301, 8), (0, 300, 4), (0, 75, 1), (100, 301, 8), (101, 75, 4)],
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_is_large_enough(
    shorter_px: int, longer_px: int, scale: int, mode: str, turned: bool
) -> None:
    size = (600, 400) if turned else (400, 600)
    data = save(Image.new(mode, size), "JPEG")
    raster = decode(data, ANY, shorter_px, longer_px)
    assert (raster.width, raster.height) == size
    assert raster.pixels.shape[:2] == (size[1] * scale // 8, size[0] * scale // 8)


@pytest.mark.parametrize("height", range(33, 50, 3))
@pytest.mark.parametrize("width", range(120, 129))
def test_sizes_that_no_scale_divides(height: int, width: int) -> None:
    data = save(picture(height, width), "JPEG", quality=95)
    for shorter_px, eighths in ((0, 8), (16, 4), (8, 2), (4, 1)):
        raster = decode(data, ANY, shorter_px)
        assert (raster.height, raster.width) == (height, width)
        assert raster.pixels.shape == (-(-height * eighths // 8), -(-width * eighths // 8), 3)
        block = 8 // eighths
        padded = np.pad(picture(height, width), ((0, -height % block), (0, -width % block), (0, 0)), "edge")
        rows, columns = raster.pixels.shape[:2]
        means = padded.reshape(rows, block, columns, block, 3).mean(axis=(1, 3))
        assert np.abs(raster.pixels - means).mean() < 4


def test_only_the_first_frame_is_decoded() -> None:
    frames = [Image.fromarray(np.roll(picture(), shift)) for shift in (0, 999, 1999)]
    palettes = [frame.quantize(64) for frame in frames]
    files = {
        "gif": (
            save(palettes[0], "GIF", save_all=True, append_images=palettes[1:]),
            palettes[0].convert("RGB"),
        ),
        "webp": (save(frames[0], "WEBP", lossless=True, save_all=True, append_images=frames[1:]), frames[0]),
        "apng": (save(frames[0], "PNG", save_all=True, append_images=frames[1:]), frames[0]),
        "tiff": (save(frames[0], "TIFF", save_all=True, append_images=frames[1:]), frames[0]),
    }
    for name, (data, first) in files.items():
        assert np.array_equal(decoded(data), np.asarray(first)), name


def test_only_the_first_picture_of_an_mpo_is_decoded() -> None:
    one, two = (Image.fromarray(picture(seed=seed)) for seed in (0, 1))
    data = save(one, "MPO", save_all=True, append_images=[two], quality=90)
    assert data.count(b"\xff\xd8\xff") == 2
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "MPO"
        expected = np.asarray(image).astype(int)
    assert np.abs(decoded(data) - expected).max() <= 2
    # the second is of no concern
    assert np.array_equal(decoded(data[:-500]), decoded(data))


def test_lossy_files_come_near() -> None:
    rgba = np.dstack([picture(), alpha()])
    for name, data, expected in (
        ("webp", save(picture(), "WEBP", quality=90), picture()),
        ("webp with alpha", save(rgba, "WEBP", quality=90, exact=True), over_white(picture(), alpha())),
        ("jpeg in tiff", save(picture(), "TIFF", compression="jpeg", quality=90), picture()),
        ("avif", save(picture(), "AVIF", quality=90), picture()),
        ("jpeg 2000", save(picture(), "JPEG2000"), picture()),
    ):
        assert np.abs(decoded(data) - expected).mean() < 6, name


# ---- orientation and profiles


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_orientation(file_format: str, orientation: int) -> None:
    upright = picture()
    stored = STORED[orientation](upright)
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(file_format, {})
    raster = decode(save(stored, file_format, exif=exif(orientation), **lossless), ANY)
    assert (raster.height, raster.width) == upright.shape[:2]
    if file_format == "TIFF":  # Pillow turns these itself
        assert raster.orientation == 1
        assert np.array_equal(raster.pixels, upright)
    else:
        assert raster.orientation == orientation
        assert np.abs(raster.pixels.astype(int) - stored).max() <= (20 if file_format == "JPEG" else 0)


def test_orientation_of_the_tiffs_of_others() -> None:
    for dtype, turned in itertools.product((picture(), wide(picture())), (3, 6)):
        tag = [(0x0112, "H", 1, turned, True)]
        data = save_tiff(STORED[turned](dtype), photometric="rgb", extratags=tag)
        assert np.array_equal(decoded(data), picture())


EXIF = exif(6).tobytes()


@pytest.mark.parametrize(
    "payload",
    [
        b"Exif\0\0",
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\xff\xff\xff\xff\x12\x01",
        EXIF[:-6],
        EXIF[:16] + b"\xff\xff" + EXIF[18:],
        EXIF.replace(b"II*\0", b"XX*\0").replace(b"MM\0*", b"XX\0*"),
        *(exif(value).tobytes() for value in (0, 9, 65_535)),
        EXIF.replace(b"\x01\x12\0\x03", b"\x01\x12\0\x07").replace(b"\x12\x01\x03\0", b"\x12\x01\x07\0"),
        EXIF.replace(b"\x01\x12\0\x03", b"\x01\x12\0\x63").replace(b"\x12\x01\x03\0", b"\x12\x01\x63\0"),
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02up\0\0\0\0\0\0",
    ],
)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_costs_nothing(file_format: str, payload: bytes) -> None:
    options = {"WEBP": {"lossless": True}}.get(file_format, {})
    data = save(picture(), file_format, exif=payload, **options)
    raster = decode(data, ANY)
    assert (raster.orientation, raster.height, raster.width) == (1, HEIGHT, WIDTH)
    assert np.array_equal(raster.pixels, decode(save(picture(), file_format, **options), ANY).pixels)


def test_orientation_survives_other_segments() -> None:
    data = save(picture(), "JPEG", exif=EXIF, comment=b"\xff\xda", icc_profile=b"x" * 200_000)
    assert decode(data, ANY).orientation == 6
    second = data.replace(EXIF, EXIF + b"padding").replace(b"\xff\xe1", b"\xff\xff\xff\xe1", 1)
    assert decode(second, ANY).orientation == 6


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_profiles_are_found(file_format: str) -> None:
    assert decode(save(picture(), file_format, icc_profile=SRGB), ANY).profile == SRGB
    assert decode(save(picture(), file_format), ANY).profile is None


@pytest.mark.parametrize("num_bytes", [60_000, 70_000, 140_000, 700_000])
def test_a_profile_in_several_segments_of_a_jpeg_is_put_together(num_bytes: int) -> None:
    profile = np.random.default_rng(0).bytes(num_bytes)
    data = save(picture(), "JPEG", icc_profile=profile)
    segments = [found.start() for found in re.finditer(rb"\xff\xe2..ICC_PROFILE\0", data, re.DOTALL)]
    assert len(segments) == -(-num_bytes // 65_519)
    assert decode(data, ANY).profile == profile
    # their order is in them
    bounds = [*segments, segments[-1] + 2 + int.from_bytes(data[segments[-1] + 2 : segments[-1] + 4], "big")]
    parts = [data[start:end] for start, end in itertools.pairwise(bounds)]
    assert decode(data[: bounds[0]] + b"".join(parts[::-1]) + data[bounds[-1] :], ANY).profile == profile


@pytest.mark.parametrize("change", ["lost", "twice", "of another count", "number 0", "cut short", "empty"])
@pytest.mark.parametrize("name", ["4:2:0 baseline", "4:4:4 progressive", "cmyk baseline"])
def test_a_profile_that_lacks_a_part_costs_nothing_but_itself(name: str, change: str) -> None:
    parts = [b"ICC_PROFILE\0" + bytes([i, 3]) + bytes(range(100)) for i in (1, 2, 3)]
    if change == "lost":
        parts.pop()
    elif change == "twice":
        parts[1] = parts[0]
    elif change == "of another count":
        parts[1] = parts[1].replace(b"\2\3", b"\2\4")
    elif change == "number 0":
        parts[0] = parts[0].replace(b"\1\3", b"\0\3")
    else:
        parts = [b"ICC_PROFILE\0" + b"\1" * (change == "cut short")]
    segments = b"".join(b"\xff\xe2" + struct.pack(">H", 2 + len(part)) + part for part in parts)
    data = JPEGS[name]
    raster = decode(data[:2] + segments + data[2:], ANY)
    assert raster.profile is None
    assert np.array_equal(raster.pixels, decode(data, ANY).pixels)


def test_a_profile_of_a_png_may_be_large() -> None:
    profile = np.random.default_rng(0).bytes(2_000_000)
    assert decode(save(picture(), "PNG", icc_profile=profile), ANY).profile == profile


def test_much_metadata_costs_nothing() -> None:
    text = png_chunk(b"zTXt", b"history\0\0" + zlib.compress(bytes(5_000_000)))
    data = png((WIDTH, HEIGHT), 8, 2, png_rows(picture()), text)
    assert np.array_equal(decoded(data), picture())


# ---- what is not an image


def test_empty() -> None:
    assert reason_of(b"") == "empty"
    assert reason_of(memoryview(b"")) == "empty"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS pointer"),
        (b"# xet version 0\nfilesize = 349915\nhash = '59d0'\n", "Xet pointer"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b"\xef\xbb\xbf\r\n <HTML><head>", "HTML"),
        (b'<?xml version="1.0"?><rss/>', "XML"),
        (b"Not found", "begins with b'Not found'"),
        (b"BMW, a car maker from Munich, " * 20, "no known image signature"),
        (b"II and MM are fine words to begin with", "no known image signature"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "sound"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "a video"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", "a video"),
        (b"PK\3\4\x14\0\6\0", "a ZIP archive"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "unpack it"),
        (b"\xff\xd8", "no known image signature"),
        (b"\0", "no known image signature"),
        (bytes(10_000), "no known image signature"),
    ],
)
def test_not_an_image(data: bytes, message: str) -> None:
    error = rejected(data)
    assert error is not None
    assert error.reason == "not_an_image"
    assert message in str(error)


@pytest.mark.parametrize("seed", range(200))
def test_random_bytes_are_not_an_image(seed: int) -> None:
    generator = np.random.default_rng(seed)
    assert reason_of(generator.bytes(int(generator.integers(1, 5_000)))) == "not_an_image"


# ---- what is cut


@pytest.mark.parametrize("name", JPEGS)
def test_a_cut_jpeg_is_truncated_wherever_it_is_cut(name: str) -> None:
    data = JPEGS[name]
    cuts = {*range(3, 40), *range(41, len(data) - 40, 31), *range(len(data) - 40, len(data) - 2)}
    assert {reason_of(data[:cut]) for cut in cuts} == {"truncated"}


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_that_lacks_its_end_marker_alone_is_whole(name: str) -> None:
    data, expected = JPEGS[name], decoded(JPEGS[name])
    # zeros: the file was not written to its end, on a disk that reserves room
    for end in (b"", b"\xff", b"\xff\xff", bytes(1), bytes(2), bytes(63), bytes(8) + b"\xff", bytes(5000)):
        assert np.array_equal(decoded(data[:-2] + end), expected), end
    assert reason_of(data[:-2] + b"surplus" * 9) in ("truncated", "corrupt")
    half = decode(data[:-2], ANY, 12)
    assert np.array_equal(half.pixels, decode(data, ANY, 12).pixels)


def test_an_arithmetic_jpeg_without_its_end_may_lack_anything() -> None:
    data = base64.b64decode(ARITHMETIC_JPEG)
    assert {reason_of(data[:cut]) for cut in range(3, len(data))} == {"truncated"}


@pytest.mark.parametrize("name", JPEGS)
def test_a_cut_jpeg_that_was_given_an_end_is_no_half_picture(name: str) -> None:
    data = JPEGS[name]
    # the begin of each scan too: what is there is a whole file then, with scans that are not
    scans = {found.start() + shift for found in re.finditer(rb"\xff\xda", data) for shift in range(-2, 20)}
    cuts = {*range(3, len(data) - 3, 31), *range(len(data) - 40, len(data) - 3), *scans}
    for cut in sorted(cuts):
        assert reason_of(data[:cut] + b"\xff\xd9") in ("truncated", "corrupt"), cut
    assert reason_of(data[:-2] + b"\xff\xd9") is None


@pytest.mark.parametrize("name", ["4:2:0 baseline", "grey progressive", "cmyk baseline"])
def test_a_cut_jpeg_is_found_at_a_reduced_scale_too(name: str) -> None:
    data = JPEGS[name]
    for shorter_px, cut in itertools.product((24, 12, 6), range(len(data) // 2, len(data) - 2, 97)):
        with pytest.raises(BadImage) as found:
            decode(data[:cut], ANY, shorter_px)
        assert found.value.reason == "truncated"


def test_missing_scans_are_missed() -> None:
    data = base64.b64decode(THREE_SCANS_JPEG)
    starts = [found.start() for found in re.finditer(rb"\xff\xda", data)]
    assert len(starts) == 3
    assert [reason_of(data[:start] + b"\xff\xd9") for start in starts] == [
        "corrupt",
        "truncated",
        "truncated",
    ]


def files() -> dict[str, bytes]:
    """Files of every format but JPEG."""
    colour, rgba = picture(), np.dstack([picture(), alpha()])
    frames = [palette_image(), palette_image(8)]
    made = {
        "png": save(colour, "PNG"),
        "rgba png": save(rgba, "PNG"),
        "palette png": save(palette_image(), "PNG"),
        "16-bit png": save(wide(grey()), "PNG"),
        "png in chunks": cv2.imencode(".png", picture(200, 100))[1].tobytes(),
        "apng": save(colour, "PNG", save_all=True, append_images=[Image.fromarray(colour[::-1])]),
        "gif": save(palette_image(), "GIF"),
        "animated gif": save(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "webp": save(colour, "WEBP"),
        "lossless webp": save(colour, "WEBP", lossless=True),
        "rgba webp": save(rgba, "WEBP"),
        "animated webp": save(colour, "WEBP", save_all=True, append_images=[Image.fromarray(colour[::-1])]),
        "bmp": save(colour, "BMP"),
        "palette bmp": save(palette_image(), "BMP"),
        "16-bit tiff": save_tiff(wide(colour), photometric="rgb"),
        "big tiff": save_tiff(colour, photometric="rgb", bigtiff=True),
        "tiff tiles": save_tiff(colour, photometric="rgb", tile=(32, 32)),
        "avif": save(colour, "AVIF"),
        "jpeg 2000": save(colour, "JPEG2000"),
    }
    for compression in ("raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits"):
        made[f"tiff {compression}"] = save(colour, "TIFF", compression=compression)
    return made


FILES = files()


@pytest.mark.parametrize("name", FILES)
def test_a_cut_file_is_truncated_or_whole(name: str) -> None:
    data, expected = FILES[name], decoded(FILES[name])
    signature_bytes = 18 if name.endswith("bmp") else 12
    cuts = {*range(signature_bytes, 60), *range(60, len(data), 61), *range(len(data) - 20, len(data))}
    whole = 0
    for cut in sorted(cuts):
        reason = reason_of(data[:cut])
        if reason is None:
            assert np.array_equal(decoded(data[:cut]), expected), cut
            whole += 1
        else:
            assert reason == "truncated", cut
    later_frames = name in ("apng", "animated gif")
    assert whole < len(cuts) * (0.7 if later_frames else 0.3)
    assert {reason_of(data[:cut]) for cut in range(1, signature_bytes)} <= {"not_an_image", "truncated"}


# ---- what is damaged


def damage(data: bytes, start: int, generator: np.random.Generator) -> bytes:
    """One run of bytes behind a position, flipped, zeroed or filled with anything."""
    damaged = bytearray(data)
    at, length = int(generator.integers(start, len(data) - 2)), int(generator.integers(1, 100))
    kind = generator.integers(3)
    length = len(damaged[at : at + length])
    if kind == 0:
        damaged[at] ^= 1 << int(generator.integers(8))
    else:
        damaged[at : at + length] = bytes(length) if kind == 1 else generator.bytes(length)
    return bytes(damaged)


@pytest.mark.parametrize("name", JPEGS)
def test_a_damaged_jpeg_is_rejected_wherever_libjpeg_sees_it(name: str) -> None:
    data = JPEGS[name]
    start = data.index(b"\xff\xda") + 20
    generator = np.random.default_rng(1)
    channels = {"grey": "GRAY", "cmyk": "CMYK"}.get(name.split()[0], "RGB")
    num_rejected = 0
    for _ in range(60):
        damaged = damage(data, start, generator)
        reason = reason_of(damaged)
        assert reason in (None, "corrupt", "truncated")
        num_rejected += reason is not None
        if b"\xff\xd9" not in damaged[start:]:  # and perhaps nothing but it: that test is elsewhere
            continue
        try:
            simplejpeg.decode_jpeg(damaged, channels)
        except ValueError:
            assert reason is not None
    assert num_rejected > 15


def between_segments(data: bytes) -> bytes:
    return data[:2] + b"\xff\xe9\0\x04ok\0\1\2\3" + data[2:]


def of_a_future_jfif(data: bytes) -> bytes:
    return data.replace(b"JFIF\0\1", b"JFIF\0\7")


def of_an_unknown_adobe_transform(data: bytes) -> bytes:
    assert data[2:4] == b"\xff\xe0"  # where there is JFIF, Adobe is not asked
    return data[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\x09" + data[20:]


def of_meaningless_parameters(data: bytes) -> bytes:
    at = data.index(b"\0\x3f\0", data.index(b"\xff\xda"))
    return data[:at] + b"\1\0\0" + data[at + 3 :]


@pytest.mark.parametrize(
    ("name", "oddity"),
    [
        *itertools.product(
            ["4:2:0 baseline", "4:2:2 progressive", "grey restarts", "cmyk baseline"], [between_segments]
        ),
        *itertools.product(["4:2:0 baseline", "4:4:4 progressive", "grey restarts"], [of_a_future_jfif]),
        *itertools.product(
            ["4:2:0 baseline", "4:4:4 progressive", "4:2:2 restarts"], [of_an_unknown_adobe_transform]
        ),
        *itertools.product(["4:2:0 baseline", "grey restarts", "cmyk baseline"], [of_meaningless_parameters]),
    ],
)
def test_what_libjpeg_warns_of_without_harm_hides_no_damage(
    name: str, oddity: Callable[[bytes], bytes]
) -> None:
    data = JPEGS[name]
    odd = oddity(data)
    assert odd != data
    with pytest.raises(ValueError, match=r"extraneous|JFIF|Adobe|SOS"):
        simplejpeg.decode_jpeg(odd, {"grey": "GRAY", "cmyk": "CMYK"}.get(name.split()[0], "RGB"))
    assert np.array_equal(decoded(odd), decoded(data))
    generator = np.random.default_rng(2)
    start = data.index(b"\xff\xda") + 20
    for _ in range(40):
        damaged = damage(data, start, generator)
        assert reason_of(oddity(damaged)) == reason_of(damaged)
    assert np.array_equal(decoded(odd[:-2]), decoded(data))
    assert reason_of(odd[:-3]) == "truncated"
    assert reason_of(odd[:-200]) == "truncated"


def test_zeros_before_the_end_are_harmless_and_other_bytes_are_not() -> None:
    for name in ("4:2:0 baseline", "grey baseline", "cmyk baseline", "grey restarts"):
        data = JPEGS[name]
        for num_bytes in (1, 8, 63):
            assert np.array_equal(decoded(data[:-2] + bytes(num_bytes) + b"\xff\xd9"), decoded(data))
        assert reason_of(data[:-2] + bytes(500) + b"\xff\xd9") == "corrupt"
        assert reason_of(data[:-2] + b"surplus" + b"\xff\xd9") == "corrupt"


def test_what_follows_the_end_is_of_no_concern() -> None:
    for name in ("4:2:0 baseline", "4:2:0 progressive"):
        for tail in (bytes(5_000), b"\xff\xd9", b"anything", JPEGS["grey baseline"]):
            assert np.array_equal(decoded(JPEGS[name] + tail), decoded(JPEGS[name]))


def test_a_damaged_header_of_a_jpeg_is_corrupt() -> None:
    data = JPEGS["4:2:0 baseline"]
    tables, frame, scan = data.index(b"\xff\xdb"), jpeg_frame(data), data.index(b"\xff\xda")
    assert reason_of(data[:tables] + data[frame:]) == "corrupt"
    assert reason_of(data[:frame] + data[frame + 19 :]) == "corrupt"
    assert reason_of(data[:scan] + b"\xff\xd9") == "corrupt"
    assert reason_of(data[: frame + 2] + b"\0\x0b" + data[frame + 4 :]) == "corrupt"
    assert reason_of(data[: frame + 2] + b"\xff\xff" + data[frame + 4 :]) == "corrupt"
    assert reason_of(b"\xff\xd8\xff\xd9") == "corrupt"
    assert reason_of(b"\xff\xd8\xff" + b"\xff" * 3_000) == "truncated"


@pytest.mark.parametrize("chunk", [b"IHDR", b"PLTE", b"IDAT"])
def test_a_wrong_checksum_in_a_png_is_corrupt(chunk: bytes) -> None:
    data = FILES["palette png"]
    at = data.index(chunk)
    end = at + 4 + int.from_bytes(data[at - 4 : at], "big")
    assert reason_of(data[:end] + bytes(4) + data[end + 4 :]) == "corrupt"
    assert reason_of(data[: end - 1] + bytes([data[end - 1] ^ 1]) + data[end:]) == "corrupt"


@pytest.mark.parametrize("name", ["png", "png in chunks", "palette png", "16-bit png"])
def test_a_damaged_png_never_passes(name: str) -> None:
    generator, data = np.random.default_rng(3), FILES[name]
    for _ in range(150):
        damaged = damage(data, 8, generator)
        assert damaged == data or reason_of(damaged) in ("corrupt", "truncated", "unsupported")


def test_damage_of_other_formats_is_corrupt() -> None:
    for name in ("gif", "webp", "tiff tiff_adobe_deflate", "avif"):
        generator, data = np.random.default_rng(4), FILES[name]
        found = [reason_of(damage(data, len(data) // 2, generator)) for _ in range(100)]
        assert found.count("corrupt") >= 10, name


@pytest.mark.parametrize(
    "data",
    [
        save(wide(grey()).astype(np.int32), "TIFF"),
        save(grey().astype(np.float32), "TIFF"),
        save_tiff(picture() / np.float32(255), photometric="rgb"),
        save_tiff(
            (picture() / np.float32(255)).transpose(2, 0, 1), photometric="rgb", planarconfig="separate"
        ),
        save_tiff((picture() / 255).astype(np.float16), photometric="rgb"),
        save_tiff(grey() / 255.0),
        save_tiff(grey().astype(np.int8)),
        save_tiff(wide(grey()).astype(np.int16)),
        save_tiff(wide(picture()).astype(np.int16), photometric="rgb"),
        save_tiff(grey().astype(np.uint32)),
        save_tiff(picture().astype(np.uint32), photometric="rgb"),
        save_tiff(
            wide(np.dstack([grey(), alpha()])),
            photometric="minisblack",
            planarconfig="contig",
            extrasamples=[2],
        ),
        save_tiff(wide(picture()), photometric="cielab"),
        with_tiff_tag(save_tiff(wide(grey())), 258, 12),
        JPEGS["4:2:0 baseline"].replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"),
        JPEGS["4:2:0 baseline"].replace(b"\xff\xc0\0\x11\x08", b"\xff\xc3\0\x11\x08"),
        JPEGS["grey baseline"].replace(b"\xff\xc0\0\x0b\x08", b"\xff\xc5\0\x0b\x08"),
    ],
)
def test_unsupported(data: bytes) -> None:
    assert reason_of(data) == "unsupported"


# ---- limits


def test_limits_include_themselves() -> None:
    limits = Limits(max_pixels=1000, min_side_px=10, max_aspect_ratio=4.0)
    for size in ((10, 10), (10, 40), (40, 10), (25, 40)):
        limits.check(*size)
    for size, reason in (
        ((25, 41), "too_many_pixels"),
        ((9, 10), "too_small"),
        ((10, 9), "too_small"),
        ((10, 41), "aspect_ratio"),
        ((41, 10), "aspect_ratio"),
        ((1, 2_000), "too_many_pixels"),
        ((0, 10), "too_small"),
    ):
        with pytest.raises(BadImage, match=rf"^{size[0]}x{size[1]}") as found:
            limits.check(*size)
        assert found.value.reason == reason


def test_no_picture_has_no_pixels() -> None:
    for size in ((0, 0), (0, 5), (5, 0)):
        with pytest.raises(BadImage, match="a side"):
            Limits(min_side_px=0, max_aspect_ratio=1e9).check(*size)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
def test_every_format_is_held_to_the_limits(file_format: str) -> None:
    data = save(Image.new("RGB", (200, 40)), file_format)
    assert reason_of(data, Limits()) is None
    assert reason_of(data, Limits(max_pixels=7_999)) == "too_many_pixels"
    assert reason_of(data, Limits(max_pixels=8_000)) is None
    assert reason_of(data, Limits(min_side_px=41)) == "too_small"
    assert reason_of(data, Limits(min_side_px=40)) is None
    assert reason_of(data, Limits(max_aspect_ratio=4.9)) == "aspect_ratio"
    assert reason_of(data, Limits(max_aspect_ratio=5)) is None


def test_the_limit_is_the_users_and_not_pillows() -> None:
    data = png((20_000, 10_000), 1, 0, b"")
    assert reason_of(data) == "too_many_pixels"
    assert reason_of(data, Limits(max_pixels=200_000_000)) == "truncated"


@functools.cache
def bombs() -> dict[str, bytes]:
    """Small files that say in their headers that they are huge."""
    packer = zlib.compressobj(1)
    rows = b"".join([*(packer.compress(bytes(7_501 * 600)) for _ in range(100)), packer.flush()])
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0))
    gif, bmp = bytearray(FILES["gif"]), bytearray(FILES["bmp"])
    frame = bytearray(gif)
    gif[6:10] = struct.pack("<HH", 60_000, 60_000)
    at = frame.index(b"\x2c\0\0\0\0" + struct.pack("<HH", WIDTH, HEIGHT))
    frame[at + 5 : at + 9] = struct.pack("<HH", 60_000, 60_000)
    bmp[18:26] = struct.pack("<ii", 60_000, 60_000)
    webp, animated = bytearray(FILES["webp"]), bytearray(FILES["animated webp"])
    at = webp.index(b"\x9d\x01\x2a") + 3
    webp[at : at + 4] = struct.pack("<HH", 16_383, 16_383)
    at = animated.index(b"VP8X") + 12
    animated[at : at + 6] = (16_382).to_bytes(3, "little") * 2
    tiff = FILES["tiff tiff_adobe_deflate"]
    tiles = FILES["tiff tiles"]
    scans = JPEGS["grey progressive"]
    last = scans.rindex(b"\xff\xc4")
    return {
        "png": b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b""),
        "jpeg": with_jpeg_size(JPEGS["4:2:0 baseline"], 65_000, 65_000),
        "progressive jpeg": with_jpeg_size(JPEGS["4:2:0 progressive"], 65_000, 65_000),
        "gif": bytes(gif),
        "gif frame": bytes(frame),
        "bmp": bytes(bmp),
        "webp": bytes(webp),
        "animated webp": bytes(animated),
        "tiff": with_tiff_tag(with_tiff_tag(tiff, 256, 60_000), 257, 60_000),
        "tiff tile": with_tiff_tag(with_tiff_tag(tiles, 322, 60_000), 323, 60_000),
        "scans": with_jpeg_size(scans[:last] + scans[last:-2] * 5_000 + b"\xff\xd9", 7_000, 7_000),
    }


@pytest.mark.parametrize(
    "name",
    [
        "png",
        "jpeg",
        "progressive jpeg",
        "gif",
        "gif frame",
        "bmp",
        "webp",
        "animated webp",
        "tiff",
        "tiff tile",
    ],
)
def test_too_many_pixels(name: str) -> None:
    assert reason_of(bombs()[name], Limits(min_side_px=1)) == "too_many_pixels"


@pytest.mark.timeout(60)
def test_a_jpeg_of_thousands_of_scans_is_not_decoded() -> None:
    assert reason_of(bombs()["scans"], Limits()) == "corrupt"


def test_too_many_bytes() -> None:
    for name, data in (("jpeg", JPEGS["4:2:0 baseline"]), ("png", FILES["png"]), ("junk", bytes(10_000))):
        error = rejected(data, Limits(max_image_bytes=len(data) - 1))
        assert error is not None, name
        assert error.reason == "too_many_bytes"
        assert str(error) == f"an image of {len(data)} bytes: at most {len(data) - 1} are decoded"
        assert reason_of(data, Limits(max_image_bytes=len(data))) in (None, "not_an_image")


@functools.cache
def heavy_files() -> dict[str, bytes]:
    """Files whose metadata or later frames are heavy: their pictures can be had."""
    junk = np.random.default_rng(0).bytes(66_000)
    jpeg, gif = JPEGS["4:2:0 baseline"], FILES["gif"]
    segments = b"".join(
        b"\xff\xe2\xff\xf9ICC_PROFILE\0" + bytes([i, 255]) + junk[:65_513] for i in range(1, 255)
    )
    frames = [palette_image(colours) for colours in range(2, 60)]
    pictures = [Image.fromarray(np.roll(picture(), shift)) for shift in range(60)]
    exif_tags = struct.pack("<4sIH", b"II*\0", 8, 5_000) + b"".join(
        struct.pack("<HHII", 0x112 + i, 7, 60_000, 8) for i in range(5_000)
    )
    comment = b"\x21\xfe" + (b"\xff" + bytes(255)) * 40_000 + b"\0"
    at = 13 + (3 << (gif[10] & 7) + 1)
    return {
        "jpeg with a profile of 16 MB": jpeg[:2] + segments + jpeg[2:],
        "jpeg with 500 comments": jpeg[:2] + (b"\xff\xfe\xfd\xea" + junk[:65_000]) * 500 + jpeg[2:],
        "jpeg with overlapping exif": save(picture(), "JPEG", exif=b"Exif\0\0" + exif_tags),
        "webp with overlapping exif": save(picture(), "WEBP", exif=b"Exif\0\0" + exif_tags + bytes(60_000)),
        "gif with a comment of 10 MB": gif[:at] + comment + gif[at:],
        "gif of many frames": save(frames[0], "GIF", save_all=True, append_images=frames[1:] * 10),
        "webp of many frames": save(pictures[0], "WEBP", save_all=True, append_images=pictures[1:]),
        "avif of many frames": save(
            pictures[0], "AVIF", speed=10, save_all=True, append_images=pictures[1:20]
        ),
        "tiff of many frames": save(pictures[0], "TIFF", save_all=True, append_images=pictures[1:]),
        "jpeg with junk behind": jpeg + junk * 300,
    }


@pytest.mark.parametrize("name", heavy_files())
def test_heavy_metadata_costs_no_picture(name: str) -> None:
    raster = decode(heavy_files()[name], ANY)
    assert (raster.width, raster.height, raster.orientation) == (WIDTH, HEIGHT, 1)


def lying_files() -> dict[str, bytes]:
    """Files whose headers promise what is not there."""
    tiff, bmp = FILES["tiff raw"], bytearray(FILES["bmp"])
    palette = bytearray(FILES["palette bmp"])
    bmp[10:14] = struct.pack("<I", 0x7FFFFFFF)
    palette[46:50] = struct.pack("<I", 0x7FFFFFFF)
    avif = FILES["avif"]
    size = avif.index(b"ispe") + 8
    return {
        "bmp whose pixels are far away": bytes(bmp),
        "bmp of two billion colours": bytes(palette),
        "tiff of giant strips": with_tiff_tag(tiff, 279, 0x7FFFFFFF),
        "tiff of many samples": with_tiff_tag(tiff, 277, 60_000),
        "tiff of one giant strip": with_tiff_tag(with_tiff_tag(tiff, 278, 0x7FFFFFFF), 257, 600_000),
        "avif": avif[:size] + struct.pack(">II", 60_000, 60_000) + avif[size + 8 :],
        "jpeg of 65535 x 65535": with_jpeg_size(JPEGS["4:4:4 progressive"], 65_535, 65_535),
        "big tiff of 2^60 tags": b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 1 << 60) + bytes(1_000),
    }


@pytest.mark.parametrize("name", lying_files())
def test_headers_that_lie_are_rejected(name: str) -> None:
    assert reason_of(lying_files()[name], Limits(min_side_px=1)) is not None


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("filling", "reason"),
    [
        (b"\xff" * 50_000_000, None),
        (bytes(50_000_000), None),
        (b"\xff\xd0" * 20_000_000, None),
        (b"\xff\xfe\0\2" * 5_000_000, "corrupt"),
        (b"\xff\xfe\0\0" * 5_000_000, "corrupt"),
        (b"\xff\xfe\0\2" * 9_000, None),
    ],
    ids=["fill bytes", "zeros", "restart markers", "segments", "segments of no length", "fewer segments"],
)
def test_a_header_of_millions_of_parts_is_walked_quickly(filling: bytes, reason: str | None) -> None:
    data = JPEGS["4:2:0 baseline"]
    assert reason_of(data[:2] + b"\xff\xfe\0\2" + filling + data[2:]) == reason


def test_bombs_cost_no_memory(tmp_path: Path) -> None:
    paths = []
    for name, data in {**bombs(), **heavy_files(), **lying_files()}.items():
        (tmp_path / name).write_bytes(data)
        paths.append(str(tmp_path / name))
    code = """
import resource, sys
from pathlib import Path
from diptych.transforms.images.colour import to_srgb
from diptych.transforms.images.decode import BadImage, Limits, decode

def try_all(names):
    for name in names:
        try:
            raster = decode(Path(name).read_bytes(), Limits())
            to_srgb(raster.pixels, raster.profile)
            print(Path(name).name, "passes")
        except BadImage as error:
            print(Path(name).name, error.reason)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

try_all(sys.argv[1:2])
before = peak()
try_all(sys.argv[2:])
print("grown by", peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "gif"), *paths], capture_output=True, check=True
    )
    *lines, grown = done.stdout.decode().splitlines()
    assert len(lines) == len(paths) + 1
    unit = 1024**2 if sys.platform == "darwin" else 1024
    assert int(grown.rpartition(" ")[2]) / unit < 200


# ---- anything at all


def mutate(data: bytes, generator: np.random.Generator) -> bytes:
    """A file with a few bytes changed, left out, doubled or added, half of them in its header."""
    mutated = bytearray(data)
    for _ in range(int(generator.integers(1, 5))):
        header_bytes = min(len(mutated), 700)
        at = int(generator.integers(header_bytes if generator.integers(2) else len(mutated)))
        length = int(generator.integers(1, 64))
        kind = generator.integers(5)
        if kind == 0:
            mutated[at] = int(generator.integers(256))
        elif kind == 1:
            mutated[at] = (0x00, 0xFF, 0xD8, 0xD9, 0xDA, 0xC4)[int(generator.integers(6))]
        elif kind == 2:
            del mutated[at : at + length]
        elif kind == 3:
            mutated[at:at] = mutated[at : at + length]
        else:
            mutated[at:at] = generator.bytes(length)
        mutated = mutated or bytearray(1)
    return bytes(mutated)


def fuzz(name: str, num_mutations: int) -> dict[str, int]:
    """Decodes mutations of a file and counts the verdicts; where Pillow opens one that passes, the size is the same."""
    data = {**JPEGS, **FILES}[name]
    generator, verdicts = np.random.default_rng(zlib.crc32(name.encode())), dict.fromkeys(REASONS["image"], 0)
    verdicts["passes"] = 0
    for _ in range(num_mutations):
        mutated = mutate(data, generator)
        error = None
        try:
            raster = decode(memoryview(mutated), ANY, int(generator.choice([0, 10, 30])))
        except BadImage as raised:
            error = raised
        if error is not None:
            verdicts[error.reason] += 1
            assert not re.search(r" at 0x|\n", str(error)), str(error)
            continue
        verdicts["passes"] += 1
        check_raster(raster)
        with contextlib.suppress(Exception), Image.open(io.BytesIO(mutated)) as image:
            # of several frames in a JPEG Pillow takes the last and libjpeg none, of TIFF it turns the size itself
            if image.format not in ("TIFF", "MPO"):
                assert sorted(image.size) == sorted((raster.width, raster.height))
    return verdicts


@pytest.mark.parametrize("name", [*JPEGS, *FILES])
def test_mutated_files_raise_nothing_else(name: str) -> None:
    verdicts = fuzz(name, 200)
    assert sum(verdicts.values()) == 200
    assert verdicts["passes"] < 200


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [*JPEGS, *FILES])
def test_many_mutated_files_raise_nothing_else(name: str) -> None:
    assert sum(fuzz(name, 4_000).values()) == 4_000


def test_messages_are_the_same_in_every_process() -> None:
    """No address, no order of a set, no name of a temporary file is in a message of a reject."""
    code = """
import hashlib, sys
sys.path[:0] = sys.argv[1:]
import numpy as np
from test_decode import ANY, FILES, JPEGS, BadImage, decode, mutate

generator, digest, num_rejects = np.random.default_rng(7), hashlib.sha256(), 0
for name, data in {**JPEGS, **FILES}.items():
    for mutated in [data[: len(data) // 2], *(mutate(data, generator) for _ in range(12))]:
        try:
            digest.update(decode(mutated, ANY).pixels.tobytes())
        except BadImage as error:
            num_rejects += 1
            digest.update(f"{error.reason}: {error}".encode())
print(num_rejects, digest.hexdigest())
"""
    folder = Path(__file__).parent
    command = [sys.executable, "-c", code, str(folder), str(folder.parents[1])]
    outputs = [
        subprocess.run(
            command, capture_output=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert int(outputs[0].split()[0]) > 200


def check_raster(raster: Raster) -> None:
    assert raster.pixels.dtype == np.uint8
    assert raster.pixels.shape[2:] in ((), (3,), (4,))
    assert min(raster.width, raster.height, *raster.pixels.shape[:2]) >= 1
    assert 1 <= raster.orientation <= 8


def test_rows_of_other_threads_are_left_alone() -> None:
    """The buffer of decoded pixels is reused, by the thread that filled it."""
    first = decode(JPEGS["4:2:0 baseline"], ANY)
    kept = first.pixels.copy()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(decode, JPEGS["rgb baseline"], ANY).result()
    assert np.array_equal(first.pixels, kept)
