import io
import struct
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from profiles import (
    ADOBE_RGB,
    CURVES,
    DISPLAY_P3,
    SPACES,
    SRGB,
    SRGB_CURVE,
    SRGB_PROFILE,
    cmyk_profile,
    gamma_curve,
    grey_profile,
    parametric_curve,
    profile_of,
    rgb_profile,
)

from diptych.transforms.images import colour
from diptych.transforms.images.colour import to_srgb

Array = np.ndarray[Any, Any]


def by_little_cms(pixels: Array, profile: bytes, mode: str) -> Array:
    converted = ImageCms.profileToProfile(
        Image.fromarray(pixels, mode),
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        outputMode="RGB",
    )
    return np.asarray(converted).astype(int)


def colours(channels: int = 3) -> Array:
    return np.random.default_rng(0).integers(0, 256, (60, 70, channels), np.uint8).squeeze()


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("version", [2, 4])
def test_a_matrix_profile_is_applied_as_little_cms_does(space: str, curve: str, version: int) -> None:
    profile = rgb_profile(SPACES[space], CURVES[curve], version)
    converted, changed = to_srgb(colours(), profile)
    expected = by_little_cms(colours(), profile, "RGB")
    assert converted.dtype == np.uint8
    # the tables are exact where Little CMS interpolates
    assert np.abs(converted - expected).max() <= 3
    is_srgb = space == "sRGB" and curve in ("table of sRGB", "parametric 3")
    assert changed is not is_srgb
    assert np.array_equal(converted, colours()) is is_srgb


def test_the_tables_are_used_for_common_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are a tenth of the cost."""
    profiles = [rgb_profile(ADOBE_RGB, gamma_curve(2.19921875)), rgb_profile(DISPLAY_P3, SRGB_CURVE, 4)]
    expected = [by_little_cms(colours(), profile, "RGB") for profile in profiles]
    for profile in profiles:
        to_srgb(colours(), profile)
    monkeypatch.setattr(ImageCms, "applyTransform", None)
    for profile, known in zip(profiles, expected, strict=True):
        converted, changed = to_srgb(colours(), profile)
        assert changed
        assert np.abs(converted - known).max() <= 2


def test_known_colours() -> None:
    """The greens of Display P3 and Adobe RGB are out of sRGB; their greys, and what sRGB has too, are not."""
    display_p3 = rgb_profile(DISPLAY_P3, SRGB_CURVE, 4)
    pixels = np.array([[[0, 255, 0], [128, 128, 128], [234, 51, 35], [255, 255, 255]]], np.uint8)
    converted, _ = to_srgb(pixels, display_p3)
    assert np.abs(converted - [[[0, 255, 0], [128, 128, 128], [255, 0, 0], [255, 255, 255]]]).max() <= 3
    adobe_rgb = rgb_profile(ADOBE_RGB, gamma_curve(2.19921875))
    converted, _ = to_srgb(np.array([[[219, 0, 0], [144, 255, 60]]], np.uint8), adobe_rgb)
    assert np.abs(converted - [[[255, 0, 0], [0, 255, 0]]]).max() <= 3


@pytest.mark.parametrize(
    "profile",
    [
        SRGB_PROFILE,
        rgb_profile(SRGB, SRGB_CURVE),
        rgb_profile(SRGB, SRGB_CURVE, 4),
        rgb_profile(SRGB, CURVES["table of sRGB"]),
        rgb_profile(SRGB, SRGB_CURVE) + bytes(100),
    ],
)
def test_profiles_of_srgb_change_nothing(profile: bytes) -> None:
    pixels = colours()
    converted, changed = to_srgb(pixels, profile)
    assert converted is pixels
    assert not changed


def broken_profiles() -> list[bytes]:
    good = rgb_profile(ADOBE_RGB, gamma_curve(2.2))
    return [
        b"",
        b"profile",
        bytes(128),
        good[:100],
        good[:140],
        good[:300],
        good[:36] + b"nope" + good[40:],
        good[:128] + b"\xff\xff\xff\xff" + good[132:],
        good.replace(b"rTRC", b"none"),
        good.replace(b"rXYZ", b"none"),
        rgb_profile(ADOBE_RGB, b"nope\0\0\0\0" + bytes(20)),
        rgb_profile(ADOBE_RGB, b"curv\0\0\0\0\x7f\xff\xff\xff\0\0"),
        rgb_profile(ADOBE_RGB, parametric_curve(9, 2.2)),
        rgb_profile(ADOBE_RGB, parametric_curve(4, 2.2)),
    ]


@pytest.mark.parametrize("profile", broken_profiles())
def test_a_broken_profile_is_ignored(profile: bytes) -> None:
    pixels = colours()
    converted, changed = to_srgb(pixels, profile)
    assert converted is pixels
    assert not changed


@pytest.mark.parametrize(
    ("channels", "profile"),
    [
        (3, grey_profile(gamma_curve(1.0))),
        (3, cmyk_profile()),
        (1, rgb_profile(ADOBE_RGB, gamma_curve(2.2))),
        (1, cmyk_profile()),
        (4, rgb_profile(ADOBE_RGB, gamma_curve(2.2))),
        (4, grey_profile(gamma_curve(1.0))),
        (3, profile_of(b"Lab ", b"XYZ ", b"spac", {})),
        (3, profile_of(b"RGB ", b"Lab ", b"link", {})),
    ],
)
def test_a_profile_of_another_space_is_ignored(channels: int, profile: bytes) -> None:
    pixels = colours(channels)
    converted, changed = to_srgb(pixels, profile)
    assert not changed
    assert np.array_equal(converted, to_srgb(pixels, None)[0])


def test_without_profile() -> None:
    pixels = colours()
    assert to_srgb(pixels, None) == (pixels, False)
    grey, changed = to_srgb(colours(1), None)
    assert not changed
    assert np.array_equal(grey, colours(1)[..., None] * np.ones(3, np.uint8))
    inks = np.array(
        [[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255], [0, 0, 0, 128]]], np.uint8
    )
    rgb, changed = to_srgb(inks, None)
    assert not changed
    assert np.abs(rgb - [[[255] * 3, [0, 255, 255], [255, 0, 0], [0] * 3, [127] * 3]]).max() <= 1


@pytest.mark.parametrize("curve", ["linear", "gamma 1.8", "table of 3", "parametric 1"])
def test_grey_profiles(curve: str) -> None:
    profile = grey_profile(CURVES[curve])
    converted, changed = to_srgb(colours(1), profile)
    assert changed
    assert converted.shape == (60, 70, 3)
    assert np.array_equal(converted, by_little_cms(colours(1), profile, "L"))
    assert np.ptp(converted.astype(int), axis=2).max() <= 1
    assert np.abs(converted[..., 0].astype(int) - colours(1)).max() > 5


def test_cmyk_profiles() -> None:
    inks = np.array([[[0, 0, 0, 0], [255, 255, 255, 0], [9, 99, 199, 255], [0, 0, 0, 128]]], np.uint8)
    converted, changed = to_srgb(inks, cmyk_profile())
    assert changed
    assert np.abs(converted - np.array([[[255] * 3, [255] * 3, [0] * 3, [118] * 3]])).max() <= 3
    assert np.array_equal(
        to_srgb(colours(4), cmyk_profile())[0], by_little_cms(colours(4), cmyk_profile(), "CMYK")
    )


def test_pixels_in_any_order_of_memory() -> None:
    profile = rgb_profile(ADOBE_RGB, gamma_curve(2.2))
    expected = to_srgb(colours(), profile)[0]
    for view in (np.s_[::-1], np.s_[:, ::-1], np.s_[5:50, 3:40]):
        assert np.array_equal(to_srgb(colours()[view], profile)[0], expected[view])
    assert np.array_equal(to_srgb(colours().swapaxes(0, 1), profile)[0], expected.swapaxes(0, 1))
    read_only = colours()
    read_only.flags.writeable = False
    assert np.array_equal(to_srgb(read_only, profile)[0], expected)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_profiles_raise_nothing(seed: int) -> None:
    generator = np.random.default_rng(seed)
    good = [
        rgb_profile(DISPLAY_P3, SRGB_CURVE, 4),
        rgb_profile(ADOBE_RGB, CURVES["table of 3"]),
        SRGB_PROFILE,
        grey_profile(gamma_curve(1.8)),
        cmyk_profile(),
    ]
    for _ in range(80):
        number = int(generator.integers(len(good)))
        mutated = bytearray(good[number])
        for _ in range(int(generator.integers(1, 6))):
            at = int(
                generator.integers(min(len(mutated), (132, 600, len(mutated))[int(generator.integers(3))]))
            )
            mutated[at] = int(generator.integers(256))
        pixels = colours((3, 3, 3, 1, 4)[number])
        converted, changed = to_srgb(pixels, bytes(mutated))
        assert (converted.shape, converted.dtype) == ((60, 70, 3), np.uint8)
        if not changed:
            assert np.array_equal(converted, to_srgb(pixels, None)[0])


def test_threads_do_not_share_a_transform() -> None:
    """A transform of Little CMS keeps its last colour; and what a dead thread left behind does no harm."""
    profile = grey_profile(gamma_curve(1.8))
    expected = to_srgb(colours(1), profile)[0]
    barrier = threading.Barrier(4)

    def convert_often(_: int) -> bool:
        barrier.wait()
        return all(np.array_equal(to_srgb(colours(1), profile)[0], expected) for _ in range(50))

    for _ in range(2):
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(convert_often, range(4)))


def test_what_is_kept_of_profiles_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set may have a profile of its own for each image, made by an attacker or by a scanner."""
    converters = colour._Converters()
    grey = grey_profile(gamma_curve(1.8))
    for i in range(300):
        assert converters.of(grey + i.to_bytes(2, "big") + bytes(100_000), 1) is not None
        assert converters.of(b"junk" + i.to_bytes(2, "big") + bytes(100_000), 3) is None
    kept = converters._kept.values()
    assert converters._num_bytes == sum(conversion.num_bytes for conversion in kept) <= 16 << 20
    assert len(kept) <= 256
    made = []
    monkeypatch.setattr(colour, "_conversion", lambda *args: made.append(args))
    assert converters.of(grey + (299).to_bytes(2, "big") + bytes(100_000), 1) is not None
    assert made == []


def test_a_giant_profile_is_ignored() -> None:
    profile = grey_profile(gamma_curve(1.8))
    assert to_srgb(colours(1), profile + bytes(1_000_000))[1] is True
    assert to_srgb(colours(1), profile + bytes(9_000_000))[1] is False


def test_tags_of_the_same_bytes_cost_no_memory() -> None:
    tags = [struct.pack(">4sII", b"%04d" % i, 0, 4_000_000) for i in range(100)]
    profile = bytes(128) + struct.pack(">I", 100) + b"".join(tags) + bytes(4_000_000)
    tracemalloc.start()
    try:
        assert len(colour._tags(profile)) == 100
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
