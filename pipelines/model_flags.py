"""The flags of the jobs with a model, from the command line to their options."""

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any

from models.base import CaptionOptions, ImageOptions, TextOptions
from models.spec import CAPTION_KINDS, IMAGE_KINDS, TEXT_KINDS, ModelSpec
from pipelines.flags import add_shared_flags, add_source_flags, job_values
from pipelines.options import GenerateOptions, ModelJobOptions
from transforms.errors import OptionError


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


def add_generate_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `diptych generate`."""
    add_shared_flags(parser)
    add_source_flags(parser.add_argument_group("input"), "--prompts")
    model = parser.add_argument_group("model")
    add_model_flags(model, IMAGE_KINDS)
    model.add_argument(
        "--text_model",
        metavar="KIND:LOC",
        help="vae, gan: where the text model lies now that it was trained with",
    )
    model.add_argument(
        "--generation",
        action="append",
        type=_setting,
        default=[],
        metavar="NAME=VALUE",
        help="a setting of a diffusers pipeline, its value as JSON, as num_inference_steps=4; may repeat",
    )
    _add_match_flags(parser.add_argument_group("match"))
    image = parser.add_argument_group("images")
    image.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn (default 0)")
    image.add_argument(
        "--images_per_prompt", type=int, default=1, metavar="N", help="how many of each prompt (default 1)"
    )
    image.add_argument("--size", type=int, metavar="PX", help="side of the images (default: the model's own)")
    image.add_argument("--image_format", default="png", choices=("png", "jpeg"), help="default png")
    image.add_argument("--quality", type=int, default=95, metavar="Q", help="of JPEG, 1 to 100 (default 95)")


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


def generate_options(args: argparse.Namespace, beam_args: Sequence[str]) -> GenerateOptions:
    """Returns the options of `diptych generate` from its parsed flags.

    Raises:
        OptionError: A value is out of bounds.
    """
    asked = ImageOptions(args.size, args.image_format, args.quality, args.text_model, tuple(args.generation))
    values = vars(_model_options(args, beam_args, IMAGE_KINDS, asked))
    with_, by = args.match_with, args.match_by
    return GenerateOptions(
        **values,
        images_per_prompt=args.images_per_prompt,
        seed=args.seed,
        min_match=args.min_match,
        match_with=with_ and parse_model(with_, CAPTION_KINDS, CaptionOptions(), args.device, "--match_with"),
        match_by=by and parse_model(by, TEXT_KINDS, TextOptions(), args.device, "--match_by"),
    )


def _model_options(
    args: argparse.Namespace,
    beam_args: Sequence[str],
    kinds: Sequence[str],
    asked: TextOptions | CaptionOptions | ImageOptions,
) -> ModelJobOptions:
    return ModelJobOptions(
        **job_values(args, beam_args),
        model=parse_model(args.model, kinds, asked, args.device),
        batch_size=args.batch_size,
        max_failure_rate=args.max_failure_rate,
    )


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
