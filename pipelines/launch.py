"""What every job does: finds its input, makes its output ready, runs its graph, and goes on where it stopped."""

import dataclasses
import posixpath
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.options.pipeline_options import TestOptions
from apache_beam.pvalue import PCollection

from models.location import redacted
from pipelines.job import State, digest, open_output, options_to_json, start_writing
from pipelines.options import JobOptions
from pipelines.reach import check_reach
from pipelines.running import Result, run_pipeline
from transforms.chunk import add_counts
from transforms.failures import FailureLimit
from transforms.finish import Expected, FinishJob, Totals
from transforms.sink import Commit, Sink
from transforms.sources.base import Shard, Source
from transforms.sources.planned import plan_counters
from transforms.storage import join

# Rows of an annotation file that one worker reads: enough work for one, enough shards for many
_CHUNKS_A_SHARD = 8

Graph = Callable[[beam.Pipeline, list[Shard], Mapping[str, Sink]], None]


@dataclasses.dataclass(frozen=True)
class Written:
    """A data set that a job writes.

    Attributes:
        schema: Of its rows.
        about: What its files' metadata say beside the job, its version and its fingerprint.
        limit: How many rows its model may fail on; None where there is no model.
    """

    schema: pa.Schema
    about: Mapping[str, str] = dataclasses.field(default_factory=dict)
    limit: FailureLimit | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """A job that is about to run.

    Attributes:
        datasets: What it writes, by name; `images` first, where the others are made from them.
        fingerprint: Everything that decides its output.
        rows_per_chunk: Most rows a chunk.
        derived: Whether it reads the images of its own output folder.
        passed_over: Files of the input that are no part of it, by the name of a counter.
    """

    datasets: Mapping[str, Written]
    fingerprint: Mapping[str, Any]
    rows_per_chunk: int
    derived: bool = False
    passed_over: Mapping[str, int] = dataclasses.field(default_factory=dict)


def launch(
    job: Job,
    options: JobOptions,
    source: Source,
    pipeline: beam.Pipeline,
    graph: Graph,
    select: Callable[[list[Shard]], list[Shard]] = list,
) -> Result:
    """Runs a job to its end, or on from where it stopped.

    Args:
        job: The job.
        options: Its options.
        source: What it reads.
        pipeline: An empty pipeline.
        graph: Adds the job to a pipeline, given the shards and where each data set goes.
        select: Returns the shards that need to be read, the same each time that the run is begun.

    Raises:
        DiptychError: The run failed; what was committed stays, and the same call goes on from there.
    """
    check_reach(options, pipeline)
    rows_per_shard = job.rows_per_chunk * _CHUNKS_A_SHARD
    if options.overwrite:
        with tempfile.TemporaryDirectory() as scratch:  # what cannot be planned must not cost the old output
            source.shards(scratch, rows_per_shard)
    if not options.quiet:
        for note in source.notes:
            print(f"diptych: {redacted(note)}", file=sys.stderr)
    state = _open_output(job, options)
    if state is State.DONE:
        return Result.of(options.output, state, job.datasets)
    shards = source.shards(join(options.output, "_plan"), rows_per_shard)
    for dataset in job.datasets:
        start_writing(options.output, dataset, (shard.name for shard in shards))
    shards = select(shards)
    about = {
        "job": str(job.fingerprint["job"]),
        "version": str(job.fingerprint["versions"]["diptych"]),
        "fingerprint": digest(job.fingerprint),
    }
    sinks = {
        dataset: Sink(options.output, dataset, {**about, **written.about}, written.schema)
        for dataset, written in job.datasets.items()
    }
    graph(pipeline, shards, sinks)
    run_pipeline(pipeline, len(shards), options.quiet)
    is_dry = pipeline.options.view_as(TestOptions).dry_run
    return Result.of(options.output, state, job.datasets, ran=not is_dry)


def _open_output(job: Job, options: JobOptions) -> State:
    """Makes the output ready for each data set; what is deleted for the first is deleted for all."""
    states = {
        open_output(
            options.output,
            dataset,
            job.fingerprint,
            options.overwrite and not number,
            job.derived or number > 0,
        )
        for number, dataset in enumerate(job.datasets)
    }
    return states.pop() if len(states) == 1 else State.RESUMED


def finish_job(
    job: Job,
    output: str,
    shards: Sequence[Shard],
    commits: Sequence[PCollection[Commit]],
    counters: Mapping[str, int] | None = None,
) -> PCollection[dict[str, Totals]]:
    """Adds the end of a job to its graph: all commits are added up, checked, and written.

    Args:
        job: The job.
        output: Its output folder.
        shards: What it reads.
        commits: Of all its data sets.
        counters: What was counted before the run.
    """
    first = next(iter(job.datasets))
    counted = add_counts(add_counts(plan_counters(shards), job.passed_over), counters or {})
    expected = {
        dataset: Expected(len(shards), counted if dataset == first else {}, written.limit)
        for dataset, written in job.datasets.items()
    }
    return commits | "AllCommits" >> beam.Flatten() | "FinishJob" >> FinishJob(output, expected)


def source_options(options: JobOptions, source: Source) -> dict[str, Any]:
    """Returns, as JSON values, what of the source and its options decides an output's bytes."""
    values = options_to_json(options.source) | {"format": source.format}
    if options.source.images:  # where the folder is decides no byte, here or on a store
        values["images"] = posixpath.basename(redacted(options.source.images).rstrip("/"))
    return values
