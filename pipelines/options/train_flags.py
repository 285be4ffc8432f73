"""The flags of `diptych train`, of each model under its name, from the command line to its options."""

import argparse
import dataclasses
from typing import Any

from diptych.models.errors import ModelError
from diptych.models.training.options import CaptionerTraining, GanTraining, VaeTraining, Word2VecTraining
from diptych.pipelines.lifecycle.output_folder import is_same_place
from diptych.pipelines.options.prepare import add_source_flags
from diptych.pipelines.options.train import SHARE, RowSource, Training, TrainOptions
from diptych.transforms.errors import OptionError
from diptych.transforms.sources.open import SourceOptions


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
    _add_value(job, default, "epochs", "N", "at most so many")
    if hasattr(default, "patience"):
        _add_value(job, default, "patience", "N", "stop after so many epochs that were not better")
    _add_value(job, default, "seed", "N", "of all that is drawn")
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


def _add_value(group: argparse._ArgumentGroup, default: Any, name: str, metavar: str, text: str) -> None:
    """Adds a flag named as an option, with its type and default."""
    value = getattr(default, name)
    group.add_argument(
        f"--{name}", type=type(value), default=value, metavar=metavar, help=f"{text} (default {value})"
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
        _add_value(model, default, name, metavar, text)
    kind = model.add_mutually_exclusive_group()
    kind.add_argument(
        "--sg", dest="skip_gram", action="store_true", default=True, help="skip-gram (the default)"
    )
    kind.add_argument("--cbow", dest="skip_gram", action="store_false", help="continuous bag of words")


def _add_captioner_flags(model: argparse._ArgumentGroup, training: argparse._ArgumentGroup) -> None:
    default = CaptionerTraining()
    _add_value(model, default, "encoder", "NAME", "of torchvision, or timm:NAME")
    _add_value(model, default, "encoder_weights", "W", "imagenet, none, or a safetensors file or URL")
    model.add_argument(
        "--encoder_size",
        dest="encoder_size_px",
        type=int,
        default=default.encoder_size_px,
        metavar="PX",
        help=f"side of the images that it sees (default {default.encoder_size_px})",
    )
    model.add_argument(
        "--encoder_stride",
        dest="encoder_stride_px",
        type=int,
        default=default.encoder_stride_px,
        metavar="PX",
        help="side of a region: 16 sees finer than 32, which is the last grid of most (default 0, the last)",
    )
    model.add_argument("--fine_tune", action="store_true", help="train the encoder as well")
    model.add_argument(
        "--decoder",
        default=default.decoder,
        choices=("lstm", "gru", "rnn"),
        help=f"recurrent cell (default {default.decoder})",
    )
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
        _add_value(model, default, name, metavar, text)
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
        _add_value(training, default, name, metavar, text)
    _add_machine_flags(training, default)


def _add_machine_flags(
    training: argparse._ArgumentGroup, default: CaptionerTraining | VaeTraining | GanTraining
) -> None:
    """Adds the flags of all that is trained with PyTorch."""
    training.add_argument(
        "--precision",
        default=default.precision,
        choices=("auto", "float32", "bfloat16"),
        help="auto is bfloat16 on a GPU that has it (default auto)",
    )
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
    model.add_argument(
        "--size",
        dest="size_px",
        type=int,
        default=default.size_px,
        metavar="PX",
        help=f"side of the images: 4 to 7, doubled twice or more (default {default.size_px})",
    )
    for name, metavar, text in (
        ("latent_dim", "N", "length of the noise"),
        ("condition_dim", "N", "of what is made of a text vector"),
        ("channels", "N", "of the grid of half the size; twice as many at half of it, and so on"),
        ("max_channels", "N", "but never more"),
    ):
        _add_value(model, default, name, metavar, text)
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
        _add_value(training, default, name, metavar, text)
    _add_machine_flags(training, default)


_TRAININGS = {
    "word2vec": Word2VecTraining,
    "captioner": CaptionerTraining,
    "vae": VaeTraining,
    "gan": GanTraining,
}


def train_options(args: argparse.Namespace) -> TrainOptions:
    """Returns the options of `diptych train` from its parsed flags.

    Raises:
        OptionError: A value is out of bounds, or flags contradict each other.
    """
    kind: type[Any] = _TRAININGS[args.model]
    names = [field.name for field in dataclasses.fields(kind) if hasattr(args, field.name)]
    try:
        training = kind(**{name: getattr(args, name) for name in names})
    except ModelError as error:
        raise OptionError(f"--{error}") from error
    columns = args.image_column, args.caption_column, args.key_column
    validation = _validation(args)
    if validation is not None and args.validation_share is not None:
        raise OptionError(
            f"--validation_share {args.validation_share} holds rows of --input out, and there are others to validate "
            "by. Give the one or the other."
        )
    return TrainOptions(
        rows=RowSource(tuple(args.input), args.format, SourceOptions(args.images, args.split, *columns)),
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
    columns = args.image_column, args.caption_column, args.key_column
    return RowSource(inputs, args.format, SourceOptions(images, args.validation_split, *columns))
