"""A step of training, of a VAE and of a GAN: what `diptych.models.training.images` repeats.

N images, S side in pixels, T text vector, Z noise.
"""

import abc
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from diptych.models.generation.gan import Discriminator, discriminator_loss, r1_penalty
from diptych.models.generation.generator import Condition, Generator, GeneratorConfig
from diptych.models.generation.vae import Vae, vae_loss
from diptych.models.training.options import GanTraining, VaeTraining

_MAX_GRADIENT = 5.0

Figures = dict[str, Tensor]
"""Scalars by name, on the device."""


@dataclasses.dataclass(frozen=True)
class Texts:
    """How the vectors of the training's texts are spread.

    Attributes:
        mean: (T,).
        whitening: (T, T), by which what is off the mean is multiplied to be of variance 1 in all directions.
    """

    mean: Tensor
    whitening: Tensor


class Objective(abc.ABC):
    """Networks, and how they learn.

    Attributes:
        network: All that is trained.
        averaged: The part of which an average is kept.
        generator: Of that part.
        optimizers: By name.
    """

    network: nn.Module
    averaged: nn.Module
    generator: Generator
    optimizers: dict[str, torch.optim.Optimizer]

    @abc.abstractmethod
    def step(self, images: Tensor, texts: Tensor, at: int, done: float) -> Figures:
        """Learns from a batch; what is drawn follows from torch's seed.

        Args:
            images: (N, 3, S, S), from -1 to 1.
            texts: (N, T).
            at: The step, from 0.
            done: The share of the training that is behind.
        """

    def validate(self, images: Tensor, texts: Tensor, noise: Tensor) -> Figures:
        """Returns means over a batch that is not learnt from."""
        return {}


def _tell_spread(network: nn.Module, texts: Texts) -> None:
    """Tells every part of a network that reads text vectors how they are spread."""
    for module in network.modules():
        if isinstance(module, Condition):
            module.mean.copy_(texts.mean)
            module.whitening.copy_(texts.whitening)


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    """Makes a step; returns the gradient's norm."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm: Tensor = torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT)
    optimizer.step()
    return norm


class VaeObjective(Objective):
    """The evidence lower bound; at first of what the text alone can say."""

    def __init__(
        self,
        config: GeneratorConfig,
        texts: Texts,
        options: VaeTraining,
        device: torch.device,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._vae = Vae(config)
        _tell_spread(self._vae, texts)
        self._vae.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network = self.averaged = self._vae
        self.generator = self._vae.generator
        self.encoder = self._vae.encoder
        self._precision, self._options = precision, options
        self._num_values = 3 * config.size_px**2
        self.optimizers = {
            "optimizer": torch.optim.AdamW(
                self._vae.parameters(), options.learning_rate, weight_decay=1e-4, fused=True
            )
        }

    def step(self, images: Tensor, texts: Tensor, at: int, done: float) -> Figures:
        """Learns from a batch."""
        noise = torch.randn(len(images), self.generator.config.latent_dim, device=images.device)
        with self._precision():
            bound = self._vae(images, texts, noise, by_text=done < self._options.text_first)
        loss = vae_loss(bound, self._num_values, self._options.divergence_weight)
        norm = _update(self.optimizers["optimizer"], loss)
        return {"train_loss": loss.detach(), "gradient_norm": norm}

    def validate(self, images: Tensor, texts: Tensor, noise: Tensor) -> Figures:
        """Returns the bound on a batch, and its parts."""
        with self._precision():
            bound = self._vae(images, texts, noise)
        loss = vae_loss(bound, self._num_values, self._options.divergence_weight)
        return {
            "validation_loss": loss,
            "error": bound.errors.sum().sqrt(),
            "divergence": bound.divergence,
        }


class GanObjective(Objective):
    """Generator against discriminator."""

    def __init__(
        self,
        generator: Generator,
        texts: Texts,
        options: GanTraining,
        device: torch.device,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._discriminator = Discriminator(generator.config)
        _tell_spread(self._discriminator, texts)
        if not options.generator:
            _tell_spread(generator, texts)
        if generator.prior is not None:  # of a VAE; else a loss that knows no likelihood would narrow it
            generator.prior.requires_grad_(False)
        self.network = nn.ModuleDict({"generator": generator, "discriminator": self._discriminator})
        self.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged = self.generator = generator
        self._options, self._precision = options, precision
        betas = 0.0, 0.9
        self.optimizers = {
            "generator": torch.optim.Adam(generator.parameters(), options.learning_rate, betas, fused=True),
            "discriminator": torch.optim.Adam(
                self._discriminator.parameters(), options.discriminator_learning_rate, betas, fused=True
            ),
        }

    def step(self, images: Tensor, texts: Tensor, at: int, done: float) -> Figures:
        """Learns from a batch: the discriminator first."""
        judge = self._discriminator
        noise = torch.randn(2, len(images), self.generator.config.latent_dim, device=images.device)
        judge.requires_grad_(True)
        with self._precision():
            with torch.no_grad():
                made = self.generator(texts, noise[0])
            real_grid, made_grid = judge.look(torch.cat([images, made])).chunk(2)
            others = texts.roll(1, 0)
            grids = torch.cat([real_grid, real_grid, made_grid])
            verdicts = judge.judge(grids, torch.cat([texts, others, texts]))
        real, mismatched, fake = verdicts.chunk(3)
        loss = discriminator_loss(real, mismatched, fake)
        penalised = loss
        if self._options.r1_weight and at % self._options.r1_every == 0:
            wanted = images.detach().requires_grad_(True)
            penalty = r1_penalty(judge.judge(judge.look(wanted), texts), wanted)
            penalised = loss + self._options.r1_weight / 2 * self._options.r1_every * penalty
        judge_norm = _update(self.optimizers["discriminator"], penalised)
        judge.requires_grad_(False)
        with self._precision():
            made = self.generator(texts, noise[1])
            generator_loss = -judge.judge(judge.look(made), texts).mean()
        norm = _update(self.optimizers["generator"], generator_loss)
        return {
            "generator_loss": generator_loss.detach(),
            "discriminator_loss": loss.detach(),
            "real": real.detach().mean(),
            "mismatched": mismatched.detach().mean(),
            "fake": fake.detach().mean(),
            "gradient_norm": norm,
            "discriminator_gradient_norm": judge_norm,
        }
