"""Prompts: text without images, a row a prompt, for `generate` and `embed`.

A file is told by its extension: `.txt` (a prompt a line), `.jsonl` (an object or a string a line), `.csv` and `.tsv`
(with a header, or with prompts alone), `.parquet`; the text formats also as `.gz`.
"""

import csv
import dataclasses
import io
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from diptych.transforms.chunk import Reject
from diptych.transforms.errors import InputError, OptionError
from diptych.transforms.sources.archives.shard_file import (
    ShardDamage,
    encodable,
    metadata_text,
    open_shard,
    unpacked,
)
from diptych.transforms.sources.base import ColumnNames, InputFile, Record, Row, Shard
from diptych.transforms.sources.sharded.columns import CAPTION_COLUMNS
from diptych.transforms.sources.sharded.parquet import ParquetShard
from diptych.transforms.sources.sharded.parquet_file import open_parquet
from diptych.transforms.sources.sharded.sharded_source import ShardedSource
from diptych.transforms.sources.text import encoding
from diptych.transforms.sources.text.encoding import Line
from diptych.transforms.sources.text.json_stream import parse_json
from diptych.transforms.sources.text.tables import Dialect, Table, cut, find_dialect, records

# Names in use, in lower case; the first that is there wins.
PROMPT_COLUMNS = ("prompt", "prompts", "caption", "text")
KEY_COLUMNS = ("key", "id", "uid")

_LINES_TO_TELL = 100

EXTENSIONS = re.compile(r"\.(?:parquet|(txt|jsonl|ndjson|csv|tsv)(?:\.gz)?)$", re.I)


@dataclasses.dataclass(frozen=True)
class PromptsSource(ShardedSource):
    """Files of prompts. Every line or row is a record: a blank one is lost as `bad_annotation`, like a broken one.

    A prompt's key is what the file says, else the shard's name and the ordinal of the row, as in `prompts-00000012`.
    """

    format: ClassVar[str] = "prompts"

    column_flags: ClassVar[frozenset[str]] = frozenset({"caption_column", "key_column", "metadata_columns"})

    def shard(self, name: str, file: InputFile, url: str) -> "PromptsShard":
        """Returns the shard of a file.

        Raises:
            InputError: The file is of no format that holds prompts.
            OptionError: A Parquet file has no column of prompts.
        """
        match = EXTENSIONS.search(file.name)
        if match is None:
            raise InputError(
                f"{url} is of no format that holds prompts. Expected .txt, .jsonl, .csv, .tsv (also .gz) or .parquet: "
                "rename it, or say what it is with --format."
            )
        column = self.columns.caption
        if match[1] is None:
            column = column or _find_parquet_column(url)
        fields = name, file.size_bytes, None, url, file.name, (match[1] or "parquet").lower()
        return PromptsShard(*fields, self.metadata_columns, column, self.columns.key)


@dataclasses.dataclass(frozen=True)
class PromptsShard(Shard):
    """One file of prompts.

    Attributes:
        url: Where it is.
        source: Its path below the input root.
        extension: What it is: `txt`, `jsonl`, `ndjson`, `csv`, `tsv` or `parquet`.
        metadata_columns: As in `PromptsSource`.
        prompt_column: Column or field of the prompts; None takes one with a usual name.
        key_column: Column or field of the keys; None takes one with a usual name.
    """

    url: str
    source: str
    extension: str
    metadata_columns: tuple[str, ...] = ()
    prompt_column: str | None = None
    key_column: str | None = None

    @property
    def input(self) -> str:
        """The file's path below the input root."""
        return self.source

    def records(self, skip: int) -> Iterator[Record]:
        """Yields the prompts in order, as rows with one caption and no image.

        Raises:
            OptionError: A Parquet column is missing or of a type that cannot be used.
        """
        if self.extension == "parquet":
            yield from self._parquet(skip)
            return
        parse: Callable[[Iterator[Line]], Iterator[_Prompt | str]] = {
            "txt": _parse_lines,
            "csv": self._parse_csv,
            "tsv": self._parse_csv,
        }.get(self.extension, self._parse_json)
        row = 0
        counters = {"captions_not_utf8": 0}
        with open_shard(self.url) as file:
            try:
                for row, found in enumerate(parse(_lines(unpacked(file), counters))):
                    record = self._record(found, row)
                    if num_not_utf8 := counters["captions_not_utf8"]:
                        record = record._replace(counters={"captions_not_utf8": num_not_utf8})
                        counters["captions_not_utf8"] = 0
                    yield record
                    row += 1
            except ShardDamage as damage:
                yield Reject("", row, damage.reason, f"{self.source}, after {row} rows: {damage}")

    def _record(self, found: "_Prompt | str", row: int) -> Record:
        default = f"{self.name}-{row:08d}"
        if isinstance(found, str):
            return Reject(default, row, "bad_annotation", f"{self.source}, {found}")
        key = default if found.key in (None, "") else encodable(str(found.key))
        values = {name: metadata_text(found.fields.get(name)) for name in self.metadata_columns}
        return Row(key, b"", "", [encodable(found.text)], self.source, row, values)

    def _parse_json(self, lines: Iterator[Line]) -> Iterator["_Prompt | str"]:
        for number, (line, *_) in enumerate(lines, 1):
            try:
                found = parse_json(line) if line.strip() else None
            except (ValueError, RecursionError) as error:
                yield f"line {number}: no JSON ({error}): {line.strip()[:80]!r}"
                continue
            fields = {"prompt": found} if isinstance(found, str) else found
            if not isinstance(fields, dict):
                yield f"line {number}: expected a prompt, found {line.strip()[:80]!r}"
                continue
            names = {str(name).lower(): name for name in reversed(fields)}
            prompt = _pick(fields, names, self.prompt_column, PROMPT_COLUMNS)
            key = _pick(fields, names, self.key_column, KEY_COLUMNS)
            if isinstance(prompt, str) and prompt.strip() and not isinstance(key, list | dict):
                yield _Prompt(prompt, key, fields)
            else:
                yield f"line {number}: expected a text as {self._names()}, found {line.strip()[:80]!r}"

    def _parse_csv(self, lines: Iterator[Line]) -> Iterator["_Prompt | str"]:
        head = list(itertools.islice(lines, _LINES_TO_TELL))
        filled = [line.text for line in head if line.text.strip()]
        if not head:
            return
        first = filled[0] if filled else ""
        dialect = Dialect(self._delimiter(first), find_dialect(filled).escape)
        header = self._header(cut(first, dialect)) if filled else None
        # no column names images: its place is behind the last
        num_columns = len(header or ["prompt"])
        table = Table(dialect, 0, num_columns, (-1,), None, None, (), num_columns, header is not None, False)
        is_header = header is not None
        for record in records(itertools.chain(head, lines), table, with_blank=True):
            if record.text.strip() and is_header:
                is_header = False
            elif record.fault:
                found = f": {record.text.strip()[:80]!r}" if record.text.strip() else ""
                yield f"line {record.line}: {record.fault}{found}"
            else:
                yield self._csv_row(record.fields, header, record.line)

    def _delimiter(self, first: str) -> str:
        """Returns the delimiter by which the first line names a column of prompts, else the file extension's own."""
        usual = "\t" if self.extension == "tsv" else ","
        others = [delimiter for delimiter in ",;\t|" if delimiter != usual and delimiter in first]
        for delimiter in (usual, *others):
            cells = next(csv.reader([first], delimiter=delimiter), [])
            names = {cell.strip() if self.prompt_column else cell.strip().lower() for cell in cells}
            if names & ({self.prompt_column} if self.prompt_column else {*PROMPT_COLUMNS}):
                return delimiter
        return usual

    def _header(self, cells: Sequence[str]) -> list[str] | None:
        names = [cell.strip() for cell in cells]
        wanted = {self.prompt_column} if self.prompt_column else {*PROMPT_COLUMNS}
        prompts = [
            name for name in (names if self.prompt_column else map(str.lower, names)) if name in wanted
        ]
        if self.prompt_column and not prompts:
            raise OptionError(
                f"{self.url} has no column {self.prompt_column!r}; its first line has: {', '.join(names)}. Name one of "
                "them with --caption_column."
            )
        if twice := next((name for name in prompts if prompts.count(name) > 1), None):
            raise OptionError(
                f"{self.url} has {prompts.count(twice)} columns {twice!r}, of which one can be read: its first line "
                f"has {', '.join(names)}. Rename the others."
            )
        return names if prompts else None

    def _csv_row(self, cells: list[str], header: list[str] | None, number: int) -> "_Prompt | str":
        fields: dict[str, Any] = dict(zip(header or ["prompt"], cells, strict=False))
        if not any(cell.strip() for cell in cells):
            return f"line {number}: expected a prompt, found a blank line"
        if len(cells) != len(header or ["prompt"]):
            expected = f"{len(header)} columns" if header else "one column (or a header with `prompt`)"
            return (
                f"line {number}: expected {expected}, found {len(cells)}; a text with commas goes in quotes"
            )
        names = {name.lower(): name for name in reversed(fields)}
        prompt = _pick(fields, names, self.prompt_column if header else None, PROMPT_COLUMNS)
        if not prompt or not prompt.strip():
            return f"line {number}: expected a text as {self._names()}, found none"
        return _Prompt(prompt, _pick(fields, names, self.key_column, KEY_COLUMNS), fields)

    def _names(self) -> str:
        return repr(self.prompt_column) if self.prompt_column else " or ".join(map(repr, PROMPT_COLUMNS))

    def _parquet(self, skip: int) -> Iterator[Record]:
        fields = self.name, self.size_bytes, self.num_rows, self.url, self.source, self.metadata_columns
        shard = ParquetShard(
            *fields,
            ColumnNames(None, self.prompt_column, self.key_column),
            with_images=False,
            joins_captions=False,
        )
        for record in shard.records(skip):
            if isinstance(record, Row) and len(record.captions) != 1:
                what = f"{len(record.captions)} texts" if record.captions else "a blank one"
                message = f"{self.source}, row {record.row}: expected a prompt, found {what}"
                record = Reject(record.key, record.row, "bad_annotation", message)
            yield record._replace(path="") if isinstance(record, Row) else record


class _Prompt(NamedTuple):
    text: str
    key: Any
    fields: dict[str, Any]


def _parse_lines(lines: Iterator[Line]) -> Iterator[_Prompt | str]:
    for number, (line, _, is_cut) in enumerate(lines, 1):
        if is_cut:
            yield f"line {number}: expected a prompt, found {line}"
        elif line.strip():
            yield _Prompt(line.strip(), None, {})
        else:
            yield f"line {number}: expected a prompt, found a blank line"


def _lines(file: io.BufferedReader, counters: dict[str, int]) -> Iterator[Line]:
    """Yields the lines: only LF and CRLF end one, other separators of Unicode are text."""
    for line in encoding.lines(file, encoding.peek_encoding(file)):
        counters["captions_not_utf8"] += not line.is_utf
        yield line


def _pick(fields: dict[str, Any], names: dict[str, str], asked: str | None, usual: Sequence[str]) -> Any:
    """Returns the value of a field: the one asked for, else the first with a usual name in any case."""
    if asked is not None:
        return fields.get(asked)
    return next((fields[names[name]] for name in usual if name in names), None)


def _find_parquet_column(url: str) -> str | None:
    """Returns the column of prompts, or None of a damaged file: its reader will say so."""
    try:
        with open_parquet(url) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
    except ShardDamage:
        return None
    names = {name.lower(): name for name in reversed(schema.names)}
    found = next((names[name] for name in PROMPT_COLUMNS if name in names), None)
    found = found or next((name for name in CAPTION_COLUMNS if name in schema.names), None)
    if found is None and num_rows:
        there = ", ".join(schema.names)
        raise OptionError(
            f"{url} has no column of prompts ({', '.join(PROMPT_COLUMNS)}); its columns are: {there}. Name one with "
            "--caption_column."
        )
    return found
