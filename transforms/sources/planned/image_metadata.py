"""Hugging Face's imagefolder: `metadata.jsonl`, `.csv` or `.parquet` beside the images that it is about.

https://huggingface.co/docs/datasets/image_dataset
"""

import itertools
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from diptych.transforms import storage
from diptych.transforms.errors import InputError
from diptych.transforms.sources.archives.shard_file import encodable, metadata_text
from diptych.transforms.sources.base import ColumnNames
from diptych.transforms.sources.planned.entries import BadEntry, Caption, Fields, Noticed, Part, key_of
from diptych.transforms.sources.text.encoding import find_encoding, lines
from diptych.transforms.sources.text.json_stream import parse_json
from diptych.transforms.sources.text.tables import CAPTION_NAMES, Table, cut, find_dialect, records

IMAGE_METADATA = re.compile(r"^metadata\.(jsonl|csv|parquet)$", re.I)
_NAMES = ("file_name", "image_file_name", "filename", "image", "file")
_LINES_TO_TELL = 100
_MAX_COLUMNS = 1000


class _Row(NamedTuple):
    """A row of a file of metadata.

    Attributes:
        number: Of its line, or its row, from 1.
        fields: Its fields.
        fault: Why it cannot be used; empty where it can.
        is_utf: Whether it was in UTF-8, 16 or 32.
    """

    number: int
    fields: Mapping[str, Any] = {}
    fault: str = ""
    is_utf: bool = True


class MetadataReader:
    """Reads the files of metadata of one input.

    Attributes:
        columns: The columns that the files read so far have, in any row.
    """

    def __init__(self, names: ColumnNames, metadata_columns: Sequence[str]) -> None:
        """Args:
        names: The columns that the user names; captions are else in each row in the one with a usual name.
        metadata_columns: The columns to keep.
        """
        self.columns: dict[str, None] = {}
        self._caption_column = names.caption
        self._key_column = names.key
        self._metadata_columns = metadata_columns

    def read(self, url: str, path: str) -> Iterator[Part]:
        """Yields what a file of metadata says of the images beside it and below.

        Args:
            url: The file.
            path: Its path below the input root.

        Raises:
            InputError: It cannot be read.
        """
        counters: Counter[str] = Counter()
        columns: dict[str, None] = {}
        fs, place = storage.locate(url)
        with storage.input_errors(url), fs.open(place, "rb") as file:
            for ordinal, row in enumerate(_rows(url, file, counters)):
                if row.fault:
                    yield BadEntry(f"{path}, line {row.number}: {row.fault}")
                    continue
                if len(columns) < _MAX_COLUMNS:
                    columns |= dict.fromkeys(row.fields)
                yield from self._parts(row, path, ordinal, counters)
        self.columns |= columns
        yield Noticed(counters, self._note(path, columns))

    def _parts(self, row: _Row, path: str, ordinal: int, counters: Counter[str]) -> Iterator[Part]:
        name = next((value for key in _by_name(row.fields, _NAMES) if (value := row.fields[key])), None)
        if not isinstance(name, str):
            yield BadEntry(f"{path}, line {row.number}: there is no file_name")
            return
        ref = posixpath.normpath(posixpath.join(posixpath.dirname(path), name.replace("\\", "/")))
        key = key_of(row.fields, self._key_column) if self._key_column else None
        values = [metadata_text(row.fields.get(column)) for column in self._metadata_columns]
        yield Fields(ref, values, None if key is None else encodable(key))
        for text in self._captions(row.fields, counters):
            yield Caption(ref, ordinal, encodable(text), redecoded=not row.is_utf)

    def _captions(self, fields: Mapping[str, Any], counters: Counter[str]) -> list[str]:
        if self._caption_column is not None:
            counters["rows_without_caption_column"] += self._caption_column not in fields
            return _texts(fields.get(self._caption_column), counters)
        found = [_texts(fields[name], counters) for name in _by_name(fields, CAPTION_NAMES)]
        first, *others = [texts for texts in found if texts] or [[]]
        counters["texts_passed_over"] += sum(text not in first for texts in others for text in texts)
        return first

    def _note(self, path: str, columns: Mapping[str, None]) -> str:
        if self._caption_column is not None or _by_name(columns, CAPTION_NAMES):
            return ""
        names = {*_by_name(columns, _NAMES), *self._metadata_columns}
        if others := [name for name in columns if name not in names]:
            return (
                f"{path} has no column that is called as captions are: it has {', '.join(map(repr, others[:10]))}. "
                "Where one of them holds the captions, name it with --caption_column."
            )
        return ""


def _by_name(fields: Mapping[str, Any], usual: Sequence[str]) -> list[str]:
    """Returns the names of fields that are usual ones in any case, in the order of those."""
    names = {name.strip().lower(): name for name in reversed([*fields])}
    return [names[name] for name in usual if name in names]


def _texts(value: Any, counters: Counter[str]) -> list[str]:
    """Returns the texts that a field holds: one, or a list of them; what is none is counted."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    counters["captions_not_text"] += sum(not isinstance(text, str) for text in values)
    return [text for text in values if isinstance(text, str)]


def _rows(url: str, file: IO[bytes], counters: Counter[str]) -> Iterator[_Row]:
    if url.lower().endswith(".parquet"):
        return _parquet_rows(url, file)
    return _csv_rows(file, counters) if url.lower().endswith(".csv") else _json_rows(file)


def _parquet_rows(url: str, file: IO[bytes]) -> Iterator[_Row]:
    try:
        batches = pq.ParquetFile(file).iter_batches(1024)
        for number, fields in enumerate(
            itertools.chain.from_iterable(map(pa.RecordBatch.to_pylist, batches)), 1
        ):
            yield _Row(number, fields)
    except (pa.ArrowException, ValueError) as error:
        raise InputError(f"{url} cannot be read: {error}. Write it again, or move it away.") from error


def _json_rows(file: IO[bytes]) -> Iterator[_Row]:
    for number, line in enumerate(lines(file, find_encoding(file)), 1):
        if not line.text.strip():
            continue
        try:
            value = parse_json(line.text)
        except (ValueError, RecursionError) as error:
            yield _Row(number, fault=f"it is not JSON ({error})")
            continue
        is_object = isinstance(value, dict)
        yield (
            _Row(number, value, "", line.is_utf) if is_object else _Row(number, fault="it is no JSON object")
        )


def _csv_rows(file: IO[bytes], counters: Counter[str]) -> Iterator[_Row]:
    encoding = find_encoding(file)
    head = [line.text for line in itertools.islice(lines(file, encoding), _LINES_TO_TELL)]
    file.seek(0)
    dialect = find_dialect(head)
    header = [name.strip() for name in cut(next(filter(str.strip, head), ""), dialect)]
    counters["columns_of_one_name"] += len(header) - len({*header})
    names = _by_name(dict.fromkeys(header), _NAMES)
    captions = _by_name(dict.fromkeys(header), CAPTION_NAMES)
    image, caption = (header.index(found[0]) if found else 0 for found in (names, captions))
    table = Table(dialect, 0, image, (caption,), None, None, (), len(header), True, False)
    for record in itertools.islice(records(lines(file, encoding), table), 1, None):
        if record.fault:
            yield _Row(record.line, fault=f"{record.fault}: {record.text.strip()[:80]!r}")
        elif len(record.fields) != len(header):
            found = f"found {len(record.fields)}: {record.text.strip()[:80]!r}"
            yield _Row(record.line, fault=f"expected {len(header)} fields, {found}")
        else:  # of columns with one name the first counts
            fields = dict(zip(reversed(header), reversed(record.fields), strict=True))
            yield _Row(record.line, {name: fields[name] for name in header}, "", record.is_utf)
