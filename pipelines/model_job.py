"""What jobs with a model share: it is loaded at launch, and the input may be the output that they add to."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

from models.base import Model
from models.errors import FlagError, ModelError
from models.spec import ModelSpec, load_model
from pipelines.job import data_files, fingerprint, is_same_place, read_success, refuse_overlap
from pipelines.launch import Job, source_options
from pipelines.options import ModelJobOptions
from transforms.errors import InputError, OptionError
from transforms.infer import RunModel, Task
from transforms.sources import open_source, output_of
from transforms.sources.base import Source
from transforms.sources.parquet import ParquetSource
from transforms.sources.texts import TextSource

# Libraries that decide what a model of a kind gives
_LIBRARIES = {
    "word2vec": (),
    "bert": ("torch", "transformers"),
    "cnn-lstm": ("torch", "torchvision", "timm"),
    "cnn-rnn": ("torch", "torchvision", "timm"),
    "hf": ("torch", "transformers"),
    "vae": ("torch",),
    "gan": ("torch",),
    "diffusers": ("torch", "diffusers", "transformers"),
}


@dataclasses.dataclass(frozen=True)
class Input:
    """What a job with a model reads.

    Attributes:
        source: The shards.
        is_prepared: Whether they are the output of `diptych prepare`: clean captions, images of one size.
        derived: Whether they are the images of the job's own output folder.
    """

    source: Source
    is_prepared: bool
    derived: bool


def open_input(options: ModelJobOptions, with_images: bool) -> Input:
    """Finds the input, which for these jobs may be the output folder itself.

    Args:
        options: The job's.
        with_images: Whether the images are wanted.

    Raises:
        InputError: It is not there, or is an output that is not complete.
        OptionError: It cannot be read so, or the job would write into it.
    """
    outputs = [output_of(url) for url in options.inputs]
    derived = all(root is not None and is_same_place(root, options.output) for root in outputs)
    if not derived:
        refuse_overlap([*options.inputs, *filter(None, [options.source.images])], options.output)
    for root in filter(None, outputs):
        totals = (read_success(root) or {}).get("images")
        if totals is None or totals.files != len(data_files(root, "images")):
            raise InputError(
                f"{root} holds no images, or not all: the run that writes them has not finished, or files were deleted "
                "since. Run its `diptych prepare` again, then this."
            )
    source = open_source(options.inputs, options.format, options.source, texts_only=not with_images)
    is_prepared = all(outputs)
    asked = options.source.image_column, options.source.caption_column, options.source.key_column
    if isinstance(source, ParquetSource) and is_prepared and not with_images and not any(asked):
        source = TextSource(source.urls, source.root)
    elif isinstance(source, ParquetSource):
        source = dataclasses.replace(source, with_images=with_images, strict=is_prepared)
    return Input(source, is_prepared, derived)


def load_here(spec: ModelSpec, pipeline: beam.Pipeline) -> Model[Any, Any]:
    """Returns the model, loaded where the job starts: an in-process runner uses this very copy.

    Raises:
        InputError: It cannot be loaded.
        OptionError: A flag does not go with it.
    """
    if not isinstance(pipeline.runner, FnApiRunner) and spec.device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():  # the workers have one; here only its digest is wanted
            spec = dataclasses.replace(spec, device="cpu")
    try:
        return load_model(spec)
    except FlagError as error:
        raise OptionError(str(error)) from error
    except ModelError as error:
        raise InputError(str(error)) from error


def run_model_of(options: ModelJobOptions, task: Task, digest: str) -> RunModel:
    """Returns the step of a job in which its model works.

    Args:
        options: The job's.
        task: What the model does.
        digest: Of the model, as it is loaded here: a worker refuses another.
    """
    return RunModel(options.model, task, options.batch_size, options.max_failure_rate, digest)


def model_job(
    name: str,
    dataset: str,
    schema: pa.Schema,
    model: Model[Any, Any],
    options: ModelJobOptions,
    found: Input,
    steps: Mapping[str, Any],
) -> Job:
    """Returns a job with a model, ready to be launched.

    Args:
        name: Name of the job.
        dataset: The data set that it writes.
        schema: Schema of its rows.
        model: The model, loaded.
        options: The job's.
        found: What it reads.
        steps: Options of the transforms before the model, as JSON values.
    """
    spec = options.model
    of_model = dataclasses.asdict(spec.options)
    of_model.pop("text_model", None)  # where it lies decides no byte; what it is is in the digest
    asked: dict[str, Any] = {
        "chunk_rows": options.chunk_rows,
        "model": {"kind": spec.kind, "digest": model.digest, **of_model},
        "source": source_options(options, found.source),
        **steps,
    }
    print_of_run = fingerprint(name, found.source.inputs(), asked, _LIBRARIES[spec.kind])
    about = {"model": str(spec), "model_digest": model.digest}
    return Job(dataset, schema, print_of_run, options.chunk_rows, about, found.derived)
