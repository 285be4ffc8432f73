"""Images from text on drawn scenes: do they show what they are told? A classifier that knows the truth looks.

    diptych demo && python benchmarks/scenes.py --demo demo

It is trained on scenes of its own (another seed than the demo's), and its accuracy on further ones is printed first.
Then the demo's models draw prompts of groups (number, size, colour, shape and place) that no training scene has, in any
words, and the classifier says how many images show the right colour and the right shape, and both. Beside that: how far
two samples of one prompt are from each other.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import pyarrow.dataset
import torch
from torch import Tensor, nn

from diptych.models.base import ImageOptions
from diptych.models.metrics.image_scores import pairwise_distances
from diptych.models.pixels import decode_pixels
from diptych.models.spec import ModelSpec
from diptych.pipelines.demo_data.scenes import COLOURS, SHAPES, draw_scene
from diptych.pipelines.generate import generate
from diptych.pipelines.options.generate import GenerateOptions

_SEED = 977  # of the classifier's scenes
_COLOURS, _SHAPES = [*COLOURS], [*SHAPES]
_BATCH = 64
_MAX_SCENES = 20_000
_OTHER_WORDS = frozenset(("a", "and", "are", "at", "in", "is", "of", "on", "picture", "the", "there"))


class Probe(nn.Module):
    """Colour and shape of the group of a scene."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in (
            (3, width, 1),
            (width, 2 * width, 2),
            (2 * width, 2 * width, 1),
            (2 * width, 4 * width, 2),
            (4 * width, 4 * width, 1),
            (4 * width, 4 * width, 2),
        ):
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.Linear(4 * width, len(_COLOURS) + len(_SHAPES))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits of colours and shapes of (N, S, S, 3) uint8."""
        images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        found = self.heads(self.trunk(images.contiguous(memory_format=torch.channels_last)).amax((2, 3)))
        return found[:, : len(_COLOURS)], found[:, len(_COLOURS) :]


def scenes(size_px: int, first: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """Yields scenes as a training at this size sees them: pixels, colour, shape."""
    for index in itertools.count(first):
        scene = draw_scene(_SEED, index)
        image = cv2.resize(scene.image, (224, 224), interpolation=cv2.INTER_AREA)
        image = cv2.resize(image, (size_px, size_px), interpolation=cv2.INTER_AREA)
        yield image, _COLOURS.index(scene.group.colour), _SHAPES.index(scene.group.shape)


def train_probe(size_px: int, steps: int) -> Probe:
    """Returns a classifier, trained on scenes that it sees once each."""
    torch.manual_seed(0)
    probe = Probe().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(probe.parameters(), 2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    source = scenes(size_px, 0)
    for step in range(steps):
        images, colours, shapes = zip(*itertools.islice(source, _BATCH), strict=True)
        with torch.autocast("cpu", torch.bfloat16):
            of_colour, of_shape = probe(torch.from_numpy(np.stack(images)))
        loss = nn.functional.cross_entropy(of_colour.float(), torch.tensor(colours))
        loss = loss + nn.functional.cross_entropy(of_shape.float(), torch.tensor(shapes))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"probe: step {step}/{steps}, loss {loss.item():.3f}", file=sys.stderr, flush=True)
    return probe.eval()


def look(probe: Probe, images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns colours and shapes, as the classifier sees them."""
    colours, shapes = [], []
    with torch.inference_mode():
        for start in range(0, len(images), 256):
            of_colour, of_shape = probe(torch.from_numpy(np.stack(images[start : start + 256])))
            colours.append(of_colour.argmax(1).numpy())
            shapes.append(of_shape.argmax(1).numpy())
    return np.concatenate(colours), np.concatenate(shapes)


def new_prompts(demo: Path, most: int) -> list[tuple[str, int, int]]:
    """Returns prompts of groups that no training scene shows, in any words, with their colour and shape."""
    table = pyarrow.dataset.dataset(demo / "train" / "images").to_table(columns=["captions"])
    known = {_group(caption) for captions in table["captions"].to_pylist() for caption in captions}
    found: dict[str, tuple[str, int, int]] = {}
    for index in range(_MAX_SCENES):
        scene = draw_scene(_SEED + 1, index)
        right = _COLOURS.index(scene.group.colour), _SHAPES.index(scene.group.shape)
        if _group(scene.captions[0]) not in known:
            found |= {caption: (caption, *right) for caption in scene.captions}
        if len(found) >= most:
            break
    if not found:
        sys.exit(
            f"the demo has seen every group there is in {_MAX_SCENES:,} scenes. Draw fewer for it: --scenes."
        )
    return list(found.values())[:most]


def _group(caption: str) -> frozenset[str]:
    """Returns the words that say something, in no order: number, size, colour, shape and place."""
    return frozenset(caption.split()) - _OTHER_WORDS


def draw(model: str, prompts: Sequence[str], samples: int) -> list[np.ndarray]:
    """Returns the samples of each prompt, one prompt after the other."""
    kind, _, location = model.partition(":")
    with tempfile.TemporaryDirectory() as scratch:
        source, out = os.path.join(scratch, "prompts.txt"), os.path.join(scratch, "out")
        Path(source).write_text("\n".join(prompts) + "\n")
        spec = ModelSpec(kind, location, ImageOptions())
        generate(GenerateOptions((source,), out, model=spec, quiet=True, images_per_prompt=samples))
        table = pyarrow.dataset.dataset(os.path.join(out, "generated")).to_table().to_pylist()
    table.sort(key=lambda row: (row["key"], row["sample"]))
    return [decode_pixels(row["image"]["bytes"], 0) for row in table]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="folder of `diptych demo`")
    parser.add_argument(
        "--models", metavar="KIND:LOC,…", help="trained on DEMO/train (default those of DEMO)"
    )
    parser.add_argument("--size", type=int, default=64, metavar="PX", help="of the models' images")
    parser.add_argument("--prompts", type=int, default=500, metavar="N", help="at most (default 500)")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="of the classifier's training")
    parser.add_argument("--probe", type=Path, help="keep the classifier here, or take it from here")
    args = parser.parse_args()
    begun = time.monotonic()
    probe = Probe().eval()
    if args.probe and args.probe.exists():
        probe.load_state_dict(torch.load(args.probe, weights_only=True))
    else:
        probe = train_probe(args.size, args.steps)
        if args.probe:
            torch.save(probe.state_dict(), args.probe)
    images, colours, shapes = zip(*itertools.islice(scenes(args.size, 10_000_000), 2000), strict=True)
    report("real scenes", look(probe, images), (np.array(colours), np.array(shapes)), "")
    prompts = new_prompts(args.demo, args.prompts)
    texts, colours, shapes = zip(*prompts, strict=True)
    models = args.models or ",".join(f"{kind}:{args.demo / 'models' / kind}" for kind in ("vae", "gan"))
    for name in models.split(","):
        samples = draw(name, texts, 2)
        truth = np.repeat(colours, 2), np.repeat(shapes, 2)
        pairs = [np.stack(samples[i : i + 2]) for i in range(0, len(samples), 2)]
        apart = np.mean([pairwise_distances(pair, torch.ones(2, 1))[0] for pair in pairs])
        report(name, look(probe, samples), truth, f", two samples of a prompt {apart:.3f} apart")
    print(f"in all {time.monotonic() - begun:.0f} s")


def report(
    name: str,
    found: tuple[np.ndarray, np.ndarray],
    truth: tuple[np.ndarray, np.ndarray],
    more: str,
) -> None:
    """Prints how many are right."""
    colour, shape = (one == other for one, other in zip(found, truth, strict=True))
    print(
        f"{name:12} {len(colour):,} images: colour {colour.mean():.1%}, shape {shape.mean():.1%}, "
        f"both {(colour & shape).mean():.1%}{more}",
        flush=True,
    )


if __name__ == "__main__":
    main()
