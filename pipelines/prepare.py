"""Raw shards to clean images of one size: `diptych prepare --input SRC --output OUT`.

diptych prepare --input data/coco --output out
"""

import apache_beam as beam

from pipelines.job import fingerprint, options_to_json, refuse_overlap
from pipelines.launch import Job, launch, source_options
from pipelines.options import PrepareOptions
from pipelines.running import Result, new_pipeline
from transforms.clean import CleanCaptions
from transforms.finish import FinishJob
from transforms.read import ReadShards
from transforms.resize import ResizeImages
from transforms.schemas import images_schema
from transforms.sink import Sink, WriteChunks
from transforms.sources import open_source
from transforms.sources.base import Shard, Source
from transforms.sources.planned import plan_counters


def prepare(options: PrepareOptions) -> Result:
    """Runs the job to its end, or on from where it stopped.

    Raises:
        DiptychError: The run failed; what was committed stays, and the same call goes on from there.
    """
    pipeline = new_pipeline(options.beam_args)
    refuse_overlap([*options.inputs, *filter(None, [options.source.images])], options.output)
    source = open_source(options.inputs, options.format, options.source)
    job = Job(
        "images",
        images_schema(options.source.metadata_columns, options.resize.size_px, options.resize.pixels),
        fingerprint("prepare", source.inputs(), _bytes_options(options, source)),
        options.rows_per_chunk,
    )

    def graph(pipeline: beam.Pipeline, shards: list[Shard], sink: Sink) -> None:
        prepare_graph(pipeline, shards, options, sink)

    return launch(job, options, source, pipeline, graph)


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


def _bytes_options(options: PrepareOptions, source: Source) -> dict[str, object]:
    """Returns the options that decide the output's bytes."""
    values = options_to_json(options) | {"source": source_options(options, source)}
    return {name: values[name] for name in ("chunk_rows", "clean", "resize", "source")}
