"""What all jobs take: the options they share, and helpers that make flags of options."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from diptych.models.files.location import absolute
from diptych.transforms.errors import OptionError
from diptych.transforms.schemas import REASONS
from diptych.transforms.sources.base import ColumnNames
from diptych.transforms.sources.open import FORMATS, SourceOptions

MAX_CHUNK_SAMPLES = 400_000_000
"""Pixel values that the images of a chunk may hold, so that it fits in memory."""


@dataclasses.dataclass(frozen=True)
class JobOptions:
    """Options that all jobs share.

    Local paths become absolute: a worker may have another working folder.

    Attributes:
        inputs: Paths, fsspec URLs, globs or folders.
        output: The output folder.
        format: One of `diptych.transforms.sources.open.FORMATS`, or `auto`.
        source: What the user says about the input beyond its place.
        chunk_rows: Most rows a chunk, so a file.
        overwrite: Delete what an earlier run wrote to `output`.
        quiet: Show neither progress nor summary.
        beam_args: Flags for Apache Beam.
        retry_rejects: Reasons of rejects for which the chunks of an earlier run are made again.
        max_reject_rate: The share of the rows read that may be rejected, 0 to 1.
    """

    inputs: tuple[str, ...]
    output: str
    format: str = "auto"
    source: SourceOptions = SourceOptions()
    chunk_rows: int = 250
    overwrite: bool = False
    quiet: bool = False
    beam_args: tuple[str, ...] = ()
    retry_rejects: tuple[str, ...] = ()
    max_reject_rate: float = 1.0

    def __post_init__(self) -> None:
        for flag, place in (("--output", self.output), *(("--input", url) for url in self.inputs)):
            check(bool(place.strip()), flag, repr(place), "a path or URL")
        if self.source.images is not None:
            source = dataclasses.replace(self.source, images=absolute(self.source.images))
            object.__setattr__(self, "source", source)
        object.__setattr__(self, "inputs", tuple(map(absolute, self.inputs)))
        object.__setattr__(self, "output", absolute(self.output))
        check(self.chunk_rows >= 1, "--chunk_rows", self.chunk_rows, "at least 1")
        bound = "at most 100000, a chunk is held in memory"
        check(self.chunk_rows <= 100_000, "--chunk_rows", self.chunk_rows, bound)
        reasons = sorted({reason for stage in REASONS.values() for reason in stage})
        expected = f"some of {', '.join(reasons)}, with commas between them"
        for reason in self.retry_rejects:
            check(reason in reasons, "--retry_rejects", reason, expected)
        is_both = bool(self.retry_rejects and self.overwrite)
        expected = "without --overwrite, which makes all rows anew"
        check(not is_both, "--retry_rejects", ",".join(self.retry_rejects), expected)
        check(0 <= self.max_reject_rate <= 1, "--max_reject_rate", self.max_reject_rate, "between 0 and 1")


def check(holds: bool, flag: str, value: object, expected: str) -> None:
    """Checks a flag's value.

    Raises:
        OptionError: What it must be does not hold.
    """
    if not holds:
        raise OptionError(f"{flag} is {value}. It must be {expected}.")


def add_value(
    group: argparse._ArgumentGroup,
    options: Any,
    name: str,
    metavar: str,
    text: str,
    *,
    flag: str | None = None,
    default_text: str | None = None,
) -> None:
    """Adds the flag of an option, with the option's type and default.

    Args:
        group: The group of the flag.
        options: The dataclass that has the option, or an object of it.
        name: The option's name.
        metavar: The placeholder of its value.
        text: What the help says of it.
        flag: The flag's name where it is not that of the option.
        default_text: The default as the help shows it; None shows the value.
    """
    value = getattr(options, name)
    text = f"{text} (default {value if default_text is None else default_text})"
    group.add_argument(
        f"--{flag or name}", dest=name, type=type(value), default=value, metavar=metavar, help=text
    )


def add_choice(
    group: argparse._ArgumentGroup,
    options: Any,
    name: str,
    choices: Sequence[str],
    text: str = "",
    *,
    flag: str | None = None,
) -> None:
    """Adds the flag of an option that is one of some words; arguments are those of `add_value`."""
    value = getattr(options, name)
    text = f"{text} (default {value})" if text else f"default {value}"
    group.add_argument(f"--{flag or name}", dest=name, default=value, choices=choices, help=text)


def add_source_flags(source: argparse._ArgumentGroup, flag: str = "--input") -> None:
    """Adds the flags that say where the input is, and how it is read.

    Args:
        source: The group of the flags.
        flag: The flag that says where.
    """
    text = "path, URL, glob or folder; may repeat"
    source.add_argument(flag, dest="input", action="append", required=True, metavar="SRC", help=text)
    source.add_argument(
        "--format", default=JobOptions.format, choices=("auto", *FORMATS), help="default: find out"
    )
    source.add_argument("--images", metavar="DIR", help="images of an annotation file: a folder, tar or zip")
    source.add_argument("--split", metavar="A[,B]", help="splits of a Karpathy file (default: all)")
    source.add_argument(
        "--image_column", metavar="NAME", help="column or field of the image (default: find it)"
    )
    source.add_argument("--caption_column", metavar="NAME", help="of the caption (default: find it)")
    source.add_argument("--key_column", metavar="NAME", help="of the key (default: find it, or the path)")


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that all jobs share."""
    job = parser.add_argument_group("job")
    job.add_argument("--output", required=True, metavar="OUT", help="folder or URL; made where there is none")
    add_value(job, JobOptions, "chunk_rows", "N", "most rows a chunk, so a file")
    job.add_argument("--overwrite", action="store_true", help="delete what an earlier run wrote to OUT")
    job.add_argument(
        "--retry_rejects",
        type=comma_separated,
        default=JobOptions.retry_rejects,
        metavar="REASON[,…]",
        help="with the command of an earlier run: make again the files that have rows rejected for these reasons",
    )
    job.add_argument(
        "--max_reject_rate",
        type=float,
        default=JobOptions.max_reject_rate,
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


def job_values(args: argparse.Namespace, beam_args: Sequence[str]) -> dict[str, Any]:
    """Returns the values of `JobOptions` from the parsed flags."""
    return {
        "inputs": tuple(args.input),
        "output": args.output,
        "format": args.format,
        "source": source_options(args, args.images, args.split),
        "chunk_rows": args.chunk_rows,
        "overwrite": args.overwrite,
        "quiet": args.quiet,
        "beam_args": tuple(beam_args),
        "retry_rejects": args.retry_rejects,
        "max_reject_rate": args.max_reject_rate,
    }


def source_options(args: argparse.Namespace, images: str | None, split: str | None) -> SourceOptions:
    """Returns what the parsed flags say about an input beyond its place."""
    columns = ColumnNames(args.image_column, args.caption_column, args.key_column)
    return SourceOptions(images, split, columns, getattr(args, "metadata_columns", ()))


def comma_separated(text: str) -> tuple[str, ...]:
    """Returns the names in a list with commas between them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
