"""The flags of `diptych evaluate`, apart from what it takes to evaluate: help must not wait for that."""

import argparse

from diptych.transforms.sources.references import FORMATS


def add_evaluate_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `diptych evaluate`, of captions and of images."""
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    _add_captions_flags(what.add_parser("captions", help="what `diptych caption` wrote", allow_abbrev=False))
    _add_images_flags(what.add_parser("images", help="what `diptych generate` wrote", allow_abbrev=False))


def _add_captions_flags(parser: argparse.ArgumentParser) -> None:
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


def _add_images_flags(parser: argparse.ArgumentParser) -> None:
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
