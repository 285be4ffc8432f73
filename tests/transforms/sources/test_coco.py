import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.coco import COCO

from transforms.errors import InputError
from transforms.sources.base import Lost, Row
from transforms.sources.coco import CocoSource
from transforms.sources.planned import plan_counters


def plan(folder, data, files, **options):
    """Returns the shards of an annotation with these images."""
    path = folder / "annotations" / "captions_val2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    for name in files:
        image = folder / "val2017" / name
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(b"bytes of " + name.encode())
    (folder / "val2017").mkdir(exist_ok=True)
    return CocoSource((str(path),), str(folder), **options).shards(str(folder / "plans"), 10)


def read(shards):
    return [record for shard in shards for record in shard.rows()]


def image(ref, name, **more):
    return {"id": ref, "file_name": name, **more}


def caption(ref, text):
    return {"id": 0, "image_id": ref, "caption": text}


def captions_of(records):
    return {record.key: list(record.captions) for record in records if isinstance(record, Row)}


def lost(records):
    return [(record.key, record.row, record.reason) for record in records if isinstance(record, Lost)]


def test_captions_of_an_image_are_one_row_wherever_they_stand(tmp_path):
    data = {
        "annotations": [caption(2, "two a"), caption(1, "one"), caption(2, "two\nb"), caption(2, "")],
        "images": [image(1, "a.jpg"), image(2, "b.jpg")],
    }
    assert captions_of(read(plan(tmp_path, data, ["a.jpg", "b.jpg"]))) == {
        "a": ["one"],
        "b": ["two a", "two\nb", ""],
    }


def test_image_without_captions_is_a_row(tmp_path):
    data = {"images": [image(1, "a.jpg")], "annotations": []}
    assert captions_of(read(plan(tmp_path, data, ["a.jpg"]))) == {"a": []}


def test_image_without_file_is_lost_once_with_the_number_of_its_captions(tmp_path):
    data = {
        "images": [image(1, "a.jpg"), image(2, "b.jpg")],
        "annotations": [caption(2, "x"), caption(2, "y"), caption(1, "z")],
    }
    records = read(plan(tmp_path, data, ["a.jpg"]))
    assert captions_of(records) == {"a": ["z"]}
    assert lost(records) == [("b", 1, "missing_image")]
    assert "b.jpg" in records[1].message
    assert "2 captions" in records[1].message


def test_captions_of_unknown_images_are_lost_once_per_id_after_the_images(tmp_path):
    data = {
        "annotations": [caption(9, "x"), caption(8, "y"), caption(9, "z"), caption(1, "one")],
        "images": [image(1, "a.jpg")],
    }
    records = read(plan(tmp_path, data, ["a.jpg"]))
    assert captions_of(records) == {"a": ["one"]}
    assert lost(records) == [("", 1, "unknown_image"), ("", 2, "unknown_image")]
    assert records[1].message.startswith("2 captions refer to an image 9 ")


def test_id_and_file_that_are_listed_twice_lose_the_later(tmp_path):
    data = {
        "images": [image(1, "a.jpg"), image(1, "b.jpg"), image(2, "a.jpg"), image(3, "sub/a.jpg")],
        "annotations": [caption(1, "one"), caption(2, "two")],
    }
    records = read(plan(tmp_path, data, ["a.jpg", "b.jpg", "sub/a.jpg"]))
    assert captions_of(records) == {"a": ["one"]}
    assert lost(records) == [("b", 1, "duplicate_key"), ("a", 2, "duplicate_key"), ("a", 3, "duplicate_key")]


def test_duplicate_key_is_found_across_shards(tmp_path):
    names = [f"{i}.jpg" for i in range(12)]
    data = {"images": [image(i, name) for i, name in enumerate([*names, "3.jpg"])], "annotations": []}
    shards = plan(tmp_path, data, names)
    assert len(shards) == 2
    assert lost(read(shards)) == [("3", 12, "duplicate_key")]


def test_entries_that_cannot_be_used_are_lost_one_by_one(tmp_path):
    data = {
        "images": [image(1, "a.jpg"), image(None, "b.jpg"), image(3, None), "c.jpg"],
        "annotations": [caption(1, "one"), caption(1, None), caption(None, "x"), 5],
    }
    records = read(plan(tmp_path, data, ["a.jpg", "b.jpg"]))
    assert captions_of(records) == {"a": ["one"]}
    assert lost(records) == [("", row, "bad_annotation") for row in (1, 2, 3, 4, 5, 6)]
    assert "annotation 1 needs" in records[4].message


def test_files_that_are_not_listed_are_counted(tmp_path):
    data = {"images": [image(1, "a.jpg")], "annotations": []}
    shards = plan(tmp_path, data, ["a.jpg", "b.JPG", "sub/c.png", "README"])
    assert plan_counters(shards) == {"unlisted_images": 2}
    assert len(read(shards)) == 1


def test_file_name_may_have_a_folder_or_lack_it(tmp_path):
    data = {
        "images": [image(1, "train/a.jpg"), image(2, "b.jpg"), image(3, "train/c.jpg"), image(4, "./d.jpg")],
        "annotations": [],
    }
    records = read(plan(tmp_path, data, ["train/a.jpg", "deep/b.jpg", "val/c.jpg", "d.jpg"]))
    assert sorted(captions_of(records)) == ["a", "b", "d"]
    # Another folder's file of the same name is another image
    assert lost(records) == [("c", 2, "missing_image")]


def test_unicode_names_and_odd_characters(tmp_path):
    names = ["солнце *[a]?.jpg", "日本 #1 'q'.png", "no extension", "%20.jpg"]
    data = {
        "images": [image(i, name) for i, name in enumerate(names)],
        "annotations": [caption(i, f"«{name}» 🐈") for i, name in enumerate(names)],
    }
    records = read(plan(tmp_path, data, names))
    assert [(record.path, record.image.decode(), record.captions) for record in records] == [
        (name, "bytes of " + name, [f"«{name}» 🐈"]) for name in names
    ]


def test_byte_order_mark_and_bytes_that_are_not_utf8(tmp_path):
    data = b'\xef\xbb\xbf{"images": [{"id": 1, "file_name": "a.jpg"}],\r\n "annotations": '
    data += b'[{"image_id": 1, "caption": "caf\xe9"}]}\r\n'
    assert captions_of(read(plan(tmp_path, data, ["a.jpg"]))) == {"a": ["caf�"]}


def test_ids_may_be_strings(tmp_path):
    data = {"images": [image("x1", "a.jpg")], "annotations": [caption("x1", "one"), caption(1, "other")]}
    records = read(plan(tmp_path, data, ["a.jpg"]))
    assert captions_of(records) == {"a": ["one"]}
    assert lost(records) == [("", 1, "unknown_image")]


@pytest.mark.parametrize("data", [{"images": [], "annotations": []}, b'\xef\xbb\xbf{"images": []}'])
def test_no_images_are_one_shard_without_rows(tmp_path, data):
    [shard] = plan(tmp_path, data, [])
    assert shard.num_rows == 0
    assert list(shard.rows()) == []


GOOD = json.dumps({"images": [image(1, "a.jpg")], "annotations": [caption(1, "one")]}).encode()


@pytest.mark.parametrize(
    "data", [GOOD[:-10], GOOD[:5], b"", b"<html>", GOOD + b"}", b'{"images": [{"id": \xff}]}']
)
def test_json_that_is_not_whole_is_an_input_error(tmp_path, data):
    with pytest.raises(InputError, match=r"captions_val2017\.json is not whole JSON"):
        plan(tmp_path, data, ["a.jpg"])


@pytest.mark.parametrize(
    "data",
    [
        {"images": [image(1, "a.jpg")], "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}] * 2000},
        {"images": [image(1, "a.jpg")], "annotations": [{"image_id": 1, "segmentation": []}]},
        {"images": [{"filename": "a.jpg", "imgid": 0, "sentences": []}], "dataset": "coco"},
        {"type": "FeatureCollection", "features": [{"images": []}]},
        [image(1, "a.jpg")],
        "text",
    ],
)
def test_json_that_is_something_else_is_an_input_error(tmp_path, data):
    with pytest.raises(InputError, match=r"not a COCO caption annotation.*instances"):
        plan(tmp_path, data, ["a.jpg"])


@pytest.mark.parametrize(
    "folder", ["train2014", "images/train2014", "annotations/train2014", "images", "annotations/images"]
)
def test_images_are_found_in_the_usual_places(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True)
    path = tmp_path / "annotations" / "captions_train2014.json"
    path.parent.mkdir(exist_ok=True)
    assert CocoSource((str(path),), str(tmp_path)).find_images(str(path)) == str(tmp_path / folder)


entries = st.lists(
    st.tuples(st.integers(0, 9), st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
)


@given(
    ids=st.lists(st.integers(0, 9), min_size=1, unique=True),
    captions=entries,
    annotations_first=st.booleans(),
)
def test_agrees_with_pycocotools(tmp_path_factory, ids, captions, annotations_first):
    folder = tmp_path_factory.mktemp("coco")
    listed = [image(ref, f"{ref:012d}.jpg") for ref in ids]
    annotations = [{**caption(ref, text), "id": ordinal} for ordinal, (ref, text) in enumerate(captions)]
    parts = [("images", listed), ("annotations", annotations)]
    data = dict(parts[::-1] if annotations_first else parts)
    records = read(plan(folder, data, [entry["file_name"] for entry in listed]))

    theirs = COCO()
    theirs.dataset = data
    theirs.createIndex()
    assert [(record.key, list(record.captions)) for record in records if isinstance(record, Row)] == [
        (f"{ref:012d}", [annotation["caption"] for annotation in theirs.imgToAnns.get(ref, [])])
        for ref in ids
    ]
    assert len(lost(records)) == len({ref for ref, _ in captions} - set(ids))
