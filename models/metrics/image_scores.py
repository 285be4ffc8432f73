"""Compares made images with real ones: FID and KID, by torchmetrics, over the features of a network.

FID is the distance of two Gaussians (Heusel et al. 2017), KID an unbiased estimate for which small samples suffice
(Binkowski et al. 2018). Scores are comparable only where they are of the same features.

N images, S side in pixels, D features.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diptych.models.captioning.encoder import create_encoder, load_weights
from diptych.models.device import choose_device
from diptych.models.errors import ModelError, one_line
from diptych.models.files.cache import to_local_path
from diptych.models.files.weights import model_digest, read_tensors

INCEPTION = "inception"
_INCEPTION_PX, _INCEPTION_DIM = 299, 2048
# The images of each side whose features KID keeps; the subsets are those of its authors
_KID_IMAGES, _KID_SUBSETS, _KID_SUBSET = 10_000, 100, 1000


class Features:
    """A network's pooled features of images.

    Attributes:
        name: The network's name, with its weights' digest or `imagenet`.
        size_px: S, the side of the images that it reads.
        dim: D.
    """

    def __init__(
        self, name: str, size_px: int, dim: int, network: Callable[[Tensor], Tensor], device: torch.device
    ) -> None:
        self.name, self.size_px, self.dim = name, size_px, dim
        self._network, self._device = network, device

    def __call__(self, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
        """Returns the features (N, D), float32 on the CPU, of pixels (N, S, S, 3), RGB."""
        tensor = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).to(self._device)
        with torch.inference_mode():
            return self._network(tensor).float().cpu()

    @classmethod
    def load(cls, name: str, weights: str, device: str) -> "Features":
        """Loads a network.

        Args:
            name: `inception` (the FID's own network, from the package torch-fidelity), a network of torchvision, or
                `timm:NAME`.
            weights: The weights of any network but `inception`: `imagenet`, its library's own, or a safetensors file
                with the library's names.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.

        Raises:
            ModelError: It cannot be loaded.
        """
        chosen = choose_device(device)
        if name == INCEPTION:
            return cls(INCEPTION, _INCEPTION_PX, _INCEPTION_DIM, _inception(chosen), chosen)
        encoder = create_encoder(name, 224, pretrained=weights == "imagenet")
        if weights != "imagenet":
            path = to_local_path(weights)
            load_weights(encoder, read_tensors(path), str(path))
            weights = model_digest(path)
        network = encoder.to(chosen).eval().requires_grad_(False)
        return cls(f"{name} ({weights})", 224, encoder.dim, lambda pixels: network(pixels).mean(1), chosen)


def _inception(device: torch.device) -> nn.Module:
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        network: nn.Module = FrechetInceptionDistance(feature=_INCEPTION_DIM).inception.to(device)
    except Exception as error:  # the download and the network raise many kinds of errors
        raise ModelError(
            f"the Inception network of the FID cannot be had "
            f"({one_line(error, 200, with_type=True)}). It comes with `pip install torch-fidelity`, its weights over "
            "the network; without, name other `features`, as resnet50."
        ) from error
    return network


class Distances:
    """Computes FID and KID of two sets of images, whose features are added in batches."""

    def __init__(self, dim: int) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        features = _Precomputed()
        features.num_features = dim
        self._fid = FrechetInceptionDistance(feature=features)
        self._kept: dict[bool, list[Tensor]] = {True: [], False: []}
        self.counts = {True: 0, False: 0}

    def add(self, features: Tensor, real: bool) -> None:
        """Adds the features (N, D) of real or made images."""
        self._fid.update(features, real=real)
        room = _KID_IMAGES - self.counts[real]
        if room > 0:
            self._kept[real].append(features[:room])
        self.counts[real] += len(features)

    def scores(self) -> dict[str, float]:
        """Returns `fid`, and `kid` with its standard deviation over subsets; the subsets are the same each time.

        Raises:
            ModelError: A side has fewer than two images.
        """
        if min(self.counts.values()) < 2:
            raise ModelError(
                f"there are {self.counts[False]} made and {self.counts[True]} real images. Two of each are the fewest "
                "whose distance can be told, and thousands are wanted."
            )
        real, made = torch.cat(self._kept[True]), torch.cat(self._kept[False])
        with warnings.catch_warnings():
            # It warns that it keeps features
            warnings.simplefilter("ignore")
            from torchmetrics.image.kid import KernelInceptionDistance

            size = min(_KID_SUBSET, len(real), len(made))
            kid = KernelInceptionDistance(feature=_Precomputed(), subsets=_KID_SUBSETS, subset_size=size)
            kid.update(real, real=True)
            kid.update(made, real=False)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                mean, std = kid.compute()
            fid = self._fid.compute()
        return {"fid": float(fid), "kid": float(mean), "kid_std": float(std)}


class _Precomputed(nn.Module):
    """Stands for a network where features are computed already."""

    num_features: int = 0

    def forward(self, features: Tensor) -> Tensor:
        return features


def pairwise_distances(pixels: np.ndarray[Any, Any], features: Tensor) -> tuple[float, float]:
    """Returns the mean distances over all pairs of images.

    Args:
        pixels: (N, S, S, 3) uint8, two images or more.
        features: (N, D) the features of the same images.

    Returns:
        The root mean square difference of pixels, of values from 0 to 1; one minus the cosine of features.
    """
    flat = torch.from_numpy(pixels.reshape(len(pixels), -1)).float() / 255
    first, second = torch.triu_indices(len(flat), len(flat), 1)
    pixel_distance = (flat[first] - flat[second]).square().mean(1).sqrt().mean()
    unit = nn.functional.normalize(features, dim=1)
    feature_distance = (1 - (unit[first] * unit[second]).sum(1)).mean()
    return float(pixel_distance), float(feature_distance)
