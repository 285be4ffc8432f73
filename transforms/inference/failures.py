"""How many rows a model may fail on: a bad row costs a row, a bad model must not cost all of them."""

import collections
import dataclasses
import threading
from collections.abc import Mapping
from typing import NamedTuple

import pyarrow.parquet as pq

from diptych.transforms.errors import FailureLimitError
from diptych.transforms.schemas import REASONS
from diptych.transforms.storage import input_errors, join, locate

MODEL_ERROR = "model_error"
# Before so many rows were seen, their share says nothing
_FEWEST_ROWS = 20
# While a job runs, the share is that of so many rows, those that were seen last
_RECENT_ROWS = 1000


@dataclasses.dataclass(frozen=True)
class FailureLimit:
    """The share of rows that a model may fail on.

    Attributes:
        stage: Stage of its rejects.
        max_rate: The share, 0 to 1.
    """

    stage: str
    max_rate: float

    def exceeded(self, failures: int, rows: int) -> bool:
        """Tells, while a job runs, whether a model fails on too many of some rows."""
        return failures > self.max_rate * rows and (rows >= _FEWEST_ROWS or self.max_rate == 0)

    def check_totals(self, rejected: Mapping[str, int], written: int, root: str) -> None:
        """Checks the whole, where a few rows are enough: one bad row is none too many unless it is the only one.

        Args:
            rejected: Rows rejected, by reason.
            written: Rows written.
            root: The output folder, to look there for what went wrong.

        Raises:
            FailureLimitError: The model failed on too many.
        """
        failures = rejected.get(MODEL_ERROR, 0)
        own = {reason: count for reason, count in rejected.items() if reason in REASONS[self.stage]}
        rows = written + sum(count for reason, count in own.items() if reason != "no_caption")
        if failures > self.max_rate * rows and (failures > 1 or rows == 1 or self.max_rate == 0):
            raise self.error(_first_message(root, self.stage), failures, rows)

    def error(self, first: str, failures: int, rows: int) -> FailureLimitError:
        """Returns the error to stop a job with."""
        return FailureLimitError(
            f"The model fails on {failures} of {rows} rows, more than --max_failure_rate {self.max_rate:g} of them. "
            f"The first: {first}. Mend what is wrong, with --overwrite where rows were rejected for it, or allow more."
        )


class _Counted(NamedTuple):
    """What a model made of some rows: how many, of how many it failed, and the first message."""

    rows: int
    failures: int
    first: str


class FailureCount:
    """Counts the failures of one process, in any of its threads, among the rows that it saw last.

    A model that goes bad after a million good rows is noticed as soon as one that was bad from the start.
    """

    def __init__(self, limit: FailureLimit) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._recent: collections.deque[_Counted] = collections.deque()
        self._failures = self._rows = 0

    def add(self, rows: int, messages: list[str]) -> None:
        """Counts rows, and of them those that failed.

        Raises:
            FailureLimitError: These are too many.
        """
        with self._lock:
            self._recent.append(_Counted(rows, len(messages), messages[0] if messages else ""))
            self._rows += rows
            self._failures += len(messages)
            while self._rows - self._recent[0].rows >= _RECENT_ROWS:
                oldest = self._recent.popleft()
                self._rows -= oldest.rows
                self._failures -= oldest.failures
            if messages and self._limit.exceeded(self._failures, self._rows):
                first = next(counted.first for counted in self._recent if counted.failures)
                raise self._limit.error(first, self._failures, self._rows)


def _first_message(root: str, stage: str) -> str:
    """Returns the message of the first row of a stage that the model failed on."""
    folder = join(root, "rejects", stage)
    with input_errors(folder):
        fs, path = locate(folder)
        fs.invalidate_cache(path)  # or it lists what was there before the run
        for name in sorted(name for name in fs.ls(path, detail=False) if name.endswith(".parquet")):
            with fs.open(name, "rb") as file:
                for row in pq.read_table(file, columns=["reason", "message"]).to_pylist():
                    if row["reason"] == MODEL_ERROR:
                        return str(row["message"])
    return "it is not in the rejects"
