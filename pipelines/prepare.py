"""Raw shards to clean images of one size: `diptych prepare --input SRC --output OUT`.

diptych prepare --input data/coco --output out
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.pvalue import DoOutputsTuple, PCollection

from diptych.pipelines.lifecycle.launch import DatasetSpec, Job, finish_job, launch, source_options
from diptych.pipelines.lifecycle.output_folder import refuse_overlap
from diptych.pipelines.lifecycle.result import Result
from diptych.pipelines.options.prepare import PrepareOptions
from diptych.pipelines.runners.run_pipeline import new_pipeline
from diptych.transforms.chunk import Chunk
from diptych.transforms.clean import CleanCaptions
from diptych.transforms.fingerprint import fingerprint, options_to_json
from diptych.transforms.images.resize import ResizeImages
from diptych.transforms.read import ReadShards
from diptych.transforms.schemas import images_schema
from diptych.transforms.sink import Sink, WriteChunks
from diptych.transforms.sources.base import Shard, Source
from diptych.transforms.sources.open import open_source


def prepare(options: PrepareOptions) -> Result:
    """Runs the job to its end, or on from where it stopped.

    Raises:
        DiptychError: The run failed; what was committed stays, and the same call goes on from there.
    """
    pipeline = new_pipeline(options.beam_args)
    refuse_overlap([*options.inputs, *filter(None, [options.source.images])], options.output)
    source = open_source(options.inputs, options.format, options.source)
    asked = fingerprint_options(options, source)
    job = Job(
        {"images": DatasetSpec(images_schema_of(options))},
        fingerprint("prepare", source.inputs(), asked),
        options.rows_per_chunk,
        options,
        source.passed_over,
    )

    def graph(pipeline: beam.Pipeline, shards: list[Shard], sinks: Mapping[str, Sink]) -> None:
        prepare_graph(pipeline, shards, job, options, sinks)

    return launch(job, source, pipeline, graph)


def prepare_graph(
    pipeline: beam.Pipeline,
    shards: list[Shard],
    job: Job,
    options: PrepareOptions,
    sinks: Mapping[str, Sink],
) -> None:
    """Adds the job to a pipeline: one fused stage from reading to writing, and a small one that adds up."""
    read = read_shards(pipeline, shards, options, sinks, job.rows_per_chunk)
    rows = read.chunks | "PrepareRows" >> PrepareRows(options)
    written = rows | "WriteChunks" >> WriteChunks(sinks["images"])
    _ = finish_job(job, shards, sinks, [written, read.committed])


def read_shards(
    pipeline: beam.Pipeline,
    shards: list[Shard],
    options: PrepareOptions,
    sinks: Mapping[str, Sink],
    chunk_rows: int,
) -> DoOutputsTuple:
    """Adds the reading to a pipeline; returns raw chunks, and what was committed before."""
    return (
        pipeline
        | "Shards" >> beam.Create(shards, reshuffle=False)
        | "Spread" >> beam.Reshuffle()
        | "ReadShards"
        >> ReadShards(
            tuple(sinks.values()),
            chunk_rows,
            options.source.metadata_columns,
            keep_bytes=options.resize.keep_bytes,
        )
    )


@dataclasses.dataclass(eq=False)  # not frozen: Beam labels its transforms
class PrepareRows(beam.PTransform[PCollection[Chunk], PCollection[Chunk]]):
    """Raw chunks to clean captions and images of one size.

    Attributes:
        options: The job's.
    """

    options: PrepareOptions

    def expand(self, chunks: PCollection[Chunk]) -> PCollection[Chunk]:
        """Cleans, then resizes."""
        return (
            chunks
            | "CleanCaptions" >> CleanCaptions(self.options.clean)
            | "ResizeImages" >> ResizeImages(self.options.resize)
        )


def images_schema_of(options: PrepareOptions) -> pa.Schema:
    """Returns the schema of the images that a job writes."""
    return images_schema(options.source.metadata_columns, options.resize.size_px, options.resize.pixels)


def fingerprint_options(options: PrepareOptions, source: Source) -> dict[str, Any]:
    """Returns the options that decide the bytes of the images, as JSON values."""
    values = options_to_json(options) | {"source": source_options(options, source)}
    return {name: values[name] for name in ("chunk_rows", "clean", "resize", "source")}
