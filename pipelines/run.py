"""All of it in one graph, from raw data to every data set: `diptych run --input SRC --output OUT`.

diptych run --input data/coco --output out --embed word2vec:models/word2vec --caption cnn-lstm:models/captioner

Each image is read, decoded and resized once, and each model is loaded once a process. The rows are those that `prepare`
and the jobs of the models give one after the other.
"""

from collections.abc import Mapping

import apache_beam as beam

from diptych.pipelines.caption import caption_branch
from diptych.pipelines.embed import embed_branch
from diptych.pipelines.generate import generate_branch
from diptych.pipelines.lifecycle.launch import DatasetSpec, Job, finish_job, launch
from diptych.pipelines.lifecycle.model_job import Branch, MakeDataset
from diptych.pipelines.lifecycle.output_folder import refuse_overlap
from diptych.pipelines.lifecycle.result import Result
from diptych.pipelines.options.run import RunOptions
from diptych.pipelines.prepare import PrepareRows, fingerprint_options, images_schema_of, read_shards
from diptych.pipelines.runners.run_pipeline import new_pipeline
from diptych.transforms.chunk import Chunk
from diptych.transforms.fingerprint import fingerprint
from diptych.transforms.sink import Sink, WriteChunks
from diptych.transforms.sources.base import Shard
from diptych.transforms.sources.open import open_source


def run(options: RunOptions) -> Result:
    """Runs the job to its end, or on from where it stopped.

    Raises:
        DiptychError: The run failed; what was committed stays, and the same call goes on from there.
    """
    pipeline = new_pipeline(options.beam_args)
    refuse_overlap([*options.inputs, *filter(None, [options.source.images])], options.output)
    source = open_source(options.inputs, options.format, options.source)
    branches = _branches(options, pipeline)
    chunk_rows = min(options.rows_per_chunk, *(branch.max_chunk_rows for branch in branches))
    asked = {**fingerprint_options(options, source), "chunk_rows": chunk_rows}
    asked |= {branch.job: dict(branch.asked) for branch in branches}
    libraries = tuple(dict.fromkeys(name for branch in branches for name in branch.libraries))
    datasets = {"images": DatasetSpec(images_schema_of(options))}
    datasets |= {branch.dataset: branch.written for branch in branches}
    run_fingerprint = fingerprint("run", source.inputs(), asked, libraries)
    job = Job(datasets, run_fingerprint, chunk_rows, options, source.passed_over)

    def graph(pipeline: beam.Pipeline, shards: list[Shard], sinks: Mapping[str, Sink]) -> None:
        run_graph(pipeline, shards, job, options, sinks, branches)

    return launch(job, source, pipeline, graph)


def _branches(options: RunOptions, pipeline: beam.Pipeline) -> list[Branch]:
    """Returns what is made of the rows; all models are loaded.

    Raises:
        InputError: One cannot be loaded.
        OptionError: A flag does not go with its model.
    """
    branches = []
    if options.embed:
        branches.append(embed_branch(options.embed, pipeline))
    if options.caption:
        branches.append(caption_branch(options.caption, pipeline))
    if options.generate:
        branches.append(generate_branch(options.generate, pipeline))
    return branches


def run_graph(
    pipeline: beam.Pipeline,
    shards: list[Shard],
    job: Job,
    options: RunOptions,
    sinks: Mapping[str, Sink],
    branches: list[Branch],
) -> None:
    """Adds the job to a pipeline: one fused stage from reading to writing, and a small one that adds up.

    Args:
        pipeline: The pipeline.
        shards: What is read.
        job: The job.
        options: Its options.
        sinks: Where each data set goes.
        branches: What is made of the rows.
    """
    read = read_shards(pipeline, shards, options, sinks, job.rows_per_chunk)
    rows = read.chunks | "PrepareRows" >> PrepareRows(options)
    commits = [read.committed, rows | "WriteChunks" >> WriteChunks(sinks["images"])]
    clean = rows | "Branch" >> beam.Map(Chunk.branch).with_output_types(Chunk)
    for branch in branches:
        name = branch.job.capitalize()
        commits.append(clean | name >> MakeDataset(branch, sinks[branch.dataset]))
    _ = finish_job(job, shards, sinks, commits)
