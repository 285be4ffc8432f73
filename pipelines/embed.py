"""Captions to vectors: `diptych embed --input SRC --output OUT --model KIND:LOC`.

diptych embed --input out --output out --model word2vec:models/word2vec
"""

import dataclasses
from typing import cast

import apache_beam as beam

from diptych.models.base import TextModel
from diptych.pipelines.lifecycle.model_job import Branch, load_here, model_branch, open_input, run_model_job
from diptych.pipelines.lifecycle.result import Result
from diptych.pipelines.options.models import ModelJobOptions
from diptych.pipelines.runners.run_pipeline import new_pipeline
from diptych.transforms.clean import CleanCaptions, CleanOptions
from diptych.transforms.fingerprint import options_to_json
from diptych.transforms.inference.embed import ExplodeCaptions, embed_task
from diptych.transforms.schemas import embeddings_schema


def embed(options: ModelJobOptions) -> Result:
    """Runs the job to its end, or on from where it stopped.

    Raises:
        DiptychError: The run failed; what was committed stays, and the same call goes on from there.
    """
    pipeline = new_pipeline(options.beam_args)
    found = open_input(options, with_images=False)
    branch = embed_branch(options, pipeline)
    clean = None if found.is_prepared else CleanOptions()
    before = {"CleanCaptions": CleanCaptions(clean)} if clean else {}
    asked = {"clean": clean and options_to_json(clean)}
    return run_model_job(pipeline, options, found, branch, before, asked, with_images=False)


def embed_branch(options: ModelJobOptions, pipeline: beam.Pipeline) -> Branch:
    """Returns what the job makes of clean rows; its model is loaded.

    Raises:
        InputError: It cannot be loaded.
        OptionError: A flag does not go with it.
    """
    model = cast(TextModel, load_here(options.model, pipeline))
    flags_unknown = options.model.kind == "word2vec"
    schema, task = embeddings_schema(model.dim, flags_unknown), embed_task(model.dim, flags_unknown)
    branch = model_branch("embed", "embeddings", schema, model, options, task)
    return dataclasses.replace(branch, steps={"ExplodeCaptions": ExplodeCaptions("embed"), **branch.steps})
