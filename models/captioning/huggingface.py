"""Captions by a model of the Hugging Face hub: BLIP, GIT, ViT-GPT2, and others that need no prompt.

Shapes: N images, B beams, C captions an image, T generated tokens, V words of the vocabulary.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from diptych.models.base import CaptionModel, CaptionOptions, Captions, tuples_to_lists
from diptych.models.captioning.huggingface_files import EXPECTED, load_parts
from diptych.models.device import choose_device, half_precision
from diptych.models.errors import ModelError, ModelOptionError, one_line
from diptych.models.files.cache import to_local_path
from diptych.models.files.pretrained import quiet_transformers
from diptych.models.files.weights import model_digest

_BATCH_SIZE = {"cpu": 8, "cuda": 64}
# The names of image encoders in transformers
_ENCODERS = ("vision_model", "vision_tower", "image_encoder", "visual", "vision_encoder", "image_tower")
# Flags of `generate`, and the options that set them
_NAMED = {
    "num_beams": "beam_width",
    "num_return_sequences": "num_captions",
    "max_new_tokens": "max_words",
    "max_length": "max_words",
    "length_penalty": "length_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram",
}
# Flags of random sampling, and `max_time`, by which a caption depends on the machine's load
_SAMPLING = frozenset(
    [
        "temperature",
        "top_k",
        "top_p",
        "top_h",
        "min_p",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "max_time",
    ]
)
_OUTPUTS = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}


class _Prepared(NamedTuple):
    """The processor's output for N images."""

    inputs: dict[str, Tensor]
    num_images: int


class HuggingFaceCaptioner(CaptionModel):
    """A model that generates text from an image, with its processor and its tokenizer.

    Attributes:
        device: The device that it runs on.
    """

    def __init__(
        self,
        model: Any,
        processor: Callable[..., Any],
        tokenizer: Any,
        options: CaptionOptions,
        device: torch.device,
        digest: str,
    ) -> None:
        """Makes a captioner from its loaded parts, and tries it on two images.

        Args:
            model: A model of transformers that generates tokens.
            processor: The processor, which makes the model's inputs from images.
            tokenizer: The tokenizer, which makes text from tokens.
            options: The user's options.
            device: The device to run on.
            digest: The digest of files and options.

        Raises:
            ModelError: The model cannot caption images with these options.
        """
        self.device = device
        self.digest = digest
        self.batch_size = _BATCH_SIZE[device.type]
        self.feature_dim = None
        self._model = model.to(device).eval()
        self._processor, self._tokenizer = processor, tokenizer
        _check_length(model, options.max_words)
        self._flags = _flags(options)
        self._encoder = _find_encoder(model) if options.features else None
        self._end_tokens = _end_tokens(model, self._flags)
        self._try()

    @classmethod
    def load(cls, location: str, options: CaptionOptions, device: str = "auto") -> "HuggingFaceCaptioner":
        """Loads a model that `save_pretrained` wrote, from anywhere, or one of the Hugging Face hub.

        Args:
            location: A path, an fsspec URL, or a name on the hub.
            options: The user's options.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.

        Raises:
            ModelError: There is no such model or device; it is damaged, of another kind, or kept as a pickle; or it
                does not support the options.
        """
        _check_options(options)
        chosen = choose_device(device)
        folder = to_local_path(location, hub=True)
        with quiet_transformers(python_warnings=True):
            model, processor, tokenizer = load_parts(folder)
            content = f"{model_digest(folder)} {json.dumps(dataclasses.asdict(options), sort_keys=True)}"
            name = hashlib.sha256(content.encode()).hexdigest()[:16]
            return cls(model, processor, tokenizer, options, chosen, name)

    def prepare(self, inputs: Sequence[bytes]) -> _Prepared:
        """Decodes images and makes the model's inputs from them."""
        features = self._processor(images=[_decode(data) for data in inputs], return_tensors="pt")
        tensors = {name: value for name, value in features.items() if isinstance(value, Tensor)}
        if self.device.type == "cuda":
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return _Prepared(tensors, len(inputs))

    def predict(self, prepared: _Prepared) -> list[Captions]:
        """Generates captions, by the greedy or beam search of transformers."""
        with quiet_transformers():
            return self._predict(prepared, self._flags)

    def _predict(self, prepared: _Prepared, flags: dict[str, Any]) -> list[Captions]:
        inputs = {name: value.to(self.device, non_blocking=True) for name, value in prepared.inputs.items()}
        encoder_outputs: list[Any] = []
        hook = self._encoder and self._encoder.register_forward_hook(
            lambda _, __, output: encoder_outputs.append(output)
        )
        try:
            with torch.inference_mode(), half_precision(self.device):
                output = self._model.generate(**inputs, **flags)
        finally:
            if hook:
                hook.remove()
        tokens, is_caption, scores = _read_output(output, self._end_tokens)  # (N*C, T), (N*C, T), (N*C)
        generated = [row[mask] for row, mask in zip(tokens.cpu(), is_caption.cpu(), strict=True)]
        captions = [
            text.strip() for text in self._tokenizer.batch_decode(generated, skip_special_tokens=True)
        ]
        if not torch.isfinite(scores).all():
            raise ValueError("the model's probabilities are not finite")
        features = _pool(encoder_outputs[0], prepared.num_images) if self._encoder else None
        num_captions = flags["num_return_sequences"]
        return [
            Captions(
                tuple(captions[i * num_captions : (i + 1) * num_captions]),
                tuple(scores[i * num_captions : (i + 1) * num_captions].tolist()),
                None if features is None else features[i],
            )
            for i in range(prepared.num_images)
        ]

    def _try(self) -> None:
        """Captions two blank images, so that conflicting flags or a model that needs a prompt fail at once."""
        # Two shapes, as photos come in
        blank = [_encode(Image.new("RGB", size, "gray")) for size in ((64, 48), (48, 64))]
        try:
            prepared = self.prepare(blank)
            flags = {**self._flags, "max_new_tokens": min(2, self._flags["max_new_tokens"])}
            captions = self._predict(prepared, flags)
        except ModelError:
            raise
        except Exception as error:  # transformers raises what its many parts raise
            model = f"The model in {self._model.name_or_path} ({type(self._model).__name__})"
            raise ModelError(
                f"{model} cannot caption an image with these options: {one_line(error)}. Expected "
                f"{EXPECTED}, that needs no prompt, and flags of generation that it takes."
            ) from error
        if captions[0].features is not None:
            self.feature_dim = len(captions[0].features)


def _check_options(options: CaptionOptions) -> None:
    if not 1 <= options.num_captions <= options.beam_width:
        raise ModelOptionError(
            f"`num_captions` is {options.num_captions}. It must be between 1 and `beam_width` {options.beam_width}."
        )
    if options.max_words < 1:
        raise ModelOptionError(f"`max_words` is {options.max_words}. It must be at least 1.")
    known = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    for name, value in options.generation:
        if name in _NAMED:
            raise ModelOptionError(
                f"Flag {name!r} of `generation` is `{_NAMED[name]}` here. Give it as that."
            )
        if name in _SAMPLING or (name == "do_sample" and value):
            raise ModelOptionError(
                f"Flag {name!r} of generation is for captions that differ from run to run, and these do not. Leave it "
                "out; for several captions an image there are `beam_width` and `num_captions`."
            )
        if name not in known or name.startswith(("return_", "output_")):
            raise ModelOptionError(
                f"{name!r} is no flag of generation that can be set. Expected one of transformers' GenerationConfig, "
                "such as repetition_penalty, min_new_tokens or early_stopping."
            )


def _check_length(model: Any, max_words: int) -> None:
    config = model.config.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_words >= positions:
        raise ModelOptionError(
            f"`max_words` is {max_words}. It must be below {positions}, as many positions as the model has."
        )


def _flags(options: CaptionOptions) -> dict[str, Any]:
    flags: dict[str, Any] = {
        "num_beams": options.beam_width,
        "num_return_sequences": options.num_captions,
        "max_new_tokens": options.max_words,
    }
    if options.beam_width > 1 and options.length_penalty is not None:
        flags["length_penalty"] = options.length_penalty
    if options.no_repeat_ngram:
        flags["no_repeat_ngram_size"] = options.no_repeat_ngram
    return {**{name: tuples_to_lists(value) for name, value in options.generation}, **flags, **_OUTPUTS}


def _find_encoder(model: Any) -> nn.Module:
    if isinstance(model, transformers.VisionEncoderDecoderModel):
        return model.encoder
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _ENCODERS:
            return module
    raise ModelOptionError(
        f"`features`: no encoder of images is known in a {type(model).__name__}. Leave it out."
    )


def _end_tokens(model: Any, flags: dict[str, Any]) -> list[int]:
    """Returns the tokens that end a caption."""
    # BLIP passes this token to its decoder itself
    if model.config.model_type == "blip":
        return [model.config.text_config.sep_token_id]
    decoder = getattr(model, "language_model", model)
    configs = (getattr(part, "generation_config", None) for part in (decoder, model))
    candidates = [flags.get("eos_token_id"), *(getattr(config, "eos_token_id", None) for config in configs)]
    ends: int | list[int] = next((tokens for tokens in candidates if tokens is not None), [])
    return [ends] if isinstance(ends, int) else list(ends)


def _read_output(output: Any, end_tokens: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Reads the output of `generate`.

    Returns:
        (N*C, T) the generated tokens, without any prefix; (N*C, T) whether each belongs to its caption; (N*C) the
        captions' log-probabilities.
    """
    # (N*C, T): the index, of N*B, of the beam that a token extended, or -1
    beams = getattr(output, "beam_indices", None)
    if beams is None:
        tokens = output.sequences[:, -len(output.logits) :]
        ends = torch.isin(tokens, torch.tensor(end_tokens, device=tokens.device, dtype=tokens.dtype))
        is_caption = ends.cumsum(1) - ends.long() == 0  # up to and including the first end
        beams = torch.arange(len(tokens), device=tokens.device)[:, None].expand(tokens.shape)
    else:
        longest = int((beams >= 0).sum(1).max())
        beams, tokens = beams[:, :longest], output.sequences[:, -longest:]
        is_caption = beams >= 0
    scores = torch.zeros(len(tokens), device=tokens.device)
    for step in range(tokens.shape[1]):
        log_probs = output.logits[step].float().log_softmax(-1)  # (N*B, V)
        token_scores = log_probs[beams[:, step].clamp(min=0), tokens[:, step]]
        scores += torch.where(is_caption[:, step], token_scores, 0)
    return tokens, is_caption, scores


def _pool(output: Any, num_images: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Returns the mean of an encoder's output over its positions, (N, D)."""
    hidden = output[0] if not isinstance(output, Tensor) else output
    if hidden.ndim != 3 or len(hidden) % num_images:
        raise ModelOptionError(
            f"`features`: the encoder's output is of shape {tuple(hidden.shape)}. Expected a vector for each of "
            "some places of each image. Leave it out."
        )
    # A model may run its encoder once for each beam: the first of an image's rows will do
    rows_per_image = len(hidden) // num_images
    pooled: np.ndarray[Any, np.dtype[np.float32]] = hidden[::rows_per_image].float().mean(1).cpu().numpy()
    return pooled


def _decode(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
