"""What `diptych demo` takes."""

import argparse
import dataclasses

from diptych.pipelines.options.base import add_value, check

_MIN_SCENES = 100


@dataclasses.dataclass(frozen=True)
class DemoOptions:
    """Options of `diptych demo`.

    Attributes:
        output: A local folder.
        seed: The seed of the drawings.
        num_scenes: How many scenes are drawn.
    """

    output: str = "demo"
    seed: int = 0
    num_scenes: int = 5400

    def __post_init__(self) -> None:
        expected = f"at least {_MIN_SCENES}: fewer leave too few to train and choose by"
        check(self.num_scenes >= _MIN_SCENES, "--scenes", self.num_scenes, expected)


def add_demo_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `diptych demo`."""
    group = parser.add_argument_group("demo")
    add_value(group, DemoOptions, "output", "DIR", "local folder")
    add_value(group, DemoOptions, "seed", "N", "of the drawings")
    add_value(group, DemoOptions, "num_scenes", "N", "how many to draw", flag="scenes")


def demo_options(args: argparse.Namespace) -> DemoOptions:
    """Returns the options of `diptych demo` from its parsed flags.

    Raises:
        OptionError: A number is out of bounds.
    """
    return DemoOptions(args.output, args.seed, args.num_scenes)
