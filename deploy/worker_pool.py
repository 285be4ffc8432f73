"""A pool of Python workers for one machine of a Flink (or Spark) cluster.

    python deploy/worker_pool.py --service_port 50000

Run it beside each task manager, in the environment that Diptych is installed in, and give jobs
`--environment_type=EXTERNAL --environment_config=localhost:50000`. It does what Apache Beam's own
`worker_pool_main` does, and mends three things of it: workers are started with this very Python
(not with whatever `python` is on PATH), what they print does not stall them, and of one that
cannot start Flink is told within a minute, with what it said, where the job would wait for ever.
"""

from __future__ import annotations

import argparse
import collections
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

from apache_beam.portability.api import beam_fn_api_pb2
from apache_beam.runners.worker.worker_pool_main import BeamFnExternalWorkerPoolServicer

START_TIMEOUT_S = 50.0
# Imports what jobs are made of, and has reached its task manager, before it says that it is there
_WORKER = """\
import os
import pipelines.model_job, pipelines.prepare
from apache_beam.runners.worker.sdk_worker import SdkHarness
harness = SdkHarness({control!r}, worker_id={worker!r}, state_cache_size=0, data_buffer_time_limit_ms=0)
os.write({ready}, b"ready")
os.close({ready})
harness.run()
"""


class WorkerPool(BeamFnExternalWorkerPoolServicer):
    """Starts a process for each worker that the cluster asks for, and says so where it cannot."""

    def StartWorker(
        self, start_worker_request: beam_fn_api_pb2.StartWorkerRequest, unused_context: object
    ) -> beam_fn_api_pb2.StartWorkerResponse:
        """Starts a worker; returns when it is ready, or with an error."""
        worker = start_worker_request.worker_id
        process, failure = _start(start_worker_request.control_endpoint.url, worker)
        if failure:
            return beam_fn_api_pb2.StartWorkerResponse(
                error=f"the Python worker {worker} {failure}. Check that {sys.executable} has Diptych and all that it "
                "needs, and that the task manager can be reached from here; what it printed is in this pool's log."
            )
        self._worker_processes[worker] = process
        return beam_fn_api_pb2.StartWorkerResponse()


def _start(control: str, worker: str) -> tuple[subprocess.Popen[str], str | None]:
    """Starts a process; returns it with what kept it from being ready, None where nothing did."""
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
    said: collections.deque[str] = collections.deque(maxlen=1)
    assert process.stdout is not None
    reader = threading.Thread(target=_pass_on, args=(process.stdout, said), daemon=True)
    reader.start()
    word = _first_word(read_end)
    os.close(read_end)
    if word == b"ready":
        return process, None
    if word is None:
        process.kill()
    code = process.wait()
    reader.join(1)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    why = f"was not ready in {START_TIMEOUT_S:.0f} s" if word is None else how
    return process, f"{why}. Its last words: {said[0] if said else 'it printed nothing'}"


def _first_word(read_end: int) -> bytes | None:
    """Returns what the process says first, nothing where it ends without a word, None where the time runs out."""
    os.set_blocking(read_end, False)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            return os.read(read_end, 16)
        except BlockingIOError:
            time.sleep(0.02)
    return None


def _pass_on(output: IO[str], said: collections.deque[str]) -> None:
    with output:
        for line in output:
            if line.strip():
                said.append(line.strip()[:500])
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
        with socket.create_server(("", options.service_port)):  # gRPC would share it with another pool
            pass
        address, server = WorkerPool.start(use_process=True, port=options.service_port)
    except (OSError, RuntimeError) as error:
        print(f"{parser.prog}: port {options.service_port} cannot be opened: {error}", file=sys.stderr)
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
