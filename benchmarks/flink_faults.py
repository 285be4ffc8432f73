"""What a job on a Flink cluster loses when a process of the cluster is killed: nothing, and how long it takes.

    python benchmarks/flink_faults.py

starts a standalone cluster on this machine, runs the job once undisturbed, and then once for each kill: SIGKILL, at a
random moment while it writes (when so many files of the undisturbed run's are there, from none on, and up to half a
second later), of a task manager or of a Python worker, in turn. The job has to end by itself, with the output of an
in-process run, file by file and byte by byte. Where the job manager is killed, all of a job's state goes with it: the
same command has to complete what was left.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from faults import count
from local_cluster import Cluster, Shape, flink_cluster, pids_of, trees
from runners import files_of, job_command, job_flags

from diptych.pipelines.demo_data.layouts import write_data_set
from diptych.transforms.output_layout import DATASETS

VICTIMS = ("task-manager", "worker")
_TIMEOUT_S = 600


def victim_pid(cluster: Cluster, victim: str, draw: random.Random) -> int | None:
    """Returns the process to kill; None where there is none of the kind at the moment."""
    pids = pids_of(cluster)
    if victim == "worker":
        children = trees()  # workers are forked by a child of the pool
        found = [pid for one in children.get(pids["worker-pool"], []) for pid in children.get(one, [])]
        return draw.choice(found) if found else None
    return pids[
        victim if victim == "job-manager" else f"task-manager-{draw.randint(1, cluster.shape.task_managers)}"
    ]


def wait_until_up(cluster: Cluster) -> None:
    """Waits until all slots are there again."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    url = f"http://localhost:{cluster.shape.rest_port}/overview"
    wanted = f'"slots-available":{cluster.shape.task_managers * cluster.shape.slots},'
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), opener.open(url, timeout=5) as answer:
            if wanted in answer.read().decode():
                return
        time.sleep(0.5)
    raise SystemExit("the cluster did not come back")


def run_and_kill(
    command: Sequence[str], out: Path, cluster: Cluster, victim: str, num_files: int, draw: random.Random
) -> tuple[int, float, bool]:
    """Runs a job and kills a process; returns its exit code, its seconds, and whether it was killed in time."""
    start, killed = time.perf_counter(), False
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (out.is_dir() and count_files(out) >= num_files):
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, 0.5))
        while process.poll() is None:
            if pid := victim_pid(cluster, victim, draw):
                killed = not (out / "_SUCCESS.json").exists()
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                break
        try:
            process.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            print(f"it hung for {_TIMEOUT_S} s", flush=True)
    return process.returncode, time.perf_counter() - start, killed


def count_files(out: Path) -> int:
    """Returns how many data files are there."""
    return sum(count(out / dataset) for dataset in DATASETS)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 0 if all outputs are equal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=12, help="of task managers and workers (default 12)")
    parser.add_argument("--job_manager_kills", type=int, default=2, help="(default 2)")
    parser.add_argument("--input", help="default: --rows drawn scenes, as WebDataset")
    parser.add_argument("--rows", type=int, default=8000, help="default 8000")
    parser.add_argument("--job", default="prepare", help="or embed, caption, generate, run (default prepare)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    args = parser.parse_args(argv)
    draw, passed, num_killed = random.Random(args.seed), [], 0
    with tempfile.TemporaryDirectory(prefix="bench-flink-faults-") as name:
        scratch = Path(name)
        data = args.input or write_data_set(str(scratch / "data"), args.rows, seed=0).webdataset
        job = [*job_command(args.job, data), "--chunk_rows=25", *job_flags([args.job], scratch)[args.job]]
        subprocess.run([*job, f"--output={scratch / 'local'}"], check=True)
        expected = files_of(scratch / "local")
        with flink_cluster(scratch / "cluster", Shape()) as cluster:
            out = scratch / "out"
            command = [*job, f"--output={out}", *cluster.flags()]
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            undisturbed_s = time.perf_counter() - start
            passed.append(files_of(out) == expected)
            num_files = count_files(out)
            shutil.rmtree(out)
            verdict = "equal to the in-process run's" if passed[0] else "DIFFERENT"
            print(f"undisturbed: {undisturbed_s:.1f} s, {len(expected)} files, {verdict}")
            victims = [VICTIMS[number % len(VICTIMS)] for number in range(args.kills)]
            for victim in [*victims, *["job-manager"] * args.job_manager_kills]:
                wait_until_up(cluster)
                at = draw.randrange(num_files)
                code, seconds, killed = run_and_kill(command, out, cluster, victim, at, draw)
                how = "by itself"
                if victim == "job-manager" and code:
                    how = f"by the same command, from {count_files(out)} files on"
                    wait_until_up(cluster)
                    code = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
                is_equal = not code and files_of(out) == expected
                passed.append(is_equal)
                num_killed += killed
                verdict = "equal" if is_equal else f"exit code {code}" if code else "DIFFERENT"
                when = f"killed after {at:3} files" if killed else "was done before"
                print(f"{victim:13} {when}: {seconds:6.1f} s, {how}: {verdict}", flush=True)
                shutil.rmtree(out, ignore_errors=True)
    print(f"{sum(passed)} of {len(passed)} PASS, {num_killed} of them killed while they ran")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
