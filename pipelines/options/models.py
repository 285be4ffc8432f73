"""What the jobs with a model take: `diptych embed` and `diptych caption`, and what all of them share."""

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from diptych.models.base import CaptionOptions, ImageOptions, TextOptions
from diptych.models.files.location import absolute
from diptych.models.names import CAPTION_KINDS, TEXT_KINDS, ModelName, is_device
from diptych.models.spec import ModelSpec
from diptych.pipelines.options.base import (
    JobOptions,
    add_shared_flags,
    add_source_flags,
    add_value,
    check,
    job_values,
)
from diptych.transforms.errors import OptionError


@dataclasses.dataclass(frozen=True)
class ModelJobOptions(JobOptions):
    """Options of `diptych embed` and `diptych caption`, and of all jobs with a model.

    Attributes:
        model: The model, and what is model_options of it.
        batch_size: Most rows of a micro-batch; None takes the model's own.
        max_failure_rate: The share of rows that the model may fail on.
        skip_done_in: Earlier outputs, or globs of them: rows whose keys they hold are left out.
    """

    model: ModelSpec = dataclasses.field(kw_only=True)
    batch_size: int | None = None
    max_failure_rate: float = 0.1
    skip_done_in: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "model", self.model.absolute())
        object.__setattr__(self, "skip_done_in", tuple(map(absolute, self.skip_done_in)))
        columns = ",".join(self.source.metadata_columns)
        check(not columns, "--metadata_columns", columns, "left out: only `diptych prepare` carries them")
        batch_size = self.batch_size
        check(batch_size is None or batch_size >= 1, "--batch_size", batch_size, "at least 1")
        check(0 <= self.max_failure_rate <= 1, "--max_failure_rate", self.max_failure_rate, "between 0 and 1")
        if isinstance(self.model.options, CaptionOptions):
            _check_caption(self.model.options)


def _check_caption(options: CaptionOptions) -> None:
    check(options.beam_width >= 1, "--beam_width", options.beam_width, "at least 1")
    bound = f"between 1 and --beam_width {options.beam_width}"
    check(1 <= options.num_captions <= options.beam_width, "--num_captions", options.num_captions, bound)
    check(options.max_words >= 1, "--max_words", options.max_words, "at least 1")
    penalty = options.length_penalty
    check(penalty is None or 0 <= penalty < math.inf, "--length_penalty", penalty, "0 or more, and finite")
    check(options.no_repeat_ngram >= 0, "--no_repeat_ngram", options.no_repeat_ngram, "at least 0")


def add_embed_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `diptych embed`."""
    add_shared_flags(parser)
    add_source_flags(parser.add_argument_group("input"))
    model = parser.add_argument_group("model")
    add_model_flag(model, "--model", TEXT_KINDS, required=True)
    add_device_flags(model)
    add_done_flag(model)
    add_text_flags(model)


def add_caption_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `diptych caption`."""
    add_shared_flags(parser)
    add_source_flags(parser.add_argument_group("input"))
    model = parser.add_argument_group("model")
    add_model_flag(model, "--model", CAPTION_KINDS, required=True)
    add_device_flags(model)
    add_done_flag(model)
    add_captioner_flags(model)


def add_model_flag(model: argparse._ArgumentGroup, flag: str, kinds: Sequence[str], required: bool) -> None:
    """Adds the flag that names a model of one of some kinds."""
    text = f"KIND is {_either(kinds)}; LOC a path, URL or name"
    model.add_argument(flag, required=required, metavar="KIND:LOC", help=text)


def add_device_flags(model: argparse._ArgumentGroup) -> None:
    """Adds the flags that say where a model runs, and how."""
    model.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="auto, cpu, cuda or cuda:N, on the worker (default auto)",
    )
    model.add_argument(
        "--gpu",
        metavar="TYPE",
        help="on Dataflow: the GPU of each worker, as nvidia-tesla-t4 (see deploy/dataflow.md)",
    )
    model.add_argument(
        "--batch_size", type=int, metavar="N", help="most rows of a micro-batch (default: the model's own)"
    )
    text = "stop where the model fails on more than this share of rows"
    add_value(model, ModelJobOptions, "max_failure_rate", "X", text)


def add_done_flag(model: argparse._ArgumentGroup) -> None:
    """Adds the flag that names earlier outputs."""
    model.add_argument(
        "--skip_done_in",
        action="append",
        default=[],
        metavar="OUT",
        help="leave out rows whose keys this earlier output holds, or those of a glob; may repeat",
    )


def add_text_flags(model: argparse._ArgumentGroup) -> None:
    """Adds the flags of a text model."""
    model.add_argument(
        "--pooling",
        choices=("mean", "cls"),
        help="how token vectors become one, for models that say nothing of it themselves (default mean)",
    )
    model.add_argument("--normalize", action="store_true", help="scale vectors to length 1")


def add_captioner_flags(model: argparse._ArgumentGroup) -> None:
    """Adds the flags of a captioner."""
    for name, text in (
        ("beam_width", "hypotheses kept at each step, 1 is greedy"),
        ("num_captions", "candidates an image, at most --beam_width"),
        ("max_words", "longest caption, in words (hf: new tokens)"),
        ("no_repeat_ngram", "let no N words occur twice, 0 allows any"),
    ):
        add_value(model, CaptionOptions, name, "N", text)
    model.add_argument(
        "--length_penalty",
        type=float,
        metavar="X",
        help="divide log-probabilities by length to the power X (default 0.7; hf: the model's own)",
    )
    model.add_argument("--features", action="store_true", help="also write the encoder's pooled vectors")
    text = "a flag for `generate` of a model of kind hf, its value as JSON; may repeat"
    add_settings(model, "--generation", text)


def add_settings(model: argparse._ArgumentGroup, flag: str, text: str) -> None:
    """Adds a flag that takes `NAME=VALUE`."""
    model.add_argument(flag, action="append", type=_setting, default=[], metavar="NAME=VALUE", help=text)


def embed_options(args: argparse.Namespace, beam_args: Sequence[str]) -> ModelJobOptions:
    """Returns the options of `diptych embed` from its parsed flags.

    Raises:
        OptionError: A value is out of bounds.
    """
    return embed_options_of(args, job_values(args, beam_args), "--model")


def caption_options(args: argparse.Namespace, beam_args: Sequence[str]) -> ModelJobOptions:
    """Returns the options of `diptych caption` from its parsed flags.

    Raises:
        OptionError: A value is out of bounds.
    """
    return caption_options_of(args, job_values(args, beam_args), "--model")


def embed_options_of(args: argparse.Namespace, job: Mapping[str, Any], flag: str) -> ModelJobOptions:
    """Returns the options of text vectors; `flag` names the model."""
    model_options = TextOptions(args.pooling, args.normalize)
    return ModelJobOptions(**job, **model_values(args, flag, TEXT_KINDS, model_options))


def caption_options_of(args: argparse.Namespace, job: Mapping[str, Any], flag: str) -> ModelJobOptions:
    """Returns the options of captions; `flag` names the model."""
    model_options = CaptionOptions(
        args.beam_width,
        args.num_captions,
        args.max_words,
        args.length_penalty,
        args.no_repeat_ngram,
        args.features,
        tuple(args.generation),
    )
    return ModelJobOptions(**job, **model_values(args, flag, CAPTION_KINDS, model_options))


def model_values(
    args: argparse.Namespace,
    flag: str,
    kinds: Sequence[str],
    model_options: TextOptions | CaptionOptions | ImageOptions,
) -> dict[str, Any]:
    """Returns the values of `ModelJobOptions` that are not those of `JobOptions`."""
    named = getattr(args, flag.removeprefix("--"))
    return {
        "model": parse_model(named, kinds, model_options, args.device, flag),
        "batch_size": args.batch_size,
        "max_failure_rate": args.max_failure_rate,
        "skip_done_in": tuple(getattr(args, "skip_done_in", ())),
    }


def parse_model(
    text: str,
    kinds: Sequence[str],
    model_options: TextOptions | CaptionOptions | ImageOptions,
    device: str,
    flag: str = "--model",
) -> ModelSpec:
    """Returns the model that `KIND:LOCATION` names.

    Raises:
        OptionError: It names none of these kinds, or the device is no device.
    """
    name = ModelName.parse(text)
    if not name.is_one_of(kinds):
        raise OptionError(
            f"{flag} is {text!r}. It must be KIND:LOCATION, where KIND is {_either(kinds)} and LOCATION is a path, "
            "a URL or a name."
        )
    if not is_device(device):
        raise OptionError(f"--device is {device}. It must be auto, cpu, cuda or cuda:N.")
    return ModelSpec(*name, model_options, device)


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


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
