"""What `diptych prepare` takes."""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from diptych.pipelines.options.base import (
    MAX_CHUNK_SAMPLES,
    JobOptions,
    add_choice,
    add_shared_flags,
    add_source_flags,
    add_value,
    check,
    comma_separated,
    job_values,
)
from diptych.transforms.clean import CleanOptions
from diptych.transforms.images.decode import Limits
from diptych.transforms.images.resize import ResizeOptions
from diptych.transforms.schemas import MAX_IMAGE_BYTES, RAW_COLUMNS, images_schema

# Writing a tensor takes some ten times its memory
_MAX_TENSOR_SAMPLES = MAX_CHUNK_SAMPLES // 10


@dataclasses.dataclass(frozen=True)
class PrepareOptions(JobOptions):
    """Options of `diptych prepare`.

    Attributes:
        clean: What captions become.
        resize: What images become.
    """

    clean: CleanOptions = CleanOptions()
    resize: ResizeOptions = ResizeOptions()

    @property
    def rows_per_chunk(self) -> int:
        """Most rows a chunk in fact: `chunk_rows`, or fewer where so many large pictures would not fit in memory."""
        samples = _MAX_TENSOR_SAMPLES if self.resize.pixels else MAX_CHUNK_SAMPLES
        return min(self.chunk_rows, max(1, samples // (3 * self.resize.size_px**2)))

    def __post_init__(self) -> None:
        super().__post_init__()
        resize, clean = self.resize, self.clean
        columns = self.source.metadata_columns
        taken = sorted({*columns} & {*images_schema(pixels="uint8").names, *RAW_COLUMNS})
        names = ",".join(columns)
        expected = f"other names than the columns that are written anyway ({', '.join(taken)})"
        check(not taken, "--metadata_columns", names, expected)
        check(len({*columns}) == len(columns), "--metadata_columns", names, "names that are all different")
        check(1 <= resize.size_px <= 4096, "--size", resize.size_px, "between 1 and 4096 pixels")
        check(1 <= resize.quality <= 100, "--quality", resize.quality, "between 1 and 100")
        check(resize.limits.max_pixels >= 1, "--max_pixels", resize.limits.max_pixels, "at least 1")
        check(resize.limits.min_side_px >= 1, "--min_side_px", resize.limits.min_side_px, "at least 1")
        max_bytes = resize.limits.max_image_bytes
        bound = f"between 1 and {MAX_IMAGE_BYTES}, the most that is read of an image"
        check(1 <= max_bytes <= MAX_IMAGE_BYTES, "--max_image_bytes", max_bytes, bound)
        ratio = resize.limits.max_aspect_ratio
        check(ratio >= 1, "--max_aspect_ratio", ratio, "at least 1")
        check(all(map(math.isfinite, resize.mean)), "--pixel_mean", resize.mean, "finite")
        is_scale = min(resize.std) > 0 and all(map(math.isfinite, resize.std))
        check(is_scale, "--pixel_std", resize.std, "above 0 and finite")
        check(clean.min_chars >= 1, "--min_caption_chars", clean.min_chars, "at least 1")
        bound = f"at least --min_caption_chars {clean.min_chars}"
        check(clean.max_chars >= clean.min_chars, "--max_caption_chars", clean.max_chars, bound)


def add_prepare_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `diptych prepare`."""
    add_shared_flags(parser)
    source = parser.add_argument_group("input")
    add_source_flags(source)
    source.add_argument(
        "--metadata_columns",
        type=comma_separated,
        default=(),
        metavar="A,B",
        help="the source's own columns to carry",
    )
    _add_caption_flags(parser.add_argument_group("captions"))
    _add_image_flags(parser.add_argument_group("images"))


def _add_caption_flags(captions: argparse._ArgumentGroup) -> None:
    captions.add_argument("--lowercase", action="store_true", help="lower-case them")
    captions.add_argument(
        "--keep_markup", action="store_true", help="keep HTML tags and entities as they are"
    )
    add_value(captions, CleanOptions, "min_chars", "N", "drop shorter ones", flag="min_caption_chars")
    add_value(captions, CleanOptions, "max_chars", "N", "drop longer ones", flag="max_caption_chars")
    captions.add_argument("--require_caption", action="store_true", help="reject images without a caption")


def _add_image_flags(image: argparse._ArgumentGroup) -> None:
    add_value(image, ResizeOptions, "size_px", "PX", "side of the square", flag="size")
    add_choice(image, ResizeOptions, "mode", ("squash", "center_crop", "pad"), flag="resize")
    add_choice(image, ResizeOptions, "image_format", ("jpeg", "png"))
    add_value(image, ResizeOptions, "quality", "Q", "of JPEG, 1 to 100")
    image.add_argument(
        "--pixels", choices=("uint8", "float32"), help="also write the tensor (float32: normalised)"
    )
    for flag, name in (("--pixel_mean", "mean"), ("--pixel_std", "std")):
        default = getattr(ResizeOptions, name)
        image.add_argument(
            flag, dest=name, type=_triple, default=default, metavar="R,G,B", help="default ImageNet's"
        )
    add_value(image, Limits, "max_pixels", "N", "reject larger images", default_text="50 million")
    add_value(image, Limits, "min_side_px", "N", "reject smaller images")
    add_value(image, Limits, "max_aspect_ratio", "X", "reject longer images", default_text="10")
    image.add_argument(
        "--max_image_bytes",
        type=int,
        default=Limits.max_image_bytes,
        metavar="N",
        help="reject images of more encoded bytes (default and most: 64 MiB)",
    )
    image.add_argument(
        "--keep_rejected_bytes",
        dest="keep_bytes",
        action="store_true",
        help="keep the original bytes of rejects",
    )


def prepare_options(args: argparse.Namespace, beam_args: Sequence[str]) -> PrepareOptions:
    """Returns the options of `diptych prepare` from its parsed flags.

    Raises:
        OptionError: A value is out of bounds.
    """
    limits = Limits(**_values_of(Limits, args))
    return PrepareOptions(
        **job_values(args, beam_args),
        clean=CleanOptions(**_values_of(CleanOptions, args)),
        resize=ResizeOptions(**_values_of(ResizeOptions, args), limits=limits),
    )


def _values_of(options: type, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the values of a dataclass's fields that are flags."""
    names = (field.name for field in dataclasses.fields(options))
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _triple(text: str) -> tuple[float, ...]:
    try:
        red, green, blue = (float(value) for value in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not three numbers, as 0.5,0.5,0.5 is") from error
    return red, green, blue
