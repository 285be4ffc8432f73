"""Reads and writes the files of models: `config.json` and safetensors, never a pickle."""

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from diptych.models.errors import ModelError, one_line
from diptych.models.files.cache import PICKLE_SUFFIXES, is_model_file

_CARD = re.compile(r"(^|[/_-])card\.json$|(^|/)license", re.I)
_NUM_NAMED = 3
_READ_BYTES = 1 << 20


def model_digest(path: Path, names: Sequence[str] | None = None) -> str:
    """Returns the digest of a model's files, 16 hex digits.

    Args:
        path: A file or a folder.
        names: The files below the folder that determine the results. None takes all files of a model
            (`diptych.models.files.cache.is_model_file`): no cards, images, hidden files or checkpoints.

    Raises:
        ModelError: A file is missing or may not be read.
    """
    if path.is_file():
        path, names = path.parent, [path.name]
    elif names is None:
        names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        names = [name for name in names if is_model_file(name) and not _CARD.search(name)]
    total = hashlib.sha256()
    for name in sorted(names):
        try:
            with open(path / name, "rb") as file:
                content = hashlib.sha256()
                while piece := file.read(_READ_BYTES):
                    content.update(piece)
        except OSError as error:
            raise ModelError(
                f"{path / name} cannot be read: {error.strerror}. It is part of the model."
            ) from error
        total.update(f"{name}\0{content.hexdigest()}\n".encode())
    return total.hexdigest()[:16]


def read_config(folder: Path, kinds: Sequence[str]) -> dict[str, Any]:
    """Reads the `config.json` of a model that Diptych trained.

    Args:
        folder: The model's folder.
        kinds: The accepted values of its `kind`.

    Raises:
        ModelError: There is none, it is damaged, or the model is of another kind.
    """
    expected = f"a folder with a model of kind {' or '.join(kinds)}, as `diptych train` writes it"
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelError(f"{folder} holds no config.json. Expected {expected}.") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}. Expected {expected}.") from error
    except ValueError as error:
        raise ModelError(
            f"{path} is damaged: {one_line(error)}. Expected {expected}: fetch or train it again."
        ) from error
    kind = config.get("kind") if isinstance(config, dict) else None
    if kind not in kinds:
        model = f"of kind {kind!r}" if kind else "not one of Diptych's"
        if isinstance(config, dict) and "model_type" in config:
            model = f"a Hugging Face model of type {config['model_type']!r}"
        raise ModelError(f"The model in {folder} is {model}. Expected {expected}, or name its own kind.")
    return dict(config)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file, on the CPU.

    Raises:
        ModelError: The file is missing or damaged, or is a pickle, which is never loaded.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except FileNotFoundError as error:
        folder = path.parent
        pickles = sorted(file for file in folder.glob("*") if file.suffix in (*PICKLE_SUFFIXES, ".bin"))
        if pickles:
            raise _is_pickle(pickles[0], path) from error
        raise ModelError(f"{path} is not there. Expected the model's weights (safetensors) in it.") from error
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror}. Expected the model's weights in it."
        ) from error
    # The header follows its length, whose bytes may look like the start of a pickle
    is_safetensors = head[8:] == b"{"
    if not is_safetensors and head.startswith((b"PK\x03\x04", b"\x80")):
        raise _is_pickle(path, path.with_suffix(".safetensors"))
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ModelError(
            f"{path} is no whole safetensors file: {one_line(error)}. Fetch, convert or train it again."
        ) from error
    return tensors


def _is_pickle(pickle: Path, path: Path) -> ModelError:
    return ModelError(
        f"{pickle} is a pickle, which is not loaded: it could run anything. Expected {path.name}. Where you trust it, "
        'convert it: python -c "import torch, safetensors.torch as s; '
        f"t = torch.load('{pickle}', map_location='cpu', weights_only=True); "
        f"s.save_file({{k: v.clone() for k, v in t.items()}}, '{path}')\""
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file atomically, replacing any file of that name.

    Raises:
        ModelError: The disk is full, or the folder may not be written.
    """
    # Copies, because tensors of a file may not share memory, as tied weights do
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_file(path, safetensors.torch.save(copies))


def write_file(path: Path, data: bytes) -> None:
    """Writes a model's file atomically, replacing any file of that name.

    Raises:
        ModelError: The disk is full, or the folder may not be written.
    """
    partial = path.with_name(f".{path.name}-{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
    except OSError as error:
        raise ModelError(
            f"{path} cannot be written: {error.strerror or error}. Make room, or give the right to write there."
        ) from error


def load_state(module: torch.nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Loads tensors into a module.

    Args:
        module: The module to load them into.
        tensors: The tensors by their names in `state_dict`.
        source: The tensors' origin, such as a file, for error messages.

    Raises:
        ModelError: Names or shapes differ.
    """
    own = module.state_dict()
    shapes = [
        f"{name} {tuple(tensors[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    faults = {
        "foreign": sorted(tensors.keys() - own.keys()),
        "missing": sorted(own.keys() - tensors.keys()),
        "of another shape": shapes,
    }
    problems = [f"{len(names)} {fault} ({_first(names)})" for fault, names in faults.items() if names]
    if problems:
        raise ModelError(
            f"The weights in {source} do not fit this model: tensors {', '.join(problems)}. "
            "Expected those of a model with the same configuration."
        )
    module.load_state_dict(dict(tensors))


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_NUM_NAMED]) + (", …" if len(names) > _NUM_NAMED else "")
