"""Chooses the device of a model where it is loaded: a launcher and its workers may have different ones."""

import contextlib
from contextlib import AbstractContextManager

import torch

from diptych.models.errors import ModelError
from diptych.models.names import is_device


def choose_device(name: str) -> torch.device:
    """Returns the device of a name; `auto` is CUDA where there is a GPU, else the CPU.

    Args:
        name: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        ModelError: The name is not valid, or this machine has no such device.
    """
    if not is_device(name):
        raise ModelError(f"`device` {name!r} is no device. Expected auto, cpu, cuda or cuda:N.")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda" if name == "auto" else name)
    if (device.index or 0) >= count:
        there = f"CUDA devices 0 to {count - 1}" if count else "no CUDA device that PyTorch can use"
        raise ModelError(
            f"`device` {name} is not there: this machine has {there}. Use another, or `device` auto."
        )
    return device


def training_precision(name: str, device: torch.device) -> torch.autocast:
    """Returns the context for training: autocast to bfloat16, or none.

    Args:
        name: `float32`, `bfloat16`, or `auto`: bfloat16 on a GPU that supports it, else float32.
        device: The device that the training runs on.
    """
    is_auto = (
        name == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    return torch.autocast(device.type, torch.bfloat16, enabled=is_auto or name == "bfloat16")


def half_precision(device: torch.device) -> AbstractContextManager[None]:
    """Returns the context for inference: on CUDA autocast to bfloat16, or float16 where the GPU lacks it.

    On the CPU it has no effect: half precision is slower there, and results would depend on the processor.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    with torch.cuda.device(device):
        # Without emulated bfloat16, which is slower than float32
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.autocast("cuda", dtype=dtype)
