import hashlib
import re
from collections.abc import Callable, Iterable

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from diptych.pipelines.demo_data.scenes import (
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    Group,
    Scene,
    draw_scene,
    named_groups,
)

NUMBERS = {"a": 1, "two": 2, "three": 3}
PLURALS = {f"{shape}es" if shape.endswith("s") else f"{shape}s": shape for shape in SHAPES}


def _any(words: Iterable[str], name: str = "") -> str:
    return f"(?P<{name}>{'|'.join(words)})" if name else f"(?:{'|'.join(words)})"


NOUN = rf"(?P<noun>{_any([*PLURALS, *SHAPES])})\b"
GROUP = f"{_any(NUMBERS, 'number')} {_any(SIZES, 'size')} {_any(COLOURS, 'colour')} {NOUN}"
CLAUSE = (
    f"the ({_any(NUMBERS, 'number')} )?{NOUN} {_any(POSITIONS.values(), 'place')} "
    f"(?P<be>is|are) {_any(COLOURS, 'colour')} and {_any(SIZES, 'size')}"
)


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    return [draw_scene(seed=5, index=index) for index in range(400)]


class TestScene:
    def test_every_attribute_value_is_drawn(self, drawn: list[Scene]) -> None:
        groups = [scene.group for scene in drawn]
        assert len(SHAPES) >= 6
        assert len(COLOURS) >= 8
        assert {group.shape for group in groups} == set(SHAPES)
        assert {group.colour for group in groups} == set(COLOURS)
        assert {group.size for group in groups} == set(SIZES)
        assert {group.position for group in groups} == set(POSITIONS)
        assert {group.count for group in groups} == {1, 2, 3}

    def test_pictures_vary_in_size_and_aspect(self, drawn: list[Scene]) -> None:
        shapes = {scene.image.shape for scene in drawn}
        assert all(160 <= side <= 255 for height, width, _ in shapes for side in (height, width))
        assert len(shapes) > 250
        assert {height > width for height, width, _ in shapes} == {True, False}

    def test_another_seed_or_index_is_another_picture(self, drawn: list[Scene]) -> None:
        digests = {hashlib.sha256(scene.image.tobytes()).digest() for scene in drawn}
        digests |= {hashlib.sha256(draw_scene(6, i).image.tobytes()).digest() for i in range(50)}
        assert len(digests) == len(drawn) + 50

    def test_a_negative_index_is_refused(self) -> None:
        with pytest.raises(ValueError, match="non-negative"):
            draw_scene(1, -1)


def _blobs(scene: Scene, colour: str) -> list[npt.NDArray[np.uint8]]:
    """A mask for each connected patch of a colour word, by the palette's own tolerance."""
    low, high = (np.add(COLOURS[colour], step).clip(0, 255) for step in (-10, 10))
    mask = cv2.inRange(scene.image, low.astype(np.uint8), high.astype(np.uint8))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask)
    # Fewer pixels are a chance mixture on an antialiased edge.
    found = [label for label in range(1, len(stats)) if stats[label, cv2.CC_STAT_AREA] > 20]
    return [(labels == label).astype(np.uint8) for label in found]


def _recognise(blob: npt.NDArray[np.uint8]) -> str:
    """Tells a shape by its dents, corners and fill, not by the outlines it was drawn from."""
    enlarged = cv2.resize(blob * 255, None, fx=6, fy=6, interpolation=cv2.INTER_CUBIC)
    contours, _ = cv2.findContours(
        (enlarged > 127).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
    )
    contour = max(contours, key=cv2.contourArea)
    _, radius = cv2.minEnclosingCircle(contour)
    defects = cv2.convexityDefects(contour, cv2.convexHull(contour, returnPoints=False))
    depths = [] if defects is None else [depth / 256 / radius for *_, depth in defects.reshape(-1, 4)]
    dents = sum(depth > 0.2 for depth in depths)
    if dents:
        return "cross" if dents == 4 else "moon" if max(depths) > 0.6 else "heart"
    corners = len(cv2.approxPolyDP(contour, 0.15 * radius, closed=True))
    fill = cv2.contourArea(contour) / (np.pi * radius**2)
    return "triangle" if corners == 3 else "circle" if fill > 0.8 else "square"


class TestPixels:
    def test_the_group_is_there_in_its_colour_and_number_and_nothing_else(self, drawn: list[Scene]) -> None:
        for scene in drawn:
            found = {colour: len(_blobs(scene, colour)) for colour in COLOURS}
            assert found == {c: scene.group.count * (c == scene.group.colour) for c in COLOURS}, scene.index

    def test_each_shape_is_recognised(self, drawn: list[Scene]) -> None:
        for scene in drawn:
            shapes = {_recognise(blob) for blob in _blobs(scene, scene.group.colour)}
            assert shapes == {scene.group.shape}, (scene.index, scene.group)

    def test_small_and_large_are_far_apart(self, drawn: list[Scene]) -> None:
        extents: dict[str, list[float]] = {size: [] for size in SIZES}
        for scene in drawn:
            for blob in _blobs(scene, scene.group.colour):
                extent = max(cv2.boundingRect(blob)[2:]) / min(scene.image.shape[:2])
                extents[scene.group.size].append(extent)
        assert max(extents["small"]) * 1.1 < min(extents["large"])

    def test_the_group_is_where_it_is_said_to_be(self, drawn: list[Scene]) -> None:
        for scene in drawn:
            height, width, _ = scene.image.shape
            blobs = _blobs(scene, scene.group.colour)
            left, top, w, h = cv2.boundingRect(np.maximum.reduce(blobs))
            x, y = (left + w / 2) / width, (top + h / 2) / height
            across = "left" if x < 0.36 else "right" if x > 0.64 else "middle"
            down = "top" if y < 0.36 else "bottom" if y > 0.64 else "middle"
            assert sorted((across, down)) == sorted((scene.group.position, "middle")), scene.index


def _check(claim: re.Match[str], group: Group) -> None:
    """Checks every word of a phrase against the group."""
    words = {name: word for name, word in claim.groupdict().items() if word is not None}
    plural = words["noun"] in PLURALS
    assert PLURALS.get(words["noun"], words["noun"]) == group.shape
    assert words["colour"] == group.colour
    assert words["size"] == group.size
    assert NUMBERS[words.get("number", "a")] == group.count
    assert plural == (group.count > 1)
    assert words.get("be", "are" if plural else "is") == ("are" if plural else "is")
    assert words.get("place", POSITIONS[group.position]) == POSITIONS[group.position]


def _read(caption: str, group: Group) -> str:
    """Checks all that a caption says; returns its form."""

    def stand_in(mark: str) -> Callable[[re.Match[str]], str]:
        def check(claim: re.Match[str]) -> str:
            _check(claim, group)
            return mark

        return check

    form = re.sub(CLAUSE, stand_in("%"), caption)
    form = re.sub(GROUP, stand_in("#"), form)
    for there_be in re.findall(r"there (is|are) #", form):
        assert there_be == ("is" if group.count == 1 else "are")
    for place in re.findall(_any(POSITIONS.values()), form):
        assert place == POSITIONS[group.position]
    form = re.sub(r"there (is|are)", "there be", form)
    return re.sub(_any(POSITIONS.values()), "@", form)


class TestCaptions:
    def test_each_is_true_and_of_a_known_form(self, drawn: list[Scene]) -> None:
        forms = {_read(caption, scene.group) for scene in drawn for caption in scene.captions}
        assert forms == {
            *("# @", "there be # @", "there be # @ of the picture", "a picture of # @"),
            *("@ there be #", "@ of the picture there be #", "%"),
        }

    def test_five_a_scene_no_two_alike(self, drawn: list[Scene]) -> None:
        assert {len(set(scene.captions)) for scene in drawn} == {5}
        assert {len(scene.captions) for scene in drawn} == {5}

    def test_one_wording_is_among_those_of_every_scene(self, drawn: list[Scene]) -> None:
        assert all("# @" in [_read(caption, scene.group) for caption in scene.captions] for scene in drawn)

    @pytest.mark.parametrize(
        "lie",
        [
            "three small red hearts on the left",
            "two small red hearts on the right",
            "two large red hearts on the left",
            "two small blue hearts on the left",
            "two small red moons on the left",
            "two small red heart on the left",
            "there is two small red hearts on the left",
            "on the right there are two small red hearts",
            "the two hearts on the left is red and small",
        ],
    )
    def test_the_check_itself_catches_a_lie(self, lie: str) -> None:
        with pytest.raises(AssertionError):
            _read(lie, Group("heart", "red", "small", 2, "left"))


@pytest.mark.parametrize(
    ("caption", "groups"),
    [
        ("a large red heart", {("red", "heart")}),
        ("two small black crosses and an orange moon", {("black", "cross"), ("orange", "moon")}),
        ("the two crosses are black and the moon is orange", {("black", "cross"), ("orange", "moon")}),
        ("a red heart and a red heart", {("red", "heart")}),
        ("a heart, red", set()),
        ("a picture", set()),
    ],
)
def test_groups_that_a_caption_names(caption: str, groups: set[tuple[str, str]]) -> None:
    assert named_groups(caption) == groups


def test_every_caption_names_the_group_and_no_other(drawn: list[Scene]) -> None:
    for scene in drawn:
        for caption in scene.captions:
            assert named_groups(caption) == {(scene.group.colour, scene.group.shape)}
