"""The data set that the demo draws itself: captioned scenes of coloured shapes.

The demo trains and scores every model without a network, so it needs pictures whose captions are
known to be true. Scene ``index`` of ``seed`` is a pure function of the two, however many are drawn:

    python -c "from diptych.pipelines.demo_data.scenes import write_data_set as w; w('/tmp/scenes', 2000, seed=1)"
"""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

_Image = npt.NDArray[np.uint8]
_Points = npt.NDArray[np.float64]  # (N, 2): x to the right, y downwards


# RGB of each colour word; the pixels of an object are within _TINT of it.
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 30),
    "yellow": (250, 215, 40),
    "green": (40, 160, 70),
    "blue": (35, 90, 210),
    "purple": (125, 45, 165),
    "pink": (250, 120, 185),
    "black": (25, 25, 28),
    "white": (248, 248, 248),
}
# Radius of each size word, as a range of fractions of the picture's shorter side.
SIZES = {"small": (0.113, 0.122), "large": (0.196, 0.205)}
POSITIONS = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}
_TEXTURES = ("noise", "clouds", "gradient", "stripes", "checks")
_ANCHORS = {  # where a group's centre is, roughly, in widths and heights
    "left": (0.2, 0.5),
    "right": (0.8, 0.5),
    "top": (0.5, 0.2),
    "bottom": (0.5, 0.8),
    "middle": (0.5, 0.5),
}
_NUMBERS = ("a", "two", "three")
_TINT = 10
_REACH = 1.15  # the furthest point of any outline, in radii
_SHIFT = 4  # fractional bits of the coordinates that OpenCV is given

# Each slot gives one caption, which says all: a model that draws from it has nothing to guess but the background. The
# first has a single form: a wording that every picture has among its references is one that a captioner can settle on.
_SLOTS = (
    ("{group} {place}",),
    ("there {be} {group} {place}", "there {be} {group} {place} of the picture"),
    ("a picture of {group} {place}",),
    ("{place} there {be} {group}", "{place} of the picture there {be} {group}"),
    ("the {these} {place} {be} {colour} and {size}",),
)


def _around(degrees: npt.ArrayLike, radii: npt.ArrayLike) -> _Points:
    """Points around the origin, by angle clockwise from the top and distance."""
    angles = np.radians(degrees)
    points: _Points = np.stack([np.sin(angles), -np.cos(angles)], axis=1) * np.reshape(radii, (-1, 1))
    return points


def _heart() -> _Points:
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2.5], axis=1) / 15.5


def _moon() -> _Points:
    # Two arcs between the same tips, shifted so that the whole is centred.
    bow, bite = _around(np.linspace(140, 400, 48), 1), _around(np.linspace(370.6, 169.4, 40), 0.779)
    return np.concatenate([np.add(bow, (0.15, 0)), np.add(bite, (0.65, 0))])


# The outline of each shape word, for a radius of 1.
SHAPES: dict[str, _Points] = {
    "circle": _around(np.arange(0, 360, 6), 0.95),
    "square": _around([45, 135, 225, 315], 1.15),
    "triangle": _around([0, 120, 240], 1.15),
    "cross": _around(np.add.outer([0, 90, 180, 270], [-19, 19, 45]).ravel(), [1.1, 1.1, 0.51] * 4),
    "heart": _heart(),
    "moon": _moon(),
}


@dataclass(frozen=True)
class Group:
    """One to three equal shapes that stand together.

    Attributes:
        shape: A key of ``SHAPES``.
        colour: A key of ``COLOURS``.
        size: A key of ``SIZES``.
        count: How many there are, 1 to 3.
        position: A key of ``POSITIONS``.
    """

    shape: str
    colour: str
    size: str
    count: int
    position: str


@dataclass(frozen=True, eq=False)  # == on pixels has no single truth value
class Scene:
    """A picture and what is true of it.

    Attributes:
        index: The scene's ordinal in its data set; its key is ``scene_key(index)``.
        image: (H, W, 3) RGB, each side 160 to 255 px.
        captions: Five true sentences, no two alike, each of all that there is to say of the group.
        group: What is on it.
    """

    index: int
    image: npt.NDArray[np.uint8]
    captions: tuple[str, ...]
    group: Group


def scene_key(index: int) -> str:
    """Names scene ``index`` as every layout does, e.g. ``000000000123``."""
    return f"{index:012d}"


def draw_scene(seed: int, index: int) -> Scene:
    """Draws scene ``index`` of ``seed`` (neither negative): the same in any process."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    group = _choose_group(rng)
    short = int(rng.integers(160, 221))
    long = round(short * rng.uniform(1, 1.15))
    width, height = (long, short) if rng.random() < 0.6 else (short, long)
    image = _draw_background(rng, width, height)
    outlines = _place(rng, group, width, height)
    _draw_shadows(image, outlines, short / 70)
    tint = np.add(COLOURS[group.colour], rng.integers(-_TINT, _TINT + 1, 3)).clip(0, 255)
    cv2.fillPoly(image, outlines, tint.tolist(), cv2.LINE_AA, _SHIFT)
    return Scene(index, image, _describe(rng, group), group)


def named_groups(caption: str) -> set[tuple[str, str]]:
    """Returns the (colour, shape) of each group that a caption names; a model's may name several."""
    words = caption.split()
    nouns = {form: shape for shape in SHAPES for form in (shape, f"{shape}s", f"{shape}es")}
    # "a large red heart", "the hearts are red": a colour goes with the noun after it, or with the one before its "is"
    found, colour, noun = set(), None, None
    for before, word in zip(["", *words], words, strict=False):
        if word in COLOURS:
            if before in ("is", "are") and noun is not None:
                found.add((word, noun))
            else:
                colour = word
        elif word in nouns:
            noun = nouns[word]
            if colour is not None:
                found.add((colour, noun))
            colour = None
    return found


def _choose_group(rng: np.random.Generator) -> Group:
    shape, colour, size, position = (
        str(rng.choice(list(words))) for words in (SHAPES, COLOURS, SIZES, POSITIONS)
    )
    # More than two large ones fit only as a cluster in the middle
    most = 2 if size == "large" and position != "middle" else 3
    return Group(shape, colour, size, int(rng.integers(1, most + 1)), position)


def _lay_out(position: str, count: int) -> _Points:
    """Centres of ``count`` shapes around their common one, in steps."""
    line, zeros = np.arange(count) - (count - 1) / 2, np.zeros(count)
    if position in ("left", "right"):
        return np.stack([zeros, line], axis=1)
    if position == "middle" and count == 3:
        return np.array([[-0.5, 0.5], [0.5, 0.5], [0, -0.5]])
    return np.stack([line, zeros], axis=1)


def _place(rng: np.random.Generator, group: Group, width: int, height: int) -> list[npt.NDArray[np.int32]]:
    """Outlines of the shapes of a group, in units of 1 / 2**_SHIFT px."""
    frame = np.array([width, height], dtype=float)
    radius = min(width, height) * rng.uniform(*SIZES[group.size])
    # Loose where there is room, never so tight that two shapes touch.
    room = (0.97 * frame.min() / radius - 2 * _REACH) / max(1, group.count - 1)
    step = radius * rng.uniform(2.4, np.clip(room, 2.4, 2.7))
    centres = step * _lay_out(group.position, group.count)
    centres += (_ANCHORS[group.position] + rng.uniform(-0.02, 0.02, 2)) * frame
    margin = _REACH * radius + 2
    centres += np.clip(0, margin - centres.min(axis=0), frame - margin - centres.max(axis=0))
    outlines = []
    for centre in centres:
        turn = np.radians(rng.uniform(-8, 8))
        rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        points = SHAPES[group.shape] @ rotation * radius + centre
        outlines.append(np.rint(points * 2**_SHIFT).astype(np.int32))
    return outlines


def _draw_background(rng: np.random.Generator, width: int, height: int) -> _Image:
    """A texture between two near, muted, middling shades: every object's colour stands out."""
    hue, saturation, value = rng.uniform((0, 0.04, 0.5), (1, 0.22, 0.64))
    other_value = value + rng.uniform(0.05, 0.11)
    dark, light = (colorsys.hsv_to_rgb(hue, saturation, v) for v in (value, other_value))
    ramp = (np.linspace(dark, light, 256) * 255).astype(np.uint8)  # (256, 3)
    field = _draw_texture(rng, str(rng.choice(_TEXTURES)), width, height)
    return np.asarray(cv2.applyColorMap((field * 255).astype(np.uint8), ramp[:, None]), np.uint8)


def _draw_texture(rng: np.random.Generator, kind: str, width: int, height: int) -> npt.NDArray[np.float32]:
    """A field of values from 0 to 1, (height, width)."""
    if kind == "noise":
        return rng.random((height, width), dtype=np.float32)
    if kind == "clouds":
        knots = rng.random((6, 8), dtype=np.float32)
        clouds = cv2.resize(knots, (width, height), interpolation=cv2.INTER_CUBIC)
        return np.asarray(clouds, np.float32).clip(0, 1)
    angle, scale = rng.uniform(0, math.pi), 2 * math.pi / rng.uniform(12, 30)
    cos, sin = math.cos(angle), math.sin(angle)  # numpy's own would widen the field to float64
    x = np.arange(width, dtype=np.float32)
    y = np.arange(height, dtype=np.float32)[:, None]
    along, across = x * cos + y * sin, y * cos - x * sin
    if kind == "gradient":
        along -= along.min()
        return np.asarray(along / along.max(), np.float32)
    # Steep sines, cut off: bands with soft edges.
    bands = 4 * np.sin(scale * along)
    if kind == "checks":
        bands *= np.sin(scale * across)
    return (0.5 + bands).clip(0, 1)


def _draw_shadows(image: _Image, outlines: Sequence[npt.NDArray[np.int32]], blur_px: float) -> None:
    """Darkens the background below and to the right of what will be drawn on it."""
    light = np.full(image.shape[:2], 255, dtype=np.uint8)
    offset = round(blur_px * 2**_SHIFT)
    cv2.fillPoly(light, [points + offset for points in outlines], (150,), cv2.LINE_AA, _SHIFT)
    light = np.asarray(cv2.GaussianBlur(light, (0, 0), blur_px), dtype=np.uint8)
    cv2.multiply(image, cv2.merge([light] * 3), dst=image, scale=1 / 255)


def _describe(rng: np.random.Generator, group: Group) -> tuple[str, ...]:
    """Five captions, one from each slot, in random order."""
    words = _words(group)
    captions = [slot[rng.integers(len(slot))].format_map(words) for slot in _SLOTS]
    return tuple(captions[i] for i in rng.permutation(len(captions)))


def _words(group: Group) -> dict[str, str]:
    """What the templates may say of a group."""
    one = group.count == 1
    noun = group.shape if one else {"cross": "crosses"}.get(group.shape, f"{group.shape}s")
    number = _NUMBERS[group.count - 1]
    return {
        "group": f"{number} {group.size} {group.colour} {noun}",
        "these": noun if one else f"{number} {noun}",
        "be": "is" if one else "are",
        "colour": group.colour,
        "size": group.size,
        "place": POSITIONS[group.position],
    }
