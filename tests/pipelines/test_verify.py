import io
import json
import random
import re
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diptych.pipelines.demo_data import layouts
from diptych.pipelines.demo_data.layouts import write_data_set
from diptych.pipelines.options.prepare import PrepareOptions
from diptych.pipelines.prepare import prepare
from diptych.pipelines.verify import verify
from diptych.transforms.errors import InputError, OutputError


def run(data: Path, out: Path, chunk_rows: int = 5) -> None:
    prepare(PrepareOptions((str(data),), str(out), chunk_rows=chunk_rows, quiet=True))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two outputs of the same three shards, of which the last has rejects: `five` and `six` rows a chunk."""
    folder = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "_SHARD_SCENES", 18)
        data = write_data_set(str(folder / "data"), 40, seed=1).webdataset
    members = {"1.jpg": b"junk", "2.txt": b"alone", "3.jpg": b"", "4.jpg": b"junk"}
    with tarfile.open(data / "val-00000.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    run(data, folder / "five")
    run(data, folder / "six", 6)
    return folder


@pytest.fixture
def out(outputs: Path, tmp_path: Path) -> Path:
    """A copy of the output `five`, to be damaged, and beside it `six`."""
    shutil.copytree(outputs / "five", tmp_path / "out")
    (tmp_path / "six").symlink_to(outputs / "six")
    return tmp_path / "out"


def problems(out: Path) -> list[str]:
    return verify(str(out)).problems


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


class TestSound:
    def test_an_output_as_it_was_written(self, out):
        findings = verify(str(out))
        assert list(findings.lines()) == [
            "images: 3 shards, 9 files: 40 rows read = 36 written + 4 rejected",
            "complete and sound",
        ]
        assert verify(f"file://{out}/").problems == []

    def test_it_changes_nothing(self, out):
        before = {path: path.stat().st_mtime_ns for path in [out, *out.rglob("*")]}
        verify(str(out))
        assert {path: path.stat().st_mtime_ns for path in [out, *out.rglob("*")]} == before

    @pytest.mark.parametrize("name", [".DS_Store", "images/_metadata", "notes.txt"])
    def test_what_is_no_data_does_not_matter(self, out, name):
        (out / name).write_text("x")
        assert problems(out) == []


def test_keys_of_several_shards_are_counted(tmp_path):
    jpeg = io.BytesIO()
    Image.new("RGB", (30, 30)).save(jpeg, "JPEG")
    (tmp_path / "in").mkdir()
    for shard in "abc":
        with tarfile.open(tmp_path / "in" / f"{shard}.tar", "w") as tar:
            for name in ("0.jpg", "1.jpg", f"{shard}.jpg"):
                info = tarfile.TarInfo(name)
                info.size = len(jpeg.getvalue())
                tar.addfile(info, io.BytesIO(jpeg.getvalue()))
    run(tmp_path / "in", tmp_path / "out", 2)
    findings = verify(str(tmp_path / "out"))
    assert "images: 2 keys occur in several shards" in list(findings.lines())
    assert findings.problems == []


Damage = Callable[[Path], object]


def delete(*names: str) -> Damage:
    return lambda out: [(out / name).unlink() for name in names]


def edit_json(name: str, change: Callable[[dict], object]) -> Damage:
    def edit(out: Path) -> None:
        values = json.loads((out / name).read_text())
        change(values)
        (out / name).write_text(json.dumps(values))

    return edit


def truncate(name: str, size: int) -> Damage:
    return lambda out: (out / name).write_bytes((out / name).read_bytes()[:size])


def flip_page(name: str, marker: bytes) -> Damage:
    return lambda out: flip(out / name, (out / name).read_bytes().index(marker) + 40)


def edit_table(name: str, change: Callable[[pa.Table], pa.Table]) -> Damage:
    return lambda out: pq.write_table(change(pq.read_table(out / name)), out / name)


def copy(name: str, to: str) -> Damage:
    def copy_file(out: Path) -> None:
        (out / to).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(out / name, out / to)

    return copy_file


T0, T3 = "images/train-00000-00000.parquet", "images/train-00000-00003.parquet"
REJECTED = "rejects/image/val-00000-00000.parquet"
JFIF = b"\xff\xd8\xff\xe0\x00\x10JFIF"


class TestDamage:
    @pytest.mark.parametrize(
        ("damage", "expected"),
        [
            (delete(T0), ["shard train-00000 lacks " + T0]),
            (delete("images/train-00000-00001.parquet"), ["lacks images/train-00000-00001.parquet"]),
            (
                delete(T0, "images/train-00000-00002.parquet"),
                [f"lacks {T0}, images/train-00000-00002.parquet", "files 7, but _SUCCESS.json says 9"],
            ),
            (delete(T3), ["shard train-00000 lacks its end: " + T3, "shards 2, but _SUCCESS.json says 3"]),
            (
                delete("images/val-00000-00000.parquet"),
                ["shards 2, but _SUCCESS.json says 3", "val-00000-00000"],
            ),
            (lambda out: shutil.rmtree(out / "images"), ["images has files 0, but _SUCCESS.json says 9"]),
            (truncate(T0, -1), [T0 + " cannot be read"]),
            (truncate(T0, 100), [T0 + " cannot be read"]),
            (truncate(T0, 0), [T0 + " cannot be read"]),
            (flip_page(T0, JFIF), [T0 + " cannot be read: .*CRC"]),
            (lambda out: flip(out / T0, -5), [T0 + " cannot be read"]),
            (copy("../six/" + T0, T0), [T0 + " is of run [0-9a-f]{16}, the output is of run [0-9a-f]{16}"]),
            (
                copy(T0, "images/copy.parquet"),
                ["images/copy.parquet says that it is train-00000-00000.parquet"],
            ),
            (
                copy(T0, "images/train-00000-00004.parquet"),
                ["00004.parquet says that it is train-00000-00000"],
            ),
            (lambda out: (out / T0).rename(out / T3), ["00003.parquet says that it is train", "lacks " + T0]),
            (lambda out: (out / "images" / "x.txt").touch(), ["images/x.txt cannot be read"]),
            (lambda out: (out / "images" / "x").mkdir(), ["images/x cannot be read: Is a directory"]),
            (
                edit_table(T0, lambda table: table.slice(1)),
                [T0 + " holds 4 rows; its footer says 5 read, 5 written"],
            ),
            (
                edit_table(T0, lambda table: table.drop(["phash"])),
                ["another schema than the files before it"],
            ),
            (edit_table(T0, lambda table: table.drop(["key"])), [T0 + " cannot be read: .*key"]),
            (
                edit_table(T0, lambda table: table.set_column(0, "key", pa.array(range(5)))),
                [T0 + " cannot be read: its column key is int64, not string"],
            ),
            (
                edit_table(T0, lambda table: table.set_column(0, "key", pa.array(["a"] * 5))),
                ["images of shard train-00000 has 4 keys twice"],
            ),
            (edit_table(T0, lambda table: table.replace_schema_metadata({})), [T0 + " cannot be read"]),
            (delete(REJECTED), ["rejects/image/val-00000-00000.parquet holds {}"]),
            (
                copy(REJECTED, "rejects/image/val-00000-00001.parquet"),
                ["rejects/image/val-00000-00001.parquet holds"],
            ),
            (
                copy(REJECTED, "rejects/text/val-00000-00000.parquet"),
                ["rejects/text/val-00000-00000.parquet holds"],
            ),
            (
                edit_table(REJECTED, lambda table: table.slice(1)),
                ["rejects/image/val-00000-00000.parquet holds"],
            ),
            (truncate(REJECTED, 99), [REJECTED + " cannot be read"]),
            (flip_page(REJECTED, b"PAR1"), [REJECTED + " cannot be read"]),
            (copy(T0, REJECTED), [REJECTED + " cannot be read: its schema is not that of rejects"]),
            (delete("_SUCCESS.json"), ["_SUCCESS.json is not there: the run has not finished"]),
            (
                edit_json("_SUCCESS.json", lambda values: values["images"].update(written=35)),
                ["images has written 36, but _SUCCESS.json says 35"],
            ),
            (
                edit_json("_SUCCESS.json", lambda values: values["images"]["rejected"].update(empty=0)),
                ["images has rejected {'empty': 1, .*}, but _SUCCESS.json says {'empty': 0"],
            ),
            (edit_json("_SUCCESS.json", dict.clear), ["images has shards 3, but _SUCCESS.json says 0"]),
            (
                edit_json("_SUCCESS.json", lambda v: v.update(images=1)),
                ["_SUCCESS.json is not what a job wrote"],
            ),
            (truncate("_SUCCESS.json", 20), ["_SUCCESS.json is not what a job wrote"]),
            (
                edit_json("_job.json", lambda values: values["images"].update(job="embed")),
                [T0 + " is of run [0-9a-f]{16}, the output is of run [0-9a-f]{16}"],
            ),
        ],
    )
    def test_is_found_and_named(self, out, damage, expected):
        damage(out)
        found = "\n".join(problems(out))
        assert [pattern for pattern in expected if not re.search(pattern, found)] == [], found

    @pytest.mark.parametrize("seed", range(3))
    def test_a_flipped_bit_in_an_image_never_passes(self, out, seed):
        draw = random.Random(seed)
        for _ in range(10):
            name = draw.choice(sorted(path.name for path in (out / "images").glob("train*")))
            path = out / "images" / name
            whole = path.read_bytes()
            metadata = pq.read_metadata(path).row_group(0)
            images = next(
                metadata.column(i)
                for i in range(metadata.num_columns)
                if metadata.column(i).path_in_schema == "image.bytes"
            )
            end = images.data_page_offset + images.total_compressed_size
            flip(path, draw.randrange(end - images.total_compressed_size + 64, end))
            assert any(name in problem for problem in problems(out))
            path.write_bytes(whole)

    def test_whatever_byte_is_changed_reading_it_ends_in_order(self, out):
        for path in (out / "images").iterdir():
            if path.name != Path(T0).name:
                path.unlink()
        whole = (out / T0).read_bytes()
        footer = len(whole) - int.from_bytes(whole[-8:-4], "little") - 8
        for at in [*range(0, 60), *range(footer, len(whole), 5)]:
            flip(out / T0, at)
            assert problems(out)
            (out / T0).write_bytes(whole)


class TestNoOutput:
    @pytest.mark.parametrize("name", ["missing", "file", "images", "file/below"])
    def test_what_is_none_is_said_to_be_none(self, out, name):
        (out / "file").touch()
        with pytest.raises(InputError, match=f"{name} has no _job.json, so it is not the output of a job"):
            verify(str(out / name))

    @pytest.mark.parametrize("content", ["", "{", "nope", "[]", "1", '"x"', '{"job": "prepare"}'])
    def test_a_job_file_that_is_none(self, out, content):
        (out / "_job.json").write_text(content)
        with pytest.raises(OutputError, match=r"_job\.json is not what a job wrote"):
            verify(str(out))

    def test_a_job_file_that_names_no_data_set(self, out):
        (out / "_job.json").write_text("{}")
        assert any("_job.json does not say what" in problem for problem in problems(out))


class TestMemory:
    def test_does_not_grow_with_the_output(self, tmp_path_factory):
        peaks = []
        for num_scenes in (60, 240):
            folder = tmp_path_factory.mktemp("memory")
            data = write_data_set(str(folder / "data"), num_scenes, seed=1)
            run(data.webdataset, folder / "out", 10)
            verify(str(folder / "out"))
            pool = pa.default_memory_pool()
            before = pool.bytes_allocated()  # what other tests hold
            tracemalloc.start()
            verify(str(folder / "out"))
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert pool.bytes_allocated() - before < 1 << 20
        assert peaks[1] < 1.5 * peaks[0] + 100_000
