"""The services of conftest.py do what the other tests take for granted."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import apache_beam as beam
import fsspec
import pytest
from apache_beam.options.pipeline_options import PipelineOptions

if TYPE_CHECKING:
    from conftest import Bucket, Command

ELEMENT_BYTES = 100_000


def _draw_bytes(index: int) -> tuple[int, bytes]:
    return index, bytes([index % 256]) * ELEMENT_BYTES


class _WriteFile(beam.DoFn):
    def __init__(self, output: str) -> None:
        self._output = output

    def process(self, element: tuple[int, bytes]) -> None:
        index, data = element
        with fsspec.open(f"{self._output}/{index:03d}.json", "w") as file:
            json.dump({"pid": os.getpid(), "bytes": len(data)}, file)


def _run_job(output: str, num_elements: str, *arguments: str) -> None:
    """The job that a subprocess runs: draws bytes and writes what it saw of them, a file each."""
    print(os.getpid())
    with beam.Pipeline(options=PipelineOptions(arguments)) as pipeline:
        _ = (
            pipeline
            | beam.Create(range(int(num_elements)))  # type: ignore[no-untyped-call]
            | beam.Reshuffle()  # type: ignore[no-untyped-call]
            | beam.Map(_draw_bytes)  # type: ignore[no-untyped-call]
            | beam.ParDo(_WriteFile(output))  # type: ignore[no-untyped-call]
        )


def test_gcs_serves_plain_urls_in_this_process(gcs: Bucket) -> None:
    data = os.urandom(20 << 20)
    files = fsspec.filesystem("gs")
    files.pipe_file(f"{gcs.url}/a/large.bin", data)
    with fsspec.open(f"{gcs.url}/a/b/small.txt", "w") as file:
        file.write("words")
    assert files.cat_file(f"{gcs.url}/a/large.bin") == data
    assert files.cat_file(f"{gcs.url}/a/large.bin", 7_000_000, 7_000_010) == data[7_000_000:7_000_010]
    with fsspec.open(f"gcs://{gcs.url.removeprefix('gs://')}/a/large.bin") as file:
        file.seek(-10, os.SEEK_END)
        assert file.read() == data[-10:]
    root = gcs.url.removeprefix("gs://")
    assert files.find(gcs.url) == [f"{root}/a/b/small.txt", f"{root}/a/large.bin"]
    files.rm(f"{gcs.url}/a", recursive=True)
    assert not files.exists(f"{gcs.url}/a/large.bin")
    assert files.find(gcs.url) == []


def test_gcs_serves_plain_urls_in_a_subprocess(gcs: Bucket, run_command: Command) -> None:
    command = [sys.executable, __file__, f"{gcs.url}/out", "5", "--runner=FnApiRunner"]
    done = run_command(command, env=gcs.env)
    assert done.returncode == 0, done.stderr
    files = fsspec.filesystem("gs")
    written = [json.loads(files.cat_file(name)) for name in files.find(f"{gcs.url}/out")]
    assert [record["bytes"] for record in written] == [ELEMENT_BYTES] * 5


@pytest.mark.parametrize("test", ["first", "second"])
def test_gcs_starts_empty(gcs: Bucket, test: str) -> None:
    files = fsspec.filesystem("gs")
    assert files.find(gcs.url) == []
    files.pipe_file(f"{gcs.url}/same_name", test.encode())
    assert files.cat_file(f"{gcs.url}/same_name") == test.encode()


def test_gcs_leaves_no_trace() -> None:
    assert "STORAGE_EMULATOR_HOST" not in os.environ
    assert "gs" not in fsspec.config.conf


def test_run_command_ends_children_too(run_command: Command, tmp_path: pathlib.Path) -> None:
    held = tmp_path / "held"
    os.mkfifo(held)
    reader = os.open(held, os.O_RDONLY | os.O_NONBLOCK)
    child = f"sleep 60 > {held} 2>&1 &"
    with pytest.raises(subprocess.TimeoutExpired):
        run_command(["sh", "-c", f"{child} wait"], timeout_s=1)
    assert _is_released(reader)
    with pytest.raises(AssertionError, match="left processes behind"):
        run_command(["sh", "-c", child])
    assert _is_released(reader)
    os.close(reader)


def _is_released(reader: int) -> bool:
    """Waits for a named pipe's last writer to go, which a dead process has done, even unreaped."""
    for _ in range(100):
        with contextlib.suppress(BlockingIOError):
            return os.read(reader, 1) == b""
        time.sleep(0.05)
    return False


if __name__ == "__main__":
    _run_job(*sys.argv[1:])
