import hashlib
import re
from collections.abc import Callable, Iterable

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from pipelines.scenes import (
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    draw_scene,
    named_groups,
)

NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
PLURALS = {f"{shape}es" if shape.endswith("s") else f"{shape}s": shape for shape in SHAPES}
RELATIONS = {"to the left of": "left", "to the right of": "right", "above": "top", "below": "bottom"}


def _any(words: Iterable[str], name: str = "") -> str:
    return f"(?P<{name}>{'|'.join(words)})" if name else f"(?:{'|'.join(words)})"


NOUN = rf"(?P<noun>{_any([*PLURALS, *SHAPES])})\b"
GROUP = f"{_any(NUMBERS, 'number')} ({_any(SIZES, 'size')} )?{_any(COLOURS, 'colour')} {NOUN}"
CLAUSE = (
    f"the ({_any(NUMBERS, 'number')} )?{NOUN} ({_any(POSITIONS.values(), 'place')} )?"
    f"(?P<be>is|are) {_any(COLOURS, 'colour')}( and {_any(SIZES, 'size')})?"
)


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    return [draw_scene(seed=5, index=index) for index in range(400)]


class TestScene:
    def test_every_attribute_value_is_drawn(self, drawn: list[Scene]) -> None:
        objects = [thing for scene in drawn for thing in scene.objects]
        assert len(SHAPES) >= 6
        assert len(COLOURS) >= 8
        assert {thing.shape for thing in objects} == set(SHAPES)
        assert {thing.colour for thing in objects} == set(COLOURS)
        assert {thing.size for thing in objects} == set(SIZES)
        assert {thing.position for thing in objects} == set(POSITIONS)
        assert {thing.count for thing in objects} == {1, 2, 3, 4}
        assert {len(scene.objects) for scene in drawn} == {1, 2}

    def test_groups_of_a_scene_differ_in_shape_colour_and_place(self, drawn: list[Scene]) -> None:
        pairs = [scene.objects for scene in drawn if len(scene.objects) == 2]
        assert all(one.shape != two.shape and one.colour != two.colour for one, two in pairs)
        assert {(one.position, two.position) for one, two in pairs} == {("left", "right"), ("top", "bottom")}

    def test_pictures_vary_in_size_and_aspect(self, drawn: list[Scene]) -> None:
        shapes = {scene.image.shape for scene in drawn}
        assert all(160 <= side <= 320 for height, width, _ in shapes for side in (height, width))
        assert len(shapes) > 300
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
        return {5: "star", 4: "cross"}.get(dents) or ("moon" if max(depths) > 0.6 else "heart")
    corners = len(cv2.approxPolyDP(contour, 0.15 * radius, closed=True))
    fill = cv2.contourArea(contour) / (np.pi * radius**2)
    return "triangle" if corners == 3 else "circle" if fill > 0.8 else "square" if fill > 0.55 else "diamond"


class TestPixels:
    def test_each_group_is_there_in_its_colour_and_number_and_nothing_else(self, drawn: list[Scene]) -> None:
        for scene in drawn:
            counts = {thing.colour: thing.count for thing in scene.objects}
            found = {colour: len(_blobs(scene, colour)) for colour in COLOURS}
            assert found == {colour: counts.get(colour, 0) for colour in COLOURS}, scene.index

    def test_each_shape_is_recognised(self, drawn: list[Scene]) -> None:
        for scene in drawn:
            for thing in scene.objects:
                shapes = {_recognise(blob) for blob in _blobs(scene, thing.colour)}
                assert shapes == {thing.shape}, (scene.index, thing)

    def test_small_and_large_are_far_apart(self, drawn: list[Scene]) -> None:
        extents: dict[str, list[float]] = {size: [] for size in SIZES}
        for scene in drawn:
            for thing in scene.objects:
                for blob in _blobs(scene, thing.colour):
                    extent = max(cv2.boundingRect(blob)[2:]) / min(scene.image.shape[:2])
                    extents[thing.size].append(extent)
        assert max(extents["small"]) * 1.2 < min(extents["large"])

    def test_each_group_is_where_it_is_said_to_be(self, drawn: list[Scene]) -> None:
        for scene in drawn:
            height, width, _ = scene.image.shape
            boxes = []
            for thing in scene.objects:
                left, top, w, h = cv2.boundingRect(np.maximum.reduce(_blobs(scene, thing.colour)))
                boxes.append((left / width, top / height, (left + w) / width, (top + h) / height))
                x, y = (left + w / 2) / width, (top + h / 2) / height
                across = "left" if x < 0.36 else "right" if x > 0.64 else "middle"
                down = "top" if y < 0.36 else "bottom" if y > 0.64 else "middle"
                assert sorted((across, down)) == sorted((thing.position, "middle")), (scene.index, thing)
            if len(boxes) == 2:
                axis = 0 if scene.objects[0].position == "left" else 1
                assert boxes[0][axis + 2] < boxes[1][axis], scene.index


def _check(claim: re.Match[str], objects: tuple[SceneObject, ...]) -> SceneObject:
    """Finds the group that a phrase speaks of, and checks every word of the phrase against it."""
    words = {name: word for name, word in claim.groupdict().items() if word is not None}
    plural = words["noun"] in PLURALS
    shape = PLURALS.get(words["noun"], words["noun"])
    (thing,) = (each for each in objects if each.shape == shape)
    number = words.get("number", "a")
    assert words["colour"] == thing.colour
    assert words.get("size", thing.size) == thing.size
    assert NUMBERS[number] == thing.count
    assert plural == (thing.count > 1)
    assert words.get("be", "are" if plural else "is") == ("are" if plural else "is")
    assert words.get("place", POSITIONS[thing.position]) == POSITIONS[thing.position]
    if claim.re.pattern == GROUP:
        following = claim[0].split()[1]
        assert (number == "an") == (number in ("a", "an") and following[0] in "aeiou")
    return thing


def _read(caption: str, objects: tuple[SceneObject, ...]) -> tuple[str, list[SceneObject]]:
    """Checks all that a caption says; returns its form and the groups it names, in order."""
    named: list[SceneObject] = []

    def stand_in(mark: str) -> Callable[[re.Match[str]], str]:
        def check(claim: re.Match[str]) -> str:
            named.append(_check(claim, objects))
            return f"{mark}{objects.index(named[-1])}"

        return check

    form = re.sub(CLAUSE, stand_in("%"), caption)
    form = re.sub(GROUP, stand_in("#"), form)
    for there_be, index in re.findall(r"there (is|are) #(\d)", form):
        assert there_be == ("is" if objects[int(index)].count == 1 else "are")
    after = re.findall(rf"#(\d) ({_any(POSITIONS.values())})", form)
    before = re.findall(rf"^({_any(POSITIONS.values())}).* there \w+ #(\d)", form)
    for index, place in after + [pair[::-1] for pair in before]:
        assert place == POSITIONS[objects[int(index)].position]
    for first, relation, second in re.findall(rf"#(\d) ({_any(RELATIONS)}) #(\d)", form):
        assert first != second
        assert objects[int(first)].position == RELATIONS[relation]
    form = re.sub(r"there (is|are)", "there be", re.sub(r"\d", "", form))
    form = re.sub(_any(POSITIONS.values()), "@", form)
    return re.sub(_any(RELATIONS), "~", form), named


class TestCaptions:
    def test_each_is_true_and_of_a_known_form(self, drawn: list[Scene]) -> None:
        forms: dict[int, set[str]] = {1: set(), 2: set()}
        for scene in drawn:
            read = [_read(caption, scene.objects) for caption in scene.captions]
            forms[len(scene.objects)] |= {form for form, _ in read}
        assert forms[1] == {
            *("# @", "there be # @", "there be # @ of the picture", "a picture of #"),
            *("@ there be #", "@ of the picture there be #", "%"),
        }
        assert forms[2] == {
            *("# ~ #", "# @ and # @", "a picture of # and #"),
            *("there be # ~ #", "@ there be #", "% and %"),
        }

    def test_each_names_the_main_object(self, drawn: list[Scene]) -> None:
        for scene in drawn:
            for caption in scene.captions:
                assert scene.objects[0] in _read(caption, scene.objects)[1], caption

    def test_five_a_scene_no_two_alike(self, drawn: list[Scene]) -> None:
        assert {len(set(scene.captions)) for scene in drawn} == {5}
        assert {len(scene.captions) for scene in drawn} == {5}

    def test_the_wording_that_all_scenes_share_says_everything(self, drawn: list[Scene]) -> None:
        for scene in drawn:
            form = "# @" if len(scene.objects) == 1 else "# ~ #"
            full = [c for c in scene.captions if _read(c, scene.objects)[0] == form]
            assert [all(thing.size in c for thing in scene.objects) for c in full].count(True) >= 1

    @pytest.mark.parametrize(
        "lie",
        [
            "three small red stars on the left",
            "two small red stars on the right",
            "two large red stars on the left",
            "two small blue stars on the left",
            "two small red star on the left",
            "there is two red stars on the left",
            "on the right there are two red stars",
            "the two stars is red and small",
            "two red stars to the right of an orange moon",
            "two red stars to the left of a orange moon",
        ],
    )
    def test_the_check_itself_catches_a_lie(self, lie: str) -> None:
        stars = SceneObject("star", "red", "small", 2, "left")
        moon = SceneObject("moon", "orange", "large", 1, "right")
        with pytest.raises(AssertionError):
            _read(lie, (stars, moon))


@pytest.mark.parametrize(
    ("caption", "groups"),
    [
        ("a large red star", {("red", "star")}),
        ("two small black crosses above an orange moon", {("black", "cross"), ("orange", "moon")}),
        ("the two crosses are black and the moon is orange", {("black", "cross"), ("orange", "moon")}),
        ("a red star and a red star", {("red", "star")}),
        ("a star, red", set()),
        ("a picture", set()),
    ],
)
def test_groups_that_a_caption_names(caption: str, groups: set[tuple[str, str]]) -> None:
    assert named_groups(caption) == groups


def test_every_caption_names_the_main_object_and_no_other_than_is_there(drawn: list[Scene]) -> None:
    for scene in drawn:
        groups = [(thing.colour, thing.shape) for thing in scene.objects]
        for caption in scene.captions:
            assert named_groups(caption) <= set(groups)
            assert groups[0] in named_groups(caption)
