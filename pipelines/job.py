"""The life of an output folder: whose it is, what is in it already, and when it is done."""

import concurrent.futures
import contextlib
import dataclasses
import enum
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from transforms.errors import InputError, OptionError, OutputError
from transforms.finish import SUCCESS, damaged_json, success_json
from transforms.finish import read_json as read_json
from transforms.finish import read_success as read_success
from transforms.sink import has_commit
from transforms.sources.base import InputFile
from transforms.storage import (
    delete,
    input_errors,
    is_absence,
    is_file,
    join,
    locate,
    output_errors,
    write_whole,
)

JOB = "_job.json"
DATASETS = ("images", "embeddings", "captions", "generated")
_BESIDE = ("rejects", "_plan", "_tmp")
# Libraries that decide the bytes of an output
_LIBRARIES = ("numpy", "opencv-python-headless", "pillow", "pyarrow", "simplejpeg")


class State(enum.Enum):
    """What an output folder holds before a run."""

    FRESH = "nothing"
    RESUMED = "a part of this job's data set"
    DONE = "all of this job's data set"


def fingerprint(
    job: str, inputs: Iterable[InputFile], options: Mapping[str, Any], libraries: Iterable[str] = ()
) -> dict[str, Any]:
    """Returns everything that decides a run's output: the job, its inputs, its options, and the versions.

    Args:
        job: Name of the job.
        inputs: The input files, by names below the input root: the same data elsewhere is the same input.
        options: Options that change bytes, as JSON values.
        libraries: Libraries that the job uses beyond those that all do.
    """
    inputs = sorted(inputs, key=lambda file: file.name)
    lines = "".join(f"{file.name}\t{file.size_bytes}\t{file.sha256}\n" for file in inputs)
    return {
        "job": job,
        "inputs": {
            "files": len(inputs),
            "size_bytes": sum(file.size_bytes for file in inputs),
            "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        },
        "options": dict(options),
        "versions": {name: metadata.version(name) for name in ("diptych", *_LIBRARIES, *libraries)},
    }


def digest(fingerprint: Mapping[str, Any]) -> str:
    """Returns 16 hexadecimal digits that stand for a fingerprint."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def refuse_overlap(inputs: Iterable[str], root: str) -> None:
    """Checks that a job does not read the folders that it writes, and that `--overwrite` deletes.

    Args:
        inputs: What it reads, but for the images of an output that it adds a data set to.
        root: The output folder.

    Raises:
        OptionError: It does.
    """
    output = _real_path(root)
    folders = [join(output, name) for name in (*DATASETS, *_BESIDE)]
    for url in inputs:
        path = _real_path(url)
        if path == output or any(f"{path}/".startswith(f"{folder}/") for folder in folders):
            raise OptionError(
                f"--output {root} is where {url} is read from. The job would write into its own input: choose another "
                "--output."
            )


def is_same_place(url: str, other: str) -> bool:
    """Tells whether two paths or URLs are one folder."""
    return _real_path(url) == _real_path(other)


def _real_path(url: str) -> str:
    fs, path = locate(url)
    return str(
        fs.unstrip_protocol(os.path.realpath(path) if isinstance(fs, LocalFileSystem) else path)
    ).rstrip("/")


def open_output(
    root: str, dataset: str, fingerprint: Mapping[str, Any], overwrite: bool, derived: bool = False
) -> State:
    """Makes an output folder ready for a run: the data set belongs to this fingerprint afterwards.

    Args:
        root: The output folder.
        dataset: The data set that the job writes.
        fingerprint: Of the run.
        overwrite: Delete what an earlier run wrote there: of `images`, with all that is made from them.
        derived: Whether the job reads the images of this very output.

    Raises:
        OutputError: The folder belongs to another run, or holds files that no run wrote, or cannot be written.
    """
    with output_errors(root):
        fs, path = locate(root)
        if is_file(fs, path):
            raise OutputError(f"{root} is a file. --output must be a folder; it is made where there is none.")
    jobs = read_jobs(root)
    if jobs and (others := sorted(set(jobs) - set(DATASETS))):
        raise OutputError(
            f"{root} is where `diptych train` wrote a model, or is at it ({join(root, JOB)} names {_listed(others)}). "
            "Choose another --output."
        )
    if jobs is None:
        _refuse_ownerless(root, (*DATASETS, "rejects"), f"{root} has no {JOB}")
    elif overwrite and dataset == "images":
        for name in DATASETS:
            _refuse_foreign(root, name, _written_by_diptych(root, name))
        delete(root, (SUCCESS, *DATASETS, *_BESIDE, JOB))  # what says whose it is goes last
        jobs = None
    elif not derived and (others := _others(root, jobs, dataset)):
        raise OutputError(
            f"{root} holds {_listed(others)}, made from another input than this. Only data sets that are made from its "
            f"own images may lie beside them: choose another --output, or give --input {root}."
        )
    elif dataset not in jobs:
        _refuse_ownerless(root, (dataset,), f"{join(root, JOB)} does not name it")
    elif overwrite:
        _delete_dataset(root, dataset)
    elif jobs[dataset] == json.loads(json.dumps(fingerprint)):
        state = _state(root, dataset)
        # what is done may lie where nothing can be written any more
        with contextlib.suppress(*[OutputError] if state is State.DONE else []):
            delete(root, ("_tmp",))
        return state
    elif any(data_files(root, name) for name in _made_from(dataset)) or _own_rejects(root, dataset):
        differences = "; ".join(_differences(jobs[dataset], fingerprint))
        raise OutputError(
            f"{root} holds the {dataset} of another run: {differences}. Choose another --output, give the options "
            "of that run, or delete it with --overwrite."
        )
    if jobs is not None:  # left by a run that failed before its first row, and was mended since
        _forget_success(root, dataset)
        delete(root, ("_plan", "_tmp"))
    kept = {name: values for name, values in (jobs or {}).items() if derived and name != dataset}
    write_whole(root, JOB, _to_json({**kept, dataset: fingerprint}))
    return State.FRESH


def read_jobs(root: str) -> dict[str, Any] | None:
    """Returns the fingerprints of an output by data set, or None where there is no output of Diptych.

    Raises:
        OutputError: The file that holds them is damaged.
    """
    jobs = read_json(root, JOB)
    if jobs is not None and not (isinstance(jobs, dict) and all(isinstance(v, dict) for v in jobs.values())):
        raise damaged_json(root, JOB, "it is no object of fingerprints")
    return jobs


def _made_from(dataset: str) -> tuple[str, ...]:
    """Returns a data set with those that may be made from it."""
    return DATASETS if dataset == "images" else (dataset,)


def _others(root: str, jobs: Mapping[str, Any], dataset: str) -> list[str]:
    """Returns the other data sets that an output holds, without those whose runs wrote nothing.

    Where its images are the data set in question, the others are made from them.
    """
    if dataset == "images" and "images" in jobs:
        return []
    return [name for name in jobs if name != dataset and (data_files(root, name) or _own_rejects(root, name))]


def _own_rejects(root: str, dataset: str) -> list[str]:
    """Returns the files of rejects, below `root`, that belong to a data set.

    Those of its model are in a folder of their own. Of the others, what shares its name with a data file of another
    data set is that one's.
    """
    others = {name for other in DATASETS if other != dataset for name in data_files(root, other)}
    own = []
    for stage in data_files(root, "rejects"):
        folder = join("rejects", stage)
        if stage == MODEL_STAGES.get(dataset):
            own += [join(folder, name) for name in data_files(root, folder)]
        elif stage not in MODEL_STAGES.values():
            own += [join(folder, name) for name in data_files(root, folder) if name not in others]
    return own


MODEL_STAGES = {"embeddings": "embed", "captions": "caption", "generated": "generate"}


def _delete_dataset(root: str, dataset: str) -> None:
    """Deletes a data set with its own rejects; what says that it is whole goes first."""
    _refuse_foreign(root, dataset, _written_by_diptych(root, dataset))
    rejects = _own_rejects(root, dataset)
    _forget_success(root, dataset)
    delete(root, (dataset, *rejects))


def _forget_success(root: str, dataset: str) -> None:
    totals = read_success(root) or {}
    others = {name: total for name, total in totals.items() if name != dataset}
    if others and dataset in totals:
        write_whole(root, SUCCESS, success_json(others))
    elif not others:
        delete(root, (SUCCESS,))


def _state(root: str, dataset: str) -> State:
    totals = read_success(root) or {}
    is_done = dataset in totals and totals[dataset].files == len(data_files(root, dataset))
    return State.DONE if is_done else State.RESUMED


def start_writing(root: str, dataset: str, shards: Iterable[str]) -> None:
    """Makes sure that a data set holds no files but those of these shards, before a run adds to it.

    Args:
        root: The output folder.
        dataset: The data set.
        shards: Names of all the shards of the run.

    Raises:
        OutputError: There is a file of something else.
    """
    own = set(shards)
    files = data_files(root, dataset)
    _refuse_foreign(root, dataset, {name for name in files if shard_of(name) in own})
    _forget_success(root, dataset)  # there where somebody deleted a data file of a finished output


def data_files(root: str, dataset: str) -> list[str]:
    """Returns the names of what is in the folder of a data set, sorted by shard and number.

    Hidden files, as a system or another tool leaves them, are not data: their names begin with `.` or `_`.
    """
    url = join(root, dataset)
    try:
        with input_errors(url):
            fs, path = locate(url)
            fs.invalidate_cache(path)
            paths = {name.rstrip("/") for name in fs.ls(path, detail=False)} - {path.rstrip("/")}
            fs.invalidate_cache(path)  # or what is committed from now on is not seen
    except InputError as error:
        if is_absence(error):
            return []
        raise
    names = (os.path.basename(path) for path in paths)
    return sorted((name for name in names if name[0] not in "._"), key=lambda name: (shard_of(name), name))


def shard_of(name: str) -> str:
    """Returns the name of the shard that a data file's name begins with, empty where it is no such name."""
    match = _FILE_NAME.fullmatch(name)
    return match[1] if match else ""


_FILE_NAME = re.compile(r"(.+)-\d{5,}\.parquet", re.DOTALL)


def _written_by_diptych(root: str, dataset: str) -> set[str]:
    """Returns the data files that a job wrote, by the footer of the first of each shard."""
    shards: dict[str, list[str]] = {}
    for name in data_files(root, dataset):
        if shard := shard_of(name):
            shards.setdefault(shard, []).append(name)
    firsts = [join(root, dataset, names[0]) for names in shards.values()]
    with concurrent.futures.ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        own = list(pool.map(has_commit, firsts))
    return {name for names, is_own in zip(shards.values(), own, strict=True) if is_own for name in names}


_FOOTERS_AT_ONCE = 16  # on a store each is a few round trips


def _refuse_foreign(root: str, dataset: str, own: Collection[str]) -> None:
    foreign = [name for name in data_files(root, dataset) if name not in own]
    if foreign:
        raise OutputError(
            f"{join(root, dataset)} holds {_listed(foreign)}, which this job did not write (or which was damaged "
            "since). Readers of the folder would take that for its data: move it away, and run again."
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _refuse_ownerless(root: str, folders: Iterable[str], why: str) -> None:
    for folder in folders:
        if names := data_files(root, folder):
            raise OutputError(
                f"{join(root, folder)} holds {_listed(names)}, but {why}, so no job of Diptych owns it. Choose another "
                "--output, or move it away."
            )


def _differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        names = sorted({*found, *wanted})
        return [
            d for n in names for d in _differences(found.get(n), wanted.get(n), f"{name}.{n}".lstrip("."))
        ]
    return (
        [] if found == json.loads(json.dumps(wanted)) else [f"{name} is {found!r} there and {wanted!r} here"]
    )


def _to_json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def options_to_json(options: Any) -> dict[str, Any]:
    """Returns a frozen dataclass of options as JSON values."""
    return dict(json.loads(json.dumps(dataclasses.asdict(options))))
