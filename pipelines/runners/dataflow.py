"""What a job asks of Google Cloud Dataflow: GPUs where a model wants one, one copy of it a GPU, and no main session."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    StandardOptions,
    WorkerOptions,
)

from diptych.pipelines.runners.flink import Watch
from diptych.transforms.errors import DiptychError, OptionError

# Threads of a worker with a GPU: one chunk is in the model, the others are read, decoded and written
_GPU_WORKER_THREADS = 4
_ASK_EACH_S = 10.0


def is_dataflow(args: Sequence[str]) -> bool:
    """Tells whether flags for Apache Beam name Dataflow as the runner."""
    runner = PipelineOptions(list(args)).view_as(StandardOptions).runner
    return str(runner).lower().endswith("dataflowrunner")


def dataflow_flags(args: Sequence[str]) -> list[str]:
    """Returns flags that any job on Dataflow needs and that were not given.

    Args:
        args: Flags for Apache Beam.
    """
    given = {arg.split("=")[0] for arg in args}
    if not is_dataflow(args) or not given.isdisjoint(("--save_main_session", "--no_save_main_session")):
        return []
    return ["--no_save_main_session"]  # all of it can be imported


@contextlib.contextmanager
def ended_on_dataflow(
    result: Any, permanent: Callable[[str], DiptychError | None], watch: Watch
) -> Iterator[None]:
    """Ends a job on Dataflow, while the body waits for it, where no second try of a bundle can mend its failure.

    Dataflow tries each four times, which may be an hour of machines.

    Args:
        result: Of the run; nothing is done for that of another runner.
        permanent: Returns the error in a message that a second try cannot mend, None where there is none.
        watch: Gets the error.
    """
    if type(result).__name__ != "DataflowPipelineResult" or not result.has_job:
        yield
        return
    stopped = threading.Event()

    def look() -> None:
        since = None
        while not stopped.wait(_ASK_EACH_S):
            with contextlib.suppress(Exception):  # of a client that has many; the body meets what lasts
                for message in _error_messages(result, since):
                    since = message.time
                    if (error := permanent(message.message_text)) is not None:
                        watch.error = error
                        result.cancel()
                        return

    thread = threading.Thread(target=look, name="dataflow-errors", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(1)


def _error_messages(result: Any, since: Any) -> Iterator[Any]:
    page = None
    while True:
        messages, page = result._runner.dataflow_client.list_messages(
            result.job_id(), start_time=since, page_token=page, minimum_importance="JOB_MESSAGE_ERROR"
        )
        yield from messages
        if not page:
            return


def gpu_flags(args: Sequence[str], gpu: str) -> list[str]:
    """Returns flags for workers with a GPU, and that were not given.

    Args:
        args: Flags for Apache Beam.
        gpu: Type of the GPU, as Compute Engine calls it.

    Raises:
        OptionError: It is asked for elsewhere, without a container that can use it, or in Beam's own words as well.
    """
    if not is_dataflow(args):
        raise OptionError(
            f"--gpu {gpu} is for workers of Dataflow, and --runner names another runner. Elsewhere a model takes the "
            "GPU that its machine has: leave the flag out, and see --device."
        )
    options = PipelineOptions(list(args))
    services = options.view_as(GoogleCloudOptions).dataflow_service_options or []
    if any(service.startswith("worker_accelerator") for service in services):
        raise OptionError(
            f"--gpu {gpu} and --dataflow_service_options=worker_accelerator=… say the same. Give one of them."
        )
    if not options.view_as(WorkerOptions).sdk_container_image:
        raise OptionError(
            f"--gpu {gpu} needs workers with CUDA and Diptych in them. Build deploy/Dockerfile, push it, and name it "
            "with --sdk_container_image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/diptych:TAG."
        )
    given = {arg.split("=")[0] for arg in args}
    wanted = [f"--dataflow_service_options=worker_accelerator=type:{gpu};count:1;install-nvidia-driver"]
    if not options.view_as(DebugOptions).lookup_experiment("no_use_multiple_sdk_containers"):
        # one process a worker, so one copy of the model a GPU
        wanted.append("--experiments=no_use_multiple_sdk_containers")
    if "--number_of_worker_harness_threads" not in given:
        wanted.append(f"--number_of_worker_harness_threads={_GPU_WORKER_THREADS}")
    if "--sdk_location" not in given:
        wanted.append("--sdk_location=container")
    return wanted
