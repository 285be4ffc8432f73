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

Whoever a worker listens to has it run whatever they like, as the user of the pool. So the pool listens on the loopback
only, and starts workers only for task managers of this machine. Where they are on others, name the address to listen on
and each of their hosts, in a network that nobody else can send from:

    python deploy/worker_pool.py --bind 10.0.0.5 --allow 10.0.0.6 --allow task-manager-2
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ipaddress
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import grpc
from apache_beam.portability.api import beam_fn_api_pb2, beam_fn_api_pb2_grpc
from apache_beam.runners.worker.sdk_worker import SdkHarness
from apache_beam.runners.worker.worker_pool_main import BeamFnExternalWorkerPoolServicer
from apache_beam.utils import thread_pool_executor

START_TIMEOUT_S = 50.0
_TIDY_S = 5.0
_FORKS = multiprocessing.get_context("forkserver")
_IMPORTED = ["__main__", "diptych.pipelines.lifecycle.model_job", "diptych.pipelines.prepare"]


class WorkerPool(BeamFnExternalWorkerPoolServicer):
    """Starts a process for each worker that the cluster asks for, and says so where it cannot.

    Args:
        allowed: Hosts, beside this machine's loopback, that may ask for workers and that workers may listen to.
    """

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        super().__init__(use_process=True)
        self._allowed = allowed

    def StartWorker(
        self, start_worker_request: beam_fn_api_pb2.StartWorkerRequest, context: grpc.ServicerContext | None
    ) -> beam_fn_api_pb2.StartWorkerResponse:
        """Starts a worker; returns when it is ready, or with an error."""
        worker = start_worker_request.worker_id
        hosts = [host_of(endpoint) for endpoint in _endpoints(start_worker_request)]
        if context is not None:
            hosts.append(peer_of(context.peer()))
        if foreign := [host for host in dict.fromkeys(hosts) if not is_allowed(host, self._allowed)]:
            return beam_fn_api_pb2.StartWorkerResponse(
                error=f"the Python worker {worker} was not started: it would run what {', '.join(foreign)} sends, "
                "which this pool does not know. Where that is a task manager of yours, start the pool with "
                + " ".join(f"--allow {host}" for host in foreign)
                + "."
            )
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


def _endpoints(request: beam_fn_api_pb2.StartWorkerRequest) -> list[str]:
    """Returns the addresses that a request names."""
    named = (
        request.control_endpoint,
        request.logging_endpoint,
        request.artifact_endpoint,
        request.provision_endpoint,
    )
    return [endpoint.url for endpoint in named if endpoint.url]


def host_of(endpoint: str) -> str:
    """Returns the host of an address as gRPC writes it: `HOST:PORT`, `[IPv6]:PORT` or `SCHEME:///HOST:PORT`."""
    host, colon, port = endpoint.rpartition("/")[2].rpartition(":")
    host = host if colon and port.isdigit() else endpoint
    return host.removeprefix("[").removesuffix("]")


def peer_of(peer: str) -> str:
    """Returns the host of who asks, as gRPC names it: `ipv4:HOST:PORT`, or `ipv6:%5BHOST%5D:PORT`."""
    kind, _, endpoint = urllib.parse.unquote(peer).partition(":")
    return host_of(endpoint) if kind in ("ipv4", "ipv6") else peer


def is_allowed(host: str, allowed: Iterable[str]) -> bool:
    """Tells whether a host is this machine's loopback, or is among those that are allowed, by any of its addresses.

    A name counts as its addresses, all of them: `localhost.example.org` is not the loopback.
    """
    addresses = _addresses(host)
    known = set().union(*map(_addresses, allowed))
    return bool(addresses) and all(address.is_loopback or address in known for address in addresses)


def _addresses(host: str) -> set[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):  # no such host
        return set()
    addresses = {ipaddress.ip_address(text.partition("%")[0]) for text in found}
    return {getattr(address, "ipv4_mapped", None) or address for address in addresses}


def _work(control: str, worker: str, ready: Connection, output: Connection) -> None:
    """Is a worker, until its task manager hangs up: what it is at then is nobody's any more."""
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    sys.stdout.reconfigure(line_buffering=True)
    import diptych.pipelines.lifecycle.model_job
    import diptych.pipelines.prepare  # noqa: F401  # where that fails, the pool learns of it now

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
        The exit code: 0 stopped, 1 the port is taken, 2 the command line is wrong.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--service_port", type=int, default=50000, metavar="PORT")
    parser.add_argument(
        "--bind", default="localhost", metavar="HOST", help="address to listen on (default localhost)"
    )
    text = "a host whose task managers may have workers, beside this one; may repeat"
    parser.add_argument("--allow", action="append", default=[], metavar="HOST", help=text)
    options = parser.parse_args(argv)
    for host in options.allow:
        if not _addresses(host):
            parser.error(f"--allow {host} is no host that is known here. Expected a name or an address.")
    if not options.allow and not is_allowed(options.bind, ()):
        parser.error(
            f"--bind {options.bind} listens to other machines, and none is allowed. Name each host that task managers "
            "run on with --allow HOST: whoever is listened to can run anything here."
        )
    try:
        _check_free(options.bind, options.service_port)
        # workers share the cores; PyTorch's threads would wait for each other at full speed
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        _FORKS.set_forkserver_preload(_IMPORTED)
        first = _FORKS.Process(target=_nothing, daemon=True)
        first.start()  # all is imported before the first job comes
        first.join()
        if first.exitcode:
            raise RuntimeError(f"a first process ended with exit code {first.exitcode}")
        server = _serve(WorkerPool(options.allow), options.bind, options.service_port)
    except (EOFError, OSError, RuntimeError) as error:
        print(f"{parser.prog}: the pool cannot start: {error or type(error).__name__}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that its workers end with it
    print(f"workers are started at {options.bind}:{options.service_port}", flush=True)
    try:
        server.wait_for_termination()
    except KeyboardInterrupt:
        server.stop(0)
    return 0


def _check_free(bind: str, port: int) -> None:
    """Checks that nobody listens there: gRPC would share the port with another pool.

    Raises:
        OSError: Somebody does, or the address is not this machine's.
    """
    try:
        family = socket.getaddrinfo(bind, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((bind, port), family=family).close()
    except OSError as error:
        raise OSError(f"port {port} cannot be opened: {error}") from error


def _serve(pool: WorkerPool, bind: str, port: int) -> grpc.Server:
    """Serves a pool; Beam's own `start` listens on all addresses."""
    settings = [("grpc.http2.max_pings_without_data", 0), ("grpc.http2.max_ping_strikes", 0)]
    server = grpc.server(thread_pool_executor.shared_unbounded_instance(), options=settings)
    beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server(pool, server)
    server.add_insecure_port(f"[{bind}]:{port}" if ":" in bind else f"{bind}:{port}")
    server.start()
    return server


if __name__ == "__main__":
    sys.exit(main())
