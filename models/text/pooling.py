"""Pools token vectors to one vector, as the folder of a sentence-transformers model configures it."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diptych.models.errors import ModelError, one_line
from diptych.models.files.weights import load_state, read_tensors

# The keys of files from before version 6, in the order in which the vectors of several are concatenated
_OLD_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS = {
    "Tanh": nn.Tanh,
    "Identity": nn.Identity,
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
    "Sigmoid": nn.Sigmoid,
}
_TRANSFORMER_CONFIGS = "sentence_*_config.json"


class SentenceConfig(NamedTuple):
    """The configuration of a sentence-transformers model.

    Attributes:
        transformer: The folder of the transformer itself.
        pooling: The ways of pooling, whose vectors are concatenated; None where the model configures none.
        steps: The layers that the pooled vector passes through.
        max_tokens: The length of the longest input, special tokens included; None where the model configures none.
        lowercase: Whether text is lower-cased first.
        prompt: The text put before each input.
    """

    transformer: Path
    pooling: tuple[str, ...] | None
    steps: nn.Sequential
    max_tokens: int | None = None
    lowercase: bool = False
    prompt: str = ""


def read_sentence_config(folder: Path) -> SentenceConfig:
    """Reads the folder's `modules.json` and the files that it names; a folder without one configures nothing.

    Raises:
        ModelError: A file is damaged, or a module is of an unknown kind.
    """
    if not (folder / "modules.json").exists():
        return SentenceConfig(folder, None, nn.Sequential())
    try:
        return _read_modules(folder)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"The files of sentence-transformers in {folder} are damaged: {one_line(error, with_type=True)}. Fetch the "
            "model again."
        ) from error


def _read_modules(folder: Path) -> SentenceConfig:
    transformer, pooling, steps = folder, None, nn.Sequential()
    for module in _read_json(folder / "modules.json", list):
        kind = str(module["type"]).rpartition(".")[2]
        module_folder = folder / str(module.get("path", ""))
        if kind == "Transformer":
            transformer = module_folder
        elif kind == "Pooling":
            pooling = _read_pooling(module_folder)
        elif kind == "Dense":
            steps.append(_Dense.read(module_folder))
        elif kind == "Normalize":
            steps.append(_Normalize())
        elif kind != "Dropout":
            raise ModelError(
                f"{folder} has a module {kind} between tokens and vector, which is not known. Expected Transformer, "
                "Pooling, Dense and Normalize: use a model of those."
            )
    configs = sorted(transformer.glob(_TRANSFORMER_CONFIGS))
    settings = _read_json(configs[0], dict) if configs else {}
    return SentenceConfig(
        transformer,
        pooling,
        steps,
        int(settings["max_seq_length"]) if settings.get("max_seq_length") else None,
        bool(settings.get("do_lower_case")),
        _read_prompt(folder),
    )


def _read_pooling(folder: Path) -> tuple[str, ...]:
    config = _read_json(folder / "config.json", dict)
    named = config.get("pooling_mode")
    if named is None:
        modes = tuple(mode for key, mode in _OLD_KEYS.items() if config.get(key)) or ("mean",)
    else:
        modes = (named,) if isinstance(named, str) else tuple(named)
    unknown = [mode for mode in modes if mode not in _POOLINGS]
    if unknown or config.get("include_prompt") is False:
        unsupported = f"pooling {unknown[0]!r}" if unknown else "pooling without the prompt's tokens"
        raise ModelError(
            f"{folder} asks for {unsupported}, which is not known. Expected {', '.join(_POOLINGS)}."
        )
    return modes


def _read_prompt(folder: Path) -> str:
    path = folder / "config_sentence_transformers.json"
    config = _read_json(path, dict) if path.exists() else {}
    name = config.get("default_prompt_name")
    return str((config.get("prompts") or {}).get(name) or "") if name else ""


def _read_json(path: Path, expected: type) -> Any:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read: {one_line(error)}. It is part of the model: fetch it again."
        ) from error
    if not isinstance(content, expected):
        raise ModelError(f"{path} is damaged: it holds no {expected.__name__}. Fetch the model again.")
    return content


def pool(modes: Sequence[str], hidden: Tensor, mask: Tensor) -> Tensor:
    """Pools the token vectors of each sequence to one vector.

    Args:
        modes: The ways of pooling, whose vectors are concatenated.
        hidden: (B, T, D) token vectors, float32.
        mask: (B, T), 1 at tokens, 0 at padding, which is on the right.

    Returns:
        (B, D * modes).
    """
    return torch.cat([_POOLINGS[mode](hidden, mask) for mode in modes], dim=-1)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return _weighted(hidden, mask.to(hidden.dtype))


def _mean_sqrt(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.to(hidden.dtype)
    return _weighted(hidden, weights) * weights.sum(1, keepdim=True).sqrt()


def _weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return _weighted(hidden, (mask * positions).to(hidden.dtype))


def _weighted(hidden: Tensor, weights: Tensor) -> Tensor:
    total = torch.einsum("btd,bt->bd", hidden, weights)  # (B, T, D), (B, T) -> (B, D)
    return total / weights.sum(1, keepdim=True).clamp(min=1e-9)


def _max(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(mask[:, :, None] == 0, float("-inf")).amax(1)


def _cls(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[:, 0]


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    last = mask.sum(1).clamp(min=1) - 1  # (B,)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


_POOLINGS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _cls,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}


class _Normalize(nn.Module):
    def forward(self, vectors: Tensor) -> Tensor:
        return nn.functional.normalize(vectors, dim=-1)


class _Dense(nn.Module):
    """A linear layer and its activation."""

    def __init__(self, num_in: int, num_out: int, bias: bool, activation: str) -> None:
        super().__init__()
        self.linear = nn.Linear(num_in, num_out, bias=bias)
        self.activation = _ACTIVATIONS[activation]()

    @classmethod
    def read(cls, folder: Path) -> "_Dense":
        config = _read_json(folder / "config.json", dict)
        activation = str(config.get("activation_function", "torch.nn.Tanh")).rpartition(".")[2]
        if activation not in _ACTIVATIONS or config.get("use_residual"):
            is_known = activation in _ACTIVATIONS
            unsupported = "residual connection" if is_known else f"activation {activation}"
            raise ModelError(
                f"{folder} asks for the {unsupported}, which is not known. Expected {', '.join(_ACTIVATIONS)}."
            )
        sizes = int(config["in_features"]), int(config["out_features"])
        dense = cls(*sizes, bool(config.get("bias", True)), activation)
        load_state(dense, read_tensors(folder / "model.safetensors"), str(folder))
        return dense

    def forward(self, vectors: Tensor) -> Tensor:
        activated: Tensor = self.activation(self.linear(vectors))
        return activated
