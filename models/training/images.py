"""Training of a VAE or a GAN: one loop, that an `Objective` tells how to make a step.

Every draw follows from the seed and the step, so a training that was killed and goes on from its checkpoint ends, on a
CPU, with the same weights to the last bit.

N images, S side in pixels, T text vector, Z noise.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych.models.base import TextOptions
from diptych.models.device import choose_device, training_precision
from diptych.models.errors import ModelError
from diptych.models.files.weights import to_local_path, write_tensors
from diptych.models.generation.generator import Generator, GeneratorConfig, from_pixels, to_pixels
from diptych.models.generation.image_generator import draw_noise, read_generator, save_generator
from diptych.models.names import ModelName
from diptych.models.text.text_model import TextSource, load_text_model
from diptych.models.training.checkpoint import Checkpoint, Checkpoints, flatten_optimizer, restore_optimizer
from diptych.models.training.data import CaptionData, History, Progress
from diptych.models.training.image_batches import ImageBatch, ImageData, epoch_batches, open_image_data
from diptych.models.training.image_objectives import Figures, GanObjective, Objective, Texts, VaeObjective
from diptych.models.training.options import GanTraining, VaeTraining
from diptych.models.training.sample_sheet import SheetRow, write_sheet

ENCODER, SHEET = "encoder.safetensors", "samples.png"
_CHECKPOINT_S = 120.0
_WARMUP_STEPS = 100
# Text vectors up to this long are taken as they are
_USUAL_DIM = 64
_CHECK_STEPS = 20
_MAX_VALIDATED = 2048
_NUM_PROMPTS, _SHEET_ROWS, _SHEET_SAMPLES = 64, 8, 5
# A discriminator whose loss is lower in all of an epoch has won, and teaches nothing
_WON = 0.02
# Of the distance between real images, what two samples of one prompt keep unless the generator ignores its noise
_COLLAPSED = 0.02
_COLLAPSED_EPOCHS = 3

_OnProgress = Callable[[Progress], None]


def train_image_model(
    data: CaptionData,
    output: Path,
    options: VaeTraining | GanTraining,
    device: str,
    on_progress: _OnProgress,
    cache: Path | None = None,
) -> History:
    """Trains a VAE or a GAN, or goes on with one, and writes its generator to a folder, with a sheet of samples.

    Args:
        data: To train on, and to validate by.
        output: Local folder for the model; the checkpoint is left in it, for who calls to delete.
        options: What to train, and how.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        on_progress: Is told how far it is.
        cache: Where the pictures are cached; None puts them below `output`.

    Returns:
        Figures by epoch. Of a VAE the weights with the best bound are saved, of a GAN the last.

    Raises:
        ModelError: The data or the options cannot be trained with, the training diverged, or a file cannot be written.
    """
    chosen = choose_device(device)
    kind, location = ModelName.parse(options.text_model)
    text = load_text_model(kind, location, TextOptions(), device)
    source = TextSource.of(options.text_model, TextOptions(), text.digest)
    torch.manual_seed(options.seed)
    generator = make_generator(options, source, text.dim)
    splits = []
    for name, batches, num_rows in (
        ("train", data.train, data.num_train),
        ("validation", data.validation, data.num_validation),
    ):

        def on_rows(done: int, total: int = num_rows) -> None:
            on_progress(Progress("reading", 0, done, total))

        folder, size_px = (cache or output / "_cache") / name, generator.config.size_px
        splits.append(open_image_data(folder, data.fingerprint, size_px, text, num_rows, batches, on_rows))
    train, validation = splits
    texts = Texts(train.mean, train.whitening)

    def precision() -> AbstractContextManager[Any]:
        return training_precision(options.precision, chosen)

    torch.manual_seed(options.seed)
    objective: Objective
    if isinstance(options, VaeTraining):
        objective = VaeObjective(generator.config, texts, options, chosen, precision)
    else:
        objective = GanObjective(generator, texts, options, chosen, precision)
    training = _Training(objective, train, validation, options, chosen, on_progress)
    with _threads(options.threads):
        training.run(output)
    save_generator(output, options.kind, objective.generator, source)
    if isinstance(objective, VaeObjective):
        write_tensors(output / ENCODER, objective.encoder.state_dict())
    return training.at.history


def check_models(options: VaeTraining | GanTraining) -> None:
    """Loads what a training goes out from, because what is not there must not cost a preparation.

    Raises:
        ModelError: The text model or the generator cannot be loaded, or they do not go together.
    """
    kind, location = ModelName.parse(options.text_model)
    text = load_text_model(kind, location, TextOptions(), "cpu")
    make_generator(options, TextSource.of(options.text_model, TextOptions(), text.digest), text.dim)


def make_generator(options: VaeTraining | GanTraining, source: TextSource, text_dim: int) -> Generator:
    """Returns the generator that a training begins with.

    Raises:
        ModelError: It is to be that of another model, which cannot be loaded, or knows another text model.
    """
    if isinstance(options, GanTraining) and options.generator:
        kind, location = ModelName.parse(options.generator)
        generator, own = read_generator(to_local_path(location), (kind,))
        if own.digest != source.digest:
            raise ModelError(
                f"--generator {options.generator} was trained with the text model {own.model} (digest {own.digest}), "
                f"and --text_model is {source.model} (digest {source.digest}). Give the one that it knows."
            )
        return generator.train().requires_grad_(True)
    return Generator(
        GeneratorConfig(
            options.size_px,
            text_dim,
            options.latent_dim,
            options.condition_dim,
            options.channels,
            options.max_channels,
            text_scale=min(1.0, (_USUAL_DIM / text_dim) ** 0.5),
            text_prior=isinstance(options, VaeTraining),
        )
    )


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclasses.dataclass
class _Position:
    """Where a training is; with the tensors, all that it goes on from."""

    step: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    best: float = math.inf
    best_epoch: int = -1
    collapsed: int = 0
    seconds: float = 0.0
    history: History = dataclasses.field(default_factory=list)


class _Training:
    def __init__(
        self,
        objective: Objective,
        train: ImageData,
        validation: ImageData,
        options: VaeTraining | GanTraining,
        device: torch.device,
        on_progress: _OnProgress,
    ) -> None:
        self._objective, self._options, self._device = objective, options, device
        self._train, self._validation, self._on_progress = train, validation, on_progress
        self._batch_size = min(options.batch_size, len(train))
        self._steps = len(train) // self._batch_size
        self._average = {name: value.clone() for name, value in self._averaged().items()}
        self._best = dict(self._average)
        self._sums: Figures = {}
        self.at = _Position()

    def run(self, output: Path) -> None:
        """Trains to the end, and leaves the weights that are kept in the objective."""
        checkpoints = Checkpoints(output)
        if checkpoint := checkpoints.latest():
            self._restore(checkpoint)
        begun = last_saved = time.monotonic() - self.at.seconds
        while not self._is_over():
            epoch, first = divmod(self.at.step, self._steps)
            options = self._options
            self._objective.network.train()
            for batch in epoch_batches(
                self._train, epoch, first, self._batch_size, options.seed, options.flips
            ):
                self._update(batch)
                self._report("training", epoch, (self.at.step - epoch * self._steps) * self._batch_size)
                if time.monotonic() - last_saved > _CHECKPOINT_S and self.at.step % self._steps:
                    self.at.seconds = time.monotonic() - begun
                    self._save(checkpoints)
                    last_saved = time.monotonic()
            self.at.seconds = time.monotonic() - begun
            self._validate(epoch, output)
            self._save(checkpoints)
            last_saved = time.monotonic()
        self._put(self._best)
        self._objective.network.eval()

    def _is_over(self) -> bool:
        epoch, at = divmod(self.at.step, self._steps)
        if at:
            return False
        patience = getattr(self._options, "patience", math.inf)
        return epoch >= self._options.epochs or (epoch > 0 and epoch - 1 - self.at.best_epoch >= patience)

    def _update(self, batch: ImageBatch) -> None:
        at = self.at.step
        torch.manual_seed(self._options.seed * 1_000_003 + at)
        share = self._share(at)
        for optimizer in self._objective.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("peak", group["lr"]) * share
        images = from_pixels(batch.pixels.to(self._device, non_blocking=True))
        texts = batch.texts.to(self._device, non_blocking=True)
        figures = self._objective.step(images, texts, at, at / (self._options.epochs * self._steps))
        for name, value in figures.items():
            before = self._sums.get(name)
            self._sums[name] = value if before is None else before + value
        self.at.step += 1
        decay = min(self._options.ema, (1 + at) / (10 + at))
        with torch.no_grad():
            for name, value in self._averaged().items():
                self._average[name].lerp_(value, 1 - decay)
        if at % _CHECK_STEPS == 0 or self._device.type == "cpu":
            self._check_finite(figures)

    def _check_finite(self, figures: Figures) -> None:
        for name, value in figures.items():
            if name.endswith("loss") and not math.isfinite(float(value)):
                raise self._diverged(f"the {name.replace('_', ' ')} is {float(value)}")

    def _diverged(self, what: str) -> ModelError:
        rates = {name: getattr(self._options, name, None) for name in _RATES}
        flags = " or ".join(f"--{name} (it is {rate})" for name, rate in rates.items() if rate is not None)
        return ModelError(
            f"the training diverged: {what} at step {self.at.step}. Lower {flags}, and start anew with --overwrite."
        )

    def _share(self, at: int) -> float:
        """Returns the share of the highest learning rate at a step: warmed up, then, of a VAE, a cosine."""
        warm = min(1.0, (at + 1) / _WARMUP_STEPS)
        if isinstance(self._options, GanTraining):
            return warm
        return warm * 0.5 * (1 + math.cos(math.pi * at / (self._options.epochs * self._steps)))

    def _validate(self, epoch: int, output: Path) -> None:
        """Looks at what the averaged weights make, and keeps them where they are the best so far."""
        means = {name: float(value) / self._steps for name, value in self._sums.items()}
        self._sums = {}
        current = {name: value.clone() for name, value in self._averaged().items()}
        self._put(self._average)
        self._objective.network.eval()
        with torch.inference_mode():
            found = self._bound(epoch)
            figures = self._look_at_samples(output)
        entry = {"epoch": epoch + 1, **means, **found, **figures, "seconds": round(self.at.seconds, 1)}
        if broken := [name for name, value in entry.items() if not math.isfinite(value)]:
            raise self._diverged(f"the {broken[0].replace('_', ' ')} is {entry[broken[0]]}")
        # a GAN has no figure that says which is the best: the last is
        value = found.get("validation_loss", -math.inf)
        if value < self.at.best or value == -math.inf or self._is_text_first(epoch):
            self.at.best, self.at.best_epoch = value, epoch
            self._best = {name: value.clone() for name, value in self._average.items()}
        self.at.history.append(entry)
        self._put(current)
        num_rows = len(self._validation)
        self._on_progress(Progress("validating", epoch, num_rows, num_rows, entry=entry))
        self._check_balance(entry)

    def _is_text_first(self, epoch: int) -> bool:
        """Tells whether a VAE began an epoch without its encoder: until that has learnt, no weights are the best."""
        return epoch < getattr(self._options, "text_first", 0.0) * self._options.epochs

    def _check_balance(self, entry: dict[str, float]) -> None:
        """Stops a GAN that teaches nothing any more, or that draws one image a prompt."""
        if entry.get("discriminator_loss", math.inf) < _WON:
            raise self._diverged("the discriminator is never wrong any more, and teaches nothing,")
        if "discriminator_loss" in entry:
            is_one = entry["sample_distance"] < _COLLAPSED * entry["real_distance"]
            self.at.collapsed = self.at.collapsed + 1 if is_one else 0
        if self.at.collapsed >= _COLLAPSED_EPOCHS:
            raise self._diverged(
                f"the generator has collapsed, two samples of one prompt are {entry['sample_distance']:.4f} apart,"
            )

    def _bound(self, epoch: int) -> dict[str, float]:
        num_rows, size = min(_MAX_VALIDATED, len(self._validation)), self._batch_size
        sums: dict[str, float] = {}
        for start in range(0, num_rows, size):
            rows = range(start, min(num_rows, start + size))
            batch = self._validation.load(rows, [0.0] * len(rows), [False] * len(rows))
            noise = self._noise([(row, 0) for row in rows])
            images = from_pixels(batch.pixels.to(self._device))
            for name, value in self._objective.validate(images, batch.texts.to(self._device), noise).items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(rows)
            if rows[-1] + 1 < len(self._validation):  # the last comes with the figures
                self._report("validating", epoch, rows[-1] + 1)
        return {name: value / num_rows for name, value in sums.items()}

    def _noise(self, samples: list[tuple[int, int]]) -> Tensor:
        """Returns the noise of some samples of some rows, (N, Z), the same in every epoch."""
        dim = self._objective.generator.config.latent_dim
        drawn = [torch.from_numpy(draw_noise(row << 20 | sample, dim)) for row, sample in samples]
        return torch.stack(drawn).to(self._device)

    def _look_at_samples(self, output: Path) -> dict[str, float]:
        """Draws samples of some prompts, writes a sheet of them, and returns how far they are from one another.

        Distances are root mean squares over pixels, of values from 0 to 1.
        """
        rows = range(min(_NUM_PROMPTS, len(self._validation)))
        batch = self._validation.load(rows, [0.0] * len(rows), [False] * len(rows))
        generator, texts = self._objective.generator, batch.texts.to(self._device)
        with training_precision(self._options.precision, self._device):
            made = [
                generator(texts, self._noise([(row, sample) for row in rows]))
                for sample in range(_SHEET_SAMPLES)
            ]
            swapped = generator(texts.roll(1, 0), self._noise([(row, 0) for row in rows]))
        real = from_pixels(batch.pixels.to(self._device))
        pixels = [to_pixels(images).cpu().numpy() for images in made]
        sheet = [
            SheetRow(
                self._validation.captions(row)[0],
                batch.pixels[row].numpy(),
                [samples[row] for samples in pixels],
            )
            for row in rows[:_SHEET_ROWS]
        ]
        write_sheet(output / SHEET, sheet)
        return {
            "sample_distance": _distance(made[0], made[1]),
            "text_distance": _distance(made[0], swapped),
            "real_distance": _distance(real, real.roll(1, 0)),
        }

    def _report(self, phase: str, epoch: int, done: int) -> None:
        if phase == "validating":
            self._on_progress(Progress(phase, epoch, done, len(self._validation)))
            return
        name = next((name for name in self._sums if name.endswith("loss")), None)
        steps = max(1, done // self._batch_size)
        loss = float(self._sums[name]) / steps if name and self._device.type == "cpu" else None
        self._on_progress(Progress(phase, epoch, done, self._steps * self._batch_size, loss))

    def _averaged(self) -> dict[str, Tensor]:
        return self._objective.averaged.state_dict()

    def _put(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self._averaged().items():
                value.copy_(values[name])

    def _save(self, checkpoints: Checkpoints) -> None:
        tensors: dict[str, Tensor] = {}
        self.at.sums = {name: float(value) for name, value in self._sums.items()}
        state = dataclasses.asdict(self.at)
        for name, optimizer in self._objective.optimizers.items():
            of_optimizer, state_of_optimizer = flatten_optimizer(optimizer, name)
            tensors |= of_optimizer
            state |= state_of_optimizer
        for prefix, values in (
            ("now", self._objective.network.state_dict()),
            ("average", self._average),
            ("best", self._best),
        ):
            tensors |= {f"{prefix}.{name}": value for name, value in values.items()}
        checkpoints.save(self.at.step, tensors, json.loads(json.dumps(state)))

    def _restore(self, checkpoint: Checkpoint) -> None:
        def values(prefix: str) -> dict[str, Tensor]:
            found = {n: v for n, v in checkpoint.tensors.items() if n.startswith(f"{prefix}.")}
            return {n.removeprefix(f"{prefix}."): v.to(self._device) for n, v in found.items()}

        state = dict(checkpoint.state)
        for name, optimizer in self._objective.optimizers.items():
            restore_optimizer(optimizer, checkpoint.tensors, {name: state.pop(name)}, name)
        self.at = _Position(**state)
        self._sums = {name: torch.tensor(value, device=self._device) for name, value in self.at.sums.items()}
        self._average, self._best = values("average"), values("best")
        self._objective.network.load_state_dict(values("now"))


_RATES = ("learning_rate", "discriminator_learning_rate")


def _distance(left: Tensor, right: Tensor) -> float:
    """Returns the mean root mean square difference of images (N, 3, S, S), of values from 0 to 1."""
    return float(((left.float() - right.float()) / 2).square().mean([1, 2, 3]).sqrt().mean())
