"""Captions by a convolutional encoder and a recurrent decoder: the kinds `cnn-lstm` and `cnn-rnn`.

A model is a folder: `config.json`, `model.safetensors` (encoder and decoder) and `vocabulary.txt`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diptych.models.base import CaptionModel, CaptionOptions, Captions
from diptych.models.captioning.beam_search import Hypothesis, search
from diptych.models.captioning.decoder import Decoder, DecoderConfig
from diptych.models.captioning.encoder import Encoder, EncoderConfig, restore_encoder
from diptych.models.captioning.vocabulary import Vocabulary
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
from diptych.models.pixels import decode_pixels

CONFIG, WEIGHTS, WORDS = "config.json", "model.safetensors", "vocabulary.txt"
# 0.7 rather than 1: on Flickr8k captions have 10.0 words rather than 11.2, closer to people's, and better scores
_LENGTH_PENALTY = 0.7
_KINDS = {"lstm": "cnn-lstm", "gru": "cnn-rnn", "rnn": "cnn-rnn"}


class CaptionNetwork(nn.Module):
    """An encoder, a decoder and its vocabulary."""

    def __init__(self, encoder: Encoder, decoder: Decoder, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.encoder, self.decoder, self.vocabulary = encoder, decoder, vocabulary

    @property
    def kind(self) -> str:
        """The model's kind, `cnn-lstm` or `cnn-rnn`."""
        return _KINDS[self.decoder.config.cell]

    def save(self, folder: Path) -> None:
        """Writes the model, the configuration last: a folder that has one is complete.

        Raises:
            ModelError: The folder cannot be written.
        """
        config = {
            "kind": self.kind,
            "encoder": dataclasses.asdict(self.encoder.config),
            "decoder": dataclasses.asdict(self.decoder.config),
        }
        write_tensors(folder / WEIGHTS, self.state_dict())
        write_file(folder / WORDS, self.vocabulary.to_text().encode())
        write_file(folder / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())

    @classmethod
    def load(cls, folder: Path, kinds: Sequence[str]) -> "CaptionNetwork":
        """Reads a model that `save` wrote, on the CPU, in `eval` mode.

        Raises:
            ModelError: It is not there, of another kind, or its files do not belong together.
        """
        config = read_config(folder, kinds)
        try:
            shape = DecoderConfig(**config["decoder"])
            encoder = restore_encoder(EncoderConfig(**config["encoder"]))
            if (encoder.num_regions, encoder.dim) != (shape.num_regions, shape.feature_dim):
                raise ValueError(
                    f"the encoder gives {encoder.num_regions} regions of {encoder.dim} channels, the decoder takes "
                    f"{shape.num_regions} of {shape.feature_dim}"
                )
            decoder = Decoder(shape)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"{folder / CONFIG} does not describe a captioner of this version: {one_line(error, with_type=True)}. "
                "Expected what `diptych train captioner` writes: train it again."
            ) from error
        vocabulary = Vocabulary.load(folder / WORDS)
        if len(vocabulary) != shape.vocab_size:
            raise ModelError(
                f"{folder / WORDS} has {len(vocabulary)} words, the special ones counted, but the model was trained "
                f"with {shape.vocab_size}. Expected the file that was saved with it."
            )
        network = cls(encoder, decoder, vocabulary)
        load_state(network, read_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
        return network.eval().requires_grad_(False)

    def search(self, regions: Tensor, options: CaptionOptions) -> list[list[Hypothesis]]:
        """Returns the captions of N images from their regions (N, L, D), the best first."""
        return search(
            self.decoder,
            self.decoder.encode_image(regions),
            beam_width=options.beam_width,
            num_captions=options.num_captions,
            max_words=options.max_words,
            length_penalty=_LENGTH_PENALTY if options.length_penalty is None else options.length_penalty,
            no_repeat_ngram=options.no_repeat_ngram,
        )


class Captioner(CaptionModel):
    """A trained network, on its device, as the pipeline runs it."""

    batch_size = 32

    def __init__(
        self, network: CaptionNetwork, options: CaptionOptions, device: torch.device, digest: str
    ) -> None:
        self._network, self._options, self._device = network.to(device), options, device
        self.digest = digest
        self.feature_dim = network.encoder.dim if options.features else None
        broken = [name for name, value in network.state_dict().items() if not torch.isfinite(value).all()]
        if broken or not all(network.encoder.config.std):
            fault = "its pixels would be divided by 0"
            if broken:
                fault = f"{len(broken)} tensors hold numbers that are not finite ({', '.join(broken[:3])})"
            raise ModelError(f"the captioner cannot be used: {fault}. Train or fetch it again.")

    @classmethod
    def load(cls, location: str, options: CaptionOptions, device: str, kind: str) -> "Captioner":
        """Loads a model that `diptych train captioner` wrote.

        Args:
            location: The model's folder, local or an fsspec URL.
            options: The user's options.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            kind: The kind that the model must be, `cnn-lstm` or `cnn-rnn`.

        Raises:
            ModelError: It cannot be loaded, or is of another kind.
        """
        if options.generation:
            names = ", ".join(name for name, _ in options.generation)
            raise ModelOptionError(
                f"`generation` {names}: these flags go with kind hf; {kind} has no others than its own."
            )
        chosen = choose_device(device)
        folder = to_local_path(location)
        network = CaptionNetwork.load(folder, (kind,))
        content = model_digest(folder, (CONFIG, WEIGHTS, WORDS))
        whole = hashlib.sha256(
            f"{content} {json.dumps(dataclasses.asdict(options), sort_keys=True)}".encode()
        )
        return cls(network, options, chosen, whole.hexdigest()[:16])

    def prepare(self, inputs: Sequence[bytes]) -> Tensor:
        """Decodes images to (N, 3, S, S) uint8."""
        size_px = self._network.encoder.config.size_px
        pixels = torch.from_numpy(np.stack([decode_pixels(data, size_px) for data in inputs]))
        pixels = pixels.permute(0, 3, 1, 2)  # (N, 3, S, S), channels last in memory
        return pixels.pin_memory() if self._device.type == "cuda" else pixels

    def predict(self, prepared: Tensor) -> list[Captions]:
        """Captions images that `prepare` decoded."""
        with torch.inference_mode(), half_precision(self._device):
            regions = self._network.encoder(prepared.to(self._device, non_blocking=True))
            captions = self._network.search(regions, self._options)
            features: Any = [None] * len(captions)
            if self._options.features:
                features = regions.float().mean(dim=1).cpu().numpy()
        if not all(captions):
            raise ValueError("the model's probabilities are not finite")
        decode = self._network.vocabulary.decode
        return [
            Captions(
                tuple(decode(hypothesis.words) for hypothesis in hypotheses),
                tuple(hypothesis.log_probability for hypothesis in hypotheses),
                vector,
            )
            for hypotheses, vector in zip(captions, features, strict=True)
        ]
