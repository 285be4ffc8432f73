import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.coco import COCO

from diptych.transforms.chunk import Reject
from diptych.transforms.errors import InputError, OptionError
from diptych.transforms.sources.base import ColumnNames, Row
from diptych.transforms.sources.open import SourceOptions, open_source
from diptych.transforms.sources.planned.coco import CocoSource
from diptych.transforms.sources.planned.plan import plan_counters


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
    return [(record.key, record.row, record.reason) for record in records if isinstance(record, Reject)]


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


def test_id_that_two_images_have_loses_the_later(tmp_path):
    data = {
        "images": [image(1, "a.jpg"), image(1, "b.jpg")],
        "annotations": [caption(1, "one")],
    }
    records = read(plan(tmp_path, data, ["a.jpg", "b.jpg"]))
    assert captions_of(records) == {"a": ["one"]}
    assert lost(records) == [("b", 1, "duplicate_key")]
    assert records[1].message == "image id 1 is listed before; this is b.jpg"


def test_entries_of_one_file_are_one_row_with_the_captions_of_all(tmp_path):
    names = [f"{i}.jpg" for i in range(12)]
    again = [image("x", "3.jpg"), image(3, "3.jpg"), image("y", "./3.jpg"), image("z", ".\\3.jpg")]
    data = {
        "images": [*(image(i, name) for i, name in enumerate(names)), *again],
        "annotations": [caption("y", "b"), caption(3, "a"), caption("x", "d"), caption("z", "c")],
    }
    shards = plan(tmp_path, data, names)
    assert [shard.num_rows for shard in shards] == [10, 2]
    records = read(shards)
    assert lost(records) == []
    assert captions_of(records) == {str(i): ["b", "a", "d", "c"] if i == 3 else [] for i in range(12)}
    assert plan_counters(shards)["entries_joined"] == 4


@pytest.mark.parametrize(
    ("listed", "used", "key", "matched"),
    [
        (1, "1", None, 1),
        ("1", 1, None, 1),
        (1, 1.0, None, 0),
        (1, "1.0", None, 1),
        ("a", "a", None, 0),
        (2**70, 2**70, None, 0),
        (2**70, str(2**70), None, 1),
        (1e20, 10**20, None, 0),
        (-5, "-5", None, 1),
        (1, "001", '"001"', 0),
        (1, "1.5", '"1.5"', 0),
        (1, "١", '"١"', 0),
        ("01", 1, "1", 0),
        ("a", 'a"b', '"a\\"b"', 0),
        (1, 2**65, str(2**65), 0),
    ],
)
def test_ids_that_differ_in_type_alone_are_the_same(tmp_path, listed, used, key, matched):
    data = {"images": [image(listed, "a.jpg")], "annotations": [caption(used, "one")]}
    shards = plan(tmp_path, data, ["a.jpg"])
    records = read(shards)
    assert captions_of(records) == {"a": [] if key else ["one"]}
    assert plan_counters(shards) == ({"ids_of_other_type": 1} if matched else {})
    if key:
        assert f"refer to an image {key} that" in records[1].message


def test_images_whose_ids_are_a_number_and_its_text_are_two(tmp_path):
    data = {
        "images": [image(1, "a.jpg"), image("1", "b.jpg")],
        "annotations": [caption(1, "number"), caption("1", "text")],
    }
    assert captions_of(read(plan(tmp_path, data, ["a.jpg", "b.jpg"]))) == {"a": ["number"], "b": ["text"]}


NFC, NFD = "caf\u00e9.jpg", "cafe\u0301.jpg"


@pytest.mark.parametrize(
    ("listed", "file", "counted"),
    [
        (NFC, NFD, 1),
        (NFD, NFC, 1),
        (NFD, NFD, 0),
        (f"x/{NFC}", f"deep/x/{NFD}", 1),
        ("val2017\\a.jpg", "a.jpg", 1),
        ("val2017\\a.jpg", "val2017/a.jpg", 1),
        ("C:\\data\\coco\\x\\a.jpg", "x/a.jpg", 1),
        (".\\a.jpg", "a.jpg", 1),
        ("./x/../a.jpg", "a.jpg", 0),
        ("../images/a.jpg", "a.jpg", 0),
        ("/home/me/coco/val2017/a.jpg", "a.jpg", 0),
        ("http://images.cocodataset.org/val2017/a.jpg", "a.jpg", 0),
        ("https://host/a%20b.jpg?size=3#x", "a b.jpg", 1),
        ("a%20b.jpg", "a b.jpg", 1),
        ("a%20b.jpg", "a%20b.jpg", 0),
        ("a.JPG", "a.jpg", 1),
        ("VAL/a.jpeg", "val/A.JPEG", 1),
        ("STRASSE.jpg", "straße.jpg", 1),
    ],
)
def test_a_file_is_found_however_its_name_is_spelled(tmp_path, listed, file, counted):
    data = {"images": [image(1, listed)], "annotations": [caption(1, "one")]}
    shards = plan(tmp_path, data, [file, "other/é.jpg", "other/É.jpg"])
    [row] = read(shards)
    assert row.image.decode() == f"bytes of {file}"
    assert plan_counters(shards).get("similar_file_names", 0) == counted


@pytest.mark.parametrize(
    ("listed", "files", "lost_paths"),
    [
        (["a.jpg"], ["A.jpg", "a.JPG"], ["a.jpg"]),  # which of the two?
        (["a.JPG", "a.jpg"], ["a.jpg"], ["a.JPG"]),  # that is another's
        (["a.jpg"], ["x/a.jpg", "y/a.jpg"], ["a.jpg"]),
        (["x/a.jpg", "y/a.jpg"], ["a.jpg"], ["x/a.jpg", "y/a.jpg"]),  # whose of the two?
        (["x/a.jpg", "a.jpg", "y/a.jpg"], ["a.jpg"], ["x/a.jpg", "y/a.jpg"]),
        (["/m/x/a.jpg", "/m/y/a.jpg"], ["a.jpg", "x/a.jpg", "y/a.jpg"], []),  # the longest end
        (["x/a.jpg"], ["a.jpg", "top/x/a.jpg"], []),
        (["xa.jpg"], ["a.jpg"], ["xa.jpg"]),
    ],
)
def test_no_file_is_guessed_at(tmp_path, listed, files, lost_paths):
    more = image(99, "sure.jpg")
    data = {"images": [*(image(i, path) for i, path in enumerate(listed)), more], "annotations": []}
    records = read(plan(tmp_path, data, [*files, "sure.jpg"]))
    missing = [
        r.message.split(" ")[0] for r in records if isinstance(r, Reject) and r.reason == "missing_image"
    ]
    assert missing == lost_paths


def test_many_files_of_one_name_are_found_by_their_folders(tmp_path):
    listed = [image(i, f"{i:03d}/img.jpg", key=str(i)) for i in range(300)]
    data = {"images": listed, "annotations": []}
    files = [f"top/{i:03d}/img.jpg" for i in range(300)]
    records = read(plan(tmp_path, data, files, columns=ColumnNames(key="key")))
    assert [record.image.decode() for record in records] == [f"bytes of {file}" for file in files]


def test_numbers_that_are_none_cost_an_entry_only_where_they_matter(tmp_path):
    data = b"""{"info": {"x": NaN}, "images": [
        {"id": 1, "file_name": "a.jpg", "score": NaN, "big": %s}, {"id": NaN, "file_name": "b.jpg"},
        {"id": 1e400, "file_name": "c.jpg"}, {"id": 4, "file_name": NaN}, {"id": true, "file_name": "d.jpg"}],
        "annotations": [{"image_id": 1, "caption": "one", "id": -Infinity}, {"image_id": Infinity, "caption": "x"},
        {"image_id": 1, "caption": NaN}]}""" % (b"9" * 40)
    shards = plan(tmp_path, data, ["a.jpg"], metadata_columns=("score", "big"))
    records = read(shards)
    assert captions_of(records) == {"a": ["one"]}
    assert records[0].metadata == {"score": None, "big": "9" * 40}
    assert lost(records) == [("", row, "bad_annotation") for row in (1, 2, 3, 4, 5, 6)]
    assert records[1].message == 'image 1 needs an id and a file_name; it has NaN and "b.jpg"'


def test_columns_that_the_user_names(tmp_path):
    entries = [
        image(1, "no.jpg", coco_url="http://images/a.jpg", license=7),
        image(2, "no.jpg", coco_url="http://images/b.jpg", license=8.0),
        image(3, "no.jpg", coco_url="http://images/c.jpg"),
        image(4, "no.jpg", license=9),
    ]
    data = {
        "images": entries,
        "annotations": [{"image_id": 1, "caption": "no", "text": "yes"}, caption(1, "no")],
    }
    columns = ColumnNames("coco_url", "text", "license")
    records = read(plan(tmp_path, data, ["a.jpg", "b.jpg"], columns=columns))
    assert captions_of(records) == {"7": ["yes"], "8": []}
    assert lost(records) == [("", row, "bad_annotation") for row in (2, 3, 4)]
    assert records[2].message == "image 2 needs a license for its key; it has null"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (ColumnNames(image="path"), r"--image_column path: no entry of images in .*They have id, file_name:"),
        (ColumnNames(key="uid"), r"--key_column uid: no entry of images in .*They have id, file_name:"),
        (
            ColumnNames(caption="raw"),
            r"--caption_column raw: no entry of annotations .*id, image_id, caption:",
        ),
    ],
)
def test_column_that_there_is_not(tmp_path, columns, message):
    data = {"images": [image(1, "a.jpg")], "annotations": [caption(1, "one")]}
    with pytest.raises(OptionError, match=message):
        plan(tmp_path, data, ["a.jpg"], columns=columns)


def test_packed_annotation_is_read(tmp_path):
    data = gzip.compress(
        json.dumps({"images": [image(1, "a.jpg")], "annotations": [caption(1, "one")]}).encode()
    )
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations" / "captions_val2017.json.gz"
    path.write_bytes(data)
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017" / "a.jpg").write_bytes(b"x")
    source = open_source([str(tmp_path)], "auto", SourceOptions())
    [shard] = source.shards(str(tmp_path / "plans"), 10)
    assert shard.name == "annotations__captions_val2017-00000"
    assert captions_of(shard.rows()) == {"a": ["one"]}


def test_texts_alone_need_no_images(tmp_path):
    entries = [image(1, "a.jpg"), image(2, "x/b.jpg"), image(3, "./a.jpg"), image(1, "c.jpg")]
    data = {"images": entries, "annotations": [caption("1", "one"), caption(3, "two"), caption(9, "x")]}
    shards = plan(tmp_path, data, [], texts_only=True)
    (tmp_path / "val2017").rmdir()
    records = [record for shard in shards for record in shard.texts(0)]
    assert captions_of(records) == {"a": ["one", "two"], "b": []}
    assert lost(records) == [("c", 3, "duplicate_key"), ("", 3, "unknown_image")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"images": [image(1, "a.jpg")], "annotations": [{"image_id": 1, "segmentation": [], "bbox": []}]},
            r"annotations \(a list of objects with image_id, segmentation, bbox\)\..*--caption_column",
        ),
        ({"data": [{"image_id": 1, "reference_strs": ["a"]}]}, "it is an object with data .*reference_strs"),
        (
            [{"id": "x", "image": "a.jpg", "conversations": []}],
            "it is a list of objects with id, image, conv",
        ),
        ({"annotations": [caption(1, "one")]}, r"it is an object with annotations \(a list of objects"),
        ({"images": [{"path": "a.jpg"}], "annotations": []}, r"images \(a list of objects with path\)"),
        ({"refs": {"1": {}}}, r"refs \(an object with 1\)"),
    ],
)
def test_json_that_is_something_else_says_what_it_is(tmp_path, data, message):
    with pytest.raises(InputError, match=message):
        plan(tmp_path, data, ["a.jpg"])


def test_bytes_that_are_not_utf8_are_counted(tmp_path):
    data = {"images": [image(1, "a.jpg")], "annotations": [caption(1, "caf#"), caption(1, "caf\u00e9")]}
    shards = plan(tmp_path, json.dumps(data).encode().replace(b"#", b"\xe9"), ["a.jpg"])
    assert captions_of(read(shards)) == {"a": ["caf\ufffd", "café"]}
    assert plan_counters(shards) == {"captions_not_utf8": 1}


def test_captions_that_are_no_text_are_lost_and_the_file_is_still_read(tmp_path):
    texts = [None, 5, ["a", "b"], {"raw": "x"}, True]
    data = {"images": [image(1, "a.jpg")], "annotations": [caption(1, text) for text in texts]}
    records = read(plan(tmp_path, data, ["a.jpg"]))
    assert captions_of(records) == {"a": []}
    assert [reason for _, _, reason in lost(records)] == ["bad_annotation"] * 5


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
