import dataclasses
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that, equal_to
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.transforms import read as read_module
from diptych.transforms.chunk import Chunk, ChunkKey, Reject
from diptych.transforms.errors import InputError, OutputError
from diptych.transforms.progress import progress
from diptych.transforms.read import ReadShards, read_ahead, read_chunks, read_text_chunks
from diptych.transforms.schemas import RAW_TEXT, REJECTS, images_schema, raw_schema
from diptych.transforms.sink import Commit, Sink, commit_chunk
from diptych.transforms.sources.base import Record, Row, Shard
from diptych.transforms.sources.sharded.prepared_captions import TextShard


@dataclasses.dataclass(frozen=True)
class ListShard(Shard):
    """A shard of records that are there already; an exception among them is raised."""

    content: tuple[Record | Exception, ...]

    @property
    def input(self) -> str:
        return "a.tar"

    def records(self, skip: int) -> Iterator[Record]:
        for ordinal, record in enumerate(self.content):
            if isinstance(record, Exception):
                raise record
            skipped = ordinal < skip and isinstance(record, Row)
            yield record._replace(image=b"") if skipped else record


def row_of(number: int, num_bytes: int = 10) -> Row:
    return Row(f"k{number}", bytes([number]) * num_bytes, f"{number}.jpg", ["a", "b"], "a.tar", number)


def shard_of(*content: Record | Exception, name: str = "shard") -> ListShard:
    return ListShard(name, 100, len(content), content)


def read(shard: Shard, chunk_rows: int = 3, done: list[Commit] | None = None) -> list[Chunk]:
    return list(read_chunks(shard, chunk_rows, raw_schema(), done or []))


def commit_of(chunk: Chunk) -> Commit:
    key = chunk.key
    return Commit(
        "images",
        key.shard,
        key.index,
        chunk.last,
        chunk.num_records,
        chunk.num_read,
        len(chunk),
        {},
        {},
        "",
        "a.tar",
    )


def sink_of(folder: Path) -> Sink:
    return Sink(str(folder), "images", {"fingerprint": "f" * 16}, images_schema())


class TestReadChunks:
    @pytest.mark.parametrize(
        ("count", "lengths"),
        [(0, [0]), (1, [1]), (2, [2]), (3, [3]), (4, [3, 1]), (6, [3, 3]), (7, [3, 3, 1])],
    )
    def test_cuts_after_a_number_of_rows_and_marks_the_last(self, count, lengths):
        chunks = read(shard_of(*map(row_of, range(count))))
        assert [len(chunk) for chunk in chunks] == lengths
        assert [chunk.key for chunk in chunks] == [ChunkKey("shard", index) for index in range(len(lengths))]
        assert [chunk.last for chunk in chunks] == [False] * (len(lengths) - 1) + [True]
        assert [key for chunk in chunks for key in chunk.rows["key"].to_pylist()] == [
            f"k{i}" for i in range(count)
        ]

    def test_cuts_before_images_add_up(self, monkeypatch):
        monkeypatch.setattr(read_module, "_MAX_CHUNK_BYTES", 100)
        sizes = [10, 95, 10, 200, 97, 1, 1]  # and two bytes of captions each
        chunks = read(shard_of(*(row_of(number, size) for number, size in enumerate(sizes))), chunk_rows=100)
        assert [chunk.rows["row"].to_pylist() for chunk in chunks] == [[0, 1], [2, 3], [4, 5], [6]]

    def test_cuts_before_captions_add_up(self, monkeypatch):
        monkeypatch.setattr(read_module, "_MAX_CHUNK_BYTES", 100)
        rows = [row_of(number)._replace(captions=["x" * 60]) for number in range(4)]
        chunks = read(shard_of(*rows), chunk_rows=100)
        assert [chunk.rows["row"].to_pylist() for chunk in chunks] == [[0, 1], [2, 3]]

    def test_rows_and_rejects_are_what_was_read(self):
        lost = Reject("k1", 1, "missing_image", "it is not there", b"data")
        (chunk,) = read_chunks(shard_of(row_of(0), lost, row_of(2)), 3, raw_schema(), keep_bytes=True)
        assert chunk.rows.schema.equals(raw_schema())
        assert chunk.rejects.schema.equals(REJECTS)
        assert chunk.rows.to_pylist() == [
            {
                "key": f"k{number}",
                "image": bytes([number]) * 10,
                "path": f"{number}.jpg",
                "captions": ["a", "b"],
                "source": "a.tar",
                "row": number,
            }
            for number in (0, 2)
        ]
        assert chunk.rejects.to_pylist() == [
            {
                "key": "k1",
                "shard": "shard",
                "row": 1,
                "stage": "read",
                "reason": "missing_image",
                "message": "it is not there",
                "bytes": b"data",
            }
        ]
        assert chunk.num_read == 3

    def test_a_reject_keeps_its_bytes_only_when_asked(self, monkeypatch):
        monkeypatch.setattr(read_module, "_MAX_CHUNK_BYTES", 100)
        lost = [Reject("", number, "duplicate_key", "m", bytes(60)) for number in range(4)]
        (chunk,) = read(shard_of(*lost), 5)
        assert chunk.rejects["bytes"].to_pylist() == [None] * 4
        chunks = list(read_chunks(shard_of(*lost), 5, raw_schema(), keep_bytes=True))
        assert [chunk.rejects["bytes"].to_pylist() for chunk in chunks] == [[bytes(60)] * 2] * 2

    def test_rejects_count_as_rows_of_a_chunk(self):
        lost = [Reject("", number, "bad_annotation", "m") for number in range(4)]
        chunks = read(shard_of(*lost, row_of(4)))
        assert [(len(chunk), chunk.num_read) for chunk in chunks] == [(0, 3), (1, 2)]

    def test_metadata_become_columns(self):
        row = row_of(0)._replace(metadata={"license": "CC0"})
        (chunk,) = read_chunks(shard_of(row, row_of(1)), 5, raw_schema(("license", "url")))
        assert chunk.rows["license"].to_pylist() == ["CC0", None]
        assert chunk.rows["url"].to_pylist() == [None, None]

    @settings(max_examples=60, deadline=None)
    @given(
        is_row=st.lists(st.booleans(), max_size=12),
        sizes=st.lists(st.integers(1, 60), min_size=12, max_size=12),
        chunk_rows=st.integers(1, 5),
        data=st.data(),
    )
    def test_going_on_gives_what_was_left(self, is_row, sizes, chunk_rows, data):
        records = [
            row_of(number, sizes[number]) if good else Reject("", number, "bad_annotation", "m")
            for number, good in enumerate(is_row)
        ]
        shard = shard_of(*records)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(read_module, "_MAX_CHUNK_BYTES", 100)
            chunks = read(shard, chunk_rows)
            num_done = data.draw(st.integers(0, len(chunks) - 1))
            left = read(shard, chunk_rows, [commit_of(chunk) for chunk in chunks[:num_done]])
        assert left == chunks[num_done:]
        assert sum(chunk.num_read for chunk in chunks) == len(records)
        assert all(chunk.num_read for chunk in chunks[:-1])

    def test_without_images_none_is_asked_for(self):
        class Asked(ListShard):
            def texts(self, skip: int) -> Iterator[Record]:
                skips.append(skip)
                return super().records(len(self.content))

        skips: list[int] = []
        lost = Reject("k1", 1, "missing_image", "m")
        content = (row_of(0), lost, row_of(2), row_of(2), row_of(3))
        chunks = list(read_chunks(Asked("shard", 100, 5, content), 3, RAW_TEXT))
        assert skips == [0]
        assert [chunk.rows.to_pylist() for chunk in chunks] == [
            [{"key": f"k{number}", "captions": ["a", "b"], "row": number} for number in numbers]
            for numbers in ((0, 2), (3,))
        ]
        assert [chunk.rejects["reason"].to_pylist() for chunk in chunks] == [
            ["missing_image"],
            ["duplicate_key"],
        ]

    def test_records_that_became_several_rows_are_skipped_as_records(self):
        chunks = read(shard_of(*map(row_of, range(7))))
        done = dataclasses.replace(commit_of(chunks[0]), read=40, written=40)
        assert read(shard_of(*map(row_of, range(7))), done=[done]) == chunks[1:]


@dataclasses.dataclass(frozen=True)
class BatchShard(TextShard):
    """Texts of batches that are there already."""

    sizes: tuple[int, ...]

    def batches(self, skip: int) -> Iterator[pa.RecordBatch]:
        first = 0
        for size in self.sizes:
            numbers = range(max(first, skip), first + size)
            first += size
            yield pa.RecordBatch.from_arrays(
                [
                    pa.array([f"k{number}" for number in numbers], pa.string()),
                    pa.array([["caption"] * (number % 3) for number in numbers], pa.list_(pa.string())),
                    pa.array(numbers, pa.int64()),
                ],
                schema=RAW_TEXT,
            )


class TestReadTextChunks:
    @given(
        sizes=st.lists(st.integers(0, 7), max_size=6),
        chunk_rows=st.integers(1, 9),
        most_bytes=st.sampled_from([1, 150, 10**6]),
        data=st.data(),
    )
    def test_cuts_anywhere_and_goes_on_with_what_was_left(self, sizes, chunk_rows, most_bytes, data):
        shard = BatchShard("shard", 0, None, "", "", tuple(sizes))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(read_module, "_MAX_CHUNK_BYTES", most_bytes)
            chunks = list(read_text_chunks(shard, chunk_rows))
            num_done = data.draw(st.integers(0, len(chunks) - 1))
            done = [dataclasses.replace(commit_of(chunk), read=10**6) for chunk in chunks[:num_done]]
            left = list(read_text_chunks(shard, chunk_rows, done))
        assert left == chunks[num_done:]
        assert [row for chunk in chunks for row in chunk.rows["row"].to_pylist()] == list(range(sum(sizes)))
        assert [chunk.key.index for chunk in chunks] == list(range(len(chunks)))
        assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert all(0 < len(chunk) <= chunk_rows for chunk in chunks[:-1])
        if most_bytes == 10**6:
            assert [len(chunk) for chunk in chunks[:-1]] == [chunk_rows] * (len(chunks) - 1)

    def test_of_no_rows_is_a_chunk_too(self):
        (chunk,) = read_text_chunks(BatchShard("shard", 0, None, "", "", ()), 5)
        assert (len(chunk), chunk.last, chunk.rows.schema) == (0, True, RAW_TEXT)


class TestReadAhead:
    def test_gives_the_same_items(self):
        assert list(read_ahead(iter(range(100)))) == list(range(100))
        assert list(read_ahead(iter(()))) == []

    def test_an_error_comes_after_the_items_before_it(self):
        def items():
            yield 1
            yield 2
            raise InputError("gone")

        ahead = read_ahead(items())
        assert [next(ahead), next(ahead)] == [1, 2]
        with pytest.raises(InputError, match="gone"):
            next(ahead)
        assert list(ahead) == []

    def test_an_interrupt_passes_like_an_error(self):
        with pytest.raises(KeyboardInterrupt):
            list(read_ahead(iter_raising(KeyboardInterrupt())))

    @pytest.mark.parametrize("depth", [1, 3])
    def test_stays_a_bounded_number_of_items_ahead(self, depth):
        made = itertools.count()
        latest = 0

        def items():
            nonlocal latest
            while True:
                latest = next(made)
                yield latest

        ahead = read_ahead(items(), depth)
        for expected in range(20):
            assert next(ahead) == expected
            time.sleep(0.002)
            # As many as are kept, and one that waits to be
            assert latest <= expected + depth + 1
        ahead.close()

    def test_works_while_the_consumer_does(self):
        second = threading.Event()

        def items():
            yield 1
            second.set()
            yield 2

        ahead = read_ahead(items())
        assert next(ahead) == 1
        assert second.wait(10)
        ahead.close()

    @pytest.mark.parametrize("taken", [0, 1, 5])
    def test_a_consumer_that_stops_early_leaves_no_thread_and_no_open_source(self, taken):
        closed = threading.Event()

        def items():
            try:
                yield from range(1000)
            finally:
                closed.set()

        before = threading.active_count()
        ahead = read_ahead(items())
        assert list(itertools.islice(ahead, taken)) == list(range(taken))
        ahead.close()
        del ahead
        assert threading.active_count() == before
        assert closed.is_set() or taken == 0


def iter_raising(error: BaseException) -> Iterator[int]:
    raise error
    yield


def committed_in(folder: Path, *chunks: tuple[str, int, int, bool]) -> Sink:
    """Commits chunks without rows that say they are of so many."""
    sink = sink_of(folder)
    for shard, index, count, last in chunks:
        lost = [Reject("", number, "bad_annotation", "m") for number in range(count)]
        (chunk,) = read_chunks(shard_of(*lost), 100, raw_schema())
        rows = pa.RecordBatch.from_pylist([], schema=images_schema())
        commit_chunk(sink, Chunk(ChunkKey(shard, index), rows, chunk.rejects, last, input="a.tar"))
    return sink


def describe(chunk: Chunk) -> tuple[ChunkKey, list[int], bool]:
    return chunk.key, chunk.rows["row"].to_pylist(), chunk.last


class TestReadShards:
    def run(
        self, shards: list[Shard], sink: Sink, expected: list[object], found: list[ChunkKey], *flags: str
    ):
        progress.start()
        with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner", *flags])) as pipeline:
            outputs = pipeline | beam.Create(shards, reshuffle=False) | ReadShards((sink,), 3)
            assert_that(outputs.chunks | "Describe" >> beam.Map(describe), equal_to(expected), label="Chunks")
            assert_that(outputs.committed | "Key" >> beam.Map(Commit.key), equal_to(found), label="Committed")

    @pytest.mark.parametrize("flags", [(), ("--direct_num_workers=2",)])
    def test_reads_all_of_a_fresh_run(self, tmp_path, flags):
        shards = [shard_of(*map(row_of, range(4)), name="a"), shard_of(name="b")]
        expected = [
            (ChunkKey("a", 0), [0, 1, 2], False),
            (ChunkKey("a", 1), [3], True),
            (ChunkKey("b", 0), [], True),
        ]
        self.run(shards, sink_of(tmp_path), expected, [], *flags)
        assert progress.snapshot().shards == 2

    def test_a_finished_shard_is_not_read_and_another_from_where_it_stopped(self, tmp_path):
        sink = committed_in(
            tmp_path, ("a", 0, 3, False), ("a", 1, 1, True), ("b", 0, 3, False), ("b", 2, 3, False)
        )
        shards = [
            shard_of(AssertionError("a finished shard was read"), name="a"),
            shard_of(*map(row_of, range(8)), name="b"),
        ]
        expected = [(ChunkKey("b", 1), [3, 4, 5], False), (ChunkKey("b", 2), [6, 7], True)]
        self.run(shards, sink, expected, [ChunkKey("a", 0), ChunkKey("a", 1), ChunkKey("b", 0)])
        now = progress.snapshot()
        assert (now.rows, now.resumed, now.rejects, now.shards) == (7, 7, 7, 2)

    def test_a_file_that_is_no_commit_of_this_run_ends_it(self, tmp_path):
        committed_in(tmp_path, ("a", 0, 3, False))
        sink = dataclasses.replace(sink_of(tmp_path), job={"fingerprint": "0" * 16})
        with pytest.raises(OutputError, match=f"is of run {'f' * 16}, and this is run {'0' * 16}"):
            self.run([shard_of(row_of(0), name="a")], sink, [], [])

    def test_an_input_that_is_gone_ends_it_and_leaves_no_thread(self, tmp_path):
        before = threading.active_count()
        content = [*map(row_of, range(7)), InputError("a.tar is not there")]
        with pytest.raises(InputError, match=r"a\.tar is not there"):
            self.run([shard_of(*content)], sink_of(tmp_path), [], [])
        assert threading.active_count() == before
