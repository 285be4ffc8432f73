"""What the training of a captioner is given: rows, from wherever they come, and options."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple


class Batch(NamedTuple):
    """Some rows, in the order of the data; how many is up to whoever gives them.

    Attributes:
        keys: Of the rows.
        images: Encoded (JPEG, PNG, …).
        captions: Of each image, at least one.
    """

    keys: list[str]
    images: list[bytes]
    captions: list[list[str]]


@dataclasses.dataclass(frozen=True)
class CaptionData:
    """Rows to train on, streamed: neither set is ever in memory as a whole.

    Attributes:
        train: Starts over with each call, and gives the same rows in the same order each time.
        validation: The same of the rows that are held out.
        num_train: Rows in `train`.
        num_validation: Rows in `validation`.
        fingerprint: Stands for both sets, their order and their split; a cache made of them is kept under it.
    """

    train: Callable[[], Iterator[Batch]]
    validation: Callable[[], Iterator[Batch]]
    num_train: int
    num_validation: int
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class CaptionerTraining:
    """Options of the training of a captioner.

    Attributes:
        encoder: A name of torchvision, or `timm:NAME`.
        encoder_weights: Path or URL of a safetensors file, `imagenet` for the library's own, or `none`.
        encoder_size_px: Side of the images that the encoder sees.
        fine_tune: Train the encoder as well.
        decoder: The recurrent cell.
        attention: Soft attention over the regions of the image, else their mean.
        embedding_dim: Of a word.
        hidden_dim: Of the recurrent state.
        attention_dim: Of the attention's hidden layer.
        dropout: Share of values dropped, 0 to 1.
        label_smoothing: Share of probability that other words than the right one get.
        min_word_count: Rarer words are not in the vocabulary.
        max_words: Longest caption: longer ones are cut in training, and in generation for the scores.
        epochs: At most so many.
        batch_size: Images a step, with all their captions.
        learning_rate: The highest.
        patience: Epochs without a better score until training stops.
        beam_width: Of the captions that are scored.
        flips: Show mirrored images as well.
        seed: Of weights, order, and dropout.
    """

    encoder: str = "resnet18"
    encoder_weights: str = "imagenet"
    encoder_size_px: int = 224
    fine_tune: bool = False
    decoder: Literal["lstm", "gru", "rnn"] = "lstm"
    attention: bool = True
    embedding_dim: int = 512
    hidden_dim: int = 512
    attention_dim: int = 256
    dropout: float = 0.5
    label_smoothing: float = 0.1
    min_word_count: int = 5
    max_words: int = 20
    epochs: int = 15
    batch_size: int = 32
    learning_rate: float = 4e-4
    patience: int = 4
    beam_width: int = 3
    flips: bool = False
    seed: int = 0
