import functools
import hashlib
import io
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import apache_beam as beam
import cv2
import imagehash
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that, equal_to
from PIL import Image, ImageCms, JpegImagePlugin

from diptych.transforms.chunk import Chunk, ChunkCoder, ChunkKey, Reject, reject_batch
from diptych.transforms.images.decode import BadImage, Limits
from diptych.transforms.images.resize import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ResizeImages,
    ResizeOptions,
    encode_image,
    perceptual_hashes,
    resize_chunk,
    resize_image,
    resize_pixels,
)
from diptych.transforms.schemas import images_schema, raw_schema

# Pillow warns of broken files while it finds out what they are
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

Array = np.ndarray[Any, Any]
MODES = ("squash", "center_crop", "pad")
ANY = Limits(min_side_px=1, max_aspect_ratio=1e6)
# How a picture is stored so that an EXIF orientation shows it upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@functools.cache
def picture(height: int, width: int, seed: int = 0) -> Array:
    """A picture of soft blobs with fine detail, of the same look at any size, as photos have."""
    generator = np.random.default_rng(seed)
    mixed = np.zeros((height, width, 3), np.float32)
    for cells, weight in ((4, 60), (16, 30), (64, 15), (200, 6)):
        noise = generator.normal(size=(cells, cells, 3)).astype(np.float32)
        mixed += weight * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    pixels = np.clip(mixed + 128, 0, 255).astype(np.uint8)
    pixels.flags.writeable = False
    return pixels


def save(pixels: Array | Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


@functools.cache
def photo(height: int, width: int, quality: int = 90) -> bytes:
    return save(picture.__wrapped__(height, width, height), "JPEG", quality=quality)


def opened(data: bytes) -> Array:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def resized(data: bytes, mode: Any = "squash", size_px: int = 224, **options: Any) -> Array:
    pixels = resize_image(data, ResizeOptions(size_px, mode, limits=ANY, **options)).pixels
    assert pixels.shape == (size_px, size_px, 3)
    assert pixels.dtype == np.uint8
    return pixels


def psnr_db(left: Array, right: Array) -> float:
    error = np.mean((left.astype(float) - right) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else 99.0


# ---- geometry


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size_px", [1, 7, 64, 224, 512])
@pytest.mark.parametrize(
    "shape", [(60, 90), (90, 60), (300, 300), (224, 224), (37, 301), (1, 1), (1, 50), (700, 20)]
)
def test_every_size_becomes_the_square_that_was_asked_for(
    mode: Any, size_px: int, shape: tuple[int, int]
) -> None:
    for data in (save(picture(*shape)), save(picture(*shape), "JPEG")):
        result = resize_image(data, ResizeOptions(size_px, mode, limits=ANY))
        assert result.pixels.shape == (size_px, size_px, 3)
        assert (result.height, result.width) == shape
        assert result.changes == ()


@pytest.mark.parametrize(("height", "width"), [(100, 200), (200, 100), (224, 448), (999, 333), (30, 31)])
def test_pad_shows_the_whole_picture_on_white(height: int, width: int) -> None:
    black = np.zeros((height, width, 3), np.uint8)
    scale = 224 / max(height, width)
    rows, columns = round(height * scale), round(width * scale)
    top, left = (224 - rows) // 2, (224 - columns) // 2
    expected = np.full((224, 224, 3), 255)
    expected[top : top + rows, left : left + columns] = 0
    assert np.array_equal(resized(save(black), "pad"), expected)
    assert np.array_equal(resized(save(black, "JPEG"), "pad"), expected)


def test_pad_of_a_line_keeps_one_row() -> None:
    found = resized(save(np.zeros((2, 2000, 3), np.uint8)), "pad")
    assert (found == 0).all(axis=(1, 2)).sum() == 1


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [
        ((64, 64), slice(0, 64), slice(0, 64)),
        ((64, 100), slice(0, 64), slice(18, 82)),
        ((64, 101), slice(0, 64), slice(18, 82)),
        ((100, 64), slice(18, 82), slice(0, 64)),
        ((65, 64), slice(0, 64), slice(0, 64)),
    ],
)
def test_center_crop_cuts_the_very_middle(shape: tuple[int, int], rows: slice, columns: slice) -> None:
    pixels = picture(*shape)
    assert np.array_equal(resized(save(pixels), "center_crop", 64), pixels[rows, columns])


def test_center_crop_of_a_large_picture_is_its_middle() -> None:
    pixels = picture(500, 900)
    for data in (save(pixels, "BMP"), save(pixels, "JPEG", quality=95)):
        assert psnr_db(resized(data, "center_crop"), resized(save(pixels[:, 200:700], "BMP"))) > 34


def test_squash_ignores_the_ratio_of_the_sides() -> None:
    halves = np.zeros((100, 400, 3), np.uint8)
    halves[:, 200:] = 255
    found = resized(save(halves), "squash", 64)
    assert (found[:, :31] == 0).all()
    assert (found[:, 33:] == 255).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_of_the_right_size_is_left_as_it_is(mode: Any) -> None:
    pixels = picture(224, 224)
    assert np.array_equal(resized(save(pixels), mode), pixels)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(61, 46), (300, 200), (301, 457), (470, 451), (224, 224), (20, 300)])
@pytest.mark.parametrize("kind", ["rgb", "grey"])
def test_a_lossless_picture_is_the_same_however_it_was_turned(
    mode: Any, shape: tuple[int, int], kind: str
) -> None:
    pixels = picture(*shape)
    image = Image.fromarray(pixels if kind == "rgb" else pixels[..., 0])
    expected = resized(save(image), mode)
    for (orientation, turn), (file_format, options) in itertools.product(
        TURNS.items(), [("PNG", {"compress_level": 1}), ("TIFF", {})]
    ):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = save(image.transpose(turn), file_format, exif=exif, **options)
        found = resize_image(data, ResizeOptions(mode=mode, limits=ANY))
        assert np.array_equal(found.pixels, expected), (orientation, file_format)
        assert (found.height, found.width) == shape
        if file_format == "PNG":
            assert found.changes == ("images_turned_upright",)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("shape", [(641, 480), (1000, 901)])
def test_a_jpeg_comes_out_upright(mode: Any, turn: int, shape: tuple[int, int]) -> None:
    image = Image.fromarray(picture(*shape))
    exif = Image.Exif()
    exif[0x0112] = turn
    found = resize_image(
        save(image.transpose(TURNS[turn]), "JPEG", quality=95, exif=exif), ResizeOptions(mode=mode)
    )
    assert psnr_db(found.pixels, resized(save(image, "BMP"), mode)) > 33
    assert (found.height, found.width) == shape
    assert found.changes == ("images_turned_upright",)


# ---- the filter


def zone_plate(side: int, ratio: float) -> Array:
    """Stripes finer than the target can show, finer and finer from left to right."""
    column = np.arange(side)
    frequency = np.pi * (1.2 / ratio + (1 - 1.2 / ratio) * column / side)
    stripes = 127.5 + 127.5 * np.cos(np.cumsum(frequency))
    return np.repeat(np.tile(stripes.astype(np.uint8), (side, 1))[..., None], 3, axis=2)


def checkerboard(side: int) -> Array:
    rows, columns = np.mgrid[:side, :side]
    return np.repeat((((rows + columns) % 2) * 255).astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ratio", [2.1, 2.9, 3.1, 4, 10, 18])
def test_what_is_too_fine_to_show_becomes_grey(mode: Any, ratio: float) -> None:
    side = round(64 * ratio)
    found = resized(save(checkerboard(side)), mode, 64).astype(int)
    assert np.abs(found - 127.5).max() < 32
    assert found.std() < 20
    found = resized(save(zone_plate(side, ratio)), mode, 64).astype(int)
    assert found[:, 16:].std() < 40


@pytest.mark.parametrize("ratio", [2.1, 2.9, 3.1])
def test_what_is_too_fine_to_show_does_not_become_grey_with_a_bilinear_filter(ratio: float) -> None:
    """So that the test above would see it."""
    side = round(64 * ratio)
    assert np.abs(cv2.resize(checkerboard(side), (64, 64)).astype(int) - 127.5).max() > 100
    assert cv2.resize(zone_plate(side, ratio), (64, 64))[:, 16:].std() > 55


@pytest.mark.parametrize(("height", "width"), [(100, 4000), (4000, 100), (130, 600), (100, 300), (200, 700)])
def test_one_side_may_shrink_while_the_other_grows(height: int, width: int) -> None:
    pixels = picture(height, width)
    reference = np.asarray(Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC))
    assert psnr_db(resize_pixels(pixels, 224, 224), reference) > 30
    stripes = np.zeros_like(pixels)
    stripes[:, ::2] = 255
    if width > 2 * 224:
        assert np.abs(resize_pixels(stripes, 224, 224).astype(int) - 127.5).max() < 64


@pytest.mark.parametrize(
    ("shape", "size"),
    [((300, 400), 224), ((500, 500), 224), ((1200, 900), 224), ((100, 80), 224), ((300, 200), 64)],
)
def test_the_filter_is_near_to_pillows(shape: tuple[int, int], size: int) -> None:
    pixels = picture(*shape)
    reference = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
    assert psnr_db(resize_pixels(pixels, size, size), reference) > 36
    grey = pixels[..., 0]
    assert psnr_db(resize_pixels(grey, size, size), reference[..., 0]) > 36


@pytest.mark.parametrize("shape", [(50, 70), (224, 224), (300, 500), (448, 448), (1000, 700), (100, 2000)])
def test_a_flat_colour_stays_what_it_is(shape: tuple[int, int]) -> None:
    for value in (0, 1, 127, 254, 255):
        flat = np.full((*shape, 3), value, np.uint8)
        assert (resize_pixels(flat, 224, 224) == value).all()
        assert (resize_pixels(flat[..., 0], 224, 64) == value).all()


def test_resizing_keeps_its_source_and_its_results() -> None:
    """Its buffers are used again; nothing that was returned lies in them."""
    first, second = picture(448, 500, 1), picture(448, 500, 2)
    kept = first.copy()
    one = resize_pixels(first, 224, 224)
    copy = one.copy()
    resize_pixels(second, 224, 224)
    assert np.array_equal(first, kept)
    assert np.array_equal(one, copy)
    turned = Image.Exif()
    turned[0x0112] = 6
    results = [resize_image(save(picture(224, 224, seed), exif=turned), ResizeOptions()) for seed in (1, 2)]
    assert np.array_equal(results[0].pixels, np.rot90(picture(224, 224, 1), -1))
    jpegs = [resize_image(save(picture(224, 224, seed), "JPEG"), ResizeOptions()) for seed in (1, 2)]
    assert psnr_db(jpegs[0].pixels, picture(224, 224, 1)) > 28


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(460, 500), (901, 1203), (1500, 2100), (2999, 2001), (3000, 4000)])
def test_a_reduced_decode_does_not_show(mode: Any, shape: tuple[int, int]) -> None:
    data = photo(*shape)
    options = ResizeOptions(mode=mode)
    fast, full = resize_image(data, options), resize_image(data, options, full_decode=True)
    assert psnr_db(fast.pixels, full.pixels) > 30
    assert (fast.width, fast.height, fast.changes) == (full.width, full.height, full.changes)


# ---- colour


def test_colours_become_rgb() -> None:
    red = Image.new("RGB", (50, 50), (200, 30, 60))
    for image, file_format in (
        (red, "PNG"),
        (red.quantize(4), "GIF"),
        (red.convert("CMYK"), "TIFF"),
        (red.convert("CMYK"), "JPEG"),
        (red.convert("YCbCr"), "JPEG"),
    ):
        found = resized(save(image, file_format), size_px=32).astype(int)
        assert np.abs(found - (200, 30, 60)).max() <= 6
    assert (resized(save(Image.new("L", (50, 50), 77)), size_px=32) == 77).all()
    assert (resized(save(Image.new("RGBA", (50, 50), (9, 9, 9, 0)))) == 255).all()


def profile_of_another_red() -> bytes:
    """Pillow's profile of sRGB, with Adobe RGB's red."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(profile[128:132], "big")
    for entry in range(132, 132 + 12 * count, 12):
        if profile[entry : entry + 4] == b"rXYZ":
            offset = int.from_bytes(profile[entry + 4 : entry + 8], "big")
            profile[offset + 8 : offset + 20] = b"".join(
                round(value * 65536).to_bytes(4, "big") for value in (0.60974, 0.31111, 0.01947)
            )
    return bytes(profile)


@pytest.mark.parametrize("mode", MODES)
def test_a_profile_is_applied_and_counted(mode: Any) -> None:
    pixels, profile = np.full((60, 40, 3), (200, 30, 60), np.uint8), profile_of_another_red()
    for file_format in ("PNG", "JPEG"):
        plain = resize_image(save(pixels, file_format), ResizeOptions(mode=mode))
        found = resize_image(save(pixels, file_format, icc_profile=profile), ResizeOptions(mode=mode))
        assert plain.changes == ()
        assert found.changes == ("images_converted_to_srgb",)
        assert found.pixels[112, 112, 0] > plain.pixels[112, 112, 0] + 20
        if mode == "pad":  # the bars are white, not what the profile makes of white
            assert (found.pixels[:, 0] == 255).all()


# ---- encoding


@pytest.mark.parametrize("quality", [1, 50, 75, 95, 100])
def test_jpegs_are_4_2_0_of_the_quality_asked_for(quality: int) -> None:
    pixels = picture(64, 64)
    encoded = encode_image(pixels, ResizeOptions(size_px=64, quality=quality))
    with (
        Image.open(io.BytesIO(encoded)) as image,
        Image.open(io.BytesIO(save(pixels, "JPEG", quality=quality))) as known,
    ):
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))
        assert JpegImagePlugin.get_sampling(image) == 2
        assert image.quantization == known.quantization
        assert not image.getexif()
        assert "icc_profile" not in image.info
    assert psnr_db(opened(encoded), opened(save(pixels, "JPEG", quality=quality))) > 36


def test_pngs_are_lossless() -> None:
    pixels = picture(64, 64)
    encoded = encode_image(pixels, ResizeOptions(size_px=64, image_format="png"))
    assert encoded.startswith(b"\x89PNG")
    assert np.array_equal(opened(encoded), pixels)


# ---- perceptual hash


def hashes(pictures: list[Array]) -> list[int]:
    grey = [cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY) for pixels in pictures]
    thumbnails = [cv2.resize(each, (32, 32), interpolation=cv2.INTER_AREA) for each in grey]
    return [int(value) for value in perceptual_hashes(np.stack(thumbnails).astype(np.uint8))]


def num_different_bits(left: int, right: int) -> int:
    return (left ^ right).bit_count()


def test_the_hash_is_imagehashs() -> None:
    pictures = [picture(224, 224, seed) for seed in range(40)]
    known = [int(str(imagehash.phash(Image.fromarray(pixels), hash_size=8)), 16) for pixels in pictures]
    different = [num_different_bits(*pair) for pair in zip(hashes(pictures), known, strict=True)]
    assert max(different) <= 2
    assert sum(different) < 40


def test_the_hash_knows_a_picture_again_and_no_other() -> None:
    originals = [picture(480, 640, seed) for seed in range(10)]
    squashed = [resized(save(pixels, "JPEG", quality=95)) for pixels in originals]
    again = [opened(encode_image(pixels, ResizeOptions(quality=60))) for pixels in squashed]
    smaller = [
        resized(save(cv2.resize(pixels, (320, 240), interpolation=cv2.INTER_AREA))) for pixels in originals
    ]
    found = hashes(squashed)
    for others in (hashes(again), hashes(smaller)):
        assert max(num_different_bits(*pair) for pair in zip(found, others, strict=True)) <= 6
    assert min(num_different_bits(*pair) for pair in itertools.combinations(found, 2)) > 12


def test_the_hash_of_many_is_that_of_each() -> None:
    thumbnails = np.stack([picture(32, 32, seed)[..., 0] for seed in range(9)])
    together = perceptual_hashes(thumbnails)
    assert together.dtype == np.uint64
    assert together.tolist() == [int(perceptual_hashes(each[None])[0]) for each in thumbnails]
    assert perceptual_hashes(np.empty((0, 32, 32), np.uint8)).tolist() == []
    assert perceptual_hashes(np.zeros((1, 32, 32), np.uint8)).tolist() == [0]


# ---- chunks

IMAGES = [
    save(picture(60, 80, 0)),
    b"",
    save(picture(300, 200, 1), "JPEG"),
    b"<html>",
    save(picture(90, 70, 2), "JPEG")[:-300],
    save(picture(8, 70, 3)),
    save(picture(17, 400, 4)),
    save(picture(70, 90, 5)).replace(b"IDAT", b"IDAT\0"),
    save(Image.fromarray(picture(40, 40)[..., 0].astype(np.float32)), "TIFF"),
    save(picture(450, 450, 6)),
    save(picture(64, 64, 7), "JPEG"),
]
REASONS = {
    1: "empty",
    3: "not_an_image",
    4: "truncated",
    5: "too_small",
    6: "aspect_ratio",
    7: "corrupt",
    8: "unsupported",
    9: "too_many_pixels",
}
LIMITS = Limits(max_pixels=200_000)
GOOD = [0, 2, 10]


def chunk_of(images: list[bytes]) -> Chunk:
    count = len(images)
    columns: list[list[Any]] = [
        [f"folder/k{i}" for i in range(count)],
        images,
        [f"{i}.x" for i in range(count)],
        [[f"caption {i}", "another"] for i in range(count)],
        ["a.tar"] * count,
        [100 + i for i in range(count)],
        [None if i % 2 else f"licence {i}" for i in range(count)],
    ]
    fields = raw_schema(["licence"])
    arrays = [pa.array(column, field.type) for column, field in zip(columns, fields, strict=True)]
    rejects = reject_batch("s", "read", [Reject("lost", 99, "missing_image", "m")])
    rows = pa.RecordBatch.from_arrays(arrays, schema=fields)
    return Chunk(ChunkKey("s", 3), rows, rejects, True, {"captions_read": 7})


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.mark.parametrize("keep_bytes", [False, True])
def test_bad_rows_cost_no_neighbour(pool: ThreadPoolExecutor, keep_bytes: bool) -> None:
    chunk = chunk_of(IMAGES)
    options = ResizeOptions(size_px=32, limits=LIMITS, keep_bytes=keep_bytes)
    done = resize_chunk(chunk, options, pool)
    assert done.rows.schema == images_schema(["licence"], 32)
    done.rows.validate(full=True)
    for row, i in zip(done.rows.to_pylist(), GOOD, strict=True):
        source = opened(IMAGES[i])
        expected = resize_image(IMAGES[i], options).pixels
        phash = row.pop("phash")
        assert row == {
            "key": f"folder/k{i}",
            "image": {"bytes": encode_image(expected, options), "path": f"k{i}.jpg"},
            "captions": [f"caption {i}", "another"],
            "width": source.shape[1],
            "height": source.shape[0],
            "sha256": hashlib.sha256(IMAGES[i]).hexdigest(),
            "source": "a.tar",
            "row": 100 + i,
            "licence": None if i % 2 else f"licence {i}",
        }
        assert phash == hashes([expected])[0]
    before, *rejects = done.rejects.to_pylist()
    assert before["key"] == "lost"
    assert {lost["row"] - 100: lost["reason"] for lost in rejects} == REASONS
    for lost in rejects:
        i = lost["row"] - 100
        assert (lost["key"], lost["shard"], lost["stage"]) == (f"folder/k{i}", "s", "image")
        assert lost["bytes"] == (IMAGES[i] if keep_bytes else None)
        with pytest.raises(BadImage) as found:
            resize_image(IMAGES[i], options)
        assert lost["message"] == str(found.value)
    assert (done.key, done.last, done.num_read) == (chunk.key, True, len(IMAGES) + 1)


def test_what_was_done_to_the_images_is_counted(pool: ThreadPoolExecutor) -> None:
    turned = Image.Exif()
    turned[0x0112] = 8
    pixels, profile = picture(40, 50), profile_of_another_red()
    images = [
        save(pixels),
        save(pixels, exif=turned),
        save(pixels, exif=turned, icc_profile=profile),
        save(pixels, "JPEG", exif=turned)[:-100],
    ]
    done = resize_chunk(chunk_of(images), ResizeOptions(size_px=32), pool)
    assert done.counters == {"captions_read": 7, "images_turned_upright": 2, "images_converted_to_srgb": 1}
    assert done.rows.column("width").to_pylist() == [50, 40, 40]


@pytest.mark.parametrize("pixels", [None, "uint8", "float32"])
@pytest.mark.parametrize("images", [[], [b""], [b"", b"text"]])
def test_chunks_without_a_row_left(pool: ThreadPoolExecutor, pixels: Any, images: list[bytes]) -> None:
    done = resize_chunk(chunk_of(images), ResizeOptions(size_px=16, pixels=pixels), pool)
    assert done.rows.num_rows == 0
    assert done.rows.schema == images_schema(["licence"], 16, pixels)
    assert done.num_read == len(images) + 1
    done.rows.validate(full=True)


def test_a_slice_is_resized_as_the_slice(pool: ThreadPoolExecutor) -> None:
    options = ResizeOptions(size_px=32, limits=LIMITS)
    whole = chunk_of([IMAGES[0], *IMAGES, IMAGES[0]])
    part = Chunk(whole.key, whole.rows.slice(1, len(IMAGES)), whole.rejects, True)
    done = resize_chunk(part, options, pool)
    known = resize_chunk(chunk_of(IMAGES), options, pool)
    for column in ("image", "sha256", "phash", "width"):
        names = [row["bytes"] if column == "image" else row for row in done.rows.column(column).to_pylist()]
        assert names == [
            row["bytes"] if column == "image" else row for row in known.rows.column(column).to_pylist()
        ]
    assert done.rows.column("key").to_pylist() == [f"folder/k{i + 1}" for i in GOOD]


def test_pngs_are_named_so(pool: ThreadPoolExecutor) -> None:
    options = ResizeOptions(size_px=32, image_format="png", mode="pad")
    (row,) = resize_chunk(chunk_of(IMAGES[:1]), options, pool).rows.to_pylist()
    assert row["image"]["path"] == "k0.png"
    assert np.array_equal(opened(row["image"]["bytes"]), resize_image(IMAGES[0], options).pixels)


@pytest.mark.parametrize("mode", MODES)
def test_tensors_are_the_pictures_before_encoding(pool: ThreadPoolExecutor, mode: Any) -> None:
    images = [IMAGES[i] for i in GOOD]
    pictures = np.stack([resized(image, mode, 32) for image in images]).transpose(0, 3, 1, 2)  # (N, C, H, W)
    done = resize_chunk(chunk_of(images), ResizeOptions(32, mode, quality=5, pixels="uint8"), pool)
    tensors = done.rows.column("pixels").to_numpy_ndarray()
    assert tensors.dtype == np.uint8
    assert np.array_equal(tensors, pictures)
    done = resize_chunk(chunk_of(images), ResizeOptions(32, mode, quality=5, pixels="float32"), pool)
    tensors = done.rows.column("pixels").to_numpy_ndarray()
    assert tensors.dtype == np.float32
    mean, std = np.reshape(IMAGENET_MEAN, (3, 1, 1)), np.reshape(IMAGENET_STD, (3, 1, 1))
    assert np.allclose(tensors, (pictures / 255 - mean) / std, rtol=0, atol=1e-5)
    own = ResizeOptions(32, mode, pixels="float32", mean=(0.5, 0.0, 1.0), std=(0.5, 1.0, 0.25))
    tensors = resize_chunk(chunk_of(images), own, pool).rows.column("pixels").to_numpy_ndarray()
    assert np.allclose(tensors[:, 0], pictures[:, 0] / 127.5 - 1, rtol=0, atol=1e-5)
    assert np.allclose(tensors[:, 1], pictures[:, 1] / 255, rtol=0, atol=1e-5)
    assert np.allclose(tensors[:, 2], (pictures[:, 2] / 255 - 1) * 4, rtol=0, atol=1e-5)


@functools.cache
def many_images() -> list[bytes]:
    shapes = [(120, 150), (200, 133), (64, 64), (300, 250)]
    images = [save(picture(*shapes[i % 4], i), "JPEG" if i % 3 else "PNG") for i in range(24)]
    return [*images, *IMAGES]


@pytest.mark.parametrize("mode", MODES)
def test_threads_change_nothing(mode: Any) -> None:
    chunk, options = chunk_of(many_images()), ResizeOptions(32, mode, pixels="float32")
    results = []
    for num_threads in (1, 2, 5):
        with ThreadPoolExecutor(num_threads) as threads:
            results += [ChunkCoder().encode(resize_chunk(chunk, options, threads)) for _ in range(2)]
    assert len(set(results)) == 1


@pytest.mark.parametrize("repeat", [0, 2])
def test_in_beam(repeat: int) -> None:
    """Each chunk that goes in comes out, the last of a bundle too."""
    options = ResizeOptions(32, limits=LIMITS)
    rows = chunk_of(many_images()).rows
    rejects = reject_batch("s", "read", [])
    chunks = [Chunk(ChunkKey("s", i), rows.slice(i * 5, 5), rejects, i == 6) for i in range(7)]
    with ThreadPoolExecutor(1) as threads:
        expected = [ChunkCoder().encode(resize_chunk(chunk, options, threads)) for chunk in chunks]
    flags = ["--runner=FnApiRunner", f"--direct_runner_bundle_repeat={repeat}"]
    with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
        done = (
            pipeline
            | beam.Create(chunks, reshuffle=False)
            | ResizeImages(options)
            | beam.Map(ChunkCoder().encode)
        )
        assert_that(done, equal_to(expected))
