"""Lists of bytes to Arrow and back, at the speed of one copy in and none out."""

import itertools
import sys
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

_INITIAL_BYTES = 64 << 20
_MAX_BYTES = int(np.iinfo(np.int32).max)


_Bytes = np.ndarray[Any, np.dtype[np.uint8]]

# Buffers of earlier columns, used again as soon as nothing refers to them: a fresh page costs its clearing
_MAX_BUFFERS = 8
_buffers: list[_Bytes] = []
_buffers_lock = threading.Lock()


def _count_references(buffers: list[_Bytes]) -> list[int]:
    return [sys.getrefcount(buffer) for buffer in buffers]


# Measured, because it differs between versions of Python: what a buffer has that only its list refers to
[_UNUSED] = _count_references([np.empty(0, np.uint8)])


def _take_buffer() -> _Bytes:
    with _buffers_lock:
        for i, count in enumerate(_count_references(_buffers)):
            if count == _UNUSED:
                return _buffers[i]
        buffer = np.empty(_INITIAL_BYTES, np.uint8)
        if len(_buffers) < _MAX_BUFFERS:
            _buffers.append(buffer)
        return buffer


class BinaryBuilder:
    """A binary column that is filled value by value.

    Each value is copied at once, so that the memory it was read into is free, and warm, for the next.
    """

    def __init__(self) -> None:
        self._data = _take_buffer()
        self._offsets = [0]

    @property
    def num_bytes(self) -> int:
        """Size of the values so far."""
        return self._offsets[-1]

    def append(self, value: bytes) -> None:
        """Adds a value.

        Raises:
            ValueError: The column would reach 2 GiB, the limit of Arrow's 32-bit offsets.
        """
        start, end = self._offsets[-1], self._offsets[-1] + len(value)
        if end > _MAX_BYTES:
            raise ValueError(f"a column of {end} bytes; an array holds less than 2 GiB")
        if end > len(self._data):
            grown = np.empty(min(max(2 * len(self._data), end), _MAX_BYTES), np.uint8)
            grown[:start] = self._data[:start]
            self._data = grown
        self._data.data[start:end] = value
        self._offsets.append(end)

    def finish(self) -> pa.BinaryArray:
        """Returns the column; the builder must not be used any more."""
        offsets = np.asarray(self._offsets, np.int32)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(self._data[: self._offsets[-1]])]
        return pa.BinaryArray.from_buffers(pa.binary(), len(offsets) - 1, buffers)


def binary_array(values: Iterable[bytes]) -> pa.BinaryArray:
    """Returns values, none of them null, as an array: one copy, where `pa.array` grows its buffer many times."""
    builder = BinaryBuilder()
    for value in values:
        builder.append(value)
    return builder.finish()


def binary_views(array: pa.BinaryArray) -> list[memoryview]:
    """Returns views of the values of an array without nulls; nothing is copied."""
    _, offset_buffer, data = array.buffers()
    offsets = np.frombuffer(offset_buffer, np.int32)[array.offset : array.offset + len(array) + 1].tolist()
    view = memoryview(data).cast("B") if data else memoryview(b"")
    return [view[start:end] for start, end in itertools.pairwise(offsets)]
