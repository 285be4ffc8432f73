"""What every job does: finds its input, makes its output ready, runs its graph, and goes on where it stopped."""

import contextlib
import dataclasses
import functools
import posixpath
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.options.pipeline_options import TestOptions
from apache_beam.pvalue import PCollection

from diptych.models.files.location import redacted
from diptych.pipelines.lifecycle.output_contents import OutputContents
from diptych.pipelines.lifecycle.output_folder import (
    DatasetClaim,
    State,
    check_output,
    clean_up,
    forget_derived,
    start_writing,
    take_output,
)
from diptych.pipelines.lifecycle.result import Result
from diptych.pipelines.options.base import JobOptions
from diptych.pipelines.runners.reach import check_reach
from diptych.pipelines.runners.run_pipeline import run_pipeline
from diptych.pipelines.terminal.console import console
from diptych.transforms.chunk import add_counts
from diptych.transforms.errors import DiptychError, OutputError
from diptych.transforms.fingerprint import digest, options_to_json
from diptych.transforms.finish import Expected, FinishJob, Totals, check_rejects
from diptych.transforms.inference.failures import FailureLimit
from diptych.transforms.output_layout import PLAN
from diptych.transforms.sink import Claim, Commit, Sink
from diptych.transforms.sources.base import Shard, Source
from diptych.transforms.sources.planned.plan import plan_counters, plan_notes
from diptych.transforms.storage import delete, join

# Rows of an annotation file that one worker reads: enough work for one, enough shards for many
_CHUNKS_A_SHARD = 8

Graph = Callable[[beam.Pipeline, list[Shard], Mapping[str, Sink]], None]


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
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
        options: The job's options.
        passed_over: Files of the input that are no part of it, by the name of a counter.
        reads_own_images: Whether it reads the images of its own output folder.
    """

    datasets: Mapping[str, DatasetSpec]
    fingerprint: Mapping[str, Any]
    rows_per_chunk: int
    options: JobOptions
    passed_over: Mapping[str, int] = dataclasses.field(default_factory=dict)
    reads_own_images: bool = False

    @property
    def run_name(self) -> str:
        """The fingerprint's digest, which the run's plan and scratch folder are named by."""
        return digest(self.fingerprint)

    @functools.cached_property
    def plan_folder(self) -> str:
        """The folder of the run's plan.

        A run that looks at its input anew has one of its own: another job may be at work by the plan that is there.
        """
        is_fresh = self.options.overwrite or self.options.retry_rejects
        name = f"{self.run_name}-{uuid.uuid4().hex[:8]}" if is_fresh else self.run_name
        return join(self.options.output, PLAN, name)

    def claims(self) -> dict[str, DatasetClaim]:
        """Returns what it asks of its output folder, by data set; what is deleted for the first is deleted for all."""
        return {
            dataset: DatasetClaim(
                dataset,
                self.fingerprint,
                self.options.overwrite and not number,
                self.reads_own_images or number > 0,
            )
            for number, dataset in enumerate(self.datasets)
        }

    def sinks(self, claims: Mapping[str, Claim]) -> dict[str, Sink]:
        """Returns where its data sets go, by name.

        Args:
            claims: The records by which they are its own.
        """
        about = {
            "job": str(self.fingerprint["job"]),
            "version": str(self.fingerprint["versions"]["diptych"]),
            "fingerprint": self.run_name,
        }
        return {
            dataset: Sink(
                self.options.output,
                dataset,
                {**about, **self.datasets[dataset].about},
                self.datasets[dataset].schema,
                claim,
                self.options.retry_rejects,
            )
            for dataset, claim in claims.items()
        }


def launch(
    job: Job,
    source: Source,
    pipeline: beam.Pipeline,
    graph: Graph,
    select: Callable[[list[Shard]], list[Shard]] = list,
) -> Result:
    """Runs a job to its end, or on from where it stopped.

    Args:
        job: The job.
        source: What it reads.
        pipeline: An empty pipeline.
        graph: Adds the job to a pipeline, given the shards and where each data set goes.
        select: Returns the shards that need to be read, the same each time that the run is begun.

    Raises:
        DiptychError: The run failed; what was committed stays, and the same call goes on from there.
    """
    check_reach(job.options, pipeline)
    _print_notes(job, source.notes)
    contents = OutputContents.read(job.options.output)
    state = _state(job, contents)
    if state is State.DONE:
        return _done(job)
    # Before anything is touched: what cannot be planned must not cost the old output, nor claim a new one
    shards = source.shards(job.plan_folder, job.rows_per_chunk * _CHUNKS_A_SHARD)
    _print_notes(job, plan_notes(shards))
    sinks = _claimed_sinks(job, shards, contents)
    shards = select(shards)
    graph(pipeline, shards, sinks)
    try:
        run_pipeline(pipeline, len(shards), job.options.quiet)
    except DiptychError:
        if not _is_done_by_another(job):
            raise
        return _done(job)
    is_dry = pipeline.options.view_as(TestOptions).dry_run
    return Result.of(job.options.output, state, job.datasets, ran=not is_dry)


def _print_notes(job: Job, notes: Iterable[str]) -> None:
    if not job.options.quiet:
        for note in notes:
            console.line(redacted(note))


def _state(job: Job, contents: OutputContents) -> State:
    """Returns what there is of all data sets of a job.

    Raises:
        OutputError: The folder belongs to another run, or holds files that no run wrote.
    """
    options, claims = job.options, list(job.claims().values())
    # what is deleted for the first is deleted for all
    checked = claims[:1] if options.overwrite else claims
    states = {check_output(options.output, claim, contents) for claim in checked}
    if states == {State.DONE}:
        totals = Result.of(options.output, State.DONE, job.datasets).totals.values()
        has_work = any(total.has_rejects(options.retry_rejects) for total in totals)
        return State.RESUMED if has_work else State.DONE
    return states.pop() if len(states) == 1 else State.RESUMED


def _done(job: Job) -> Result:
    """Returns the result of a job that an earlier run has finished."""
    result = Result.of(job.options.output, State.DONE, job.datasets)
    clean_up(job.options.output, next(iter(job.claims().values())))
    check_rejects(result.totals, job.options.output, job.options.max_reject_rate)
    return result


def _claimed_sinks(job: Job, shards: Sequence[Shard], contents: OutputContents) -> dict[str, Sink]:
    """Makes the data sets of a job its own, and returns where each goes.

    Raises:
        OutputError: Another run was faster, or there are files of something else.
    """
    output, wanted = job.options.output, job.claims()
    try:
        claims = {}
        for dataset, claim in wanted.items():
            # the first deletes all that is made from it: nothing is as it was read
            is_as_read = claim.overwrite or not job.options.overwrite
            claims[dataset] = take_output(output, claim, contents if is_as_read else None)
    except OutputError:
        with contextlib.suppress(OutputError):
            delete(output, (job.plan_folder.removeprefix(f"{output.rstrip('/')}/"),))
        raise
    if any(claim.taken_over for claim in claims.values()):  # what is deleted for the first is deleted for all
        claims = {dataset: dataclasses.replace(claim, taken_over=True) for dataset, claim in claims.items()}
    if job.options.retry_rejects and "images" in wanted and not job.reads_own_images:
        stale = [dataset for dataset in forget_derived(output) if dataset not in wanted]
        if stale and not job.options.quiet:
            console.line(
                f"{', '.join(stale)} of {output} are made from its images before this retry, and no longer "
                "count as complete: run their commands again with --overwrite."
            )
    names = [shard.name for shard in shards]
    sinks = job.sinks(claims)
    if job.options.overwrite:
        contents = OutputContents.read(output)
    for dataset, sink in sinks.items():
        left = start_writing(output, wanted[dataset], names, claims[dataset].taken_over, contents)
        sinks[dataset] = dataclasses.replace(sink, **left._asdict())
    return sinks


def _is_done_by_another(job: Job) -> bool:
    """Tells whether the same command, which ran at the same time, has come to its end and left nothing to do."""
    try:
        return _state(job, OutputContents.read(job.options.output)) is State.DONE
    except DiptychError:
        return False


def finish_job(
    job: Job,
    shards: Sequence[Shard],
    sinks: Mapping[str, Sink],
    commits: Sequence[PCollection[Commit]],
    counters: Mapping[str, int] | None = None,
) -> PCollection[dict[str, Totals]]:
    """Adds the end of a job to its graph: all commits are added up, checked, and written.

    Args:
        job: The job.
        shards: What it reads.
        sinks: Where its data sets go.
        commits: Of all its data sets.
        counters: What was counted before the run.
    """
    first = next(iter(job.datasets))
    counted = add_counts(add_counts(plan_counters(shards), job.passed_over), counters or {})
    expected = {
        dataset: Expected(
            len(shards), counted if dataset == first else {}, written.limit, sinks[dataset].claim
        )
        for dataset, written in job.datasets.items()
    }
    finish = FinishJob(job.options.output, expected, job.run_name, job.options.max_reject_rate)
    return commits | "AllCommits" >> beam.Flatten() | "FinishJob" >> finish


def source_options(options: JobOptions, source: Source) -> dict[str, Any]:
    """Returns, as JSON values, what of the source and its options decides an output's bytes."""
    values = options_to_json(options.source) | {"format": source.format}
    if options.source.images:  # where the folder is decides no byte, here or on a store
        values["images"] = posixpath.basename(redacted(options.source.images).rstrip("/"))
    return values
