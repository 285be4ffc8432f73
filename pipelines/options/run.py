"""What `diptych run` takes."""

import argparse
import dataclasses
from collections.abc import Sequence

from diptych.models.names import CAPTION_KINDS, IMAGE_KINDS, TEXT_KINDS
from diptych.pipelines.options.base import check, job_values
from diptych.pipelines.options.generate import (
    GenerateOptions,
    add_generator_flags,
    add_match_flags,
    generate_options_of,
)
from diptych.pipelines.options.models import (
    ModelJobOptions,
    add_captioner_flags,
    add_device_flags,
    add_model_flag,
    add_text_flags,
    caption_options_of,
    embed_options_of,
)
from diptych.pipelines.options.prepare import PrepareOptions, add_prepare_flags, prepare_options


@dataclasses.dataclass(frozen=True)
class RunOptions(PrepareOptions):
    """Options of `diptych run`: those of `diptych prepare`, and of what is made of the rows.

    Attributes:
        embed: Text vectors; None makes none.
        caption: Captions; None makes none.
        generate: Images from the captions; None makes none.
    """

    embed: ModelJobOptions | None = None
    caption: ModelJobOptions | None = None
    generate: GenerateOptions | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        some = self.embed or self.caption or self.generate
        what = "given with a model, or --caption, or --generate; without any, use `diptych prepare`"
        check(some is not None, "--embed", "not there", what)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `diptych run`."""
    add_prepare_flags(parser)
    models = parser.add_argument_group("models")
    for flag, kinds in (("--embed", TEXT_KINDS), ("--caption", CAPTION_KINDS), ("--generate", IMAGE_KINDS)):
        add_model_flag(models, flag, kinds, required=False)
    add_device_flags(models)
    add_text_flags(parser.add_argument_group("embed"))
    add_captioner_flags(parser.add_argument_group("caption"))
    add_generator_flags(parser.add_argument_group("generate"))
    add_match_flags(parser.add_argument_group("match"))


def run_options(args: argparse.Namespace, beam_args: Sequence[str]) -> RunOptions:
    """Returns the options of `diptych run` from its parsed flags.

    Raises:
        OptionError: A value is out of bounds.
    """
    prepare = prepare_options(args, beam_args)
    job = job_values(args, beam_args)
    job["source"] = dataclasses.replace(job["source"], metadata_columns=())  # they are the images'
    return RunOptions(
        **vars(prepare),
        embed=embed_options_of(args, job, "--embed") if args.embed else None,
        caption=caption_options_of(args, job, "--caption") if args.caption else None,
        generate=generate_options_of(args, job, "--generate") if args.generate else None,
    )
