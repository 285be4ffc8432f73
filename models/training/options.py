"""What the training of a VAE or a GAN is asked for."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ImageTraining:
    """Options of `diptych train vae` and `diptych train gan`.

    Attributes:
        text_model: `KIND:LOCATION` of the text model (`word2vec` or `bert`) whose vectors the images are drawn from.
        size_px: Side of the images; see `diptych.models.generation.generator.SIZES`.
        latent_dim: Length of the noise.
        condition_dim: Length of what the network makes of a text vector.
        channels: Of the grid of half the size; twice as many at half of it, and so on.
        max_channels: But never more than these.
        epochs: At most.
        batch_size: Images a step.
        learning_rate: Of the generator (of a VAE, of its encoder too).
        ema: Decay of the average of the weights that is kept.
        precision: `float32` or `bfloat16` (autocast); `auto` is bfloat16 on a GPU that has it.
        threads: CPU threads that a step computes with, 0 for all.
        seed: Of everything drawn.
        flips: Half of the images are mirrored; not where captions say left and right.
    """

    text_model: str = ""
    size_px: int = 64
    latent_dim: int = 128
    condition_dim: int = 128
    channels: int = 32
    max_channels: int = 256
    epochs: int = 100
    batch_size: int = 64
    learning_rate: float = 5e-4
    ema: float = 0.999
    precision: str = "auto"
    threads: int = 0
    seed: int = 0
    flips: bool = False


@dataclasses.dataclass(frozen=True)
class VaeTraining(ImageTraining):
    """Options of `diptych train vae`.

    Attributes:
        divergence_weight: Of the latent's divergence from the prior; more makes images plainer, and draws more alike.
        text_first: Share of `epochs` at the beginning in which the latent says nothing of the image: what the text can
            say is left to the text.
        patience: Epochs without a better bound after which training stops, counted from those of `text_first`.
    """

    kind = "vae"
    divergence_weight: float = 25.0
    text_first: float = 0.25
    patience: int = 10


@dataclasses.dataclass(frozen=True)
class GanTraining(ImageTraining):
    """Options of `diptych train gan`.

    Attributes:
        generator: `vae:LOCATION` or `gan:LOCATION` of a model whose generator is gone on with; empty begins with a new
            one. Its shape takes the place of the options for it.
        learning_rate: Of the generator.
        discriminator_learning_rate: Of the discriminator.
        r1_weight: Of the gradient penalty on real images; 0 leaves it out.
        r1_every: Steps from one penalty to the next.
    """

    kind = "gan"
    generator: str = ""
    learning_rate: float = 1e-4
    discriminator_learning_rate: float = 4e-4
    r1_weight: float = 1.0
    r1_every: int = 16
