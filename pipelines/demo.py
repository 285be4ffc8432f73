"""The whole thing on data that it draws itself: `diptych demo`. No network, no account.

diptych demo --output demo
"""

import argparse
import dataclasses
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.base import CaptionOptions, TextOptions
from models.captioner_data import CaptionerTraining
from models.spec import ModelSpec
from models.word2vec_training import Word2VecTraining
from pipelines.caption import caption
from pipelines.contact_sheet import contact_sheet
from pipelines.embed import embed
from pipelines.evaluate import EvaluateOptions, evaluate_captions, read_candidates, table
from pipelines.lite0 import ENCODER, write_lite0_weights
from pipelines.options import ModelJobOptions, PrepareOptions
from pipelines.prepare import prepare
from pipelines.scene_folders import SceneFolders, write_data_set
from pipelines.scenes import draw_scene, named_groups
from pipelines.summary import summary
from pipelines.train import run_training
from pipelines.training_options import RowSource, TrainOptions
from pipelines.verify import verify
from transforms.errors import DiptychError, OptionError
from transforms.storage import output_errors

# Enough for the scenes in a minute; photographs take more of everything
CAPTIONER = CaptionerTraining(
    encoder=ENCODER,
    encoder_size_px=96,
    encoder_stride_px=16,
    embedding_dim=128,
    hidden_dim=192,
    attention_dim=64,
    dropout=0.1,
    label_smoothing=0.0,
    min_word_count=2,
    max_words=24,
    epochs=6,
    patience=6,
    cider_epochs=1,
    cider_learning_rate=3e-4,
    cider_samples=3,
    batch_size=16,
    captions_per_image=3,
    learning_rate=4e-3,
    ema=0.98,
    max_scored=100,
    threads=1,
)
NUM_SCENES = 5400
WORD2VEC = Word2VecTraining(vector_size=64, epochs=5, patience=5)


def add_demo_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `diptych demo`."""
    parser.add_argument("--output", default="demo", metavar="DIR", help="local folder (default demo)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawings (default 0)")
    text = f"how many to draw (default {NUM_SCENES})"
    parser.add_argument("--scenes", type=int, default=NUM_SCENES, metavar="N", help=text)


class _Steps:
    """Says what is done, and at the end what it took."""

    def __init__(self) -> None:
        self._seconds: list[tuple[str, float]] = []

    @contextmanager
    def __call__(self, name: str, what: str) -> Iterator[None]:
        print(f"{len(self._seconds) + 1}. {what}", flush=True)
        start = time.monotonic()
        yield
        self._seconds.append((name, time.monotonic() - start))

    def lines(self) -> Iterator[str]:
        total = sum(seconds for _, seconds in self._seconds)
        for name, seconds in self._seconds:
            yield f"{name:16} {seconds:6.1f} s  {seconds / total:4.0%}"
        yield f"{'in all':16} {total:6.1f} s"


def demo(output: str, seed: int = 0, num_scenes: int = NUM_SCENES) -> None:
    """Draws a data set, prepares it, trains on a part of it, and describes the rest, which the models never saw.

    Args:
        output: A local folder: the data go to `data`, the rows to train on to `train`, the models to `models`, and
            what the jobs make of the other rows to `out` in it.
        seed: Of the drawings.
        num_scenes: How many.

    Raises:
        OptionError: A number is out of bounds, or `output` holds another demo.
        OutputError: The folder cannot be written.
    """
    step = _Steps()
    data, train, out = (os.path.join(output, name) for name in ("data", "train", "out"))
    words, captioner = (os.path.join(output, "models", name) for name in ("word2vec", "captioner"))
    with step(
        "draw", f"drawing {num_scenes:,} captioned scenes to {data}, as COCO, Flickr30k and WebDataset"
    ):
        folders = _draw(Path(data), num_scenes, seed)
    for split, folder in (("train", train), ("val", out)):
        annotation = folders.coco / "annotations" / f"captions_{split}2017.json"
        with step(f"prepare {split}", f"diptych prepare --input {annotation} --output {folder}"):
            start = time.monotonic()
            result = prepare(PrepareOptions(inputs=(str(annotation),), output=folder, quiet=True))
            _say(summary(result, time.monotonic() - start))
    rows = RowSource((train,))
    with step("train word2vec", f"diptych train word2vec --input {train} --output {words}"):
        run_training(TrainOptions(rows, words, WORD2VEC))
    weights = Path(output) / "models" / "efficientnet_lite0.safetensors"
    training = dataclasses.replace(CAPTIONER, encoder_weights=str(weights))
    command = f"diptych train captioner --input {train} --output {captioner} {_flags(training)}"
    with step("train captioner", command):
        write_lite0_weights(weights)
        run_training(TrainOptions(rows, captioner, training, device="cpu"))
    text_model = ModelSpec("word2vec", words, TextOptions())
    with step("embed", f"diptych embed --input {out} --output {out} --model {text_model}"):
        start = time.monotonic()
        result = embed(ModelJobOptions(inputs=(out,), output=out, model=text_model, quiet=True))
        _say(summary(result, time.monotonic() - start))
    model = ModelSpec("cnn-lstm", captioner, CaptionOptions(), "cpu")
    with step("caption", f"diptych caption --input {out} --output {out} --model {model}"):
        start = time.monotonic()
        result = caption(ModelJobOptions(inputs=(out,), output=out, model=model, quiet=True))
        _say(summary(result, time.monotonic() - start))
    with step("evaluate", f"diptych evaluate captions --input {out}"):
        scores = evaluate_captions(EvaluateOptions(out))
        _say(table(scores))
        _say(_rightness(out, seed))
    with step("verify", f"diptych verify {out}"):
        findings = verify(out)
        _say("\n".join(findings.lines()))
    if findings.problems:
        raise DiptychError(
            f"{out} is not what it should be, see above. Delete {output} and run the demo again."
        )
    sheet = os.path.join(output, "sheet.png")
    with output_errors(sheet):
        contact_sheet(out).save(sheet)
    print("\n".join(step.lines()))
    print(f"Look at {sheet}, or with Hugging Face datasets (pip install datasets):")
    print(
        f'   datasets.load_dataset("parquet", data_files="{out}/images/*.parquet", split="train")[0]["image"]'
    )


def _draw(data: Path, num_scenes: int, seed: int) -> SceneFolders:
    if num_scenes < _MIN_SCENES:
        raise OptionError(
            f"--scenes is {num_scenes}. It must be at least {_MIN_SCENES}: fewer leave too few to train and choose by."
        )
    try:
        with output_errors(str(data)):
            return write_data_set(str(data), num_scenes, seed)
    except ValueError as error:
        raise OptionError(f"The demo cannot be drawn: {error}.") from error


_MIN_SCENES = 100


def _flags(training: CaptionerTraining) -> str:
    """Returns options as flags, those that are not the defaults."""
    default = CaptionerTraining()
    chosen = {name: value for name, value in vars(training).items() if value != getattr(default, name)}
    return " ".join(f"--{name.removesuffix('_px')} {value}" for name, value in chosen.items())


def _rightness(out: str, seed: int) -> str:
    """Says how many captions name colour and shape as they are: of the main object, and of every group and no other."""
    total = main = whole = 0
    for candidate in read_candidates(out):
        groups = [(thing.colour, thing.shape) for thing in draw_scene(seed, int(candidate.key)).objects]
        named = named_groups(candidate.caption)
        total += 1
        main += groups[0] in named
        whole += named == set(groups)
    return (
        f"colour and shape are right of the main object in {main:,} of {total:,} scenes, {main / total:.1%}; of every "
        f"group in {whole:,}, {whole / total:.1%}"
    )


def _say(text: str) -> None:
    print("\n".join(f"   {line}" for line in text.splitlines()), flush=True)
