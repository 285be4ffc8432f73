"""What `diptych evaluate captions` and `diptych evaluate images` take."""

import argparse
import dataclasses

from diptych.models.base import CaptionOptions, TextOptions
from diptych.models.names import CAPTION_KINDS, TEXT_KINDS
from diptych.models.spec import ModelSpec
from diptych.pipelines.options.base import check
from diptych.pipelines.options.models import parse_model
from diptych.transforms.errors import OptionError
from diptych.transforms.sources.references import FORMATS


@dataclasses.dataclass(frozen=True)
class EvaluateCaptionsOptions:
    """Options of `diptych evaluate captions`.

    Attributes:
        input: The output folder of a job that wrote captions.
        references: The annotation to score against; None takes the references that the output has itself.
        format: Of the annotation: one of `diptych.transforms.sources.references.FORMATS`, or `auto`.
        split: Splits of a Karpathy file, separated by commas.
        results: Where to write the captions as COCO results; None writes none.
        scores: Where to write the scores as JSON; None writes none.
        json: Print JSON, not a table.
    """

    input: str
    references: str | None = None
    format: str = "auto"
    split: str | None = None
    results: str | None = None
    scores: str | None = None
    json: bool = False

    def __post_init__(self) -> None:
        for name in ("input", "references", "results", "scores"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise OptionError(f"--{name} is {value!r}. It must be a path or URL.")
        for name, value in (("format", self.format != "auto" and self.format), ("split", self.split)):
            if value and self.references is None:
                raise OptionError(f"--{name} {value} says how to read --references, and there are none.")


@dataclasses.dataclass(frozen=True)
class EvaluateImagesOptions:
    """Options of `diptych evaluate images`.

    Attributes:
        input: The output folder of a job that made images.
        dataset: What of it is scored: `generated`, or `images` (a yardstick: real ones against others).
        references: An output with real images; None takes the images that `input` has itself.
        max_images: Most images of each side; None takes all.
        size_px: Both sides are brought to this size first; None takes that of the first image that is scored.
        features: `inception`, a network of torchvision, or `timm:NAME`.
        feature_weights: Of the last two: `imagenet`, or a safetensors file.
        match_with: A captioner that describes the images, to compare that with their prompts; None compares nothing.
        match_by: The text model that compares.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        scores: Where to write the scores as JSON; None writes none.
        json: Print JSON, not a table.
    """

    input: str
    dataset: str = "generated"
    references: str | None = None
    max_images: int | None = None
    size_px: int | None = None
    features: str = "inception"
    feature_weights: str = "imagenet"
    match_with: ModelSpec | None = None
    match_by: ModelSpec | None = None
    device: str = "auto"
    scores: str | None = None
    json: bool = False

    def __post_init__(self) -> None:
        for name in ("input", "references", "features", "feature_weights", "scores"):
            value = getattr(self, name)
            check(value is None or bool(value.strip()), f"--{name}", repr(value), "a path, URL or name")
        size_px = self.size_px
        check(size_px is None or 8 <= size_px <= 4096, "--size", size_px, "between 8 and 4096 pixels")
        most = self.max_images
        check(most is None or most >= 2, "--max_images", most, "at least 2")
        pair = (self.match_with is None) == (self.match_by is None)
        given = self.match_with or self.match_by
        check(pair, "--match_with", given, "a captioner beside a text model, --match_by")
        is_matched = self.match_with is None or self.dataset == "generated"
        check(is_matched, "--match_with", given, "left out: these images have no prompt")
        is_apart = self.dataset == "generated" or self.references is not None
        check(is_apart, "--dataset", self.dataset, "beside others to score it against, --references")


def add_evaluate_captions_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `diptych evaluate captions`."""
    parser.add_argument("--input", required=True, metavar="OUT", help="output of a job that wrote captions")
    parser.add_argument(
        "--references", metavar="FILE", help="annotation with the true captions (default: those in OUT)"
    )
    parser.add_argument(
        "--format", default="auto", choices=("auto", *FORMATS), help="of FILE (default: find out)"
    )
    parser.add_argument("--split", metavar="A[,B]", help="splits of a Karpathy file (default: all)")
    parser.add_argument("--results", metavar="FILE.json", help="write the captions as COCO results")
    parser.add_argument("--scores", metavar="FILE.json", help="write the scores as JSON")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")


def add_evaluate_images_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `diptych evaluate images`."""
    parser.add_argument("--input", required=True, metavar="OUT", help="output of a job that made images")
    parser.add_argument(
        "--dataset",
        default="generated",
        choices=("generated", "images"),
        help="of OUT (default generated); images are real ones, for a yardstick",
    )
    parser.add_argument(
        "--references", metavar="OUT2", help="output with real images (default: the images in OUT)"
    )
    parser.add_argument(
        "--max_images", type=int, metavar="N", help="score at most so many of each side (default all)"
    )
    parser.add_argument(
        "--size",
        dest="size_px",
        type=int,
        metavar="PX",
        help="bring both to this size first (default: that of the images that are scored)",
    )
    parser.add_argument(
        "--features",
        default="inception",
        metavar="NAME",
        help="network whose features are compared: inception, of torchvision, or timm:NAME (default inception)",
    )
    parser.add_argument(
        "--feature_weights", default="imagenet", metavar="W", help="imagenet, or a safetensors file or URL"
    )
    parser.add_argument("--match_with", metavar="KIND:LOC", help="captioner that describes the images")
    parser.add_argument(
        "--match_by", metavar="KIND:LOC", help="text model that compares that with their prompts"
    )
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--scores", metavar="FILE.json", help="write the scores as JSON")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")


def evaluate_captions_options(args: argparse.Namespace) -> EvaluateCaptionsOptions:
    """Returns the options of `diptych evaluate captions` from its parsed flags.

    Raises:
        OptionError: Flags do not go together.
    """
    fields = (field.name for field in dataclasses.fields(EvaluateCaptionsOptions))
    return EvaluateCaptionsOptions(**{name: getattr(args, name) for name in fields})


def evaluate_images_options(args: argparse.Namespace) -> EvaluateImagesOptions:
    """Returns the options of `diptych evaluate images` from its parsed flags.

    Raises:
        OptionError: Flags do not go together.
    """
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(EvaluateImagesOptions)}
    with_, by = args.match_with, args.match_by
    values["match_with"] = with_ and parse_model(
        with_, CAPTION_KINDS, CaptionOptions(), args.device, "--match_with"
    )
    values["match_by"] = by and parse_model(by, TEXT_KINDS, TextOptions(), args.device, "--match_by")
    return EvaluateImagesOptions(**values)
