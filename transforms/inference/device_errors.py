"""Tells errors of the machine from errors of a row: the first must end the job, the second costs the row."""

import errno
import sys
from concurrent.futures import BrokenExecutor

from diptych.transforms.errors import DeviceError

# What a process, or the machine, has run out of
_EXHAUSTED = frozenset({errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENODEV})
# Libraries of devices raise RuntimeError for everything, so their words have to tell. A CUDA error is sticky: the
# process has lost its context, and every later call fails (CUDA C++ Programming Guide, "Error Checking").
_WORDS = (
    "accelerator error",
    "alloc_failed",
    "bad_alloc",
    "bad allocation",
    "can't allocate memory",
    "can't start new thread",
    "cannot allocate memory",
    "cublas_status",
    "cuda driver",
    "cuda error",
    "cuda initialization",
    "cuda_error",
    "cudnn_status",
    "cudnn error",
    "cufft error",
    "cusolver",
    "cusparse",
    "device-side assert",
    "driver shutting down",
    "hip error",
    "miopen",
    "mps backend",
    "nccl",
    "no cuda gpus",
    "not enough memory",
    "nvml",
    "nvrtc",
    "resource temporarily unavailable",
    "xpu error",
)


def is_out_of_device_memory(error: BaseException) -> bool:
    """Tells whether the device has no room for a micro-batch, which a smaller one may have."""
    torch = sys.modules.get("torch")  # a model without it has no device to fill
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def is_of_machine(error: BaseException) -> bool:
    """Tells whether an error is the device's, its libraries' or the host's, so that no row is to blame.

    Out of memory on the device is none of these: that may be the row's size.
    """
    if is_out_of_device_memory(error):
        return False
    torch = sys.modules.get("torch")
    accelerator_error = getattr(torch, "AcceleratorError", ())
    if isinstance(error, MemoryError | ImportError | ConnectionError | TimeoutError | BrokenExecutor):
        return True
    if isinstance(error, accelerator_error) or (isinstance(error, OSError) and error.errno in _EXHAUSTED):
        return True
    if isinstance(error, RuntimeError | SystemError | OSError):
        text = str(error).lower()
        if any(words in text for words in _WORDS):
            return True
    return error.__cause__ is not None and is_of_machine(error.__cause__)


def device_error(message: str) -> DeviceError:
    """Returns the error to end a job with, for what the machine said in a line."""
    return DeviceError(
        f"The model cannot go on: {message}. That is the machine's fault, not a row's, so nothing is rejected for it. "
        "See that the device and its driver work and that there is memory (a smaller --batch_size takes less), and "
        "run the same command again; it goes on where it stopped."
    )


def model_error(message: str, earlier: str) -> DeviceError:
    """Returns the error to end a job with when a model fails on what it could do before.

    Args:
        message: What the model said of the rows, in a line.
        earlier: What it said of the input that it could do before, in a line.
    """
    return DeviceError(
        f"The model fails on every row of a micro-batch ({message}), and by now also on a row that it could do "
        f"before ({earlier}). That is the model's or the device's fault, not a row's, so nothing is rejected for it. "
        "See that the device works, and run the same command again; it goes on where it stopped."
    )
