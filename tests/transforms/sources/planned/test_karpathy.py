import json

import pytest

from diptych.transforms.chunk import Reject
from diptych.transforms.errors import InputError, OptionError
from diptych.transforms.sources.base import ColumnNames, Row
from diptych.transforms.sources.planned.karpathy import KarpathySource
from diptych.transforms.sources.planned.plan import plan_counters


def image(ordinal, name, split="train", sentences=(), **more):
    return {
        "imgid": ordinal,
        "filename": name,
        "split": split,
        "sentences": [{"raw": text, "tokens": text.lower().split(), "sentid": 0} for text in sentences],
        **more,
    }


def plan(folder, data, files, name="dataset_flickr8k.json", below="Images", **options):
    """Returns the shards of a JSON beside a folder of images."""
    (folder / name).write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    for file in files:
        path = folder / below / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.encode())
    return KarpathySource((str(folder / name),), str(folder), **options).shards(str(folder / "plans"), 10)


def read(shards):
    return [record for shard in shards for record in shard.rows()]


SPLITS = {
    "dataset": "flickr8k",
    "images": [
        image(0, "a.jpg", "train", ["A one", "A two"]),
        image(1, "b.jpg", "restval", ["B"]),
        image(2, "c.jpg", "val", ["C"]),
        image(3, "d.jpg", "test", []),
    ],
}


@pytest.mark.parametrize(
    ("split", "rows"),
    [(None, [0, 1, 2, 3]), ("train", [0]), ("val", [2]), ("train,restval", [0, 1]), ("test , val", [2, 3])],
)
def test_splits(tmp_path, split, rows):
    shards = plan(tmp_path, SPLITS, ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"], split=split)
    records = read(shards)
    assert [(record.row, record.key) for record in records] == [(row, "abcd"[row]) for row in rows]
    assert sum(shard.num_rows for shard in shards) == len(rows)
    # Images of the other splits are listed all the same
    assert plan_counters(shards) == {"unlisted_images": 1}


def test_captions_are_the_raw_sentences_or_the_tokens(tmp_path):
    entry = image(0, "a.jpg", sentences=["A Dog ."])
    entry["sentences"] += [{"tokens": ["two", "dogs"]}, {"raw": "new\nline", "tokens": []}]
    [row] = read(plan(tmp_path, {"images": [entry]}, ["a.jpg"]))
    assert row.captions == ["A Dog .", "two dogs", "new\nline"]


def test_unknown_split_names_those_there_are(tmp_path):
    with pytest.raises(OptionError, match=r"no split dev\. It has restval, test, train, val"):
        plan(tmp_path, SPLITS, ["a.jpg"], split="train,dev")


def test_another_split_is_another_plan(tmp_path):
    files = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    assert len(read(plan(tmp_path, SPLITS, files, split="val"))) == 1
    assert len(read(plan(tmp_path, SPLITS, files, split="val,train"))) == 2


@pytest.mark.parametrize(
    ("below", "images"),
    [(".", None), ("images", None), ("pictures", "pictures"), ("pictures", "pictures/val2014")],
)
def test_coco_has_a_folder_in_filepath(tmp_path, below, images):
    data = {"images": [image(0, "COCO_val2014_1.jpg", filepath="val2014", cocoid=1)]}
    images = images and str(tmp_path / images)
    files = ["val2014/COCO_val2014_1.jpg", "train2014/COCO_train2014_2.jpg"]
    shards = plan(
        tmp_path,
        data,
        files,
        "dataset_coco.json",
        below,
        images=images,
        metadata_columns=("cocoid", "split"),
    )
    [row] = read(shards)
    assert (row.key, row.path, row.image) == ("COCO_val2014_1", "COCO_val2014_1.jpg", files[0].encode())
    assert row.metadata == {"cocoid": "1", "split": "train"}
    with pytest.raises(OptionError, match=r"--metadata_columns nope: .* They have cocoid"):
        plan(
            tmp_path,
            data,
            files,
            "dataset_coco.json",
            below,
            images=images,
            metadata_columns=("split", "nope"),
        )


def test_file_name_alone_is_found_without_its_folder(tmp_path):
    data = {"images": [image(0, "1.jpg", filepath="val2014"), image(1, "2.jpg")]}
    assert [row.image for row in read(plan(tmp_path, data, ["1.jpg", "deep/2.jpg"]))] == [
        b"1.jpg",
        b"deep/2.jpg",
    ]


def test_every_loss_has_its_reason(tmp_path):
    entry = image(4, "e.jpg")
    entry["sentences"] = [{"raw": None}, {"raw": "kept"}, 7]
    data = {
        "images": [
            image(0, "a.jpg"),
            image(1, "gone.jpg", sentences=["x", "y"]),
            {"imgid": 2},
            image(3, "a.jpg"),
            entry,
        ]
    }
    records = read(plan(tmp_path, data, ["a.jpg", "e.jpg"]))
    assert [(r.key, r.row, r.reason) for r in records if isinstance(r, Reject)] == [
        ("gone", 1, "missing_image"),
        ("", 2, "bad_annotation"),
        ("", 4, "bad_annotation"),
        ("", 5, "bad_annotation"),
    ]
    assert [(r.key, r.row, r.captions) for r in records if isinstance(r, Row)] == [
        ("a", 0, []),
        ("e", 4, ["kept"]),
    ]


def test_entries_of_one_file_are_one_row_of_the_splits_asked_for(tmp_path):
    entries = [
        image(0, "a.jpg", "test", ["other split"]),
        image(1, "a.jpg", "train", ["A one", "A two"]),
        image(2, "a.jpg", "train", ["A three"]),
    ]
    shards = plan(tmp_path, {"images": entries}, ["a.jpg"], split="train")
    [row] = read(shards)
    assert (row.key, row.row, sorted(row.captions)) == ("a", 1, ["A one", "A three", "A two"])
    assert plan_counters(shards) == {"entries_joined": 1}


def test_columns_that_the_user_names(tmp_path):
    entries = [
        image(0, "no.jpg", path="x/a.jpg", filepath="no", cocoid=70, sentences=["no"]),
        image(1, "no.jpg", path="b.jpg", cocoid="71"),
        image(2, "no.jpg", path="c.jpg"),
        image(3, "no.jpg", cocoid=73),
    ]
    entries[0]["sentences"] += [{"text": "yes"}, {"text": ["in", "words"]}]
    shards = plan(
        tmp_path, {"images": entries}, ["x/a.jpg", "b.jpg"], columns=ColumnNames("path", "text", "cocoid")
    )
    records = read(shards)
    assert [(r.key, r.row, r.captions) for r in records if isinstance(r, Row)] == [
        ("70", 0, ["yes", "in words"]),
        ("71", 1, []),
    ]
    assert [r.message for r in records if isinstance(r, Reject)] == [
        "image 2, c.jpg, needs a cocoid for its key; it has null",
        "image 3 has no path, but null",
        'sentence 0 of image 0, x/a.jpg, has no text: {"raw": "no", "tokens": ["no"], "sentid": 0}',
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (ColumnNames(image="path"), "--image_column path: no entry of images .*filename, imgid"),
        (ColumnNames(key="id"), "--key_column id: no entry of images .*filename, imgid"),
        (ColumnNames(caption="text"), "--caption_column text: no entry of sentences .*raw, sentid, tokens"),
    ],
)
def test_column_that_there_is_not(tmp_path, columns, message):
    with pytest.raises(OptionError, match=message):
        plan(tmp_path, SPLITS, ["a.jpg"], columns=columns)


def test_splits_and_sentences_of_odd_types(tmp_path):
    entries = [
        image(0, "a.jpg", ["train"]),
        {"filename": "b.jpg", "split": "val", "sentences": {"raw": "x"}},
        {"filename": "c.jpg", "split": "val"},
        {"filename": "d.jpg", "split": "val", "sentences": [{"tokens": ["a", 1]}, "x"]},
    ]
    records = read(plan(tmp_path, {"images": entries}, ["a.jpg", "b.jpg", "c.jpg", "d.jpg"], split="val"))
    assert [(r.key, r.captions) for r in records if isinstance(r, Row)] == [
        ("b", []),
        ("c", []),
        ("d", ["a 1"]),
    ]
    assert [r.reason for r in records if isinstance(r, Reject)] == ["bad_annotation"] * 2
    with pytest.raises(OptionError, match=r"has no split dev\. It has \(none\), val\."):
        plan(tmp_path, {"images": entries}, ["a.jpg"], split="dev")


@pytest.mark.parametrize("data", [json.dumps(SPLITS).encode()[:-4], b"", b"nonsense"])
def test_json_that_is_not_whole_is_an_input_error(tmp_path, data):
    with pytest.raises(InputError, match="not whole JSON"):
        plan(tmp_path, data, ["a.jpg"])


@pytest.mark.parametrize("data", [{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}, {}, []])
def test_json_that_is_something_else_is_an_input_error(tmp_path, data):
    with pytest.raises(InputError, match="not one of Karpathy's data sets"):
        plan(tmp_path, data, ["a.jpg"])


def test_no_images_are_one_shard_without_rows(tmp_path):
    [shard] = plan(tmp_path, {"images": []}, ["a.jpg"])
    assert (shard.num_rows, list(shard.rows())) == (0, [])
