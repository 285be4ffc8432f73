"""The variational autoencoder (Kingma and Welling 2013), both halves told of the text (Sohn et al. 2015).

N images, S side in pixels, T text vector, Z latent.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.generator import Condition, Generator, GeneratorConfig, Trunk

_MAX_LOG_VARIANCE = 10.0
# Of values from -1 to 1: an image is not known more exactly
_GREY_LEVEL = 1 / 127.5


class Encoder(nn.Module):
    """Images and their texts to the latent's distribution."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.trunk = Trunk(config, spectral=False)
        self.condition = Condition(config)
        width = self.trunk.num_channels * config.grids[0] ** 2 + config.condition_dim
        self.last = nn.Linear(width, 2 * config.latent_dim)
        nn.init.normal_(self.last.weight, std=0.01)
        nn.init.zeros_(self.last.bias)

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and logarithm of the variance, (N, Z) each, of (N, 3, S, S) and (N, T)."""
        grid = self.trunk(images).flatten(1)
        mean, log_variance = self.last(torch.cat([grid, self.condition(texts)], 1)).float().chunk(2, 1)
        return mean, log_variance.clamp(-_MAX_LOG_VARIANCE, _MAX_LOG_VARIANCE)


class Bound(NamedTuple):
    """The two parts of the bound, a value each over a batch.

    Attributes:
        error: Mean absolute error of a sample, of values from -1 to 1.
        divergence: Kullback-Leibler divergence of the latent from the prior, in nats an image.
    """

    error: Tensor
    divergence: Tensor


class Vae(nn.Module):
    """Generator and encoder."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.generator, self.encoder = Generator(config), Encoder(config)

    def forward(self, images: Tensor, texts: Tensor, noise: Tensor) -> Bound:
        """Encodes images, and decodes a sample of what comes of it.

        Args:
            images: (N, 3, S, S), from -1 to 1.
            texts: (N, T).
            noise: (N, Z), standard normal: the sample's.
        """
        mean, log_variance = self.encoder(images, texts)
        latent = mean + noise * torch.exp(log_variance / 2)  # (N, Z)
        error = (self.generator(texts, latent).float() - images).abs().mean()
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
        return Bound(error, divergence)


def negative_bound(bound: Bound, num_values: int, divergence_weight: float = 1.0) -> Tensor:
    """Returns minus the evidence lower bound, in nats a value, but for a constant.

    The values are Laplacian around the image that is decoded; their scale is the one under which the batch is
    likeliest, which weighs the two parts without a hand on it (Rybkin et al. 2021, 4.2).

    Args:
        bound: Of a batch.
        num_values: Of an image: 3 * S * S.
        divergence_weight: More makes the latent simpler, so that a draw from the prior is more like a latent.
    """
    return torch.log(bound.error + _GREY_LEVEL) + divergence_weight * bound.divergence / num_values
