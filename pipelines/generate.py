"""Text to images: `diptych generate --prompts SRC --output OUT --model KIND:LOC`.

diptych generate --prompts prompts.txt --output out --model gan:models/gan --images_per_prompt 4
"""

import dataclasses
from typing import Any, cast

import apache_beam as beam

from diptych.models.base import ImageModel, ImageOptions, TextOptions
from diptych.models.names import LIBRARIES, ModelName
from diptych.models.spec import MatchOptions, ModelSpec
from diptych.pipelines.lifecycle.model_job import (
    Branch,
    ChunkTransform,
    load_here,
    model_branch,
    open_input,
    run_model_job,
)
from diptych.pipelines.lifecycle.result import Result
from diptych.pipelines.options.generate import GenerateOptions
from diptych.pipelines.runners.run_pipeline import new_pipeline
from diptych.transforms.clean import CleanCaptions, CleanOptions
from diptych.transforms.errors import OptionError
from diptych.transforms.fingerprint import options_to_json
from diptych.transforms.inference.embed import ExplodeCaptions
from diptych.transforms.inference.generate import ExplodeSamples, generate_task, match_task
from diptych.transforms.inference.run_model import RunModel
from diptych.transforms.schemas import generated_schema


def generate(options: GenerateOptions) -> Result:
    """Runs the job to its end, or on from where it stopped.

    Raises:
        DiptychError: The run failed; what was committed stays, and the same call goes on from there.
    """
    pipeline = new_pipeline(options.beam_args)
    found = open_input(options, with_images=False)
    branch = generate_branch(options, pipeline)
    clean = None if found.is_prepared else CleanOptions()
    before = {"CleanCaptions": CleanCaptions(clean)} if clean else {}
    asked = {"clean": clean and options_to_json(clean)}
    return run_model_job(pipeline, options, found, branch, before, asked, with_images=False)


def generate_branch(options: GenerateOptions, pipeline: beam.Pipeline) -> Branch:
    """Returns what the job makes of clean rows; its models are loaded.

    Raises:
        InputError: A model cannot be loaded.
        OptionError: A flag does not go with it.
    """
    model = cast(ImageModel, load_here(options.model, pipeline))
    match = _match(options, model, pipeline)
    schema = generated_schema(with_match=match is not None)
    task = generate_task(cast(ImageOptions, options.model.options).image_format, match is not None)
    branch = model_branch("generate", "generated", schema, model, options, task)
    steps: dict[str, ChunkTransform] = {
        "ExplodeCaptions": ExplodeCaptions("generate"),
        "ExplodeSamples": ExplodeSamples(options.images_per_prompt, options.seed),
        **branch.steps,
    }
    asked: dict[str, Any] = {
        **branch.asked,
        "images_per_prompt": options.images_per_prompt,
        "seed": options.seed,
    }
    others = [spec for spec in (options.match_with, options.match_by) if spec]
    kinds = [*(spec.kind for spec in others), *filter(None, [ModelName.parse(model.text_model or "").kind])]
    libraries = tuple(
        dict.fromkeys([*branch.libraries, *(name for kind in kinds for name in LIBRARIES[kind])])
    )
    if match:
        steps["MatchImages"] = match
        asked["match"] = {"min": options.min_match, "digest": match.digest}
    most = options.rows_per_chunk(model.size_px)
    return dataclasses.replace(branch, steps=steps, asked=asked, libraries=libraries, max_chunk_rows=most)


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
        by = ModelSpec(*ModelName.parse(str(model.text_model)), TextOptions(), options.model.device)
    captioner = options.match_with
    spec = ModelSpec("match", f"{captioner} {by}", MatchOptions(captioner, by), options.model.device)
    digest = load_here(spec, pipeline).digest
    return RunModel(spec, match_task(options.min_match), options.batch_size, options.max_failure_rate, digest)
