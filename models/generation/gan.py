"""The generative adversarial network (Goodfellow et al. 2014): what its generator is trained against.

The discriminator is DF-GAN's (Tao et al. 2022, 3.4: one way out, told of the text late, so that a real image with
another's text is false as well, the matching-aware loss of Reed et al. 2016) with spectral normalisation (Miyato et
al. 2018) and hinge losses (Lim and Ye 2017), and R1 now and then (Mescheder et al. 2018, 4.1; lazily as in Karras et
al. 2020).

N images, S side in pixels, G side of the smallest grid, T text vector, E condition, C channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from diptych.models.generation.generator import Condition, GeneratorConfig, Trunk, convolution

_SLOPE = 0.2


class Discriminator(nn.Module):
    """Tells images that belong to their text from all others."""

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
        """Returns how much (N,) grids look like real images of their texts (N, T)."""
        conditioning = self.condition(texts)[:, :, None, None].expand(-1, -1, *grid.shape[2:])
        joined = functional.leaky_relu(self.joint(torch.cat([grid, conditioning], 1)), _SLOPE)
        verdict: Tensor = self.last(joined.flatten(1)).float().squeeze(1)
        return verdict


def discriminator_loss(real: Tensor, mismatched: Tensor, fake: Tensor) -> Tensor:
    """Returns the hinge loss of a discriminator: real images and their texts against other texts and made images."""
    false = (functional.relu(1 + mismatched).mean() + functional.relu(1 + fake).mean()) / 2
    return functional.relu(1 - real).mean() + false


def r1_penalty(real: Tensor, images: Tensor) -> Tensor:
    """Returns the mean squared gradient of verdicts (N,) with respect to the real images that they are of."""
    (gradient,) = torch.autograd.grad(real.sum(), images, create_graph=True)
    return gradient.square().sum([1, 2, 3]).mean()
