"""Models that are quick and know what they were given, in the place of real ones."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from diptych.models import spec as spec_module
from diptych.models.base import (
    CaptionModel,
    CaptionOptions,
    Captions,
    GeneratedImage,
    ImageModel,
    ImageOptions,
    Prompt,
    TextModel,
    TextVector,
)
from diptych.models.generation.image_generator import encode_pixels
from diptych.models.spec import ModelSpec

TROUBLE = "a trouble"


class FakeText(TextModel):
    """A caption's vector is made of its digest; `TROUBLE` in a caption breaks it."""

    batch_size, dim = 4, 3

    def __init__(self, spec: ModelSpec) -> None:
        self.digest = hashlib.sha256(repr(spec.options).encode()).hexdigest()[:16]

    def prepare(self, inputs: Sequence[str]) -> list[bytes]:
        return [hashlib.sha256(text.encode()).digest() for text in inputs if self.is_fine(text)]

    def is_fine(self, text: str) -> bool:
        if TROUBLE in text:
            raise ValueError(f"cannot read {text!r}")
        return True

    def predict(self, prepared: list[bytes]) -> list[TextVector]:
        return [TextVector(np.frombuffer(data[:3], np.uint8).astype(np.float32)) for data in prepared]

    def cost(self, item: str) -> int:
        return len(item)


class FakeCaptions(CaptionModel):
    """An image's caption is its digest; an image whose digest is in `trouble` breaks it."""

    batch_size = 4
    trouble: frozenset[str] = frozenset()

    def __init__(self, spec: ModelSpec) -> None:
        assert isinstance(spec.options, CaptionOptions)
        self.digest = hashlib.sha256(repr(spec.options).encode()).hexdigest()[:16]
        self.feature_dim = 2 if spec.options.features else None

    def prepare(self, inputs: Sequence[bytes]) -> list[str]:
        return [hashlib.sha256(data).hexdigest() for data in inputs]

    def predict(self, prepared: list[str]) -> list[Captions]:
        if self.trouble.intersection(prepared):
            raise ValueError("cannot look at it")
        features = np.ones(2, np.float32) if self.feature_dim else None
        return [Captions((text, text[:3]), (-0.5, -1.0), features) for text in prepared]


class FakeImages(ImageModel):
    """An image's one pixel is of its seed and text; `TROUBLE` in a prompt breaks it."""

    batch_size, size_px = 4, (1, 1)

    def __init__(self, spec: ModelSpec) -> None:
        self.digest = hashlib.sha256(repr(spec.options).encode()).hexdigest()[:16]

    def prepare(self, inputs: Sequence[Prompt]) -> list[bytes]:
        if any(TROUBLE in prompt.text for prompt in inputs):
            raise ValueError("cannot draw it")
        return [hashlib.sha256(repr(prompt).encode()).digest() for prompt in inputs]

    def predict(self, prepared: list[bytes]) -> list[tuple[bytes]]:
        return [(data[:3],) for data in prepared]

    def finish(self, predicted: tuple[bytes]) -> GeneratedImage:
        pixels = np.frombuffer(predicted[0], np.uint8).reshape(1, 1, 3)
        return GeneratedImage(encode_pixels(pixels, ImageOptions()))


def use_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `bert:`, `hf:` and `diffusers:` the fakes above; `word2vec:` is what it is."""
    load = spec_module._load

    def load_fake(spec: ModelSpec) -> Any:
        fakes = {"bert": FakeText, "hf": FakeCaptions, "diffusers": FakeImages}
        return fakes.get(spec.kind, load)(spec)

    monkeypatch.setattr(spec_module, "_load", load_fake)
    monkeypatch.setattr(spec_module, "_loaded", {})
