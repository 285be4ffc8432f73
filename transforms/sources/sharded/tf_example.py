"""Messages of a TFRecord, without TensorFlow: `tf.train.Example` and `tf.train.SequenceExample`."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

__all__ = ["DecodeError", "Example", "parse_example"]


class Example(NamedTuple):
    """A record: features by name.

    Attributes:
        features: An example's features, or the context of a sequence example.
        feature_lists: A sequence example's lists of features; empty of an example.
    """

    features: Mapping[str, Any]
    feature_lists: Mapping[str, Any]


def parse_example(data: bytes) -> Example:
    """Returns the features of a serialised example or sequence example.

    Raises:
        DecodeError: It is neither.
    """
    message = _example_class().FromString(data)
    return Example(message.features.feature, message.feature_lists.feature_list)


def feature_values(feature: Any) -> tuple[str, Sequence[Any]]:
    """Returns what a feature holds, `bytes_list`, `float_list`, `int64_list` or nothing, and its values."""
    kind = feature.WhichOneof("kind")
    return (kind, getattr(feature, kind).value) if kind else ("", ())


@functools.cache
def _example_class() -> Any:
    """Returns a message class with the numbers of TensorFlow's `example.proto`.

    The context of a sequence example has the number of an example's features, so one class reads both. It is built in
    a pool of its own, so that TensorFlow in the same process does not meet it.
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
    feature_list = file.message_type.add(name="FeatureList")
    steps = feature_list.field.add(name="feature", number=1, type=field.TYPE_MESSAGE)
    steps.label, steps.type_name = field.LABEL_REPEATED, ".diptych.Feature"
    _add_map(file, "Features", "feature", ".diptych.Feature")
    _add_map(file, "FeatureLists", "feature_list", ".diptych.FeatureList")
    example = file.message_type.add(name="Example")
    example.field.add(name="features", number=1, type=field.TYPE_MESSAGE, type_name=".diptych.Features")
    lists = example.field.add(name="feature_lists", number=2, type=field.TYPE_MESSAGE)
    lists.type_name = ".diptych.FeatureLists"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("diptych.Example"))


def _add_map(file: Any, name: str, field_name: str, value_type: str) -> None:
    """Adds a message with one field, a map of values by name."""
    field = descriptor_pb2.FieldDescriptorProto
    message = file.message_type.add(name=name)
    entry_name = field_name.title().replace("_", "") + "Entry"
    entry = message.nested_type.add(name=entry_name)
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING)
    entry.field.add(name="value", number=2, type=field.TYPE_MESSAGE, type_name=value_type)
    by_name = message.field.add(name=field_name, number=1, type=field.TYPE_MESSAGE)
    by_name.label = field.LABEL_REPEATED
    by_name.type_name = f".diptych.{name}.{entry_name}"
