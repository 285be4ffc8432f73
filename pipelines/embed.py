"""Captions to vectors: `diptych embed --input SRC --output OUT --model KIND:LOC`.

diptych embed --input out --output out --model word2vec:models/word2vec
"""

from typing import cast

import apache_beam as beam

from models.base import TextModel
from pipelines.job import options_to_json
from pipelines.launch import launch
from pipelines.model_job import load_here, model_job, open_input, run_model_of
from pipelines.options import ModelJobOptions
from pipelines.running import Result, new_pipeline
from transforms.clean import CleanCaptions, CleanOptions
from transforms.embed import ExplodeCaptions, embed_task
from transforms.finish import FinishJob
from transforms.infer import RunModel
from transforms.read import ReadShards
from transforms.schemas import embeddings_schema
from transforms.sink import Sink, WriteChunks
from transforms.sources.base import Shard
from transforms.sources.planned import plan_counters


def embed(options: ModelJobOptions) -> Result:
    """Runs the job to its end, or on from where it stopped.

    Raises:
        DiptychError: The run failed; what was committed stays, and the same call goes on from there.
    """
    pipeline = new_pipeline(options.beam_args)
    found = open_input(options, with_images=False)
    model = cast(TextModel, load_here(options.model, pipeline))
    clean = None if found.is_prepared else CleanOptions()
    flags_unknown = options.model.kind == "word2vec"
    schema = embeddings_schema(model.dim, flags_unknown)
    steps = {"clean": clean and options_to_json(clean)}
    job = model_job("embed", "embeddings", schema, model, options, found, steps)
    run_model = run_model_of(options, embed_task(model.dim, flags_unknown), model.digest)

    def graph(pipeline: beam.Pipeline, shards: list[Shard], sink: Sink) -> None:
        embed_graph(pipeline, shards, options.chunk_rows, sink, clean, run_model)

    return launch(job, options, found.source, pipeline, graph)


def embed_graph(
    pipeline: beam.Pipeline,
    shards: list[Shard],
    chunk_rows: int,
    sink: Sink,
    clean: CleanOptions | None,
    run_model: RunModel,
) -> None:
    """Adds the job to a pipeline: one fused stage from reading to writing, and a small one that adds up.

    Args:
        pipeline: The pipeline.
        shards: What is read.
        chunk_rows: Most rows a chunk.
        sink: Where the rows go.
        clean: What captions become; None leaves those of an earlier output as they are.
        run_model: The model at work.
    """
    read = (
        pipeline
        | "Shards" >> beam.Create(shards, reshuffle=False)
        | "Spread" >> beam.Reshuffle()
        | "ReadShards" >> ReadShards(sink, chunk_rows, with_images=False)
    )
    chunks = read.chunks
    if clean:
        chunks |= "CleanCaptions" >> CleanCaptions(clean)
    written = (
        chunks
        | "ExplodeCaptions" >> ExplodeCaptions()
        | "RunModel" >> run_model
        | "WriteChunks" >> WriteChunks(sink)
    )
    _ = (
        (written, read.committed)
        | "AllCommits" >> beam.Flatten()
        | "FinishJob"
        >> FinishJob(sink.root, sink.dataset, len(shards), plan_counters(shards), run_model.limit)
    )
