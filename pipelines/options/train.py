"""The flags of `diptych train` as one frozen dataclass, checked before anything is read."""

import dataclasses
import math
import re

from diptych.models.generation.generator import SIZES, is_size
from diptych.models.text.text_model import TEXT_KINDS
from diptych.models.training.options import CaptionerTraining, GanTraining, VaeTraining, Word2VecTraining
from diptych.pipelines.options.base import check
from diptych.transforms.sources.open import SourceOptions

SHARE = 0.05
_SEED_BELOW = 2**32

Training = CaptionerTraining | Word2VecTraining | VaeTraining | GanTraining
_NAMES = {
    Word2VecTraining: "word2vec",
    CaptionerTraining: "captioner",
    VaeTraining: "vae",
    GanTraining: "gan",
}


@dataclasses.dataclass(frozen=True)
class RowSource:
    """Where rows come from.

    Attributes:
        inputs: Outputs of `diptych prepare`, or anything that it reads.
        format: One of `diptych.transforms.sources.open.FORMATS`, or `auto`.
        source: What the user says about the input beyond its place.
    """

    inputs: tuple[str, ...]
    format: str = "auto"
    source: SourceOptions = SourceOptions()


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Options of `diptych train`.

    Attributes:
        rows: Rows to train on, and to hold some out of where there is no `validation`.
        output: Folder of the model, local or an fsspec URL.
        training: What is trained, and how.
        validation: Rows to choose the best epoch by; None holds some of `rows` out.
        validation_share: How many: about this share, the same ones in whatever order the rows come.
        device: `auto`, `cpu`, `cuda` or `cuda:N`; word vectors are trained on the CPU.
        cache: Folder for the cache of images, or of what an encoder makes of them, kept for the next training; None
            makes one that is not.
        overwrite: Delete what an earlier training wrote to `output`.
        quiet: Show neither progress nor summary.
    """

    rows: RowSource
    output: str
    training: Training
    validation: RowSource | None = None
    validation_share: float = SHARE
    device: str = "auto"
    cache: str | None = None
    overwrite: bool = False
    quiet: bool = False

    @property
    def model(self) -> str:
        """What is trained: `word2vec`, `captioner`, `vae` or `gan`."""
        return _NAMES[type(self.training)]

    @property
    def size_px(self) -> int | None:
        """Side of the images that the training reads; None where it reads none."""
        if isinstance(self.training, CaptionerTraining):
            return self.training.encoder_size_px
        return None if isinstance(self.training, Word2VecTraining) else self.training.size_px

    def __post_init__(self) -> None:
        places = [("--output", self.output), *(("--input", url) for url in self.rows.inputs)]
        places += [("--validation", url) for url in (self.validation.inputs if self.validation else ())]
        places += [("--cache", self.cache)] if self.cache is not None else []
        for flag, place in places:
            check(bool(place.strip()), flag, repr(place), "a path or URL")
        check(
            "://" not in (self.cache or ""), "--cache", self.cache, "a local folder: it is mapped into memory"
        )
        check(0 < self.validation_share < 1, "--validation_share", self.validation_share, "between 0 and 1")
        is_device = re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None
        check(is_device, "--device", self.device, "auto, cpu, cuda or cuda:N")
        check(0 <= self.training.seed < _SEED_BELOW, "--seed", self.training.seed, "from 0 to 4294967295")
        if isinstance(self.training, CaptionerTraining):
            _check_captioner(self.training)
        elif isinstance(self.training, VaeTraining | GanTraining):
            _check_image_model(self.training)


def _check_image_model(training: VaeTraining | GanTraining) -> None:
    kind, colon, location = training.text_model.partition(":")
    is_named = kind in TEXT_KINDS and bool(colon and location.strip())
    check(
        is_named,
        "--text_model",
        repr(training.text_model),
        f"KIND:LOC, of kind {' or '.join(TEXT_KINDS)}",
    )
    check(is_size(training.size_px), "--size", training.size_px, f"another: {SIZES}")
    for name in ("latent_dim", "condition_dim", "channels", "max_channels", "epochs", "batch_size"):
        check(getattr(training, name) >= 1, f"--{name}", getattr(training, name), "at least 1")
    check(training.threads >= 0, "--threads", training.threads, "0 or more")
    check(0 <= training.ema < 1, "--ema", training.ema, "from 0 to below 1")
    rates = ["learning_rate"]
    if isinstance(training, VaeTraining):
        check(training.patience >= 1, "--patience", training.patience, "at least 1")
        check(0 <= training.text_first < 1, "--text_first", training.text_first, "from 0 to below 1")
        rates.append("divergence_weight")
    else:
        kind, colon, location = training.generator.partition(":")
        is_named = not training.generator or (kind in ("vae", "gan") and bool(colon and location.strip()))
        check(is_named, "--generator", repr(training.generator), "KIND:LOC, of kind vae or gan")
        check(training.batch_size >= 2, "--batch_size", training.batch_size, "at least 2: texts are swapped")
        check(training.r1_every >= 1, "--r1_every", training.r1_every, "at least 1")
        weight = training.r1_weight
        check(weight >= 0 and math.isfinite(weight), "--r1_weight", weight, "0 or more, and finite")
        rates.append("discriminator_learning_rate")
    for name in rates:
        rate = getattr(training, name)
        check(rate > 0 and math.isfinite(rate), f"--{name}", rate, "above 0 and finite")


def _check_captioner(training: CaptionerTraining) -> None:
    for name in ("embedding_dim", "hidden_dim", "attention_dim", "min_word_count", "max_words", "epochs"):
        check(getattr(training, name) >= 1, f"--{name}", getattr(training, name), "at least 1")
    for name in ("batch_size", "patience", "beam_width", "max_scored"):
        check(getattr(training, name) >= 1, f"--{name}", getattr(training, name), "at least 1")
    most = training.captions_per_image
    check(most >= 0, "--captions_per_image", most, "0 or more")
    check(training.threads >= 0, "--threads", training.threads, "0 or more")
    check(training.cider_epochs >= 0, "--cider_epochs", training.cider_epochs, "0 or more")
    check(training.cider_samples >= 2, "--cider_samples", training.cider_samples, "at least 2")
    for name in ("learning_rate", "encoder_learning_rate", "cider_learning_rate"):
        rate = getattr(training, name)
        check(rate > 0 and math.isfinite(rate), f"--{name}", rate, "above 0 and finite")
    for name in ("dropout", "label_smoothing", "ema"):
        check(0 <= getattr(training, name) < 1, f"--{name}", getattr(training, name), "from 0 to below 1")
    decay = training.weight_decay
    check(decay >= 0 and math.isfinite(decay), "--weight_decay", decay, "0 or more, and finite")
    size_px = training.encoder_size_px
    check(32 <= size_px <= 1024, "--encoder_size", size_px, "from 32 to 1024 pixels")
    stride_px = training.encoder_stride_px
    check(
        0 <= stride_px <= size_px,
        "--encoder_stride",
        stride_px,
        "0 for the last, or pixels up to --encoder_size",
    )
    check(
        bool(training.encoder.strip()),
        "--encoder",
        repr(training.encoder),
        "a network of torchvision, or timm:NAME",
    )
    weights = training.encoder_weights
    check(bool(weights.strip()), "--encoder_weights", repr(weights), "imagenet, none, or a safetensors file")
    with_features = weights != "none" or training.fine_tune
    check(
        with_features,
        "--encoder_weights",
        "none",
        "imagenet or a file without --fine_tune: random features say little",
    )
