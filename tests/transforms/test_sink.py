import dataclasses
import itertools
import json
import os
import threading
import time
from pathlib import Path

import apache_beam as beam
import datasets
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that, equal_to
from hypothesis import given, settings
from hypothesis import strategies as st
from kills import files_in

from diptych.transforms import sink as sink_module
from diptych.transforms import storage
from diptych.transforms.chunk import Chunk, ChunkCoder, ChunkKey, Reject, reject_batch
from diptych.transforms.errors import InputError, OutputError
from diptych.transforms.schemas import REJECTS, images_schema
from diptych.transforms.sink import (
    Commit,
    Sink,
    WriteChunks,
    commit_chunk,
    committed,
    has_commit,
    read_commit,
)

FINGERPRINT = "0123456789abcdef"


def sink_of(folder: Path, schema: pa.Schema | None = None) -> Sink:
    job = {"job": "prepare", "version": "0", "fingerprint": FINGERPRINT}
    return Sink(str(folder), "images", job, schema or images_schema())


def rows_of(count: int, start: int = 0) -> pa.RecordBatch:
    numbers = range(start, start + count)
    keys = [f"key-{number}" for number in numbers]
    columns = [
        keys,
        [{"bytes": key.encode() * 50, "path": f"{key}.jpg"} for key in keys],
        [[f"caption of {number}"] * (number % 3) for number in numbers],
        [640] * count,
        [480] * count,
        ["0" * 64] * count,
        list(numbers),
        ["a.tar"] * count,
        list(numbers),
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, images_schema(), strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=images_schema())


def chunk_of(index: int = 0, count: int = 5, last: bool = False, with_rejects: bool = True) -> Chunk:
    key = ChunkKey("shard", index)
    read = [Reject("", 90, "missing_image", "no image")] if with_rejects else []
    image = [Reject("k", 91, "corrupt", "damaged", b"\0"), Reject("l", 92, "empty", "nothing")]
    rejects = pa.concat_batches(
        [reject_batch("shard", "read", read), reject_batch("shard", "image", image if with_rejects else [])]
    )
    return Chunk(key, rows_of(count, 10 * index), rejects, last, {"captions_read": count})


class TestCommitChunk:
    def test_writes_rows_and_rejects_by_stage(self, tmp_path):
        chunk = chunk_of(7)
        commit = commit_chunk(sink_of(tmp_path), chunk)
        name = "shard-00007.parquet"
        assert set(files_in(tmp_path)) == {f"images/{name}", f"rejects/read/{name}", f"rejects/image/{name}"}
        rows = pq.read_table(tmp_path / "images" / name)
        assert rows.schema.equals(images_schema())
        assert rows.equals(pa.Table.from_batches([chunk.rows]))
        rejects = pq.read_table(tmp_path / "rejects" / "image" / name)
        assert rejects.schema.equals(REJECTS)
        assert rejects.to_pylist() == chunk.rejects.slice(1).to_pylist()
        assert commit == Commit(
            dataset="images",
            shard="shard",
            index=7,
            last=False,
            records=8,
            read=8,
            written=5,
            rejected={"image": {"corrupt": 1, "empty": 1}, "read": {"missing_image": 1}},
            counters={"captions_read": 5},
            fingerprint=FINGERPRINT,
        )
        assert commit.rejects() == 3
        assert commit.key() == chunk.key

    def test_the_footer_names_the_job_and_the_pictures(self, tmp_path):
        commit_chunk(sink_of(tmp_path), chunk_of())
        metadata = pq.read_metadata(tmp_path / "images" / "shard-00000.parquet").metadata
        footer = json.loads(metadata[b"diptych"])
        assert (footer["job"], footer["version"], footer["fingerprint"]) == ("prepare", "0", FINGERPRINT)
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        assert features["image"] == {"_type": "Image"}

    def test_without_rejects_there_is_no_file_of_them(self, tmp_path):
        commit = commit_chunk(sink_of(tmp_path), chunk_of(with_rejects=False))
        assert set(files_in(tmp_path)) == {"images/shard-00000.parquet"}
        assert (commit.rejected, commit.rejects()) == ({}, 0)

    def test_a_chunk_without_rows_is_a_file_too(self, tmp_path):
        commit = commit_chunk(sink_of(tmp_path), chunk_of(count=0, last=True))
        assert (commit.read, commit.written, commit.last) == (3, 0, True)
        table = pq.read_table(tmp_path / "images" / "shard-00000.parquet")
        assert (len(table), table.schema) == (0, images_schema())

    def test_other_readers_open_the_folder_as_it_is(self, tmp_path):
        for index in range(3):
            commit_chunk(sink_of(tmp_path), chunk_of(index, count=0 if index == 1 else 5))
        assert pyarrow.dataset.dataset(tmp_path / "images").count_rows() == 10
        found = datasets.load_dataset(
            "parquet", data_dir=str(tmp_path / "images"), split="train", cache_dir=str(tmp_path / "cache")
        )
        assert isinstance(found.features["image"], datasets.Image)
        assert found["key"][:] == [*rows_of(5)["key"].to_pylist(), *rows_of(5, 20)["key"].to_pylist()]

    def test_rows_of_another_schema_never_get_there(self, tmp_path):
        with pytest.raises(AssertionError, match="have schema"):
            commit_chunk(sink_of(tmp_path, images_schema(("license",))), chunk_of())
        assert files_in(tmp_path) == {}

    @pytest.mark.parametrize("pixels", ["uint8", "float32"])
    def test_tensors_come_back_as_they_were(self, tmp_path, pixels):
        schema = images_schema((), 2, pixels)
        tensors = pa.array([list(range(12)), list(range(12, 24))], schema.field("pixels").type.storage_type)
        tensors = pa.ExtensionArray.from_storage(schema.field("pixels").type, tensors)
        rows = pa.RecordBatch.from_arrays([*rows_of(2).columns, tensors], schema=schema)
        chunk = Chunk(ChunkKey("shard", 0), rows, reject_batch("shard", "image", []), True)
        commit_chunk(sink_of(tmp_path, schema), chunk)
        table = pq.read_table(tmp_path / "images" / "shard-00000.parquet")
        assert table.schema.field("pixels").type == schema.field("pixels").type
        assert table.column("pixels").chunk(0).to_numpy_ndarray().tolist() == [
            [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]],
            [[[12, 13], [14, 15]], [[16, 17], [18, 19]], [[20, 21], [22, 23]]],
        ]


class TestBytes:
    """The same chunk is the same bytes, however often it is written and whatever way it came."""

    def test_written_again(self, tmp_path):
        commit_chunk(sink_of(tmp_path), chunk_of())
        first = files_in(tmp_path)
        commit_chunk(sink_of(tmp_path), chunk_of())
        assert files_in(tmp_path) == first

    @settings(max_examples=20, deadline=None)
    @given(
        count=st.integers(0, 5), before=st.integers(0, 3), after=st.integers(0, 3), with_rejects=st.booleans()
    )
    def test_a_slice_or_a_chunk_that_was_coded(self, tmp_path_factory, count, before, after, with_rejects):
        whole = chunk_of(1, count, with_rejects=with_rejects)
        larger = rows_of(before + count + after, 10 - before)
        sliced = Chunk(whole.key, larger.slice(before, count), whole.rejects, whole.last, whole.counters)
        coder = ChunkCoder()
        written = []
        for chunk in (whole, sliced, coder.decode(coder.encode(sliced)), coder.decode(coder.encode(whole))):
            folder = tmp_path_factory.mktemp("out")
            commit_chunk(sink_of(folder), chunk)
            written.append(files_in(folder))
        assert written[1:] == written[:1] * 3

    def test_every_page_has_a_checksum(self, tmp_path):
        commit_chunk(sink_of(tmp_path), chunk_of())
        path = tmp_path / "images" / "shard-00000.parquet"
        pq.read_table(path, page_checksum_verification=True)
        data = bytearray(path.read_bytes())
        data[data.index(b"key-1key-1") + 20] ^= 1
        path.write_bytes(data)
        with pytest.raises(OSError, match="CRC"):
            pq.read_table(path, page_checksum_verification=True)


class TestOrder:
    def test_the_data_file_comes_last(self, tmp_path, monkeypatch):
        names = []
        monkeypatch.setattr(sink_module, "write_whole", lambda root, name, data, scratch: names.append(name))
        commit_chunk(sink_of(tmp_path), chunk_of())
        assert [name.rpartition("/")[0] for name in names] == ["rejects/image", "rejects/read", "images"]

    @pytest.mark.parametrize("kill_at", range(3))
    def test_stopped_between_its_files_it_is_not_committed(self, tmp_path, monkeypatch, kill_at):
        sink = sink_of(tmp_path / "out")
        calls = itertools.count()

        def write(*args):
            if next(calls) == kill_at:
                raise KeyboardInterrupt
            storage.write_whole(*args)

        monkeypatch.setattr(sink_module, "write_whole", write)
        with pytest.raises(KeyboardInterrupt):
            commit_chunk(sink, chunk_of())
        monkeypatch.undo()
        assert read_commit(sink, ChunkKey("shard", 0), "") is None
        assert len(files_in(tmp_path / "out")) == kill_at
        commit_chunk(sink, chunk_of())
        commit_chunk(sink_of(tmp_path / "undisturbed"), chunk_of())
        assert files_in(tmp_path / "out") == files_in(tmp_path / "undisturbed")


class TestReadCommit:
    def test_gives_what_was_committed(self, tmp_path):
        sink = sink_of(tmp_path)
        assert read_commit(sink, ChunkKey("shard", 0), "") is None
        commit = commit_chunk(sink, chunk_of())
        assert read_commit(sink, ChunkKey("shard", 0), "") == commit

    def test_reads_the_footer_and_no_rows(self, tmp_path):
        sink = sink_of(tmp_path)
        commit = commit_chunk(sink, chunk_of())
        path = tmp_path / "images" / "shard-00000.parquet"
        data = path.read_bytes()
        footer_bytes = int.from_bytes(data[-8:-4], "little") + 8
        path.write_bytes(bytes(len(data) - footer_bytes) + data[-footer_bytes:])
        assert read_commit(sink, ChunkKey("shard", 0), "") == commit

    @pytest.mark.parametrize("size", [0, 3, 8, 100, -1])
    def test_a_damaged_file_is_named(self, tmp_path, size):
        sink = sink_of(tmp_path)
        commit_chunk(sink, chunk_of())
        path = tmp_path / "images" / "shard-00000.parquet"
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(
            OutputError, match=r"images/shard-00000.parquet is not as .* damaged .* Delete it"
        ):
            read_commit(sink, ChunkKey("shard", 0), "")
        assert not has_commit(str(path))

    def test_a_file_of_another_writer_is_named(self, tmp_path):
        path = tmp_path / "images" / "shard-00000.parquet"
        path.parent.mkdir()
        pq.write_table(pa.table({"key": ["a"]}), path)
        with pytest.raises(OutputError, match=r"shard-00000.parquet is not as this job wrote it"):
            read_commit(sink_of(tmp_path), ChunkKey("shard", 0), "")
        assert not has_commit(str(path))

    def test_a_file_of_another_run_is_named_with_both(self, tmp_path):
        sink = sink_of(tmp_path)
        other = Sink(sink.root, sink.dataset, {**sink.job, "fingerprint": "f" * 16}, sink.schema)
        commit_chunk(other, chunk_of())
        with pytest.raises(OutputError, match=f"is of run {'f' * 16}, and this is run {FINGERPRINT}"):
            read_commit(sink, ChunkKey("shard", 0), "")
        assert has_commit(str(tmp_path / "images" / "shard-00000.parquet"))

    def test_a_renamed_file_is_named(self, tmp_path):
        sink = sink_of(tmp_path)
        commit_chunk(sink, chunk_of())
        os.rename(tmp_path / "images" / "shard-00000.parquet", tmp_path / "images" / "shard-00001.parquet")
        with pytest.raises(OutputError, match=r"says that it is images/shard-00000.parquet"):
            read_commit(sink, ChunkKey("shard", 1), "")

    def test_a_file_that_was_read_from_another_input_is_named_with_both(self, tmp_path):
        sink = sink_of(tmp_path)
        commit_chunk(sink, dataclasses.replace(chunk_of(), input="A.tar"))
        with pytest.raises(OutputError, match=r"was read from 'A\.tar', and this chunk is from 'a\.tar'"):
            read_commit(sink, ChunkKey("shard", 0), "a.tar")

    def test_a_file_of_another_data_set_is_named(self, tmp_path):
        sink = sink_of(tmp_path)
        commit_chunk(sink, chunk_of())
        (tmp_path / "captions").mkdir()
        os.rename(tmp_path / "images/shard-00000.parquet", tmp_path / "captions/shard-00000.parquet")
        with pytest.raises(OutputError, match=r"says that it is images/shard-00000.parquet"):
            read_commit(dataclasses.replace(sink, dataset="captions"), ChunkKey("shard", 0), "")

    def test_a_file_that_cannot_be_read_is_no_missing_one(self, tmp_path):
        (tmp_path / "images" / "shard-00000.parquet").mkdir(parents=True)
        with pytest.raises(InputError, match=r"shard-00000.parquet cannot be read: Is a directory"):
            read_commit(sink_of(tmp_path), ChunkKey("shard", 0), "")


class TestCommitted:
    @pytest.mark.parametrize(
        ("indices", "last", "expected"),
        [
            ([], None, []),
            ([0, 1], None, [0, 1]),
            ([1, 2], None, []),
            ([0, 2], None, [0]),
            ([0, 1, 2], 1, [0, 1]),
        ],
    )
    def test_stops_at_a_gap_or_the_last(self, tmp_path, indices, last, expected):
        sink = sink_of(tmp_path)
        for index in indices:
            commit_chunk(sink, chunk_of(index, last=index == last))
        assert [commit.index for commit in committed(sink, "shard", "")] == expected

    def test_a_shard_whose_name_another_begins_with_is_apart(self, tmp_path):
        sink = sink_of(tmp_path)
        other = chunk_of(1)
        commit_chunk(sink, Chunk(ChunkKey("shard-00000", 0), other.rows, other.rejects, True))
        assert list(committed(sink, "shard", "")) == []


def run(sink: Sink, chunks: list[Chunk], *flags: str) -> None:
    with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner", *flags])) as pipeline:
        commits = pipeline | beam.Create(chunks, reshuffle=False) | WriteChunks(sink)
        assert_that(commits | beam.Map(Commit.key), equal_to([chunk.key for chunk in chunks]))


class TestWriteChunks:
    @pytest.mark.parametrize("flags", [(), ("--direct_num_workers=2",), ("--direct_runner_bundle_repeat=2",)])
    def test_writes_each_chunk_and_says_so(self, tmp_path, flags):
        chunks = [chunk_of(index, last=index == 3) for index in range(4)]
        run(sink_of(tmp_path / "out"), chunks, *flags)
        for chunk in chunks:
            commit_chunk(sink_of(tmp_path / "one_by_one"), chunk)
        assert files_in(tmp_path / "out") == files_in(tmp_path / "one_by_one")

    @pytest.mark.parametrize("refused", range(4))
    def test_a_refusal_ends_the_run_and_leaves_the_chunk_out(self, tmp_path, monkeypatch, refused):
        write = storage.write_whole

        def write_or_refuse(root, name, data, scratch):
            if name == f"images/shard-0000{refused}.parquet":
                raise OutputError(f"{name} cannot be written")
            write(root, name, data, scratch)

        monkeypatch.setattr(sink_module, "write_whole", write_or_refuse)
        with pytest.raises(OutputError, match=f"shard-0000{refused}.parquet cannot be written"):
            run(sink_of(tmp_path), [chunk_of(index) for index in range(4)])
        names = {path.name for path in (tmp_path / "images").glob("*")}
        assert {f"shard-0000{index}.parquet" for index in range(refused)} <= names
        assert f"shard-0000{refused}.parquet" not in names

    def test_writes_one_chunk_while_the_next_is_made_and_no_more(self, tmp_path, monkeypatch):
        writing, most = 0, 0
        lock = threading.Lock()
        write = sink_module.commit_chunk

        def commit(sink, chunk):
            nonlocal writing, most
            with lock:
                writing += 1
                most = max(most, writing)
            time.sleep(0.01)
            try:
                return write(sink, chunk)
            finally:
                with lock:
                    writing -= 1

        monkeypatch.setattr(sink_module, "commit_chunk", commit)
        threads = threading.active_count()
        run(sink_of(tmp_path), [chunk_of(index) for index in range(6)])
        assert most == 1
        assert len(files_in(tmp_path / "images")) == 6
        assert threading.active_count() == threads
