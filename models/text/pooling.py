"""What a sentence-transformers directory says of the way from token vectors to one vector, and that way itself."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diptych.models.errors import ModelError, one_line
from diptych.models.files.weights import load_state, read_tensors

# In the order in which several are joined; the keys are those of files from before version 6.
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
    """How a model makes one vector of a sentence.

    Attributes:
        transformer: Folder of the transformer itself.
        pooling: Ways of pooling, whose vectors are joined; None where the model says nothing.
        steps: What is done to the pooled vector.
        max_tokens: Longest input, special tokens included; None where the model says nothing.
        lowercase: Text is lower-cased first.
        prompt: Put before each text.
    """

    transformer: Path
    pooling: tuple[str, ...] | None
    steps: nn.Sequential
    max_tokens: int | None = None
    lowercase: bool = False
    prompt: str = ""


def read_sentence_config(folder: Path) -> SentenceConfig:
    """Returns what the folder's `modules.json` and the files it names say; of a folder without, that it says nothing.

    Raises:
        ModelError: A file is damaged, or a module is of a kind that is not known here.
    """
    if not (folder / "modules.json").exists():
        return SentenceConfig(folder, None, nn.Sequential())
    transformer, pooling, steps = folder, None, nn.Sequential()
    for module in _read_json(folder / "modules.json", list):
        kind = str(module["type"]).rpartition(".")[2]
        place = folder / str(module.get("path", ""))
        if kind == "Transformer":
            transformer = place
        elif kind == "Pooling":
            pooling = _read_pooling(place)
        elif kind == "Dense":
            steps.append(_Dense.read(place))
        elif kind == "Normalize":
            steps.append(_Normalize())
        elif kind != "Dropout":
            raise ModelError(
                f"{folder} has a module {kind} between tokens and vector, which is not known. Expected Transformer, "
                "Pooling, Dense and Normalize: use a model of those."
            )
    found = sorted(transformer.glob(_TRANSFORMER_CONFIGS))
    settings = _read_json(found[0], dict) if found else {}
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
        what = f"pooling {unknown[0]!r}" if unknown else "pooling without the prompt's tokens"
        raise ModelError(f"{folder} asks for {what}, which is not known. Expected {', '.join(_POOLINGS)}.")
    return modes


def _read_prompt(folder: Path) -> str:
    path = folder / "config_sentence_transformers.json"
    config = _read_json(path, dict) if path.exists() else {}
    name = config.get("default_prompt_name")
    return str((config.get("prompts") or {}).get(name) or "") if name else ""


def _read_json(path: Path, expected: type) -> Any:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read: {one_line(error)}. It is part of the model: fetch it again."
        ) from error
    if not isinstance(found, expected):
        raise ModelError(f"{path} is damaged: it holds no {expected.__name__}. Fetch the model again.")
    return found


def pool(modes: Sequence[str], hidden: Tensor, mask: Tensor) -> Tensor:
    """Returns one vector a sequence.

    Args:
        modes: Ways of pooling; their vectors are joined.
        hidden: (B, T, D) vectors of tokens, float32.
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
            what = f"activation {activation}" if activation not in _ACTIVATIONS else "residual connection"
            raise ModelError(
                f"{folder} asks for the {what}, which is not known. Expected {', '.join(_ACTIVATIONS)}."
            )
        sizes = int(config["in_features"]), int(config["out_features"])
        made = cls(*sizes, bool(config.get("bias", True)), activation)
        load_state(made, read_tensors(folder / "model.safetensors"), str(folder))
        return made

    def forward(self, vectors: Tensor) -> Tensor:
        found: Tensor = self.activation(self.linear(vectors))
        return found
