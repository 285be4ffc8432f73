import csv
import gzip
import json
import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.transforms.chunk import Reject
from diptych.transforms.errors import InputError, OptionError
from diptych.transforms.sources.base import ColumnNames, InputFile, Row
from diptych.transforms.sources.open import SourceOptions, open_source
from diptych.transforms.sources.sharded.prompts import PromptsSource


def shard_of(path, **options):
    columns = ColumnNames(caption=options.pop("prompt_column", None), key=options.pop("key_column", None))
    (shard,) = PromptsSource((str(path),), os.path.dirname(path), columns=columns, **options).shards("", 0)
    return pickle.loads(pickle.dumps(shard))


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return shard_of(path)


def texts(records):
    return [record.captions[0] if isinstance(record, Row) else record.reason for record in records]


def test_a_line_of_text_is_a_row(tmp_path):
    shard = write(tmp_path / "p.txt", "a red ball\ntwo dogs")
    assert list(shard.rows()) == [
        Row("p-00000000", b"", "", ["a red ball"], "p.txt", 0, {}),
        Row("p-00000001", b"", "", ["two dogs"], "p.txt", 1, {}),
    ]
    assert list(shard.rows(skip=1)) == [Row("p-00000001", b"", "", ["two dogs"], "p.txt", 1, {})]


def test_a_blank_line_is_a_loss_that_names_it(tmp_path):
    first, blank, last = write(tmp_path / "p.txt", "one\n  \r\ntwo\n").rows()
    assert texts([first, last]) == ["one", "two"]
    assert blank == Reject(
        "p-00000001", 1, "bad_annotation", "p.txt, line 2: expected a prompt, found a blank line"
    )


def test_byte_order_mark_line_ends_and_unicode(tmp_path):
    shard = write(tmp_path / "p.txt", "\ufeffein Hund\r\n犬と\u2028猫\r\n🐕".encode())
    assert texts(shard.rows()) == ["ein Hund", "犬と\u2028猫", "🐕"]


def test_text_that_is_not_utf8_is_what_it_is_and_counted(tmp_path):
    first, second = write(tmp_path / "p.txt", b"caf\xe9\nok\n").rows()
    assert (first.captions, first.counters) == (["caf\xe9"], {"captions_not_utf8": 1})
    assert (second.captions, second.counters) == (["ok"], {})


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-8-sig", "utf-32"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a dog\nwei\xdf\n"),
        ("p.csv", "id;prompt\n1;a dog\n2;wei\xdf\n"),
        ("p.csv", "prompt|id\na dog|1\nwei\xdf|2\n"),
        ("p.tsv", "prompt\na dog\nwei\xdf\n"),
        ("p.csv", '"prompt"\n"a dog"\n"wei\xdf"\n'),
        ("p.jsonl", '{"prompt": "a dog"}\n{"prompt": "wei\xdf"}\n'),
    ],
)
def test_text_of_every_encoding_and_delimiter(tmp_path, encoding, name, text):
    assert texts(write(tmp_path / name, text.encode(encoding)).rows()) == ["a dog", "wei\xdf"]


def test_an_empty_file_has_no_rows(tmp_path):
    for name in ("p.txt", "p.jsonl", "p.csv"):
        assert list(write(tmp_path / name, "").rows()) == []


def test_gzip(tmp_path):
    packed = gzip.compress(b"one\ntwo\n")
    assert texts(write(tmp_path / "p.txt.gz", packed).rows()) == ["one", "two"]
    *found, lost = write(tmp_path / "cut.txt.gz", packed[:-9]).rows()
    assert lost.reason == "shard_truncated"
    assert texts(found) in ([], ["one"], ["one", "two"])


def test_json_lines(tmp_path):
    lines = [
        {"prompt": "one", "id": 7},
        {"Text": "two", "key": "k2"},
        "three",
        {"caption": "four", "text": "not this", "key": ""},
        {"caption": "\ud800 half"},
    ]
    shard = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, lines)))
    assert [(row.key, row.captions) for row in shard.rows()] == [
        ("7", ["one"]),
        ("k2", ["two"]),
        ("p-00000002", ["three"]),
        ("p-00000003", ["four"]),
        ("p-00000004", ["? half"]),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[1]",
        "7",
        '{"prompt": 7}',
        '{"prompt": " "}',
        '{"title": "x"}',
        '{"prompt": "x", "id": [1]}',
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_a_broken_json_line_costs_itself(tmp_path, line):
    shard = write(tmp_path / "p.jsonl", f'"before"\n{line}\n"after"')
    assert texts(shard.rows()) == ["before", "bad_annotation", "after"]
    assert "line 2" in list(shard.rows())[1].message


def test_named_fields_and_metadata(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "no", "said": "yes", "n": 1, "tags": ["a"]}\n{"prompt": "no"}\n')
    shard = shard_of(path, prompt_column="said", key_column="n", metadata_columns=("tags",))
    found, lost = shard.rows()
    assert found == Row("1", b"", "", ["yes"], "p.jsonl", 0, {"tags": '["a"]'})
    assert (lost.reason, "'said'" in lost.message) == ("bad_annotation", True)


def test_csv_with_a_header(tmp_path):
    path = tmp_path / "p.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows(
            [["id", "Prompt"], ["a", 'a "red", ball'], [], ["b", "two\nlines"], ["c", ""], ["d"]]
        )
    records = list(shard_of(path).rows())
    assert texts(records) == ['a "red", ball', *["bad_annotation"], "two\nlines", *["bad_annotation"] * 2]
    assert [record.key for record in records[:3:2]] == ["a", "b"]
    assert [record.row for record in records] == [0, 1, 2, 3, 4]
    assert "line 3" in records[1].message


def test_csv_without_a_header(tmp_path):
    shard = write(tmp_path / "p.csv", 'a dog\n"a dog, a cat"\na dog, a cat\n\'tis "fine"\n')
    assert texts(shard.rows()) == ["a dog", "a dog, a cat", "bad_annotation", '\'tis "fine"']
    assert "quotes" in list(shard.rows())[2].message


@pytest.mark.parametrize("two", ["two", '"two"'])
@pytest.mark.parametrize("three", ["three", '"three"'])
def test_a_quote_that_is_not_closed_costs_its_line(tmp_path, two, three):
    prompts = ["zero", '"one', two, three]
    with_ids = ["id,prompt", *(f"{number},{prompt}" for number, prompt in enumerate(prompts))]
    for name, lines in (("a.csv", prompts), ("b.csv", with_ids), ("c.tsv", with_ids)):
        text = "\n".join(lines)
        records = list(write(tmp_path / name, text if name != "c.tsv" else text.replace(",", "\t")).rows())
        assert texts(records) == ["zero", "bad_annotation", "two", "three"]
        assert "a quote is opened and not closed" in records[1].message


def test_a_prompt_may_go_over_lines_that_look_like_records(tmp_path):
    text = 'id,prompt\n0,"a dog, brown\nruns, fast\n\nhere"\n1,"a ""cat"""\n'
    assert texts(write(tmp_path / "p.csv", text).rows()) == ["a dog, brown\nruns, fast\n\nhere", 'a "cat"']


def test_a_csv_column_that_is_not_there(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("prompt,other\na,b\n")
    assert texts(shard_of(path, prompt_column="other").rows()) == ["b"]
    with pytest.raises(OptionError, match=r"no column 'none'.*prompt, other"):
        list(shard_of(path, prompt_column="none").rows())


def test_json_with_an_integer_of_any_length(tmp_path):
    shard = write(tmp_path / "p.jsonl", '{"prompt": "a dog", "n": ' + "9" * 5000 + "}\n")
    assert texts(shard.rows()) == ["a dog"]


def test_a_csv_with_two_columns_of_prompts_is_refused(tmp_path):
    for header in ("id,prompt,prompt", "id,prompt,Prompt"):
        with pytest.raises(OptionError, match="has 2 columns 'prompt'"):
            list(write(tmp_path / "p.csv", f"{header}\n1,a,b\n").rows())


def test_tsv(tmp_path):
    shard = write(tmp_path / "p.tsv", "Prompt\tCategory\na dog, a cat\tAnimals\n")
    assert texts(shard.rows()) == ["a dog, a cat"]


def test_parquet(tmp_path):
    path = tmp_path / "p.parquet"
    columns = {"text": ["not this"] * 4, "prompt": ["one", None, "  ", "four"], "id": ["a", "b", None, "d"]}
    pq.write_table(pa.table(columns), path)
    records = list(shard_of(path).rows())
    assert texts(records) == ["one", "bad_annotation", "bad_annotation", "four"]
    assert [record.key for record in records] == ["a", "b", "p-00000002", "d"]
    assert records[0] == Row("a", b"", "", ["one"], "p.parquet", 0, {})
    assert texts(shard_of(path, prompt_column="text").rows()) == ["not this"] * 4


def test_parquet_without_prompts(tmp_path):
    pq.write_table(pa.table({"n": [1]}), tmp_path / "p.parquet")
    with pytest.raises(OptionError, match="no column of prompts"):
        shard_of(tmp_path / "p.parquet")


def test_damaged_parquet_is_a_loss(tmp_path):
    (lost,) = write(tmp_path / "p.parquet", b"PAR1 but then something else").rows()
    assert lost.reason in ("shard_truncated", "shard_corrupt")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "p.doc").write_text("x")
    with pytest.raises(InputError, match=r"p\.doc is of no format"):
        shard_of(tmp_path / "p.doc")
    with pytest.raises(InputError, match="is not there"):
        shard_of(tmp_path / "gone.txt")


def test_files_that_differ_only_in_extension_have_names_of_their_own(tmp_path):
    for name in ("p.txt", "p.csv", "p.jsonl", "p.tsv"):
        (tmp_path / name).write_text('"x"\n')
    urls = tuple(str(tmp_path / name) for name in ("p.txt", "p.csv", "p.jsonl", "p.tsv"))
    source = PromptsSource(urls, str(tmp_path))
    assert source.inputs() == [InputFile(name, 4) for name in ("p.txt", "p.csv", "p.jsonl", "p.tsv")]
    assert len({shard.name for shard in source.shards("", 0)}) == 4


def test_a_duplicate_key_is_lost(tmp_path):
    records = list(
        write(tmp_path / "p.jsonl", '{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}\n').rows()
    )
    assert texts(records) == ["a", "duplicate_key"]


@given(prompts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"))))
def test_every_line_is_a_record(tmp_path_factory, prompts):
    path = tmp_path_factory.mktemp("p") / "p.txt"
    data = "".join(f"{prompt}\n" for prompt in prompts)
    found = list(write(path, data).rows())
    wanted = [prompt.lstrip("\ufeff") for prompt in prompts]
    assert len(found) == len(prompts)
    assert texts(found) == [prompt.strip() or "bad_annotation" for prompt in wanted]


class TestOpenSource:
    @pytest.mark.parametrize(
        ("name", "format"), [("p.jsonl", "auto"), ("p.tsv", "auto"), ("p.txt", "prompts")]
    )
    def test_finds_prompts(self, tmp_path, name, format):
        (tmp_path / name).write_text('{"prompt": "a cat"}\n' if name.endswith("l") else "prompt\na cat\n")
        source = open_source([str(tmp_path / name)], format, SourceOptions(), texts_only=True)
        [shard] = source.shards("", 0)
        assert shard.name == "p"
        assert list(shard.rows())[-1].captions == ["a cat"]

    def test_a_job_that_reads_images_refuses_them(self, tmp_path):
        (tmp_path / "p.jsonl").touch()
        with pytest.raises(OptionError, match="diptych embed"):
            open_source([str(tmp_path / "p.jsonl")], "auto", SourceOptions())
