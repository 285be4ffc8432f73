"""COCO's size through a Flink cluster: seconds, and the memory of every process while it runs.

    python benchmarks/flink_coco.py --photos PHOTOS

makes an annotation of 118,000 images and 600,000 captions, whose images are links to the JPEGs below PHOTOS in turn,
starts a standalone cluster on this machine with nothing set by hand, and prepares it all there. Printed is the memory
of each process (proportional set size) as the run goes on: it must not grow with what has been done. In the end
`diptych verify` proves the output.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from faults import count
from local_cluster import Cluster, Shape, below, flink_cluster, memory_mb, pids_of, trees
from plan import make_coco

_DIPTYCH = [sys.executable, "-m", "diptych"]


def sample(launcher: int, cluster: Cluster) -> dict[str, float]:
    """Returns the memory in MB of each process by name."""
    found = {"launcher": memory_mb([launcher]), "job server": memory_mb(below(launcher)[1:])}
    for name, pid in pids_of(cluster).items():
        found[name] = memory_mb([pid])
    children = trees()
    helpers = children.get(pids_of(cluster)["worker-pool"], [])
    found["what forks workers"] = memory_mb(helpers)
    for number, pid in enumerate((pid for helper in helpers for pid in children.get(helper, [])), 1):
        found[f"worker-{number}"] = memory_mb([pid])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 0 if the output is whole."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True, help="folder of JPEGs, searched in depth")
    parser.add_argument("--num_images", type=int, default=118_000)
    parser.add_argument("--num_captions", type=int, default=600_000)
    parser.add_argument("--slots", type=int, default=1, help="of each of the two task managers (default 1)")
    parser.add_argument("--sample_s", type=float, default=10.0, help="between two samples (default 10)")
    args = parser.parse_args(argv)
    photos = sorted(path for path in args.photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not photos:
        parser.error(f"--photos {args.photos} holds no JPEG")
    with tempfile.TemporaryDirectory(prefix="bench-flink-coco-") as name:
        scratch = Path(name)
        (scratch / "coco").mkdir()
        make_coco(scratch / "coco", args.num_images, args.num_captions, photos)
        annotation, output = scratch / "coco/annotations/captions_train2017.json", scratch / "out"
        with flink_cluster(scratch / "cluster", Shape(slots=args.slots)) as cluster:
            command = [*_DIPTYCH, "prepare", f"--input={annotation}", f"--output={output}", *cluster.flags()]
            start, samples = time.perf_counter(), []
            with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
                while process.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(args.sample_s)
                    if process.poll() is None:
                        samples.append(
                            (
                                time.perf_counter() - start,
                                count(output / "images"),
                                sample(process.pid, cluster),
                            )
                        )
            seconds = time.perf_counter() - start
        if process.returncode:
            sys.exit(f"the job failed with status {process.returncode}")
        print(f"{args.num_images} images in {seconds:.0f} s: {args.num_images / seconds:.0f} a second")
        report(samples)
        return subprocess.run([*_DIPTYCH, "verify", str(output)], check=False).returncode


def report(samples: Sequence[tuple[float, int, dict[str, float]]]) -> None:
    """Prints the memory of each process at quarters of the run, and the most it had."""
    quarters = [samples[min(len(samples) - 1, round((len(samples) - 1) * part / 4))] for part in range(5)]
    print(
        "MB of                " + "".join(f"{seconds:7.0f} s" for seconds, _, _ in quarters) + "       most"
    )
    print("files written        " + "".join(f"{files:9}" for _, files, _ in quarters))
    for name in dict.fromkeys(name for _, _, found in samples for name in found):
        parts = "".join(f"{found.get(name, 0):9.0f}" for _, _, found in quarters)
        print(f"{name:21}{parts}{max(found.get(name, 0) for _, _, found in samples):11.0f}")


if __name__ == "__main__":
    sys.exit(main())
