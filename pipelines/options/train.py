"""What `diptych train` takes, for each model under its name."""

import argparse
import dataclasses
import math
from typing import Any

from diptych.models.errors import ModelError
from diptych.models.generation.generator import SIZES, is_size
from diptych.models.names import TEXT_KINDS, ModelName, is_device
from diptych.models.training.options import CaptionerTraining, GanTraining, VaeTraining, Word2VecTraining
from diptych.pipelines.options.base import add_choice, add_source_flags, add_value, check, source_options
from diptych.transforms.errors import OptionError
from diptych.transforms.sources.open import SourceOptions
from diptych.transforms.storage import is_same_place

SHARE = 0.05
_SEED_BELOW = 2**32

Training = CaptionerTraining | Word2VecTraining | VaeTraining | GanTraining
TRAININGS: dict[str, type[Training]] = {
    "word2vec": Word2VecTraining,
    "captioner": CaptionerTraining,
    "vae": VaeTraining,
    "gan": GanTraining,
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
        return next(name for name, kind in TRAININGS.items() if isinstance(self.training, kind))

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
        check(is_device(self.device), "--device", self.device, "auto, cpu, cuda or cuda:N")
        check(0 <= self.training.seed < _SEED_BELOW, "--seed", self.training.seed, "from 0 to 4294967295")
        if isinstance(self.training, CaptionerTraining):
            _check_captioner(self.training)
        elif isinstance(self.training, VaeTraining | GanTraining):
            _check_image_model(self.training)


def _check_image_model(training: VaeTraining | GanTraining) -> None:
    is_named = ModelName.parse(training.text_model).is_one_of(TEXT_KINDS)
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
        is_named = not training.generator or ModelName.parse(training.generator).is_one_of(("vae", "gan"))
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


def add_train_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `diptych train`, of each model under its name."""
    models = parser.add_subparsers(dest="model", required=True, metavar="MODEL")
    text = models.add_parser("word2vec", help="word vectors, for `diptych embed`", allow_abbrev=False)
    _add_shared_flags(text, Word2VecTraining())
    _add_word2vec_flags(text.add_argument_group("model"))
    captioner = models.add_parser(
        "captioner",
        help="an image encoder with a recurrent decoder, for `diptych caption`",
        allow_abbrev=False,
    )
    _add_shared_flags(captioner, CaptionerTraining())
    _add_captioner_flags(captioner.add_argument_group("model"), captioner.add_argument_group("training"))
    vae = models.add_parser(
        "vae", help="a variational autoencoder, for `diptych generate`", allow_abbrev=False
    )
    _add_shared_flags(vae, VaeTraining())
    _add_image_flags(vae.add_argument_group("model"), vae.add_argument_group("training"), VaeTraining())
    gan = models.add_parser(
        "gan", help="a generative adversarial network, for `diptych generate`", allow_abbrev=False
    )
    _add_shared_flags(gan, GanTraining())
    _add_image_flags(gan.add_argument_group("model"), gan.add_argument_group("training"), GanTraining())


def _add_shared_flags(parser: argparse.ArgumentParser, default: Training) -> None:
    job = parser.add_argument_group("job")
    job.add_argument(
        "--output", required=True, metavar="MODEL_DIR", help="folder or URL; made where there is none"
    )
    job.add_argument("--overwrite", action="store_true", help="delete what an earlier training wrote there")
    job.add_argument("--quiet", action="store_true", help="show neither progress nor summary")
    add_value(job, default, "epochs", "N", "at most so many")
    if hasattr(default, "patience"):
        add_value(job, default, "patience", "N", "stop after so many epochs that were not better")
    add_value(job, default, "seed", "N", "of all that is drawn")
    rows = parser.add_argument_group("input", "outputs of `diptych prepare`, or what it reads")
    add_source_flags(rows)
    rows.add_argument(
        "--validation",
        action="append",
        metavar="SRC",
        help="rows to choose the best epoch by; may repeat (default: a share of --input)",
    )
    rows.add_argument(
        "--validation_split", metavar="A[,B]", help="of a Karpathy file: of --validation, or of --input"
    )
    rows.add_argument("--validation_images", metavar="DIR", help="as --images, of --validation")
    rows.add_argument(
        "--validation_share",
        type=float,
        metavar="X",
        help=f"hold out this share of --input, chosen by key (default {SHARE})",
    )


def _add_word2vec_flags(model: argparse._ArgumentGroup) -> None:
    default = Word2VecTraining()
    for name, metavar, text in (
        ("vector_size", "N", "length of the vectors"),
        ("window", "N", "words on each side that a word is learnt with"),
        ("min_count", "N", "leave out words that are rarer"),
        ("negative", "N", "random words that each is told from"),
        ("sample", "X", "thin out words of a greater share of the text, 0 keeps all"),
        ("alpha", "X", "learning rate at the start"),
    ):
        add_value(model, default, name, metavar, text)
    kind = model.add_mutually_exclusive_group()
    kind.add_argument(
        "--sg", dest="skip_gram", action="store_true", default=True, help="skip-gram (the default)"
    )
    kind.add_argument("--cbow", dest="skip_gram", action="store_false", help="continuous bag of words")


def _add_captioner_flags(model: argparse._ArgumentGroup, training: argparse._ArgumentGroup) -> None:
    default = CaptionerTraining()
    add_value(model, default, "encoder", "NAME", "of torchvision, or timm:NAME")
    add_value(model, default, "encoder_weights", "W", "imagenet, none, or a safetensors file or URL")
    add_value(model, default, "encoder_size_px", "PX", "side of the images that it sees", flag="encoder_size")
    text = "side of a region: 16 sees finer than 32, which is the last grid of most"
    shown = "0, the last"
    add_value(model, default, "encoder_stride_px", "PX", text, flag="encoder_stride", default_text=shown)
    model.add_argument("--fine_tune", action="store_true", help="train the encoder as well")
    add_choice(model, default, "decoder", ("lstm", "gru", "rnn"), "recurrent cell")
    model.add_argument(
        "--no_attention", dest="attention", action="store_false", help="see the mean of all regions only"
    )
    for name, metavar, text in (
        ("embedding_dim", "N", "of a word"),
        ("hidden_dim", "N", "of the recurrent state"),
        ("attention_dim", "N", "of the attention's hidden layer"),
        ("min_word_count", "N", "leave rarer words out of the vocabulary"),
        ("max_words", "N", "longest caption"),
    ):
        add_value(model, default, name, metavar, text)
    for name, metavar, text in (
        ("batch_size", "N", "images a step"),
        ("captions_per_image", "N", "captions of each that a step learns from, 0 takes all"),
        ("learning_rate", "X", "the highest"),
        ("encoder_learning_rate", "X", "of the encoder, with --fine_tune"),
        (
            "cider_epochs",
            "N",
            "at the end, learn from the CIDEr of drawn captions (self-critical) for so many",
        ),
        ("cider_learning_rate", "X", "in these"),
        ("cider_samples", "N", "captions drawn of each image in these"),
        ("weight_decay", "X", "of AdamW"),
        ("dropout", "X", "share of units"),
        ("label_smoothing", "X", "share of probability that is spread over all words"),
        ("ema", "X", "decay of the average of the weights that is kept"),
        ("beam_width", "N", "of the captions that are scored"),
        ("max_scored", "N", "score the captions of so many validation images"),
        ("threads", "N", "CPU threads of a step, 0 for all; a small model is faster with 1"),
    ):
        add_value(training, default, name, metavar, text)
    _add_machine_flags(training, default)


def _add_machine_flags(
    training: argparse._ArgumentGroup, default: CaptionerTraining | VaeTraining | GanTraining
) -> None:
    """Adds the flags of all that is trained with PyTorch."""
    text = "auto is bfloat16 on a GPU that has it"
    add_choice(training, default, "precision", ("auto", "float32", "bfloat16"), text)
    training.add_argument("--flips", action="store_true", help="mirror half of the images")
    training.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N")
    training.add_argument(
        "--cache", metavar="DIR", help="keep the encoded images in this local folder, for the next training"
    )


def _add_image_flags(
    model: argparse._ArgumentGroup, training: argparse._ArgumentGroup, default: VaeTraining | GanTraining
) -> None:
    model.add_argument(
        "--text_model",
        required=True,
        metavar="KIND:LOC",
        help="word2vec or bert, whose vectors images are drawn from; the model remembers it",
    )
    if isinstance(default, GanTraining):
        model.add_argument(
            "--generator",
            default="",
            metavar="KIND:LOC",
            help="go on with the generator of this vae or gan (default: a new one)",
        )
    text = "side of the images: 4 to 7, doubled twice or more"
    add_value(model, default, "size_px", "PX", text, flag="size")
    for name, metavar, text in (
        ("latent_dim", "N", "length of the noise"),
        ("condition_dim", "N", "of what is made of a text vector"),
        ("channels", "N", "of the grid of half the size; twice as many at half of it, and so on"),
        ("max_channels", "N", "but never more"),
    ):
        add_value(model, default, name, metavar, text)
    values = [
        ("batch_size", "N", "images a step"),
        ("learning_rate", "X", "the highest; a GAN keeps to it"),
        ("ema", "X", "decay of the average of the weights that is kept"),
        ("threads", "N", "CPU threads of a step, 0 for all"),
    ]
    if isinstance(default, VaeTraining):
        values += [
            ("divergence_weight", "X", "of the latent's divergence: more makes images plainer"),
            ("text_first", "X", "share of the epochs at the beginning that learn from the text alone"),
        ]
    else:
        values += [
            ("discriminator_learning_rate", "X", "of the discriminator"),
            ("r1_weight", "X", "of the gradient penalty on real images, 0 leaves it out"),
            ("r1_every", "N", "steps from one penalty to the next"),
        ]
    for name, metavar, text in values:
        add_value(training, default, name, metavar, text)
    _add_machine_flags(training, default)


def train_options(args: argparse.Namespace) -> TrainOptions:
    """Returns the options of `diptych train` from its parsed flags.

    Raises:
        OptionError: A value is out of bounds, or flags contradict each other.
    """
    kind: type[Any] = TRAININGS[args.model]
    names = [field.name for field in dataclasses.fields(kind) if hasattr(args, field.name)]
    try:
        training = kind(**{name: getattr(args, name) for name in names})
    except ModelError as error:
        raise OptionError(f"--{error}") from error
    validation = _validation(args)
    if validation is not None and args.validation_share is not None:
        raise OptionError(
            f"--validation_share {args.validation_share} holds rows of --input out, and there are others to validate "
            "by. Give the one or the other."
        )
    return TrainOptions(
        rows=RowSource(tuple(args.input), args.format, source_options(args, args.images, args.split)),
        output=args.output,
        training=training,
        validation=validation,
        validation_share=SHARE if args.validation_share is None else args.validation_share,
        device=getattr(args, "device", "auto"),
        cache=getattr(args, "cache", None),
        overwrite=args.overwrite,
        quiet=args.quiet,
    )


def _validation(args: argparse.Namespace) -> RowSource | None:
    if args.validation is None and args.validation_split is None:
        if args.validation_images is not None:
            raise OptionError(
                f"--validation_images {args.validation_images} are the images of --validation, which is not given. "
                "Name it, or leave both out."
            )
        return None
    inputs = tuple(args.validation or args.input)
    is_same = all(any(is_same_place(url, other) for other in args.input) for url in inputs)
    if is_same and args.validation_split == args.split:
        raise OptionError(
            "The rows to validate by are those to train on. Give others with --validation, another "
            "--validation_split, or hold out a --validation_share."
        )
    images = args.validation_images or (args.images if is_same else None)
    return RowSource(inputs, args.format, source_options(args, images, args.validation_split))
