import datetime

import pyarrow as pa
import pytest

from diptych.transforms.errors import OptionError
from diptych.transforms.sources.base import ColumnNames
from diptych.transforms.sources.sharded.column_values import Image, captions, images, keys, metadata, values
from diptych.transforms.sources.sharded.columns import Columns, column_notes, find_columns


def find(types, image=None, caption=None, key=None, metadata=()):
    return find_columns(
        pa.schema(list(types.items())), "x.parquet", ColumnNames(image, caption, key), metadata
    )


def batch(array, name="c"):
    return pa.RecordBatch.from_arrays([array], names=[name])


def captions_of(array):
    return captions(batch(array), "c").texts


def images_of(array):
    return [image.data for image in images(batch(array), "c")]


def test_usual_names_in_their_order():
    types = {"jpg": pa.binary(), "text": pa.string(), "caption": pa.string(), "id": pa.int64()}
    assert find(types) == Columns("jpg", "caption", "id", None, ())
    assert find({"image": pa.binary()}) == Columns("image", None, None, None, ())
    assert find({**types, "error_message": pa.string()}, metadata=("text", "no")) == Columns(
        "jpg", "caption", "id", "error_message", ("text", None)
    )


def test_a_usual_name_with_another_type_is_passed_over():
    types = {
        "image": pa.string(),
        "bytes": pa.binary(),
        "caption": pa.int8(),
        "txt": pa.string(),
        "key": pa.float32(),
    }
    assert find(types) == Columns("bytes", "txt", None, None, ())


@pytest.mark.parametrize(
    "type",
    [
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.binary()),
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        pa.struct([("bytes", pa.large_binary())]),
        pa.binary_view(),
        pa.binary(16),
        pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())]),
        pa.list_(pa.struct([("bytes", pa.binary())])),
        pa.list_(pa.uint8()),
        pa.string(),
        pa.struct([("src", pa.string()), ("height", pa.int32())]),
        pa.struct([("bytes", pa.string())]),
    ],
    ids=str,
)
def test_image_types(type):
    assert find({"image": type}).image == "image"


@pytest.mark.parametrize(
    "type",
    [
        pa.string(),
        pa.large_string(),
        pa.null(),
        pa.list_(pa.string()),
        pa.large_list(pa.large_string()),
        pa.list_(pa.string(), 5),
        pa.dictionary(pa.int32(), pa.string()),
        pa.list_(pa.dictionary(pa.int32(), pa.string())),
        pa.string_view(),
        pa.list_view(pa.string_view()),
        pa.large_list_view(pa.string()),
        pa.binary(),
        pa.list_(pa.struct([("raw", pa.string()), ("tokens", pa.list_(pa.string()))])),
        pa.struct([("raw", pa.list_(pa.string()))]),
        pa.struct([("raw", pa.string())]),
    ],
    ids=str,
)
def test_caption_types(type):
    assert find({"image": pa.binary(), "captions": type}).caption == "captions"


@pytest.mark.parametrize(
    "type",
    [
        pa.int64(),
        pa.float32(),
        pa.bool_(),
        pa.map_(pa.string(), pa.string()),
        pa.list_(pa.list_(pa.string())),
        pa.struct([("en", pa.string())]),
        pa.list_(pa.struct([("id", pa.int64())])),
        pa.struct([("raw", pa.list_(pa.int64()))]),
    ],
    ids=str,
)
def test_types_that_hold_no_captions(type):
    assert find({"image": pa.binary(), "captions": type}).caption is None
    with pytest.raises(OptionError, match=r"'captions', but of type .*--caption_column"):
        find({"image": pa.binary(), "captions": type}, caption="captions")


@pytest.mark.parametrize(
    "type", [pa.int64(), pa.string(), pa.binary(16), pa.uuid(), pa.decimal128(20, 0)], ids=str
)
def test_key_types(type):
    assert find({"image": pa.binary(), "id": type}).key == "id"


def test_names_in_any_case_and_with_dots():
    types = {"Image": pa.binary(), "TEXT": pa.string(), "Image.path": pa.string(), "UID": pa.int64()}
    assert find(types)[:3] == ("Image", "TEXT", "UID")
    assert find(types, caption="Image.path").caption == "Image.path"


def test_one_column_of_images_needs_no_usual_name():
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert find({"picture": image, "n": pa.int64()}).image == "picture"
    assert find({"picture": pa.binary(), "caption": pa.binary(), "id": pa.binary()}).image == "picture"
    assert find({"picture": image, "mask": pa.binary()}).image == "picture"
    with pytest.raises(
        OptionError, match=r"several columns that hold images, 'before', 'after'\. .*--image_column"
    ):
        find({"before": image, "after": image})
    assert find({"before": image, "after": image}, image="after").image == "after"


def notes_of(types, **chosen):
    schema = pa.schema(list(types.items()) if isinstance(types, dict) else types)
    return column_notes(schema, "x", find_columns(schema, "x", ColumnNames(**chosen), ()), chosen)


def test_notes_on_columns_that_are_not_read():
    types = {
        "image": pa.binary(),
        "jpg": pa.binary(),
        "caption": pa.string(),
        "text": pa.string(),
        "id": pa.int64(),
    }
    assert notes_of(types) == [
        "x: the images are those of column 'image', not of 'jpg'. --image_column names another.",
        "x: the captions are those of column 'caption', not of 'text'. --caption_column names another.",
    ]
    assert notes_of(types, image="jpg", caption="text") == []
    assert (
        notes_of({"image": pa.binary(), "bytes": pa.int64(), "caption": pa.string(), "text": pa.int64()})
        == []
    )
    texts = {"image": pa.binary(), "de": pa.string(), "en": pa.list_(pa.string()), "width": pa.int64()}
    assert notes_of(texts) == [
        "x: no column has a usual name of captions, so the rows have none. If they are in one of 'de', 'en', name it "
        "with --caption_column."
    ]
    assert notes_of(texts, caption="de") == []
    assert notes_of({"image": pa.binary(), "id": pa.float64()}) == [
        "x: column 'id' is of type double, which holds no keys, so the rows are numbered. --key_column names another."
    ]
    twice = [("image", pa.binary()), ("text", pa.string()), ("text", pa.string())]
    assert notes_of(twice) == ["x: 2 columns are named 'text'. The first is read."]


@pytest.mark.parametrize("role", ["image", "caption", "key"])
def test_a_named_column_must_be_there_and_fit(role):
    types = {"image": pa.binary(), "n": pa.float64()}
    with pytest.raises(
        OptionError, match=rf"no column 'x'.*image \(binary\), n \(double\).*--{role}_column\."
    ):
        find(types, **{role: "x"})
    with pytest.raises(OptionError, match=rf"'n', but of type double.*--{role}_column\."):
        find(types, **{role: "n"})


def test_captions_of_another_type_are_not_dropped_in_silence():
    types = {"image": pa.binary(), "sentences": pa.list_(pa.int64())}
    columns = find(types)
    assert columns.caption is None
    (note,) = column_notes(pa.schema(list(types.items())), "x.parquet", columns, ())
    assert note == (
        "x.parquet: column 'sentences' is of type list<item: int64>, which holds no captions, so the rows have no "
        "captions. --caption_column names another."
    )
    with pytest.raises(OptionError, match=r"'sentences', but of type list<.*--caption_column"):
        find(types, caption="sentences")


def test_images_of_structs_whose_parent_is_null():
    array = pa.array(
        [{"bytes": b"1", "path": "p"}, None, {"bytes": None, "path": "q"}],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    assert list(images(batch(array), "c")) == [Image(b"1", "p"), Image(None, None), Image(None, "q")]
    assert list(images(batch(array.slice(1)), "c")) == [Image(None, None), Image(None, "q")]


def test_dictionary_encoded_columns():
    encoded = pa.array(["a", "b", None, "a"]).dictionary_encode()
    assert keys(batch(encoded), "c") == ["a", "b", "", "a"]
    assert captions_of(encoded) == [["a"], ["b"], [], ["a"]]
    picture = pa.array([b"1", None, b"1"]).dictionary_encode()
    assert images_of(picture) == [b"1", None, b"1"]


def test_keys():
    assert keys(batch(pa.array([1, None, -3])), "c") == ["1", "", "-3"]
    assert keys(batch(pa.array([b"a", b"\xff"])), "c") == ["a", "ff"]
    assert keys(batch(pa.array(["d/a.b.jpg", "c"]), "file_name"), "file_name") == ["d/a.b", "c"]
    assert keys(batch(pa.array([1, 2])), None) == ["", ""]


def test_captions():
    lists = pa.array([["a", None, " ", "b\nb"], [], None])
    assert captions_of(lists) == [["a", "b\nb"], [], []]
    assert captions_of(pa.array(["a", "", None])) == [["a"], [], []]
    assert captions_of(pa.nulls(2)) == [[], []]
    assert captions(batch(pa.nulls(2)), None).texts == [[], []]


def invalid(type):
    """Returns an array of strings of which one is not UTF-8, as a careless writer leaves them."""
    array = pa.array([b"ok", b"caf\xe9", None], pa.binary())
    buffers = array.buffers()
    strings = pa.Array.from_buffers(pa.string(), 3, buffers)
    if type == "string":
        return strings
    if type == "list":
        return pa.ListArray.from_arrays(pa.array([0, 1, 3]), strings)
    if type == "struct":
        return pa.StructArray.from_arrays([strings], ["s"])
    return pa.DictionaryArray.from_arrays(pa.array([0, 1, None], pa.int32()), strings.slice(0, 2))


def test_strings_that_are_not_utf8_are_replaced():
    assert values(invalid("string")) == ["ok", "caf\ufffd", None]
    assert values(invalid("list")) == [["ok"], ["caf\ufffd", None]]
    assert values(invalid("dictionary")) == ["ok", "caf\ufffd", None]
    assert values(invalid("struct")) == [{"s": "ok"}, {"s": "caf\ufffd"}, {"s": None}]


def test_metadata():
    at = datetime.datetime(2024, 1, 2)
    assert metadata(batch(pa.array([at], pa.timestamp("ns"))), "c") == ["2024-01-02 00:00:00.000000000"]
    assert metadata(batch(pa.array([{"a": 1}])), "c") == [{"a": 1}]
    assert metadata(batch(pa.array([1, 2])), None) == [None, None]


def test_a_file_without_captions_for_a_job_that_reads_them_alone():
    schema = pa.schema([("prompt", pa.string()), ("id", pa.int64())])
    with pytest.raises(OptionError, match=r"no column captions, .* Name one with --caption_column"):
        find_columns(schema, "x.parquet", ColumnNames(), (), with_images=False)
    found = find_columns(schema, "x.parquet", ColumnNames(caption="prompt"), (), with_images=False)
    assert found.caption == "prompt"
