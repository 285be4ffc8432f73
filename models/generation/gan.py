"""The generative adversarial network (Goodfellow et al. 2014): what its generator is trained against.

The discriminator is DF-GAN's (Tao et al. 2022, 3.4): it has one output, and joins the text late. A real image with
another image's text counts as false (the matching-aware loss of Reed et al. 2016). Added are spectral normalisation
(Miyato et al. 2018), hinge losses (Lim and Ye 2017), and an R1 penalty at some steps (Mescheder et al. 2018, 4.1;
lazily as in Karras et al. 2020).

N images, S side in pixels, G side of the smallest grid, T text vector, E condition, C channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from diptych.models.generation.generator import Condition, GeneratorConfig, Trunk, convolution

_SLOPE = 0.2


class Discriminator(nn.Module):
    """Tells real images with their own text from all others."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.trunk = Trunk(config, spectral=True)
        self.condition = Condition(config)
        channels = self.trunk.num_channels
        self.joint = convolution(channels + config.condition_dim, channels, 3, spectral=True)
        self.last = nn.Linear(channels * config.grids[0] ** 2, 1)

    def features(self, images: Tensor) -> Tensor:
        """Returns the grid (N, C, G, G) of images (N, 3, S, S), from -1 to 1."""
        grid: Tensor = self.trunk(images)
        return grid

    def score(self, grid: Tensor, texts: Tensor) -> Tensor:
        """Returns the scores (N,) of grids and texts (N, T); a higher one is more like a real image of its text."""
        conditioning = self.condition(texts)[:, :, None, None].expand(-1, -1, *grid.shape[2:])
        joined = functional.leaky_relu(self.joint(torch.cat([grid, conditioning], 1)), _SLOPE)
        scores: Tensor = self.last(joined.flatten(1)).float().squeeze(1)
        return scores


def discriminator_loss(real: Tensor, mismatched: Tensor, fake: Tensor) -> Tensor:
    """Returns the hinge loss of a discriminator from scores (N,) of real images, mismatched texts and made images."""
    false = (functional.relu(1 + mismatched).mean() + functional.relu(1 + fake).mean()) / 2
    return functional.relu(1 - real).mean() + false


def r1_penalty(real: Tensor, images: Tensor) -> Tensor:
    """Returns the mean squared gradient of real images' scores (N,) with respect to the images (N, 3, S, S)."""
    (gradient,) = torch.autograd.grad(real.sum(), images, create_graph=True)
    return gradient.square().sum([1, 2, 3]).mean()
