"""The whole thing on data that it draws itself: `diptych demo`. No network, no account.

diptych demo --output demo
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diptych.models.base import CaptionOptions, ImageOptions, TextOptions
from diptych.models.spec import ModelSpec
from diptych.models.training.options import CaptionerTraining, GanTraining, VaeTraining, Word2VecTraining
from diptych.pipelines.demo_data.contact_sheet import contact_sheet
from diptych.pipelines.demo_data.efficientnet_lite0 import ENCODER, write_lite0_weights
from diptych.pipelines.demo_data.layouts import SceneFolders, write_data_set
from diptych.pipelines.demo_data.scenes import draw_scene, named_groups
from diptych.pipelines.evaluate_captions import evaluate_captions, read_candidates, table
from diptych.pipelines.evaluate_images import evaluate_images
from diptych.pipelines.evaluate_images import table as images_table
from diptych.pipelines.lifecycle.summary import summary
from diptych.pipelines.options.demo import DemoOptions
from diptych.pipelines.options.evaluate import EvaluateCaptionsOptions, EvaluateImagesOptions
from diptych.pipelines.options.generate import GenerateOptions
from diptych.pipelines.options.models import ModelJobOptions
from diptych.pipelines.options.prepare import PrepareOptions
from diptych.pipelines.options.run import RunOptions
from diptych.pipelines.options.train import RowSource, Training, TrainOptions
from diptych.pipelines.prepare import prepare
from diptych.pipelines.run import run
from diptych.pipelines.train import train
from diptych.pipelines.verify import verify
from diptych.transforms.errors import DiptychError, OptionError
from diptych.transforms.storage import output_errors

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
    epochs=3,
    batch_size=16,
    captions_per_image=3,
    learning_rate=4e-3,
    ema=0.98,
    max_scored=100,
    threads=1,
)
# Small batches: the networks need steps, more than images
VAE = VaeTraining(
    size_px=64,
    latent_dim=32,
    channels=16,
    max_channels=128,
    epochs=8,
    batch_size=16,
    learning_rate=2e-3,
    ema=0.99,
    threads=1,
)
GAN = GanTraining(epochs=2, batch_size=16, ema=0.99)
WORD2VEC = Word2VecTraining(vector_size=64, epochs=5, patience=5)


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
            yield f"{name:20} {seconds:6.1f} s  {seconds / total:4.0%}"
        yield f"{'in all':20} {total:6.1f} s"


def demo(options: DemoOptions) -> None:
    """Draws a data set, prepares it, trains on a part of it, and runs all models on the rest, which they never saw.

    The data go to `data` in the output folder, the rows to train on to `train`, the models to `models`, and what the
    models make of the other rows to `out`.

    Raises:
        OptionError: The output holds another demo.
        OutputError: The folder cannot be written.
    """
    output, seed, num_scenes = options.output, options.seed, options.num_scenes
    step = _Steps()
    data, prepared, out = (os.path.join(output, name) for name in ("data", "train", "out"))
    with step(
        "draw", f"drawing {num_scenes:,} captioned scenes to {data}, as COCO, Flickr30k and WebDataset"
    ):
        folders = _draw(Path(data), num_scenes, seed)
    annotations = folders.coco / "annotations"
    annotation = str(annotations / "captions_train2017.json")
    with step("prepare", f"diptych prepare --input {annotation} --output {prepared}"):
        start = time.monotonic()
        result = prepare(PrepareOptions(inputs=(annotation,), output=prepared, quiet=True))
        _say(summary(result, time.monotonic() - start))
    models = _train(step, prepared, os.path.join(output, "models"))
    _run(step, str(annotations / "captions_val2017.json"), out, models)
    with step("evaluate captions", f"diptych evaluate captions --input {out}"):
        _say(table(evaluate_captions(EvaluateCaptionsOptions(out))))
        _say(_caption_accuracy(out, seed))
    images = _images_options(out, models)
    with step("evaluate images", f"diptych evaluate images --input {out} {' '.join(_flags(images))}"):
        _say(images_table(evaluate_images(images)))
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


@dataclasses.dataclass(frozen=True)
class _Models:
    """Where the models of the demo are."""

    words: str
    captioner: str
    vae: str
    gan: str
    weights: str


def _train(step: _Steps, prepared: str, home: str) -> _Models:
    """Trains the four models."""
    names = ("word2vec", "captioner", "vae", "gan", "efficientnet_lite0.safetensors")
    models = _Models(*(os.path.join(home, name) for name in names))
    rows, text = RowSource((prepared,)), f"word2vec:{models.words}"
    words, captioner, vae, gan = (
        TrainOptions(rows, folder, training, device="cpu")
        for folder, training in (
            (models.words, WORD2VEC),
            (models.captioner, dataclasses.replace(CAPTIONER, encoder_weights=models.weights)),
            (models.vae, dataclasses.replace(VAE, text_model=text)),
            (models.gan, dataclasses.replace(GAN, text_model=text, generator=f"vae:{models.vae}")),
        )
    )

    def command(options: TrainOptions) -> list[str]:
        folders = ["--input", prepared, "--output", options.output]
        return ["train", options.model, *folders, *_flags(options.training)]

    def said(options: TrainOptions) -> str:
        return " ".join(["diptych", *command(options)])

    with step("train word2vec", said(words)):
        train(words)
    write_lite0_weights(Path(models.weights))
    # A core each: with a second one neither is much faster
    with (
        step("train vae, captioner", f"{said(vae)}\n   and beside it: {said(captioner)}"),
        _beside([*command(captioner), "--device", "cpu", "--quiet"]),
    ):
        train(vae)
    with step("train gan", said(gan)):
        train(gan)
    return models


@contextmanager
def _beside(arguments: list[str]) -> Iterator[None]:
    """Runs a command of diptych meanwhile, in a process of its own, and ends with it."""
    command = [sys.executable, "-m", "diptych", *arguments]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            yield
            process.wait()
        finally:
            process.terminate()  # of one that is done: nothing
            process.wait()
        if process.returncode:
            errors.seek(0)
            raise DiptychError(f"diptych {' '.join(arguments)} failed: {errors.read().strip()[-1000:]}")


def _run(step: _Steps, annotation: str, out: str, models: _Models) -> None:
    """Runs all models on the rows that they have not seen."""
    job: dict[str, Any] = {"inputs": (annotation,), "output": out, "quiet": True}
    words = ModelSpec("word2vec", models.words, TextOptions(), "cpu")
    captioner = ModelSpec("cnn-lstm", models.captioner, CaptionOptions(), "cpu")
    gan = ModelSpec("gan", models.gan, ImageOptions(), "cpu")
    options = RunOptions(
        **job,
        embed=ModelJobOptions(**job, model=words),
        caption=ModelJobOptions(**job, model=captioner),
        generate=GenerateOptions(**job, model=gan),
    )
    flags = f"--embed {words} --caption {captioner} --generate {gan} --device cpu"
    with step("run", f"diptych run --input {annotation} --output {out} {flags}"):
        start = time.monotonic()
        _say(summary(run(options), time.monotonic() - start))


def _images_options(out: str, models: _Models) -> EvaluateImagesOptions:
    return EvaluateImagesOptions(
        out,
        features=ENCODER,
        feature_weights=models.weights,
        max_images=_NUM_SCORED,
        match_with=ModelSpec("cnn-lstm", models.captioner, CaptionOptions(), "cpu"),
        match_by=ModelSpec("word2vec", models.words, TextOptions(), "cpu"),
        device="cpu",
    )


# Images whose features are compared: enough to see them differ, few enough to wait for
_NUM_SCORED = 300


def _draw(data: Path, num_scenes: int, seed: int) -> SceneFolders:
    try:
        with output_errors(str(data)):
            return write_data_set(str(data), num_scenes, seed)
    except ValueError as error:
        raise OptionError(f"The demo cannot be drawn: {error}.") from error


def _flags(options: Training | EvaluateImagesOptions) -> list[str]:
    """Returns options as flags, those that are not the defaults; none of these is a switch."""
    defaults = {field.name: field.default for field in dataclasses.fields(options) if field.name != "input"}
    chosen = {name: getattr(options, name) for name in defaults}
    return [
        word
        for name, value in chosen.items()
        if value != defaults[name]
        for word in (f"--{name.removesuffix('_px')}", str(value))
    ]


def _caption_accuracy(out: str, seed: int) -> str:
    """Says how many captions name colour and shape as they are."""
    candidates = list(read_candidates(out))
    groups = [draw_scene(seed, int(candidate.key)).group for candidate in candidates]
    right = sum(
        named_groups(candidate.caption) == {(group.colour, group.shape)}
        for candidate, group in zip(candidates, groups, strict=True)
    )
    total = len(candidates)
    return f"colour and shape are right in {right:,} of {total:,} captions, {right / total:.1%}"


def _say(text: str) -> None:
    print("\n".join(f"   {line}" for line in text.splitlines()), flush=True)
