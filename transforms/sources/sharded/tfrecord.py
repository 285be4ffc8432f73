"""TFRecord shards of `tf.train.Example` or `tf.train.SequenceExample`, without TensorFlow.

A record is its length, a CRC of the length, the data, and a CRC of the data
(https://www.tensorflow.org/tutorials/load_data/tfrecord); the data is a protocol buffer of features by name.
"""

import contextlib
import dataclasses
import io
import itertools
import struct
from collections.abc import Iterator, Sequence
from typing import BinaryIO, ClassVar, NamedTuple

import google_crc32c

from diptych.models.files.location import redacted
from diptych.transforms.chunk import Reject
from diptych.transforms.errors import InputError, OptionError
from diptych.transforms.schemas import MAX_IMAGE_BYTES
from diptych.transforms.sources.archives.shard_file import (
    ShardDamage,
    image_name,
    open_shard,
    pass_over,
    read_up_to,
    unpacked,
)
from diptych.transforms.sources.base import ColumnNames, InputFile, Record, Row, Shard
from diptych.transforms.sources.sharded.columns import captions_note
from diptych.transforms.sources.sharded.example_features import (
    captions_of,
    feature_text,
    image_of,
    key_of,
    missing_features,
    unused_texts,
)
from diptych.transforms.sources.sharded.joined import DUPLICATE_HINT, join_captions, numbered_key
from diptych.transforms.sources.sharded.sharded_source import ShardedSource
from diptych.transforms.sources.sharded.tf_example import DecodeError, Example, parse_example

# The largest record that is read: an image, and what goes with it
_MAX_RECORD_BYTES = MAX_IMAGE_BYTES
# Records of the first file in which the chosen features are looked for before the job begins
_NUM_CHECKED = 100
# Records whose features are looked at for a note to the user
_NUM_NOTED = 8
_LENGTH = struct.Struct("<QI")
_CRC = struct.Struct("<I")


@dataclasses.dataclass(frozen=True)
class TfrecordSource(ShardedSource):
    """TFRecord shards, plain or compressed."""

    format: ClassVar[str] = "tfrecord"

    def shard(self, name: str, file: InputFile, url: str) -> "TfrecordShard":
        """Returns the shard of a file."""
        return TfrecordShard(name, file.size_bytes, None, url, file.name, self.metadata_columns, self.columns)

    def check(self, shards: Sequence[Shard]) -> None:
        """Checks that one of the first records has the features that are named as columns."""
        if self.metadata_columns or self.columns != ColumnNames():
            for shard in shards[:1]:
                assert isinstance(shard, TfrecordShard)
                shard.check_columns()

    def column_notes(self) -> tuple[str, ...]:
        """Returns what the first records say of texts that might be captions and are not read."""
        if not self.urls or self.columns.caption:
            return ()
        shard = TfrecordShard("", 0, None, self.urls[0], "")
        with contextlib.suppress(InputError, ShardDamage):
            return tuple(
                captions_note(redacted(self.urls[0]), "feature", unused_texts(shard.examples(_NUM_NOTED)))
            )
        return ()


@dataclasses.dataclass(frozen=True)
class TfrecordShard(Shard):
    """One TFRecord file.

    Attributes:
        url: Where it is.
        source: Its path below the input root.
        metadata_columns: Features to keep as metadata.
        columns: The features of images, captions and keys; None takes one with a usual name
            (`diptych.transforms.sources.sharded.example_features`).
    """

    url: str
    source: str
    metadata_columns: tuple[str, ...] = ()
    columns: ColumnNames = ColumnNames()

    duplicate_hint: ClassVar[str] = DUPLICATE_HINT

    @property
    def input(self) -> str:
        """The file's path below the input root."""
        return self.source

    def examples(self, most: int) -> list[Example]:
        """Returns the first examples that are sound.

        Args:
            most: How many.

        Raises:
            InputError: The shard is gone, or may not be read.
        """
        read = (content for content in self._contents() if isinstance(content, _Content))
        return [content.example for content in itertools.islice(read, most)]

    def check_columns(self) -> None:
        """Looks for the chosen features in the first records.

        Raises:
            OptionError: None of the records has one.
            InputError: The shard is gone, or may not be read.
        """
        examples = self.examples(_NUM_CHECKED)
        there = ", ".join(
            sorted({name for example in examples for name in (*example.features, *example.feature_lists)})
        )
        for flag, name in missing_features(examples, self.columns, self.metadata_columns) if examples else ():
            raise OptionError(
                f"{flag} {name}: the first {len(examples)} records of {self.url} have no such feature. Expected one of "
                f"theirs: {there or 'none'}."
            )

    def records(self, skip: int) -> Iterator[Record]:
        """Yields the records in order, those of one image that follow each other as one.

        One whose CRC or encoding is wrong is lost as `record_corrupt`, one without an image as `missing_image`. The
        images of skipped records are there too: by them it shows which records are one.
        """
        records = (
            content if isinstance(content, Reject) else self._record(content) for content in self._contents()
        )
        return join_captions(records, self.name)

    def _contents(self) -> Iterator["_Content | Reject"]:
        with open_shard(self.url) as file:
            # A record's length may look like gzip's magic, but then its CRC is right.
            head = file.peek(_LENGTH.size)[: _LENGTH.size]
            stream = file if _is_length(head) else unpacked(file, with_zlib=True)
            unit = "" if stream is file else " of the unpacked file"
            row = offset = 0
            try:
                while (size := _read_length(stream, offset)) is not None:
                    yield self._content(stream, size, row, f"{self.source}, byte {offset}{unit}")
                    row += 1
                    offset += _LENGTH.size + size + _CRC.size
            except ShardDamage as damage:
                yield Reject("", row, damage.reason, f"{self.source}, byte {offset}{unit}: {damage}")

    def _content(self, stream: io.BufferedReader, size: int, row: int, place: str) -> "_Content | Reject":
        if size > _MAX_RECORD_BYTES:
            if not pass_over(stream, size + _CRC.size):
                raise _cut(size)
            message = f"{place}: the record has {size} bytes; at most {_MAX_RECORD_BYTES} are read"
            return Reject("", row, "record_corrupt", message)
        data = _read_data(stream, size)
        if data is None:
            return Reject("", row, "record_corrupt", f"{place}: the record's CRC is wrong")
        try:
            return _Content(parse_example(data), row, place)
        except DecodeError:
            message = f"{place}: the record is no tf.train.Example or tf.train.SequenceExample"
            return Reject("", row, "record_corrupt", message)

    def _record(self, content: "_Content") -> Record:
        example, row, place = content
        key = key_of(example, self.columns.key)
        if not key and self.columns.key:
            message = f"{place}: the record has no feature {self.columns.key!r} that can be a key"
            return Reject(numbered_key(self.name, row), row, "bad_annotation", message)
        key = key or numbered_key(self.name, row)
        image = image_of(example, self.columns.image)
        if image.data is None:
            return Reject(key, row, "missing_image", f"{place}: {image.problem}")
        captions, counters = captions_of(example, self.columns.caption)
        if image.num_others:
            counters = {**counters, "images_passed_over": image.num_others}
        # Looking up a feature that is not there would make one.
        metadata = {
            name: feature_text(example.features[name]) if name in example.features else None
            for name in self.metadata_columns
        }
        path = image_name(key, image.data)
        return Row(key, image.data, path, captions, self.source, row, metadata, counters)


class _Content(NamedTuple):
    """A record that is whole.

    Attributes:
        example: Its features.
        row: Its ordinal.
        place: Where it is, for messages.
    """

    example: Example
    row: int
    place: str


def _is_length(head: bytes) -> bool:
    return len(head) == _LENGTH.size and _LENGTH.unpack(head)[1] == _masked_crc(head[:8])


def _masked_crc(data: bytes) -> int:
    crc: int = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _read_length(file: BinaryIO, offset: int) -> int | None:
    head = file.read(_LENGTH.size)
    if not head:
        return None
    if len(head) < _LENGTH.size:
        raise ShardDamage("shard_truncated", f"the file ends in a record's head, after {len(head)} bytes")
    if not _is_length(head):
        what = "the CRC of a length is wrong" if offset else f"not a TFRecord: it begins with {head!r}"
        raise ShardDamage("shard_corrupt", what)
    size: int = _LENGTH.unpack(head)[0]
    return size


def _read_data(file: BinaryIO, size: int) -> bytes | None:
    """Returns a record's data, None where its CRC is wrong."""
    block = read_up_to(file, size + _CRC.size)
    if len(block) < size + _CRC.size:
        raise _cut(size)
    data = block[:size]
    return data if _CRC.unpack(block[size:])[0] == _masked_crc(data) else None


def _cut(size: int) -> ShardDamage:
    return ShardDamage("shard_truncated", f"the file ends in a record of {size} bytes")
