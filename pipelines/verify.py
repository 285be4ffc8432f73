"""Proves from its files that an output is complete and sound: `diptych verify OUT`."""

import collections
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.job import DATASETS, JOB, data_files, digest, read_json, read_success, shard_of
from transforms.chunk import ChunkKey, add_counts
from transforms.errors import DiptychError, InputError
from transforms.finish import SUCCESS, Totals
from transforms.schemas import REJECTS
from transforms.sink import DAMAGE, Commit, parse_commit
from transforms.storage import input_errors, join, locate


@dataclasses.dataclass
class Findings:
    """What `verify` found.

    Attributes:
        problems: What is wrong, a line each.
        totals: What is there, by data set.
    """

    problems: list[str]
    totals: dict[str, Totals]

    def lines(self) -> Iterator[str]:
        """Yields what to print."""
        for dataset, totals in sorted(self.totals.items()):
            rejects = sum(totals.rejected.values())
            yield (
                f"{dataset}: {totals.shards} shards, {totals.files} files: {totals.read:,} rows read = "
                f"{totals.written:,} written + {rejects:,} rejected"
            )
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
    job = read_json(root, JOB)
    if job is None:
        raise InputError(
            f"{root} has no {JOB}, so it is not the output of a job. Expected the --output of one."
        )
    findings = Findings([], {})
    commits: dict[str, Commit] = {}
    for dataset in DATASETS:
        if data_files(root, dataset):
            found = _check_dataset(root, dataset, digest(job), findings)
            _check_shards(dataset, found, findings)
            findings.totals[dataset] = functools.reduce(Totals.add, found.values(), Totals())
            commits |= found
    _check_rejects(root, commits, findings)
    _check_success(root, findings)
    return findings


def _check_dataset(root: str, dataset: str, fingerprint: str, findings: Findings) -> dict[str, Commit]:
    """Reads every data file; returns the commits of the sound ones by file name."""
    commits: dict[str, Commit] = {}
    schema: pa.Schema | None = None
    for shard, names in itertools.groupby(data_files(root, dataset), shard_of):
        keys = [np.empty(0, np.uint64)]
        for name in names:
            url = join(root, dataset, name)
            try:
                commit, file_schema, hashes = _read_data_file(url)
            except (InputError, *DAMAGE) as error:
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
        repeated = sum(map(len, keys)) - len(np.unique(np.concatenate(keys)))
        if repeated and dataset == "images":
            findings.problems.append(f"shard {shard} has {repeated} keys twice")
    return commits


def _unreadable(url: str, error: Exception) -> str:
    if isinstance(error, InputError):
        return str(error)
    return f"{url} cannot be read: {' '.join(str(error).split())[:300]}"


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
                hashes.append(_hash(batch.column("key")))
            return commit, schema, np.concatenate(hashes)


def _hash(keys: pa.StringArray) -> np.ndarray[Any, Any]:
    digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys.drop_null().to_pylist())
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


def _check_rejects(root: str, commits: dict[str, Commit], findings: Findings) -> None:
    """Checks that the rejects are what the data files say they are."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for stage in data_files(root, "rejects"):
        for name in data_files(root, join("rejects", stage)):
            url = join(root, "rejects", stage, name)
            try:
                found.setdefault(name, {})[stage] = _count_rejects(url)
            except (InputError, *DAMAGE) as error:
                findings.problems.append(_unreadable(url, error))
    for name in sorted({*found, *commits}):
        expected = {s: dict(r) for s, r in commits[name].rejected.items()} if name in commits else {}
        if found.get(name, {}) != expected:
            findings.problems.append(
                f"rejects/*/{name} hold {found.get(name, {})}, but the data file of that name says {expected}; "
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
        found, totals = (totals.get(dataset, Totals()) for totals in (findings.totals, success))
        for field in ("shards", "files", "read", "written", "rejected"):
            there, said = getattr(found, field), getattr(totals, field)
            if there != said:
                findings.problems.append(f"{dataset} has {field} {there}, but {SUCCESS} says {said}")
