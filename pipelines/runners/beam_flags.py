"""Flags that a job does not know: Apache Beam's, or misspelt ones."""

import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from diptych.transforms.errors import OptionError


def check_beam_args(beam_args: Sequence[str], own_flags: Sequence[str]) -> None:
    """Checks that Apache Beam knows what the job did not.

    A portable runner has flags of its own, which only its job server knows; those pass, unless they look like a
    misspelt flag.

    Raises:
        OptionError: A flag that neither knows.
    """
    if not beam_args:
        return
    from apache_beam.options.pipeline_options import PipelineOptions, _BeamArgumentParser

    class Parser(_BeamArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise OptionError(f"Apache Beam refuses a flag: {message}.")

    parser = Parser(allow_abbrev=False)
    for options in _subclasses(PipelineOptions):
        options._add_argparse_args(parser)
    known, unknown = parser.parse_known_args(list(beam_args))
    beam_flags = [flag for action in parser._actions for flag in action.option_strings]
    beam_flags += _JOB_SERVER_FLAGS
    is_portable = any(name in (known.runner or "") for name in ("Flink", "Spark", "Portable"))
    for flag in unknown:
        if is_portable and flag.split("=")[0] in _JOB_SERVER_FLAGS:
            continue
        near = difflib.get_close_matches(flag.split("=")[0], [*own_flags, *beam_flags], n=1, cutoff=0.8)
        if is_portable and flag.startswith("--") and not near:
            continue
        if is_portable and not flag.startswith("-"):
            continue
        hint = f" Did you mean {near[0]}?" if near else " `diptych JOB --help` lists the job's flags."
        raise OptionError(f"{flag} is no flag of this job, nor one of Apache Beam.{hint}")


# The usual ones of those that only a portable runner's job server knows, to tell them from misspelt ones
_JOB_SERVER_FLAGS = (
    "--checkpointing_interval",
    "--max_parallelism",
    "--number_of_execution_retries",
    "--parallelism",
)


def _subclasses(base: type[Any]) -> list[type[Any]]:
    found: list[type[Any]] = []
    for sub in base.__subclasses__():
        found += [sub, *_subclasses(sub)]
    return found
