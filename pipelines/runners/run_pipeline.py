"""Running a graph: the runner's options, progress on the terminal, errors as one paragraph, the summary."""

import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from tqdm import tqdm

from diptych.models.errors import one_line
from diptych.models.files.location import redacted
from diptych.pipelines.runners.dataflow import dataflow_flags, ended_on_dataflow
from diptych.pipelines.runners.flink import (
    cancel_on_flink,
    check_flink,
    flink_flags,
    report_restarts,
    size_for_flink,
)
from diptych.pipelines.terminal.console import console
from diptych.transforms import errors
from diptych.transforms.progress import Snapshot, progress


def new_pipeline(beam_args: Sequence[str]) -> beam.Pipeline:
    """Returns an empty pipeline for the runner that the flags name, else for the in-process one.

    Raises:
        OptionError: There is no such runner, or it needs other flags.
    """
    args = list(beam_args)
    if not any(arg.split("=")[0] == "--runner" for arg in args):
        args.append(
            "--runner=FnApiRunner"
        )  # plain DirectRunner may look for another runner on the network first
    try:
        pipeline = beam.Pipeline(options=PipelineOptions([*args, *flink_flags(args), *dataflow_flags(args)]))
    except ValueError as error:
        raise errors.OptionError(f"Apache Beam refuses its flags: {one_line(error, 1000)}") from error
    check_flink(pipeline)
    os.rmdir(
        pipeline.local_tempdir
    )  # for transforms in other languages; else every run would leave it behind
    return pipeline


def run_pipeline(pipeline: beam.Pipeline, num_shards: int, quiet: bool) -> None:
    """Runs a pipeline to its end.

    Raises:
        DiptychError: What a worker raised, as it raised it.
    """
    size_for_flink(pipeline, num_shards)
    progress.start()
    with show_progress(num_shards, quiet), report_restarts(pipeline, _reason, _permanent_error) as watch:
        try:
            result = pipeline.run()
            with ended_on_dataflow(result, _permanent_error, watch):
                result.wait_until_finish()
        except KeyboardInterrupt:
            cancel_on_flink(pipeline)
            raise
        except errors.DiptychError as error:
            raise type(error)(_STEP.sub("", str(error))) from error
        except Exception as error:
            if watch.error is not None:
                raise watch.error from error
            if found := _worker_error(str(error)) or _runner_error(pipeline, error):
                raise found from error
            raise


_STEP = re.compile(r" \[while running \\?'[^']*'\]")
_WORKER_ERROR = re.compile(r"transforms\.errors\.(\w+): (.*)")


def _worker_error(text: str) -> errors.DiptychError | None:
    """Returns the project's own error in the text of a runner's, which holds the worker's traceback."""
    lines = _STEP.sub("", text.replace("\\n", "\n"))  # a runner may quote it
    found = _WORKER_ERROR.findall(lines)
    if not found:
        return None
    name, message = found[-1]
    return getattr(errors, name, errors.DiptychError)(message)


def _permanent_error(text: str) -> errors.DiptychError | None:
    """Returns the project's own error in the text of a runner's where a second try cannot mend it, else None."""
    error = _worker_error(text)
    return error if error is not None and error.is_permanent else None


def _reason(trace: str) -> str:
    """Returns what the stack trace of a runner says in a line."""
    if error := _worker_error(trace):
        return str(error)
    causes = re.findall(r"^Caused by: (.*)", trace, re.M)
    return redacted((causes or trace.strip().splitlines() or ["it does not say why"])[-1])[:1000]


def _runner_error(pipeline: beam.Pipeline, error: Exception) -> errors.DiptychError | None:
    """Returns what a runner outside this process says about itself; None of an error in the job's own code."""
    if isinstance(pipeline.runner, FnApiRunner) or "Traceback" in str(error):
        return None
    what = one_line(error, 500)
    return errors.DiptychError(
        f"{type(pipeline.runner).__name__} failed: {what}. Check its flags, and that it is there and has room; what "
        "was committed stays, and the same command goes on from there."
    )


@contextmanager
def show_progress(num_shards: int, quiet: bool) -> Iterator[None]:
    """Shows progress on standard error while the body runs: a bar on a terminal, else a line now and then."""
    if quiet:
        yield
        return
    stopped = threading.Event()
    show = _show_bar if console.stream.isatty() else _show_lines
    thread = threading.Thread(target=show, name="progress", args=(num_shards, stopped), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


_LINE_S = 10.0


def _show_bar(num_shards: int, stopped: threading.Event) -> None:
    start = time.monotonic()
    layout = "{percentage:3.0f}%|{bar:20}| {desc}"
    size = os.get_terminal_size(console.stream.fileno())
    columns, lines = size.columns or 80, size.lines or 24  # 0 where nobody set them, and nothing would show
    bar_of = {"bar_format": layout, "leave": False, "ncols": columns, "nrows": lines}
    with tqdm(total=num_shards, file=console.stream, **bar_of) as bar:
        while not stopped.wait(0.2):
            now = progress.snapshot()
            bar.n = round(now.shards, 3)
            bar.set_description_str(_describe(now, num_shards, time.monotonic() - start))


def _show_lines(num_shards: int, stopped: threading.Event) -> None:
    start = time.monotonic()
    while not stopped.wait(_LINE_S):
        text = _describe(progress.snapshot(), num_shards, time.monotonic() - start)
        console.line(text)


def _describe(now: Snapshot, num_shards: int, elapsed_s: float) -> str:
    rate = (now.rows - now.resumed) / elapsed_s
    text = f"{int(now.shards)}/{num_shards} shards, {now.rows:,} rows, {rate:,.0f} rows/s, {now.rejects:,} rejects"
    if now.resumed:
        text += f", {now.resumed:,} from before"
    if now.shards > 0.02 and rate:
        left_s = elapsed_s * (num_shards - now.shards) / now.shards
        text += f", {int(left_s // 60)}:{int(left_s % 60):02d} left"
    return text
