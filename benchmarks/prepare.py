"""Speed and memory of `diptych prepare` beside the practical limit of the machine.

    python benchmarks/prepare.py --photos PHOTOS

The limit is a process for each core that does nothing but read, decode, resize, encode and write, with the same
settings (`limit` below). It comes twice: `plain`, the libraries as anyone would call them, and `tuned`, which also
reuses its buffers and shrinks in two steps, as Diptych does. All run in turn as whole processes on the same
WebDataset shards, made from the JPEGs below PHOTOS by repeating them. Printed are whole-process rates, the marginal
rate (the slope between the smaller and the larger number of images: what a long run has), the start-up (the
intercept), and the peak memory at several sizes.
"""

import argparse
import io
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SHARD_ROWS = 500
SIZE_PX, QUALITY = 224, 95
COMMANDS = ("diptych", "plain", "tuned")


class Run(NamedTuple):
    """One whole-process run."""

    wall_s: float
    cpu_s: float
    peak_mb: float


def make_shards(photos: Path, folder: Path, num_rows: int) -> None:
    """Writes shards of `SHARD_ROWS` photos, repeated in one shuffled order under keys of their own."""
    files = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        sys.exit(f"{photos} holds no JPEG. --photos names a folder of photos.")
    random.Random(0).shuffle(files)
    folder.mkdir(parents=True)
    for shard in range(num_rows // SHARD_ROWS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for row in range(shard * SHARD_ROWS, (shard + 1) * SHARD_ROWS):
                path = files[row % len(files)]
                for extension, data in (("jpg", path.read_bytes()), ("txt", f"photo {path.stem}".encode())):
                    member = tarfile.TarInfo(f"{row:06d}_{path.stem}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def limit(job: tuple[str, str, bool]) -> int:
    """Decodes, resizes, encodes and writes one shard, and nothing else: no hashes, no checks, no rejects, no sync."""
    import cv2
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import simplejpeg

    cv2.setNumThreads(0)
    shard, output, tuned = job
    buffer = np.empty(64 << 20, np.uint8) if tuned else None
    double = np.empty((2 * SIZE_PX, 2 * SIZE_PX, 3), np.uint8)
    keys, captions, images = [], [], []
    with tarfile.open(shard) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            data = file.read()
            if member.name.endswith(".txt"):
                captions.append(data.decode())
                continue
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            scale = next((s for s in (1, 2, 4) if min(height, width) * s >= 16 * SIZE_PX), 8)
            pixels = simplejpeg.decode_jpeg(
                data,
                "RGB",
                min_height=-(-height * scale // 8),
                min_width=-(-width * scale // 8),
                min_factor=1,
                buffer=buffer,
            )
            if tuned and max(pixels.shape) <= 3 * SIZE_PX:
                pixels = cv2.resize(pixels, (2 * SIZE_PX, 2 * SIZE_PX), double)
            pixels = cv2.resize(pixels, (SIZE_PX, SIZE_PX), interpolation=cv2.INTER_AREA)
            images.append(simplejpeg.encode_jpeg(pixels, QUALITY, "RGB", "420", False))
            keys.append(member.name[:-4])
    table = pa.table({"key": keys, "image": images, "caption": captions})
    pq.write_table(table, os.path.join(output, os.path.basename(shard)[:-4] + ".parquet"), compression="none")
    return len(keys)


def run_limit(shards: str, output: str, tuned: bool) -> None:
    """Runs `limit` over a folder of shards in a process for each core."""
    os.makedirs(output, exist_ok=True)
    jobs = [(os.path.join(shards, name), output, tuned) for name in sorted(os.listdir(shards))]
    with multiprocessing.Pool(len(os.sched_getaffinity(0))) as pool:
        print(sum(pool.imap_unordered(limit, jobs)))


def run(command: Sequence[str]) -> Run:
    """Runs a command to its end; peak memory is that of its largest process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - start
    if status:
        sys.exit(f"{' '.join(command)} failed with status {status}")
    return Run(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def measure(
    scratch: Path, sizes: Sequence[int], repeats: int, names: Sequence[str]
) -> dict[tuple[str, int], list[Run]]:
    """Runs the commands in turn, each time into an empty folder."""
    runs: dict[tuple[str, int], list[Run]] = {}
    for _ in range(repeats):
        for num_rows in sizes:
            shards = str(_first_shards(scratch, num_rows))
            for name in names:
                output = str(scratch / "out")
                commands = {
                    "diptych": [
                        *(sys.executable, "-m", "diptych", "prepare", "--quiet"),
                        *("--input", shards, "--output", output),
                    ],
                    "plain": [sys.executable, __file__, "--limit", "plain", shards, output],
                    "tuned": [sys.executable, __file__, "--limit", "tuned", shards, output],
                }
                runs.setdefault((name, num_rows), []).append(run(commands[name]))
                shutil.rmtree(output)
    return runs


def _first_shards(scratch: Path, num_rows: int) -> Path:
    folder = scratch / f"first-{num_rows}"
    if not folder.exists():
        folder.mkdir()
        for path in sorted((scratch / "shards").iterdir())[: num_rows // SHARD_ROWS]:
            (folder / path.name).symlink_to(path)
    return folder


def report(runs: dict[tuple[str, int], list[Run]], small: int, large: int) -> None:
    """Prints rates, their ratio, and start-up."""
    wall = {key: statistics.median(r.wall_s for r in value) for key, value in runs.items()}
    slope = {name: (large - small) / (wall[name, large] - wall[name, small]) for name in COMMANDS}
    print(f"medians of {len(runs['diptych', large])} runs in turn, {len(os.sched_getaffinity(0))} cores\n")
    print(
        "               marginal images/s   start-up s   whole run images/s at "
        + f"{small}, {large}   CPU ms/image"
    )
    for name in COMMANDS:
        label = name if name == "diptych" else f"limit, {name}"
        startup_s = wall[name, small] - small / slope[name]
        cpu_ms = [statistics.median(r.cpu_s for r in runs[name, n]) * 1e3 for n in (small, large)]
        print(
            f"{label:13}  {slope[name]:17.0f}   {startup_s:10.2f}   {small / wall[name, small]:10.0f}, "
            f"{large / wall[name, large]:6.0f}  {(cpu_ms[1] - cpu_ms[0]) / (large - small):20.2f}"
        )
    for name in COMMANDS[1:]:
        ratios = [
            (limit_large.wall_s - limit_small.wall_s) / (own_large.wall_s - own_small.wall_s)
            for limit_large, limit_small, own_large, own_small in zip(
                runs[name, large],
                runs[name, small],
                runs["diptych", large],
                runs["diptych", small],
                strict=True,
            )
        ]
        print(f"\ndiptych : limit, {name}, marginal: {slope['diptych'] / slope[name]:.3f}", end="")
        print(f" (by repetition: {', '.join(f'{ratio:.2f}' for ratio in ratios)})")
        print(
            f"diptych : limit, {name}, whole run of {large}: {wall[name, large] / wall['diptych', large]:.3f}"
        )


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, help="folder of JPEGs, searched in depth")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", default="2000,8000", help="the two sizes of the slope (default 2000,8000)")
    parser.add_argument("--memory_rows", default="1000,16000", help="sizes for peak memory; empty for none")
    parser.add_argument("--limit", nargs=3, metavar=("plain|tuned", "SHARDS", "OUT"), help="only run a limit")
    args = parser.parse_args()
    if args.limit:
        kind, shards, output = args.limit
        run_limit(shards, output, kind == "tuned")
        return
    if args.photos is None:
        parser.error("--photos is required")
    small, large = (int(value) for value in args.rows.split(","))
    memory_rows = [int(value) for value in args.memory_rows.split(",") if value]
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as temporary:
        scratch = Path(temporary)
        make_shards(args.photos, scratch / "shards", max(large, *memory_rows, 0) if memory_rows else large)
        report(measure(scratch, (small, large), args.repeats, COMMANDS), small, large)
        memory = measure(scratch, memory_rows, 1, ("diptych",))
        for num_rows in memory_rows:
            print(f"peak memory at {num_rows:6}: {memory['diptych', num_rows][0].peak_mb:.0f} MB")


if __name__ == "__main__":
    main()
