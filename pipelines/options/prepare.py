"""The flags that jobs share, and those of `diptych prepare`, from the command line to its options."""

import argparse
from collections.abc import Sequence
from typing import Any

from diptych.pipelines.options.base import PrepareOptions
from diptych.transforms.clean import CleanOptions
from diptych.transforms.images.decode import Limits
from diptych.transforms.images.resize import IMAGENET_MEAN, IMAGENET_STD, ResizeOptions
from diptych.transforms.sources.open import FORMATS, SourceOptions


def add_prepare_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `diptych prepare`."""
    add_shared_flags(parser)
    source = parser.add_argument_group("input")
    add_source_flags(source)
    source.add_argument(
        "--metadata_columns", type=_names, default=(), metavar="A,B", help="the source's own columns to carry"
    )
    _add_caption_flags(parser.add_argument_group("captions"))
    _add_image_flags(parser.add_argument_group("images"))


def add_source_flags(source: argparse._ArgumentGroup, flag: str = "--input") -> None:
    """Adds the flags that say where the input is, and what.

    Args:
        source: Group of the flags.
        flag: The one that says where.
    """
    text = "path, URL, glob or folder; may repeat"
    source.add_argument(flag, dest="input", action="append", required=True, metavar="SRC", help=text)
    source.add_argument("--format", default="auto", choices=("auto", *FORMATS), help="default: find out")
    source.add_argument("--images", metavar="DIR", help="images of an annotation file: a folder, tar or zip")
    source.add_argument("--split", metavar="A[,B]", help="splits of a Karpathy file (default: all)")
    source.add_argument(
        "--image_column", metavar="NAME", help="column or field of the image (default: find it)"
    )
    source.add_argument("--caption_column", metavar="NAME", help="of the caption (default: find it)")
    source.add_argument("--key_column", metavar="NAME", help="of the key (default: find it, or the path)")


def _add_caption_flags(text: argparse._ArgumentGroup) -> None:
    text.add_argument("--lowercase", action="store_true", help="lower-case them")
    text.add_argument("--keep_markup", action="store_true", help="keep HTML tags and entities as they are")
    text.add_argument(
        "--min_caption_chars", type=int, default=1, metavar="N", help="drop shorter ones (default 1)"
    )
    text.add_argument(
        "--max_caption_chars", type=int, default=10_000, metavar="N", help="drop longer ones (default 10000)"
    )
    text.add_argument("--require_caption", action="store_true", help="reject images without a caption")


def _add_image_flags(image: argparse._ArgumentGroup) -> None:
    image.add_argument("--size", type=int, default=224, metavar="PX", help="side of the square (default 224)")
    image.add_argument(
        "--resize", default="squash", choices=("squash", "center_crop", "pad"), help="default squash"
    )
    image.add_argument("--image_format", default="jpeg", choices=("jpeg", "png"), help="default jpeg")
    image.add_argument("--quality", type=int, default=95, metavar="Q", help="of JPEG, 1 to 100 (default 95)")
    image.add_argument(
        "--pixels", choices=("uint8", "float32"), help="also write the tensor (float32: normalised)"
    )
    image.add_argument(
        "--pixel_mean", type=_triple, default=IMAGENET_MEAN, metavar="R,G,B", help="default ImageNet's"
    )
    image.add_argument(
        "--pixel_std", type=_triple, default=IMAGENET_STD, metavar="R,G,B", help="default ImageNet's"
    )
    limits = Limits()
    image.add_argument(
        "--max_pixels",
        type=int,
        default=limits.max_pixels,
        metavar="N",
        help="reject larger images (default 50 million)",
    )
    image.add_argument(
        "--min_side_px",
        type=int,
        default=limits.min_side_px,
        metavar="N",
        help="reject smaller images (default 16)",
    )
    image.add_argument(
        "--max_aspect_ratio",
        type=float,
        default=limits.max_aspect_ratio,
        metavar="X",
        help="reject longer images (default 10)",
    )
    image.add_argument(
        "--max_image_bytes",
        type=int,
        default=limits.max_image_bytes,
        metavar="N",
        help="reject images of more encoded bytes (default and most: 64 MiB)",
    )
    image.add_argument(
        "--keep_rejected_bytes", action="store_true", help="keep the original bytes of rejects"
    )


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that all jobs share."""
    job = parser.add_argument_group("job")
    job.add_argument("--output", required=True, metavar="OUT", help="folder or URL; made where there is none")
    job.add_argument(
        "--chunk_rows", type=int, default=250, metavar="N", help="most rows a chunk, so a file (default 250)"
    )
    job.add_argument("--overwrite", action="store_true", help="delete what an earlier run wrote to OUT")
    job.add_argument(
        "--retry_rejects",
        type=_names,
        default=(),
        metavar="REASON[,…]",
        help="with the command of an earlier run: make again the files that have rows rejected for these reasons",
    )
    job.add_argument(
        "--max_reject_rate",
        type=float,
        default=1.0,
        metavar="X",
        help="fail when a greater share of the rows is rejected (default 1; a run that writes no row always fails)",
    )
    job.add_argument("--quiet", action="store_true", help="show neither progress nor summary")
    job.add_argument(
        "--summary",
        choices=("text", "json"),
        default="text",
        help="json prints one line for machines, also of a run that failed (default text)",
    )


def prepare_options(args: argparse.Namespace, beam_args: Sequence[str]) -> PrepareOptions:
    """Returns the options of `diptych prepare` from its parsed flags.

    Raises:
        OptionError: A value is out of bounds.
    """
    keep_bytes = args.keep_rejected_bytes
    return PrepareOptions(
        **job_values(args, beam_args),
        clean=CleanOptions(
            args.lowercase,
            args.min_caption_chars,
            args.max_caption_chars,
            args.require_caption,
            keep_bytes,
            args.keep_markup,
        ),
        resize=ResizeOptions(
            size_px=args.size,
            mode=args.resize,
            image_format=args.image_format,
            quality=args.quality,
            pixels=args.pixels,
            mean=args.pixel_mean,
            std=args.pixel_std,
            limits=Limits(args.max_pixels, args.min_side_px, args.max_aspect_ratio, args.max_image_bytes),
            keep_bytes=keep_bytes,
        ),
    )


def job_values(args: argparse.Namespace, beam_args: Sequence[str]) -> dict[str, Any]:
    """Returns the values of `JobOptions` from the parsed flags."""
    if getattr(args, "gpu", None):
        from diptych.pipelines.runners.dataflow import gpu_flags

        beam_args = [*beam_args, *gpu_flags(beam_args, args.gpu)]
    columns = args.image_column, args.caption_column, args.key_column
    carried = getattr(args, "metadata_columns", ())
    return {
        "inputs": tuple(args.input),
        "output": args.output,
        "format": args.format,
        "source": SourceOptions(args.images, args.split, *columns, carried),
        "chunk_rows": args.chunk_rows,
        "overwrite": args.overwrite,
        "quiet": args.quiet,
        "beam_args": tuple(beam_args),
        "retry_rejects": args.retry_rejects,
        "max_reject_rate": args.max_reject_rate,
    }


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _triple(text: str) -> tuple[float, ...]:
    try:
        red, green, blue = (float(value) for value in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not three numbers, as 0.5,0.5,0.5 is") from error
    return red, green, blue
