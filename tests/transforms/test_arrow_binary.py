import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.transforms import arrow_binary
from diptych.transforms.arrow_binary import BinaryBuilder, binary_array, binary_views


@given(st.lists(st.binary(max_size=300)))
def test_array_and_views_hold_the_values(values: list[bytes]) -> None:
    array = binary_array(values)
    array.validate(full=True)
    assert array.equals(pa.array(values, pa.binary()))
    assert [bytes(view) for view in binary_views(array)] == values


@given(st.lists(st.binary(max_size=20), min_size=1), st.data())
def test_views_of_a_slice(values: list[bytes], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(values)))
    assert [bytes(view) for view in binary_views(binary_array(values)[start:])] == values[start:]


def test_grows_beyond_its_first_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_binary, "_INITIAL_BYTES", 10)
    monkeypatch.setattr(arrow_binary, "_buffers", [])
    values = [b"abc", b"", b"x" * 25, b"tail"]
    assert binary_array(values).to_pylist() == values


def test_a_buffer_in_use_is_never_given_again() -> None:
    arrays = [binary_array([bytes([i]) * 1000]) for i in range(20)]
    assert [array[0].as_py() for array in arrays] == [bytes([i]) * 1000 for i in range(20)]
    views = binary_views(binary_array([b"kept"]))
    for _ in range(20):
        binary_array([b"other"])
    assert bytes(views[0]) == b"kept"


def test_buffers_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_binary, "_buffers", [])
    for _ in range(20):
        binary_array([b"abc"])
    assert len(arrow_binary._buffers) == 1


def test_two_gib_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_binary, "_MAX_BYTES", 10)
    builder = BinaryBuilder()
    builder.append(b"12345")
    with pytest.raises(ValueError, match="11 bytes"):
        builder.append(b"123456")
    assert builder.num_bytes == 5
