"""Training of a VAE or a GAN, from the data to the model's folder.

The images that a training draws of a few prompts are written to a sheet after each epoch.
"""

from pathlib import Path

import torch

from diptych.models.base import TextModel, TextOptions
from diptych.models.device import choose_device
from diptych.models.errors import ModelError
from diptych.models.files.cache import to_local_path
from diptych.models.files.weights import write_tensors
from diptych.models.generation.generator import Generator, GeneratorConfig
from diptych.models.generation.image_generator import read_generator, save_generator
from diptych.models.names import ModelName
from diptych.models.text.text_model import TextModelRef, load_text_model
from diptych.models.training.cache import SplitRows, open_splits
from diptych.models.training.data import CaptionData, History, OnProgress
from diptych.models.training.image_batches import ImageData, open_image_data
from diptych.models.training.image_objectives import GanObjective, ImageSplits, VaeObjective
from diptych.models.training.options import GanTraining, VaeTraining
from diptych.models.training.trainer import Trainer

ENCODER, SHEET = "encoder.safetensors", "samples.png"
# Text vectors up to this length are not scaled down.
_USUAL_DIM = 64


def train_image_model(
    data: CaptionData,
    output: Path,
    options: VaeTraining | GanTraining,
    device: str,
    on_progress: OnProgress,
    cache: Path | None = None,
) -> History:
    """Trains a VAE or a GAN, or resumes one, and writes its generator to a folder, with a sheet of samples.

    Args:
        data: The rows to train on and to validate by.
        output: The local folder of the model; the checkpoint stays in it, the caller deletes it.
        options: The options of the training.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        on_progress: Receives the progress.
        cache: The folder of cached images; None is a folder below `output`.

    Returns:
        Metrics by epoch. The saved weights of a VAE are those with the best bound, those of a GAN the last.

    Raises:
        ModelError: The data or the options cannot be trained with, the training diverged, or a file cannot be written.
    """
    torch_device = choose_device(device)
    text, source = _load_text(options, device)
    torch.manual_seed(options.seed)
    generator = make_generator(options, source, text.dim)

    def open_split(folder: Path, rows: SplitRows) -> ImageData:
        return open_image_data(folder, data.fingerprint, generator.config.size_px, text, rows)

    train, validation = open_splits(data, cache or output / "_cache", open_split, on_progress)
    splits = ImageSplits(train, validation, output / SHEET)
    torch.manual_seed(options.seed)
    objective: VaeObjective | GanObjective
    if isinstance(options, VaeTraining):
        objective = VaeObjective(generator.config, splits, options, torch_device)
    else:
        objective = GanObjective(generator, splits, options, torch_device)
    history = Trainer(objective, options, torch_device, on_progress).run(output)
    save_generator(output, options.kind, objective.generator, source)
    if isinstance(objective, VaeObjective):
        write_tensors(output / ENCODER, objective.encoder.state_dict())
    return history


def check_models(options: VaeTraining | GanTraining) -> None:
    """Loads the models that a training starts from, before any data are prepared for it.

    Raises:
        ModelError: The text model or the generator cannot be loaded, or they do not go together.
    """
    text, source = _load_text(options, "cpu")
    make_generator(options, source, text.dim)


def _load_text(options: VaeTraining | GanTraining, device: str) -> tuple[TextModel, TextModelRef]:
    kind, location = ModelName.parse(options.text_model)
    text = load_text_model(kind, location, TextOptions(), device)
    return text, TextModelRef.of(options.text_model, TextOptions(), text.digest)


def make_generator(options: VaeTraining | GanTraining, source: TextModelRef, text_dim: int) -> Generator:
    """Returns the generator that a training begins with.

    Raises:
        ModelError: The generator of another model is to be trained further, but cannot be loaded, or was trained with
            another text model.
    """
    if isinstance(options, GanTraining) and options.generator:
        kind, location = ModelName.parse(options.generator)
        generator, own = read_generator(to_local_path(location), (kind,))
        if own.digest != source.digest:
            raise ModelError(
                f"`generator` {options.generator} was trained with the text model {own.model} (digest {own.digest}), "
                f"and `text_model` is {source.model} (digest {source.digest}). Give the one that it knows."
            )
        return generator.train().requires_grad_(True)
    return Generator(
        GeneratorConfig(
            options.size_px,
            text_dim,
            options.latent_dim,
            options.condition_dim,
            options.channels,
            options.max_channels,
            text_scale=min(1.0, (_USUAL_DIM / text_dim) ** 0.5),
            text_prior=isinstance(options, VaeTraining),
        )
    )
