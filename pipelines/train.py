"""Rows to a model: `diptych train word2vec|captioner|vae|gan --input SRC --output MODEL_DIR`.

diptych train captioner --input dataset_flickr8k.json --split train --validation_split val --output captioner

Rows that are not prepared are prepared first, into the working folder, so a training reads nothing but prepared ones.
A training that was stopped, however, goes on with the same command. Where MODEL_DIR is a URL, the model is trained in a
folder of the local cache (`DIPTYCH_CACHE`) and uploaded when it is done; to go on is then up to the same machine.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from diptych.models.device import choose_device
from diptych.models.errors import ModelError
from diptych.models.files.cache import to_local_path
from diptych.models.files.location import redacted
from diptych.models.files.weights import model_digest
from diptych.models.names import ModelName
from diptych.models.training.data import SCORES, CaptionData, Progress
from diptych.models.training.model_card import CURVES, README, draw_curves, write_card
from diptych.models.training.options import CaptionerTraining, GanTraining, VaeTraining, Word2VecTraining
from diptych.pipelines.lifecycle.output_folder import State
from diptych.pipelines.options.base import check
from diptych.pipelines.options.train import TrainOptions
from diptych.pipelines.training.model_folder import ModelFolder, refuse_own_input
from diptych.pipelines.training.progress import Display, describe_entry
from diptych.pipelines.training.rows import Rows, describe, open_rows
from diptych.transforms.errors import DiptychError
from diptych.transforms.fingerprint import digest, fingerprint, options_to_json
from diptych.transforms.storage import join

# Of an epoch, what the card says
IMAGE_FIGURES = (
    "validation_loss",
    "error",
    "divergence",
    "sample_distance",
    "text_distance",
    "real_distance",
)
_KINDS = {"lstm": "cnn-lstm", "gru": "cnn-rnn", "rnn": "cnn-rnn"}
_SUMMARIES = {
    "word2vec": "Word vectors for captions: a caption is the mean of its words' vectors.",
    "cnn-lstm": "Describes images: a convolutional encoder with an LSTM decoder.",
    "cnn-rnn": "Describes images: a convolutional encoder with a recurrent decoder.",
    "vae": "Makes images of text: a variational autoencoder that is told of the text.",
    "gan": "Makes images of text: the generator of a generative adversarial network.",
}


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a training came to.

    Attributes:
        kind: The kind of model, as in `KIND:LOCATION`.
        history: An entry an epoch.
        best_epoch: Of the model that was kept, from 1.
        scores: Of that epoch, by name.
        notes: More for the card.
    """

    kind: str
    history: Sequence[Mapping[str, Any]]
    best_epoch: int
    scores: Mapping[str, float]
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a training left.

    Attributes:
        output: The folder of the model.
        model: `word2vec`, `captioner`, `vae` or `gan`.
        state: What the folder held before.
    """

    output: str
    model: str
    state: State


def train(options: TrainOptions) -> TrainResult:
    """Trains a model to its end, or goes on where an earlier call stopped.

    Raises:
        DiptychError: It failed; what was done stays, and the same call goes on from there.
    """
    try:
        return TrainResult(options.output, options.model, _run(options))
    except ModelError as error:
        raise DiptychError(str(error)) from error


def _run(options: TrainOptions) -> State:
    options = _with_shape(options)
    folder = ModelFolder(options.output)
    sources = [options.rows, *filter(None, [options.validation])]
    refuse_own_input([url for source in sources for url in source.inputs], folder)
    _check_model(options)
    data = _describe_data(options)
    state = folder.open(_fingerprint(options, data), options.overwrite)
    if state is State.DONE:
        return state
    unit = "captions" if options.model == "word2vec" else "rows"
    epochs = options.training.epochs + getattr(options.training, "cider_epochs", 0)
    with Display(epochs, options.quiet, unit).shown() as display:
        if state is State.RESUMED:
            display.line("going on with the training that was stopped")
        rows = open_rows(options, folder.prepared)
        train_rows, validation_rows = rows
        display.line(
            f"{train_rows.num_rows:,} rows ({train_rows.num_captions:,} captions) to train on, "
            f"{validation_rows.num_rows:,} to validate by"
        )
        trained = _TRAINERS[options.model](options, rows, digest(data), folder.model, display)
    _describe_model(folder.model, options, rows, trained)
    folder.finish({"kind": trained.kind, "best_epoch": trained.best_epoch, "scores": dict(trained.scores)})
    return state


def _with_shape(options: TrainOptions) -> TrainOptions:
    """Returns the options with the shape of the generator that a GAN goes on with.

    Raises:
        ModelError: It cannot be loaded.
        OptionError: Another shape is asked for.
    """
    training = options.training
    if not (isinstance(training, GanTraining) and training.generator):
        return options
    from diptych.models.generation.image_generator import read_generator

    kind, location = ModelName.parse(training.generator)
    config = read_generator(to_local_path(location), (kind,))[0].config
    shape = {name: getattr(config, name) for name in _SHAPE}
    for name, value in shape.items():
        asked, default = getattr(training, name), getattr(GanTraining, name)
        flag = f"--{name.removesuffix('_px')}"
        check(
            asked in (default, value),
            flag,
            asked,
            f"left out, or {value}, as --generator {training.generator} has",
        )
    return dataclasses.replace(options, training=dataclasses.replace(training, **shape))


_SHAPE = ("size_px", "latent_dim", "condition_dim", "channels", "max_channels")


def _check_model(options: TrainOptions) -> None:
    """Makes what is asked for once, because what cannot be made must not cost a preparation, nor an old model.

    Raises:
        ModelError: There is no such device, encoder, or file of weights.
    """
    if isinstance(options.training, CaptionerTraining):
        from diptych.models.captioning.encoder import create_encoder, load_weights
        from diptych.models.files.weights import read_tensors

        choose_device(options.device)
        training = options.training
        weights = training.encoder_weights
        size_px, stride_px = training.encoder_size_px, training.encoder_stride_px
        encoder = create_encoder(training.encoder, size_px, stride_px, pretrained=weights == "imagenet")
        if weights not in ("imagenet", "none"):
            path = to_local_path(weights)
            load_weights(encoder, read_tensors(path), str(path))
    elif isinstance(options.training, VaeTraining | GanTraining):
        from diptych.models.training.images import check_models

        choose_device(options.device)
        check_models(options.training)


def _describe_data(options: TrainOptions) -> dict[str, Any]:
    data: dict[str, Any] = {"train": describe(options.rows)}
    if options.validation is not None:
        return {**data, "validation": describe(options.validation)}
    return {**data, "validation_share": options.validation_share}


def _fingerprint(options: TrainOptions, data: Mapping[str, Any]) -> dict[str, Any]:
    values = options_to_json(options.training)
    weights = values.get("encoder_weights", "none")
    if weights not in ("imagenet", "none"):  # the same file elsewhere is the same
        values["encoder_weights"] = model_digest(to_local_path(weights))
    for name in ("text_model", "generator"):
        if location := ModelName.parse(values.get(name, "")).location:
            values[name] = model_digest(to_local_path(location, hub=name == "text_model"))
    library = "gensim" if isinstance(options.training, Word2VecTraining) else "torch"
    found = fingerprint(f"train {options.model}", [], values)
    found["versions"][library] = metadata.version(library)
    del found["inputs"]
    return {**found, "data": dict(data)}


def _train_word2vec(
    options: TrainOptions, rows: tuple[Rows, Rows], data: str, folder: Path, display: Display
) -> Trained:
    from diptych.models.training.word2vec import train_word2vec

    assert isinstance(options.training, Word2VecTraining)
    train_rows, validation_rows = rows
    found = train_word2vec(
        train_rows.captions, validation_rows.captions, folder, options.training, _shows(display)
    )
    history, best = found["history"], int(found["best_epoch"])
    scores = {name: value for name, value in _entry(history, best).items() if name == "validation_loss"}
    notes = {name: found[name] for name in ("vocabulary_size", "num_words")}
    return Trained("word2vec", history, best, scores, notes)


def _train_captioner(
    options: TrainOptions, rows: tuple[Rows, Rows], data: str, folder: Path, display: Display
) -> Trained:
    from diptych.models.training.captioner import train_captioner

    assert isinstance(options.training, CaptionerTraining)
    train_rows, validation_rows = rows
    given = CaptionData(
        train_rows.batches, validation_rows.batches, train_rows.num_rows, validation_rows.num_rows, data
    )
    cache = None if options.cache is None else Path(options.cache)
    history = train_captioner(given, folder, options.training, options.device, _shows(display), cache)
    # as the training keeps it
    best = max(history, key=lambda entry: (entry["CIDEr"], -entry["validation_loss"]))
    scores = {name: best[name] for name in ("validation_loss", *SCORES)}
    return Trained(_KINDS[options.training.decoder], history, int(best["epoch"]), scores)


def _train_image_model(
    options: TrainOptions, rows: tuple[Rows, Rows], data: str, folder: Path, display: Display
) -> Trained:
    from diptych.models.training.images import train_image_model

    assert isinstance(options.training, VaeTraining | GanTraining)
    train_rows, validation_rows = rows
    given = CaptionData(
        train_rows.batches, validation_rows.batches, train_rows.num_rows, validation_rows.num_rows, data
    )
    cache = None if options.cache is None else Path(options.cache)
    history = train_image_model(given, folder, options.training, options.device, _shows(display), cache)
    best = min(history, key=lambda entry: entry.get("validation_loss", -entry["epoch"]))  # of a GAN the last
    scores = {name: best[name] for name in IMAGE_FIGURES if name in best}
    return Trained(options.model, history, int(best["epoch"]), scores)


_TRAINERS = {
    "word2vec": _train_word2vec,
    "captioner": _train_captioner,
    "vae": _train_image_model,
    "gan": _train_image_model,
}


def _shows(display: Display) -> Callable[[Progress], None]:
    loss: float | None = None

    def on_progress(progress: Progress) -> None:
        nonlocal loss
        display.rows(progress.phase, progress.epoch, progress.done, progress.total, progress.loss)
        loss = progress.loss if progress.loss is not None else loss
        if progress.entry:
            display.epoch(progress.entry)
        elif progress.phase == "validating" and progress.done >= progress.total and loss is not None:
            display.epoch({"epoch": progress.epoch + 1, "train_loss": loss})

    return on_progress


def _entry(history: Sequence[Mapping[str, Any]], epoch: int) -> Mapping[str, Any]:
    return next((entry for entry in history if entry["epoch"] == epoch), {})


def _describe_model(folder: Path, options: TrainOptions, rows: tuple[Rows, Rows], trained: Trained) -> None:
    """Writes the card and the curve beside the model."""
    train_rows, validation_rows = rows
    library = "gensim" if options.model == "word2vec" else "torch"
    names = [file.name for file in folder.iterdir() if file.is_file() and file.name[0] not in "._"]
    asides = {README, CURVES, "model_card.json"}
    card = {
        "kind": trained.kind,
        "summary": _SUMMARIES[trained.kind],
        "data": {
            "train": {"rows": train_rows.num_rows, "captions": train_rows.num_captions},
            "validation": {"rows": validation_rows.num_rows, "captions": validation_rows.num_captions},
            "input": list(options.rows.inputs),
            "validated_by": list(options.validation.inputs)
            if options.validation
            else "rows held out, by key",
            **trained.notes,
        },
        "options": options_to_json(options.training),
        "scores": dict(trained.scores),
        "epochs": {"trained": len(trained.history), "best": trained.best_epoch},
        "history": [dict(entry) for entry in trained.history],
        "digest": model_digest(folder, [name for name in names if name not in asides]),
        "versions": {name: metadata.version(name) for name in ("diptych", library, "numpy")},
    }
    write_card(folder, card)
    draw_curves(trained.history, folder / CURVES, f"{trained.kind}, {train_rows.num_rows:,} rows")


def report(result: TrainResult, _: argparse.Namespace, seconds: float) -> str:
    """Returns what the command prints: what the training came to, in a few lines."""
    summary, output = ModelFolder(result.output).summary(), redacted(result.output)
    kind, job = summary["kind"], _JOBS[result.model]
    lines = [
        f"trained   {kind}; kept epoch {summary['best_epoch']}: {describe_entry(summary['scores'])}",
        f"model     {output}",
        f"curve     {join(output, CURVES)}",
        f"card      {join(output, README)}",
    ]
    if result.state is State.DONE:
        lines.append("nothing to do: an earlier run has finished this")
    else:
        took = f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60)} s"
        lines.append(f"took      {took}")
    model = f"{kind}:{output}"
    source = "--prompts" if job == "generate" else "--input"
    lines.append(f"next      diptych {job} --model {model} {source} SRC --output OUT")
    return "\n".join(lines)


_JOBS = {"word2vec": "embed", "captioner": "caption", "vae": "generate", "gan": "generate"}
