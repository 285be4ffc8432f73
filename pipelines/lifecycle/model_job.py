"""What jobs with a model share: it is loaded at launch, and the input may be the output that they add to."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.pvalue import PCollection
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

from diptych.models.base import Model
from diptych.models.errors import ModelError, ModelOptionError
from diptych.models.files.location import redacted
from diptych.models.names import LIBRARIES
from diptych.models.spec import MatchOptions, ModelSpec, load_model
from diptych.pipelines.lifecycle.launch import DatasetSpec, Job, finish_job, launch, source_options
from diptych.pipelines.lifecycle.output_folder import refuse_overlap
from diptych.pipelines.lifecycle.result import Result
from diptych.pipelines.lifecycle.skip_done import check_earlier, find_done
from diptych.pipelines.options.models import ModelJobOptions
from diptych.transforms.chunk import Chunk
from diptych.transforms.errors import InputError, OptionError
from diptych.transforms.fingerprint import fingerprint
from diptych.transforms.finish import read_success
from diptych.transforms.inference.failures import FailureLimit
from diptych.transforms.inference.run_model import RunModel, Task
from diptych.transforms.output_layout import data_files
from diptych.transforms.read import ReadShards
from diptych.transforms.sink import Commit, Sink, WriteChunks
from diptych.transforms.skip_done import DropDone, open_done_keys, without_done_shards
from diptych.transforms.sources.base import ColumnNames, Shard, Source
from diptych.transforms.sources.open import open_source, output_of
from diptych.transforms.sources.sharded.parquet import ParquetSource
from diptych.transforms.sources.sharded.prepared_captions import TextSource
from diptych.transforms.storage import is_same_place

ChunkTransform = beam.PTransform[PCollection[Chunk], PCollection[Chunk]]


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
    if (
        isinstance(source, ParquetSource)
        and is_prepared
        and not with_images
        and options.source.columns == ColumnNames()
    ):
        source = TextSource(source.urls, source.root, passed_over=source.passed_over, notes=source.notes)
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
            spec = _on_cpu(spec)
    try:
        return load_model(spec)
    except ModelOptionError as error:
        raise OptionError(str(error)) from error
    except ModelError as error:
        raise InputError(str(error)) from error


def _on_cpu(spec: ModelSpec) -> ModelSpec:
    options = spec.options
    if isinstance(options, MatchOptions):
        options = MatchOptions(_on_cpu(options.captioner), _on_cpu(options.text))
    return dataclasses.replace(spec, options=options, device="cpu")


@dataclasses.dataclass(frozen=True)
class Branch:
    """What a model makes of clean rows: a data set.

    Attributes:
        job: Name of the job that makes it alone.
        dataset: Its name.
        written: Its schema, and what its files say of the model.
        steps: From clean chunks to rows of that schema, by label.
        asked: What decides its bytes beside the rows, as JSON values.
        libraries: Those that decide them too.
        max_chunk_rows: Most rows a chunk, because each becomes so much.
    """

    job: str
    dataset: str
    written: DatasetSpec
    steps: Mapping[str, ChunkTransform]
    asked: Mapping[str, Any]
    libraries: tuple[str, ...]
    max_chunk_rows: int = 100_000


def model_branch(
    job: str, dataset: str, schema: pa.Schema, model: Model[Any, Any], options: ModelJobOptions, task: Task
) -> Branch:
    """Returns the branch of a model alone.

    Args:
        job: Name of the job.
        dataset: The data set that it writes.
        schema: Schema of its rows.
        model: The model, loaded; a worker refuses another.
        options: The job's.
        task: What the model does.
    """
    spec = options.model
    of_model = dataclasses.asdict(spec.options)
    of_model.pop("text_model", None)  # where it lies decides no byte; what it is is in the digest
    run_model = RunModel(spec, task, options.batch_size, options.max_failure_rate, model.digest)
    about = {"model": spec.name, "model_digest": model.digest}
    return Branch(
        job,
        dataset,
        DatasetSpec(schema, about, FailureLimit(task.stage, options.max_failure_rate)),
        {"RunModel": run_model},
        {"model": {"kind": spec.kind, "digest": model.digest, **of_model}},
        LIBRARIES[spec.kind],
    )


@dataclasses.dataclass(eq=False)  # not frozen: Beam labels its transforms
class MakeDataset(beam.PTransform[PCollection[Chunk], PCollection[Commit]]):
    """Clean chunks to a data set.

    Attributes:
        branch: What it is.
        sink: Where it goes.
    """

    branch: Branch
    sink: Sink

    def expand(self, chunks: PCollection[Chunk]) -> PCollection[Commit]:
        """Applies the steps of the branch, and writes."""
        for label, step in self.branch.steps.items():
            chunks |= label >> step
        return chunks | "WriteChunks" >> WriteChunks(self.sink)


def run_model_job(
    pipeline: beam.Pipeline,
    options: ModelJobOptions,
    found: Input,
    branch: Branch,
    before: Mapping[str, ChunkTransform],
    preprocessing_options: Mapping[str, Any],
    with_images: bool,
) -> Result:
    """Runs a job with a model: one fused stage from reading to writing, and a small one that adds up.

    Args:
        pipeline: An empty pipeline.
        options: The job's.
        found: What it reads.
        branch: What it makes of clean rows.
        before: From the rows that are read to clean ones, by label; nothing for an earlier output.
        preprocessing_options: The options of that, as JSON values.
        with_images: Whether images are read.

    Raises:
        DiptychError: The run failed; what was committed stays, and the same call goes on from there.
    """
    chunk_rows = min(options.chunk_rows, branch.max_chunk_rows)
    asked = {
        **branch.asked,
        "chunk_rows": chunk_rows,
        "source": source_options(options, found.source),
        **preprocessing_options,
        **({"skip_done_in": [*map(redacted, options.skip_done_in)]} if options.skip_done_in else {}),
    }
    run_fingerprint = fingerprint(branch.job, found.source.inputs(), asked, branch.libraries)
    datasets = {branch.dataset: branch.written}
    job = Job(datasets, run_fingerprint, chunk_rows, options, found.source.passed_over, found.derived)
    check_earlier(options, branch.dataset, job.plan_folder)

    left_out: dict[str, int] = {}

    def select(shards: list[Shard]) -> list[Shard]:
        done = find_done(options, branch.dataset, job.plan_folder)
        if done is None or not found.is_prepared:
            return shards
        kept, num_done = without_done_shards(shards, open_done_keys(done))
        left_out["done_before"] = num_done
        return kept

    def graph(pipeline: beam.Pipeline, shards: list[Shard], sinks: Mapping[str, Sink]) -> None:
        done = find_done(options, branch.dataset, job.plan_folder)
        steps = {**({"DropDone": DropDone(done)} if done else {}), **before}
        model_graph(pipeline, shards, job, sinks, branch, steps, with_images, left_out)

    return launch(job, found.source, pipeline, graph, select)


def model_graph(
    pipeline: beam.Pipeline,
    shards: list[Shard],
    job: Job,
    sinks: Mapping[str, Sink],
    branch: Branch,
    before: Mapping[str, ChunkTransform],
    with_images: bool,
    counters: Mapping[str, int] | None = None,
) -> None:
    """Adds a job with a model to a pipeline; arguments as of `run_model_job` and `finish_job`."""
    read = (
        pipeline
        | "Shards" >> beam.Create(shards, reshuffle=False)
        | "Spread" >> beam.Reshuffle()
        | "ReadShards" >> ReadShards(tuple(sinks.values()), job.rows_per_chunk, with_images=with_images)
    )
    chunks = read.chunks
    for label, step in before.items():
        chunks |= label >> step
    written = chunks | "MakeDataset" >> MakeDataset(branch, sinks[branch.dataset])
    _ = finish_job(job, shards, sinks, [written, read.committed], counters)
