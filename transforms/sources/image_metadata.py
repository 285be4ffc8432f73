"""Hugging Face's imagefolder: `metadata.jsonl`, `.csv` or `.parquet` beside the images that it is about.

https://huggingface.co/docs/datasets/image_dataset
"""

import csv
import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from transforms import storage
from transforms.errors import InputError, OptionError
from transforms.sources.encoding import find_encoding, lines
from transforms.sources.parts import Bad, Caption, Fields
from transforms.sources.shardfile import encodable, metadata_text
from transforms.sources.tables import CAPTION_NAMES

IMAGE_METADATA = re.compile(r"^metadata\.(jsonl|csv|parquet)$", re.I)
_NAMES = ("file_name", "image_file_name", "filename", "image", "file")


def read_metadata(
    url: str, path: str, caption_column: str | None, metadata_columns: Sequence[str]
) -> Iterator[Caption | Fields | Bad]:
    """Yields what a file of metadata says of the images beside it and below.

    Args:
        url: The file.
        path: Its path below the input root.
        caption_column: The captions' column; None takes one with a usual name.
        metadata_columns: The columns to keep.

    Raises:
        InputError: It cannot be read.
        OptionError: It has no such column.
    """
    folder, is_first, number = posixpath.dirname(path), True, 0
    for line, row in _rows(url):
        if not isinstance(row, Mapping):
            yield Bad(f"{path}, line {line}: {row}")
            continue
        if is_first:
            caption = _caption_column(url, row, caption_column)
            is_first = False
            if missing := [name for name in metadata_columns if name not in row]:
                raise OptionError(f"{url} has no column {missing[0]!r}; it has {', '.join(map(repr, row))}.")
        name = next((row[key] for key in _NAMES if isinstance(row.get(key), str) and row[key]), None)
        if name is None:
            yield Bad(f"{path}, line {line}: there is no file_name")
            continue
        ref = posixpath.normpath(posixpath.join(folder, name.replace("\\", "/")))
        values = [metadata_text(row.get(column)) for column in metadata_columns]
        yield Fields(ref, values, None)
        captions = row.get(caption) if caption else None
        for text in captions if isinstance(captions, list) else [captions]:
            if isinstance(text, str):
                number += 1
                yield Caption(ref, number, encodable(text))


def _caption_column(url: str, row: Mapping[str, Any], wanted: str | None) -> str | None:
    if wanted is not None and wanted not in row:
        raise OptionError(
            f"{url} has no column {wanted!r}; it has {', '.join(map(repr, row))}. Name one of those."
        )
    return wanted or next((name for name in row if name.lower() in CAPTION_NAMES), None)


def _rows(url: str) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """Yields number and row of each line, or why it is none."""
    fs, path = storage.locate(url)
    with storage.input_errors(url), fs.open(path, "rb") as file:
        if path.lower().endswith(".parquet"):
            try:
                number = 0
                for batch in pq.ParquetFile(file).iter_batches(1024):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row
            except (pa.ArrowException, ValueError) as error:
                raise InputError(
                    f"{url} cannot be read: {error}. Write it again, or move it away."
                ) from error
            return
        texts = (line.text for line in lines(file, find_encoding(file)))
        if path.lower().endswith(".csv"):
            reader = csv.DictReader(texts)
            for row in reader:
                row.pop(None, None)
                yield reader.line_num, row
            return
        for number, text in enumerate(texts, 1):
            if text.strip():
                yield number, _json_row(text)


def _json_row(text: str) -> Mapping[str, Any] | str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"it is not JSON ({error})"
    return value if isinstance(value, Mapping) else "it is no JSON object"
