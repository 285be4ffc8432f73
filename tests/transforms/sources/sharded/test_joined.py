import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.transforms.chunk import Reject
from diptych.transforms.read import read_chunks
from diptych.transforms.schemas import IMAGE, raw_schema
from diptych.transforms.sources.archives.shard_file import image_name
from diptych.transforms.sources.base import MAX_TEXT_BYTES, Row
from diptych.transforms.sources.sharded.joined import join_captions, numbered_key
from diptych.transforms.sources.sharded.parquet import ParquetShard

JPEG = b"\xff\xd8\xff\xe0"


def row(key, number, captions=("a",), image=JPEG, path=None, **fields):
    return Row(key, image, path or image_name(key, image), list(captions), "s", number, **fields)


def numbered(number, *args, **fields):
    return row(numbered_key("s", number), number, *args, **fields)


def join(*records):
    return list(join_captions(iter(records), "s"))


def shard_of(path, table, **options):
    pq.write_table(pa.table(table), path, **options)
    return ParquetShard("shard", 0, None, str(path), "a.parquet")


def test_rows_of_a_key_and_an_image_are_one():
    first, second = join(row("k", 0, "a"), row("k", 1, "bc"), row("k", 2, "a"), row("l", 3, "d"))
    assert first == row("k", 0, "abca", counters={"captions_joined": 3})
    assert second == row("l", 3, "d")


@pytest.mark.parametrize(
    "other",
    [
        row("k", 1, "b", image=JPEG + b"1"),
        row("l", 1, "b"),
        row("k", 1, ""),
        numbered(1, "b"),
        row("k", 1, "b", image=b""),
    ],
)
def test_others_are_rows_of_their_own(other):
    assert join(row("k", 0, "a"), other) == [row("k", 0, "a"), other]


def test_rows_without_keys_are_one_where_image_and_file_name_are():
    assert join(numbered(0, "a"), numbered(1, "b"))[0].captions == ["a", "b"]
    assert len(join(numbered(0, "a", path="1.jpg"), numbered(1, "b", path="1.jpg"))) == 1
    assert len(join(numbered(0, "a", path="1.jpg"), numbered(1, "b", path="2.jpg"))) == 2
    assert len(join(numbered(0, "a", b""), numbered(1, "b", b""))) == 2
    assert len(join(numbered(0, ""), numbered(1, ""))) == 2


def test_damage_between_costs_no_neighbour():
    lost = [Reject("", number, "record_corrupt", "") for number in range(1, 20)]
    assert join(row("k", 0, "a"), *lost[:3], row("k", 4, "b")) == [
        row("k", 0, "ab", counters={"captions_joined": 1}),
        *lost[:3],
    ]
    assert join(row("k", 0, "a"), *lost, row("k", 20, "b")) == [row("k", 0, "a"), *lost, row("k", 20, "b")]
    assert join(*lost[:2]) == lost[:2]
    assert join() == []


def test_what_others_say_beside_captions_is_counted():
    first = row("k", 0, "a", metadata={"n": "1"}, counters={"captions_not_utf8": 1})
    second = row("k", 1, "b", metadata={"n": "2"}, counters={"captions_not_utf8": 1})
    (joined,) = join(first, second, second)
    assert joined.metadata == {"n": "1"}
    assert joined.counters == {"captions_joined": 2, "captions_not_utf8": 3, "metadata_passed_over": 2}


def test_captions_of_a_row_are_bounded():
    text = "x" * (MAX_TEXT_BYTES // 4)
    records = join(*(row("k", number, [text]) for number in range(12)))
    assert [len(record.captions) for record in records] == [6, 6]


class TestParquet:
    def test_a_row_a_caption(self, tmp_path):
        table = {
            "image_id": [1, 1, 1, 2, 2],
            "image": [JPEG] * 3 + [JPEG + b"2"] * 2,
            "caption": list("abcde"),
        }
        rows = list(shard_of(tmp_path / "a.parquet", table).rows())
        assert [(r.key, list(r.captions), r.row) for r in rows] == [
            ("1", ["a", "b", "c"], 0),
            ("2", ["d", "e"], 3),
        ]

    def test_across_batches_and_row_groups(self, tmp_path):
        table = {"id": [n // 5 for n in range(1000)], "jpg": [b"%d" % (n // 5) for n in range(1000)]}
        table["text"] = [f"caption {n}" for n in range(1000)]
        rows = list(shard_of(tmp_path / "a.parquet", table, row_group_size=97).rows())
        assert [list(r.captions) for r in rows] == [
            [f"caption {n}" for n in range(first, first + 5)] for first in range(0, 1000, 5)
        ]

    def test_a_key_that_comes_again_later_is_told_how_to_mend(self, tmp_path):
        table = {"id": [1, 2, 1], "image": [JPEG, JPEG + b"2", JPEG], "caption": list("abc")}
        _, _, lost = shard_of(tmp_path / "a.parquet", table).rows()
        assert (lost.reason, lost.row) == ("duplicate_key", 2)
        assert "sort by key" in lost.message

    def test_rows_without_keys_by_path(self, tmp_path):
        image = pa.array([{"bytes": JPEG, "path": f"d/{name}.jpg"} for name in "aabb"], IMAGE)
        rows = list(shard_of(tmp_path / "a.parquet", {"image": image, "caption": list("wxyz")}).rows())
        assert [(r.path, list(r.captions)) for r in rows] == [("a.jpg", ["w", "x"]), ("b.jpg", ["y", "z"])]

    def test_without_captions_a_key_that_comes_again_is_a_duplicate(self, tmp_path):
        _, lost = shard_of(tmp_path / "a.parquet", {"id": [1, 1], "image": [JPEG, JPEG]}).rows()
        assert lost.reason == "duplicate_key"

    @given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 4))
    def test_a_run_that_goes_on_reads_the_same_chunks(self, tmp_path_factory, ids, chunk_rows):
        path = tmp_path_factory.getbasetemp() / "resume.parquet"
        images = [None if n == 3 else JPEG + bytes([n]) for n in ids]
        texts = [f"{n}" for n in range(len(ids))]
        shard = shard_of(
            path,
            {
                "id": pa.array(ids, pa.int64()),
                "image": pa.array(images, pa.binary()),
                "text": pa.array(texts, pa.string()),
            },
        )
        records = list(shard.rows())
        assert len(records) + sum(r.counters.get("captions_joined", 0) for r in records) == len(ids)
        for skip in range(len(records) + 2):
            assert list(shard.rows(skip=skip)) == records[skip:]
        whole = list(read_chunks(shard, chunk_rows, raw_schema()))
        for done in range(len(whole)):
            rest = list(read_chunks(shard, chunk_rows, raw_schema(), whole_commits(whole[:done])))
            assert [(c.key, c.rows, c.rejects, c.counters) for c in rest] == [
                (c.key, c.rows, c.rejects, c.counters) for c in whole[done:]
            ]


class Commit:
    def __init__(self, records):
        self.records = records


def whole_commits(chunks):
    return [Commit(chunk.num_records) for chunk in chunks]


def test_repeated_images_of_rows_without_keys_are_counted():
    other = JPEG + b"other"
    rows = join(
        numbered(0, "a"), numbered(1, "b", other), numbered(2, "c"), numbered(3, "d"), numbered(4, "", other)
    )
    assert [row.captions for row in rows] == [["a"], ["b"], ["c", "d"], []]
    repeated = {"repeated_images_not_joined": 1}
    assert [row.counters for row in rows] == [{}, {}, {**repeated, "captions_joined": 1}, repeated]
    named = [numbered(number, "a", path=f"{number}.jpg") for number in range(3)]
    assert [row.counters for row in join(*named, row("k", 3), row("l", 4))] == [{}] * 5
