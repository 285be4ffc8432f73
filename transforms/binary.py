"""Lists of bytes to Arrow and back, at the speed of one copy in and none out."""

import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa


def binary_array(values: Sequence[bytes]) -> pa.BinaryArray:
    """Returns values, none of them null, as an array: one copy, where `pa.array` grows its buffer many times.

    Raises:
        ValueError: They are 2 GiB or more together, the limit of Arrow's 32-bit offsets.
    """
    offsets = np.zeros(len(values) + 1, np.int64)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(
            f"{len(values)} values have {offsets[-1]} bytes together; an array holds less than 2 GiB"
        )
    data = np.empty(offsets[-1], np.uint8)  # numpy asks for huge pages: a fault each 2 MiB, not each 4 KiB
    view = memoryview(data)
    for start, value in zip(offsets.tolist(), values, strict=False):
        view[start : start + len(value)] = value
    buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(data)]
    return pa.BinaryArray.from_buffers(pa.binary(), len(values), buffers)


def binary_views(array: pa.BinaryArray) -> list[memoryview]:
    """Returns views of the values of an array without nulls; nothing is copied."""
    _, offset_buffer, data = array.buffers()
    offsets = np.frombuffer(offset_buffer, np.int32)[array.offset : array.offset + len(array) + 1].tolist()
    view = memoryview(data).cast("B") if data else memoryview(b"")
    return [view[start:end] for start, end in itertools.pairwise(offsets)]
