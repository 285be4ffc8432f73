"""The end of a job: counts are added up, checked, and written as `_SUCCESS.json`, the last file of all."""

import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import apache_beam as beam
from apache_beam.pvalue import PCollection

from diptych.transforms.chunk import add_counts
from diptych.transforms.errors import NothingWritten, OutputError, TooManyRejects
from diptych.transforms.inference.failures import FailureLimit
from diptych.transforms.output_layout import (
    PLAN,
    SCRATCH,
    SUCCESS,
    RecordKind,
    damaged_json,
    data_file_sizes,
    list_names,
    read_finished,
    write_success,
    write_view,
)
from diptych.transforms.sink import Claim, Commit, foreign_files
from diptych.transforms.storage import delete, delete_empty, join


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
        size_bytes: Of the data files; 0 in the record of an earlier version.
    """

    shards: int = 0
    files: int = 0
    read: int = 0
    written: int = 0
    rejected: Mapping[str, int] = dataclasses.field(default_factory=dict)
    counters: Mapping[str, int] = dataclasses.field(default_factory=dict)
    size_bytes: int = 0

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
            self.size_bytes + commit.size_bytes,
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
            self.size_bytes + other.size_bytes,
        )

    def are_of(self, sizes: Mapping[str, int]) -> bool:
        """Tells whether these are the totals of data files, by their number and size."""
        return self.files == len(sizes) and self.size_bytes in (0, sum(sizes.values()))

    def has_rejects(self, reasons: Collection[str]) -> bool:
        """Tells whether rows were rejected for one of these reasons."""
        return not self.rejected.keys().isdisjoint(reasons)

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
        claim: The record by which the job owns the data set; None where nothing is claimed.
    """

    num_shards: int
    counters: Mapping[str, int] = dataclasses.field(default_factory=dict)
    limit: FailureLimit | None = None
    claim: Claim | None = None


@dataclasses.dataclass(eq=False)  # not frozen: Beam labels its transforms
class FinishJob(beam.PTransform[PCollection[Commit], PCollection[dict[str, Totals]]]):
    """Commits of all data sets of a job to their success records.

    Attributes:
        root: The output folder.
        expected: By data set.
        run_name: The fingerprint's digest, which the run's plan and scratch folder are named by.
        max_reject_rate: The share of the rows read for a data set that may be rejected, 0 to 1.
    """

    root: str
    expected: Mapping[str, Expected]
    run_name: str
    max_reject_rate: float = 1.0

    def expand(self, commits: PCollection[Commit]) -> PCollection[dict[str, Totals]]:
        """Adds up, checks, writes."""
        return (
            commits
            | "Count" >> beam.Map(_count).with_output_types(dict[str, Totals])
            | "Sum" >> beam.CombineGlobally(sum_by_dataset)
            | "Finish" >> beam.Map(finish, self.root, self.expected, self.run_name, self.max_reject_rate)
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


def finish(
    totals: Mapping[str, Totals],
    root: str,
    expected: Mapping[str, Expected],
    run_name: str,
    max_reject_rate: float = 1.0,
) -> dict[str, Totals]:
    """Checks the totals of data sets and writes them, with what planning counted, to their success records.

    Raises:
        OutputError: Something is missing, or another run owns the output by now.
        NothingWritten: Rows were read, and none was written.
        TooManyRejects: More rows were rejected than may be.
        DiptychError: A model failed on more rows than it may.
    """
    done = {dataset: _checked(totals, root, dataset, expected[dataset]) for dataset in expected}
    check_rejects(done, root, max_reject_rate)
    for dataset, total in done.items():
        write_success(root, dataset, dataclasses.asdict(total), join(SCRATCH, run_name))
    write_view(root, RecordKind.SUCCESS, join(SCRATCH, run_name))
    with contextlib.suppress(OutputError):  # the data are whole; what is left over costs nothing
        delete_working(root, run_name)
    return done


def delete_working(root: str, run_name: str) -> None:
    """Deletes what a run needs only until it is done: its plan, and what it had not yet put in its place.

    Raises:
        OutputError: The store refused.
    """
    plans = [name for name in list_names(join(root, PLAN)) if name.startswith(run_name)]
    delete(root, (*(join(PLAN, name) for name in plans), join(SCRATCH, run_name)))
    delete_empty(root, (PLAN, SCRATCH))


def _checked(found: Mapping[str, Totals], root: str, dataset: str, wanted: Expected) -> Totals:
    totals = found.get(dataset, Totals())
    if problem := totals.problem(wanted.num_shards):
        raise OutputError(
            f"{join(root, dataset)} is not complete: {problem}. Run the same command again; if this stays, run "
            "`diptych verify` on it, which names the file at fault."
        )
    if wanted.claim:
        wanted.claim.check(root)
        _check_files(root, wanted.claim, totals)
    if wanted.limit:
        wanted.limit.check_totals(totals.rejected, totals.written, root)
    return totals.merge(Totals(counters=wanted.counters))


def _check_files(root: str, claim: Claim, totals: Totals) -> None:
    """Checks that the files of a data set are those that the run committed, as far as others could change that."""
    sizes = data_file_sizes(root, claim.dataset)
    if not claim.taken_over and totals.are_of(sizes):
        return
    foreign = foreign_files(root, claim, sizes)
    if claim.taken_over and foreign:  # the last of the run that it was taken from
        delete(root, (f"{claim.dataset}/{name}" for name in foreign))
        sizes = {name: size for name, size in sizes.items() if name not in foreign}
        foreign = []
    if not totals.are_of(sizes):
        named = (
            f" ({', '.join(foreign[:3])} {'is' if len(foreign) == 1 else 'are'} none of its own: move away)"
        )
        raise OutputError(
            f"{join(root, claim.dataset)} has {len(sizes)} files of {sum(sizes.values()):,} bytes, and the run wrote "
            f"or found {totals.files} of {totals.size_bytes:,}: some were deleted, added or made again while it ran"
            f"{named if foreign else ''}. Run the same command again"
            f"{', without --overwrite' if claim.taken_over else ''}; it makes what is missing."
        )


def check_rejects(totals: Mapping[str, Totals], root: str, max_rate: float) -> None:
    """Checks that a job wrote something, and rejected no more than it may.

    Raises:
        NothingWritten: Rows were read, and none was written to any data set.
        TooManyRejects: Of one data set, more than its share was rejected.
    """
    read = sum(total.read for total in totals.values())
    if read and not any(total.written for total in totals.values()):
        total = Totals()
        for other in totals.values():
            total = total.merge(other)
        raise NothingWritten(
            f"{read:,} rows were read and none was written to {root}: {_reasons(total)}. See {join(root, 'rejects')} "
            "for each row's own message; mend the input or the options, and run the command again (with "
            "--retry_rejects REASON where the same options will do, else with --overwrite)."
        )
    for dataset, total in totals.items():
        rejects = sum(total.rejected.values())
        if total.read and rejects / total.read > max_rate:
            raise TooManyRejects(
                f"{rejects:,} of {total.read:,} rows of {join(root, dataset)} were rejected, more than "
                f"--max_reject_rate {max_rate:g} of them: {_reasons(total)}. What was written stays. See "
                f"{join(root, 'rejects')} for each row's own message; then allow more, or mend the cause and run the "
                "same command with --retry_rejects REASON."
            )


def _reasons(totals: Totals) -> str:
    """Returns the counts of rejects by reason, the commonest first."""
    ordered = sorted(totals.rejected.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason} {count:,}" for reason, count in ordered)


def read_success(root: str) -> dict[str, Totals] | None:
    """Returns the totals of what is finished in an output by data set, or None where nothing is.

    Raises:
        OutputError: It says something else.
    """
    values = read_finished(root)
    if values is not None and "model" in values:
        raise OutputError(
            f"{root} holds a model that `diptych train` wrote, not data sets. Name another folder."
        )
    return None if values is None else totals_of(root, values)


def totals_of(root: str, records: Mapping[str, Any]) -> dict[str, Totals]:
    """Returns the totals that the records of an output say, by data set.

    Raises:
        OutputError: They say something else.
    """
    try:
        return {dataset: Totals(**totals) for dataset, totals in records.items()}
    except TypeError as error:
        raise damaged_json(root, SUCCESS, error) from error
