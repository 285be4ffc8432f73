"""TFRecord shards of `tf.train.Example`, without TensorFlow.

A record is its length, a CRC of the length, the data, and a CRC of the data
(https://www.tensorflow.org/tutorials/load_data/tfrecord); the data is a protocol buffer of features by name.
"""

import dataclasses
import functools
import posixpath
import struct
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, ClassVar

import google_crc32c
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from transforms.sources.base import InputFile, Lost, Record, Row, Shard, Source, shard_names
from transforms.sources.shardfile import (
    MAX_RECORD_BYTES,
    ShardDamage,
    image_name,
    input_files,
    metadata_text,
    open_shard,
    pass_over,
    read_up_to,
    to_text,
    unpacked,
)

# Feature names in use, the first present wins: img2dataset's, TensorFlow's own data sets', and plain words.
IMAGE_FEATURES = ("jpg", "image/encoded", "image", "png", "image_raw", "jpeg", "webp")
CAPTION_FEATURES = ("caption", "captions", "txt", "text", "image/caption")
KEY_FEATURES = ("key", "__key__", "image_id", "image/filename")
_FILE_NAME_FEATURES = frozenset({"image/filename"})

_LENGTH = struct.Struct("<QI")
_CRC = struct.Struct("<I")


@dataclasses.dataclass(frozen=True)
class TfrecordSource(Source):
    """TFRecord shards, plain or gzipped.

    Attributes:
        urls: The shard files, sorted.
        root: The input root; shards are named by their path below it.
        metadata_columns: Features to keep as metadata.
    """

    urls: tuple[str, ...]
    root: str
    metadata_columns: tuple[str, ...] = ()

    column_flags: ClassVar[frozenset[str]] = frozenset({"metadata_columns"})

    def inputs(self) -> list[InputFile]:
        """Returns the shard files with their sizes."""
        return input_files(self.urls, self.root)

    def shards(self, plan_folder: str, rows_per_shard: int) -> list[Shard]:
        """Returns a shard for each file."""
        files = self.inputs()
        names = shard_names(file.name for file in files)
        return [
            TfrecordShard(name, file.size_bytes, None, url, file.name, self.metadata_columns)
            for name, file, url in zip(names, files, self.urls, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class TfrecordShard(Shard):
    """One TFRecord file.

    Attributes:
        url: Where it is.
        source: Its path below the input root.
        metadata_columns: Features to keep as metadata.
    """

    url: str
    source: str
    metadata_columns: tuple[str, ...] = ()

    @property
    def input(self) -> str:
        """The file's path below the input root."""
        return self.source

    def records(self, skip: int) -> Iterator[Record]:
        """Yields the records in order.

        One whose CRC or encoding is wrong is lost as `record_corrupt`, one without an image as
        `missing_image`.
        """
        with open_shard(self.url) as file:
            # A record's length may look like gzip's magic, but then its CRC is right.
            stream = file if _is_length(file.peek(_LENGTH.size)[: _LENGTH.size]) else unpacked(file)
            unit = "" if stream is file else " of the unpacked file"
            row = offset = 0
            try:
                while (size := _read_length(stream, offset)) is not None:
                    place = f"{self.source}, byte {offset}{unit}"
                    if size > MAX_RECORD_BYTES:
                        if not pass_over(stream, size + _CRC.size):
                            raise _cut(size)
                        message = f"{place}: the record has {size} bytes; at most {MAX_RECORD_BYTES} are read"
                        yield Lost("", row, "record_corrupt", message)
                    elif (data := _read_data(stream, size)) is None:
                        yield Lost("", row, "record_corrupt", f"{place}: the record's CRC is wrong")
                    else:
                        yield self._record(data, row, place, needed=row >= skip)
                    row += 1
                    offset += _LENGTH.size + size + _CRC.size
            except ShardDamage as damage:
                yield Lost("", row, damage.reason, f"{self.source}, byte {offset}{unit}: {damage}")

    def _record(self, data: bytes, row: int, place: str, needed: bool) -> Record:
        try:
            features = _example_class().FromString(data).features.feature
        except DecodeError:
            return Lost("", row, "record_corrupt", f"{place}: the record is no tf.train.Example")
        key = _key(features) or f"{self.name}-{row:08d}"
        name = next((name for name in IMAGE_FEATURES if name in features), None)
        images = features[name].bytes_list.value if name else ()
        if not images:
            there = ", ".join(sorted(features))
            message = f"{place}: no image feature ({', '.join(IMAGE_FEATURES)}) among {there}"
            if "error_message" in features:
                message += f"; its error_message: {_metadata(features['error_message'])}"
            return Lost(key, row, "missing_image", message)
        image = images[0] if needed else b""
        # Looking up a feature that is not there would make one.
        metadata = {
            name: _metadata(features[name]) if name in features else None for name in self.metadata_columns
        }
        return Row(key, image, image_name(key, image), _captions(features), self.source, row, metadata)


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


def _key(features: Mapping[str, Any]) -> str:
    for name in KEY_FEATURES:
        if name in features and (text := _metadata(features[name])):
            return posixpath.splitext(text)[0] if name in _FILE_NAME_FEATURES else text
    return ""


def _captions(features: Mapping[str, Any]) -> list[str]:
    name = next((name for name in CAPTION_FEATURES if name in features), None)
    texts = [to_text(value) for value in features[name].bytes_list.value] if name else []
    return [text for text in texts if text.strip()]


def _metadata(feature: Any) -> str | None:
    kind = feature.WhichOneof("kind")
    values = list(getattr(feature, kind).value) if kind else []
    if kind == "bytes_list":
        values = [to_text(value) for value in values]
    return metadata_text(values[0] if len(values) == 1 else values or None)


@functools.cache
def _example_class() -> Any:
    """Returns the message class of `tf.train.Example`, with the numbers of TensorFlow's `example.proto`.

    It is built in a pool of its own, so that TensorFlow in the same process does not meet it.
    """
    file = descriptor_pb2.FileDescriptorProto(name="diptych/example.proto", package="diptych")
    file.syntax = "proto3"
    field = descriptor_pb2.FieldDescriptorProto
    types = {"BytesList": field.TYPE_BYTES, "FloatList": field.TYPE_FLOAT, "Int64List": field.TYPE_INT64}
    for name, type in types.items():
        values = file.message_type.add(name=name).field
        values.add(name="value", number=1, type=type, label=field.LABEL_REPEATED)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("bytes_list", "float_list", "int64_list"), 1):
        one = feature.field.add(name=name, number=number, type=field.TYPE_MESSAGE, oneof_index=0)
        one.type_name = ".diptych." + name.title().replace("_", "")
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING)
    entry.field.add(name="value", number=2, type=field.TYPE_MESSAGE, type_name=".diptych.Feature")
    by_name = features.field.add(name="feature", number=1, type=field.TYPE_MESSAGE)
    by_name.label = field.LABEL_REPEATED
    by_name.type_name = ".diptych.Features.FeatureEntry"
    example = file.message_type.add(name="Example")
    example.field.add(name="features", number=1, type=field.TYPE_MESSAGE, type_name=".diptych.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("diptych.Example"))
