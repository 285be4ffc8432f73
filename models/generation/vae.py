"""The variational autoencoder (Kingma and Welling 2013), conditioned on the text (Sohn et al. 2015).

N images, S side in pixels, T text vector, Z latent, L levels of detail.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from diptych.models.generation.generator import Condition, Generator, GeneratorConfig, Trunk

_MAX_LOG_VARIANCE = 10.0
# The step between grey levels, of values from -1 to 1: no image is known more exactly
_GREY_LEVEL = 1 / 127.5
_MAX_LEVELS = 4


class Encoder(nn.Module):
    """Encodes images and their texts to the latent's distribution."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.trunk = Trunk(config, spectral=False)
        self.condition = Condition(config)
        width = self.trunk.num_channels * config.grids[0] ** 2 + config.condition_dim
        self.last = nn.Linear(width, 2 * config.latent_dim)
        nn.init.normal_(self.last.weight, std=0.01)
        nn.init.zeros_(self.last.bias)

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and the logarithm of the variance, (N, Z) each, from (N, 3, S, S) and (N, T)."""
        grid = self.trunk(images).flatten(1)
        mean, log_variance = self.last(torch.cat([grid, self.condition(texts)], 1)).float().chunk(2, 1)
        return mean, log_variance.clamp(-_MAX_LOG_VARIANCE, _MAX_LOG_VARIANCE)


class ElboTerms(NamedTuple):
    """The terms of the evidence lower bound (ELBO), over a batch.

    Attributes:
        errors: (L + 1,) the mean squared error of each band of detail, the finest first, of values from -1 to 1.
        divergence: The Kullback-Leibler divergence of the latent from the prior, in nats an image.
    """

    errors: Tensor
    divergence: Tensor


class Vae(nn.Module):
    """A generator and an encoder. The prior is the generator's own, else the standard normal distribution."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.generator, self.encoder = Generator(config), Encoder(config)
        self._levels = min(_MAX_LEVELS, len(config.grids))

    def forward(self, images: Tensor, texts: Tensor, noise: Tensor, text_only: bool = False) -> ElboTerms:
        """Encodes images, and decodes a sample of their latents.

        Args:
            images: (N, 3, S, S), from -1 to 1.
            texts: (N, T) text vectors.
            noise: (N, Z), standard normal, for the sample.
            text_only: Leave out encoder and prior: the latent is the noise, so only the text informs the image.
        """
        if text_only:
            latent, divergence = noise, noise.new_zeros(())
        else:
            mean, log_variance = self.encoder(images, texts)
            latent = mean + noise * torch.exp(log_variance / 2)  # (N, Z)
            divergence = self._divergence(mean, log_variance, texts)
        errors = squared_bands(self.generator.decode(texts, latent).float() - images, self._levels)
        return ElboTerms(errors, divergence)

    def _divergence(self, mean: Tensor, log_variance: Tensor, texts: Tensor) -> Tensor:
        """Returns the mean divergence of normal distributions (N, Z) from the prior, in nats."""
        prior_mean = prior_log_variance = torch.zeros_like(mean)
        if self.generator.prior is not None:
            prior_mean, prior_log_variance = self.generator.prior(texts)
        ratio = ((mean - prior_mean).square() + log_variance.exp()) / prior_log_variance.exp()  # (N, Z)
        return (ratio - 1 + prior_log_variance - log_variance).sum(1).mean() / 2


def squared_bands(images: Tensor, levels: int) -> Tensor:
    """Returns the mean squares (L + 1,) of the bands of images (N, C, S, S), by Haar's wavelets (Mallat 1989).

    The finest band holds the differences between neighbouring pixels; the last one holds the means of squares with a
    side of 2**L pixels. They add up to the mean square of the images.
    """
    squares = []
    for _ in range(levels):
        coarse = functional.avg_pool2d(images, 2)
        squares.append((images - functional.interpolate(coarse, scale_factor=2.0)).square().mean())
        images = coarse
    return torch.stack([*squares, images.square().mean()])


def vae_loss(bound: ElboTerms, num_values: int, divergence_weight: float = 1.0) -> Tensor:
    """Returns the negative evidence lower bound, in nats per value, up to a constant and the weights of bands.

    In each band the values are normally distributed around the decoded image, with the scale that makes the batch most
    likely (Rybkin et al. 2021, 4.2). So an edge counts much, though a noisy background hides it in the mean square of
    all pixels. The bound itself weighs a band by its share of the values. Here it is the square root of that share,
    because the few coarse values, which give the layout of the image, would weigh next to nothing.

    Args:
        bound: The terms of a batch.
        num_values: The number of values of an image, 3 * S * S.
        divergence_weight: The weight of the divergence: a higher one keeps latents closer to the prior.
    """
    levels = len(bound.errors) - 1
    shares = [3 / 4 ** (level + 1) for level in range(levels)] + [1 / 4**levels]
    weights = torch.tensor(shares, device=bound.errors.device).sqrt()
    error = (weights * torch.log(bound.errors + _GREY_LEVEL**2) / 2).sum() / weights.sum()
    return error + divergence_weight * bound.divergence / num_values
