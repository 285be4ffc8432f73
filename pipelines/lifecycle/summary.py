"""What a run did, in a few lines for people or in one for machines."""

import dataclasses
import json

from diptych.models.files.location import redacted
from diptych.pipelines.lifecycle.output_folder import State
from diptych.pipelines.lifecycle.result import Result
from diptych.transforms.errors import NothingWritten
from diptych.transforms.progress import progress
from diptych.transforms.storage import join

_UNITS = {"embeddings": "captions", "generated": "images"}


def summary(result: Result, seconds: float) -> str:
    """Returns read, written, rejected by reason, seconds, rows a second, and where it all is."""
    if not result.ran:
        return "translated, and not run, as --dry_run asks"
    lines, output = [], redacted(result.output)
    for dataset, totals in result.totals.items():
        unit = _UNITS.get(dataset, "rows")
        lines += [
            f"read      {totals.read:,} {unit}",
            f"written   {totals.written:,} to {join(output, dataset)}",
        ]
        if totals.rejected:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(totals.rejected.items()))
            lines.append(
                f"rejected  {sum(totals.rejected.values()):,} to {join(output, 'rejects')}: {reasons}"
            )
        else:
            lines.append("rejected  0")
        lines += [
            f"          {name.replace('_', ' ')} {count:,}" for name, count in sorted(totals.counters.items())
        ]
    if result.state is State.DONE:
        lines.append("nothing to do: an earlier run has finished this")
        return "\n".join(lines)
    now, first = progress.snapshot(), next(iter(result.totals))
    unit = _UNITS.get(first, "rows")
    before = f"; {now.resumed:,} {unit} were there from before" if now.resumed else ""
    # What workers in other processes did is not seen from here
    seen = now.rows == result.totals[first].read
    rate = f", {(now.rows - now.resumed) / seconds:,.0f} {unit}/s" if seen else ""
    lines.append(f"took      {seconds:.1f} s{rate}{before}")
    return "\n".join(lines)


def summary_json(result: Result, seconds: float) -> str:
    """Returns the same as one line of JSON.

    It has `outcome` (`done`, `nothing_to_do` where an earlier run has finished, `translated` with `--dry_run`),
    `output`, `seconds`, and by data set of `datasets` the totals of `_SUCCESS.json`.
    """
    outcome = "nothing_to_do" if result.state is State.DONE else "done" if result.ran else "translated"
    datasets = {dataset: dataclasses.asdict(totals) for dataset, totals in result.totals.items()}
    return _line(outcome, result.output, seconds, datasets=datasets)


def failure_json(output: str, seconds: float, error: BaseException, stopped: bool) -> str:
    """Returns the line of a run that did not succeed; `error` says why.

    Its `outcome` is `stopped` by a signal, `nothing_written` where rows were read and all were rejected, or `failed`.
    """
    if stopped:
        return _line(
            "stopped", output, seconds, error="stopped by a signal; the same command goes on from here"
        )
    outcome = "nothing_written" if isinstance(error, NothingWritten) else "failed"
    return _line(outcome, output, seconds, error=redacted(str(error)) or type(error).__name__)


def _line(outcome: str, output: str, seconds: float, **more: object) -> str:
    return json.dumps({"outcome": outcome, "output": redacted(output), "seconds": round(seconds, 1), **more})
