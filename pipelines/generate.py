"""Text to images: `diptych generate --prompts SRC --output OUT --model KIND:LOC`.

diptych generate --prompts prompts.txt --output out --model gan:models/gan --images_per_prompt 4
"""

from typing import cast

import apache_beam as beam

from models.base import ImageModel, ImageOptions, TextOptions
from models.spec import MatchOptions, ModelSpec
from pipelines.job import options_to_json
from pipelines.launch import launch
from pipelines.model_job import load_here, model_job, open_input, run_model_of
from pipelines.options import GenerateOptions
from pipelines.running import Result, new_pipeline
from transforms.clean import CleanCaptions, CleanOptions
from transforms.embed import ExplodeCaptions
from transforms.errors import OptionError
from transforms.finish import FinishJob
from transforms.generate import ExplodeSamples, generate_task, match_task
from transforms.infer import RunModel
from transforms.read import ReadShards
from transforms.schemas import generated_schema
from transforms.sink import Sink, WriteChunks
from transforms.sources.base import Shard
from transforms.sources.planned import plan_counters


def generate(options: GenerateOptions) -> Result:
    """Runs the job to its end, or on from where it stopped.

    Raises:
        DiptychError: The run failed; what was committed stays, and the same call goes on from there.
    """
    pipeline = new_pipeline(options.beam_args)
    found = open_input(options, with_images=False)
    model = cast(ImageModel, load_here(options.model, pipeline))
    asked = cast(ImageOptions, options.model.options)
    clean = None if found.is_prepared else CleanOptions()
    chunk_rows = options.rows_per_chunk(model.size_px)
    drawn = {"images_per_prompt": options.images_per_prompt, "seed": options.seed}
    match = _match(options, model, pipeline)
    steps = {"clean": clean and options_to_json(clean), "chunk_rows": chunk_rows, **drawn}
    if match:
        steps["match"] = {"min": options.min_match, "digest": match.digest}
    schema = generated_schema(with_match=match is not None)
    job = model_job("generate", "generated", schema, model, options, found, steps)
    task = generate_task(asked.image_format, is_matched=match is not None)
    run_model = run_model_of(options, task, model.digest)
    explode = ExplodeSamples(options.images_per_prompt, options.seed)

    def graph(pipeline: beam.Pipeline, shards: list[Shard], sink: Sink) -> None:
        generate_graph(pipeline, shards, chunk_rows, sink, clean, explode, run_model, match)

    return launch(job, options, found.source, pipeline, graph)


def _match(options: GenerateOptions, model: ImageModel, pipeline: beam.Pipeline) -> RunModel | None:
    """Returns the step that compares images with their prompts, None where that is not asked for.

    Raises:
        InputError: A model of it cannot be loaded.
        OptionError: There is no text model to compare by.
    """
    if options.match_with is None or options.min_match is None:
        return None
    by = options.match_by
    if by is None and model.text_model is None:
        raise OptionError(
            f"--min_match {options.min_match} compares texts by their vectors, and {options.model} has no text model "
            "for that. Name one with --match_by, as bert:sentence-transformers/all-MiniLM-L6-v2."
        )
    if by is None:
        kind, _, location = str(model.text_model).partition(":")
        by = ModelSpec(kind, location, TextOptions(), options.model.device)
    captioner = options.match_with
    spec = ModelSpec("match", f"{captioner} {by}", MatchOptions(captioner, by), options.model.device)
    digest = load_here(spec, pipeline).digest
    return RunModel(spec, match_task(options.min_match), options.batch_size, options.max_failure_rate, digest)


def generate_graph(
    pipeline: beam.Pipeline,
    shards: list[Shard],
    chunk_rows: int,
    sink: Sink,
    clean: CleanOptions | None,
    explode: ExplodeSamples,
    run_model: RunModel,
    match: RunModel | None,
) -> None:
    """Adds the job to a pipeline: one fused stage from reading to writing, and a small one that adds up.

    Args:
        pipeline: The pipeline.
        shards: What is read.
        chunk_rows: Most rows a chunk.
        sink: Where the rows go.
        clean: What prompts become; None leaves the captions of an earlier output as they are.
        explode: How many images are made of each.
        run_model: The model at work.
        match: Compares its images with their prompts.
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
    made = (
        chunks
        | "ExplodeCaptions" >> ExplodeCaptions()
        | "ExplodeSamples" >> explode
        | "RunModel" >> run_model
    )
    if match:
        made |= "MatchImages" >> match
    written = made | "WriteChunks" >> WriteChunks(sink)
    _ = (
        (written, read.committed)
        | "AllCommits" >> beam.Flatten()
        | "FinishJob"
        >> FinishJob(sink.root, sink.dataset, len(shards), plan_counters(shards), run_model.limit)
    )
