import base64

import pyarrow as pa
import pytest

from diptych.transforms.sources.base import MAX_TEXT_BYTES
from diptych.transforms.sources.sharded import column_values
from diptych.transforms.sources.sharded.column_values import Image, captions, images, keys, validate

JPEG = b"\xff\xd8\xff\xe0" + bytes(range(100))


def batch(array):
    return pa.RecordBatch.from_arrays([array], names=["c"])


def images_of(values, type=None):
    array = values if isinstance(values, pa.Array) else pa.array(values, type)
    return list(images(batch(array), "c"))


def captions_of(values, type=None):
    array = values if isinstance(values, pa.Array) else pa.array(values, type)
    return captions(batch(array), "c").texts


STRUCT = pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())])


@pytest.mark.parametrize(
    "array",
    [
        pa.array([JPEG, None], pa.binary_view()),
        pa.array([JPEG, None], pa.large_binary()),
        pa.array([JPEG, None], pa.binary(len(JPEG))),
        pa.array([JPEG, None]).dictionary_encode(),
        pa.array([{"bytes": JPEG}, None], STRUCT),
        pa.array([{"bytes": list(JPEG)}, None], pa.struct([("bytes", pa.list_(pa.uint8()))])),
        pa.array([list(JPEG), None], pa.list_(pa.uint8())),
        pa.array([list(JPEG), None], pa.large_list(pa.uint8())),
        pa.array([list(JPEG), None], pa.list_(pa.uint8(), len(JPEG))),
        pa.array([list(JPEG), None], pa.list_view(pa.uint8())),
        pa.array([[b - 256 if b > 127 else b for b in JPEG], None], pa.list_(pa.int8())),
        pa.array([base64.b64encode(JPEG).decode(), None]),
        pa.array([base64.encodebytes(JPEG).decode(), ""], pa.string_view()),
        pa.array([f"data:image/jpeg;base64,{base64.b64encode(JPEG).decode()}", None]),
        pa.array([{"src": f"DATA:image/png;base64,{base64.b64encode(JPEG).decode()}"}, {"src": None}]),
        pa.array([[{"bytes": JPEG}], None], pa.list_(STRUCT)),
        pa.array([[{"bytes": JPEG}], []], pa.list_(STRUCT)),
    ],
    ids=lambda array: str(array.type)[:40],
)
def test_images_of_every_layout(array):
    first, second = images_of(array)
    assert (first.data, second.data) == (JPEG, None)


@pytest.mark.parametrize(
    "text", ["http://a.example/1.jpg", "train/000.jpg", "cat", "x" * 300 + "!", "data:image/png,plain", "é"]
)
def test_a_text_that_is_no_image_is_shown(text):
    (image,) = images_of([text])
    assert (image.data, image.reason) == (None, "missing_image")
    assert image.problem.startswith(f"holds no image but a text: '{text[:200]}")
    assert images_of([{"src": text, "height": 3}])[0].problem == image.problem


def test_paths_stay_with_images():
    assert images_of([{"bytes": None, "path": "a/b.jpg"}], STRUCT) == [Image(None, "a/b.jpg")]
    assert images_of([{"src": "http://a", "path": "p"}])[0].path == "p"


def test_of_several_images_the_others_are_counted():
    first, second = images_of(
        [[{"bytes": b"1", "path": "a"}, {"bytes": b"2"}], [{"bytes": None}]], pa.list_(STRUCT)
    )
    assert (first.data, first.path, first.num_others) == (b"1", "a", 1)
    assert second.data is None


def test_a_list_with_nulls_is_no_image():
    assert images_of([[1, None]], pa.list_(pa.uint8()))[0].reason == "record_corrupt"


@pytest.mark.parametrize(
    "type", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.list_(pa.uint8()), pa.string()]
)
def test_images_that_are_too_large_cost_their_row(type, monkeypatch):
    monkeypatch.setattr(column_values, "MAX_IMAGE_BYTES", 200)
    monkeypatch.setattr(column_values, "_MAX_COPY_BYTES", 200)
    values = [bytes(199), bytes(201)]
    if pa.types.is_string(type):
        values = [base64.b64encode(bytes(99)).decode(), "x" * 201]
    elif pa.types.is_list(type):
        values = [list(value) for value in values]
    array = pa.array(values, type)
    for arrays in (array, array.dictionary_encode()) if pa.types.is_binary(type) else (array,):
        good, large = images_of(arrays)
        assert good.data is not None
        assert (large.data, large.reason) == (None, "record_corrupt")
        assert "has 201 bytes; at most 200 are read" in large.problem


@pytest.mark.parametrize(
    "type",
    [
        pa.list_(pa.string_view()),
        pa.list_view(pa.string()),
        pa.large_list_view(pa.large_string()),
        pa.list_(pa.binary()),
        pa.list_(pa.string(), 2),
    ],
    ids=str,
)
def test_lists_of_captions_of_every_layout(type):
    assert captions_of([["a", "日"], None], type) == [["a", "日"], []]


def test_captions_of_structs():
    struct = pa.struct([("raw", pa.string()), ("tokens", pa.list_(pa.string()))])
    sentences = [[{"raw": "a", "tokens": ["a"]}, {"raw": " "}, None, {"raw": "b"}], [], None]
    assert captions_of(sentences, pa.list_(struct)) == [["a", "b"], [], []]
    assert captions_of([{"raw": "a"}, None], struct) == [["a"], []]
    turned = pa.struct([("raw", pa.list_(pa.string())), ("sentid", pa.list_(pa.int64()))])
    assert captions_of([{"raw": ["a", "b"]}, None], turned) == [["a", "b"], []]


@pytest.mark.parametrize("type", [pa.string(), pa.large_string(), pa.string_view(), pa.binary()], ids=str)
@pytest.mark.parametrize("are_lists", [False, True])
def test_captions_that_are_not_utf8_are_counted(type, are_lists):
    binary = {pa.string_view(): pa.binary_view(), pa.large_string(): pa.large_binary()}.get(type, pa.binary())
    array = pa.Array.from_buffers(type, 3, pa.array([b"ok", b"caf\xe9", "\ufffd".encode()], binary).buffers())
    if are_lists:
        array = pa.ListArray.from_arrays([0, 1, 2, 3], array)
    found = captions(batch(array), "c")
    assert found == ([["ok"], ["café"], ["\ufffd"]], {1: 1}, {})


@pytest.mark.parametrize("is_dictionary", [False, True])
def test_a_row_with_too_much_text_is_a_problem_of_its_own(is_dictionary):
    text = "x" * (MAX_TEXT_BYTES // 3)
    values = [["a"], [text] * 4, ["b"]]
    type = pa.list_(pa.dictionary(pa.int32(), pa.string())) if is_dictionary else None
    found = captions(batch(pa.array(values, type)), "c")
    assert found.texts == [["a"], [], ["b"]]
    (problem,) = found.problems.items()
    assert problem[0] == 1
    assert problem[1].startswith("its captions have 5,592,4")


def test_bytes_as_keys_stay_apart():
    uuids = [bytes([0x80 + n] * 16) for n in range(3)]
    assert keys(batch(pa.array(uuids, pa.binary(16))), "c") == [uuid.hex() for uuid in uuids]
    assert keys(batch(pa.array(["a", None], pa.string_view())), "c") == ["a", ""]
    extension = pa.ExtensionArray.from_storage(pa.uuid(), pa.array(uuids, pa.binary(16)))
    assert keys(batch(extension), "c")[0] == "80808080-8080-8080-8080-808080808080"


@pytest.mark.parametrize(
    "ends", [[(0, 1), (1, 3)], [(0, 1), (3, 1)], [(0, -1), (0, 1)], [(2**31 - 1, 2**31 - 1)]]
)
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_list_that_ends_behind_its_values_is_damage(ends, is_nested):
    parts = [pa.array([end[part] for end in ends], pa.int32()).buffers()[1] for part in (0, 1)]
    type = pa.list_view(pa.string())
    array = pa.Array.from_buffers(type, len(ends), [None, *parts], children=[pa.array(["a", "b", "c"])])
    if is_nested:
        array = pa.StructArray.from_arrays([array], ["raw"])
    with pytest.raises(pa.ArrowInvalid, match="a list ends behind its values"):
        validate(batch(array))


def test_lists_of_every_layout_are_whole():
    for type in (pa.list_(pa.string()), pa.list_view(pa.string()), pa.large_list_view(pa.binary())):
        validate(batch(pa.array([["a"], None, [], ["b", "c"]], type).slice(1)))
        validate(batch(pa.array([], type)))
    not_utf8 = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
    validate(batch(pa.ListViewArray.from_arrays([0], [1], not_utf8)))
