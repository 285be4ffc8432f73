"""Proves from its files that an output is complete and sound: `diptych verify OUT`."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.job import DATASETS, JOB, digest, read_json, read_success
from transforms.errors import InputError
from transforms.finish import SUCCESS, Totals
from transforms.schemas import REJECTS
from transforms.sink import Commit, parse_commit
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
    datasets = [dataset for dataset in DATASETS if _files(root, dataset)]
    for dataset in datasets:
        commits = _check_dataset(root, dataset, digest(job), findings)
        _check_shards(commits, findings)
        _check_rejects(root, commits, findings)
        totals = Totals()
        for commit in commits.values():
            totals = totals.add(commit)
        findings.totals[dataset] = totals
    _check_success(root, findings)
    return findings


def _files(root: str, folder: str) -> list[str]:
    fs, path = locate(join(root, folder))
    try:
        return sorted(os.path.basename(name) for name in fs.ls(path, detail=False))
    except FileNotFoundError:
        return []


def _check_dataset(root: str, dataset: str, fingerprint: str, findings: Findings) -> dict[str, Commit]:
    """Reads every data file; returns the commits of the sound ones by file name."""
    commits: dict[str, Commit] = {}
    keys: dict[str, list[np.ndarray[Any, Any]]] = {}
    schema: pa.Schema | None = None
    for name in _files(root, dataset):
        url = join(root, dataset, name)
        try:
            commit, file_schema, hashes = _read_data_file(url)
        except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
            findings.problems.append(f"{url} cannot be read: {' '.join(str(error).split())[:300]}")
            continue
        expected = f"{commit.shard}-{commit.index:05d}.parquet"
        schema = schema or file_schema
        if name != expected:
            findings.problems.append(f"{url} says that it is {expected}")
        elif commit.fingerprint != fingerprint:
            findings.problems.append(
                f"{url} is of run {commit.fingerprint}, the output is of run {fingerprint}"
            )
        elif not file_schema.equals(schema):
            findings.problems.append(f"{url} has another schema than the files before it")
        elif len(hashes) != commit.written or commit.read != commit.written + commit.rejects():
            findings.problems.append(
                f"{url} holds {len(hashes)} rows; its footer says {commit.read} read, {commit.written} written, "
                f"{commit.rejects()} rejected"
            )
        else:
            commits[name] = commit
            keys.setdefault(commit.shard, []).append(hashes)
    for shard, parts in keys.items():
        repeated = sum(map(len, parts)) - len(np.unique(np.concatenate(parts)))
        if repeated and dataset == "images":
            findings.problems.append(f"shard {shard} has {repeated} keys twice")
    return commits


def _read_data_file(url: str) -> tuple[Commit, pa.Schema, np.ndarray[Any, Any]]:
    """Returns a data file's commit, its schema without metadata, and a 64-bit hash of each row's key."""
    fs, path = locate(url)
    hashes = [np.empty(0, np.uint64)]
    with input_errors(url), fs.open(path, "rb") as file:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        commit = parse_commit(parquet.metadata.metadata or {})
        for batch in parquet.iter_batches(256):
            hashes.append(_hash(batch.column("key")))
        return commit, parquet.schema_arrow.remove_metadata(), np.concatenate(hashes)


def _hash(keys: pa.StringArray) -> np.ndarray[Any, Any]:
    digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys.to_pylist())
    return np.frombuffer(b"".join(digests), np.uint64)


def _check_shards(commits: dict[str, Commit], findings: Findings) -> None:
    shards: dict[str, list[Commit]] = {}
    for commit in commits.values():
        shards.setdefault(commit.shard, []).append(commit)
    for shard, parts in sorted(shards.items()):
        found = {commit.index for commit in parts}
        end = max(found)
        missing = [str(index) for index in range(end) if index not in found]
        if missing:
            findings.problems.append(f"shard {shard} lacks its files {', '.join(missing)} of 0 to {end}")
        lasts = [commit.index for commit in parts if commit.last]
        if lasts != [end]:
            findings.problems.append(f"shard {shard} ends at file {end}, which is not marked as its last")


def _check_rejects(root: str, commits: dict[str, Commit], findings: Findings) -> None:
    """Checks that the rejects are what the data files say they are."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for stage in _files(root, "rejects"):
        for name in _files(root, f"rejects/{stage}"):
            url = join(root, "rejects", stage, name)
            fs, path = locate(url)
            try:
                with fs.open(path, "rb") as file:
                    table = pq.read_table(file, page_checksum_verification=True)
            except (pa.ArrowException, OSError) as error:
                findings.problems.append(f"{url} cannot be read: {error}")
                continue
            if not table.schema.equals(REJECTS):
                findings.problems.append(f"{url} has another schema than rejects have")
                continue
            counts = table.column("reason").value_counts().to_pylist()
            reasons = {entry["values"]: entry["counts"] for entry in counts}
            found.setdefault(name, {})[stage] = reasons
    for name in sorted({*found, *commits}):
        expected = {s: dict(r) for s, r in commits[name].rejected.items()} if name in commits else {}
        if found.get(name, {}) != expected:
            findings.problems.append(
                f"the rejects of {name} are {found.get(name, {})}, its footer says {expected}"
            )


def _check_success(root: str, findings: Findings) -> None:
    success = read_success(root)
    if success is None:
        findings.problems.append(
            f"{join(root, SUCCESS)} is not there: the run has not finished. Run it again."
        )
        return
    for dataset, totals in success.items():
        found = findings.totals.get(dataset, Totals())
        for field in ("shards", "files", "read", "written", "rejected"):
            there, said = getattr(found, field), getattr(totals, field)
            if there != said:
                findings.problems.append(f"{dataset} has {field} {there}, but {SUCCESS} says {said}")
