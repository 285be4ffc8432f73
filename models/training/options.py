"""The options of all trainings, over one base."""

import dataclasses
import math

from diptych.models.errors import ModelError

_MAX_VECTOR_SIZE = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """Options that every training has.

    Attributes:
        epochs: The most passes over the data.
        seed: The seed of everything that is drawn.
    """

    epochs: int
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkTraining(Training):
    """Options that every training with torch has.

    Attributes:
        batch_size: Images a step.
        learning_rate: The highest learning rate.
        ema: Decay of the moving average of the weights, which is validated and saved.
        precision: `float32` or `bfloat16` (autocast); `auto` is bfloat16 on a GPU that has it.
        threads: CPU threads that a step computes with, 0 for all; a small model is faster with 1.
        flips: Mirror half of the images; not for captions that say left and right.
    """

    batch_size: int
    learning_rate: float
    ema: float = 0.999
    precision: str = "auto"
    threads: int = 0
    flips: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionerTraining(NetworkTraining):
    """Options of `diptych train captioner`.

    Attributes:
        encoder: A name of torchvision, or `timm:NAME`.
        encoder_weights: `imagenet` (the library's own), `none` (random), or a safetensors file with its names.
        encoder_size_px: Side of the images that the encoder reads.
        encoder_stride_px: Side of a region of the encoder's grid; 0 is its last grid, 32 in most.
        fine_tune: Train the encoder too. If not, its features are computed once and cached.
        decoder: `lstm`, `gru` or `rnn`.
        attention: Attend to regions; without, the pooled image is the first input.
        embedding_dim: Length of the vectors of words and of projected regions.
        hidden_dim: Length of the recurrent state.
        attention_dim: Length of the attention's keys.
        dropout: Share of units that are dropped.
        label_smoothing: Share of the probability that is spread over all words.
        min_word_count: Rarer words are unknown.
        max_words: Captions are cut after this many words.
        epochs: The most epochs of training by cross entropy.
        cider_epochs: The epochs of self-critical training that follow, which rewards CIDEr (see
            `diptych.models.training.self_critical`).
        cider_learning_rate: The constant learning rate of these epochs; a frozen encoder stays frozen.
        cider_samples: Captions that are drawn of each image in these epochs.
        captions_per_image: Captions of each image that a step learns from, drawn anew each time; 0 takes all.
        learning_rate: The highest learning rate; it is warmed up, then falls to zero along a cosine.
        encoder_learning_rate: The highest learning rate of an encoder that is fine-tuned.
        weight_decay: The weight decay of AdamW.
        patience: Epochs without a better CIDEr after which training stops, or begins `cider_epochs`.
        beam_width: Width of the beam search for the captions that are scored.
        max_scored: Images whose captions are scored at each validation; the loss is over all of them.
    """

    epochs: int = 15
    batch_size: int = 32
    learning_rate: float = 1e-3
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
    cider_epochs: int = 0
    cider_learning_rate: float = 1e-5
    cider_samples: int = 5
    captions_per_image: int = 0
    encoder_learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    patience: int = 4
    beam_width: int = 3
    max_scored: int = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTraining(NetworkTraining):
    """Options of `diptych train vae` and `diptych train gan`.

    Attributes:
        text_model: `KIND:LOCATION` of the text model (`word2vec` or `bert`) whose vectors the images are drawn from.
        size_px: Side of the images; see `diptych.models.generation.generator.SIZES`.
        latent_dim: Length of the noise.
        condition_dim: Length of the vector that the network computes from a text vector.
        channels: Channels of the grid of half the size; each halving of the grid doubles them.
        max_channels: The most channels of any grid.
        learning_rate: The highest learning rate of the generator (of a VAE, of its encoder too).
    """

    epochs: int = 100
    batch_size: int = 64
    learning_rate: float = 5e-4
    text_model: str = ""
    size_px: int = 64
    latent_dim: int = 128
    condition_dim: int = 128
    channels: int = 32
    max_channels: int = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class VaeTraining(ImageTraining):
    """Options of `diptych train vae`.

    Attributes:
        divergence_weight: Weight of the latent's divergence from the prior; more makes images plainer, and draws more
            alike.
        text_first: Share of `epochs` at the beginning in which the latent says nothing about the image, so that the
            text learns to say all it can.
        patience: Epochs without a better bound after which training stops, counted from the end of `text_first`.
    """

    kind = "vae"
    divergence_weight: float = 25.0
    text_first: float = 0.25
    patience: int = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class GanTraining(ImageTraining):
    """Options of `diptych train gan`.

    Attributes:
        generator: `vae:LOCATION` or `gan:LOCATION` of a model whose generator is trained further; empty begins with a
            new one. Its shape takes the place of the options for it.
        learning_rate: The highest learning rate of the generator.
        discriminator_learning_rate: The highest learning rate of the discriminator.
        r1_weight: Weight of the gradient penalty on real images; 0 leaves it out.
        r1_every: Steps from one penalty to the next.
    """

    kind = "gan"
    generator: str = ""
    learning_rate: float = 1e-4
    discriminator_learning_rate: float = 4e-4
    r1_weight: float = 1.0
    r1_every: int = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Word2VecTraining(Training):
    """Options of `diptych train word2vec`.

    Attributes:
        vector_size: Length of the vectors.
        window: Words on each side that a word is learnt with.
        min_count: Words that occur less often are left out.
        skip_gram: Learn a word from each of its neighbours (skip-gram) rather than from their mean (CBOW).
        negative: Random words that each word learns to differ from.
        sample: Words that make up more than about this share of the text are thinned out; 0 keeps all.
        alpha: Learning rate at the start; it falls linearly to `min_alpha`.
        min_alpha: Learning rate at the end.
        patience: Epochs without a lower validation loss after which training stops; 0 never stops early.
    """

    epochs: int = 20
    vector_size: int = 100
    window: int = 5
    min_count: int = 2
    skip_gram: bool = True
    negative: int = 5
    sample: float = 1e-3
    alpha: float = 0.025
    min_alpha: float = 1e-4
    patience: int = 3

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ModelError: A value is outside its range.
        """
        for name in ("vector_size", "window", "min_count", "epochs", "negative"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name} is {getattr(self, name)}. Expected 1 or more.")
        if self.vector_size > _MAX_VECTOR_SIZE:
            raise ModelError(f"vector_size is {self.vector_size}. Expected {_MAX_VECTOR_SIZE:,} or less.")
        for name in ("sample", "alpha", "min_alpha"):
            if not math.isfinite(getattr(self, name)):
                raise ModelError(f"{name} is {getattr(self, name)}. Expected a number.")
        for name in ("sample", "patience", "seed", "min_alpha"):
            if getattr(self, name) < 0:
                raise ModelError(f"{name} is {getattr(self, name)}. Expected 0 or more.")
        if not self.min_alpha <= self.alpha:
            raise ModelError(f"alpha is {self.alpha}. Expected min_alpha, {self.min_alpha}, or more.")
