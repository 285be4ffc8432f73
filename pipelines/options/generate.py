"""What `diptych generate` takes."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from diptych.models.base import CaptionOptions, ImageOptions, TextOptions
from diptych.models.names import CAPTION_KINDS, IMAGE_KINDS, TEXT_KINDS, ModelName
from diptych.models.spec import ModelSpec
from diptych.pipelines.options.base import (
    MAX_CHUNK_SAMPLES,
    add_choice,
    add_shared_flags,
    add_source_flags,
    add_value,
    check,
    job_values,
)
from diptych.pipelines.options.models import (
    ModelJobOptions,
    add_device_flags,
    add_done_flag,
    add_model_flag,
    add_settings,
    model_values,
    parse_model,
)

# Captions that a row of an earlier output may have
_PROMPTS_A_ROW = 8


@dataclasses.dataclass(frozen=True)
class GenerateOptions(ModelJobOptions):
    """Options of `diptych generate`; its inputs are prompts.

    Attributes:
        images_per_prompt: How many images are made of each.
        seed: Of all that is drawn.
        min_match: The least similarity of an image, as `match_with` describes it, to its prompt; the rest is rejected.
        match_with: The captioner.
        match_by: The text model that compares; None takes the one that the model draws from.
    """

    images_per_prompt: int = 1
    seed: int = 0
    min_match: float | None = None
    match_with: ModelSpec | None = None
    match_by: ModelSpec | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        number = self.images_per_prompt
        check(1 <= number <= 10_000, "--images_per_prompt", number, "between 1 and 10000")
        check(0 <= self.seed < 2**63, "--seed", self.seed, "0 or more, and below 2 ** 63")
        for name in ("match_with", "match_by"):
            if (spec := getattr(self, name)) is not None:
                object.__setattr__(self, name, spec.absolute())
        _check_images(self.model)
        self._check_match()

    def _check_match(self) -> None:
        least, captioner, by = self.min_match, self.match_with, self.match_by
        check(least is None or -1 <= least <= 1, "--min_match", least, "between -1 and 1")
        expected = "beside a captioner that describes the images, --match_with KIND:LOC"
        check(least is None or captioner is not None, "--min_match", least, expected)
        check(least is not None or captioner is None, "--match_with", captioner, "beside a --min_match")
        check(captioner is not None or by is None, "--match_by", by, "beside --match_with")

    def rows_per_chunk(self, size_px: tuple[int, int]) -> int:
        """Returns the most prompts a chunk: `chunk_rows`, or fewer where so many images would not fit in memory.

        Args:
            size_px: (width, height) of the images.

        Raises:
            OptionError: Not even those of one prompt would fit.
        """
        of_prompt = 3 * size_px[0] * size_px[1] * self.images_per_prompt
        most = MAX_CHUNK_SAMPLES // (3 * size_px[0] * size_px[1])
        bound = f"at most {most} at this size, so that the images of a prompt fit in memory"
        check(of_prompt <= MAX_CHUNK_SAMPLES, "--images_per_prompt", self.images_per_prompt, bound)
        return min(self.chunk_rows, max(1, MAX_CHUNK_SAMPLES // (_PROMPTS_A_ROW * of_prompt)))


def _check_images(model: ModelSpec) -> None:
    options = model.options
    assert isinstance(options, ImageOptions)
    size_px, text = options.size_px, options.text_model
    check(size_px is None or 8 <= size_px <= 4096, "--size", size_px, "between 8 and 4096 pixels")
    check(1 <= options.quality <= 100, "--quality", options.quality, "between 1 and 100")
    is_named = text is None or ModelName.parse(text).is_one_of(TEXT_KINDS)
    check(is_named, "--text_model", text, f"KIND:LOC, of kind {' or '.join(TEXT_KINDS)}")
    expected = "left out: a diffusers pipeline brings its own"
    check(text is None or model.kind != "diffusers", "--text_model", text, expected)


def add_generate_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `diptych generate`."""
    add_shared_flags(parser)
    add_source_flags(parser.add_argument_group("input"), "--prompts")
    model = parser.add_argument_group("model")
    add_model_flag(model, "--model", IMAGE_KINDS, required=True)
    add_device_flags(model)
    add_done_flag(model)
    add_generator_flags(model)
    add_match_flags(parser.add_argument_group("match"))
    image = parser.add_argument_group("images")
    image.add_argument("--size", type=int, metavar="PX", help="side of the images (default: the model's own)")
    add_choice(image, ImageOptions, "image_format", ("png", "jpeg"))
    add_value(image, ImageOptions, "quality", "Q", "of JPEG, 1 to 100")


def add_generator_flags(model: argparse._ArgumentGroup) -> None:
    """Adds the flags of a generator."""
    model.add_argument(
        "--text_model",
        metavar="KIND:LOC",
        help="vae, gan: where the text model lies now that it was trained with",
    )
    text = "a setting of a diffusers pipeline, its value as JSON, as num_inference_steps=4; may repeat"
    add_settings(model, "--setting", text)
    add_value(model, GenerateOptions, "seed", "N", "of all that is drawn")
    add_value(model, GenerateOptions, "images_per_prompt", "N", "how many of each prompt")


def add_match_flags(match: argparse._ArgumentGroup) -> None:
    """Adds the flags that compare images with their prompts."""
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


def generate_options(args: argparse.Namespace, beam_args: Sequence[str]) -> GenerateOptions:
    """Returns the options of `diptych generate` from its parsed flags.

    Raises:
        OptionError: A value is out of bounds.
    """
    return generate_options_of(
        args,
        job_values(args, beam_args),
        "--model",
        {"size_px": args.size, "image_format": args.image_format, "quality": args.quality},
    )


def generate_options_of(
    args: argparse.Namespace,
    job: Mapping[str, Any],
    flag: str,
    image: Mapping[str, Any] = MappingProxyType({}),
) -> GenerateOptions:
    """Returns the options of images from text; `flag` names the model, `image` has what is asked of the images."""
    own = ImageOptions(text_model=args.text_model, settings=tuple(args.setting))
    image_options = dataclasses.replace(own, **image)
    with_, by = args.match_with, args.match_by
    return GenerateOptions(
        **job,
        **model_values(args, flag, IMAGE_KINDS, image_options),
        images_per_prompt=args.images_per_prompt,
        seed=args.seed,
        min_match=args.min_match,
        match_with=with_ and parse_model(with_, CAPTION_KINDS, CaptionOptions(), args.device, "--match_with"),
        match_by=by and parse_model(by, TEXT_KINDS, TextOptions(), args.device, "--match_by"),
    )
