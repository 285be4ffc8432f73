"""The flags of each job as one frozen dataclass, checked before anything is read."""

import dataclasses
import math

from diptych.models.base import CaptionOptions, ImageOptions
from diptych.models.files.location import absolute
from diptych.models.spec import TEXT_KINDS, ModelSpec
from diptych.transforms.clean import CleanOptions
from diptych.transforms.errors import OptionError
from diptych.transforms.images.resize import ResizeOptions
from diptych.transforms.schemas import RAW_COLUMNS, REASONS, images_schema
from diptych.transforms.sources.base import MAX_IMAGE_BYTES
from diptych.transforms.sources.open import SourceOptions

# Samples of pictures and tensors that a chunk may hold; writing a tensor takes some ten times its memory
_IMAGE_SAMPLES, _TENSOR_SAMPLES = 400_000_000, 40_000_000
# Captions that a row of an earlier output may have
_PROMPTS_A_ROW = 8


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
        samples = _TENSOR_SAMPLES if self.resize.pixels else _IMAGE_SAMPLES
        return min(self.chunk_rows, max(1, samples // (3 * self.resize.size_px**2)))

    def __post_init__(self) -> None:
        super().__post_init__()
        resize, clean = self.resize, self.clean
        columns = self.source.metadata_columns
        taken = sorted({*columns} & {*images_schema(pixels="uint8").names, *RAW_COLUMNS})
        what = f"other names than the columns that are written anyway ({', '.join(taken)})"
        check(not taken, "--metadata_columns", ",".join(columns), what)
        check(
            len({*columns}) == len(columns),
            "--metadata_columns",
            ",".join(columns),
            "names that are all different",
        )
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


@dataclasses.dataclass(frozen=True)
class ModelJobOptions(JobOptions):
    """Options of `diptych embed` and `diptych caption`, and of all jobs with a model.

    Attributes:
        model: The model, and what is asked of it.
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
        asked = self.model.options
        assert isinstance(asked, ImageOptions)
        size_px = asked.size_px
        check(size_px is None or 8 <= size_px <= 4096, "--size", size_px, "between 8 and 4096 pixels")
        check(1 <= asked.quality <= 100, "--quality", asked.quality, "between 1 and 100")
        kind = self.model.kind
        is_told = asked.text_model is None or kind != "diffusers"
        least = self.min_match
        check(least is None or -1 <= least <= 1, "--min_match", least, "between -1 and 1")
        goes = least is None or self.match_with is not None
        check(
            goes, "--min_match", least, "beside a captioner that describes the images, --match_with KIND:LOC"
        )
        check(
            least is not None or not self.match_with, "--match_with", self.match_with, "beside a --min_match"
        )
        check(
            self.match_with is not None or not self.match_by,
            "--match_by",
            self.match_by,
            "beside --match_with",
        )
        named, colon, location = (asked.text_model or "bert:x").partition(":")
        is_named = named in TEXT_KINDS and bool(colon and location.strip())
        for name in ("match_with", "match_by"):
            if (spec := getattr(self, name)) is not None:
                object.__setattr__(self, name, spec.absolute())
        check(is_named, "--text_model", asked.text_model, f"KIND:LOC, of kind {' or '.join(TEXT_KINDS)}")
        check(is_told, "--text_model", asked.text_model, "left out: a diffusers pipeline brings its own")

    def rows_per_chunk(self, size_px: tuple[int, int]) -> int:
        """Returns the most prompts a chunk: `chunk_rows`, or fewer where so many images would not fit in memory.

        Args:
            size_px: (width, height) of the images.

        Raises:
            OptionError: Not even those of one prompt would fit.
        """
        of_prompt = 3 * size_px[0] * size_px[1] * self.images_per_prompt
        most = _IMAGE_SAMPLES // (3 * size_px[0] * size_px[1])
        bound = f"at most {most} at this size, so that the images of a prompt fit in memory"
        check(of_prompt <= _IMAGE_SAMPLES, "--images_per_prompt", self.images_per_prompt, bound)
        return min(self.chunk_rows, max(1, _IMAGE_SAMPLES // (_PROMPTS_A_ROW * of_prompt)))


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


def _check_caption(options: CaptionOptions) -> None:
    check(options.beam_width >= 1, "--beam_width", options.beam_width, "at least 1")
    bound = f"between 1 and --beam_width {options.beam_width}"
    check(1 <= options.num_captions <= options.beam_width, "--num_captions", options.num_captions, bound)
    check(options.max_words >= 1, "--max_words", options.max_words, "at least 1")
    penalty = options.length_penalty
    check(penalty is None or 0 <= penalty < math.inf, "--length_penalty", penalty, "0 or more, and finite")
    check(options.no_repeat_ngram >= 0, "--no_repeat_ngram", options.no_repeat_ngram, "at least 0")


def check(holds: bool, flag: str, value: object, expected: str) -> None:
    """Checks a flag's value.

    Raises:
        OptionError: What it must be does not hold.
    """
    if not holds:
        raise OptionError(f"{flag} is {value}. It must be {expected}.")
