"""What the training of a captioner is given, and what it is asked for."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

SCORES = ("BLEU-1", "BLEU-4", "CIDEr")


class Batch(NamedTuple):
    """Some rows of a data set.

    Attributes:
        keys: Identities of the images.
        images: Encoded.
        captions: Of each image, any number.
    """

    keys: list[str]
    images: list[bytes]
    captions: list[list[str]]


@dataclasses.dataclass(frozen=True)
class CaptionData:
    """Images with captions, to train on and to choose by.

    Attributes:
        train: Yields the rows to train on, in an order that is the same each time.
        validation: The same, of the rows to choose by.
        num_train: Rows that `train` yields.
        num_validation: Rows that `validation` yields.
        fingerprint: Stands for all of it.
    """

    train: Callable[[], Iterator[Batch]]
    validation: Callable[[], Iterator[Batch]]
    num_train: int
    num_validation: int
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class CaptionerTraining:
    """Options of `diptych train captioner`.

    Attributes:
        encoder: Name of torchvision, or `timm:NAME`.
        encoder_weights: `imagenet` (the library's own), `none` (random), or a safetensors file of the library's names.
        encoder_size_px: Side of the pictures that the encoder reads.
        encoder_stride_px: Side of a region of the encoder's grid; 0 is its last grid, 32 in most.
        fine_tune: Train the encoder too. If not, its features are made once, and cached.
        decoder: `lstm`, `gru` or `rnn`.
        attention: Attend to regions; else the pooled picture is the first input.
        embedding_dim: Of words and projected regions.
        hidden_dim: Of the recurrent state.
        attention_dim: Of the attention's keys.
        dropout: Share of units.
        label_smoothing: Share of probability spread over all words.
        min_word_count: Rarer words are unknown.
        max_words: Captions are cut after this many words.
        epochs: At most.
        cider_epochs: After them, that many of self-critical training, which rewards CIDEr (see
            `diptych.models.training.self_critical`).
        cider_learning_rate: In these, constant; a frozen encoder stays frozen.
        cider_samples: Captions drawn of each picture in these.
        batch_size: Images a step.
        captions_per_image: Captions of each that a step learns from, drawn anew each time; 0 takes all.
        learning_rate: Highest; warmed up, then lowered to zero by a cosine.
        encoder_learning_rate: The same, of the encoder where it is trained.
        weight_decay: AdamW's.
        ema: Decay of the average of the weights that is validated and saved.
        patience: Epochs without a better CIDEr after which training stops, or goes on to `cider_epochs`.
        beam_width: Of the captions that are scored.
        max_scored: Images whose captions are scored at each validation; the loss is of all.
        precision: `float32` or `bfloat16` (autocast); `auto` is bfloat16 on a GPU that has it.
        threads: CPU threads that a step computes with, 0 for all; a small model is faster with 1.
        seed: Of everything drawn.
        flips: Half of the pictures are mirrored; not where captions say left and right.
    """

    encoder: str = "resnet18"
    encoder_weights: str = "imagenet"
    encoder_size_px: int = 224
    encoder_stride_px: int = 0
    fine_tune: bool = False
    decoder: str = "lstm"
    attention: bool = True
    embedding_dim: int = 512
    hidden_dim: int = 512
    attention_dim: int = 256
    dropout: float = 0.5
    label_smoothing: float = 0.1
    min_word_count: int = 5
    max_words: int = 20
    epochs: int = 15
    cider_epochs: int = 0
    cider_learning_rate: float = 1e-5
    cider_samples: int = 5
    batch_size: int = 32
    captions_per_image: int = 0
    learning_rate: float = 1e-3
    encoder_learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    ema: float = 0.999
    patience: int = 4
    beam_width: int = 3
    max_scored: int = 1000
    precision: str = "auto"
    threads: int = 0
    seed: int = 0
    flips: bool = False


class Progress(NamedTuple):
    """How far a training is.

    Attributes:
        phase: `reading` (pictures to the cache), `training`, `validating`.
        epoch: From 0.
        done: Rows done in this phase and epoch.
        total: Rows of it.
        loss: Mean training loss of the epoch so far; None before the first step.
        entry: The epoch's entry of the history, once it is validated.
    """

    phase: str
    epoch: int
    done: int
    total: int
    loss: float | None = None
    entry: Mapping[str, float] = {}


History = list[dict[str, float]]
"""By epoch: `epoch` (from 1), `train_loss`, `validation_loss` (no smoothing), `seconds`, and each of `SCORES`.

Self-critical epochs have no `train_loss` but a `reward`, the mean CIDEr of what was drawn."""
