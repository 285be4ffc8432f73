"""What a job asks of Flink, from its own size, so that nobody has to tune it."""

import atexit
import contextlib
import dataclasses
import http.client
import json
import os
import shutil
import tempfile
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import (
    FlinkRunnerOptions,
    GoogleCloudOptions,
    PipelineOptions,
    PortableOptions,
    StandardOptions,
)
from apache_beam.runners.portability.flink_runner import MAGIC_HOST_NAMES, FlinkRunner

from diptych.pipelines.terminal.console import console
from diptych.transforms.errors import DiptychError, OptionError

# A cluster's job is begun again when one of its machines has gone; what is committed is skipped then
_RETRIES, _RETRY_DELAY_MS = 4, 3_000
_ANSWER_S, _ASK_EACH_S = 20.0, 3.0
# Where Flink runs in the job server, all tasks are threads of one Python process: more are of no use
_MOST_TASKS_HERE = 16
# Of network memory: between P tasks and P others a task has a buffer for each of the others, and takes two from each
_BUFFER_BYTES = 32 << 10
_SHUFFLES = 4
_FEWEST_BUFFERS = 2048


def flink_flags(args: Sequence[str]) -> list[str]:
    """Returns flags that a job on Flink needs and that were not given.

    Args:
        args: Flags for Apache Beam.
    """
    options = PipelineOptions(list(args))
    if not str(options.view_as(StandardOptions).runner).lower().endswith("flinkrunner"):
        return []
    given = {arg.split("=")[0] for arg in args}
    if _master(options) is None:
        asked = options.view_as(FlinkRunnerOptions).parallelism
        tasks = asked if asked > 0 else min(os.cpu_count() or 1, _MOST_TASKS_HERE)
        wanted = {"--parallelism": tasks}
        if "--flink_conf_dir" not in given:
            wanted["--flink_conf_dir"] = _write_settings(tasks)
    else:
        wanted = {
            "--job_name": f"diptych-{uuid.uuid4().hex[:12]}",
            "--number_of_execution_retries": _RETRIES,
            "--execution_retry_delay": _RETRY_DELAY_MS,
            "--job_server_jvm_properties": "-Xmx512m",
        }
    return [f"{flag}={value}" for flag, value in wanted.items() if flag not in given]


def num_buffers(tasks: int, tasks_here: int) -> int:
    """Returns how many network buffers a machine needs that runs some of a job's tasks.

    Args:
        tasks: Of the job, side by side.
        tasks_here: Those of the machine.
    """
    return _SHUFFLES * tasks_here * (3 * tasks + 9)


def _write_settings(tasks: int) -> str:
    """Writes the configuration of a Flink inside the job server; it is deleted when this process ends."""
    folder = tempfile.mkdtemp(prefix="diptych-flink-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    size = max(_FEWEST_BUFFERS, num_buffers(tasks, tasks)) * _BUFFER_BYTES
    lines = [f"taskmanager.memory.network.{bound}: {size}b\n" for bound in ("min", "max")]
    Path(folder, "config.yaml").write_text("".join(lines), encoding="utf-8")
    return folder


def size_for_flink(pipeline: beam.Pipeline, num_shards: int) -> None:
    """Gives a job on a Flink cluster a task for each shard, but no more than there are slots and network buffers for.

    Raises:
        OptionError: No cluster answers, or it has no slot.
    """
    options = pipeline.options.view_as(FlinkRunnerOptions)
    master = _cluster_of(pipeline)
    if master is None or options.parallelism > 0:
        return
    machines = _machines(master)
    free = sum(slots for slots, _ in machines)
    if not free:
        raise OptionError(
            f"--flink_master {master} has no slot for a task. Start a task manager, or wait until one has come up or "
            "another job has ended."
        )
    tasks = wanted = max(1, min(free, num_shards))
    while tasks > 1 and any(num_buffers(tasks, min(slots, tasks)) > has for slots, has in machines if slots):
        tasks -= 1
    if tasks < wanted:
        console.line(
            f"{tasks} tasks run side by side; for {wanted} the task managers' network memory "
            "(taskmanager.memory.network.max) is too small."
        )
    options.parallelism = tasks


def check_flink(pipeline: beam.Pipeline) -> None:
    """Checks, before anything is written, that the cluster that a job is for is there.

    Raises:
        OptionError: It does not answer.
    """
    if (master := _cluster_of(pipeline)) is not None:
        _machines(master)


def cancel_on_flink(pipeline: beam.Pipeline) -> None:
    """Ends a job on a Flink cluster, which would outlive the process that gave it."""
    master = _cluster_of(pipeline)
    if master is None:
        return
    name = pipeline.options.view_as(GoogleCloudOptions).job_name
    with contextlib.suppress(OptionError):
        for job in _ask(master, "jobs/overview")["jobs"]:
            if job["name"] == name:
                _ask(master, f"jobs/{job['jid']}?mode=cancel", "PATCH")


@dataclasses.dataclass
class Watch:
    """What was seen of a job that runs elsewhere.

    Attributes:
        error: Why it was ended: what a second try of its tasks cannot mend; None where it was not.
    """

    error: DiptychError | None = None


@contextlib.contextmanager
def report_restarts(
    pipeline: beam.Pipeline,
    reason: Callable[[str], str],
    permanent: Callable[[str], DiptychError | None] = lambda trace: None,
) -> Iterator[Watch]:
    """Says on standard error, while the body runs, why tasks on a Flink cluster failed that are begun again.

    A job whose tasks would fail in the same way again is ended, and the error is left in what the body gets.

    Args:
        pipeline: Of the job.
        reason: Returns what a stack trace says in a line.
        permanent: Returns the error in a stack trace that a second try cannot mend, None where there is none.
    """
    watch = Watch()
    master = _cluster_of(pipeline)
    if master is None:
        yield watch
        return
    stopped = threading.Event()
    name = pipeline.options.view_as(GoogleCloudOptions).job_name

    def look() -> None:
        told: set[int] = set()
        while watch.error is None and not stopped.wait(_ASK_EACH_S):
            for when, trace in _failures(master, name):
                if when in told:
                    continue
                told.add(when)
                if (error := permanent(trace)) is not None:
                    watch.error = error
                    cancel_on_flink(pipeline)
                    return
                console.line(f"a task failed and is begun again: {reason(trace)}")

    thread = threading.Thread(target=look, name="flink-failures", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        stopped.set()
        thread.join(1)


def _failures(master: str, name: str) -> list[tuple[int, str]]:
    """Returns when and why Flink began tasks of a job again, the latest first; nothing where it does not say."""
    with contextlib.suppress(OptionError, KeyError, TypeError):
        for job in _ask(master, "jobs/overview")["jobs"]:
            if job["name"] == name and job["state"] in ("RUNNING", "RESTARTING"):
                found = _ask(master, f"jobs/{job['jid']}/exceptions")["exceptionHistory"]["entries"]
                return [(one["timestamp"], str(one["stacktrace"])) for one in found]
    return []


def has_other_machines(pipeline: beam.Pipeline) -> bool:
    """Tells whether a job runs on a Flink cluster, by workers that are not this process's."""
    is_here = pipeline.options.view_as(PortableOptions).environment_type == "LOOPBACK"
    return _cluster_of(pipeline) is not None and not is_here


def _cluster_of(pipeline: beam.Pipeline) -> str | None:
    return _master(pipeline.options) if isinstance(pipeline.runner, FlinkRunner) else None


def _master(options: PipelineOptions) -> str | None:
    """Returns the URL of the cluster; None where Flink runs in the job server itself."""
    master = str(options.view_as(FlinkRunnerOptions).flink_master)
    return None if master in MAGIC_HOST_NAMES else FlinkRunner.add_http_scheme(master)


def _machines(master: str) -> list[tuple[int, int]]:
    """Returns free slots and network buffers of each task manager."""
    try:
        return [
            (int(one["freeSlots"]), int(one["memoryConfiguration"]["networkMemory"]) // _BUFFER_BYTES)
            for one in _ask(master, "taskmanagers")["taskmanagers"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise _no_cluster(master, error) from error


def _ask(master: str, what: str, method: str = "GET") -> Any:
    """Returns what a job manager answers.

    Raises:
        OptionError: It does not.
    """
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # as the job server asks it
    request = urllib.request.Request(f"{master}/{what}", method=method)
    try:
        with direct.open(request, timeout=_ANSWER_S) as answer:
            return json.load(answer)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _no_cluster(master, error) from error


def _no_cluster(master: str, error: Exception) -> OptionError:
    return OptionError(
        f"--flink_master {master} does not answer as a Flink cluster: {error}. Expected the address of its REST "
        "interface, such as localhost:8081: check it, and that the cluster is up."
    )
