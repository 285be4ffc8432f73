"""Images from text by a generator that `diptych train vae|gan` wrote: the kinds `vae` and `gan`.

A model is a folder: `config.json`, with the text model that it was trained with, and `model.safetensors`.

N images, S side in pixels, T text vector, Z noise.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import simplejpeg
import torch
from torch import Tensor

from diptych.models.base import GeneratedImage, ImageModel, ImageOptions, Prompt, TextModel
from diptych.models.device import choose_device, half_precision
from diptych.models.errors import ModelError, ModelOptionError, one_line
from diptych.models.files.cache import to_local_path
from diptych.models.files.weights import (
    load_state,
    model_digest,
    read_config,
    read_tensors,
    write_file,
    write_tensors,
)
from diptych.models.generation.generator import Generator, GeneratorConfig, to_pixels
from diptych.models.pixels import Pixels
from diptych.models.text.text_model import LoadText, TextModelRef, load_text_model

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_BATCH_SIZE = {"cpu": 32, "cuda": 256}
_FEWEST_ROWS = 8


def save_generator(folder: Path, kind: str, generator: Generator, text: TextModelRef) -> None:
    """Writes a model, the configuration last: a folder that has one is complete.

    Raises:
        ModelError: The folder cannot be written.
    """
    config = {
        "kind": kind,
        "generator": dataclasses.asdict(generator.config),
        "text": dataclasses.asdict(text),
    }
    write_tensors(folder / WEIGHTS, generator.state_dict())
    write_file(folder / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def read_generator(folder: Path, kinds: Sequence[str]) -> tuple[Generator, TextModelRef]:
    """Reads a model that `save_generator` wrote, on the CPU, in `eval` mode.

    Raises:
        ModelError: It is not there, of another kind, or its files do not belong together.
    """
    config = read_config(folder, kinds)
    try:
        generator = Generator(GeneratorConfig(**config["generator"]))
        text = TextModelRef.from_json(config["text"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{folder / CONFIG} does not describe a generator of this version: {one_line(error, with_type=True)}. "
            f"Expected what `diptych train {config['kind']}` writes: train it again."
        ) from error
    load_state(generator, read_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
    broken = [name for name, value in generator.state_dict().items() if not torch.isfinite(value).all()]
    if broken:
        raise ModelError(
            f"{folder / WEIGHTS}: {len(broken)} tensors hold numbers that are not finite ({', '.join(broken[:3])}). "
            "Train or fetch it again."
        )
    return generator.eval().requires_grad_(False), text


class _Prepared(NamedTuple):
    """Prompts as the text model prepared them, and the noise of each, (N, Z)."""

    texts: Any
    noise: Tensor


class _Drawn(NamedTuple):
    """An image before it is encoded, and whether the text model knows any word of its prompt."""

    pixels: Pixels
    known: bool


class ImageGenerator(ImageModel):
    """A trained generator and its text model, on their device, as the pipeline runs them."""

    def __init__(
        self,
        generator: Generator,
        text: TextModel,
        options: ImageOptions,
        device: torch.device,
        digest: str,
        text_model: str,
    ) -> None:
        size_px = generator.config.size_px
        if options.size_px not in (None, size_px):
            raise ModelOptionError(
                f"`size` is {options.size_px}, and this model makes images of {size_px} px. Leave it out, or "
                "train a model of that size."
            )
        if options.settings:
            names = ", ".join(name for name, _ in options.settings)
            raise ModelOptionError(f"`setting` {names}: these settings go with kind diffusers.")
        if text.dim != generator.config.text_dim:
            raise ModelError(
                f"The text model gives vectors of {text.dim}, and the generator takes {generator.config.text_dim}. "
                "Train it again."
            )
        self._generator, self._text, self._options, self._device = generator, text, options, device
        self._generator.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.size_px = size_px, size_px
        self.text_model = text_model
        self.digest = digest
        self.batch_size = _BATCH_SIZE[device.type]

    @classmethod
    def load(
        cls,
        location: str,
        options: ImageOptions,
        device: str,
        kind: str,
        load_text: LoadText = load_text_model,
    ) -> "ImageGenerator":
        """Loads a model that `diptych train vae|gan` wrote, and its text model.

        Args:
            location: The model's folder, local or an fsspec URL.
            options: The user's options.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            kind: The kind that the model must be, `vae` or `gan`.
            load_text: Loads a text model by its kind and location.

        Raises:
            ModelError: It or its text model cannot be loaded, or is of another kind.
            ModelOptionError: The model does not support an option.
        """
        chosen = choose_device(device)
        folder = to_local_path(location)
        generator, source = read_generator(folder, (kind,))
        text = source.load(options.text_model, load_text)
        values = dataclasses.asdict(dataclasses.replace(options, text_model=None))
        content = (
            f"{model_digest(folder, (CONFIG, WEIGHTS))} {text.digest} {json.dumps(values, sort_keys=True)}"
        )
        whole = hashlib.sha256(content.encode()).hexdigest()[:16]
        return cls(generator, text, options, chosen, whole, options.text_model or source.model)

    def prepare(self, inputs: Sequence[Prompt]) -> _Prepared:
        """Tokenises prompts, and draws noise for each."""
        latent_dim = self._generator.config.latent_dim
        noise = torch.from_numpy(np.stack([draw_noise(prompt.seed, latent_dim) for prompt in inputs]))
        if self._device.type == "cuda":
            noise = noise.pin_memory()
        return _Prepared(self._text.prepare([prompt.text for prompt in inputs]), noise)

    def predict(self, prepared: _Prepared) -> list[_Drawn]:
        """Draws the images of prepared prompts."""
        vectors = self._text.predict(prepared.texts)
        texts = _filled(torch.from_numpy(np.stack([vector.values for vector in vectors])))
        noise = _filled(prepared.noise).to(self._device, non_blocking=True)
        with torch.inference_mode(), half_precision(self._device):
            images = self._generator(texts.to(self._device), noise)[: len(vectors)]
            pixels = to_pixels(images).contiguous().cpu().numpy()  # (N, S, S, 3)
        if not torch.isfinite(images).all():
            raise ValueError("the image holds numbers that are not finite")
        return [_Drawn(image, vector.known) for image, vector in zip(pixels, vectors, strict=True)]

    def finish(self, predicted: _Drawn) -> GeneratedImage:
        """Encodes an image."""
        data = encode_pixels(predicted.pixels, self._options)
        return GeneratedImage(data, None if predicted.known else "no_known_word")


def _filled(rows: Tensor) -> Tensor:
    """Returns at least 8 rows (N, …), the first repeated: matrix products of fewer rows sum in another order."""
    missing = max(0, _FEWEST_ROWS - len(rows))
    return torch.cat([rows, rows[:1].expand(missing, *rows.shape[1:])]) if missing else rows


def draw_noise(seed: int, num_values: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Returns standard normal noise that depends on 64 bits alone, on any machine and in any batch.

    The bits are the key of a counter-based generator (Philox, Salmon et al. 2011).
    """
    noise = np.random.Generator(np.random.Philox(key=seed)).standard_normal(num_values, np.float32)
    return np.asarray(noise, np.float32)


def encode_pixels(pixels: Pixels, options: ImageOptions) -> bytes:
    """Encodes (H, W, 3) RGB as PNG or JPEG."""
    if options.image_format == "jpeg":
        return bytes(simplejpeg.encode_jpeg(pixels, options.quality, "RGB", "444"))
    # The fastest settings that still compress: drawn images have few equal bytes
    settings = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    done, encoded = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), settings)
    if not done:
        raise ValueError("the image cannot be encoded")
    return bytes(encoded.data)
