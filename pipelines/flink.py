"""What a job asks of Flink, from its own size, so that nobody has to tune it."""

import json
import urllib.error
import urllib.request
from collections.abc import Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import FlinkRunnerOptions, PipelineOptions, StandardOptions
from apache_beam.runners.portability.flink_runner import MAGIC_HOST_NAMES, FlinkRunner

from transforms.errors import OptionError

# A cluster's job is begun again when one of its machines has gone; what is committed is skipped then
_RETRIES, _RETRY_DELAY_MS = 10, 3_000
_ANSWER_S = 20.0


def flink_flags(args: Sequence[str]) -> list[str]:
    """Returns flags that a job on a Flink cluster needs and that were not given.

    Args:
        args: Flags for Apache Beam.
    """
    options = PipelineOptions(list(args))
    is_flink = str(options.view_as(StandardOptions).runner).lower().endswith("flinkrunner")
    if not is_flink or _master(options) is None:
        return []
    given = {arg.split("=")[0] for arg in args}
    wanted = {
        "--number_of_execution_retries": _RETRIES,
        "--execution_retry_delay": _RETRY_DELAY_MS,
        "--job_server_jvm_properties": "-Xmx512m",
    }
    return [f"{flag}={value}" for flag, value in wanted.items() if flag not in given]


def size_for_flink(pipeline: beam.Pipeline, num_shards: int) -> None:
    """Gives a job on a Flink cluster a task for each shard, but no more than there are slots.

    Raises:
        OptionError: No cluster answers, or it has no slot.
    """
    options = pipeline.options.view_as(FlinkRunnerOptions)
    master = _master(pipeline.options) if isinstance(pipeline.runner, FlinkRunner) else None
    if master is None or options.parallelism > 0:
        return
    slots = _num_slots(master)
    if not slots:
        raise OptionError(
            f"--flink_master {master} has no slot for a task. Start a task manager, or wait until one has come up."
        )
    options.parallelism = max(1, min(slots, num_shards))


def _master(options: PipelineOptions) -> str | None:
    """Returns the URL of the cluster; None where Flink runs in the job server itself."""
    master = str(options.view_as(FlinkRunnerOptions).flink_master)
    return None if master in MAGIC_HOST_NAMES else FlinkRunner.add_http_scheme(master)


def _num_slots(master: str) -> int:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # as the job server asks it
    try:
        with direct.open(f"{master}/overview", timeout=_ANSWER_S) as answer:
            return int(json.load(answer)["slots-total"])
    except (OSError, urllib.error.URLError, ValueError, KeyError) as error:
        raise OptionError(
            f"--flink_master {master} does not answer as a Flink cluster: {error}. Expected the address of its REST "
            "interface, such as localhost:8081: check it, and that the cluster is up."
        ) from error
