"""What every source gives: shards, each a stable name and a stream of records.

A source module turns input files into `Shard`s on the launcher. A shard travels to a worker (pickled, so it
is small: a URL and options, never rows) and is read there.
"""

import abc
import collections
import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

from diptych.transforms.chunk import Reject
from diptych.transforms.errors import InputError

MAX_TEXT_BYTES = 4 << 20
"""The largest text that goes with an image; its JSON may take twenty times its size while it is parsed."""


class Row(NamedTuple):
    """An image with its captions, as the source has them.

    Attributes:
        key: Identity of the image, unique in its shard.
        image: The encoded image, as it stands in the source.
        path: File name of the image, for people.
        captions: Raw captions, any number.
        source: Path of the input file below the input root.
        row: Ordinal of the row in `source`.
        metadata: Values of the metadata columns asked for; a missing one is null.
        counters: What the reader had to mend or leave out to get this row, by name.
    """

    key: str
    image: bytes
    path: str
    captions: Sequence[str]
    source: str
    row: int
    metadata: Mapping[str, str | None] = {}
    counters: Mapping[str, int] = {}


Record = Row | Reject


@dataclasses.dataclass(frozen=True)
class ColumnNames:
    """The user's choice of columns, fields or features; None finds one with a usual name.

    Attributes:
        image: The images' column.
        caption: The captions' column.
        key: The keys' column.
    """

    image: str | None = None
    caption: str | None = None
    key: str | None = None


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file that decides the output, for the fingerprint of a run.

    Attributes:
        name: Path below the input root, so that the same data elsewhere has the same fingerprint.
        size_bytes: Its size.
        sha256: Digest of its content; only of files that the launcher reads whole (annotations).
    """

    name: str
    size_bytes: int
    sha256: str = ""


@dataclasses.dataclass(frozen=True)
class Shard(abc.ABC):
    """A unit of reading: one worker reads it from its start to its end.

    Attributes:
        name: Stable and unique in the job; the first part of its output files' names.
        size_bytes: Encoded size, to tell progress by; 0 where unknown.
        num_rows: Number of records, to tell progress by; None where unknown.
    """

    name: str
    size_bytes: int
    num_rows: int | None

    duplicate_hint: ClassVar[str] = ""
    """What a reject of a key that was there before says of how to mend it."""

    @property
    @abc.abstractmethod
    def input(self) -> str:
        """The shard's input, which each of its commits names: no other shard of a job has the same."""

    @abc.abstractmethod
    def records(self, skip: int) -> Iterator[Record]:
        """Yields every record in order, the same in each call.

        Args:
            skip: The images of the first `skip` records are not needed: they may be empty bytes.

        Raises:
            InputError: The shard itself is gone or may not be read. Damage inside it is a `Reject` record,
                `shard_truncated` or `shard_corrupt`, that names the offset.
        """

    def texts(self, skip: int) -> Iterator[Record]:
        """Yields the records as `records` does, for a reader that wants no image: those may be empty bytes."""
        return self.records(skip)

    def rows(self, skip: int = 0, with_images: bool = True) -> Iterator[Record]:
        """Yields the records after the first `skip`; a key that was there before is lost as `duplicate_key`.

        Args:
            skip: Records to leave out.
            with_images: Whether the images are wanted; if not, they may be empty bytes.
        """
        seen: set[bytes] = set()
        for ordinal, record in enumerate(self.records(skip) if with_images else self.texts(skip)):
            if isinstance(record, Row):
                digest = hashlib.blake2b(record.key.encode(), digest_size=8).digest()
                if digest in seen:
                    message = f"key {record.key!r} occurs before in this shard{self.duplicate_hint}"
                    record = Reject(
                        record.key, record.row, "duplicate_key", message, record.image, record.counters
                    )
                seen.add(digest)
            if ordinal >= skip:
                yield record


@dataclasses.dataclass(frozen=True)
class Source(abc.ABC):
    """Input of one format: what the launcher knows of it, and the shards that workers read.

    Attributes:
        columns: The columns that the user names.
        passed_over: Files of the input that are no part of it, by the name of a counter.
        notes: Sentences that the user is told before the run.
    """

    columns: ColumnNames = dataclasses.field(default=ColumnNames(), kw_only=True)
    passed_over: Mapping[str, int] = dataclasses.field(default_factory=dict, kw_only=True)
    notes: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)

    format: ClassVar[str]
    """The name of the format, in `--format` and in fingerprints."""
    column_flags: ClassVar[frozenset[str]] = frozenset()
    """Flags that name columns of this format: `image_column`, `caption_column`, `key_column`, `metadata_columns`."""

    def column_notes(self) -> tuple[str, ...]:
        """Returns what the user is told of the choice of columns; looking for it costs no more than a file's head."""
        return ()

    @abc.abstractmethod
    def inputs(self) -> list[InputFile]:
        """Returns the files that decide the output, for the fingerprint of the run."""

    @abc.abstractmethod
    def shards(self, plan_folder: str, rows_per_shard: int) -> list[Shard]:
        """Returns the shards, in an order that is the same in each run.

        Args:
            plan_folder: Where a source that is planned keeps its plan; one that is there is used again.
            rows_per_shard: Rows of a planned shard. Sources whose files are shards ignore both.

        Raises:
            InputError: An input is gone, unreadable, or not what it should be.
            OptionError: An option asks for something that the input does not have.
        """


def passed_over_note(format: str, number: int, names: Sequence[str]) -> str:
    """Returns what to say of files that are passed over.

    Args:
        format: What the input is read as.
        number: How many files are no part of it.
        names: Some of their names.
    """
    shown = list(names)[:_MAX_NAMED]
    more = f" and {number - len(shown)} more" if number > len(shown) else ""
    files = "file that is" if number == 1 else "files that are"
    return f"Passed over {number} {files} no data of format {format}: {', '.join(shown)}{more}."


def shard_names(paths: Iterable[str]) -> list[str]:
    """Returns a unique file-name-safe name for each path, stable as long as the paths are.

    The data extension goes, folders are joined by `__`; a name that lost anything else (odd characters, length,
    or a clash such as `a.tar` beside `a.tar.gz`, or beside `A.tar` on a disk that ignores case) gets a 128-bit digest
    of its path.

    Raises:
        InputError: Two paths have one name, which would cost the rows of one of them.
    """
    paths = list(paths)
    plain = [_DATA_EXTENSION.sub("", path).replace("/", "__") for path in paths]
    safe = [re.sub(r"[^A-Za-z0-9._-]", "_", name)[:_MAX_NAME_CHARS].lstrip("._") or "shard" for name in plain]
    uses = collections.Counter(name.lower() for name in safe)
    names = []
    for path, before, name in zip(paths, plain, safe, strict=True):
        if name != before or uses[name.lower()] > 1:
            encoded = path.encode("utf-8", "surrogateescape")
            name += "-" + hashlib.sha256(encoded).hexdigest()[:_DIGEST_CHARS]
        names.append(name)
    path_of: dict[str, str] = {}
    for path, name in zip(paths, names, strict=True):
        if name.lower() in path_of:
            raise InputError(
                f"The inputs {path_of[name.lower()]!r} and {path!r} would both be written as {name}-00000.parquet, and "
                "the rows of one would be lost. Give each input once; rename one of them if they are two files."
            )
        path_of[name.lower()] = path
    return names


# With the digest, the number of a plan's part and that of a chunk, a name stays below the 255 bytes of most disks
_MAX_NAME_CHARS, _DIGEST_CHARS = 120, 32
_MAX_NAMED = 3
_DATA_EXTENSION = re.compile(
    r"\.(tar(\.(gz|bz2|xz|zst|lz4))?|tgz|tbz2?|txz|tzst|parquet|tfrecords?(\.gz)?|tfrec|json(\.gz)?|token(\.txt)?|(txt|csv|tsv|jsonl|ndjson)(\.gz)?)$",
    re.I,
)
