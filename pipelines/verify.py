"""Proves from its files that an output is complete and sound: `diptych verify OUT`."""

import argparse
import collections
import dataclasses
import functools
import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diptych.models.errors import one_line
from diptych.transforms.chunk import ChunkKey, add_counts
from diptych.transforms.errors import DiptychError, InputError
from diptych.transforms.fingerprint import digest
from diptych.transforms.finish import Totals, read_success
from diptych.transforms.output_layout import (
    DATASETS,
    JOB,
    RECORDS,
    SUCCESS,
    RecordKind,
    data_files,
    read_records,
    read_view,
    shard_of,
)
from diptych.transforms.schemas import REJECTS
from diptych.transforms.sink import READ_ERRORS, Commit, parse_commit
from diptych.transforms.storage import input_errors, join, locate


@dataclasses.dataclass
class Findings:
    """What `verify` found.

    Attributes:
        problems: What is wrong, a line each.
        totals: What is there, by data set.
        shared_keys: Keys that occur in several shards, by data set.
    """

    problems: list[str]
    totals: dict[str, Totals]
    shared_keys: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """1 where something is wrong, else 0."""
        return 1 if self.problems else 0

    def lines(self) -> Iterator[str]:
        """Yields what to print."""
        for dataset, totals in sorted(self.totals.items()):
            rejects = sum(totals.rejected.values())
            yield (
                f"{dataset}: {totals.shards} shards, {totals.files} files: {totals.read:,} rows read = "
                f"{totals.written:,} written + {rejects:,} rejected"
            )
            if shared := self.shared_keys.get(dataset):
                yield f"{dataset}: {shared:,} keys occur in several shards"
        yield from (f"PROBLEM {problem}" for problem in self.problems)
        yield f"not complete: {len(self.problems)} problems" if self.problems else "complete and sound"


def verify(root: str) -> Findings:
    """Checks counts, schemas, checksums and keys of an output, from its files alone.

    Every file is read in full, a batch at a time. Complete means: each shard has its files 0 to k and k is marked
    last; rows read are rows written plus rows rejected, in each file and in all; the rejects hold what the data
    files say; no key is twice in a shard; and the sums are those of `_SUCCESS.json`.

    Raises:
        InputError: There is no output of Diptych.
    """
    jobs = read_view(root, RecordKind.JOB)
    if jobs is None:
        raise InputError(
            f"{root} has no {JOB}, so it is not the output of a job. Expected the --output of one."
        )
    findings = Findings([], {})
    if (records := read_records(root, RecordKind.JOB) or {}) != jobs:
        findings.problems.append(
            f"{join(root, JOB)} does not say what {join(root, RECORDS)} says: it was changed, or a run was killed as "
            "it wrote it. Run the command that writes the output again."
        )
        jobs = {**records, **jobs}
    rejects: dict[_RejectFile, Mapping[str, int]] = {}
    for dataset in DATASETS:
        if dataset in jobs or data_files(root, dataset):
            found = _check_dataset(root, dataset, digest(jobs.get(dataset, {})), findings)
            _check_shards(dataset, found, findings)
            findings.totals[dataset] = functools.reduce(Totals.add, found.values(), Totals())
            for name, commit in found.items():
                rejects |= {(stage, name): reasons for stage, reasons in commit.rejected.items()}
    _check_rejects(root, rejects, findings)
    _check_success(root, findings)
    return findings


def _check_dataset(root: str, dataset: str, fingerprint: str, findings: Findings) -> dict[str, Commit]:
    """Reads every data file; returns the commits of the sound ones by file name."""
    with _KeyCounter() as counter:
        commits = _check_files(root, dataset, fingerprint, findings, counter)
        findings.shared_keys[dataset] = counter.num_repeated()
    return commits


def _check_files(
    root: str, dataset: str, fingerprint: str, findings: Findings, counter: "_KeyCounter"
) -> dict[str, Commit]:
    commits: dict[str, Commit] = {}
    schema: pa.Schema | None = None
    for shard, names in itertools.groupby(data_files(root, dataset), shard_of):
        keys = [np.empty(0, np.uint64)]
        for name in names:
            url = join(root, dataset, name)
            try:
                commit, file_schema, hashes = _read_data_file(url)
            except (InputError, *READ_ERRORS) as error:
                findings.problems.append(_unreadable(url, error))
                continue
            schema = schema or file_schema
            if problem := _file_problem(name, commit, len(hashes), fingerprint):
                findings.problems.append(f"{url} {problem}")
            elif not file_schema.equals(schema):
                findings.problems.append(f"{url} has another schema than the files before it")
            else:
                commits[name] = commit
                keys.append(hashes)
        unique = np.unique(np.concatenate(keys))
        counter.add(unique)
        repeated = sum(map(len, keys)) - len(unique)
        if repeated:
            findings.problems.append(f"{dataset} of shard {shard} has {repeated} keys twice")
    return commits


class _KeyCounter:
    """Counts keys that several shards have, by files of 64-bit hashes on the local disk: memory stays bounded.

    Two of a billion different keys share a hash with a chance of 3 percent.
    """

    def __enter__(self) -> "_KeyCounter":
        self._folder = tempfile.TemporaryDirectory(prefix="diptych-verify-")
        self._num_shards = 0
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def add(self, hashes: np.ndarray[Any, Any]) -> None:
        """Takes the different hashes of a shard, sorted."""
        self._num_shards += 1
        first = (hashes >> np.uint64(56)).astype(np.int64)
        for byte in np.unique(first):
            with open(os.path.join(self._folder.name, f"{byte:02x}"), "ab") as file:
                file.write(hashes[first == byte].tobytes())

    def num_repeated(self) -> int:
        """Returns how many hashes were in more than one shard."""
        repeated = 0
        for name in os.listdir(self._folder.name) if self._num_shards > 1 else ():
            _, counts = np.unique(
                np.fromfile(os.path.join(self._folder.name, name), np.uint64), return_counts=True
            )
            repeated += int((counts > 1).sum())
        return repeated


def _unreadable(url: str, error: Exception) -> str:
    if isinstance(error, InputError):
        return str(error)
    return f"{url} cannot be read: {one_line(error)}"


def _file_problem(name: str, commit: Commit, num_rows: int, fingerprint: str) -> str | None:
    if name != commit.key().file_name():
        return f"says that it is {commit.key().file_name()}"
    if commit.fingerprint != fingerprint:
        return f"is of run {commit.fingerprint}, the output is of run {fingerprint}"
    if num_rows != commit.written or commit.read != commit.written + commit.rejects():
        return (
            f"holds {num_rows} rows; its footer says {commit.read} read, {commit.written} written, "
            f"{commit.rejects()} rejected"
        )
    return None


def _read_data_file(url: str) -> tuple[Commit, pa.Schema, np.ndarray[Any, Any]]:
    """Returns a data file's commit, its schema without metadata, and a 64-bit hash of each row's key."""
    hashes = [np.empty(0, np.uint64)]
    with input_errors(url):
        fs, path = locate(url)
        with fs.open(path, "rb") as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            commit = parse_commit(parquet.metadata.metadata or {})
            schema = parquet.schema_arrow.remove_metadata()
            if schema.field("key").type != pa.string():
                raise TypeError(f"its column key is {schema.field('key').type}, not string")
            for batch in parquet.iter_batches(256):
                hashes.append(_hash(batch))
            return commit, schema, np.concatenate(hashes)


_INDICES = ("caption_index", "prompt_index", "sample")


def _hash(rows: pa.RecordBatch) -> np.ndarray[Any, Any]:
    """Returns a hash of what tells each row from the others: its key, which caption of it, which image of that."""
    columns = [rows.column("key").drop_null().to_pylist()]
    columns += [rows[name].to_pylist() for name in _INDICES if name in rows.schema.names]
    names = ("\0".join(map(str, name)) for name in zip(*columns, strict=True))
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(b"".join(digests), np.uint64)


def _check_shards(dataset: str, commits: dict[str, Commit], findings: Findings) -> None:
    shards: dict[str, list[Commit]] = {}
    for commit in commits.values():
        shards.setdefault(commit.shard, []).append(commit)
    for shard, parts in sorted(shards.items()):
        found = {commit.index for commit in parts}
        end = max(found)
        missing = [
            join(dataset, ChunkKey(shard, index).file_name()) for index in range(end) if index not in found
        ]
        if missing:
            findings.problems.append(f"shard {shard} lacks {', '.join(missing)}")
        lasts = [commit.index for commit in parts if commit.last]
        if lasts != [end]:
            after = join(dataset, ChunkKey(shard, end + 1).file_name())
            findings.problems.append(f"shard {shard} lacks its end: {after}, or what comes after it")


# Stage and name of a file of rejects. Data sets may have files of one name, but never in one stage.
_RejectFile = tuple[str, str]


def _check_rejects(root: str, expected: Mapping[_RejectFile, Mapping[str, int]], findings: Findings) -> None:
    """Checks that the rejects are what the data files say they are."""
    found: dict[_RejectFile, dict[str, int]] = {}
    for stage in data_files(root, "rejects"):
        for name in data_files(root, join("rejects", stage)):
            url = join(root, "rejects", stage, name)
            try:
                found[stage, name] = _count_rejects(url)
            except (InputError, *READ_ERRORS) as error:
                findings.problems.append(_unreadable(url, error))
    for stage, name in sorted({*found, *expected}):
        there, said = found.get((stage, name), {}), dict(expected.get((stage, name), {}))
        if there != said:
            findings.problems.append(
                f"rejects/{stage}/{name} holds {there}, but the data file of that name says {said}; "
                "delete that to have both made again"
            )


def _count_rejects(url: str) -> dict[str, int]:
    with input_errors(url):
        fs, path = locate(url)
        with fs.open(path, "rb") as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            if not parquet.schema_arrow.equals(REJECTS):
                raise TypeError("its schema is not that of rejects")
            counts: dict[str, int] = {}
            for batch in parquet.iter_batches(256):
                counts = add_counts(counts, collections.Counter(batch.column("reason").to_pylist()))
            return counts


def _check_success(root: str, findings: Findings) -> None:
    try:
        success = read_success(root)
    except DiptychError as error:
        findings.problems.append(str(error))
        return
    if success is None:
        findings.problems.append(
            f"{join(root, SUCCESS)} is not there: the run has not finished. Run it again."
        )
        return
    for dataset in sorted({*success, *findings.totals}):
        if dataset not in success:
            findings.problems.append(
                f"{dataset} is not in {join(root, SUCCESS)}: its run has not finished. Run it again."
            )
        found, totals = (totals.get(dataset, Totals()) for totals in (findings.totals, success))
        for field in ("shards", "files", "read", "written", "rejected"):
            there, said = getattr(found, field), getattr(totals, field)
            if there != said:
                findings.problems.append(f"{dataset} has {field} {there}, but {SUCCESS} says {said}")


def report(findings: Findings, _args: argparse.Namespace, _seconds: float) -> str:
    """Returns what the command prints."""
    return "\n".join(findings.lines())
