"""The flags of each job, from the command line to its options."""

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any

from models.base import CaptionOptions, TextOptions
from models.spec import CAPTION_KINDS, TEXT_KINDS, ModelSpec
from pipelines.options import ModelJobOptions, PrepareOptions
from transforms.clean import CleanOptions
from transforms.decode import Limits
from transforms.errors import OptionError
from transforms.resize import IMAGENET_MEAN, IMAGENET_STD, ResizeOptions
from transforms.sources import FORMATS, SourceOptions


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


def add_embed_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `diptych embed`."""
    add_shared_flags(parser)
    add_source_flags(parser.add_argument_group("input"))
    model = parser.add_argument_group("model")
    add_model_flags(model, TEXT_KINDS)
    model.add_argument(
        "--pooling",
        choices=("mean", "cls"),
        help="how token vectors become one, for models that say nothing of it themselves (default mean)",
    )
    model.add_argument("--normalize", action="store_true", help="scale vectors to length 1")


def add_caption_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `diptych caption`."""
    add_shared_flags(parser)
    add_source_flags(parser.add_argument_group("input"))
    model = parser.add_argument_group("model")
    add_model_flags(model, CAPTION_KINDS)
    options = CaptionOptions()
    for flag, default, metavar, text in (
        ("--beam_width", options.beam_width, "N", "hypotheses kept at each step, 1 is greedy"),
        ("--num_captions", options.num_captions, "N", "candidates an image, at most --beam_width"),
        ("--max_words", options.max_words, "N", "longest caption, in words (hf: new tokens)"),
        ("--no_repeat_ngram", options.no_repeat_ngram, "N", "let no N words occur twice, 0 allows any"),
    ):
        help = f"{text} (default {default})"
        model.add_argument(flag, type=type(default), default=default, metavar=metavar, help=help)
    model.add_argument(
        "--length_penalty",
        type=float,
        metavar="X",
        help="divide log-probabilities by length to the power X (default 0.7; hf: the model's own)",
    )
    model.add_argument("--features", action="store_true", help="also write the encoder's pooled vectors")
    model.add_argument(
        "--generation",
        action="append",
        type=_setting,
        default=[],
        metavar="NAME=VALUE",
        help="a flag for `generate` of a model of kind hf, its value as JSON; may repeat",
    )


def add_model_flags(model: argparse._ArgumentGroup, kinds: Sequence[str]) -> None:
    """Adds the flags that all jobs with a model share."""
    model.add_argument(
        "--model",
        required=True,
        metavar="KIND:LOC",
        help=f"KIND is {_either(kinds)}; LOC a path, URL or name",
    )
    model.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="auto, cpu, cuda or cuda:N, on the worker (default auto)",
    )
    model.add_argument(
        "--batch_size", type=int, metavar="N", help="most rows of a micro-batch (default: the model's own)"
    )
    model.add_argument(
        "--max_failure_rate",
        type=float,
        default=0.1,
        metavar="X",
        help="stop where the model fails on more than this share of rows (default 0.1)",
    )


def add_source_flags(source: argparse._ArgumentGroup) -> None:
    """Adds the flags that say where the input is, and what."""
    source.add_argument(
        "--input", action="append", required=True, metavar="SRC", help="path, URL, glob or folder; may repeat"
    )
    source.add_argument("--format", default="auto", choices=("auto", *FORMATS), help="default: find out")
    source.add_argument("--images", metavar="DIR", help="images of an annotation file: a folder, tar or zip")
    source.add_argument("--split", metavar="A[,B]", help="splits of a Karpathy file (default: all)")
    source.add_argument("--image_column", metavar="NAME", help="of a Parquet file (default: find it)")
    source.add_argument("--caption_column", metavar="NAME", help="of a Parquet file (default: find it)")
    source.add_argument("--key_column", metavar="NAME", help="of a Parquet file (default: find it)")


def _add_caption_flags(text: argparse._ArgumentGroup) -> None:
    text.add_argument("--lowercase", action="store_true", help="lower-case them")
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
    job.add_argument("--quiet", action="store_true", help="show neither progress nor summary")


def prepare_options(args: argparse.Namespace, beam_args: Sequence[str]) -> PrepareOptions:
    """Returns the options of `diptych prepare` from its parsed flags.

    Raises:
        OptionError: A value is out of bounds.
    """
    keep_bytes = args.keep_rejected_bytes
    return PrepareOptions(
        **_job_options(args, beam_args),
        clean=CleanOptions(
            args.lowercase, args.min_caption_chars, args.max_caption_chars, args.require_caption, keep_bytes
        ),
        resize=ResizeOptions(
            size_px=args.size,
            mode=args.resize,
            image_format=args.image_format,
            quality=args.quality,
            pixels=args.pixels,
            mean=args.pixel_mean,
            std=args.pixel_std,
            limits=Limits(args.max_pixels, args.min_side_px, args.max_aspect_ratio),
            keep_bytes=keep_bytes,
        ),
    )


def embed_options(args: argparse.Namespace, beam_args: Sequence[str]) -> ModelJobOptions:
    """Returns the options of `diptych embed` from its parsed flags.

    Raises:
        OptionError: A value is out of bounds.
    """
    return _model_options(args, beam_args, TEXT_KINDS, TextOptions(args.pooling, args.normalize))


def caption_options(args: argparse.Namespace, beam_args: Sequence[str]) -> ModelJobOptions:
    """Returns the options of `diptych caption` from its parsed flags.

    Raises:
        OptionError: A value is out of bounds.
    """
    options = CaptionOptions(
        args.beam_width,
        args.num_captions,
        args.max_words,
        args.length_penalty,
        args.no_repeat_ngram,
        args.features,
        tuple(args.generation),
    )
    return _model_options(args, beam_args, CAPTION_KINDS, options)


def _model_options(
    args: argparse.Namespace,
    beam_args: Sequence[str],
    kinds: Sequence[str],
    asked: TextOptions | CaptionOptions,
) -> ModelJobOptions:
    return ModelJobOptions(
        **_job_options(args, beam_args),
        model=parse_model(args.model, kinds, asked, args.device),
        batch_size=args.batch_size,
        max_failure_rate=args.max_failure_rate,
    )


def parse_model(
    text: str, kinds: Sequence[str], asked: TextOptions | CaptionOptions, device: str, flag: str = "--model"
) -> ModelSpec:
    """Returns the model that `KIND:LOCATION` names.

    Raises:
        OptionError: It names none of these kinds, or the device is no device.
    """
    kind, colon, location = text.partition(":")
    if kind not in kinds or not colon or not location.strip():
        raise OptionError(
            f"{flag} is {text!r}. It must be KIND:LOCATION, where KIND is {_either(kinds)} and LOCATION is a path, "
            "a URL or a name."
        )
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise OptionError(f"--device is {device}. It must be auto, cpu, cuda or cuda:N.")
    return ModelSpec(kind, location, asked, device)


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _job_options(args: argparse.Namespace, beam_args: Sequence[str]) -> dict[str, Any]:
    """Returns the values of `JobOptions`."""
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
    }


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, as temperature=0.7 is")
    try:
        return name, _frozen(json.loads(value))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: the value is not JSON that can be passed on; a text wants quotes, as in {name}='\"{value}\"'"
        ) from error


def _frozen(value: Any) -> Any:
    """Returns a JSON value that can be a part of a `ModelSpec`, which is hashed."""
    if isinstance(value, dict):
        raise ValueError("an object")
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _triple(text: str) -> tuple[float, ...]:
    try:
        red, green, blue = (float(value) for value in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not three numbers, as 0.5,0.5,0.5 is") from error
    return red, green, blue
