"""The network that makes an image from a text vector and noise: the decoder of a VAE, the generator of a GAN.

Its frame is DF-GAN's (Tao et al. 2022, 3.2 and 3.3): noise becomes a small grid, each residual block doubles it, and in
each the text, joined with the noise, scales and shifts the channels. One thing differs: the last doubling is a pixel
shuffle (Shi et al. 2016), at a quarter of the cost. `Trunk` goes from an image to the small grid, for an encoder and a
discriminator.

N images, S side in pixels, G side of the smallest grid, T text vector, E condition, Z noise, C channels.
"""

import dataclasses
import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

_SLOPE = 0.2
# The greatest value of a whitened text, in standard deviations; texts further out than any in training are clamped
_FAR = 6.0
# The range of a prior's log-variances: a latent may be nearly certain, but not much wider than without a text
_LOG_VARIANCES = -4.0, 2.0
_SMALLEST_GRID, _LARGEST_GRID = 4, 7


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """Shape of a generator.

    Attributes:
        size_px: S, a number from 4 to 7, doubled twice or more.
        text_dim: T.
        latent_dim: Z.
        condition_dim: E.
        channels: C at S / 2; each halving of the side doubles it.
        max_channels: The most channels of any grid.
        text_scale: The factor of whitened texts; see `Condition`.
        text_prior: Whether the text scales and shifts the noise; see `Prior`.
    """

    size_px: int
    text_dim: int
    latent_dim: int = 128
    condition_dim: int = 128
    channels: int = 32
    max_channels: int = 256
    text_scale: float = 1.0
    text_prior: bool = False

    def __post_init__(self) -> None:
        if not is_size(self.size_px):
            raise ValueError(f"images of {self.size_px} px cannot be made: {SIZES}")

    @property
    def grids(self) -> list[int]:
        """The sides of the grids, from G to S / 2."""
        side = self.size_px // 2
        sides = [side]
        while side >= 2 * _SMALLEST_GRID:
            side //= 2
            sides.append(side)
        return sides[::-1]

    def channels_at(self, side: int) -> int:
        """Returns the channels of a grid of some side."""
        return min(self.max_channels, self.channels * (self.size_px // 2 // side))


SIZES = "the side must be 4, 5, 6 or 7, doubled twice or more, as 64, 96, 128 and 224 are"


def is_size(size_px: int) -> bool:
    """Tells whether a generator can make images of this side."""
    side, doublings = size_px, 0
    while side > _LARGEST_GRID and side % 2 == 0:
        side, doublings = side // 2, doublings + 1
    return side in range(_SMALLEST_GRID, _LARGEST_GRID + 1) and doublings >= 2


class Condition(nn.Module):
    """Projects a text vector to the conditioning vector.

    Text vectors are first whitened by the principal axes of the training's texts, because differences between captions,
    such as colours, may be a small part of a vector. They are then scaled down: an Adam step changes all weights
    equally, so with long vectors the first layer's output would change too much for a stable training.
    """

    mean: Tensor
    whitening: Tensor

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(config.text_dim))
        self.register_buffer("whitening", torch.eye(config.text_dim))
        self._scale = config.text_scale
        self.layers = nn.Sequential(
            nn.Linear(config.text_dim, config.condition_dim),
            nn.LeakyReLU(_SLOPE),
            nn.Linear(config.condition_dim, config.condition_dim),
        )

    def forward(self, texts: Tensor) -> Tensor:
        """Returns the conditioning vectors (N, E) of texts (N, T)."""
        white = (texts - self.mean) @ self.whitening
        conditioning: Tensor = self.layers(white.clamp(-_FAR, _FAR) * self._scale)
        return conditioning


class Prior(nn.Module):
    """Predicts the latent's distribution from a text vector (Sohn et al. 2015).

    Before training it is the standard normal distribution.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.condition = Condition(config)
        self.last = nn.Linear(config.condition_dim, 2 * config.latent_dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and the logarithm of the variance, (N, Z) each, for texts (N, T)."""
        conditioning = functional.leaky_relu(self.condition(texts), _SLOPE)
        mean, log_variance = self.last(conditioning).float().chunk(2, 1)
        return mean, log_variance.clamp(*_LOG_VARIANCES)


class Generator(nn.Module):
    """Makes images from text vectors and noise."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.prior = Prior(config) if config.text_prior else None
        self.condition = Condition(config)
        sides = config.grids
        self._shape = config.channels_at(sides[0]), sides[0], sides[0]
        conditioning = config.condition_dim + config.latent_dim
        channels = [config.channels_at(side) for side in sides]
        self.first = nn.Linear(conditioning, channels[0] * sides[0] ** 2)
        self.blocks = nn.ModuleList(
            _UpBlock(num_in, num_out, conditioning) for num_in, num_out in itertools.pairwise(channels)
        )
        self.last_affine = _Affine(channels[-1], conditioning)
        self.last = nn.Conv2d(channels[-1], 12, 3, padding=1)

    def forward(self, texts: Tensor, noise: Tensor) -> Tensor:
        """Returns images (N, 3, S, S), from -1 to 1, for texts (N, T) and standard normal noise (N, Z)."""
        if self.prior is not None:
            mean, log_variance = self.prior(texts)
            noise = mean + noise * torch.exp(log_variance / 2)
        return self.decode(texts, noise)

    def decode(self, texts: Tensor, latent: Tensor) -> Tensor:
        """Returns images (N, 3, S, S), from -1 to 1, for texts (N, T) and latents (N, Z)."""
        conditioning = torch.cat([self.condition(texts), latent], 1)  # (N, E + Z)
        grid = self.first(conditioning).view(-1, *self._shape).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            grid = block(grid, conditioning)
        grid = functional.leaky_relu(self.last_affine(grid, conditioning), _SLOPE)
        grid = self.last(grid)  # (N, 12, S/2, S/2)
        return torch.tanh(functional.pixel_shuffle(grid, 2))


class _Affine(nn.Module):
    """Scales and shifts channels by the conditioning vector."""

    def __init__(self, channels: int, conditioning: int) -> None:
        super().__init__()
        self.layer = nn.Linear(conditioning, 2 * channels)
        nn.init.normal_(self.layer.weight, std=0.02)
        nn.init.zeros_(self.layer.bias)

    def forward(self, grid: Tensor, conditioning: Tensor) -> Tensor:
        scale, shift = self.layer(conditioning)[:, :, None, None].chunk(2, 1)
        return grid * (1 + scale) + shift


class _UpBlock(nn.Module):
    """Doubles a grid."""

    def __init__(self, num_in: int, num_out: int, conditioning: int) -> None:
        super().__init__()
        self.affine1, self.affine2 = _Affine(num_in, conditioning), _Affine(num_out, conditioning)
        self.conv1 = nn.Conv2d(num_in, num_out, 3, padding=1)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1)
        self.skip = nn.Conv2d(num_in, num_out, 1) if num_in != num_out else nn.Identity()

    def forward(self, grid: Tensor, conditioning: Tensor) -> Tensor:
        new = functional.leaky_relu(self.affine1(grid, conditioning), _SLOPE)
        new = self.conv1(functional.interpolate(new, scale_factor=2.0))
        new = self.conv2(functional.leaky_relu(self.affine2(new, conditioning), _SLOPE))
        return new + functional.interpolate(self.skip(grid), scale_factor=2.0)


class Trunk(nn.Module):
    """Reduces images to the smallest grid of a generator of the same shape.

    Args:
        config: The generator's configuration.
        spectral: Whether to use spectral normalisation (Miyato et al. 2018), which a discriminator needs.
    """

    def __init__(self, config: GeneratorConfig, spectral: bool) -> None:
        super().__init__()
        channels = [config.channels_at(side) for side in config.grids[::-1]]
        self.num_channels = channels[-1]
        self.first = convolution(12, channels[0], 3, spectral)
        self.blocks = nn.ModuleList(
            _DownBlock(num_in, num_out, spectral) for num_in, num_out in itertools.pairwise(channels)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Returns the grids (N, C, G, G) of images (N, 3, S, S), from -1 to 1."""
        grid = functional.pixel_unshuffle(images, 2).contiguous(memory_format=torch.channels_last)
        grid = self.first(grid)  # (N, C, S/2, S/2)
        for block in self.blocks:
            grid = block(grid)
        return functional.leaky_relu(grid, _SLOPE)


class _DownBlock(nn.Module):
    """Halves a grid."""

    def __init__(self, num_in: int, num_out: int, spectral: bool) -> None:
        super().__init__()
        self.conv1 = convolution(num_in, num_out, 4, spectral, stride=2)
        self.conv2 = convolution(num_out, num_out, 3, spectral)
        self.skip = convolution(num_in, num_out, 1, spectral)

    def forward(self, grid: Tensor) -> Tensor:
        new = self.conv1(functional.leaky_relu(grid, _SLOPE))
        new = self.conv2(functional.leaky_relu(new, _SLOPE))
        skipped: Tensor = self.skip(functional.avg_pool2d(grid, 2))
        return new + skipped


def convolution(num_in: int, num_out: int, size: int, spectral: bool, stride: int = 1) -> nn.Module:
    """Returns a convolution that keeps the grid's side, or divides it by `stride`; spectrally normalised on request."""
    layer = nn.Conv2d(num_in, num_out, size, stride, padding=(size - 1) // 2)
    normalised: nn.Module = spectral_norm(layer) if spectral else layer
    return normalised


def to_pixels(images: Tensor) -> Tensor:
    """Converts images (N, 3, S, S), from -1 to 1, to pixels (N, S, S, 3), uint8."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def from_pixels(pixels: Tensor) -> Tensor:
    """Converts pixels (N, S, S, 3), uint8, to images (N, 3, S, S), from -1 to 1."""
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)
