"""The sink: one Parquet file a chunk, whole or not at all, and the same bytes however often it is written.

The rejects go first and the data file last, so the data file is the commit. Its footer says what was read for it,
so a shard is complete exactly when its files 0 to k are there and k is marked last; nothing else is kept.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.metrics.metric import Metrics
from apache_beam.pvalue import PCollection
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue
from fsspec.implementations.local import LocalFileSystem

from diptych.models.errors import one_line
from diptych.transforms.chunk import Chunk, ChunkKey
from diptych.transforms.errors import InputError, OutputError
from diptych.transforms.fingerprint import digest
from diptych.transforms.output_layout import SCRATCH, read_json
from diptych.transforms.progress import progress
from diptych.transforms.schemas import REASONS, REJECTS, huggingface_info
from diptych.transforms.storage import delete, input_errors, is_absence, join, locate, write_whole


@dataclasses.dataclass(frozen=True)
class Claim:
    """The record by which a job owns a data set.

    Attributes:
        name: Its place below the output folder.
        dataset: The data set.
        fingerprint: Digest of the fingerprint that it must hold.
        taken_over: Whether it may have been taken from a run at work, which may write a file even after that.
    """

    name: str
    dataset: str
    fingerprint: str
    taken_over: bool = False

    def check(self, root: str) -> None:
        """Checks that the data set is still the job's own.

        Raises:
            OutputError: Another run has taken it with `--overwrite`.
        """
        record = read_json(root, self.name)
        if not isinstance(record, dict) or digest(record.get(self.dataset, {})) != self.fingerprint:
            raise OutputError(
                f"{join(root, self.dataset)} belongs to another run by now, which was started with --overwrite while "
                "this one was at work. This one stops; let the other end, or choose another --output."
            )


@dataclasses.dataclass(frozen=True)
class Sink:
    """Where the chunks of a data set go.

    Attributes:
        root: The output folder, `OUT`.
        dataset: The data set in it: `images`, `embeddings`, `captions` or `generated`.
        job: What the files' metadata say about the run: job, version, fingerprint, model.
        schema: Schema of the rows.
        claim: The record by which the job owns the data set; None where nothing is claimed.
        retry_rejects: Reasons of rejects for which a chunk that is committed is made again.
        has_files: Whether an earlier run left data files.
        orphans: Files of rejects below `root` without a data file: of chunks that a run had begun when it was killed.
    """

    root: str
    dataset: str
    job: Mapping[str, str]
    schema: pa.Schema
    claim: Claim | None = None
    retry_rejects: tuple[str, ...] = ()
    has_files: bool = False
    orphans: frozenset[str] = frozenset()

    def is_to_retry(self, commit: "Commit") -> bool:
        """Tells whether a committed chunk is to be made again, for the rows that were rejected."""
        return any(not reasons.keys().isdisjoint(self.retry_rejects) for reasons in commit.rejected.values())


@dataclasses.dataclass(frozen=True)
class Commit:
    """What the footer of a data file says of its chunk.

    Attributes:
        dataset: The data set that the file belongs to.
        shard: Name of the shard.
        index: Ordinal of the chunk in it.
        last: Whether it is the shard's last.
        records: Records of the shard that the chunk was read from.
        read: Rows read for the chunk.
        written: Rows in the file.
        rejected: Rows in the rejects, by stage and reason.
        counters: What the transforms did, by name.
        fingerprint: Of the run that wrote it.
        input: What the shard was read from.
        size_bytes: Size of the file; the one thing that the footer does not say.
    """

    dataset: str
    shard: str
    index: int
    last: bool
    records: int
    read: int
    written: int
    rejected: Mapping[str, Mapping[str, int]]
    counters: Mapping[str, int]
    fingerprint: str
    input: str = ""
    size_bytes: int = dataclasses.field(default=0, compare=False)

    def key(self) -> ChunkKey:
        """Returns the name of the chunk."""
        return ChunkKey(self.shard, self.index)

    def rejects(self) -> int:
        """Returns the number of rejected rows."""
        return sum(sum(reasons.values()) for reasons in self.rejected.values())


_METADATA_KEY = b"diptych"


def commit_chunk(sink: Sink, chunk: Chunk) -> Commit:
    """Writes a chunk: its rejects, a file a stage, and then its rows.

    Raises:
        OutputError: The store refused; nothing is under the data file's name then.
    """
    if not chunk.rows.schema.equals(sink.schema):
        raise AssertionError(f"the rows of {chunk.key} have schema {chunk.rows.schema}, not {sink.schema}")
    commit = _commit(sink, chunk)
    name = chunk.key.file_name()
    scratch = join(SCRATCH, sink.job["fingerprint"])
    stages = chunk.rejects.column("stage")
    rejects = {
        stage: _parquet(chunk.rejects.filter(pa.compute.equal(stages, stage)), REJECTS, {})
        for stage in commit.rejected
    }
    metadata = {
        _METADATA_KEY: json.dumps({**sink.job, **_in_footer(commit)}, sort_keys=True).encode(),
        b"huggingface": huggingface_info(sink.schema).encode(),
    }
    data = _parquet(chunk.rows, sink.schema, metadata)
    if sink.has_files or sink.orphans:  # just before what takes its place
        _delete_earlier(sink, chunk, commit)
    for stage, lost in rejects.items():
        write_whole(sink.root, f"rejects/{stage}/{name}", lost, scratch)
    write_whole(sink.root, f"{sink.dataset}/{name}", data, scratch)
    return dataclasses.replace(commit, size_bytes=len(data))


def _in_footer(commit: Commit) -> dict[str, Any]:
    values = dataclasses.asdict(commit)
    del values["size_bytes"]
    return values


def _delete_earlier(sink: Sink, chunk: Chunk, commit: Commit) -> None:
    """Deletes what an earlier run left of a chunk and what is not written over now.

    The commit goes first: killed after that, the chunk is simply missing, and its rejects are orphans.
    """
    name = chunk.key.file_name()
    paths = {f"rejects/{stage}/{name}" for stage in REASONS} & sink.orphans
    if sink.has_files and (earlier := read_commit(sink, chunk.key, chunk.input)):
        paths |= {f"rejects/{stage}/{name}" for stage in earlier.rejected}
        if earlier != commit:
            delete(sink.root, (f"{sink.dataset}/{name}",))
    delete(sink.root, sorted(paths - {f"rejects/{stage}/{name}" for stage in commit.rejected}))


def _commit(sink: Sink, chunk: Chunk) -> Commit:
    rejected: dict[str, dict[str, int]] = {}
    rejects = zip(
        chunk.rejects.column("stage").to_pylist(), chunk.rejects.column("reason").to_pylist(), strict=True
    )
    for stage, reason in sorted(rejects):
        reasons = rejected.setdefault(stage, {})
        reasons[reason] = reasons.get(reason, 0) + 1
    return Commit(
        sink.dataset,
        chunk.key.shard,
        chunk.key.index,
        chunk.last,
        chunk.num_records,
        chunk.num_read,
        len(chunk),
        rejected,
        chunk.counters,
        sink.job["fingerprint"],
        chunk.input,
    )


def _parquet(rows: pa.RecordBatch, schema: pa.Schema, metadata: Mapping[bytes, bytes]) -> memoryview:
    """Returns rows as a Parquet file of one row group, or of none where there are none, with a checksum a page."""
    schema = schema.with_metadata(metadata)
    buffer = pa.BufferOutputStream()
    paths = [name for field in schema for name in _leaves(field)]
    # encoded images and vectors do not get smaller
    large = {name for field in schema for name in _leaves(field) if not _compresses(name, field.type)}
    with pq.ParquetWriter(
        buffer,
        schema,
        compression={path: "none" if path in large else "zstd" for path in paths},
        use_dictionary=["source"] if "source" in schema.names else False,
        write_statistics=[name for name in ("key", "row", "width", "height") if name in schema.names],
        write_page_checksum=True,
    ) as writer:
        if len(rows):  # Hugging Face datasets fail on a row group without rows
            writer.write_batch(rows.cast(schema) if metadata else rows, row_group_size=len(rows))
    return memoryview(buffer.getvalue())


def _compresses(path: str, dtype: pa.DataType) -> bool:
    return not path.endswith("bytes") and not pa.types.is_fixed_size_list(dtype)


def _leaves(field: pa.Field) -> list[str]:
    if pa.types.is_struct(field.type):
        return [f"{field.name}.{child.name}" for child in field.type]
    if pa.types.is_list(field.type) or pa.types.is_fixed_size_list(field.type):
        return [f"{field.name}.list.element"]
    return [f"{field.name}.list.element"] if isinstance(field.type, pa.FixedShapeTensorType) else [field.name]


def read_commit(sink: Sink, key: ChunkKey, input: str) -> Commit | None:
    """Returns what a data file says of its chunk, or None where that chunk is not committed.

    Args:
        sink: Where it is.
        key: The chunk's name.
        input: What its shard is read from.

    Raises:
        OutputError: There is a file under that name which no sink of this run committed.
    """
    url = join(sink.root, sink.dataset, key.file_name())
    try:
        commit = _read_footer(url)
    except InputError as error:
        if is_absence(error):
            return None
        raise
    except READ_ERRORS as error:
        raise _not_ours(url, f"it is damaged ({one_line(error)})") from error
    if (commit.dataset, commit.key()) != (sink.dataset, key):
        name = join(commit.dataset, commit.key().file_name())
        raise _not_ours(url, f"its footer says that it is {name}")
    if commit.fingerprint != sink.job["fingerprint"]:
        if sink.claim and sink.claim.taken_over:
            return None
        raise _not_ours(url, f"it is of run {commit.fingerprint}, and this is run {sink.job['fingerprint']}")
    if commit.input != input:
        raise _not_ours(url, f"it was read from {commit.input!r}, and this chunk is from {input!r}")
    return commit


def _not_ours(url: str, what: str) -> OutputError:
    return OutputError(
        f"{url} is not as this job wrote it: {what}. Delete it to have it made again, or choose another --output."
    )


def has_commit(url: str) -> bool:
    """Tells whether a file is one that a sink wrote, for whichever run.

    Raises:
        InputError: It cannot be read.
    """
    try:
        _read_footer(url)
    except READ_ERRORS:
        return False
    return True


def _read_footer(url: str) -> Commit:
    with input_errors(url):
        fs, path = locate(url)
        with fs.open(path, "rb") as file:
            commit = parse_commit(pq.read_metadata(file).metadata or {})
            return dataclasses.replace(commit, size_bytes=file.seek(0, os.SEEK_END))


# What a footer that no sink wrote, or that changed since, makes its reader raise
READ_ERRORS = (pa.ArrowException, OSError, KeyError, ValueError, TypeError)


def parse_commit(metadata: Mapping[bytes, bytes]) -> Commit:
    """Returns the commit in a data file's key-value metadata.

    Raises:
        KeyError: The metadata hold none.
    """
    values: dict[str, Any] = json.loads(metadata[_METADATA_KEY])
    names = {field.name for field in dataclasses.fields(Commit)} - {"size_bytes"}
    return Commit(**{name: values[name] for name in names})


def committed(sink: Sink, shard: str, input: str) -> Iterator[Commit]:
    """Yields the commits of a shard, from its first chunk on, as far as they follow one another.

    Args:
        sink: Where they are.
        shard: The shard's name.
        input: What it is read from.
    """
    index = 0
    while (commit := read_commit(sink, ChunkKey(shard, index), input)) is not None:
        yield commit
        index += 1
        if commit.last:
            return


def withdraw(sink: Sink, key: ChunkKey) -> None:
    """Deletes the data file of a chunk that this run wrote while another one took the data set over.

    It may have replaced a file of that run, which then misses one and says so: better than one of other options.

    Raises:
        OutputError: The store refused.
    """
    name = key.file_name()
    with contextlib.suppress(InputError):  # it is gone
        if sink.claim and not foreign_files(sink.root, sink.claim, [name]):
            delete(sink.root, (f"{sink.dataset}/{name}",))


@dataclasses.dataclass(eq=False)  # not frozen: Beam labels its transforms
class WriteChunks(beam.PTransform[PCollection[Chunk], PCollection[Commit]]):
    """Chunks to files; gives a `Commit` for each.

    Attributes:
        sink: Where they go.
    """

    sink: Sink

    def expand(self, chunks: PCollection[Chunk]) -> PCollection[Commit]:
        """Applies `commit_chunk`."""
        return chunks | "Write" >> beam.ParDo(self.dofn()).with_output_types(Commit)

    def dofn(self) -> beam.DoFn:
        """Returns what writes the chunks of a bundle."""
        return _Write(self.sink)


def foreign_files(root: str, claim: Claim, names: Iterable[str]) -> list[str]:
    """Returns which of the data files of a data set are not what the job committed under their names.

    Args:
        root: The output folder.
        claim: The record by which the job owns the data set.
        names: The files' names.

    Raises:
        InputError: One cannot be read.
    """

    def is_foreign(name: str) -> bool:
        try:
            commit = _read_footer(join(root, claim.dataset, name))
        except READ_ERRORS:
            return True
        place = commit.dataset, commit.key().file_name(), commit.fingerprint
        return place != (claim.dataset, name, claim.fingerprint)

    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        return list(itertools.compress(names, pool.map(is_foreign, names)))


FOOTERS_AT_ONCE = 16  # on a store each is a few round trips

# On a store a job whose output another one takes over with --overwrite writes no longer than this; on a disk it looks
# before and after each file
_CHECK_EVERY_S = 1.0


class _Write(beam.DoFn):
    """Writes one chunk in the background while the next is being worked on, never more: memory stays bounded."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def setup(self) -> None:
        self._checked_s = -math.inf
        is_local = isinstance(locate(self._sink.root)[0], LocalFileSystem)
        self._check_every_s = 0.0 if is_local else _CHECK_EVERY_S
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="write")

    def start_bundle(self) -> None:
        self._writing: concurrent.futures.Future[Commit] | None = None

    def process(self, chunk: Chunk) -> Iterator[Commit]:
        if self._writing is not None:
            yield _record(self._writing.result())
        self._writing = self._thread.submit(self._commit, chunk)

    def _commit(self, chunk: Chunk) -> Commit:
        self._check_claim()
        commit = commit_chunk(self._sink, chunk)
        try:
            self._check_claim()
        except OutputError:
            withdraw(self._sink, chunk.key)
            raise
        return commit

    def _check_claim(self) -> None:
        claim, now_s = self._sink.claim, time.monotonic()
        if claim and now_s - self._checked_s >= self._check_every_s:
            claim.check(self._sink.root)
            self._checked_s = now_s

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self._writing is not None:
            commit = _record(self._writing.result())
            yield WindowedValue(commit, GlobalWindow().max_timestamp(), (GlobalWindow(),))

    def teardown(self) -> None:
        self._thread.shutdown()


def _record(commit: Commit) -> Commit:
    progress.committed(commit.shard, commit.index, commit.read, commit.rejects())
    Metrics.counter("diptych", "rows_written").inc(commit.written)
    Metrics.counter("diptych", "rows_rejected").inc(commit.rejects())
    return commit
