"""What every job does: finds its input, makes its output ready, runs its graph, and goes on where it stopped."""

import dataclasses
import posixpath
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import apache_beam as beam
import pyarrow as pa

from pipelines.job import State, digest, open_output, options_to_json, start_writing
from pipelines.options import JobOptions
from pipelines.running import Result, run_pipeline
from transforms.sink import Sink
from transforms.sources.base import Shard, Source
from transforms.storage import join

# Rows of an annotation file that one worker reads: enough work for one, enough shards for many
_CHUNKS_A_SHARD = 8

Graph = Callable[[beam.Pipeline, list[Shard], Sink], None]


@dataclasses.dataclass(frozen=True)
class Job:
    """A job that is about to run.

    Attributes:
        dataset: The data set that it writes.
        schema: Schema of its rows.
        fingerprint: Everything that decides its output.
        rows_per_chunk: Most rows a chunk.
        about: What its files' metadata say beside the job, its version and its fingerprint.
        derived: Whether it reads the images of its own output folder.
    """

    dataset: str
    schema: pa.Schema
    fingerprint: Mapping[str, Any]
    rows_per_chunk: int
    about: Mapping[str, str] = dataclasses.field(default_factory=dict)
    derived: bool = False


def launch(job: Job, options: JobOptions, source: Source, pipeline: beam.Pipeline, graph: Graph) -> Result:
    """Runs a job to its end, or on from where it stopped.

    Args:
        job: The job.
        options: Its options.
        source: What it reads.
        pipeline: An empty pipeline.
        graph: Adds the job to a pipeline.

    Raises:
        DiptychError: The run failed; what was committed stays, and the same call goes on from there.
    """
    rows_per_shard = job.rows_per_chunk * _CHUNKS_A_SHARD
    if options.overwrite:
        with tempfile.TemporaryDirectory() as scratch:  # what cannot be planned must not cost the old output
            source.shards(scratch, rows_per_shard)
    state = open_output(options.output, job.dataset, job.fingerprint, options.overwrite, job.derived)
    if state is State.DONE:
        return Result.of(options.output, state, job.dataset)
    shards = source.shards(join(options.output, "_plan"), rows_per_shard)
    start_writing(options.output, job.dataset, (shard.name for shard in shards))
    about = {
        "job": str(job.fingerprint["job"]),
        "version": str(job.fingerprint["versions"]["diptych"]),
        "fingerprint": digest(job.fingerprint),
        **job.about,
    }
    graph(pipeline, shards, Sink(options.output, job.dataset, about, job.schema))
    run_pipeline(pipeline, len(shards), options.quiet)
    return Result.of(options.output, state, job.dataset)


def source_options(options: JobOptions, source: Source) -> dict[str, Any]:
    """Returns, as JSON values, what of the source and its options decides an output's bytes."""
    values = options_to_json(options.source) | {"format": source.format}
    if options.source.images:  # where the folder is decides no byte, here or on a store
        values["images"] = posixpath.basename(options.source.images.rstrip("/"))
    return values
