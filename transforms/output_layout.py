"""The names and places of an output folder, and the records that say whose each data set is.

A data set's record is made by an operation that fails where one is there, and is never changed: of two jobs that
start at once, one owns the data set. `_job.json` and `_SUCCESS.json` show all records in one place, for people and
other programs; they are made anew from the records, and nothing is decided by them.
"""

import enum
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from diptych.transforms.errors import InputError, OutputError
from diptych.transforms.storage import create, delete, input_errors, is_absence, join, locate, write_whole

JOB = "_job.json"
SUCCESS = "_SUCCESS.json"
RECORDS = "_records"
PLAN = "_plan"
SCRATCH = "_tmp"
DATASETS = ("images", "embeddings", "captions", "generated")
MODEL_STAGES = {"embeddings": "embed", "captions": "caption", "generated": "generate"}
_FILE_NAME = re.compile(r"(.+)-(\d{5,})\.parquet", re.DOTALL)


class RecordKind(enum.Enum):
    """What a record says of a data set; the value ends the names of its files."""

    JOB = ".job.json"
    SUCCESS = ".success.json"


_VIEWS = {RecordKind.JOB: JOB, RecordKind.SUCCESS: SUCCESS}


def claim_name(dataset: str, reads_own_images: bool) -> str:
    """Returns the place, below the output folder, of the record by which a job owns a data set.

    An output has one data set that is made from elsewhere, beside those that are made from its own images; the jobs
    that could write that one claim the same name, whatever data set they write.
    """
    return f"{RECORDS}/{dataset if reads_own_images else 'source'}{RecordKind.JOB.value}"


def claim(
    root: str, name: str, dataset: str, fingerprint: Mapping[str, Any], scratch: str
) -> Mapping[str, Any]:
    """Makes the record by which a job owns a data set, unless there is one.

    Args:
        root: The output folder.
        name: `claim_name` of the data set.
        dataset: The data set.
        fingerprint: The run's fingerprint, as JSON values.
        scratch: Folder below `root` for what is not yet whole.

    Returns:
        What the record that is there now says: fingerprints by data set.

    Raises:
        OutputError: It cannot be written.
    """
    record = {dataset: fingerprint}
    if create(root, name, to_json(record), scratch):
        return record
    return _mapping(root, name, read_json(root, name))


def write_success(root: str, dataset: str, totals: Mapping[str, Any], scratch: str) -> None:
    """Writes the record that a data set is complete.

    Args:
        root: The output folder.
        dataset: The data set.
        totals: Its totals, as JSON values.
        scratch: Folder below `root` for what is not yet whole.

    Raises:
        OutputError: It cannot be written.
    """
    name = f"{RECORDS}/{dataset}{RecordKind.SUCCESS.value}"
    write_whole(root, name, to_json({dataset: totals}), scratch)


def forget_success(root: str, dataset: str, scratch: str) -> None:
    """Deletes the record that a data set is complete, if there is one.

    Raises:
        OutputError: The store refused.
    """
    if dataset in (read_records(root, RecordKind.SUCCESS) or {}):
        delete(root, (f"{RECORDS}/{dataset}{RecordKind.SUCCESS.value}",))
        write_view(root, RecordKind.SUCCESS, scratch)


def read_records(root: str, kind: RecordKind) -> dict[str, Any] | None:
    """Returns the records of one kind by data set, or None where there are none.

    An output of an earlier version has no records: what its one file says is taken for them.

    Raises:
        OutputError: One is damaged.
        InputError: One cannot be read.
    """
    names = list_names(join(root, RECORDS))
    return read_named_records(root, names, kind) if _are_records(names) else read_view(root, kind)


def read_named_records(root: str, names: Iterable[str], kind: RecordKind) -> dict[str, Any] | None:
    """Returns the records of one kind by data set, or None where there are none.

    Args:
        root: The output folder.
        names: The names of what is in the folder of records.
        kind: Which records.

    Raises:
        OutputError: One is damaged.
        InputError: One cannot be read.
    """
    records: dict[str, Any] = {}
    for name in (f"{RECORDS}/{name}" for name in names if name.endswith(kind.value)):
        # one that was deleted since the listing is none
        if (values := read_json(root, name)) is not None:
            records |= _mapping(root, name, values)
    return records or None


def read_finished(root: str) -> dict[str, Any] | None:
    """Returns the totals of the data sets that are complete, or None where none is.

    `_SUCCESS.json` must show them too: who deletes it, as people do, wants to have it made again.

    Raises:
        OutputError: A file that says so is damaged.
        InputError: One cannot be read.
    """
    if (shown := read_view(root, RecordKind.SUCCESS)) is None:
        return None
    records = read_records(root, RecordKind.SUCCESS) or {}
    return {dataset: totals for dataset, totals in shown.items() if dataset in records}


def read_view(root: str, kind: RecordKind) -> dict[str, Any] | None:
    """Returns what the file that shows all records of a kind says, by data set, or None where there is none.

    Raises:
        OutputError: It is damaged.
        InputError: It cannot be read.
    """
    values = read_json(root, _VIEWS[kind])
    return None if values is None else _mapping(root, _VIEWS[kind], values)


def write_view(root: str, kind: RecordKind, scratch: str) -> None:
    """Writes the file that shows all records of a kind, until it shows those that there are.

    Of jobs that end at the same moment, each writes it after its own record and looks again afterwards, so that the
    last one to write has seen the records of all.

    Args:
        root: The output folder.
        kind: Which records.
        scratch: Folder below `root` for what is not yet whole.

    Raises:
        OutputError: It cannot be written.
    """
    view = _VIEWS[kind]
    try:
        shown = read_json(root, view)
    except OutputError:
        shown = ""  # damaged: nothing that could be right
    while (records := _records_alone(root, kind)) != shown:
        if records is None:
            delete(root, (view,))
        else:
            write_whole(root, view, to_json(records), scratch)
        shown = records


def _are_records(names: Iterable[str]) -> bool:
    return any(name.endswith(tuple(kind.value for kind in RecordKind)) for name in names)


def _records_alone(root: str, kind: RecordKind) -> dict[str, Any] | None:
    """Returns the records of one kind, and nothing in their place where an earlier version left none."""
    return read_named_records(root, list_names(join(root, RECORDS)), kind)


def list_names(url: str) -> list[str]:
    """Returns the names of what is in a folder, as it is now, sorted; none where there is no such folder.

    Raises:
        InputError: It cannot be listed.
    """
    return sorted(_listed(url, detail=False))


def _listed(url: str, detail: bool) -> dict[str, int]:
    """Returns the sizes of what is in a folder by name, in bytes; -1 where no detail is wanted."""
    try:
        with input_errors(url):
            fs, path = locate(url)
            fs.invalidate_cache(path)
            found = fs.ls(path, detail=detail)
            fs.invalidate_cache(path)  # or what is written from now on is not seen
    except InputError as error:
        if is_absence(error):
            return {}
        raise
    sizes = {entry["name"]: entry["size"] or 0 for entry in found} if detail else dict.fromkeys(found, -1)
    paths = {name.rstrip("/"): size for name, size in sizes.items()}
    paths.pop(path.rstrip("/"), None)
    return {os.path.basename(name): size for name, size in paths.items()}


def data_files(root: str, dataset: str) -> list[str]:
    """Returns the names of what is in the folder of a data set, sorted by shard and number.

    Hidden files, as a system or another tool leaves them, are not data: their names begin with `.` or `_`.
    """
    return sorted(filter(_is_data, list_names(join(root, dataset))), key=_place)


def data_file_sizes(root: str, dataset: str) -> dict[str, int]:
    """Returns the sizes, in bytes, of the files that `data_files` names."""
    sizes = _listed(join(root, dataset), detail=True)
    return {name: sizes[name] for name in sorted(filter(_is_data, sizes), key=_place)}


def _is_data(name: str) -> bool:
    return name[0] not in "._"


def shard_of(name: str) -> str:
    """Returns the name of the shard that a data file's name begins with, empty where it is no such name."""
    match = _FILE_NAME.fullmatch(name)
    return match[1] if match else ""


def _place(name: str) -> tuple[str, int, str]:
    match = _FILE_NAME.fullmatch(name)
    return (match[1], int(match[2]), name) if match else ("", 0, name)


def is_of_output(path: str, outputs: Collection[str]) -> bool:
    """Tells whether a file lies in an output of a job, or in what a job keeps there while it runs.

    Args:
        path: The file's path below some folder.
        outputs: Paths of the outputs below it; empty for that folder itself.
    """
    if not {PLAN, RECORDS, SCRATCH}.isdisjoint(path.split("/")):
        return True
    return any(not output or path.startswith(f"{output}/") for output in outputs)


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


def to_json(values: Mapping[str, Any]) -> bytes:
    """Returns the content of a JSON file in an output folder."""
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def damaged_json(root: str, name: str, error: object) -> OutputError:
    """Returns the error of a JSON file in an output folder that no job wrote so."""
    is_success = name == SUCCESS or name.endswith(RecordKind.SUCCESS.value)
    remedy = "Delete it and run again" if is_success else "Delete the output folder, or choose another"
    return OutputError(f"{join(root, name)} is not what a job wrote ({error}): damaged since. {remedy}.")


def _mapping(root: str, name: str, values: Any) -> dict[str, Any]:
    if not (isinstance(values, dict) and all(isinstance(value, dict) for value in values.values())):
        raise damaged_json(root, name, "it is no object of objects by data set")
    return values
