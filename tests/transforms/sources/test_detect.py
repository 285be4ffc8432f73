"""What an input is, by folders as people have them: nested, mixed, with strays."""

import gzip
import io
import json
import random
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diptych.transforms.chunk import Reject, add_counts
from diptych.transforms.errors import InputError, OptionError
from diptych.transforms.sources import detect
from diptych.transforms.sources.base import ColumnNames, Record, Row
from diptych.transforms.sources.detect import expand_braces
from diptych.transforms.sources.open import SourceOptions, open_source
from diptych.transforms.sources.planned.plan import plan_counters, plan_notes


def picture(format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(buffer, format)
    return buffer.getvalue()


def tar_of(*keys: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for key in keys:
            for extension, data in (("jpg", picture()), ("txt", b"a caption")):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def parquet_of(*keys: str, image: bool = True) -> bytes:
    columns: dict[str, list[object]] = {"key": list(keys), "caption": ["c"] * len(keys)}
    if image:
        columns["image"] = [picture()] * len(keys)
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


CONTENT = {
    ".jpg": picture(),
    ".png": picture("PNG"),
    ".tar": tar_of("a", "b"),
    ".parquet": parquet_of("p", "q"),
}


def write(folder: Path, *names: str, **others: bytes | str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENT.get(path.suffix, b"text"))
    for name, content in others.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def read(
    folder: Path | str, format: str = "auto", plans: str = "", **options: object
) -> tuple[str, list[Record], int]:
    """Returns the format, the records, and how many files were passed over."""
    source = open_source([str(folder)], format, SourceOptions(**options))  # type: ignore[arg-type]
    shards = source.shards(plans or f"{folder}-plans", 100)
    num_passed_over = source.passed_over.get("passed_over_files", 0)
    num_passed_over += plan_counters(shards).get("passed_over_files", 0)
    return source.format, [record for shard in shards for record in shard.rows()], num_passed_over


def keys_of(records: list[Record]) -> list[str]:
    return sorted(record.key for record in records if isinstance(record, Row))


class TestStrays:
    @pytest.mark.parametrize(
        ("names", "format", "num_rows", "passed_over"),
        [
            (["a.tar", "more/b.tar", "x/y/z/c.tar"], "webdataset", 6, 0),
            (["a.tar", "README.md", "LICENSE", "teaser.png", "x/logo.jpg"], "webdataset", 2, 4),
            (["data/train-0.parquet", "README.md", ".gitattributes", "teaser.png"], "parquet", 2, 3),
            (
                ["00000.tar", "00000.parquet", "00000_stats.json", "00001.tar", "00001.parquet"],
                "webdataset",
                4,
                3,
            ),
            (["a.jpg", "sub/b.png", "README.md", ".DS_Store"], "files", 2, 2),
            (["00000/0.jpg", "00000/0.txt", "00000.parquet", "00000_stats.json"], "files", 1, 2),
            (["a.jpg", "._a.jpg", "__MACOSX/a.jpg", ".thumbs/a.jpg", "_b.jpg"], "files", 2, 3),
            (["a.tar", "_SUCCESS", ".a.tar.crc"], "webdataset", 2, 2),
            (["a.tar", "labels.csv", "notes.txt", "x.json"], "webdataset", 2, 3),
        ],
    )
    def test_are_passed_over_and_counted(self, tmp_path, names, format, num_rows, passed_over):
        found, records, num_passed_over = read(write(tmp_path / "in", *names))
        assert (found, len(records), num_passed_over) == (format, num_rows, passed_over)

    def test_are_named(self, tmp_path):
        source = open_source(
            [str(write(tmp_path, "a.tar", "b.md", "c.md", "d.md", "e.md"))], "auto", SourceOptions()
        )
        [note] = source.notes
        assert (
            note == "Passed over 4 files that are no data of format webdataset: b.md, c.md, d.md and 1 more."
        )

    @pytest.mark.parametrize(
        "names",
        [
            ["a.tar", "b.parquet"],
            ["a.tar", "b.tfrecord"],
            ["deep/er/a.parquet", "x.tar"],
            ["a.tar", *(f"{number}.jpg" for number in range(11))],
            ["a.parquet", *(f"x/{number}.png" for number in range(11))],
        ],
    )
    def test_two_kinds_in_earnest_are_refused_with_both(self, tmp_path, names):
        with pytest.raises(OptionError, match=r"several kinds: .*; .*--format"):
            read(write(tmp_path, *names))
        kept = "webdataset" if any(name.endswith(".tar") for name in names) else "parquet"
        assert read(tmp_path, kept)[0] == kept

    @pytest.mark.parametrize("format", ["webdataset", "parquet", "tfrecord", "files", "coco", "prompts"])
    def test_a_folder_without_any_says_what_is_there(self, tmp_path, format):
        (tmp_path / "in").mkdir()
        with pytest.raises(InputError, match=rf"no data of format {format} \(it is empty\)"):
            read(tmp_path / "in", format)
        write(tmp_path / "in", "x.doc")
        with pytest.raises(InputError, match=r"no data of any format \(1 files: x\.doc\)"):
            read(tmp_path / "in")


@pytest.mark.parametrize("names", [["a.tar"], ["a.jpg"], ["data/a.parquet"]])
def test_an_output_below_its_own_input_is_not_counted(tmp_path, names):
    folder = write(tmp_path / "in", *names)
    before = read(folder)
    output = ("_job.json", "_records/source.job.json", "images/x-00000.parquet", "_plan/1/x.arrow")
    write(folder, *(f"out/{name}" for name in output), "other/_plan/2/x.arrow")
    after = read(folder, plans=f"{tmp_path}/plans")
    assert (after[0], keys_of(after[1]), after[2]) == (before[0], keys_of(before[1]), before[2])


COCO = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "one"}]}
KARPATHY = {"images": [{"filename": "1.jpg", "split": "train", "sentences": [{"raw": "one"}]}]}


class TestAnnotations:
    @pytest.mark.parametrize(
        ("name", "content", "format"),
        [
            ("annotations.json", COCO, "coco"),
            (
                "train.json",
                COCO | {"images": [*COCO["images"], *[{"id": 2, "file_name": "x" * 300_000}]]},
                "coco",
            ),
            ("_annotations.coco.json", COCO, "coco"),
            ("ann/x.json.gz", COCO, "coco"),
            ("dataset.json", KARPATHY, "karpathy"),
            ("annotations.txt", "1.jpg\tone\n", "flickr30k"),
            ("1.csv", "image,caption\n1.jpg,one\n", "flickr30k"),
            ("annotations.tsv", "image\tcaption\n1.jpg\tone\n", "flickr30k"),
        ],
    )
    def test_are_known_by_their_content(self, tmp_path, name, content, format):
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        write(
            tmp_path / "in", "images/1.jpg", **{name: gzip.compress(data) if name.endswith(".gz") else data}
        )
        for asked in ("auto", format):
            found, records, _ = read(tmp_path / "in", asked, plans=f"{tmp_path}/{asked}")
            assert found == format
            assert [list(row.captions) for row in records if isinstance(row, Row)] == [["one"]]

    @pytest.mark.parametrize(
        ("name", "content"),
        [("captions.json", '{"1.jpg": ["one"]}'), ("c.jsonl", '{"image": "1.jpg", "caption": "one"}\n')],
    )
    def test_that_are_not_read_are_refused_beside_images(self, tmp_path, name, content):
        write(tmp_path / "in", "images/1.jpg", **{name: content})
        with pytest.raises(OptionError, match=f"{name} has captions .* --format files"):
            read(tmp_path / "in")
        assert read(tmp_path / "in", "files")[0] == "files"
        write(tmp_path / "in", "a.tar")
        assert read(tmp_path / "in", plans=f"{tmp_path}/tar")[0] == "webdataset"

    @pytest.mark.parametrize(
        "content",
        [
            {"images": COCO["images"], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]},
            {"train": ["1.jpg"]},
            {"version": 3, "description": "of no image"},
        ],
    )
    def test_without_captions_are_passed_over_and_named(self, tmp_path, content):
        write(tmp_path / "in", "1.jpg", **{"x.json": json.dumps(content)})
        source = open_source([str(tmp_path / "in")], "auto", SourceOptions())
        shards = source.shards(f"{tmp_path}/plans", 100)
        assert plan_notes(shards) == ["Passed over 1 file that is no data of format files: x.json."]

    def test_of_one_image_are_its_own(self, tmp_path):
        text = '{"caption": "one", "url": "https://a.b/c.jpg"}'
        write(tmp_path / "in", "00000/1.png", "00000/2.jpg", **{"00000/1.json": text, "00000/2.json": text})
        found, records, num_passed_over = read(tmp_path / "in")
        assert (found, num_passed_over) == ("files", 0)
        assert [list(row.captions) for row in records if isinstance(row, Row)] == [["one"], ["one"]]

    def test_of_one_format_are_all_read_where_it_is_named(self, tmp_path):
        tables = {f"{name}.csv": f"image,caption\n{name}.jpg,{name}\n" for name in ("train", "val")}
        write(tmp_path / "in", "images/train.jpg", "images/val.jpg", **tables)
        with pytest.raises(OptionError, match=r"several annotations: train\.csv, val\.csv"):
            read(tmp_path / "in")
        write(tmp_path / "in", "images/extra.jpg")
        source = open_source([str(tmp_path / "in")], "flickr30k", SourceOptions())
        for rows_per_shard in (1, 100, 100):
            shards = source.shards(f"{tmp_path}/plans", rows_per_shard)
            assert [record.key for shard in shards for record in shard.rows()] == ["train", "val"]
            assert plan_counters(shards) == {"unlisted_images": 1}

    def test_images_that_none_lists_are_counted_wherever_they_lie(self, tmp_path):
        names = [
            "val/1.jpg",
            "val/._1.jpg",
            "val/2.jpg",
            "test/3.jpg",
            "4.jpg",
            ".x/5.jpg",
            "notes.md",
            "a.zip",
        ]
        write(tmp_path / "in", *names, **{"annotations/captions_val.json": json.dumps(COCO)})
        source = open_source([str(tmp_path / "in")], "auto", SourceOptions())
        counters = add_counts(plan_counters(source.shards(f"{tmp_path}/plans", 100)), source.passed_over)
        assert counters == {"unlisted_images": 5, "passed_over_files": 2}

    @pytest.mark.parametrize("folder", ["", "photos/"])
    @pytest.mark.parametrize(
        ("name", "content"), [("c.csv", "image,caption\n1.jpg,one\n"), ("captions_x.json", json.dumps(COCO))]
    )
    @pytest.mark.parametrize("is_file", [False, True])
    def test_images_are_beside_them(self, tmp_path, folder, name, content, is_file):
        write(tmp_path / "in", f"{folder}1.jpg", f"{folder}2.jpg", "other/3.jpg", **{name: content})
        place = tmp_path / "in" / name if is_file else tmp_path / "in"
        _, records, _ = read(place, plans=f"{tmp_path}/plans")
        assert [list(row.captions) for row in records if isinstance(row, Row)] == [["one"]]

    def test_an_archive_of_images_is_beside_them(self, tmp_path):
        write(tmp_path / "in", **{"c.csv": "image,caption\na.jpg,one\n", "i.tar": tar_of("a", "b")})
        assert keys_of(read(tmp_path / "in")[1]) == ["a"]
        write(tmp_path / "in", "j.tar")
        with pytest.raises(InputError, match=r"cannot be found: they are not beside it.*--images"):
            read(tmp_path / "in")
        _, records, num_passed_over = read(tmp_path / "in", images=f"{tmp_path}/in/i.tar")
        assert (keys_of(records), num_passed_over) == (["a"], 1)

    def test_each_has_the_images_beside_it(self, tmp_path):
        text = json.dumps(COCO)
        files = {f"{split}/_annotations.coco.json": text for split in ("train", "valid")}
        write(tmp_path / "in", "train/1.jpg", "valid/1.jpg", **files)
        assert keys_of(read(tmp_path / "in")[1]) == ["1", "1"]


class TestImagesBesideShards:
    @pytest.mark.parametrize("shard", ["x.tar", "sub/x.parquet", "x.tfrecord"])
    @pytest.mark.parametrize(
        "caption",
        [
            {"a.txt": "one"},
            {"a.json": '{"caption": "one"}'},
            {"metadata.jsonl": '{"file_name": "a.jpg", "text": "one"}'},
            {"metadata.csv": "file_name;text\na.jpg;one"},
        ],
    )
    def test_are_no_strays_where_they_have_captions(self, tmp_path, shard, caption):
        write(tmp_path, "a.jpg", shard, **caption)
        with pytest.raises(OptionError, match=r"several kinds: .*; 1 image.*--format"):
            read(tmp_path)

    def test_are_strays_where_the_metadata_is_not_theirs(self, tmp_path):
        write(tmp_path / "in", "teaser.jpg", "x.tar", **{"metadata.csv": "shard,rows\nx.tar,2", "b.txt": "b"})
        assert read(tmp_path / "in")[::2] == ("webdataset", 3)


class TestNames:
    def test_a_glob_reads_the_folders_that_it_matches(self, tmp_path):
        write(tmp_path / "in", "x/a.tar", "y/deep/b.tar")
        assert len(read(f"{tmp_path}/in/*")[1]) == 4
        write(tmp_path / "images", "x/a.jpg", "b.jpg")
        assert keys_of(read(f"{tmp_path}/images/*", plans=f"{tmp_path}/plans")[1]) == ["b", "x/a"]

    def test_braces_expand(self, tmp_path):
        write(tmp_path / "in", "000.tar", "001.tar", "002.tar", "a{b,c}.tar")
        assert len(read(f"{tmp_path}/in/{{000..002}}.tar")[1]) == 6
        with pytest.raises(InputError, match="003"):
            read(f"{tmp_path}/in/{{000..003}}.tar")
        assert expand_braces(f"{tmp_path}/in/a{{b,c}}.tar") == [f"{tmp_path}/in/a{{b,c}}.tar"]
        assert expand_braces("x{y") == ["x{y"]
        assert expand_braces("{a,b}/{1..2}.tar") == ["a/1.tar", "a/2.tar", "b/1.tar", "b/2.tar"]

    @pytest.mark.parametrize(
        "url",
        ["p-{000..999999999}.tar", "{0..9}/{0..99}.tar", "{1.." + "9" * 200 + "}", "{a,b}" * 10, "{-1..999}"],
    )
    def test_braces_that_stand_for_too_many_paths_are_refused(self, url, monkeypatch):
        monkeypatch.setattr(detect, "_MAX_PATHS", 999)
        assert len(expand_braces("{001..999}.tar")) == 999
        with pytest.raises(OptionError, match="stands for more than 999 files"):
            expand_braces(url)

    def test_two_colons_are_part_of_a_local_name(self, tmp_path):
        assert len(read(write(tmp_path / "a::b", "c::d.tar") / "c::d.tar")[1]) == 2

    def test_links_in_circles_and_to_nowhere(self, tmp_path):
        folder = write(tmp_path / "in", "real/a.jpg")
        (folder / "up").symlink_to(folder)
        (folder / "again").symlink_to(folder / "real")
        (folder / "self").symlink_to(folder / "self")
        (folder / "gone.jpg").symlink_to(folder / "nowhere")
        _, records, _ = read(folder)
        assert keys_of(records) == ["real/a"]
        assert [(record.key, record.reason) for record in records if isinstance(record, Reject)] == [
            ("gone", "missing_image")
        ]


class TestBytes:
    @pytest.mark.parametrize("name", ["a", "a.jpg_large", "a.dat", "a.JFIF", "a.jpe", "image.php", "a.1"])
    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"])
    def test_an_image_is_known_by_them(self, tmp_path, name, format):
        write(tmp_path / "in", **{name: picture(format), "b": "no image"})
        _, records, num_passed_over = read(tmp_path / "in")
        assert (len(records), num_passed_over) == (1, 1)


class TestCaptions:
    def test_of_metadata(self, tmp_path):
        rows = [{"file_name": "a.jpg", "text": "one"}, {"file_name": "a.jpg", "text": "uno"}, "junk"]
        rows += [
            {"file_name": "x/b.jpg", "text": "two", "licence": "free"},
            {"file_name": "c.jpg", "text": "gone"},
        ]
        lines = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
        write(tmp_path / "in", "a.jpg", "x/b.jpg", "d.jpg", **{"metadata.jsonl": lines})
        _, records, _ = read(tmp_path / "in")
        assert {row.key: list(row.captions) for row in records if isinstance(row, Row)} == {
            "a": ["one", "uno"],
            "x/b": ["two"],
            "d": [],
        }
        assert sorted((record.key, record.reason) for record in records if isinstance(record, Reject)) == [
            ("", "bad_annotation"),
            ("c", "missing_image"),
        ]

    @pytest.mark.parametrize("kind", ["csv", "parquet"])
    def test_of_metadata_in_other_forms_and_folders(self, tmp_path, kind):
        for folder in ("train", "test"):
            rows = pa.table({"file_name": ["a.jpg"], "caption": [f"{folder} a"], "licence": ["free"]})
            write(tmp_path / "in", f"{folder}/a.jpg")
            if kind == "csv":
                path = tmp_path / "in" / folder / "metadata.csv"
                path.write_text(f"file_name,caption,licence\na.jpg,{folder} a,free\n")
            else:
                pq.write_table(rows, tmp_path / "in" / folder / "metadata.parquet")
        _, records, _ = read(tmp_path / "in", metadata_columns=("licence",))
        assert {row.key: (list(row.captions), row.metadata) for row in records if isinstance(row, Row)} == {
            "train/a": (["train a"], {"licence": "free"}),
            "test/a": (["test a"], {"licence": "free"}),
        }
        with pytest.raises(OptionError, match="has no column 'zzz'"):
            read(tmp_path / "in", columns=ColumnNames(caption="zzz"))

    def test_of_files_beside_the_images(self, tmp_path):
        texts = {
            "a.txt": "one\ntwo",
            "b.caption": "three",
            "c.json": '{"caption": "four", "url": "u"}',
            "x.txt": "no",
        }
        write(tmp_path / "in", "a.jpg", "b.png", "c.jpg", "d.jpg", **texts)
        _, records, num_passed_over = read(tmp_path / "in", metadata_columns=("url",))
        rows = {row.key: (list(row.captions), row.metadata["url"]) for row in records if isinstance(row, Row)}
        assert rows == {
            "a": (["one", "two"], None),
            "b": (["three"], None),
            "c": (["four"], "u"),
            "d": ([], None),
        }
        assert num_passed_over == 1
        source = open_source([str(tmp_path / "in")], "auto", SourceOptions())
        [shard] = source.shards(f"{tmp_path}/plans", 100)
        assert [list(row.captions) for row in shard.texts(2) if isinstance(row, Row)][2:] == [["four"], []]

    def test_of_a_file_whose_name_is_composed_of_other_letters(self, tmp_path):
        write(tmp_path / "in", "\xe9.jpg", **{"e\u0301.txt": "one"})
        _, [row], num_passed_over = read(tmp_path / "in")
        assert (list(row.captions), num_passed_over) == (["one"], 0)

    def test_a_text_that_changes_changes_the_fingerprint(self, tmp_path):
        prints = []
        for text in ("one", "three"):
            write(tmp_path / "in", "a.jpg", **{"a.txt": text})
            prints.append(open_source([str(tmp_path / "in")], "auto", SourceOptions()).inputs())
        assert prints[0] != prints[1]


@pytest.mark.parametrize("seed", range(40))
def test_files_found_are_read_or_passed_over_or_refused(tmp_path, seed):
    draw = random.Random(seed)
    names = [
        "a.jpg",
        "b.png",
        "c.txt",
        "d.md",
        "e.tar",
        "f.parquet",
        "g",
        ".h",
        "_i.jpg",
        "a.txt",
        "a.json",
        "k.csv",
    ]
    paths = {
        f"{draw.choice(['', 'x/', 'x/y/', 'z/'])}{name}"
        for name in draw.choices(names, k=draw.randrange(1, 9))
    }
    write(tmp_path / "in", *paths)
    refusal = ""
    try:
        _, records, num_passed_over = read(tmp_path / "in")
    except (OptionError, InputError) as error:
        refusal = str(error)
    if refusal:
        assert "--format" in refusal or "no data of any format" in refusal
        return
    used = {record.source for record in records if isinstance(record, Row)}
    texts = {
        path
        for path in paths
        if path.endswith((".txt", ".json"))
        and any(path.rpartition(".")[0] == row.rpartition(".")[0] for row in used)
    }
    assert len(
        used | (texts if not any(name.endswith(".tar") for name in used) else set())
    ) + num_passed_over == len(paths)
