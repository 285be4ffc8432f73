"""Turns captions into vectors by a BERT-family encoder, whose token vectors are pooled to one."""

import functools
import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from diptych.models.base import TextModel, TextOptions, TextVector
from diptych.models.device import choose_device, half_precision
from diptych.models.errors import ModelError, ModelOptionError, one_line
from diptych.models.files.cache import to_local_path
from diptych.models.files.pretrained import (
    LOCAL_ONLY,
    check_folder,
    check_tensors,
    has_vocabulary,
    load_weights,
    quiet_transformers,
    vocabulary_files,
)
from diptych.models.files.weights import model_digest
from diptych.models.text.pooling import SentenceConfig, pool, read_sentence_config

_BATCH_SIZE = {"cpu": 64, "cuda": 512}
_EXPECTED = "a BERT-family encoder with its tokenizer, as transformers or sentence-transformers save it"
_POOLING_OPTIONS = (None, "mean", "cls")


class _Prepared(NamedTuple):
    """Tokens, (B, T) each: `input_ids`, `attention_mask` and any other input of the model."""

    tokens: dict[str, Tensor]


class Bert(TextModel):
    """A transformer encoder and its pooling.

    Attributes:
        device: The device that it runs on.
        pooling: The ways of pooling, whose vectors are concatenated.
        max_tokens: The length of the longest input, special tokens included; longer ones are cut.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: SentenceConfig,
        options: TextOptions,
        device: torch.device,
        digest: str,
    ) -> None:
        """Makes the model from its loaded parts.

        Args:
            model: The encoder, a model of transformers.
            tokenizer: The encoder's tokenizer.
            config: The model's own configuration of pooling.
            options: The user's options.
            device: The device to run on.
            digest: The digest of files and options.
        """
        self.device = device
        self.digest = digest
        self.batch_size = _BATCH_SIZE[device.type]
        self.pooling = config.pooling or (options.pooling or "mean",)
        self.max_tokens = _max_tokens(model, tokenizer, config.max_tokens)
        self._model = model.to(device).eval()
        self._steps = config.steps.to(device).eval()
        self._normalize = options.normalize
        self._prompt, self._lowercase = config.prompt, config.lowercase
        self._tokenizer = tokenizer
        # Fast tokenizers hold their truncation and padding as state, so two threads may not call one at a time
        self._tokenizer_lock = threading.Lock()
        try:
            self.dim = self.predict(self.prepare([""]))[0].values.shape[0]
        except Exception as error:  # torch and transformers raise what their many parts raise
            raise ModelError(
                f"The model in {model.name_or_path} makes no vector of a text: {one_line(error)}. Expected "
                f"{_EXPECTED}, whose files belong together: fetch it again."
            ) from error

    @classmethod
    def load(cls, location: str, options: TextOptions, device: str = "auto") -> "Bert":
        """Loads a model's folder from anywhere, or a model of the Hugging Face hub.

        Pooling is that of the model's own sentence-transformers files, else the user's choice, else the mean.

        Args:
            location: A path, an fsspec URL, or a name on the hub.
            options: The user's options.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.

        Raises:
            ModelError: There is no such model or device, or it is damaged, of another kind, or kept as a pickle; or its
                own pooling is not the user's choice.
        """
        if options.pooling not in _POOLING_OPTIONS:
            raise ModelOptionError(f"`pooling` {options.pooling!r} is not known. Expected mean or cls.")
        chosen = choose_device(device)
        folder = to_local_path(location, hub=True)
        config = read_sentence_config(folder)
        if options.pooling and config.pooling and config.pooling != (options.pooling,):
            raise ModelOptionError(
                f"`pooling` {options.pooling} is not what {location} was trained with: its own files say "
                f"{' and '.join(config.pooling)}. Leave it out; it is for models that say nothing of pooling."
            )
        is_kind = functools.partial(_is_text_encoder, of_sentences=config.pooling is not None)
        check_folder(config.transformer, transformers.AutoModel, is_kind, _EXPECTED)
        with quiet_transformers():
            tokenizer = _load_tokenizer(config.transformer)
            model = _load_encoder(config.transformer)
        _check_vocabulary(config.transformer, model, tokenizer)
        pooling = None if config.pooling else options.pooling
        content = f"{model_digest(folder)} {pooling} {options.normalize}"
        name = hashlib.sha256(content.encode()).hexdigest()[:16]
        return cls(model, tokenizer, config, options, chosen, name)

    def cost(self, item: str) -> int:
        """Returns the length in characters: texts are padded to the longest of a micro-batch."""
        return len(item)

    def prepare(self, inputs: Sequence[str]) -> _Prepared:
        """Tokenises texts."""
        texts = [self._prompt + (text.lower() if self._lowercase else text) for text in inputs]
        with self._tokenizer_lock:
            tokens = self._tokenizer(
                texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
            )
        return _Prepared(dict(tokens))

    def predict(self, prepared: _Prepared) -> list[TextVector]:
        """Runs the encoder and pools its token vectors."""
        tokens = {name: tensor.to(self.device) for name, tensor in prepared.tokens.items()}
        with torch.inference_mode():
            with half_precision(self.device):
                hidden = self._model(**tokens)[0]  # (B, T, D)
            vectors = pool(self.pooling, hidden.float(), tokens["attention_mask"])  # (B, dim)
            vectors = self._steps(vectors)
            if self._normalize:
                vectors = torch.nn.functional.normalize(vectors, dim=-1)
            values = vectors.cpu().numpy()
        if not torch.isfinite(vectors).all():
            raise ValueError("the model's vector is not finite")
        return [TextVector(row) for row in values]


def _is_text_encoder(config: Any, of_sentences: bool) -> bool:
    is_known = of_sentences or config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return is_known and not getattr(config, "is_encoder_decoder", False)


def _load_tokenizer(folder: Path) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **LOCAL_ONLY)
    except Exception as error:
        raise ModelError(
            f"The tokenizer in {folder} cannot be loaded: {one_line(error)}. Expected {_EXPECTED}."
        ) from error
    if not has_vocabulary(folder, tokenizer):
        files = " or ".join(vocabulary_files(tokenizer))
        raise ModelError(f"{folder} holds no tokenizer ({files}). Expected {_EXPECTED}.")
    tokenizer.padding_side = "right"
    return tokenizer


def _load_encoder(folder: Path) -> Any:
    model, missing, foreign = load_weights(folder, transformers.AutoModel, _EXPECTED)
    # Neither the pooler, which a model without a head lacks, nor the head, which the encoder lacks, is used here
    parts = {name.partition(".")[0] for name in model.state_dict()}
    check_tensors(
        folder,
        [name for name in missing if not name.startswith("pooler.")],
        [name for name in foreign if name.partition(".")[0] in parts],
    )
    return model


def _check_vocabulary(folder: Path, model: Any, tokenizer: Any) -> None:
    num_rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > num_rows:
        raise ModelError(
            f"The vocabulary in {folder} does not fit: the tokenizer has {len(tokenizer)} tokens, the model "
            f"vectors for {num_rows}. Both must be of one training: fetch them again."
        )


def _max_tokens(model: Any, tokenizer: Any, configured: int | None) -> int:
    """Returns the length of the longest input: the configured one, but no more than the model has positions for."""
    limits = [configured or tokenizer.model_max_length]
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and positions > 0:
        table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
        # RoBERTa's positions begin after that of the padding
        padding = getattr(table, "padding_idx", None)
        limits.append(positions if padding is None else positions - padding - 1)
    return int(min(limits))
