"""The end of a job: counts are added up, checked, and written as `_SUCCESS.json`, the last file of all."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

import apache_beam as beam
from apache_beam.pvalue import PCollection

from transforms.chunk import add_counts
from transforms.errors import InputError, OutputError
from transforms.failures import FailureLimit
from transforms.sink import Commit
from transforms.storage import delete, input_errors, is_absence, join, locate, write_whole

SUCCESS = "_SUCCESS.json"
# What a run needs only until it is done
_WORKING = ("_plan", "_tmp")


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over the commits of a data set.

    Attributes:
        shards: Shards that are complete.
        files: Data files.
        read: Rows read.
        written: Rows written.
        rejected: Rows rejected, by reason.
        counters: What the transforms did, by name.
    """

    shards: int = 0
    files: int = 0
    read: int = 0
    written: int = 0
    rejected: Mapping[str, int] = dataclasses.field(default_factory=dict)
    counters: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def add(self, commit: Commit) -> "Totals":
        """Returns the totals with one more commit."""
        rejected = self.rejected
        for reasons in commit.rejected.values():
            rejected = add_counts(rejected, reasons)
        return Totals(
            self.shards + commit.last,
            self.files + 1,
            self.read + commit.read,
            self.written + commit.written,
            rejected,
            add_counts(self.counters, commit.counters),
        )

    def merge(self, other: "Totals") -> "Totals":
        """Returns the sum of two totals."""
        return Totals(
            self.shards + other.shards,
            self.files + other.files,
            self.read + other.read,
            self.written + other.written,
            add_counts(self.rejected, other.rejected),
            add_counts(self.counters, other.counters),
        )

    def problem(self, num_shards: int) -> str | None:
        """Returns what is wrong with these totals for a job of `num_shards` shards, or None."""
        if self.shards != num_shards:
            return f"{self.shards} of {num_shards} shards are complete"
        rejects = sum(self.rejected.values())
        if self.read != self.written + rejects:
            return f"{self.read} rows were read, but {self.written} written and {rejects} rejected"
        return None


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the commits of a data set must come to.

    Attributes:
        num_shards: How many shards there are.
        counters: What planning counted.
        limit: How many rows its model may have failed on.
    """

    num_shards: int
    counters: Mapping[str, int] = dataclasses.field(default_factory=dict)
    limit: FailureLimit | None = None


@dataclasses.dataclass(eq=False)  # not frozen: Beam labels its transforms
class FinishJob(beam.PTransform[PCollection[Commit], PCollection[dict[str, Totals]]]):
    """Commits of all data sets of a job to `_SUCCESS.json`.

    Attributes:
        root: The output folder.
        expected: By data set.
    """

    root: str
    expected: Mapping[str, Expected]

    def expand(self, commits: PCollection[Commit]) -> PCollection[dict[str, Totals]]:
        """Adds up, checks, writes."""
        return (
            commits
            | "Count" >> beam.Map(_count).with_output_types(dict[str, Totals])
            | "Sum" >> beam.CombineGlobally(sum_by_dataset)
            | "Finish" >> beam.Map(finish, self.root, self.expected)
        )


def _count(commit: Commit) -> dict[str, Totals]:
    return {commit.dataset: Totals().add(commit)}


def sum_by_dataset(parts: Iterable[Mapping[str, Totals]]) -> dict[str, Totals]:
    """Returns the sums of totals by data set."""
    sums: dict[str, Totals] = {}
    for part in parts:
        for dataset, totals in part.items():
            sums[dataset] = sums.get(dataset, Totals()).merge(totals)
    return sums


def finish(found: Mapping[str, Totals], root: str, expected: Mapping[str, Expected]) -> dict[str, Totals]:
    """Checks the totals of data sets and writes them, with what planning counted, to `_SUCCESS.json`, all at once.

    Raises:
        OutputError: Something is missing.
        DiptychError: A model failed on more rows than it may.
    """
    done = {}
    for dataset, wanted in expected.items():
        totals = found.get(dataset, Totals())
        if problem := totals.problem(wanted.num_shards):
            raise OutputError(
                f"{join(root, dataset)} is not complete: {problem}. Run the same command again; if this stays, run "
                "`diptych verify` on it, which names the file at fault."
            )
        if wanted.limit:
            wanted.limit.check_totals(totals.rejected, totals.written, root)
        done[dataset] = totals.merge(Totals(counters=wanted.counters))
    delete(root, _WORKING)
    write_whole(root, SUCCESS, success_json({**(read_success(root) or {}), **done}))
    delete(root, _WORKING)
    return done


def success_json(totals: Mapping[str, Totals]) -> bytes:
    """Returns the content of `_SUCCESS.json`."""
    values: dict[str, Any] = {dataset: dataclasses.asdict(total) for dataset, total in totals.items()}
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def read_success(root: str) -> dict[str, Totals] | None:
    """Returns the totals of what is finished in an output by data set, or None where nothing is.

    Raises:
        OutputError: It says something else.
    """
    values = read_json(root, SUCCESS)
    if isinstance(values, dict) and "model" in values:
        raise OutputError(
            f"{root} holds a model that `diptych train` wrote, not data sets. Name another folder."
        )
    try:
        return None if values is None else {dataset: Totals(**total) for dataset, total in values.items()}
    except (AttributeError, TypeError) as error:
        raise damaged_json(root, SUCCESS, error) from error


def read_json(root: str, name: str) -> Any:
    """Returns the content of a JSON file in an output folder, or None where there is no such file.

    Raises:
        OutputError: It is not JSON.
        InputError: It cannot be read.
    """
    url = join(root, name)
    try:
        with input_errors(url):
            fs, path = locate(url)
            return json.loads(fs.cat_file(path))
    except InputError as error:
        if is_absence(error):
            return None
        raise
    except ValueError as error:
        raise damaged_json(root, name, error) from error


def damaged_json(root: str, name: str, error: object) -> OutputError:
    """Returns the error of a JSON file in an output folder that no job wrote so."""
    remedy = "Delete it and run again" if name == SUCCESS else "Delete the output folder, or choose another"
    return OutputError(f"{join(root, name)} is not what a job wrote ({error}): damaged since. {remedy}.")
