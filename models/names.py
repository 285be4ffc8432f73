"""Names that users give to models and devices: `KIND:LOCATION`, `cuda:1`."""

import re
from collections.abc import Collection
from typing import NamedTuple

TEXT_KINDS = ("word2vec", "bert")
CAPTION_KINDS = ("cnn-lstm", "cnn-rnn", "hf")
IMAGE_KINDS = ("vae", "gan", "diffusers")
LIBRARIES = {
    "word2vec": (),
    "bert": ("torch", "transformers"),
    "cnn-lstm": ("torch", "torchvision", "timm"),
    "cnn-rnn": ("torch", "torchvision", "timm"),
    "hf": ("torch", "transformers"),
    "vae": ("torch",),
    "gan": ("torch",),
    "diffusers": ("torch", "diffusers", "transformers"),
}
"""The libraries, by kind, whose versions decide what a model makes."""

_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")


class ModelName(NamedTuple):
    """A model's kind and location, as in `cnn-lstm:gs://bucket/captioner`.

    Attributes:
        kind: The part before the first colon.
        location: The part after it, empty without a colon: a path, an fsspec URL, or a name on the Hugging Face hub.
    """

    kind: str
    location: str

    @classmethod
    def parse(cls, text: str) -> "ModelName":
        """Splits `KIND:LOCATION`; `is_one_of` tells whether the result is valid."""
        kind, _, location = text.partition(":")
        return cls(kind, location)

    def is_one_of(self, kinds: Collection[str]) -> bool:
        """Tells whether this names a model of one of some kinds."""
        return self.kind in kinds and bool(self.location.strip())

    def __str__(self) -> str:
        return f"{self.kind}:{self.location}" if self.location else self.kind


def is_device(name: str) -> bool:
    """Tells whether a name is that of a device: `auto`, `cpu`, `cuda` or `cuda:N`."""
    return _DEVICE.fullmatch(name) is not None
