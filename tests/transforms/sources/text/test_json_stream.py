import gzip
import io
import json
import math
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.transforms.errors import InputError
from diptych.transforms.sources.text import json_stream
from diptych.transforms.sources.text.json_stream import JsonEntries, Unread, parse_json, read_head


def read(data, *names):
    entries = JsonEntries("a.json", io.BytesIO(data if isinstance(data, bytes) else data.encode()))
    return list(entries.read(*(names or ("a",))))


def values(data):
    return [value for _, value in read(data)]


def describe(data):
    entries = JsonEntries("a.json", io.BytesIO(data))
    assert list(entries.read("images")) == []
    return entries.describe()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(json_values),
    st.lists(json_values),
    json_values,
    st.booleans(),
    st.sampled_from([None, 1]),
    st.integers(1, 50),
)
def test_what_json_writes_comes_back_wherever_the_pieces_end(a, b, other, is_ascii, indent, piece):
    text = json.dumps({"x": other, "a": a, "y": [other, other], "b": b}, ensure_ascii=is_ascii, indent=indent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_READ_BYTES", piece)
        patch.setattr(json_stream._characters, "__defaults__", (piece,))
        assert read(text, "a", "b") == [("a", value) for value in a] + [("b", value) for value in b]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Infinity", math.inf),
        ("-Infinity", -math.inf),
        ("1e400", math.inf),
        ("9" * 30, int("9" * 30)),
        ("-" + "9" * 5000, math.inf),
        ('"NaN, not Infinity"', "NaN, not Infinity"),
        (r'"\ud83d\ude00 \ud800 \" \\"', '😀 \ufffd " \\'),
        ('"line\nfeed\tand tab"', "line\nfeed\tand tab"),
        ('{"k": 1, "k": 2}', {"k": 2}),
    ],
)
def test_values_are_read_as_python_reads_them(value, expected):
    assert values(f'{{"a": [0, {value}, {{"in": {value}}}]}}') == [0, expected, {"in": expected}]


def test_nan_is_read():
    first, second = values('{"a": [NaN, {"NaN": "a NaN", "x": NaN}]}')
    assert math.isnan(first)
    assert math.isnan(second["x"])


@pytest.mark.parametrize(
    "place", ['{{"a": [1, {}, 2]}}', '{{"b": {}, "a": [1, 2]}}', '{{"b": [0, {}], "a": [1, 2]}}']
)
@pytest.mark.parametrize("deep", ["[" * 20_000 + "]" * 20_000, '{"k":' * 20_000 + '"]"' + "}" * 20_000])
def test_what_is_nested_too_deep_costs_itself(place, deep):
    found = values(place.format(deep))
    assert [value for value in found if not isinstance(value, Unread)] == [1, 2]
    assert [value.message for value in found if isinstance(value, Unread)] in (
        ["nested too deep to be read"],
        [],
    )


def test_what_is_too_long_costs_itself_and_no_memory(monkeypatch):
    monkeypatch.setattr(json_stream, "_MAX_ENTRY_CHARS", 1 << 20)

    class File(io.RawIOBase):
        pieces = iter([b'{"a": [1, "', *[b"x" * (1 << 18) + b'\\"['] * 200, b'", 2]}'])

        def readinto(self, buffer):
            piece = next(self.pieces, b"")
            buffer[: len(piece)] = piece
            return len(piece)

    tracemalloc.start()
    found = [value for _, value in JsonEntries("a.json", File()).read("a")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found[0], found[2]) == (1, 2)
    assert "longer than" in found[1].message
    assert peak < 30 << 20  # of 50 MiB


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: text.encode("utf-16-le"),
        lambda text: text.encode("utf-32-be"),
        lambda text: gzip.compress(text.encode()),
        lambda text: gzip.compress(text[:9].encode()) + gzip.compress(text[9:].encode("utf-8")),
    ],
)
def test_encodings_and_gzip(encode):
    data = encode('{"a": ["é", "日本"]}')
    assert values(data) == ["é", "日本"]
    assert '"日本"' in read_head(io.BytesIO(data))


def test_bytes_that_are_not_utf8_become_replacement_characters():
    assert values(b'\xef\xbb\xbf{"a": ["caf\xe9", "caf\xc3\xa9"]}') == ["caf\ufffd", "café"]


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": [{"id": 1}, {"id"',
        b'{"a": [{"id": 1}, {"id": "x',
        b'{"a": [{"id": 1}',
        b'{"a": [{"id": 1}, tr',
        b'{"a": [1, 2.',
        b'{"a": [1], "b": [[1], [',
        b'{"a": [1], "b": {"c": "',
        b'{"a": [1]',
        b"{",
        b"   ",
    ],
)
def test_file_that_is_cut_off(data):
    with pytest.raises(
        InputError, match=rf"a\.json is not whole JSON: it ends too early, after {len(data)} char"
    ):
        read(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (b"nonsense", "expecting value at character 0, where there is 'nonsense'"),
        (b"PK\x03\x04", "expecting value"),
        (b'{"a": [1,]}', "a comma stands before ']' at character 9"),
        (b'{"a": [1],}', "a comma stands before '}'"),
        (b'{"a": [1 2]}', "expected ',' at character 9"),
        (b'{"a": [{"x": 1 "y": 2}]}', "expecting ',' delimiter at character 15"),
        (b"{'a': [1]}", "expected a key in quotes"),
        (b'{"a": [1]} <html>', "'<' follows after its end"),
        (b'{"a": [1]}\n{"a": [2]}', "'{' follows after its end (an object a line"),
    ],
)
def test_json_that_is_damaged_says_where(data, message):
    with pytest.raises(InputError, match=r"a\.json is not whole JSON") as raised:
        read(data)
    assert message in str(raised.value)


def test_gzip_that_is_cut_off():
    with pytest.raises(InputError, match=r"a\.json cannot be unpacked.*fetch it again"):
        read(gzip.compress(b'{"a": [1]}')[:-5])


def test_one_list_twice_and_what_is_no_list():
    with pytest.raises(InputError, match="has 'a' twice"):
        read('{"a": [1], "a": [2]}')
    with pytest.raises(InputError, match="its 'a' is an object with 1, 2"):
        read('{"a": {"1": {}, "2": {}}}')
    assert read('{"a": null, "b": {"a": [3]}}') == []


@pytest.mark.parametrize(
    ("data", "description"),
    [
        (b"[]", "an empty list"),
        (b'[{"image": "a.jpg", "conversations": []}, 7]', "a list of objects with image, conversations"),
        (b'"x"', "a string"),
        (b"null", "null"),
        (b"{}", "an empty object"),
        (
            b'{"data": [{"image_id": 1, "reference_strs": ["a"]}], "info": {}, "n": 1, "l": []}',
            "an object with data (a list of objects with image_id, reference_strs), info (an object), "
            "n (a number), l (an empty list)",
        ),
    ],
)
def test_description(data, description):
    assert describe(data) == description


def test_a_text_with_an_integer_of_any_length_is_parsed():
    assert parse_json(f'{{"a": {"9" * 5000}, "b": -12, "c": "x"}}') == {"a": "9" * 5000, "b": -12, "c": "x"}
    with pytest.raises(ValueError, match="delimiter"):
        parse_json(f'{{"a" {"9" * 5000}}}')
