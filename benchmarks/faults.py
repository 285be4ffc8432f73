"""What a kill costs `diptych prepare`: SIGKILL at many shares of a run, and the same command again.

    python benchmarks/faults.py
    python benchmarks/faults.py --twins

With `--twins` two runs of the same command are at work in one output at a time, and one or both are killed at a random
moment; the other, or the command once more, must leave an undisturbed run's bytes.

Each killed run is finished by the next, whose output is compared with an undisturbed run's, file by file and byte by
byte. The bound on the time of that next run is (1 - f) of the undisturbed one's, for the share f of the rows that was
committed, plus 10 %, plus the start-up (the time of a run of one row). What the kill left is finished several times,
on copies, each in turn with an undisturbed run and a start-up, so that all have the same machine; medians count.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from diptych.pipelines.demo_data.layouts import write_data_set


@dataclasses.dataclass
class Bench:
    """What is run, and what an undisturbed run gives.

    Attributes:
        command: The command without its output.
        folder: For outputs.
        files: Digests of an undisturbed output by name.
        num_rows: Rows read in it.
    """

    command: list[str]
    folder: Path
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    num_rows: int = 0

    def time(self, out: Path, *flags: str) -> float:
        """Runs the command to its end; returns the seconds."""
        start = time.perf_counter()
        subprocess.run([*self.command, f"--output={out}", *flags], check=True)
        return time.perf_counter() - start

    def time_undisturbed(self) -> float:
        """Makes an undisturbed run; returns the seconds."""
        out = self.folder / "undisturbed"
        seconds = self.time(out)
        files = digests(out)
        if self.files not in ({}, files):
            raise SystemExit("two undisturbed runs differ")
        self.files, self.num_rows = files, committed_rows(out)
        shutil.rmtree(out)
        return seconds

    def kill(self, out: Path, num_files: int, in_write: bool) -> bool:
        """Starts a run and kills it when so many data files are there; returns whether a write was cut off.

        Args:
            out: The output folder.
            num_files: How many data files to wait for.
            in_write: Then wait until something of the next is written.
        """
        images, scratch = out / "images", out / "_tmp"
        # In a session of its own, so that what it started is killed with it
        with subprocess.Popen([*self.command, f"--output={out}"], start_new_session=True) as process:
            while process.poll() is None and count(images) < num_files:
                time.sleep(0.001)
            while (
                in_write
                and process.poll() is None
                and not any(has_bytes(path) for path in scratch.glob("*/*"))
            ):
                pass
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        if process.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"a run ended with {process.returncode} before it was killed")
        return any(has_bytes(path) for path in scratch.glob("*/*"))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one kill.

    Attributes:
        share: Of the rows that were committed, 0 to 1.
        in_write: Whether a write was cut off.
        ratios: Seconds of each run that finished it, to those of the undisturbed run beside it.
        start_ups: The same of a run of one row.
        is_equal: Whether each gave the undisturbed output.
    """

    share: float
    in_write: bool
    ratios: list[float]
    start_ups: list[float]
    is_equal: bool

    def line(self) -> tuple[str, bool]:
        """Returns the table's line, and whether all is as it should be."""
        ratio, start_up = statistics.median(self.ratios), statistics.median(self.start_ups)
        bound = 1 - self.share + 0.1 + start_up
        passed = self.is_equal and ratio <= bound
        bytes_ = "equal" if self.is_equal else "DIFFER"
        verdict = "PASS" if passed else "FAIL"
        where = "in a write" if self.in_write else ""
        text = f"{self.share:6.2f} {ratio:9.2f} {start_up:9.2f} {bound:7.2f}   {bytes_:6}  {verdict}  {where}"
        return text.rstrip(), passed


def digests(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file by its path, and an empty one of every folder that is empty."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif not any(path.iterdir()):
            found[str(path.relative_to(folder))] = ""
    return found


def committed_rows(out: Path) -> int:
    """Returns how many rows the footers of an output's data files say were read."""
    footers = (pq.read_metadata(path).metadata[b"diptych"] for path in listed(out / "images"))
    return sum(json.loads(footer)["read"] for footer in footers)


def listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def count(folder: Path) -> int:
    return len(os.listdir(folder)) if folder.is_dir() else 0


def has_bytes(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:  # it has been renamed since it was listed
        return False


def kill_and_finish(bench: Bench, start_up: Bench, num_files: int, in_write: bool, repeats: int) -> Outcome:
    out = bench.folder / "killed"
    was_in_write = bench.kill(out, num_files, in_write)
    share = committed_rows(out) / bench.num_rows
    ratios, start_ups, is_equal = [], [], True
    for _ in range(repeats):
        copy = bench.folder / "copy"
        shutil.copytree(out, copy)
        undisturbed_s = bench.time_undisturbed()
        ratios.append(bench.time(copy) / undisturbed_s)
        start_ups.append(start_up.time_undisturbed() / undisturbed_s)
        is_equal = is_equal and digests(copy) == bench.files
        shutil.rmtree(copy)
    shutil.rmtree(out)
    return Outcome(share, was_in_write, ratios, start_ups, is_equal)


def kill_until_done(bench: Bench) -> tuple[int, bool]:
    """Kills every run of one output after two more files, until one is done before; returns how many it took."""
    out = bench.folder / "again_and_again"
    kills = 0
    while not (out / "_SUCCESS.json").exists():
        bench.kill(out, count(out / "images") + 2, in_write=kills % 2 == 1)
        kills += 1
    bench.time(out)
    return kills, digests(out) == bench.files


def run_twins(bench: Bench, kills: int, seed: int) -> bool:
    """Kills one or both of two runs in one output, again and again; returns whether all ended with the right bytes."""
    draw = random.Random(seed)
    undisturbed_s = bench.time_undisturbed()
    print(f"{bench.num_rows} rows; undisturbed {undisturbed_s:.1f} s", flush=True)
    passed = []
    for number in range(kills):
        out = bench.folder / "twins"
        command = [*bench.command, f"--output={out}"]
        processes = [
            subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE) for _ in range(2)
        ]
        time.sleep(draw.uniform(0, 1.5 * undisturbed_s))
        victims = draw.choice([processes[:1], processes[1:], processes])
        for process in victims:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        outputs = [process.communicate(timeout=60 + 10 * undisturbed_s)[1] for process in processes]
        codes = [process.returncode for process in processes]
        is_finished = any(code == 0 for code in codes)
        if not is_finished:
            bench.time(out)
        is_equal = digests(out) == bench.files
        others = [code for process, code in zip(processes, codes, strict=True) if process not in victims]
        passed.append(is_equal and not any(others))
        share = f"{len(victims)} of 2 killed, codes {codes}"
        print(
            f"{number + 1:3}  {share}  bytes {'equal' if is_equal else 'DIFFER'}  {'PASS' if passed[-1] else 'FAIL'}"
        )
        if not passed[-1]:
            print(b"\n".join(outputs).decode(errors="replace")[-2000:])
        shutil.rmtree(out)
    print(f"{sum(passed)} of {len(passed)} PASS", flush=True)
    return all(passed)


COMMAND = [sys.executable, "-m", "diptych", "prepare", "--quiet"]


def run(bench: Bench, start_up: Bench, kills: int, repeats: int) -> bool:
    undisturbed_s = bench.time_undisturbed()
    num_files = sum(name.startswith("images/") for name in bench.files)
    print(f"{bench.num_rows} rows, {num_files} files; undisturbed {undisturbed_s:.1f} s", flush=True)
    outcomes = []
    for number in range(kills):
        at = max(1, round(num_files * (number + 0.5) / kills))
        outcomes.append(kill_and_finish(bench, start_up, at, in_write=number % 3 == 2, repeats=repeats))
        print(f"\r{number + 1} of {kills} kills", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print("killed at    rerun  start-up   bound   bytes")
    print("     f      (shares of the undisturbed time)")
    lines = [outcome.line() for outcome in sorted(outcomes, key=lambda outcome: outcome.share)]
    print("\n".join(line for line, _ in lines))
    passed = [exceeded for _, exceeded in lines]
    tries, is_equal = kill_until_done(bench)
    print(f"killed {tries - 1} times in one output: bytes {'equal' if is_equal else 'DIFFER'}")
    passed.append(is_equal)
    out = bench.folder / "repeated"
    bench.time(out, "--direct_runner_bundle_repeat=2")
    passed.append(digests(out) == bench.files)
    print(f"--direct_runner_bundle_repeat=2: bytes {'equal' if passed[-1] else 'DIFFER'}")
    print(f"{sum(passed)} of {len(passed)} PASS")
    return all(passed)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="how many (default 20)")
    parser.add_argument("--rows", type=int, default=5000, help="of the input that is drawn (default 5000)")
    parser.add_argument("--input", help="another input (default: drawn scenes, as WebDataset)")
    parser.add_argument("--chunk_rows", type=int, default=100, help="rows a file (default 100)")
    parser.add_argument("--repeats", type=int, default=3, help="runs whose median is taken (default 3)")
    parser.add_argument(
        "--twins", action="store_true", help="two runs of the command in one output at a time"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments of --twins (default 0)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="diptych-faults-") as name:
        folder = Path(name)
        one = write_data_set(str(folder / "one"), 10, seed=0).webdataset / "val-00000.tar"
        data = args.input or write_data_set(str(folder / "data"), args.rows, seed=0).webdataset
        start_up = Bench([*COMMAND, f"--input={one}"], folder)
        bench = Bench([*COMMAND, f"--input={data}", f"--chunk_rows={args.chunk_rows}"], folder)
        if args.twins:
            return 0 if run_twins(bench, args.kills, args.seed) else 1
        return 0 if run(bench, start_up, args.kills, args.repeats) else 1


if __name__ == "__main__":
    sys.exit(main())
