"""Shards of an annotated data set: a plan says which image and captions a row has, workers fetch the images.

A plan is an Arrow IPC file with a record batch for each shard, so that a worker reads its batch and no more.
It lies with the output, and a run that goes on after a crash need not read the annotation again.
"""

import dataclasses
import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa

from diptych.transforms import storage
from diptych.transforms.chunk import Reject, add_counts
from diptych.transforms.sources.archives.shard_file import encodable, metadata_text
from diptych.transforms.sources.base import MAX_TEXT_BYTES, ColumnNames, Record, Row, Shard
from diptych.transforms.sources.planned import image_folder
from diptych.transforms.sources.planned.entries import key_of
from diptych.transforms.sources.sample import Sample

_FACTS = b"diptych.plan"


class Entry(NamedTuple):
    """A row of a plan: an image with its captions, or, with a reason, a reject.

    Attributes:
        row: Ordinal of the image in its annotation.
        key: Identity of the image; may be empty in a reject, and where it is in a file of text beside the image.
        image: Where the image is; None in a reject.
        captions: Raw captions.
        reason: Why the row is lost, one of `diptych.transforms.schemas.REASONS`; None where it is not.
        message: What was found, for people; empty where nothing is wrong.
        metadata: Values of the metadata columns; None where there are none.
        texts: Files beside the image with its captions and fields.
    """

    row: int
    key: str
    image: image_folder.ImageFile | None
    captions: Sequence[str]
    reason: str | None
    message: str
    metadata: Sequence[str | None] | None
    texts: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class PlanFacts:
    """What a plan file says about itself.

    Attributes:
        made_from: Everything that decides the plan; one made from something else is not used again.
        num_rows: Rows in all its batches.
        rows_per_shard: Rows of each batch but the last.
        shard_sizes_bytes: Size of each batch's images as far as it is known.
        counters: What planning noticed, by name.
        notes: Sentences that the user is told.
    """

    made_from: Mapping[str, object]
    num_rows: int
    rows_per_shard: int
    shard_sizes_bytes: Sequence[int]
    counters: Mapping[str, int]
    notes: Sequence[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class PlannedShard(Shard):
    """A batch of a plan, with its images fetched as it is read.

    Attributes:
        plan: URL of the plan file.
        batch: Number of the record batch in it.
        images: URL of the folder or archive that the images are in.
        source: Path of the annotation below the input root; None where each image is an input file by itself.
        metadata_columns: Names of the metadata columns.
        columns: The columns that the user names, of files of text beside an image.
    """

    plan: str
    batch: int
    images: str
    source: str | None
    metadata_columns: tuple[str, ...]
    columns: ColumnNames = ColumnNames()

    @property
    def input(self) -> str:
        """The annotation's path below the input root, or the plan's name, and which part of it."""
        return f"{self.source or posixpath.basename(self.plan)}#{self.batch}"

    def records(self, skip: int) -> Iterator[Record]:
        """Yields the planned rows; the images of the first `skip` are left empty, not fetched.

        Raises:
            InputError: The plan is gone, or all of the images that were there when it was made.
        """
        return self._records(skip, with_images=True)

    def texts(self, skip: int) -> Iterator[Record]:
        """Yields the planned rows; no image is fetched."""
        return self._records(skip, with_images=False)

    def _records(self, skip: int, with_images: bool) -> Iterator[Record]:
        entries = self._entries()
        wanted: list[image_folder.ImageFile] = []
        for ordinal, entry in enumerate(entries):
            if entry.image is not None:
                wanted += [entry.image] if with_images and ordinal >= skip else []
                wanted += [
                    image_folder.ImageFile(text) for text in entry.texts if ordinal >= skip or not entry.key
                ]
        others = [entry.image for entry in entries[:skip] if entry.image is not None]
        contents = image_folder.fetch(self.images, wanted, others)
        for ordinal, entry in enumerate(entries):
            if entry.image is None:
                yield Reject(entry.key, entry.row, entry.reason or "bad_annotation", entry.message)
                continue
            path = entry.image.path
            data = next(contents) if ordinal >= skip and with_images else b""
            texts = [next(contents) for _ in entry.texts] if ordinal >= skip or not entry.key else []
            if isinstance(data, image_folder.Absent):
                yield Reject(entry.key, entry.row, "missing_image", f"{path} {data.message}")
                continue
            if isinstance(data, image_folder.Unreadable):
                yield Reject(entry.key, entry.row, "record_corrupt", f"{path}: {data.message}")
                continue
            name = path.rpartition("/")[2]
            metadata = dict(zip(self.metadata_columns, entry.metadata or (), strict=False))
            row = Row(entry.key, data, name, entry.captions, self.source or path, entry.row, metadata)
            yield self._with_texts(row, entry.texts, texts) if texts else row

    def _with_texts(
        self,
        row: Row,
        names: Sequence[str],
        texts: Sequence[bytes | image_folder.Unreadable | image_folder.Absent],
    ) -> Record:
        """Returns a row with what the files of text beside its image say."""
        sample = Sample(row.key, self.columns)
        unread = 0
        for name, text in zip(names, texts, strict=True):
            if isinstance(text, bytes) and len(text) <= MAX_TEXT_BYTES:
                sample.members[name.rpartition(".")[2].lower()] = text
            else:
                unread += 1
        found = sample.texts()
        values = {
            name: value
            if (value := row.metadata.get(name)) is not None
            else metadata_text(found.fields.get(name))
            for name in self.metadata_columns
        }
        counters = add_counts(found.counters, {"texts_unreadable": unread})
        key: str | None = row.key
        if not key and (key := key_of(found.fields, self.columns.key or "")) is None:
            message = f"{row.source} has no {self.columns.key} for its key in the .json beside it"
            key = posixpath.splitext(row.source)[0]
            return Reject(key, row.row, "bad_annotation", message, row.image, counters)
        return row._replace(
            key=encodable(key), captions=[*row.captions, *found.captions], metadata=values, counters=counters
        )

    def _entries(self) -> list[Entry]:
        with storage.input_errors(self.plan):
            fs, path = storage.locate(self.plan)
            with fs.open(path, "rb") as file, pa.ipc.open_file(file) as plan:
                batch = plan.get_batch(self.batch)
        metadata = zip(
            *(batch.column(f"metadata.{name}").to_pylist() for name in self.metadata_columns), strict=True
        )
        columns = (batch.column(name).to_pylist() for name in _COLUMNS.names)
        return [
            Entry(
                row,
                key,
                None
                if reason is not None
                else image_folder.ImageFile(path, size_bytes, offset, packed_bytes, crc32),
                captions,
                reason,
                message,
                next(metadata, ()),
                texts,
            )
            for row, key, captions, reason, message, path, size_bytes, offset, packed_bytes, crc32, texts in zip(
                *columns, strict=True
            )
        ]


def write_plan(
    path: str, facts: PlanFacts, entries: Iterable[Entry], metadata_columns: Sequence[str]
) -> None:
    """Writes a plan to a local file, a batch at a time.

    Args:
        path: Where; the folder is there.
        facts: About the plan; `num_rows` and `shard_sizes_bytes` agree with the entries.
        entries: The rows in order.
        metadata_columns: Names of the metadata columns.
    """
    schema = _COLUMNS
    for name in metadata_columns:
        schema = schema.append(pa.field(f"metadata.{name}", pa.string()))
    schema = schema.with_metadata({_FACTS: json.dumps(dataclasses.asdict(facts))})
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, schema) as writer:
        pending: list[Entry] = []
        written = 0
        for entry in entries:
            pending.append(entry)
            if len(pending) == facts.rows_per_shard:
                writer.write_batch(_batch(pending, schema))
                written += 1
                pending.clear()
        if pending or not written:  # a plan without rows still has a shard, to say so
            writer.write_batch(_batch(pending, schema))


def read_facts(url: str) -> PlanFacts | None:
    """Returns what a plan file says about itself; None where there is no whole plan file."""
    fs, path = storage.locate(url)
    with storage.input_errors(url):
        if not storage.exists(fs, path):
            return None
        try:
            with fs.open(path, "rb") as file, pa.ipc.open_file(file) as plan:
                if not set(_COLUMNS.names) <= set(plan.schema.names):
                    return None
                return PlanFacts(**json.loads(plan.schema.metadata[_FACTS]))
        except (pa.ArrowInvalid, KeyError, TypeError, ValueError):
            return None


def plan_shards(
    url: str,
    facts: PlanFacts,
    name: str,
    images: str,
    source: str | None,
    metadata_columns: tuple[str, ...],
    columns: ColumnNames = ColumnNames(),  # noqa: B008 (frozen)
) -> list[Shard]:
    """Returns the shards of a plan that is written: `NAME-00000`, `NAME-00001`, …"""
    return [
        PlannedShard(
            name=f"{name}-{batch:05d}",
            size_bytes=size_bytes,
            num_rows=min(facts.rows_per_shard, facts.num_rows - batch * facts.rows_per_shard),
            plan=url,
            batch=batch,
            images=images,
            source=source,
            metadata_columns=metadata_columns,
            columns=columns,
        )
        for batch, size_bytes in enumerate(facts.shard_sizes_bytes)
    ]


def plan_counters(shards: Iterable[Shard]) -> dict[str, int]:
    """Returns what planning counted, added up over the plans that the shards belong to.

    `unlisted_images` are files that the annotation does not name; `repaired_captions` captions whose line was damaged
    in a known way; `captions_not_utf8` those with bytes that no character can be made of; `ids_of_other_type` captions
    whose id is the image's but for its type; `similar_file_names` images whose file's name is spelled in another way;
    `entries_joined` entries of a file that has another entry. Shards without a plan add nothing.
    """
    totals: dict[str, int] = {}
    for facts in _plans(shards):
        totals = add_counts(totals, facts.counters)
    return totals


def plan_notes(shards: Iterable[Shard]) -> list[str]:
    """Returns what the user is told of the plans that the shards belong to."""
    return [note for facts in _plans(shards) for note in facts.notes]


def _plans(shards: Iterable[Shard]) -> Iterator[PlanFacts]:
    for url in {shard.plan: None for shard in shards if isinstance(shard, PlannedShard)}:
        if facts := read_facts(url):
            yield facts


_COLUMNS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("message", pa.string(), nullable=False),
        pa.field("path", pa.string()),
        pa.field("size_bytes", pa.int64()),
        pa.field("offset", pa.int64()),
        pa.field("packed_bytes", pa.int64()),
        pa.field("crc32", pa.int64()),
        pa.field("texts", pa.list_(pa.string()), nullable=False),
    ]
)


def _batch(entries: Sequence[Entry], schema: pa.Schema) -> pa.RecordBatch:
    num_metadata = len(schema) - len(_COLUMNS)
    rows = [
        (entry.row, entry.key, entry.captions, entry.reason, entry.message)
        + (entry.image or (None,) * len(image_folder.ImageFile._fields))
        + (entry.texts,)
        + tuple(entry.metadata or [None] * num_metadata)
        for entry in entries
    ]
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    return pa.record_batch(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema
    )
