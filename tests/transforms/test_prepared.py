import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diptych.transforms.errors import InputError
from diptych.transforms.prepared import PreparedImages, is_output
from diptych.transforms.schemas import images_schema

JOB = {"job": "prepare", "inputs": {"files": 1}}
FILES = {"a-00000": 3, "a-00001": 0, "a-99999": 70, "a-100000": 2, "a.b-00000": 1, "b-00000": 4}


def row(key: str) -> dict[str, Any]:
    number = int(hashlib.sha256(key.encode()).hexdigest()[:4], 16)
    captions = [f"{key} one", f"{key} two"][: number % 3]
    return {"key": key, "image": {"bytes": key.encode(), "path": key}, "captions": captions, "row": number}


def write_output(root: str, files: dict[str, int] = FILES, job: Any = None) -> list[str]:
    """Writes an output by hand; returns its keys in order."""
    fs, path = fsspec.core.url_to_fs(root)
    fs.makedirs(f"{path}/images", exist_ok=True)
    keys = []
    for name, num_rows in reversed(files.items()):
        rows = [row(f"{name}/{i}") for i in range(num_rows)]
        keys = [r["key"] for r in rows] + keys
        with fs.open(f"{path}/images/{name}.parquet", "wb") as file:
            pq.write_table(pa.Table.from_pylist(rows, images_schema()), file)
    totals = {"images": {"files": len(files), "written": len(keys)}}
    fs.pipe_file(f"{path}/_SUCCESS.json", json.dumps(totals).encode())
    fs.pipe_file(f"{path}/_job.json", json.dumps({"images": JOB} if job is None else job).encode())
    return keys


def read_keys(images: PreparedImages) -> list[str]:
    return [key for batch in images.rows(["key"]) for key in batch.column(0).to_pylist()]


@pytest.fixture
def output(tmp_path: Path) -> str:
    write_output(str(tmp_path / "out"))
    return str(tmp_path / "out")


class TestOpen:
    def test_output_or_its_images(self, output):
        opened = PreparedImages.open(output)
        assert opened.num_rows == 80
        assert opened.files == tuple(f"{name}.parquet" for name in FILES)
        for url in (f"{output}/", f"{output}/images", f"{output}/images/"):
            assert PreparedImages.open(url) == opened
            assert is_output(url)

    def test_as_a_relative_path(self, output, monkeypatch):
        monkeypatch.chdir(output)
        assert [PreparedImages.open(url).num_rows for url in (".", "images")] == [80, 80]

    def test_fingerprint_stands_for_the_job_of_the_images(self, tmp_path):
        write_output(str(tmp_path / "a"), job={"images": JOB})
        write_output(str(tmp_path / "b"), job={"captions": {"job": "caption"}, "images": JOB})
        write_output(str(tmp_path / "d"), job={"images": {**JOB, "more": 1}})
        a, b, d = (PreparedImages.open(str(tmp_path / name)).fingerprint for name in "abd")
        assert a == b != d
        assert a == hashlib.sha256(json.dumps(JOB, sort_keys=True).encode()).hexdigest()[:16]

    @pytest.mark.parametrize("name", ["nowhere", ".", "file"])
    def test_no_output(self, tmp_path, name):
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match=r"is not an output of Diptych: it has no _job.json"):
            PreparedImages.open(str(tmp_path / name))
        assert not is_output(str(tmp_path / name))

    def test_a_folder_that_is_only_named_images(self, tmp_path):
        (tmp_path / "images").mkdir()
        assert not is_output(str(tmp_path / "images"))

    def test_not_finished(self, output):
        os.remove(f"{output}/_SUCCESS.json")
        assert is_output(output)
        with pytest.raises(InputError, match=r"is not finished.*Run the command that writes it again"):
            PreparedImages.open(output)

    @pytest.mark.parametrize("totals", [{"captions": {"files": 1, "written": 1}}, {}])
    def test_of_another_job(self, output, totals):
        Path(output, "_SUCCESS.json").write_text(json.dumps(totals))
        with pytest.raises(InputError, match="holds no images"):
            PreparedImages.open(output)

    @pytest.mark.parametrize(
        "text", ["{", '{"images": {}}', '{"images": 5}', '{"images": {"files": "x", "written": 1}}']
    )
    def test_damaged_success(self, output, text):
        Path(output, "_SUCCESS.json").write_text(text)
        with pytest.raises(InputError, match=r"_SUCCESS.json is (damaged|not what a job wrote)"):
            PreparedImages.open(output)

    @pytest.mark.parametrize("text", ["[1", "[]", "{"])
    def test_damaged_job(self, output, text):
        Path(output, "_job.json").write_text(text)
        with pytest.raises(InputError, match=r"_job.json is not what a job wrote"):
            PreparedImages.open(output)

    def test_a_file_is_missing(self, output):
        os.remove(f"{output}/images/b-00000.parquet")
        with pytest.raises(InputError, match=r"has 5 data files, and _SUCCESS.json says 6"):
            PreparedImages.open(output)

    def test_what_is_hidden_is_no_data(self, output):
        for name in (".a-00000.parquet", "_a-00000.parquet", "notes.txt"):
            Path(output, "images", name).touch()
        assert PreparedImages.open(output).num_rows == 80


class TestRows:
    def test_order_is_by_shard_and_number(self, tmp_path):
        keys = write_output(str(tmp_path))
        images = PreparedImages.open(str(tmp_path))
        assert read_keys(images) == keys
        assert read_keys(images) == keys

    def test_columns_are_those_asked_for_in_their_order(self, output):
        batch = next(PreparedImages.open(output).rows(["captions", "image", "key"]))
        assert batch.schema.names == ["captions", "image", "key"]
        expected = [row(key) for key in batch.column(2).to_pylist()]
        assert batch.to_pylist() == [{name: r[name] for name in batch.schema.names} for r in expected]

    def test_batches_are_bounded(self, output):
        assert max(map(len, PreparedImages.open(output).rows(["key"]))) == 64

    def test_captions(self, tmp_path):
        keys = write_output(str(tmp_path))
        expected = [caption for key in keys for caption in row(key)["captions"]]
        assert {len(row(key)["captions"]) for key in keys} == {0, 1, 2}
        assert list(PreparedImages.open(str(tmp_path)).captions()) == expected

    def test_anywhere(self):
        keys = write_output("memory://test_prepared/out")
        try:
            assert read_keys(PreparedImages.open("memory://test_prepared/out/images")) == keys
        finally:
            fsspec.filesystem("memory").rm("/test_prepared", recursive=True)

    def test_no_rows(self, tmp_path):
        write_output(str(tmp_path), {"a-00000": 0})
        images = PreparedImages.open(str(tmp_path))
        assert images.num_rows == 0
        assert list(images.rows(["key"])) == []

    def test_no_such_column(self, output):
        with pytest.raises(InputError, match=r"a-00000.parquet has no column 'colour'"):
            list(PreparedImages.open(output).rows(["key", "colour"]))

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1"])
    def test_a_damaged_file(self, output, content):
        images = PreparedImages.open(output)
        Path(output, "images", "b-00000.parquet").write_bytes(content)
        with pytest.raises(InputError, match=r"b-00000.parquet is damaged"):
            read_keys(images)

    def test_a_damaged_page(self, output):
        path = Path(output, "images", "b-00000.parquet")
        rows = pq.read_table(path)
        pq.write_table(rows, path, compression="none", write_page_checksum=True)
        data = path.read_bytes()
        assert data.count(b"b-00000/2") >= 1
        path.write_bytes(data.replace(b"b-00000/2", b"b-00000/X"))
        images = PreparedImages.open(output)
        with pytest.raises(InputError, match=r"b-00000.parquet is damaged"):
            list(images.rows(["key", "image"]))

    def test_a_file_that_goes(self, output):
        images = PreparedImages.open(output)
        os.remove(f"{output}/images/b-00000.parquet")
        with pytest.raises(InputError, match=r"b-00000.parquet is not there"):
            read_keys(images)

    def test_rows_that_are_fewer_than_said(self, output):
        images = PreparedImages.open(output)
        path = f"{output}/images/b-00000.parquet"
        pq.write_table(pq.read_table(path).slice(0, 3), path)
        with pytest.raises(InputError, match=r"holds 79 rows, and _SUCCESS.json says 80"):
            read_keys(images)

    def test_reads_one_batch_ahead_and_no_more(self, output, monkeypatch):
        taken: list[int] = []
        iter_batches = pq.ParquetFile.iter_batches

        def counted(*args, **kwargs):
            for batch in iter_batches(*args, **kwargs):
                taken.append(len(batch))
                yield batch

        monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
        rows = PreparedImages.open(output).rows(["key"])
        for i in range(1, 4):
            next(rows)
            threading.Event().wait(0.05)
            assert i <= len(taken) <= i + 1

    def test_a_reader_that_stops_leaves_no_thread_and_no_open_file(self, output):
        before = threading.active_count()
        rows = PreparedImages.open(output).rows(["key"])
        next(rows)
        rows.close()
        assert threading.active_count() == before
        os.rename(f"{output}/images", f"{output}/moved")
