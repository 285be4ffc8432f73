"""A pool of Python workers for one machine of a Flink (or Spark) cluster.

    python deploy/worker_pool.py --service_port 50000

Run it beside each task manager, in the environment that Diptych is installed in, and give jobs
`--environment_type=EXTERNAL --environment_config=localhost:50000`. It does what Apache Beam's own
`worker_pool_main` does, and mends five things of it: workers are started with this very Python (not
with whatever `python` is on PATH), and in no time, as forks of a process that has imported what jobs
are made of (Flink wants new ones for every stage); what they print does not stall them; of one that
cannot start Flink is told within a minute, with what it said, where the job would wait for ever; and
a worker ends with its task manager: those that share a pool give their workers the same names, so
that by name one would stop another's. Start the pool anew when Diptych was upgraded: it has imported what was there.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from apache_beam.portability.api import beam_fn_api_pb2
from apache_beam.runners.worker.sdk_worker import SdkHarness
from apache_beam.runners.worker.worker_pool_main import BeamFnExternalWorkerPoolServicer

START_TIMEOUT_S = 50.0
_TIDY_S = 5.0
_FORKS = multiprocessing.get_context("forkserver")
_IMPORTED = ["__main__", "pipelines.model_job", "pipelines.prepare"]


class WorkerPool(BeamFnExternalWorkerPoolServicer):
    """Starts a process for each worker that the cluster asks for, and says so where it cannot."""

    def StartWorker(
        self, start_worker_request: beam_fn_api_pb2.StartWorkerRequest, unused_context: object
    ) -> beam_fn_api_pb2.StartWorkerResponse:
        """Starts a worker; returns when it is ready, or with an error."""
        worker = start_worker_request.worker_id
        try:
            _, failure = _start(start_worker_request.control_endpoint.url, worker)
        except (OSError, EOFError) as error:
            failure = f"could not be forked ({type(error).__name__}: {error})"
        if failure:
            return beam_fn_api_pb2.StartWorkerResponse(
                error=f"the Python worker {worker} {failure}. Check that {sys.executable} has Diptych and all that it "
                "needs, and that the task manager can be reached from here; what it printed is in this pool's log."
            )
        return beam_fn_api_pb2.StartWorkerResponse()

    def StopWorker(
        self, stop_worker_request: beam_fn_api_pb2.StopWorkerRequest, unused_context: object
    ) -> beam_fn_api_pb2.StopWorkerResponse:
        """Leaves it to the worker, whose task manager has hung up or is about to."""
        return beam_fn_api_pb2.StopWorkerResponse()


def _work(control: str, worker: str, ready: Connection, output: Connection) -> None:
    """Is a worker, until its task manager hangs up: what it is at then is nobody's any more."""
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    sys.stdout.reconfigure(line_buffering=True)
    import pipelines.model_job
    import pipelines.prepare  # noqa: F401  # where that fails, the pool learns of it now

    harness = SdkHarness(control, worker_id=worker, state_cache_size=0, data_buffer_time_limit_ms=0)
    ready.send_bytes(b"ready")
    ready.close()
    running = threading.Thread(target=harness.run, daemon=True)
    running.start()
    pool = multiprocessing.parent_process()
    while running.is_alive() and not harness._alive:
        time.sleep(0.01)
    # without the pool nobody reads what is printed, and Beam does not answer for work whose error it cannot print
    while running.is_alive() and harness._alive and not (pool and wait([pool.sentinel], 0.2)):
        pass
    if not harness._alive:
        running.join(_TIDY_S)
    os._exit(0)


def _nothing() -> None:
    """Is a process that has nothing to do."""


def _start(control: str, worker: str) -> tuple[BaseProcess, str | None]:
    """Starts a worker; returns its process with what kept it from being ready, None where nothing did."""
    heard, ready = _FORKS.Pipe(duplex=False)
    printed, output = _FORKS.Pipe(duplex=False)
    process = _FORKS.Process(target=_work, args=(control, worker, ready, output), daemon=True)
    process.start()
    ready.close()
    output.close()
    said: collections.deque[str] = collections.deque(maxlen=1)
    reader = threading.Thread(target=_pass_on, args=(printed, said), daemon=True)
    reader.start()
    has_word = heard.poll(START_TIMEOUT_S)
    try:
        if has_word and heard.recv_bytes():
            return process, None
    except EOFError:  # it ended without a word
        pass
    finally:
        heard.close()
    if not has_word:
        process.kill()
    process.join()
    reader.join(1)
    code = process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    why = how if has_word else f"was not ready in {START_TIMEOUT_S:.0f} s"
    return process, f"{why}. Its last words: {said[0] if said else 'it printed nothing'}"


def _pass_on(printed: Connection, said: collections.deque[str]) -> None:
    """Copies what a worker prints to the pool's log, and keeps its last line."""
    with os.fdopen(os.dup(printed.fileno()), errors="replace") as lines:
        printed.close()
        for line in lines:
            if line.strip():
                said.append(line.strip()[:500])
            with contextlib.suppress(OSError):  # a full disk: read on, or the worker is stalled
                sys.stderr.write(line)


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until it is told to stop.

    Args:
        argv: The command line without the program's name; the process's own where `None`.

    Returns:
        The exit code: 0 stopped, 1 the port is taken.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--service_port", type=int, default=50000, metavar="PORT")
    options = parser.parse_args(argv)
    try:
        try:
            socket.create_server(("", options.service_port)).close()  # gRPC would share it with another pool
        except OSError as error:
            raise OSError(f"port {options.service_port} cannot be opened: {error}") from error
        # workers share the cores; PyTorch's threads would wait for each other at full speed
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        _FORKS.set_forkserver_preload(_IMPORTED)
        first = _FORKS.Process(target=_nothing, daemon=True)
        first.start()  # all is imported before the first job comes
        first.join()
        if first.exitcode:
            raise RuntimeError(f"a first process ended with exit code {first.exitcode}")
        address, server = WorkerPool.start(use_process=True, port=options.service_port)
    except (EOFError, OSError, RuntimeError) as error:
        print(f"{parser.prog}: the pool cannot start: {error or type(error).__name__}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that its workers end with it
    print(f"workers are started at {address}", flush=True)
    try:
        server.wait_for_termination()
    except KeyboardInterrupt:
        server.stop(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
