"""A pool of Python workers for one machine of a Flink (or Spark) cluster.

    python deploy/worker_pool.py --service_port 50000

Run it beside each task manager, in the environment that Diptych is installed in, and give jobs
`--environment_type=EXTERNAL --environment_config=localhost:50000`. It does what Apache Beam's own
`worker_pool_main` does, and mends three things of it: workers are started with this very Python
(not with whatever `python` is on PATH), what they print does not stall them, and one that cannot
start fails its job within a minute, with what it said, where the job would wait for ever.
"""

from __future__ import annotations

import argparse
import collections
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

from apache_beam.portability.api import beam_fn_api_pb2
from apache_beam.runners.worker.worker_pool_main import BeamFnExternalWorkerPoolServicer

START_TIMEOUT_S = 50.0
_LAST_LINES = 20
# Imports what jobs are made of before it says that it is there
_WORKER = """\
import os, sys
import pipelines, transforms
from apache_beam.runners.worker.sdk_worker import SdkHarness
os.write({ready}, b"ready")
os.close({ready})
SdkHarness({control!r}, worker_id={worker!r}, state_cache_size=0, data_buffer_time_limit_ms=0).run()
"""


class WorkerPool(BeamFnExternalWorkerPoolServicer):
    """Starts a process for each worker that the cluster asks for, and says so where it cannot."""

    def StartWorker(
        self, start_worker_request: beam_fn_api_pb2.StartWorkerRequest, unused_context: object
    ) -> beam_fn_api_pb2.StartWorkerResponse:
        """Starts a worker; returns when it is ready, or with an error."""
        worker = start_worker_request.worker_id
        process, said, ready = _start(start_worker_request.control_endpoint.url, worker)
        self._worker_processes[worker] = process
        if not ready:
            self._worker_processes.pop(worker, None)
            process.kill()
            code = process.wait()
            why = f"ended with exit code {code}" if code >= 0 else f"was not ready in {START_TIMEOUT_S:.0f} s"
            last = "".join(said).strip() or "it printed nothing"
            return beam_fn_api_pb2.StartWorkerResponse(
                error=f"the Python worker {worker} {why}. Its last words: {last}. Check that {sys.executable} has "
                "Diptych and all that it needs: start this pool with the Python that has."
            )
        return beam_fn_api_pb2.StartWorkerResponse()


def _start(control: str, worker: str) -> tuple[subprocess.Popen[str], collections.deque[str], bool]:
    """Starts a process; returns it with its last lines and whether it is ready."""
    read_end, write_end = os.pipe()
    code = _WORKER.format(ready=write_end, control=control, worker=worker)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=[write_end],
    )
    os.close(write_end)
    said: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
    assert process.stdout is not None
    reader = threading.Thread(target=_pass_on, args=(process.stdout, said), daemon=True)
    reader.start()
    ready = _is_ready(read_end)
    os.close(read_end)
    if not ready and process.poll() is not None:
        reader.join(1)
    return process, said, ready


def _is_ready(read_end: int) -> bool:
    """Waits for the word, for the process to end without it, or for the time to run out."""
    os.set_blocking(read_end, False)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            return os.read(read_end, 16) == b"ready"  # empty: the other end was closed
        except BlockingIOError:
            time.sleep(0.02)
    return False


def _pass_on(output: IO[str], said: collections.deque[str]) -> None:
    for line in output:
        said.append(line)
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
        address, server = WorkerPool.start(use_process=True, port=options.service_port)
    except RuntimeError as error:
        print(f"{parser.prog}: port {options.service_port} cannot be opened: {error}", file=sys.stderr)
        return 1
    print(f"workers are started at {address}", flush=True)
    try:
        server.wait_for_termination()
    except KeyboardInterrupt:
        server.stop(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
