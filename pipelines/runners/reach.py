"""What workers on other machines can reach: local paths are of the disks of the machine where the job starts."""

import os
from collections.abc import Iterator

import apache_beam as beam
from apache_beam.options.pipeline_options import TestOptions

from diptych.models.files.location import is_local
from diptych.models.spec import ModelSpec
from diptych.pipelines.options.base import JobOptions
from diptych.pipelines.options.generate import GenerateOptions
from diptych.pipelines.options.models import ModelJobOptions
from diptych.pipelines.options.run import RunOptions
from diptych.pipelines.runners.dataflow import is_dataflow
from diptych.pipelines.runners.flink import has_other_machines
from diptych.pipelines.terminal.console import console
from diptych.transforms.errors import OptionError


def check_reach(options: JobOptions, pipeline: beam.Pipeline) -> None:
    """Checks that the workers of a job see the places that its flags name; says on standard error where they may not.

    Raises:
        OptionError: They do not.
    """
    places = [f"{flag} {place}" for flag, place in dict.fromkeys(_places(options)) if is_local(place)]
    if not places:
        return
    if is_dataflow(options.beam_args):
        remedy = "Give URLs of a store, such as gs://BUCKET/FOLDER"
        message = f"The workers of Dataflow see no disk of this machine: {', '.join(places)}. {remedy}."
        if not pipeline.options.view_as(TestOptions).dry_run:  # what is only translated may be anything
            raise OptionError(message)
    elif has_other_machines(pipeline):
        remedy = "must be there under the same path on every machine of the cluster, as on a shared disk"
        message = f"{', '.join(places)}: {remedy}."
    else:
        return
    if not options.quiet:
        console.line(message)


def _places(options: JobOptions) -> Iterator[tuple[str, str]]:
    """Yields flags with the places that workers read or write; a model's name on a hub is no place."""
    yield from (("--input", url) for url in options.inputs)
    if options.source.images is not None:
        yield "--images", options.source.images
    yield "--output", options.output
    if isinstance(options, RunOptions):
        for flag, job in (
            ("--embed", options.embed),
            ("--caption", options.caption),
            ("--generate", options.generate),
        ):
            if job is not None:
                yield from _model_places(flag, job)
    elif isinstance(options, ModelJobOptions):
        yield from _model_places("--model", options)


def _model_places(flag: str, options: ModelJobOptions) -> Iterator[tuple[str, str]]:
    models: list[tuple[str, ModelSpec | None]] = [(flag, options.model)]
    if isinstance(options, GenerateOptions):
        models += [("--match_with", options.match_with), ("--match_by", options.match_by)]
    yield from (
        (name, model.location)
        for name, model in models
        if model is not None and os.path.isabs(model.location)
    )
