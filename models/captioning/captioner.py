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
    digest,
    load_state,
    read_config,
    read_tensors,
    write_file,
    write_tensors,
)
from diptych.models.pixels import decode_pixels

CONFIG, WEIGHTS, WORDS = "config.json", "model.safetensors", "vocabulary.txt"
# 1 is for longer captions than people write: on Flickr8k 11.2 words against 10.0 at 0.7, with the better scores
_LENGTH_PENALTY = 0.7
_KINDS = {"lstm": "cnn-lstm", "gru": "cnn-rnn", "rnn": "cnn-rnn"}


class CaptionNetwork(nn.Module):
    """Encoder, decoder, and the words that the decoder's numbers stand for."""

    def __init__(self, encoder: Encoder, decoder: Decoder, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.encoder, self.decoder, self.vocabulary = encoder, decoder, vocabulary

    @property
    def kind(self) -> str:
        """The kind of model that this is."""
        return _KINDS[self.decoder.config.cell]

    def save(self, folder: Path) -> None:
        """Writes the model; the configuration last, so that a folder with one is whole.

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
        """Reads what `save` wrote, on the CPU, ready to run.

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
        """Returns the captions of (N, L, D) regions, the best first."""
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
            what = f"{len(broken)} tensors hold numbers that are not finite ({', '.join(broken[:3])})"
            raise ModelError(
                f"the captioner cannot be used: {what if broken else 'its pixels would be divided by 0'}. Train "
                "or fetch it again."
            )

    @classmethod
    def load(cls, location: str, options: CaptionOptions, device: str, kind: str) -> "Captioner":
        """Loads a model that `diptych train captioner` wrote.

        Args:
            location: Its folder, local or an fsspec URL.
            options: What is asked of it.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            kind: `cnn-lstm` or `cnn-rnn`, which it must be.

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
        content = digest(folder, (CONFIG, WEIGHTS, WORDS))
        whole = hashlib.sha256(
            f"{content} {json.dumps(dataclasses.asdict(options), sort_keys=True)}".encode()
        )
        return cls(network, options, chosen, whole.hexdigest()[:16])

    def prepare(self, inputs: Sequence[bytes]) -> Tensor:
        """Decodes images to (N, 3, S, S) uint8."""
        size_px = self._network.encoder.config.size_px
        pixels = torch.from_numpy(np.stack([decode_pixels(data, size_px) for data in inputs]))
        pixels = pixels.permute(0, 3, 1, 2)  # as it lies in memory: channels last
        return pixels.pin_memory() if self._device.type == "cuda" else pixels

    def predict(self, prepared: Tensor) -> list[Captions]:
        """Captions what `prepare` returned."""
        with torch.inference_mode(), half_precision(self._device):
            regions = self._network.encoder(prepared.to(self._device, non_blocking=True))
            found = self._network.search(regions, self._options)
            features: Any = [None] * len(found)
            if self._options.features:
                features = regions.float().mean(dim=1).cpu().numpy()
        if not all(found):
            raise ValueError("the model's probabilities are not finite")
        decode = self._network.vocabulary.decode
        return [
            Captions(
                tuple(decode(hypothesis.words) for hypothesis in hypotheses),
                tuple(hypothesis.log_probability for hypothesis in hypotheses),
                vector,
            )
            for hypotheses, vector in zip(found, features, strict=True)
        ]
