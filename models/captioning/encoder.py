"""The image half of a captioner: a convolutional network without its classifier, from torchvision or timm.

N images, S side in pixels, L regions, D channels.
"""

import dataclasses
import math
import pickle
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from diptych.models.errors import ModelError, one_line

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """A network and the input that it expects.

    Attributes:
        name: A network of torchvision (`resnet18`, `resnet50`, …), or `timm:NAME`.
        size_px: S, the side of the images.
        mean: The mean of each channel, RGB, of values from 0 to 1.
        std: The standard deviation of each channel.
        stride_px: The side of a region; 0 takes the network's last grid, whose regions are 32 pixels in most.
    """

    name: str
    size_px: int = 224
    mean: tuple[float, float, float] = _IMAGENET_MEAN
    std: tuple[float, float, float] = _IMAGENET_STD
    stride_px: int = 0


class Encoder(nn.Module):
    """Encodes images to a grid of regions.

    Attributes:
        config: The network and its input.
        dim: D, the channels of a region.
        num_regions: L.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: EncoderConfig, network: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.network = network
        # Not persistent: the configuration has them
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1) * 255, persistent=False)
        training = self.training
        with torch.inference_mode():
            shape = self.eval()(torch.zeros(1, 3, config.size_px, config.size_px, dtype=torch.uint8)).shape
        self.train(training)
        self.num_regions, self.dim = int(shape[1]), int(shape[2])

    def forward(self, pixels: Tensor) -> Tensor:
        """Encodes (N, 3, S, S) RGB, uint8, to (N, L, D)."""
        normalised = (pixels.to(self.mean.dtype) - self.mean) / self.std
        grid = self.network(normalised.contiguous(memory_format=torch.channels_last))  # (N, D, H, W)
        if grid.dim() != 4:
            raise ValueError(f"it gives {tuple(grid.shape)}, not a grid of channels, rows and columns")
        return grid.flatten(2).transpose(1, 2)


def create_encoder(name: str, size_px: int, stride_px: int = 0, pretrained: bool = False) -> Encoder:
    """Returns an encoder by the name of its network.

    Args:
        name: A network of torchvision, or `timm:NAME`.
        size_px: The side of the images.
        stride_px: The side of a region: layers after the last grid of this stride are left out. 0 takes all layers.
        pretrained: Load the library's ImageNet weights, fetched or from its cache; else weights are random.

    Raises:
        ModelError: There is no such network, it gives no such grid of features, or its weights cannot be had.
    """
    network, config = _create(name, size_px, stride_px, pretrained)
    return _encoder(config, network)


def restore_encoder(config: EncoderConfig) -> Encoder:
    """Returns an encoder of this configuration, with random weights.

    Raises:
        ModelError: There is no such network, or it gives no grid of features.
    """
    return _encoder(config, _create(config.name, config.size_px, config.stride_px, pretrained=False)[0])


def _create(name: str, size_px: int, stride_px: int, pretrained: bool) -> tuple[nn.Module, EncoderConfig]:
    library, _, rest = name.rpartition(":")
    if library not in ("", "timm"):
        raise ModelError(
            f"the encoder {name!r} is of no known library. Expected a name of torchvision, or timm:NAME."
        )
    try:
        create = _from_timm if library == "timm" else _from_torchvision
        return create(rest, size_px, stride_px, pretrained)
    except (OSError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
        if not pretrained:
            raise ModelError(
                f"the encoder {name} cannot be made: {one_line(error)}. Choose another."
            ) from error
        raise ModelError(
            f"the ImageNet weights of {name} cannot be had ({one_line(error)}). Give a file with "
            "them (`encoder_weights` FILE.safetensors), or check the network."
        ) from error


def _encoder(config: EncoderConfig, network: nn.Module) -> Encoder:
    try:
        return Encoder(config, network.to(memory_format=torch.channels_last))
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        raise ModelError(
            f"the encoder {config.name!r} cannot read images of {config.size_px} pixels as a grid: "
            f"{one_line(error)}. Choose a convolutional network, or another `encoder_size`."
        ) from error


def load_weights(encoder: Encoder, tensors: dict[str, Tensor], source: str) -> None:
    """Loads the weights of a whole network, as its library saves them, into an encoder.

    The classifier's weights may be missing, all others not.

    Args:
        encoder: The encoder to load them into.
        tensors: The weights by the library's names.
        source: The weights' origin, for error messages.

    Raises:
        ModelError: The weights are of another network.
    """
    own = encoder.network.state_dict()
    missing = [name for name in own if name not in tensors]
    wrong = [name for name in own if name in tensors and tensors[name].shape != own[name].shape]
    if missing or wrong:
        raise ModelError(
            f"{source} does not fit the encoder {encoder.config.name}: "
            f"{len(missing)} tensors are missing ({', '.join(missing[:3])}), {len(wrong)} have another shape "
            f"({', '.join(wrong[:3])}). Give the weights that its library saves for this network."
        )
    encoder.network.load_state_dict({name: tensors[name] for name in own})


def _from_torchvision(
    name: str, size_px: int, stride_px: int, pretrained: bool
) -> tuple[nn.Module, EncoderConfig]:
    import torchvision

    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ModelError(
            f"torchvision has no network {name!r}. Expected one such as resnet18 or resnet50, or timm:NAME."
        )
    network: Any = torchvision.models.get_model(name, weights=None)
    if pretrained:
        url = torchvision.models.get_model_weights(name).DEFAULT.url
        # `weights_only`, because the cache may hold any file under this name
        state = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", weights_only=True, check_hash=True
        )
        network.load_state_dict(state)
    if isinstance(network, torchvision.models.ResNet):
        kept = [(name, child) for name, child in network.named_children() if name not in ("avgpool", "fc")]
        grid = nn.Sequential(OrderedDict(_up_to(stride_px, kept, name)))
    elif hasattr(network, "features"):
        layers = _up_to(stride_px, list(network.features.named_children()), name)
        grid = nn.Sequential(OrderedDict(features=nn.Sequential(OrderedDict(layers))))
    else:
        raise ModelError(
            f"{name} gives no grid of features. Choose a convolutional network, such as resnet50."
        )
    # Layers keep their names, so that files of the library's weights fit
    return grid, EncoderConfig(name, size_px, stride_px=stride_px)


def _up_to(stride_px: int, layers: list[tuple[str, nn.Module]], name: str) -> list[tuple[str, nn.Module]]:
    """Returns the layers up to the last one whose grid has this stride; all layers for 0."""
    if not stride_px:
        return layers
    side = 256
    strides = []
    grid = torch.zeros(1, 3, side, side)
    with torch.inference_mode():
        for _, layer in layers:
            grid = layer.eval()(grid)
            # Rounded, because the grids of networks without padding are smaller
            strides.append(2 ** round(math.log2(side / grid.shape[-1])))
    if stride_px not in strides:
        raise _no_stride(name, stride_px, strides)
    return layers[: len(strides) - strides[::-1].index(stride_px)]


def _from_timm(name: str, size_px: int, stride_px: int, pretrained: bool) -> tuple[nn.Module, EncoderConfig]:
    import timm
    from timm.data import resolve_model_data_config

    if not timm.is_model(name):
        raise ModelError(f"timm has no network {name!r}. `timm.list_models()` names them.")
    network = timm.create_model(name, pretrained=pretrained, num_classes=0, global_pool="")
    if stride_px:
        strides = [stage["reduction"] for stage in getattr(network, "feature_info", ())]
        if stride_px not in strides or not hasattr(network, "prune_intermediate_layers"):
            raise _no_stride(f"timm:{name}", stride_px, strides)
        last = len(strides) - 1 - strides[::-1].index(stride_px)
        network.prune_intermediate_layers([last], prune_norm=True)
    config = resolve_model_data_config(network)
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return network, EncoderConfig(f"timm:{name}", size_px, mean, std, stride_px)


def _no_stride(name: str, stride_px: int, strides: list[int]) -> ModelError:
    known = ", ".join(str(stride) for stride in sorted(set(strides))) or "none that can be chosen"
    return ModelError(
        f"the encoder {name} has no grid with a region every {stride_px} pixels. Expected `encoder_stride` of {known}, "
        "or none for its last."
    )
