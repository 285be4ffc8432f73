"""The life of an output folder: whose it is, what is in it already, and when it is done."""

import contextlib
import dataclasses
import enum
import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

from transforms.errors import OutputError
from transforms.finish import SUCCESS, Totals
from transforms.sources.base import InputFile
from transforms.storage import join, locate, output_errors, write_whole

JOB = "_job.json"
DATASETS = ("images", "embeddings", "captions", "generated")
# Libraries that decide the bytes of an output
_LIBRARIES = ("numpy", "opencv-python-headless", "pillow", "pyarrow", "simplejpeg")


class State(enum.Enum):
    """What an output folder holds before a run."""

    FRESH = "nothing"
    RESUMED = "a part of this job's output"
    DONE = "all of this job's output"


def fingerprint(job: str, inputs: Iterable[InputFile], options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns everything that decides a run's output: the job, its inputs, its options, and the versions.

    Args:
        job: Name of the job.
        inputs: The input files, by names below the input root: the same data elsewhere is the same input.
        options: Options that change bytes, as JSON values.
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
        "versions": {name: metadata.version(name) for name in ("diptych", *_LIBRARIES)},
    }


def digest(fingerprint: Mapping[str, Any]) -> str:
    """Returns 16 hexadecimal digits that stand for a fingerprint."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def open_output(
    root: str, datasets: tuple[str, ...], fingerprint: Mapping[str, Any], overwrite: bool
) -> State:
    """Makes an output folder ready for a run: it belongs to this fingerprint afterwards.

    Args:
        root: The output folder.
        datasets: The data sets that the job writes.
        fingerprint: Of the run.
        overwrite: Delete what an earlier run wrote there.

    Raises:
        OutputError: The folder belongs to another run, or holds files that no run wrote, or cannot be written.
    """
    fs, path = locate(root)
    with output_errors(root):
        if fs.isfile(path):
            raise OutputError(f"{root} is a file. --output must be a folder; it is made where there is none.")
        found = read_json(root, JOB)
        if found is None:
            _refuse_foreign_files(root, datasets)
        elif overwrite:
            _delete(root, (SUCCESS, *DATASETS, "rejects", "_plan", "_tmp", JOB))
        elif found != json.loads(json.dumps(fingerprint)):
            differences = "; ".join(_differences(found, fingerprint))
            raise OutputError(
                f"{root} holds the output of another run: {differences}. Choose another --output, give the options "
                "of that run, or delete it with --overwrite."
            )
        else:
            _delete(root, ("_tmp",))
            return _state(root, datasets)
    write_whole(root, JOB, _to_json(fingerprint))
    return State.FRESH


def _state(root: str, datasets: tuple[str, ...]) -> State:
    totals = read_success(root)
    if totals is None:
        return State.RESUMED
    if all(dataset in totals and totals[dataset].files == _num_files(root, dataset) for dataset in datasets):
        return State.DONE
    _delete(root, (SUCCESS,))  # somebody deleted a data file: what is missing is made again
    return State.RESUMED


def _num_files(root: str, dataset: str) -> int:
    fs, path = locate(join(root, dataset))
    try:
        return sum(name.endswith(".parquet") for name in fs.ls(path, detail=False))
    except FileNotFoundError:
        return 0


def read_success(root: str) -> dict[str, Totals] | None:
    """Returns the totals of a finished output by data set, or None where it is not finished."""
    values = read_json(root, SUCCESS)
    return None if values is None else {dataset: Totals(**total) for dataset, total in values.items()}


def read_json(root: str, name: str) -> Any:
    """Returns the content of a JSON file in an output folder, or None where there is no such file.

    Raises:
        OutputError: It is not JSON.
    """
    fs, path = locate(join(root, name))
    try:
        return json.loads(fs.cat_file(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise OutputError(
            f"{join(root, name)} is not JSON ({error}). It was damaged after it was written: delete the output folder, "
            "or choose another."
        ) from error


def _refuse_foreign_files(root: str, datasets: tuple[str, ...]) -> None:
    for dataset in datasets:
        if count := _num_files(root, dataset):
            raise OutputError(
                f"{join(root, dataset)} holds {count} Parquet files, but {root} has no {JOB}, so no job of Diptych "
                "owns them. Choose another --output, or move them away."
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


def _delete(root: str, names: Iterable[str]) -> None:
    """Deletes files and folders; what says whose the output is must come last."""
    fs, path = locate(root)
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            fs.rm(join(path, name), recursive=True)


def _to_json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def options_to_json(options: Any) -> dict[str, Any]:
    """Returns a frozen dataclass of options as JSON values."""
    return dict(json.loads(json.dumps(dataclasses.asdict(options))))
