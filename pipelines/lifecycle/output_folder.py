"""The life of an output folder: whose it is, what is in it already, and when it is done."""

import concurrent.futures
import contextlib
import dataclasses
import enum
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from diptych.pipelines.lifecycle.output_contents import OutputContents
from diptych.transforms.errors import OptionError, OutputError
from diptych.transforms.fingerprint import digest
from diptych.transforms.finish import delete_working, read_success
from diptych.transforms.output_layout import (
    DATASETS,
    JOB,
    MODEL_STAGES,
    PLAN,
    RECORDS,
    SCRATCH,
    SUCCESS,
    RecordKind,
    claim,
    claim_name,
    forget_success,
    list_names,
    read_json,
    read_records,
    shard_of,
    write_success,
    write_view,
)
from diptych.transforms.sink import FOOTERS_AT_ONCE, Claim, has_commit
from diptych.transforms.storage import delete, delete_empty, join, real_path

_BESIDE = ("rejects", PLAN, SCRATCH)


class State(enum.Enum):
    """What an output folder holds before a run."""

    FRESH = "nothing"
    RESUMED = "a part of this job's data set"
    DONE = "all of this job's data set"


def refuse_overlap(inputs: Iterable[str], root: str) -> None:
    """Checks that a job does not read the folders that it writes, and that `--overwrite` deletes.

    Args:
        inputs: What it reads, but for the images of an output that it adds a data set to.
        root: The output folder.

    Raises:
        OptionError: It does.
    """
    output = real_path(root)
    folders = [join(output, name) for name in (*DATASETS, *_BESIDE)]
    for url in inputs:
        path = real_path(url)
        if path == output or any(f"{path}/".startswith(f"{folder}/") for folder in folders):
            raise OptionError(
                f"--output {root} is where {url} is read from. The job would write into its own input: choose another "
                "--output."
            )


@dataclasses.dataclass(frozen=True)
class DatasetClaim:
    """What a job asks of an output folder: a data set that is its own.

    Attributes:
        dataset: The data set that the job writes.
        fingerprint: The run's fingerprint.
        overwrite: Whether what an earlier run wrote there is deleted: of `images`, with all that is made from them.
        reads_own_images: Whether the job reads the images of this very output.
    """

    dataset: str
    fingerprint: Mapping[str, Any]
    overwrite: bool = False
    reads_own_images: bool = False

    @property
    def name(self) -> str:
        """The place of its record below the output folder."""
        return claim_name(self.dataset, self.reads_own_images)

    def record(self, taken_over: bool = False) -> Claim:
        """Returns the record by which the data set is the job's own, once it is made."""
        return Claim(self.name, self.dataset, digest(self.fingerprint), taken_over)

    @property
    def scratch(self) -> str:
        """The folder of the run, below the output folder, for what is not yet whole."""
        return join(SCRATCH, digest(self.fingerprint))


def check_output(root: str, wanted: DatasetClaim, contents: OutputContents | None = None) -> State:
    """Finds out whether a job may write a data set to a folder, and what of it is there; changes nothing.

    Args:
        root: The output folder.
        wanted: The data set and the run.
        contents: What the folder holds; None reads it.

    Raises:
        OutputError: The folder belongs to another run, or holds files that no run wrote.
    """
    contents = contents or OutputContents.read(root)

    def written(dataset: str) -> set[str]:
        return _written_by_diptych(root, dataset, contents.files_of(dataset))

    try:
        return open_output(root, contents, wanted, written)
    except _OwnerlessError:
        again = OutputContents.read(root)
        if again.jobs == contents.jobs:
            raise
        return check_output(root, wanted, again)  # a job has begun since


def open_output(
    root: str, contents: OutputContents, wanted: DatasetClaim, written: Callable[[str], Collection[str]]
) -> State:
    """Decides whether a job may write a data set to a folder, and says what of it is there.

    Args:
        root: The output folder, for messages.
        contents: What it holds.
        wanted: The data set and the run.
        written: Returns the files of a data set that jobs wrote; asked only before they are deleted.

    Raises:
        OutputError: The folder belongs to another run, or holds files that no run wrote.
    """
    jobs, dataset = contents.jobs, wanted.dataset
    if jobs and (models := sorted(set(jobs) - set(DATASETS))):
        raise OutputError(
            f"{root} is where `diptych train` wrote a model, or is at it ({join(root, JOB)} names {_some(models)}). "
            "Choose another --output."
        )
    if jobs is None:
        _refuse_ownerless(root, contents, (*DATASETS, "rejects"), f"{root} has no {JOB}")
        return State.FRESH
    if wanted.overwrite and dataset == "images":
        for name in DATASETS:
            _refuse_foreign(root, name, contents.files_of(name), written(name))
        return State.FRESH
    if not wanted.reads_own_images and (others := contents.others_than(dataset)):
        raise _made_from_another_input(root, others)
    if dataset not in jobs:
        _refuse_ownerless(root, contents, (dataset,), f"{join(root, JOB)} does not name it")
        return State.FRESH
    if wanted.overwrite:
        _refuse_foreign(root, dataset, contents.files_of(dataset), written(dataset))
        return State.FRESH
    _refuse_other_run(root, contents, dataset, jobs[dataset], wanted.fingerprint)
    return State.DONE if contents.is_complete(dataset) else State.RESUMED


class _OwnerlessError(OutputError):
    """Files of a data set that no job owns, unless one has begun since."""


def _refuse_ownerless(root: str, contents: OutputContents, folders: Iterable[str], reason: str) -> None:
    """Checks that some folders of an output are empty, since no job owns them."""
    for folder in folders:
        names = [*contents.rejects] if folder == "rejects" else [*contents.files_of(folder)]
        if names:
            raise _OwnerlessError(
                f"{join(root, folder)} holds {_some(names)}, but {reason}, so no job of Diptych owns it. Choose "
                "another --output, or move it away."
            )


def _made_from_another_input(root: str, datasets: Sequence[str]) -> OutputError:
    return OutputError(
        f"{root} holds {_some(datasets)}, made from another input than this. Only data sets that are made from its own "
        f"images may lie beside them: choose another --output, or give --input {root}."
    )


def take_output(root: str, wanted: DatasetClaim, contents: OutputContents | None = None) -> Claim:
    """Makes a data set the job's own: deletes what `check_output` said may go, and claims what is left.

    Of two jobs that come this far at the same moment, the one whose record is there first goes on, and the other only
    if it is the same run.

    Args:
        root: The output folder.
        wanted: The data set and the run.
        contents: What the folder held when it was checked; None reads it.

    Returns:
        The record by which it is the job's own.

    Raises:
        OutputError: Another run was faster, or the folder cannot be written.
    """
    contents = contents or OutputContents.read(root)
    if contents.is_of_earlier_version:
        _adopt_earlier_version(root, contents, wanted.scratch)
    taken_over = wanted.overwrite and not contents.is_complete(wanted.dataset)
    if wanted.overwrite:
        _delete_dataset(root, wanted)
    record = claim(root, wanted.name, wanted.dataset, _as_json(wanted.fingerprint), wanted.scratch)
    is_resumed = not wanted.overwrite and wanted.dataset in (contents.jobs or {})
    if not is_resumed or contents.jobs != contents.shown_jobs:
        # another's too, where this run deleted the file just now
        write_view(root, RecordKind.JOB, wanted.scratch)
    try:
        if wanted.dataset not in record:
            raise _made_from_another_input(root, sorted(record))
        _refuse_other_run(root, contents, wanted.dataset, record[wanted.dataset], wanted.fingerprint)
    except OutputError:
        delete(root, (wanted.scratch,))
        delete_empty(root, (SCRATCH,))
        raise
    return wanted.record(taken_over)


def clean_up(root: str, wanted: DatasetClaim) -> None:
    """Deletes what a run needed only until it was done, where it was killed before it could."""
    with contextlib.suppress(OutputError):  # what is done may lie where nothing can be written any more
        delete_working(root, digest(wanted.fingerprint))


def _refuse_other_run(
    root: str, contents: OutputContents, dataset: str, there: Any, fingerprint: Mapping[str, Any]
) -> None:
    if there == _as_json(fingerprint):
        return
    is_empty = not any(contents.files_of(name) for name in _made_from(dataset))
    state = " (which has not written a file yet, and may be at work)" if is_empty else ""
    raise OutputError(
        f"{root} holds the {dataset} of another run{state}: {'; '.join(_differences(there, fingerprint))}. Choose "
        "another --output, give the options of that run, or delete it with --overwrite."
    )


def _as_json(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(fingerprint)))


def _adopt_earlier_version(root: str, contents: OutputContents, scratch: str) -> None:
    """Makes the records of an output that an earlier version wrote, which had one file for all of them."""
    jobs = contents.jobs or {}
    for dataset, fingerprint in jobs.items():
        reads_own_images = dataset != "images" and "images" in jobs
        claim(root, claim_name(dataset, reads_own_images), dataset, fingerprint, scratch)
    for dataset, totals in contents.success.items():
        write_success(root, dataset, dataclasses.asdict(totals), scratch)


def read_jobs(root: str) -> dict[str, Any] | None:
    """Returns the fingerprints of an output by data set, or None where there is no output of Diptych.

    Raises:
        OutputError: A file that holds them is damaged.
    """
    return read_records(root, RecordKind.JOB)


def _made_from(dataset: str) -> tuple[str, ...]:
    """Returns a data set with those that may be made from it."""
    return DATASETS if dataset == "images" else (dataset,)


def _delete_dataset(root: str, wanted: DatasetClaim) -> None:
    """Deletes a data set with its own rejects; what says that it is whole goes first, and whose it is last."""
    dataset = wanted.dataset
    if dataset == "images":
        successes = [f"{RECORDS}/{name}{RecordKind.SUCCESS.value}" for name in DATASETS]
        own = digest(wanted.fingerprint)  # the plans of this run are made by now
        old_plans = [join(PLAN, name) for name in list_names(join(root, PLAN)) if not name.startswith(own)]
        delete(root, (SUCCESS, *successes, *DATASETS, "rejects", *old_plans, SCRATCH))
        # a job that claimed the output meanwhile has lost files too; one of the same run makes them again
        kept = wanted.name if (read_jobs(root) or {}).get(dataset) == _as_json(wanted.fingerprint) else ""
        claims = [
            f"{RECORDS}/{name}" for name in list_names(join(root, RECORDS)) if name.endswith(".job.json")
        ]
        delete(root, (name for name in claims if name != kept))
        if not kept:
            delete(root, (JOB,))
        return
    # as it is now: another run may have written since
    rejects = OutputContents.read(root).rejects_of(dataset)
    forget_success(root, dataset, wanted.scratch)
    delete(root, (dataset, *rejects))
    record = read_json(root, wanted.name) or {}
    if record != {dataset: _as_json(wanted.fingerprint)}:
        for fingerprint in record.values():
            delete_working(root, digest(fingerprint))
        delete(root, (wanted.name,))


class Leftovers(NamedTuple):
    """What earlier runs left of a data set.

    Attributes:
        has_files: Whether there are data files.
        orphans: Files of rejects below the output folder that have no data file.
    """

    has_files: bool
    orphans: frozenset[str]


def forget_derived(root: str) -> list[str]:
    """Has the data sets that are made from an output's images be complete no more, as its images are made again.

    Returns:
        Their names.

    Raises:
        OutputError: The store refused.
    """
    derived = [name for name in read_success(root) or {} if name != "images"]
    for dataset in derived:
        forget_success(root, dataset, SCRATCH)
    return derived


def start_writing(
    root: str,
    claim: DatasetClaim,
    shards: Iterable[str],
    taken_over: bool = False,
    contents: OutputContents | None = None,
) -> Leftovers:
    """Makes sure that a data set holds no files but those of these shards, before a run adds to it.

    Args:
        root: The output folder.
        claim: The data set and the run.
        shards: Names of all the shards of the run.
        taken_over: Whether the output may have been taken from a run at work, whose last files are deleted.
        contents: What the folder held when it was checked, where nothing of it was deleted since; None reads it.

    Raises:
        OutputError: There is a file of something else.
    """
    own = set(shards)
    contents = contents or OutputContents.read(root)
    files = set(contents.files_of(claim.dataset))
    if taken_over and (strays := [name for name in files if shard_of(name) not in own]):
        strays = sorted(_written_by_diptych(root, claim.dataset, strays))
        delete(root, (join(claim.dataset, name) for name in strays))
        files -= {*strays}
    _refuse_foreign(root, claim.dataset, sorted(files), {name for name in files if shard_of(name) in own})
    # there where somebody deleted a data file of a finished output
    if claim.dataset in contents.success_records:
        forget_success(root, claim.dataset, claim.scratch)
    return Leftovers(bool(files), frozenset(_orphans(contents, claim, files)))


def _orphans(contents: OutputContents, claim: DatasetClaim, files: Collection[str]) -> Iterator[str]:
    """Yields the files of a data set's rejects, below the output folder, that have no data file beside them."""
    own = MODEL_STAGES.get(claim.dataset)
    for stage, names in contents.rejects.items():
        # what is made from images that are prepared has no rejects but its model's
        if stage == own or not (claim.reads_own_images or stage in MODEL_STAGES.values()):
            yield from (join("rejects", stage, name) for name in names if name not in files)


def _written_by_diptych(root: str, dataset: str, files: Iterable[str]) -> set[str]:
    """Returns the data files that a job wrote, by the footer of the first of each shard."""
    shards: dict[str, list[str]] = {}
    for name in files:
        if shard := shard_of(name):
            shards.setdefault(shard, []).append(name)
    firsts = [join(root, dataset, names[0]) for names in shards.values()]
    with concurrent.futures.ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        own = list(pool.map(has_commit, firsts))
    return {name for names, is_own in zip(shards.values(), own, strict=True) if is_own for name in names}


def _refuse_foreign(root: str, dataset: str, files: Iterable[str], own: Collection[str]) -> None:
    foreign = [name for name in files if name not in own]
    if foreign:
        raise OutputError(
            f"{join(root, dataset)} holds {_some(foreign)}, which this job did not write (or which was damaged "
            "since). Readers of the folder would take that for its data: move it away, and run again."
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        names = sorted({*found, *wanted})
        return [
            d for n in names for d in _differences(found.get(n), wanted.get(n), f"{name}.{n}".lstrip("."))
        ]
    return (
        [] if found == json.loads(json.dumps(wanted)) else [f"{name} is {found!r} there and {wanted!r} here"]
    )
