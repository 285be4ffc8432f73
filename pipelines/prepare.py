"""Raw shards to clean images of one size: `diptych prepare --input SRC --output OUT`.

diptych prepare --input data/coco --output out
"""

import posixpath
import tempfile

import apache_beam as beam

from pipelines.job import (
    State,
    digest,
    fingerprint,
    open_output,
    options_to_json,
    refuse_overlap,
    start_writing,
)
from pipelines.options import PrepareOptions
from pipelines.running import Result, new_pipeline, run_pipeline
from transforms.clean import CleanCaptions
from transforms.finish import FinishJob
from transforms.read import ReadShards
from transforms.resize import ResizeImages
from transforms.schemas import images_schema
from transforms.sink import Sink, WriteChunks
from transforms.sources import open_source
from transforms.sources.base import Shard
from transforms.sources.planned import plan_counters
from transforms.storage import join

# Rows of an annotation file that one worker reads: enough work for one, enough shards for many
_CHUNKS_A_SHARD = 8


def prepare(options: PrepareOptions) -> Result:
    """Runs the job to its end, or on from where it stopped.

    Raises:
        DiptychError: The run failed; what was committed stays, and the same call goes on from there.
    """
    pipeline = new_pipeline(options.beam_args)
    refuse_overlap([*options.inputs, *filter(None, [options.source.images])], options.output)
    source = open_source(options.inputs, options.format, options.source)
    print_of_run = fingerprint("prepare", source.inputs(), _bytes_options(options))
    rows_per_shard = options.rows_per_chunk * _CHUNKS_A_SHARD
    if options.overwrite:
        with tempfile.TemporaryDirectory() as scratch:  # what cannot be planned must not cost the old output
            source.shards(scratch, rows_per_shard)
    state = open_output(options.output, ("images",), print_of_run, options.overwrite)
    if state is State.DONE:
        return Result.of(options.output, state)
    shards = source.shards(join(options.output, "_plan"), rows_per_shard)
    start_writing(options.output, "images", (shard.name for shard in shards))
    job = {
        "job": "prepare",
        "version": print_of_run["versions"]["diptych"],
        "fingerprint": digest(print_of_run),
    }
    columns = options.source.metadata_columns
    schema = images_schema(columns, options.resize.size_px, options.resize.pixels)
    sink = Sink(options.output, "images", job, schema)
    prepare_graph(pipeline, shards, options, sink)
    run_pipeline(pipeline, len(shards), options.quiet)
    return Result.of(options.output, state)


def prepare_graph(pipeline: beam.Pipeline, shards: list[Shard], options: PrepareOptions, sink: Sink) -> None:
    """Adds the job to a pipeline: one fused stage from reading to writing, and a small one that adds up."""
    read = (
        pipeline
        | "Shards" >> beam.Create(shards, reshuffle=False)
        | "Spread" >> beam.Reshuffle()
        | "ReadShards"
        >> ReadShards(
            sink,
            options.rows_per_chunk,
            options.source.metadata_columns,
            keep_bytes=options.resize.keep_bytes,
        )
    )
    written = (
        read.chunks
        | "CleanCaptions" >> CleanCaptions(options.clean)
        | "ResizeImages" >> ResizeImages(options.resize)
        | "WriteChunks" >> WriteChunks(sink)
    )
    _ = (
        (written, read.committed)
        | "AllCommits" >> beam.Flatten()
        | "FinishJob" >> FinishJob(sink.root, sink.dataset, len(shards), plan_counters(shards))
    )


def _bytes_options(options: PrepareOptions) -> dict[str, object]:
    """Returns the options that decide the output's bytes."""
    values = options_to_json(options)
    if options.source.images:  # where the folder is decides no byte, here or on a store
        values["source"]["images"] = posixpath.basename(options.source.images.rstrip("/"))
    return {name: values[name] for name in ("chunk_rows", "clean", "resize", "source")}
