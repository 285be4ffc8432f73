"""A standalone Flink cluster on this machine: a job manager, task managers, and a pool of Python workers.

    python deploy/flink_cluster.py

starts it from packages alone (`pip install '.[flink]'` brings Flink's jars, Java 11 or 17 must be
there), waits until it is healthy, prints the flags that a job needs, and keeps it running: what
dies is started again, as a cluster's own manager would. Ctrl-C or SIGTERM stops it. It is what the
tests break on purpose, and a pattern for a real cluster: the same settings, a pool beside each task
manager.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

from flink_job_server import JobServerError, job_server_jar

from diptych.pipelines.runners.flink import num_buffers

START_TIMEOUT_S = 120.0
_CHECK_S = 0.5
_MOST_STARTS = 20
_STOP_TIMEOUT_S = 10.0
STATE = "processes.json"

# MiB of a task manager, for each of its slots where that is said. The images go through the Python
# workers alone, and all of a job's shuffles carry names and counts: little of this grows with the data.
_FRAMEWORK_HEAP, _FRAMEWORK_OFF_HEAP = 128, 128
_HEAP_A_SLOT, _MANAGED_A_SLOT = 192, 64
_METASPACE, _OVERHEAD = 256, 128

# Flink looks into the JDK's own classes, which Java 17 no longer allows without being asked
_OPENED = (
    "java.base/java.lang java.base/java.lang.reflect java.base/java.net java.base/java.io java.base/java.nio "
    "java.base/sun.nio.ch java.base/java.text java.base/java.time java.base/java.util java.base/java.util.concurrent "
    "java.base/java.util.concurrent.atomic java.base/java.util.concurrent.locks"
)


class ClusterError(RuntimeError):
    """The cluster cannot be started; the message says why and what to do, in one paragraph."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a cluster is made of.

    Attributes:
        task_managers: How many.
        slots: Of each: tasks that it runs side by side.
        rest_port: Of the job manager, which jobs are given to.
        worker_port: Of the pool of Python workers.
    """

    task_managers: int = 2
    slots: int = 1
    rest_port: int = 8081
    worker_port: int = 50000


class Cluster:
    """The processes of a cluster.

    Attributes:
        shape: What it is made of.
        folder: Its configuration and logs.
    """

    def __init__(self, shape: Shape, folder: pathlib.Path) -> None:
        self.shape, self.folder = shape, folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: dict[str, list[str]] = {}
        self._num_starts: collections.Counter[str] = collections.Counter()

    def start(self) -> None:
        """Starts all of it, and waits until it is healthy.

        Raises:
            ClusterError: Something is missing, or died, or was not healthy in time.
        """
        lib = _flink_lib()
        if shutil.which("java") is None:
            raise ClusterError(
                "`java` was not found on PATH. Flink needs a Java 11 or 17 runtime: install it."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        for log in self.folder.glob("*.log"):  # of an earlier cluster
            log.unlink()
        for port in (self.shape.rest_port, self.shape.rest_port + 1, self.shape.worker_port):
            _check_free(port)
        settings = _settings(self.shape, self.folder)
        (self.folder / "config.yaml").write_text(
            "".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items()), encoding="utf-8"
        )
        _write_log_settings(self.folder)
        java = ["java", f"-Dlog4j.configurationFile={self.folder / 'log4j.properties'}", *_open_flags()]
        classes = ["-cp", os.pathsep.join(str(jar) for jar in sorted(lib.glob("*.jar")))]
        conf = ["--configDir", str(self.folder)]
        entry = "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint"
        self._commands["job-manager"] = [*java, "-Xmx512m", *classes, entry, *conf]
        heap = _FRAMEWORK_HEAP + self.shape.slots * _HEAP_A_SLOT
        direct = _FRAMEWORK_OFF_HEAP + _network(self.shape)
        limits = [
            f"-Xmx{heap}m",
            f"-XX:MaxDirectMemorySize={direct}m",
            f"-XX:MaxMetaspaceSize={_METASPACE}m",
        ]
        for number in range(1, self.shape.task_managers + 1):
            runner = "org.apache.flink.runtime.taskexecutor.TaskManagerRunner"
            self._commands[f"task-manager-{number}"] = [*java, *limits, *classes, runner, *conf]
        pool = pathlib.Path(__file__).with_name("worker_pool.py")
        port = str(self.shape.worker_port)
        self._commands["worker-pool"] = [sys.executable, str(pool), "--service_port", port]
        for name in self._commands:
            self._launch(name)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_healthy():
            dead = next((name for name, process in self._running.items() if process.poll() is not None), None)
            if dead or time.monotonic() > deadline:
                what = (
                    f"its {dead} ended at once" if dead else f"it was not healthy in {START_TIMEOUT_S:.0f} s"
                )
                raise ClusterError(
                    f"the Flink cluster did not start: {what}. {_last_words(self.folder, dead or 'job-manager')} "
                    f"The logs are in {self.folder}."
                )
            time.sleep(_CHECK_S)

    def flags(self) -> list[str]:
        """Returns the flags with which a job of Diptych runs here."""
        return [
            "--runner=FlinkRunner",
            f"--flink_master=localhost:{self.shape.rest_port}",
            f"--flink_job_server_jar={job_server_jar()}",
            "--environment_type=EXTERNAL",
            f"--environment_config=localhost:{self.shape.worker_port}",
        ]

    def mend(self) -> list[str]:
        """Starts again what has ended; returns the names.

        Raises:
            ClusterError: It has ended too often.
        """
        dead = [name for name, process in self._running.items() if process.poll() is not None]
        for name in dead:
            self._num_starts[name] += 1
            if self._num_starts[name] > _MOST_STARTS:
                raise ClusterError(
                    f"its {name} ended {_MOST_STARTS} times. {_last_words(self.folder, name)} The logs are in "
                    f"{self.folder}."
                )
            self._launch(name)
        return dead

    def stop(self) -> None:
        """Stops all of it."""
        for process in self._running.values():
            process.terminate()
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        for process in self._running.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()

    def _launch(self, name: str) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:  # the one before it says why it ended
            self._running[name] = subprocess.Popen(
                self._commands[name], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        state = {name: process.pid for name, process in self._running.items()}
        partial = self.folder / f".{STATE}"
        partial.write_text(json.dumps(state), encoding="utf-8")
        partial.replace(self.folder / STATE)

    def _is_healthy(self) -> bool:
        overview = _ask(f"http://localhost:{self.shape.rest_port}/overview")
        pool = (self.folder / "worker-pool.log").read_text(encoding="utf-8", errors="replace")
        wanted = self.shape.task_managers * self.shape.slots
        return overview.get("slots-total") == wanted and "workers are started at" in pool


def _check_free(port: int) -> None:
    try:
        with socket.create_server(("", port)):
            pass
    except OSError as error:
        raise ClusterError(
            f"port {port} cannot be opened: {error.strerror}. Another cluster may be up: stop it, or name other ports "
            "with --rest_port (which takes the one after it as well) and --worker_port."
        ) from error


def _flink_lib() -> pathlib.Path:
    spec = importlib.util.find_spec("pyflink")
    for place in (spec.submodule_search_locations or []) if spec else []:
        lib = pathlib.Path(place, "lib")
        if any(lib.glob("flink-dist-*.jar")):
            return lib
    raise ClusterError("Flink's jars are not installed. They come with `pip install 'diptych[flink]'`.")


def _network(shape: Shape) -> int:
    """Returns the MiB of network buffers, of 32 KiB each, with which a job may use all slots."""
    return max(64, -(-num_buffers(shape.task_managers * shape.slots, shape.slots) // 32))


def _settings(shape: Shape, folder: pathlib.Path) -> Mapping[str, object]:
    """Returns Flink's configuration; what a task manager's start script would work out is said here."""
    memory = {
        "framework.heap.size": _FRAMEWORK_HEAP,
        "framework.off-heap.size": _FRAMEWORK_OFF_HEAP,
        "task.heap.size": shape.slots * _HEAP_A_SLOT,
        "task.off-heap.size": 0,
        "managed.size": shape.slots * _MANAGED_A_SLOT,
        "network.min": _network(shape),
        "network.max": _network(shape),
        "jvm-metaspace.size": _METASPACE,
        "jvm-overhead.min": _OVERHEAD,
        "jvm-overhead.max": _OVERHEAD,
    }
    return {
        # whoever reaches one of these ports can run anything, and Flink's own default is all addresses
        "jobmanager.bind-host": "localhost",
        "taskmanager.bind-host": "localhost",
        "rest.bind-address": "localhost",
        "jobmanager.rpc.address": "localhost",
        "jobmanager.rpc.port": shape.rest_port + 1,
        "rest.address": "localhost",
        "rest.port": shape.rest_port,
        "taskmanager.host": "localhost",
        "taskmanager.numberOfTaskSlots": shape.slots,
        "taskmanager.cpu.cores": float(shape.slots),
        **{f"taskmanager.memory.{name}": f"{value}m" for name, value in memory.items()},
        # ms: a task manager that was killed is missed in seconds
        "heartbeat.interval": 2_000,
        "heartbeat.timeout": 10_000,
        # for jobs that do not say it themselves
        "restart-strategy.type": "exponential-delay",
        "restart-strategy.exponential-delay.attempts-before-reset-backoff": 10,
        "io.tmp.dirs": str(folder / "tmp"),
    }


def _write_log_settings(folder: pathlib.Path) -> None:
    (folder / "tmp").mkdir(exist_ok=True)
    (folder / "log4j.properties").write_text(
        "rootLogger.level = INFO\nrootLogger.appenderRef.console.ref = Console\n"
        "appender.console.name = Console\nappender.console.type = CONSOLE\n"
        "appender.console.layout.type = PatternLayout\n"
        "appender.console.layout.pattern = %d{HH:mm:ss,SSS} %-5p %c{1} %m%n\n",
        encoding="utf-8",
    )


def _open_flags() -> list[str]:
    return [f"--add-opens={name}=ALL-UNNAMED" for name in _OPENED.split()]


def _ask(url: str) -> dict[str, object]:
    """Returns what a server of this machine answers, nothing where it does not; no proxy is asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            found: dict[str, object] = json.load(answer)
            return found
    except (OSError, urllib.error.URLError, ValueError):
        return {}


def _last_words(folder: pathlib.Path, name: str) -> str:
    lines = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").split("\n")
    wrong = [line for line in lines if line.startswith("Caused by: ") or "Error: " in line]
    return (wrong or lines[-2:])[-1].strip()[:500]


@contextlib.contextmanager
def running(shape: Shape, folder: pathlib.Path) -> Iterator[Cluster]:
    """Starts a cluster, and stops it when the body is left.

    Raises:
        ClusterError: It does not start.
    """
    cluster = Cluster(shape, folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class _Stop(Exception):
    """The command was told to stop."""


def _on_signal(number: int, frame: FrameType | None) -> None:
    raise _Stop


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a cluster until it is told to stop.

    Args:
        argv: The command line without the program's name; the process's own where `None`.

    Returns:
        The exit code: 0 stopped, 1 not started.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, metavar="N")
    parser.add_argument(
        "--folder", type=pathlib.Path, help="configuration and logs (default: a temporary one)"
    )
    options = vars(parser.parse_args(argv))
    folder = options.pop("folder") or pathlib.Path(tempfile.mkdtemp(prefix="diptych-flink-"))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _on_signal)
    try:
        with running(Shape(**options), folder.resolve()) as cluster:
            print(" ".join(cluster.flags()), flush=True)
            print(
                f"is what a job needs to run here. Logs: {cluster.folder}. Ctrl-C stops it.", file=sys.stderr
            )
            while True:
                time.sleep(_CHECK_S)
                for name in cluster.mend():
                    print(f"{name} had ended and was started again", file=sys.stderr, flush=True)
    except _Stop:
        return 0
    except (ClusterError, JobServerError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
