"""The checkpoint that a killed training resumes from: one file, whole or not at all.

A checkpoint is a safetensors file whose metadata hold the rest of the state as JSON, so that nothing is unpickled
when it is read.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from diptych.models.errors import ModelError, one_line

_FORMAT = "1"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A training at one step.

    Attributes:
        step: Steps (or epochs) done, as the training counts them.
        tensors: The tensors by name, on the CPU.
        state: The rest of the training's state, as JSON values.
    """

    step: int
    tensors: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]


class Checkpoints:
    """The last checkpoint of a training, in a folder of its own or beside other files.

    Attributes:
        folder: Local folder; made where there is none when the first checkpoint is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "_checkpoint.safetensors"
        self._temporary = folder / "._checkpoint.safetensors.tmp"

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Writes a checkpoint in place of the one before, which stays until the new one is whole on the disk.

        Args:
            step: Steps done.
            tensors: By name, of any device; tensors that share memory are written one by one.
            state: JSON values; floats come back as they were, to the last bit.

        Raises:
            ModelError: It cannot be written; the one before is still there.
        """
        metadata = {"format": _FORMAT, "step": str(step), "state": json.dumps(dict(state))}
        plain = {name: _owned(tensor) for name, tensor in tensors.items()}
        with _write_errors(self._path):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                safetensors.torch.save_file(plain, self._temporary, metadata)
                _sync(self._temporary)
                os.replace(self._temporary, self._path)
            except BaseException:
                with contextlib.suppress(OSError):
                    self._temporary.unlink()
                raise
            _sync(self.folder)

    def latest(self) -> Checkpoint | None:
        """Returns the last checkpoint that was saved whole, or None where there is none.

        Raises:
            ModelError: There is one that may not be read.
        """
        try:
            with safetensors.safe_open(self._path, framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    return None
                # Cloned: a mapped file would keep its disk space after the next checkpoint replaces it.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                return Checkpoint(int(metadata["step"]), tensors, json.loads(metadata["state"]))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (safetensors.SafetensorError, KeyError, ValueError):
            # The file was cut short by a disk that lied about being synced: nothing is left but to start again.
            return None
        except OSError as error:
            raise ModelError(
                f"{self._path} cannot be read: {error.strerror or error}. Give this user the right to read it, or "
                "delete it to train from the start."
            ) from error


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor on the CPU that shares its memory with no other, as safetensors wants it."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or one_line(error)
        raise ModelError(
            f"{path} cannot be written: {reason}. The checkpoint before it, if any, is still there: free some space or "
            "give this user the right to write, and run the same command again; it goes on from there."
        ) from error


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, name: str = "optimizer"
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Returns an optimizer's state as named tensors and JSON values, to be saved with others in one checkpoint.

    Args:
        optimizer: The optimizer.
        name: The optimizer's name in the checkpoint.

    Returns:
        Tensors whose names begin with its name, and a state with its name as the one key.
    """
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    parameters = {
        str(index): _split(values, f"{name}.state.{index}", tensors)
        for index, values in state["state"].items()
    }
    groups = [
        _split(group, f"{name}.groups.{index}", tensors) for index, group in enumerate(state["param_groups"])
    ]
    return tensors, {name: {"state": parameters, "groups": groups}}


def _split(values: Mapping[str, Any], name: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Moves the tensors among some values to `tensors`; returns the others."""
    rest = {}
    for key, value in values.items():
        if isinstance(value, torch.Tensor):
            tensors[f"{name}.{key}"] = value
        else:
            rest[key] = value
    return rest


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    name: str = "optimizer",
) -> None:
    """Restores what `flatten_optimizer` returned; training continues as if it had never stopped.

    Args:
        optimizer: An optimizer made like the saved one, over the same parameters in the same order.
        tensors: The checkpoint's tensors; those of other names are ignored.
        state: The checkpoint's state.
        name: The optimizer's name in the checkpoint.

    Raises:
        ModelError: The state is of an optimizer over other parameters.
    """
    now = optimizer.state_dict()["param_groups"]
    try:
        saved = state[name]
        groups = [_join(group, f"{name}.groups.{i}", tensors) for i, group in enumerate(saved["groups"])]
        parameters = {
            int(index): _join(values, f"{name}.state.{index}", tensors)
            for index, values in saved["state"].items()
        }
        for group, own in zip(groups, now, strict=True):
            for key, value in group.items():
                if isinstance(own.get(key), tuple):  # JSON knows lists only
                    group[key] = tuple(value)
        _check_shapes(optimizer, parameters)
        _lay_out(optimizer, parameters)
        optimizer.load_state_dict({"state": parameters, "param_groups": groups})
    except (KeyError, ValueError, TypeError) as error:
        raise ModelError(
            f"The checkpoint's optimizer state does not fit this model ({error}). It is of a training with other "
            "options or another version: delete the checkpoint to train from the start."
        ) from error


def _join(values: Mapping[str, Any], name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    prefix = f"{name}."
    joined = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return {**values, **joined}


def _lay_out(optimizer: torch.optim.Optimizer, parameters: dict[int, dict[str, Any]]) -> None:
    """Gives moments the strides of their parameters: fused kernels read both in the order of memory."""
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in parameters.items():
        for key, value in values.items():
            if torch.is_tensor(value) and value.shape == own[index].shape:
                values[key] = torch.empty_like(own[index], dtype=value.dtype, device="cpu").copy_(value)


def _check_shapes(optimizer: torch.optim.Optimizer, parameters: Mapping[int, Mapping[str, Any]]) -> None:
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in parameters.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != shapes[index]:
                raise ValueError(
                    f"{name} of parameter {index} is {tuple(value.shape)}, not {tuple(shapes[index])}"
                )
