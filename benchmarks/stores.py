"""`diptych prepare` from and to disk, Google Cloud Storage and S3, and what a bad day of a store costs it.

    python benchmarks/stores.py --data DATA

copies DATA into a bucket of an emulator of each store, and prepares it from each place to each. Then each bucket is
read and written through a proxy that refuses, resets or cuts off `--failing` of the requests and never answers
`--hanging` of them. All nine outputs, and those of the bad days, are compared with that from disk to disk, file by file
and byte by byte. Printed are seconds, and what a bad day takes to a good one through the same proxy. The bound on that:
an image that is late is asked for again after a second while others come, so all of those together may take half of the
good day's time again; any other request (listings, plans, commits) is given up after
`SILENCE_S` seconds (`diptych.models.files.object_stores`) where it hung, and asked for again after two where it failed.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import fsspec

from diptych.models.files.object_stores import SILENCE_S
from diptych.pipelines.demo_data.layouts import write_data_set

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from emulators import environment, free_port, gcs_emulator, make_bucket, s3_emulator
from flaky_proxy import FlakyProxy

STORES = ("gs", "s3")
# What the clients wait before they ask again, at first
BACK_OFF_S = 2.0


@dataclasses.dataclass(frozen=True)
class Store:
    """A bucket of an emulator, and the proxy before that."""

    bucket: str
    proxy: FlakyProxy


@contextlib.contextmanager
def stores(scratch: Path) -> Iterator[dict[str, Store]]:
    """Runs an emulator of each store behind a proxy; this process and its children ask the proxies."""
    with contextlib.ExitStack() as stack:
        found = {}
        for name in STORES:
            port = free_port()
            emulator = gcs_emulator(scratch / "gcs.log", free_port(), port) if name == "gs" else s3_emulator()
            proxy = FlakyProxy(stack.enter_context(emulator))
            stack.enter_context(proxy.serve(port))
            os.environ.update(environment(f"http://127.0.0.1:{port}", name))
            found[name] = Store(make_bucket(proxy.target, name), proxy)
        fsspec.config.set_conf_env(fsspec.config.conf)
        yield found


def upload(folder: Path, url: str) -> None:
    """Copies the files of a folder to a store."""
    fs, path = fsspec.core.url_to_fs(url)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            fs.pipe_file(f"{path}/{file.relative_to(folder)}", file.read_bytes())


def prepare(source: str, output: str, flags: Sequence[str]) -> float:
    """Runs the job in a process of its own; returns the seconds."""
    command = [sys.executable, "-m", "diptych", "prepare", "--quiet", *flags]
    start = time.perf_counter()
    subprocess.run([*command, f"--input={source}", f"--output={output}"], check=True)
    return time.perf_counter() - start


def output_digests(url: str) -> Mapping[str, str]:
    """Returns the digests of an output's files by name; a folder that is empty is none, as stores have it."""
    fs, path = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    start = len(path.rstrip("/")) + 1
    return {name[start:]: hashlib.sha256(fs.cat_file(name)).hexdigest() for name in sorted(fs.find(path))}


def compare_places(data: Path, scratch: Path, found: Mapping[str, Store], flags: Sequence[str]) -> bool:
    """Prepares the data from each place to each; returns whether all outputs are equal."""
    inputs = {"disk": str(data), **{name: f"{store.bucket}/{data.name}" for name, store in found.items()}}
    roots = {"disk": str(scratch), **{name: store.bucket for name, store in found.items()}}
    expected: Mapping[str, str] = {}
    all_equal = True
    print("from   to       seconds   output")
    for source, url in inputs.items():
        for target, root in roots.items():
            output = f"{root}/from-{source}"
            seconds = prepare(url, output, flags)
            digests = output_digests(output)
            expected = expected or digests
            is_equal = digests == expected
            all_equal = all_equal and is_equal
            verdict = f"{len(digests)} files, {'equal' if is_equal else 'DIFFERENT'}"
            print(f"{source:6} {target:6} {seconds:9.1f}   {verdict}", flush=True)
    return all_equal


def have_bad_day(
    name: str, store: Store, data: str, failing: float, hanging: float, flags: Sequence[str]
) -> bool:
    """Prepares the data from a store to itself on a good day and on a bad one; returns whether all is well."""
    source = f"{store.bucket}/{data}"
    good_s = prepare(source, f"{store.bucket}/good", flags)
    store.proxy.requests.clear()
    store.proxy.failing, store.proxy.hanging = failing, hanging
    bad_s = prepare(source, f"{store.bucket}/bad", flags)
    store.proxy.failing = store.proxy.hanging = 0.0
    requests = list(store.proxy.requests)
    is_equal = output_digests(f"{store.bucket}/bad") == output_digests(f"{store.bucket}/good")
    fates = collections.Counter(fate for fate, _, _ in requests)
    others = [fate for fate, method, path in requests if not (method == "GET" and path.endswith(".jpg"))]
    hung, failed = fates["hanging"], len(requests) - fates["passed"] - fates["hanging"]
    bound_s = 1.5 * good_s + SILENCE_S * others.count("hanging")
    bound_s += BACK_OFF_S * (len(others) - others.count("hanging") - others.count("passed"))
    passed = is_equal and bad_s <= bound_s
    print(
        f"{name}: {len(requests)} requests, {failed} failed, {hung} hung: {bad_s:.1f} s against "
        f"{good_s:.1f} s ({bad_s / good_s:.1f} times; bound {bound_s:.0f} s), output "
        f"{'equal' if is_equal else 'DIFFERENT'}: {'PASS' if passed else 'FAIL'}",
        flush=True,
    )
    return passed


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 0 if all is as it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="folder of any data set (default: 500 drawn scenes, as COCO)"
    )
    parser.add_argument("--failing", type=float, default=0.05, help="share of requests (default 0.05)")
    parser.add_argument("--hanging", type=float, default=0.01, help="share of requests (default 0.01)")
    parser.add_argument("--chunk_rows", default="50", help="rows a file (default 50)")
    args = parser.parse_args(argv)
    flags = [f"--chunk_rows={args.chunk_rows}"]
    with tempfile.TemporaryDirectory(prefix="diptych-stores-") as name, stores(Path(name)) as found:
        scratch = Path(name)
        data = args.data.resolve() if args.data else write_data_set(str(scratch / "data"), 500, seed=0).coco
        for store in found.values():
            upload(data, f"{store.bucket}/{data.name}")
        passed = [compare_places(data, scratch, found, flags)]
        for place, store in found.items():
            passed.append(have_bad_day(place, store, data.name, args.failing, args.hanging, flags))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
