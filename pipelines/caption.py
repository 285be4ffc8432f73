"""Images to captions: `diptych caption --input SRC --output OUT --model KIND:LOC`.

diptych caption --input out --output out --model cnn-lstm:models/captioner
"""

import dataclasses
from typing import cast

import apache_beam as beam

from diptych.models.base import CaptionModel
from diptych.pipelines.lifecycle.model_job import (
    Branch,
    ChunkTransform,
    load_here,
    model_branch,
    open_input,
    run_model_job,
)
from diptych.pipelines.lifecycle.result import Result
from diptych.pipelines.options.models import ModelJobOptions
from diptych.pipelines.runners.run_pipeline import new_pipeline
from diptych.transforms.clean import CleanCaptions, CleanOptions
from diptych.transforms.fingerprint import options_to_json
from diptych.transforms.images.resize import ResizeImages, ResizeOptions
from diptych.transforms.inference.caption import caption_task
from diptych.transforms.schemas import captions_schema


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
    branch = caption_branch(options, pipeline)
    raw = None if found.is_prepared else RawSteps()
    before: dict[str, ChunkTransform] = {}
    if raw:
        before = {"CleanCaptions": CleanCaptions(raw.clean), "ResizeImages": ResizeImages(raw.resize)}
    asked = {"raw": raw and options_to_json(raw)}
    return run_model_job(pipeline, options, found, branch, before, asked, with_images=True)


def caption_branch(options: ModelJobOptions, pipeline: beam.Pipeline) -> Branch:
    """Returns what the job makes of clean rows; its model is loaded.

    Raises:
        InputError: It cannot be loaded.
        OptionError: A flag does not go with it.
    """
    model = cast(CaptionModel, load_here(options.model, pipeline))
    schema, task = captions_schema(model.feature_dim), caption_task(model.feature_dim)
    return model_branch("caption", "captions", schema, model, options, task)
