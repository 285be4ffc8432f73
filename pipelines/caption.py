"""Images to captions: `diptych caption --input SRC --output OUT --model KIND:LOC`.

diptych caption --input out --output out --model cnn-lstm:models/captioner
"""

import dataclasses
from typing import cast

import apache_beam as beam

from models.base import CaptionModel
from pipelines.job import options_to_json
from pipelines.launch import launch
from pipelines.model_job import load_here, model_job, open_input, run_model_of
from pipelines.options import ModelJobOptions
from pipelines.running import Result, new_pipeline
from transforms.caption import caption_task
from transforms.clean import CleanCaptions, CleanOptions
from transforms.finish import FinishJob
from transforms.infer import RunModel
from transforms.read import ReadShards
from transforms.resize import ResizeImages, ResizeOptions
from transforms.schemas import captions_schema
from transforms.sink import Sink, WriteChunks
from transforms.sources.base import Shard
from transforms.sources.planned import plan_counters


@dataclasses.dataclass(frozen=True)
class RawSteps:
    """What is done to raw rows before the model: what `diptych prepare` does unless told otherwise.

    Attributes:
        clean: What captions become.
        resize: What images become.
    """

    clean: CleanOptions = CleanOptions()
    resize: ResizeOptions = ResizeOptions()


def caption(options: ModelJobOptions) -> Result:
    """Runs the job to its end, or on from where it stopped.

    Raises:
        DiptychError: The run failed; what was committed stays, and the same call goes on from there.
    """
    pipeline = new_pipeline(options.beam_args)
    found = open_input(options, with_images=True)
    model = cast(CaptionModel, load_here(options.model, pipeline))
    raw = None if found.is_prepared else RawSteps()
    schema = captions_schema(model.feature_dim)
    job = model_job(
        "caption", "captions", schema, model, options, found, {"raw": raw and options_to_json(raw)}
    )
    run_model = run_model_of(options, caption_task(model.feature_dim), model.digest)

    def graph(pipeline: beam.Pipeline, shards: list[Shard], sink: Sink) -> None:
        caption_graph(pipeline, shards, options.chunk_rows, sink, raw, run_model)

    return launch(job, options, found.source, pipeline, graph)


def caption_graph(
    pipeline: beam.Pipeline,
    shards: list[Shard],
    chunk_rows: int,
    sink: Sink,
    raw: RawSteps | None,
    run_model: RunModel,
) -> None:
    """Adds the job to a pipeline: one fused stage from reading to writing, and a small one that adds up.

    Args:
        pipeline: The pipeline.
        shards: What is read.
        chunk_rows: Most rows a chunk.
        sink: Where the rows go.
        raw: What is done to raw rows; None leaves those of an earlier output as they are.
        run_model: The model at work.
    """
    read = (
        pipeline
        | "Shards" >> beam.Create(shards, reshuffle=False)
        | "Spread" >> beam.Reshuffle()
        | "ReadShards" >> ReadShards(sink, chunk_rows)
    )
    chunks = read.chunks
    if raw:
        chunks = (
            chunks | "CleanCaptions" >> CleanCaptions(raw.clean) | "ResizeImages" >> ResizeImages(raw.resize)
        )
    written = chunks | "RunModel" >> run_model | "WriteChunks" >> WriteChunks(sink)
    _ = (
        (written, read.committed)
        | "AllCommits" >> beam.Flatten()
        | "FinishJob"
        >> FinishJob(sink.root, sink.dataset, len(shards), plan_counters(shards), run_model.limit)
    )
