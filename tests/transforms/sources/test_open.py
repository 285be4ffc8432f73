"""What an input is found to be; and that one data set gives the same rows whatever format it is in."""

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import tfrecord  # type: ignore[import-untyped]  # has no stubs
import webdataset

from diptych.pipelines.demo_data.layouts import write_data_set
from diptych.transforms.errors import InputError, OptionError
from diptych.transforms.sources.base import ColumnNames, Row, shard_names
from diptych.transforms.sources.open import SourceOptions, open_source, output_of
from diptych.transforms.sources.planned.coco import CocoSource
from diptych.transforms.sources.planned.flickr30k import Flickr30kSource
from diptych.transforms.sources.planned.image_files import FilesSource
from diptych.transforms.sources.planned.karpathy import KarpathySource
from diptych.transforms.sources.sharded.parquet import ParquetSource
from diptych.transforms.sources.sharded.tfrecord import TfrecordSource
from diptych.transforms.sources.sharded.webdataset import WebdatasetSource

NUM_SCENES = 30


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One data set in every format, the shards by the writers that others use."""
    home = tmp_path_factory.mktemp("formats")
    write_data_set(str(home / "data"), NUM_SCENES, seed=3)
    samples = list(_samples(home / "data/coco"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the writer leaves its file to the collector
        with webdataset.TarWriter(str(home / "shard.tar")) as tar:
            for key, jpg, captions in samples:
                tar.write({"__key__": key, "jpg": jpg, "txt": "\n".join(captions)})
    records = tfrecord.TFRecordWriter(str(home / "shard.tfrecord"))
    for key, jpg, captions in samples:
        caption = [text.encode() for text in captions]
        records.write({"key": (key.encode(), "byte"), "jpg": (jpg, "byte"), "caption": (caption, "byte")})
    records.close()
    columns = {
        "key": [key for key, _, _ in samples],
        "image": [{"bytes": jpg, "path": None} for _, jpg, _ in samples],
        "captions": [captions for _, _, captions in samples],
    }
    dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    dataset.to_parquet(str(home / "shard.parquet"))
    entries = [
        {"filename": f"{key}.jpg", "split": "train", "sentences": [{"raw": text} for text in captions]}
        for key, _, captions in samples
    ]
    (home / "dataset_scenes.json").write_text(json.dumps({"images": entries, "dataset": "scenes"}))
    return home


def _samples(coco: Path) -> Iterator[tuple[str, bytes, list[str]]]:
    for split in ("train2017", "val2017"):
        annotation = json.loads((coco / f"annotations/captions_{split}.json").read_text())
        captions: dict[int, list[str]] = {}
        for entry in annotation["annotations"]:
            captions.setdefault(entry["image_id"], []).append(entry["caption"])
        for image in annotation["images"]:
            path = coco / split / image["file_name"]
            yield path.stem, path.read_bytes(), captions[image["id"]]


def _rows(home: Path, tmp_path: Path, name: str, **options: Any) -> dict[str, tuple[bytes, tuple[str, ...]]]:
    source = open_source([str(home / name)], "auto", SourceOptions(**options))
    shards = source.shards(str(tmp_path / "plan"), 1000)
    records = [record for shard in shards for record in shard.rows()]
    assert all(isinstance(record, Row) for record in records)
    return {
        record.key: (record.image, tuple(record.captions)) for record in records if isinstance(record, Row)
    }


@pytest.mark.parametrize(
    "name",
    [
        "data/flickr30k",
        "data/webdataset",
        "shard.tar",
        "shard.tfrecord",
        "shard.parquet",
        "dataset_scenes.json",
    ],
)
def test_every_format_gives_the_same_rows(home: Path, tmp_path: Path, name: str) -> None:
    images = str(home / "data/flickr30k/flickr30k-images") if name.endswith(".json") else None
    expected = _rows(home, tmp_path, "data/coco")
    assert len(expected) == NUM_SCENES
    found = _rows(home, tmp_path / "other", name, images=images)
    # COCO numbers captions over both splits; within an image the order is the writer's in each
    assert found == expected


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("data/coco", CocoSource),
        ("data/coco/annotations", CocoSource),
        ("data/coco/annotations/captions_val2017.json", CocoSource),
        ("data/flickr30k", Flickr30kSource),
        ("data/flickr30k/results_20130124.token", Flickr30kSource),
        ("data/webdataset", WebdatasetSource),
        ("data/webdataset/train-*.tar", WebdatasetSource),
        ("dataset_scenes.json", KarpathySource),
        ("shard.parquet", ParquetSource),
        ("shard.tfrecord", TfrecordSource),
        ("data/flickr30k/flickr30k-images", FilesSource),
        ("data/coco/val2017/*.jpg", FilesSource),
    ],
)
def test_finds_the_format(home: Path, name: str, kind: type) -> None:
    assert type(open_source([str(home / name)], "auto", SourceOptions())) is kind


def test_a_folder_of_folders_of_shards_is_read_in_depth(home: Path, tmp_path: Path) -> None:
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        shutil.copy(home / "shard.tar", tmp_path / part)
    source = open_source([str(tmp_path)], "auto", SourceOptions())
    assert [shard.name for shard in source.shards("", 10)] == ["a__shard", "b__shard"]
    both = open_source([str(tmp_path / "a"), str(tmp_path / "b")], "auto", SourceOptions())
    assert [shard.name for shard in both.shards("", 10)] == ["a__shard", "b__shard"]


def test_img2dataset_metadata_beside_tars_is_no_input(home: Path, tmp_path: Path) -> None:
    shutil.copy(home / "shard.tar", tmp_path / "00000.tar")
    shutil.copy(home / "shard.parquet", tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    assert isinstance(open_source([str(tmp_path)], "auto", SourceOptions()), WebdatasetSource)


def test_the_same_file_twice_is_one_shard(home: Path) -> None:
    source = open_source([str(home / "shard.tar"), str(home / "shard.tar")], "auto", SourceOptions())
    assert len(source.shards("", 10)) == 1


@pytest.mark.parametrize(
    ("names", "format", "options", "message"),
    [
        (["shard.tar", "shard.parquet"], "auto", {}, "several formats"),
        (["shard.tar"], "auto", {"split": "train"}, "--split train"),
        (["shard.tar"], "auto", {"images": "x"}, "--images x"),
        (["data/scenes.json"], "webdataset", {"images": "x"}, "--images x"),
    ],
)
def test_what_does_not_go_together_is_refused(
    home: Path, names: list[str], format: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        open_source([str(home / name) for name in names], format, SourceOptions(**options))


def test_two_annotations_of_the_same_images_are_refused(home: Path, tmp_path: Path) -> None:
    for name in ("results_20130124.token", "other.token"):
        shutil.copy(home / "data/flickr30k/results_20130124.token", tmp_path / name)
    with pytest.raises(OptionError, match=r"several annotations: .*other\.token, .*results_20130124\.token"):
        open_source([str(tmp_path)], "auto", SourceOptions())


@pytest.mark.parametrize("name", ["nothing", "nothing/*.tar", "empty", "unknown.bin"])
def test_what_is_not_there_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "unknown.bin").write_bytes(b"?")
    with pytest.raises((InputError, OptionError), match=name.split("/")[0]):
        open_source([str(tmp_path / name)], "auto", SourceOptions())


def test_an_output_below_its_input_is_not_read(home: Path, tmp_path: Path) -> None:
    for folder in ("in/part", "in/out/images"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(home / "shard.parquet", tmp_path / folder / "a.parquet")
    (tmp_path / "in/out/_job.json").write_text("{}")
    source = open_source([str(tmp_path / "in")], "auto", SourceOptions())
    assert [shard.name for shard in source.shards("", 10)] == ["part__a"]


@pytest.mark.parametrize(
    ("url", "is_output"),
    [
        ("out", True),
        ("out/", True),
        ("out/images", True),
        ("out/images/", True),
        ("out/images/*.parquet", True),
        ("out/images/a-00000.parquet", True),
        ("out/captions", False),
        ("out/rejects/read", False),
        ("data", False),
        ("data/images", False),
        ("data/images/*.jpg", False),
        ("missing", False),
    ],
)
def test_an_output_is_told_from_other_data(tmp_path: Path, url: str, is_output: bool) -> None:
    for folder in ("out/images", "out/captions", "data/images"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "out/_job.json").write_text("{}")
    expected = f"file://{tmp_path}/out" if is_output else None
    assert output_of(f"{tmp_path}/{url}") == expected


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("a.txt", "1000.jpg#0\tA dog .\n", "flickr30k"),
        ("a.txt", "1000.jpg.1#0\tA dog .\n", "flickr30k"),
        ("a.txt", "image,caption\n1000.jpg,A dog .\n", "flickr30k"),
        ("a.csv", "image_name| comment_number| comment\n1000.jpg| 0| A dog .\n", "flickr30k"),
        ("a.csv", '\ufeff"image","caption"\n"1000.jpg","A dog ."\n', "flickr30k"),
        ("a.csv", "name,what\n1000.jpg,A dog .\n", "flickr30k"),
        ("a.csv", 'image,caption\n1000.jpg,"A\ndog\n."\n1001.jpg,"A\ncat\n."\n', "flickr30k"),
        ("a.txt", "", "prompts"),
        ("a.txt", "a dog, in the image\nan image of a dog\n", "prompts"),
        ("a.txt", "image, 4k, of a cat\na poster of photo.png, neon\na dog\na cow\n", "prompts"),
        ("a.csv", "key,prompt\n1,a dog\n", "prompts"),
        ("a.csv", "prompt\na dog\n", "prompts"),
        ("a.txt", "红色的圆\n", "prompts"),
    ],
)
def test_text_is_prompts_unless_it_names_images(tmp_path, name, text, kind):
    (tmp_path / name).write_text(text)
    inputs = [str(tmp_path / name)]
    assert open_source(inputs, "auto", SourceOptions(), texts_only=True).format == kind


@pytest.mark.parametrize("path", ["甲.tar", "数据/乙.tar", "_.tar", "...tar", "é.parquet"])
def test_no_shard_has_a_name_that_hides_its_files(path):
    [name] = shard_names([path])
    assert name[0] not in "._"


def test_a_table_of_names_without_extension_is_read_where_the_flag_says_so(tmp_path):
    table = tmp_path / "some.csv"
    table.write_text("image_id,caption\n1,one\n2,two\n")
    (tmp_path / "images").mkdir()
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / "images" / name).write_bytes(b"x")
    with pytest.raises(OptionError, match="--image_column"):
        open_source([str(table)], "auto", SourceOptions())
    source = open_source([str(table)], "auto", SourceOptions(columns=ColumnNames("image_id")))
    rows = [row for shard in source.shards(f"{tmp_path}/plans", 10) for row in shard.rows()]
    assert [(row.key, row.captions) for row in rows] == [("1", ["one"]), ("2", ["two"])]
