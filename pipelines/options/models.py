"""The flags of the jobs with a model, from the command line to their options."""

import argparse
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from diptych.models.base import CaptionOptions, ImageOptions, TextOptions
from diptych.models.spec import CAPTION_KINDS, IMAGE_KINDS, TEXT_KINDS, ModelSpec
from diptych.pipelines.options.base import GenerateOptions, ModelJobOptions, RunOptions
from diptych.pipelines.options.prepare import (
    add_prepare_flags,
    add_shared_flags,
    add_source_flags,
    job_values,
    prepare_options,
)
from diptych.transforms.errors import OptionError


def add_embed_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `diptych embed`."""
    add_shared_flags(parser)
    add_source_flags(parser.add_argument_group("input"))
    model = parser.add_argument_group("model")
    _add_model_flag(model, "--model", TEXT_KINDS, required=True)
    _add_device_flags(model)
    _add_done_flag(model)
    _add_text_flags(model)


def add_caption_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `diptych caption`."""
    add_shared_flags(parser)
    add_source_flags(parser.add_argument_group("input"))
    model = parser.add_argument_group("model")
    _add_model_flag(model, "--model", CAPTION_KINDS, required=True)
    _add_device_flags(model)
    _add_done_flag(model)
    _add_captioner_flags(model)


def add_generate_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `diptych generate`."""
    add_shared_flags(parser)
    add_source_flags(parser.add_argument_group("input"), "--prompts")
    model = parser.add_argument_group("model")
    _add_model_flag(model, "--model", IMAGE_KINDS, required=True)
    _add_device_flags(model)
    _add_done_flag(model)
    _add_generator_flags(model)
    _add_match_flags(parser.add_argument_group("match"))
    image = parser.add_argument_group("images")
    image.add_argument("--size", type=int, metavar="PX", help="side of the images (default: the model's own)")
    image.add_argument("--image_format", default="png", choices=("png", "jpeg"), help="default png")
    image.add_argument("--quality", type=int, default=95, metavar="Q", help="of JPEG, 1 to 100 (default 95)")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `diptych run`."""
    add_prepare_flags(parser)
    models = parser.add_argument_group("models")
    for flag, kinds in (("--embed", TEXT_KINDS), ("--caption", CAPTION_KINDS), ("--generate", IMAGE_KINDS)):
        _add_model_flag(models, flag, kinds, required=False)
    _add_device_flags(models)
    _add_text_flags(parser.add_argument_group("embed"))
    _add_captioner_flags(parser.add_argument_group("caption"))
    _add_generator_flags(parser.add_argument_group("generate"))
    _add_match_flags(parser.add_argument_group("match"))


def _add_model_flag(model: argparse._ArgumentGroup, flag: str, kinds: Sequence[str], required: bool) -> None:
    text = f"KIND is {_either(kinds)}; LOC a path, URL or name"
    model.add_argument(flag, required=required, metavar="KIND:LOC", help=text)


def _add_device_flags(model: argparse._ArgumentGroup) -> None:
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
    model.add_argument(
        "--max_failure_rate",
        type=float,
        default=0.1,
        metavar="X",
        help="stop where the model fails on more than this share of rows (default 0.1)",
    )


def _add_done_flag(model: argparse._ArgumentGroup) -> None:
    model.add_argument(
        "--skip_done_in",
        action="append",
        default=[],
        metavar="OUT",
        help="leave out rows whose keys this earlier output holds, or those of a glob; may repeat",
    )


def _add_text_flags(model: argparse._ArgumentGroup) -> None:
    model.add_argument(
        "--pooling",
        choices=("mean", "cls"),
        help="how token vectors become one, for models that say nothing of it themselves (default mean)",
    )
    model.add_argument("--normalize", action="store_true", help="scale vectors to length 1")


def _add_captioner_flags(model: argparse._ArgumentGroup) -> None:
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
    text = "a flag for `generate` of a model of kind hf, its value as JSON; may repeat"
    _add_settings(model, "--generation", text)


def _add_generator_flags(model: argparse._ArgumentGroup) -> None:
    model.add_argument(
        "--text_model",
        metavar="KIND:LOC",
        help="vae, gan: where the text model lies now that it was trained with",
    )
    text = "a setting of a diffusers pipeline, its value as JSON, as num_inference_steps=4; may repeat"
    _add_settings(model, "--setting", text)
    model.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn (default 0)")
    model.add_argument(
        "--images_per_prompt", type=int, default=1, metavar="N", help="how many of each prompt (default 1)"
    )


def _add_settings(model: argparse._ArgumentGroup, flag: str, text: str) -> None:
    model.add_argument(flag, action="append", type=_setting, default=[], metavar="NAME=VALUE", help=text)


def _add_match_flags(match: argparse._ArgumentGroup) -> None:
    match.add_argument(
        "--min_match",
        type=float,
        metavar="X",
        help="reject images less like their prompt: the cosine of its vector and that of the image's caption",
    )
    match.add_argument("--match_with", metavar="KIND:LOC", help="the captioner that describes the images")
    match.add_argument(
        "--match_by",
        metavar="KIND:LOC",
        help="the text model that compares (default: the one that --model has)",
    )


def embed_options(args: argparse.Namespace, beam_args: Sequence[str]) -> ModelJobOptions:
    """Returns the options of `diptych embed` from its parsed flags.

    Raises:
        OptionError: A value is out of bounds.
    """
    return _embed_options(args, job_values(args, beam_args), "--model")


def caption_options(args: argparse.Namespace, beam_args: Sequence[str]) -> ModelJobOptions:
    """Returns the options of `diptych caption` from its parsed flags.

    Raises:
        OptionError: A value is out of bounds.
    """
    return _caption_options(args, job_values(args, beam_args), "--model")


def generate_options(args: argparse.Namespace, beam_args: Sequence[str]) -> GenerateOptions:
    """Returns the options of `diptych generate` from its parsed flags.

    Raises:
        OptionError: A value is out of bounds.
    """
    return _generate_options(
        args,
        job_values(args, beam_args),
        "--model",
        {"size_px": args.size, "image_format": args.image_format, "quality": args.quality},
    )


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
        embed=_embed_options(args, job, "--embed") if args.embed else None,
        caption=_caption_options(args, job, "--caption") if args.caption else None,
        generate=_generate_options(args, job, "--generate") if args.generate else None,
    )


def _embed_options(args: argparse.Namespace, job: Mapping[str, Any], flag: str) -> ModelJobOptions:
    asked = TextOptions(args.pooling, args.normalize)
    return ModelJobOptions(**job, **_model_values(args, flag, TEXT_KINDS, asked))


def _caption_options(args: argparse.Namespace, job: Mapping[str, Any], flag: str) -> ModelJobOptions:
    asked = CaptionOptions(
        args.beam_width,
        args.num_captions,
        args.max_words,
        args.length_penalty,
        args.no_repeat_ngram,
        args.features,
        tuple(args.generation),
    )
    return ModelJobOptions(**job, **_model_values(args, flag, CAPTION_KINDS, asked))


def _generate_options(
    args: argparse.Namespace,
    job: Mapping[str, Any],
    flag: str,
    image: Mapping[str, Any] = MappingProxyType({}),
) -> GenerateOptions:
    own = ImageOptions(text_model=args.text_model, settings=tuple(args.setting))
    asked = dataclasses.replace(own, **image)
    with_, by = args.match_with, args.match_by
    return GenerateOptions(
        **job,
        **_model_values(args, flag, IMAGE_KINDS, asked),
        images_per_prompt=args.images_per_prompt,
        seed=args.seed,
        min_match=args.min_match,
        match_with=with_ and parse_model(with_, CAPTION_KINDS, CaptionOptions(), args.device, "--match_with"),
        match_by=by and parse_model(by, TEXT_KINDS, TextOptions(), args.device, "--match_by"),
    )


def _model_values(
    args: argparse.Namespace,
    flag: str,
    kinds: Sequence[str],
    asked: TextOptions | CaptionOptions | ImageOptions,
) -> dict[str, Any]:
    named = getattr(args, flag.removeprefix("--"))
    return {
        "model": parse_model(named, kinds, asked, args.device, flag),
        "batch_size": args.batch_size,
        "max_failure_rate": args.max_failure_rate,
        "skip_done_in": tuple(getattr(args, "skip_done_in", ())),
    }


def parse_model(
    text: str,
    kinds: Sequence[str],
    asked: TextOptions | CaptionOptions | ImageOptions,
    device: str,
    flag: str = "--model",
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
