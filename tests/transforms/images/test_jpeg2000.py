import struct

import cv2
import numpy as np
import pytest
from pictures import HEIGHT, WIDTH, Array, alpha, grey, over_white, picture, save, wide
from PIL import Image
from profiles import SRGB_PROFILE

from diptych.transforms.images.decode import BadImage, Limits, decode
from diptych.transforms.images.jpeg2000 import halvings, profile_of

ANY = Limits(min_side_px=1, max_aspect_ratio=1e6)


def by_opencv(pixels: Array) -> bytes:
    options = [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000]
    return cv2.imencode(".jp2", np.ascontiguousarray(pixels), options)[1].tobytes()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(save(picture(), "JPEG2000"), picture(), id="rgb"),
        pytest.param(save(picture(), "JPEG2000", no_jp2=True), picture(), id="codestream"),
        pytest.param(save(picture(), "JPEG2000", tile_size=(32, 32)), picture(), id="tiles"),
        pytest.param(save(picture(), "JPEG2000", num_resolutions=1), picture(), id="one resolution"),
        pytest.param(save(grey(), "JPEG2000"), grey(), id="grey"),
        pytest.param(save(Image.fromarray(wide(grey())), "JPEG2000"), grey(), id="16-bit grey"),
        pytest.param(
            save(np.dstack([picture(), alpha()]), "JPEG2000"), over_white(picture(), alpha()), id="rgba"
        ),
        pytest.param(
            save(Image.fromarray(np.dstack([grey(), alpha()]), "LA"), "JPEG2000"),
            over_white(grey(), alpha()),
            id="grey with alpha",
        ),
        pytest.param(by_opencv(picture()[..., ::-1]), picture(), id="rgb by opencv"),
        pytest.param(by_opencv(wide(picture()[..., ::-1])), picture(), id="16-bit rgb by opencv"),
        pytest.param(by_opencv(wide(grey())), grey(), id="16-bit grey by opencv"),
        pytest.param(
            by_opencv(wide(np.dstack([picture()[..., ::-1], alpha()]))),
            over_white(picture(), alpha()),
            id="16-bit rgba by opencv",
        ),
        pytest.param(
            by_opencv(np.full((HEIGHT, WIDTH, 3), 65_535, np.uint16)), np.full((1, 1), 255), id="white"
        ),
    ],
)
def test_jpeg_2000_is_decoded_to_its_pixels(data: bytes, expected: Array) -> None:
    raster = decode(data, ANY)
    assert (raster.width, raster.height, raster.orientation, raster.profile) == (WIDTH, HEIGHT, 1, None)
    assert np.abs(raster.pixels.astype(int) - expected).max() <= 1


def with_profile(data: bytes, profile: bytes) -> bytes:
    """A JP2 whose colours are those of a profile (ITU T.800, I.5.3.3)."""
    colour, header = data.index(b"colr"), data.index(b"jp2h")
    old, whole = (int.from_bytes(data[at - 4 : at], "big") for at in (colour, header))
    box = struct.pack(">I", 11 + len(profile)) + b"colr\2\0\0" + profile
    data = data[: colour - 4] + box + data[colour - 4 + old :]
    return data[: header - 4] + struct.pack(">I", whole - old + len(box)) + data[header:]


def test_its_profile_is_found() -> None:
    data = with_profile(save(picture(), "JPEG2000"), SRGB_PROFILE)
    raster = decode(data, ANY)
    assert raster.profile == SRGB_PROFILE
    assert np.array_equal(raster.pixels, picture())


def test_broken_boxes_hold_no_profile() -> None:
    data = with_profile(save(picture(), "JPEG2000"), SRGB_PROFILE)
    for end in range(0, 400, 7):
        assert profile_of(data[:end]) in (None, SRGB_PROFILE[: max(0, end - data.index(SRGB_PROFILE))])
    for size in (0, 1, 7, 2**32 - 1):
        at = data.index(b"jp2h")
        profile_of(data[: at - 4] + struct.pack(">I", size) + data[at:])


@pytest.mark.parametrize("no_jp2", [True, False])
def test_a_codestream_larger_than_its_header_is_not_decoded(no_jp2: bool) -> None:
    data = save(picture(), "JPEG2000", no_jp2=no_jp2)
    at = data.index(b"\xff\x4f\xff\x51") + 8
    for size, reason in (((60_000, 60_000), "too_many_pixels"), ((60_000, 1), "aspect_ratio")):
        lie = data[:at] + struct.pack(">II", *size) + data[at + 8 :]
        with pytest.raises(BadImage) as raised:
            decode(lie, Limits(min_side_px=1))
        assert raised.value.reason == reason
    with pytest.raises(BadImage) as raised:
        decode(data[: at + 32] + b"\x40\0" + data[at + 34 :], ANY)
    assert raised.value.reason == "unsupported"


def test_a_large_picture_is_decoded_at_a_reduced_scale() -> None:
    small = picture(500, 500)
    data = save(
        cv2.resize(small, (5_000, 4_000), interpolation=cv2.INTER_CUBIC), "JPEG2000", tile_size=(1024, 1024)
    )
    raster = decode(data, Limits(), 448, 0)
    assert (raster.width, raster.height) == (5_000, 4_000)
    assert raster.pixels.shape == (500, 625, 3)
    expected = cv2.resize(small, (625, 500), interpolation=cv2.INTER_CUBIC)
    assert np.abs(raster.pixels.astype(int) - expected).mean() < 3


@pytest.mark.parametrize(
    ("size", "shorter_px", "longer_px", "levels", "expected"),
    [
        ((5_000, 4_000), 448, 0, 6, 3),
        ((5_000, 4_000), 0, 672, 6, 2),
        ((5_000, 4_000), 448, 0, 2, 1),
        ((5_000, 4_000), 0, 0, 6, 0),
        ((5_000, 4_000), 4_000, 0, 6, 0),
        ((4_000, 4_000), 10, 0, 6, 0),
    ],
)
def test_halvings(size: tuple[int, int], shorter_px: int, longer_px: int, levels: int, expected: int) -> None:
    data = save(picture(128, 128), "JPEG2000", num_resolutions=levels)
    assert halvings(data, size, shorter_px, longer_px) == expected
