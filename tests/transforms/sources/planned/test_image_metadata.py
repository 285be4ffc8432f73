import json
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diptych.transforms.chunk import Reject
from diptych.transforms.errors import OptionError
from diptych.transforms.sources.base import ColumnNames, Row
from diptych.transforms.sources.open import SourceOptions, open_source
from diptych.transforms.sources.planned.plan import plan_counters, plan_notes


class Read:
    """A folder of images as it is read."""

    def __init__(self, folder, **options):
        source = open_source([str(folder)], "auto", SourceOptions(**options))
        source.inputs()
        shards = source.shards(f"{folder}-plans/{uuid.uuid4().hex}", 100)
        records = [record for shard in shards for record in shard.rows()]
        assert [[*shard.rows(1)] for shard in shards] == [[*shard.rows()][1:] for shard in shards]
        self.captions = {row.key: list(row.captions) for row in records if isinstance(row, Row)}
        self.metadata = {row.key: row.metadata for row in records if isinstance(row, Row)}
        self.rejects = [(lost.reason, lost.message) for lost in records if isinstance(lost, Reject)]
        self.counters = plan_counters(shards)
        self.notes = plan_notes(shards)


@pytest.fixture
def folder(tmp_path: Path):
    return folder_of(tmp_path / "in", "1.jpg", "2.jpg", "3.jpg")


def folder_of(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"an image")
    return folder


def jsonl(folder, *rows):
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def csv(folder, text, encoding="utf-8"):
    (folder / "metadata.csv").write_bytes(text.encode(encoding))
    return folder


def test_a_quote_that_is_never_closed_costs_its_line(folder):
    read = Read(csv(folder, 'file_name,text\n1.jpg,"open\n2.jpg,b\n3.jpg,c\n'))
    assert read.captions == {"1": [], "2": ["b"], "3": ["c"]}
    assert read.rejects == [
        ("bad_annotation", "metadata.csv, line 2: a quote is opened and not closed: '1.jpg,\"open'")
    ]


def test_lines_in_quotes_and_commas_without(folder):
    read = Read(csv(folder, 'file_name,text\n1.jpg,"one\ntwo ""2"""\n2.jpg,a, b, c\n3.jpg\n'))
    assert read.captions == {"1": ['one\ntwo "2"'], "2": ["a, b, c"], "3": []}
    assert [reason for reason, _ in read.rejects] == ["bad_annotation"]


@pytest.mark.parametrize("delimiter", ["\t", ";", "|", ","])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_any_delimiter(folder, delimiter, encoding):
    text = "File_Name,text,text\n1.jpg,a,x\n2.jpg,b,y\n3.jpg,c,z\n".replace(",", delimiter)
    read = Read(csv(folder, text, encoding))
    assert read.captions == {"1": ["a"], "2": ["b"], "3": ["c"]}
    assert read.counters == {"columns_of_one_name": 1}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_text_that_is_not_utf8_is_counted(folder, kind):
    lines = {"csv": "file_name,text\n1.jpg,café", "jsonl": '{"file_name": "1.jpg", "text": "café"}'}
    (folder / f"metadata.{kind}").write_bytes(lines[kind].encode("cp1252"))
    read = Read(folder)
    assert (read.captions["1"], read.counters["captions_not_utf8"]) == (["café"], 1)


def test_names_in_another_spelling(tmp_path):
    folder = folder_of(tmp_path / "in", "\xe9/1.jpg", "a b/2.jpg", "X.JPG", "x%20y.jpg", "x y.jpg")
    names = ("e\u0301/1.jpg", "a%20b/2.jpg", "x.jpg", "x%20y.jpg", "gone.jpg")
    read = Read(jsonl(folder, *({"file_name": name, "text": name} for name in names)))
    assert read.captions == {
        "\xe9/1": [names[0]],
        "a b/2": [names[1]],
        "X": [names[2]],
        "x%20y": [names[3]],
        "x y": [],
    }
    assert read.counters == {"similar_file_names": 3, "images_without_metadata": 1}
    assert [reason for reason, _ in read.rejects] == ["missing_image"]


def test_two_names_of_one_file_are_one_row(tmp_path):
    folder = folder_of(tmp_path / "in", "a b.jpg")
    rows = ({"file_name": name, "text": name} for name in ("a%20b.jpg", "%61 b.jpg", "A b.jpg"))
    read = Read(jsonl(folder, *rows))
    assert read.captions == {"a b": ["a%20b.jpg", "%61 b.jpg"]}
    assert read.rejects == [("missing_image", "A b.jpg is named by the metadata, and is not there")]


def test_each_row_has_its_own_columns(folder):
    rows = {"file_name": "1.jpg"}, {"file_name": "2.jpg", "caption": "b", "lic": "cc"}
    jsonl(folder, *rows, {"file_name": "3.jpg", "description": "c"})
    read = Read(folder, metadata_columns=("lic",))
    assert read.captions == {"1": [], "2": ["b"], "3": ["c"]}
    assert read.metadata == {"1": {"lic": None}, "2": {"lic": "cc"}, "3": {"lic": None}}
    read = Read(folder, columns=ColumnNames(caption="description"))
    assert read.captions == {"1": [], "2": [], "3": ["c"]}
    assert read.counters == {"rows_without_caption_column": 2}


@pytest.mark.parametrize(
    ("flag", "option"),
    [
        ("caption_column", {"columns": ColumnNames(caption="nope")}),
        ("key_column", {"columns": ColumnNames(key="nope")}),
        ("metadata_columns", {"metadata_columns": ("text", "nope")}),
    ],
)
def test_a_column_that_no_row_has_is_refused(folder, flag, option):
    with pytest.raises(OptionError, match=f"which --{flag} names; its images have no metadata"):
        Read(folder, **option)
    jsonl(folder, {"file_name": "1.jpg", "text": "a"})
    with pytest.raises(OptionError, match=f"'nope', which --{flag} names"):
        Read(folder, **option)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_columns_with_other_names_are_told(folder, kind):
    row = {"file_name": "1.jpg", "caption_de": "eins", "prompt": "one"}
    if kind == "csv":
        csv(folder, f"{','.join(row)}\n{','.join(row.values())}\n")
    elif kind == "jsonl":
        jsonl(folder, row)
    else:
        pq.write_table(pa.Table.from_pylist([row]), folder / "metadata.parquet")
    [note] = Read(folder).notes
    assert "it has 'caption_de', 'prompt'" in note
    assert "--caption_column" in note
    read = Read(folder, columns=ColumnNames(caption="prompt"))
    assert (read.notes, read.captions["1"]) == ([], ["one"])


def test_what_is_no_text_is_counted(folder):
    rows = {"file_name": "1.jpg", "text": 7}, {"file_name": "2.jpg", "text": ["a", None, 3]}
    read = Read(jsonl(folder, *rows, {"file_name": "3.jpg", "caption": {"en": "x"}, "captions": ["d"]}))
    assert read.captions == {"1": [], "2": ["a"], "3": ["d"]}
    assert read.counters == {"captions_not_text": 4}
    read = Read(jsonl(folder, {"file_name": "1.jpg", "caption": "c", "text": ["c", "d"]}))
    assert read.captions["1"] == ["c"]
    assert read.counters == {"texts_passed_over": 1, "images_without_metadata": 2}


def test_keys_are_those_of_a_named_column(tmp_path):
    folder = folder_of(tmp_path / "in", *(f"{number}.jpg" for number in range(1, 8)))
    rows = [{"file_name": f"{number}.jpg", "uid": uid} for number, uid in enumerate(["a", 7.0, "a", None], 1)]
    jsonl(folder, *rows)
    for name, uid in (("5", "b"), ("6", "b"), ("7", None)):
        (folder / f"{name}.json").write_text(json.dumps({"uid": uid, "caption": name}))
    read = Read(folder, columns=ColumnNames(key="uid"))
    assert read.captions == {"a": [], "7": [], "b": ["5"]}
    assert sorted(reason for reason, _ in read.rejects) == [*["bad_annotation"] * 2, *["duplicate_key"] * 2]
