"""The objectives of a VAE and of a GAN: their networks, a step of learning, and validation by samples.

N images, S side in pixels, T text vector, Z noise.
"""

import abc
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diptych.models.device import training_precision
from diptych.models.generation.gan import Discriminator, discriminator_loss, r1_penalty
from diptych.models.generation.generator import Condition, Generator, GeneratorConfig, from_pixels, to_pixels
from diptych.models.generation.image_generator import draw_noise
from diptych.models.generation.vae import Vae, vae_loss
from diptych.models.training.data import History
from diptych.models.training.image_batches import ImageBatch, ImageData, epoch_batches
from diptych.models.training.options import GanTraining, VaeTraining
from diptych.models.training.sample_sheet import SheetRow, write_sheet
from diptych.models.training.trainer import (
    Diverged,
    Metrics,
    Objective,
    Phase,
    Validation,
    cosine,
    descend,
    warm_up,
)

_WARMUP_STEPS = 100
_MAX_VALIDATED = 2048
_NUM_PROMPTS, _SHEET_ROWS, _SHEET_SAMPLES = 64, 8, 5
# A discriminator with a mean loss below this has won, and the generator learns nothing from it.
_WON = 0.02
# Two samples of one prompt that differ by less than this share of what real images differ by show a collapse.
_COLLAPSED = 0.02
_COLLAPSED_EPOCHS = 3


class ImageSplits(NamedTuple):
    """The rows of a training, and the place of its samples.

    Attributes:
        train: The rows to train on.
        validation: The rows to validate by.
        sheet: The path of the sheet of samples.
    """

    train: ImageData
    validation: ImageData
    sheet: Path


class ImageObjective(Objective[ImageBatch]):
    """The part that VAE and GAN share: batches, and validation by samples of some prompts.

    Attributes:
        generator: The generator that is trained, a part of `averaged`.
    """

    generator: Generator

    def __init__(self, splits: ImageSplits, options: VaeTraining | GanTraining, device: torch.device) -> None:
        self._train, self._validation, self._sheet = splits
        self._image_options, self._device = options, device
        self._precision = training_precision(options.precision, device)
        self.batch_size = min(options.batch_size, len(self._train))
        self.num_rows = len(self._train) // self.batch_size * self.batch_size
        self.num_validation = len(self._validation)
        self.phases = [Phase(options.epochs)]

    @abc.abstractmethod
    def learn(self, images: Tensor, texts: Tensor, step: int) -> Metrics:
        """Learns from a batch; torch's seed decides every draw.

        Args:
            images: (N, 3, S, S), from -1 to 1.
            texts: (N, T) text vectors.
            step: The ordinal of the step in the whole training.
        """

    def measure(self, images: Tensor, texts: Tensor, noise: Tensor) -> Metrics:
        """Returns means over a batch of the validation rows."""
        return {}

    def batches(self, epoch: int, first: int) -> Iterator[ImageBatch]:
        """Yields the full batches of an epoch from one on."""
        options = self._image_options
        return epoch_batches(self._train, epoch, first, self.batch_size, options.seed, options.flips)

    def step(self, batch: ImageBatch, step: int) -> Metrics:
        """Learns from a batch."""
        images = from_pixels(batch.pixels.to(self._device, non_blocking=True))
        return self.learn(images, batch.text_vectors.to(self._device, non_blocking=True), step)

    def _measure_all(self, on_rows: Callable[[int], None]) -> dict[str, float]:
        num_rows, size = min(_MAX_VALIDATED, len(self._validation)), self.batch_size
        sums: dict[str, float] = {}
        for start in range(0, num_rows, size):
            rows = range(start, min(num_rows, start + size))
            batch = self._validation.load(rows, [0.0] * len(rows), [False] * len(rows))
            noise = self._noise([(row, 0) for row in rows])
            images = from_pixels(batch.pixels.to(self._device))
            for name, value in self.measure(images, batch.text_vectors.to(self._device), noise).items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(rows)
            on_rows(rows[-1] + 1)
        return {name: value / num_rows for name, value in sums.items()}

    def _noise(self, samples: list[tuple[int, int]]) -> Tensor:
        """Returns the noise of some samples of some rows, (N, Z), the same in every epoch."""
        dim = self.generator.config.latent_dim
        noise = [torch.from_numpy(draw_noise(row << 20 | sample, dim)) for row, sample in samples]
        return torch.stack(noise).to(self._device)

    def _draw_samples(self) -> dict[str, float]:
        """Draws samples of some prompts, writes a sheet of them, and returns how far they are from one another.

        Distances are root mean squares over pixels, of values from 0 to 1.
        """
        rows = range(min(_NUM_PROMPTS, len(self._validation)))
        batch = self._validation.load(rows, [0.0] * len(rows), [False] * len(rows))
        texts = batch.text_vectors.to(self._device)
        with self._precision:
            samples = [
                self.generator(texts, self._noise([(row, sample) for row in rows]))
                for sample in range(_SHEET_SAMPLES)
            ]
            swapped = self.generator(texts.roll(1, 0), self._noise([(row, 0) for row in rows]))
        real = from_pixels(batch.pixels.to(self._device))
        pixels = [to_pixels(images).cpu().numpy() for images in samples]
        sheet = [
            SheetRow(
                self._validation.captions(row)[0],
                batch.pixels[row].numpy(),
                [images[row] for images in pixels],
            )
            for row in rows[:_SHEET_ROWS]
        ]
        write_sheet(self._sheet, sheet)
        return {
            "sample_distance": _distance(samples[0], samples[1]),
            "text_distance": _distance(samples[0], swapped),
            "real_distance": _distance(real, real.roll(1, 0)),
        }


def _distance(left: Tensor, right: Tensor) -> float:
    """Returns the mean root mean square difference of images (N, 3, S, S), of values from 0 to 1."""
    return float(((left.float() - right.float()) / 2).square().mean([1, 2, 3]).sqrt().mean())


def _set_text_statistics(network: nn.Module, data: ImageData) -> None:
    """Gives the statistics of the training's text vectors to every part of a network that reads such vectors."""
    for module in network.modules():
        if isinstance(module, Condition):
            module.mean.copy_(data.mean)
            module.whitening.copy_(data.whitening)


class VaeObjective(ImageObjective):
    """The evidence lower bound; in the first epochs without the encoder, so that the text learns first."""

    def __init__(
        self, config: GeneratorConfig, splits: ImageSplits, options: VaeTraining, device: torch.device
    ) -> None:
        super().__init__(splits, options, device)
        self._vae = Vae(config)
        _set_text_statistics(self._vae, splits.train)
        self._vae.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network = self.averaged = self._vae
        self.generator, self.encoder = self._vae.generator, self._vae.encoder
        self._options = options
        self._num_values = 3 * config.size_px**2
        self._optimizer = torch.optim.AdamW(
            self._vae.parameters(), options.learning_rate, weight_decay=1e-4, fused=True
        )
        self.optimizers = {"optimizer": self._optimizer}
        self.phases = [Phase(options.epochs, options.patience)]

    @property
    def learning_rates(self) -> dict[str, float]:
        """The learning rate."""
        return {"learning_rate": self._options.learning_rate}

    def lr_scale(self, step: int) -> float:
        """Returns a warm-up followed by a cosine."""
        return warm_up(step, _WARMUP_STEPS) * cosine(step, self._options.epochs * self.num_steps)

    def learn(self, images: Tensor, texts: Tensor, step: int) -> Metrics:
        """Learns from a batch."""
        noise = torch.randn(len(images), self.generator.config.latent_dim, device=images.device)
        text_first = step / (self._options.epochs * self.num_steps) < self._options.text_first
        with self._precision:
            bound = self._vae(images, texts, noise, text_only=text_first)
        loss = vae_loss(bound, self._num_values, self._options.divergence_weight)
        norm = descend(self._optimizer, loss)
        return {"train_loss": loss.detach(), "gradient_norm": norm}

    def measure(self, images: Tensor, texts: Tensor, noise: Tensor) -> Metrics:
        """Returns the bound on a batch, and its parts."""
        with self._precision:
            bound = self._vae(images, texts, noise)
        loss = vae_loss(bound, self._num_values, self._options.divergence_weight)
        return {
            "validation_loss": loss,
            "error": bound.errors.sum().sqrt(),
            "divergence": bound.divergence,
        }

    def validate(self, epoch: int, on_rows: Callable[[int], None]) -> Validation:
        """Ranks the weights by the bound; until the encoder learns, the last weights are kept."""
        with torch.inference_mode():
            metrics = self._measure_all(on_rows)
            distances = self._draw_samples()
        is_text_first = epoch < self._options.text_first * self._options.epochs
        return Validation({**metrics, **distances}, [-metrics["validation_loss"]], is_text_first)


class GanObjective(ImageObjective):
    """Generator against discriminator."""

    def __init__(
        self, generator: Generator, splits: ImageSplits, options: GanTraining, device: torch.device
    ) -> None:
        super().__init__(splits, options, device)
        self._discriminator = Discriminator(generator.config)
        _set_text_statistics(self._discriminator, splits.train)
        if not options.generator:
            _set_text_statistics(generator, splits.train)
        if generator.prior is not None:
            # The prior comes from a VAE; the loss of a GAN knows no likelihood and would narrow it.
            generator.prior.requires_grad_(False)
        self.network = nn.ModuleDict({"generator": generator, "discriminator": self._discriminator})
        self.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged = self.generator = generator
        self._options = options
        betas = 0.0, 0.9
        self.optimizers = {
            "generator": torch.optim.Adam(generator.parameters(), options.learning_rate, betas, fused=True),
            "discriminator": torch.optim.Adam(
                self._discriminator.parameters(), options.discriminator_learning_rate, betas, fused=True
            ),
        }

    @property
    def learning_rates(self) -> dict[str, float]:
        """The learning rates of generator and discriminator."""
        names = "learning_rate", "discriminator_learning_rate"
        return {name: getattr(self._options, name) for name in names}

    def lr_scale(self, step: int) -> float:
        """Returns a warm-up."""
        return warm_up(step, _WARMUP_STEPS)

    def learn(self, images: Tensor, texts: Tensor, step: int) -> Metrics:
        """Learns from a batch: the discriminator first."""
        noise = torch.randn(2, len(images), self.generator.config.latent_dim, device=images.device)
        metrics = self._learn_to_discriminate(images, texts, noise[0], step)
        discriminator = self._discriminator
        with self._precision:
            fake_images = self.generator(texts, noise[1])
            loss = -discriminator.score(discriminator.features(fake_images), texts).mean()
        norm = descend(self.optimizers["generator"], loss)
        return {"generator_loss": loss.detach(), **metrics, "gradient_norm": norm}

    def _learn_to_discriminate(self, images: Tensor, texts: Tensor, noise: Tensor, step: int) -> Metrics:
        discriminator, options = self._discriminator, self._options
        discriminator.requires_grad_(True)
        with self._precision:
            with torch.no_grad():
                fake_images = self.generator(texts, noise)
            real_grid, fake_grid = discriminator.features(torch.cat([images, fake_images])).chunk(2)
            grids = torch.cat([real_grid, real_grid, fake_grid])
            scores = discriminator.score(grids, torch.cat([texts, texts.roll(1, 0), texts]))
        real, mismatched, fake = scores.chunk(3)
        loss = penalised = discriminator_loss(real, mismatched, fake)
        if options.r1_weight and step % options.r1_every == 0:
            real_images = images.detach().requires_grad_(True)
            real_scores = discriminator.score(discriminator.features(real_images), texts)
            penalty = r1_penalty(real_scores, real_images)
            penalised = loss + options.r1_weight / 2 * options.r1_every * penalty
        norm = descend(self.optimizers["discriminator"], penalised)
        discriminator.requires_grad_(False)
        return {
            "discriminator_loss": loss.detach(),
            "real": real.detach().mean(),
            "mismatched": mismatched.detach().mean(),
            "fake": fake.detach().mean(),
            "discriminator_gradient_norm": norm,
        }

    def validate(self, epoch: int, on_rows: Callable[[int], None]) -> Validation:
        """Keeps the last weights: a GAN has no metric that says which are the best."""
        with torch.inference_mode():
            return Validation(self._draw_samples(), [], always_kept=True)

    def check(self, history: History) -> None:
        """Stops a training whose discriminator has won, or whose generator draws one image a prompt."""
        if history[-1].get("discriminator_loss", math.inf) < _WON:
            raise Diverged("the discriminator is never wrong any more, and teaches nothing,")
        last = history[-_COLLAPSED_EPOCHS:]
        collapsed = [entry["sample_distance"] < _COLLAPSED * entry["real_distance"] for entry in last]
        if len(last) == _COLLAPSED_EPOCHS and all(collapsed):
            raise Diverged(
                "the generator has collapsed, two samples of one prompt are "
                f"{history[-1]['sample_distance']:.4f} apart,"
            )
