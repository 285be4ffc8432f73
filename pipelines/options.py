"""The flags of each job as one frozen dataclass, checked before anything is read."""

import argparse
import dataclasses
import difflib
import math
from collections.abc import Sequence
from typing import Any, NoReturn

from transforms.clean import CleanOptions
from transforms.decode import Limits
from transforms.errors import OptionError
from transforms.resize import IMAGENET_MEAN, IMAGENET_STD, ResizeOptions
from transforms.schemas import RAW_COLUMNS, images_schema
from transforms.sources import FORMATS, SourceOptions

# Samples of pictures and tensors that a chunk may hold; writing a tensor takes some ten times its memory
_IMAGE_SAMPLES, _TENSOR_SAMPLES = 400_000_000, 40_000_000


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """Options of `diptych prepare`.

    Attributes:
        inputs: Paths, fsspec URLs, globs or folders.
        output: The output folder.
        format: One of `transforms.sources.FORMATS`, or `auto`.
        source: What the user says about the input beyond its place.
        clean: What captions become.
        resize: What images become.
        chunk_rows: Most rows a chunk, so a file.
        overwrite: Delete what an earlier run wrote to `output`.
        quiet: Show neither progress nor summary.
        beam_args: Flags for Apache Beam.
    """

    inputs: tuple[str, ...]
    output: str
    format: str = "auto"
    source: SourceOptions = SourceOptions()
    clean: CleanOptions = CleanOptions()
    resize: ResizeOptions = ResizeOptions()
    chunk_rows: int = 250
    overwrite: bool = False
    quiet: bool = False
    beam_args: tuple[str, ...] = ()

    @property
    def rows_per_chunk(self) -> int:
        """Most rows a chunk in fact: `chunk_rows`, or fewer where so many large pictures would not fit in memory."""
        samples = _TENSOR_SAMPLES if self.resize.pixels else _IMAGE_SAMPLES
        return min(self.chunk_rows, max(1, samples // (3 * self.resize.size_px**2)))

    def __post_init__(self) -> None:
        for flag, place in (("--output", self.output), *(("--input", url) for url in self.inputs)):
            _check(bool(place.strip()), flag, repr(place), "a path or URL")
        _check(self.chunk_rows >= 1, "--chunk_rows", self.chunk_rows, "at least 1")
        _check(
            self.chunk_rows <= 100_000,
            "--chunk_rows",
            self.chunk_rows,
            "at most 100000, a chunk is held in memory",
        )
        resize, clean = self.resize, self.clean
        columns = self.source.metadata_columns
        taken = sorted({*columns} & {*images_schema(pixels="uint8").names, *RAW_COLUMNS})
        what = f"other names than the columns that are written anyway ({', '.join(taken)})"
        _check(not taken, "--metadata_columns", ",".join(columns), what)
        _check(
            len({*columns}) == len(columns),
            "--metadata_columns",
            ",".join(columns),
            "names that are all different",
        )
        _check(1 <= resize.size_px <= 4096, "--size", resize.size_px, "between 1 and 4096 pixels")
        _check(1 <= resize.quality <= 100, "--quality", resize.quality, "between 1 and 100")
        _check(resize.limits.max_pixels >= 1, "--max_pixels", resize.limits.max_pixels, "at least 1")
        _check(resize.limits.min_side_px >= 1, "--min_side_px", resize.limits.min_side_px, "at least 1")
        ratio = resize.limits.max_aspect_ratio
        _check(ratio >= 1, "--max_aspect_ratio", ratio, "at least 1")
        _check(all(map(math.isfinite, resize.mean)), "--pixel_mean", resize.mean, "finite")
        is_scale = min(resize.std) > 0 and all(map(math.isfinite, resize.std))
        _check(is_scale, "--pixel_std", resize.std, "above 0 and finite")
        _check(clean.min_chars >= 1, "--min_caption_chars", clean.min_chars, "at least 1")
        bound = f"at least --min_caption_chars {clean.min_chars}"
        _check(clean.max_chars >= clean.min_chars, "--max_caption_chars", clean.max_chars, bound)


def _check(holds: bool, flag: str, value: object, expected: str) -> None:
    if not holds:
        raise OptionError(f"{flag} is {value}. It must be {expected}.")


def add_prepare_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `diptych prepare`."""
    add_shared_flags(parser)
    _add_source_flags(parser.add_argument_group("input"))
    _add_caption_flags(parser.add_argument_group("captions"))
    _add_image_flags(parser.add_argument_group("images"))


def _add_source_flags(source: argparse._ArgumentGroup) -> None:
    source.add_argument(
        "--input", action="append", required=True, metavar="SRC", help="path, URL, glob or folder; may repeat"
    )
    source.add_argument("--format", default="auto", choices=("auto", *FORMATS), help="default: find out")
    source.add_argument("--images", metavar="DIR", help="images of an annotation file: a folder, tar or zip")
    source.add_argument("--split", metavar="A[,B]", help="splits of a Karpathy file (default: all)")
    source.add_argument("--image_column", metavar="NAME", help="of a Parquet file (default: find it)")
    source.add_argument("--caption_column", metavar="NAME", help="of a Parquet file (default: find it)")
    source.add_argument("--key_column", metavar="NAME", help="of a Parquet file (default: find it)")
    source.add_argument(
        "--metadata_columns", type=_names, default=(), metavar="A,B", help="the source's own columns to carry"
    )


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
    columns = args.image_column, args.caption_column, args.key_column, args.metadata_columns
    keep_bytes = args.keep_rejected_bytes
    return PrepareOptions(
        inputs=tuple(args.input),
        output=args.output,
        format=args.format,
        source=SourceOptions(args.images, args.split, *columns),
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
        chunk_rows=args.chunk_rows,
        overwrite=args.overwrite,
        quiet=args.quiet,
        beam_args=tuple(beam_args),
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _triple(text: str) -> tuple[float, ...]:
    try:
        red, green, blue = (float(value) for value in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not three numbers, as 0.5,0.5,0.5 is") from error
    return red, green, blue


def check_beam_args(beam_args: Sequence[str], own_flags: Sequence[str]) -> None:
    """Checks that Apache Beam knows what the job did not.

    A portable runner has flags of its own, which only its job server knows; those pass, unless they look like a
    misspelt flag.

    Raises:
        OptionError: A flag that neither knows.
    """
    if not beam_args:
        return
    from apache_beam.options.pipeline_options import PipelineOptions, _BeamArgumentParser

    class Parser(_BeamArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise OptionError(f"Apache Beam refuses a flag: {message}.")

    parser = Parser(allow_abbrev=False)
    for options in _subclasses(PipelineOptions):
        options._add_argparse_args(parser)
    known, unknown = parser.parse_known_args(list(beam_args))
    beam_flags = [flag for action in parser._actions for flag in action.option_strings]
    beam_flags += _JOB_SERVER_FLAGS
    is_portable = any(name in (known.runner or "") for name in ("Flink", "Spark", "Portable"))
    for flag in unknown:
        if is_portable and flag.split("=")[0] in _JOB_SERVER_FLAGS:
            continue
        near = difflib.get_close_matches(flag.split("=")[0], [*own_flags, *beam_flags], n=1, cutoff=0.8)
        if is_portable and flag.startswith("--") and not near:
            continue
        if is_portable and not flag.startswith("-"):
            continue
        hint = f" Did you mean {near[0]}?" if near else " `diptych JOB --help` lists the job's flags."
        raise OptionError(f"{flag} is no flag of this job, nor one of Apache Beam.{hint}")


# The usual ones of those that only a portable runner's job server knows, to tell them from misspelt ones
_JOB_SERVER_FLAGS = (
    "--checkpointing_interval",
    "--max_parallelism",
    "--number_of_execution_retries",
    "--parallelism",
)


def _subclasses(base: type[Any]) -> list[type[Any]]:
    found: list[type[Any]] = []
    for sub in base.__subclasses__():
        found += [sub, *_subclasses(sub)]
    return found
