"""What the benchmarks of runners share: a Flink cluster on this machine, and the memory of processes."""

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "deploy"))
from flink_cluster import STATE, Cluster, Shape, running
from flink_job_server import job_server_jar as job_server_jar

_MEND_S = 0.5


@contextlib.contextmanager
def flink_cluster(folder: Path, shape: Shape) -> Iterator[Cluster]:
    """Runs a cluster, in which what dies is started again."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends with this process
    stopped = threading.Event()

    def mend() -> None:
        while not stopped.wait(_MEND_S):
            for name in cluster.mend():
                print(f"{name} had ended and was started again", file=sys.stderr, flush=True)

    with running(shape, folder) as cluster:
        thread = threading.Thread(target=mend, daemon=True)
        thread.start()
        try:
            yield cluster
        finally:
            stopped.set()
            thread.join()


def pids_of(cluster: Cluster) -> dict[str, int]:
    """Returns the processes of a cluster by name."""
    found: dict[str, int] = json.loads((cluster.folder / STATE).read_text())
    return found


def trees() -> dict[int, list[int]]:
    """Returns the children of every process of this machine."""
    found: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
                found.setdefault(int(fields[1]), []).append(int(entry))
    return found


def below(pid: int) -> list[int]:
    """Returns a process and all that it has started."""
    children, found = trees(), [pid]
    for one in found:
        found += children.get(one, [])
    return found


def memory_mb(pids: list[int]) -> float:
    """Returns the memory of processes; what they share counts once (Linux's proportional set size)."""
    total_kb = 0
    for pid in pids:
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc", str(pid), "smaps_rollup").read_text().splitlines()
            total_kb += int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    return total_kb / 1024
