import errno
import json
import pickle
import uuid

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from diptych.transforms.chunk import Reject
from diptych.transforms.errors import InputError, OptionError, OutputError
from diptych.transforms.sources.base import InputFile, Row
from diptych.transforms.sources.planned import plan_builder
from diptych.transforms.sources.planned.annotations import relative_name
from diptych.transforms.sources.planned.coco import CocoSource
from diptych.transforms.sources.planned.plan import plan_counters


def write(root, files):
    """Writes files below a URL, made by fsspec alone."""
    for name, data in files.items():
        url = f"{root}/{name}"
        fs, path = fsspec.core.url_to_fs(url)
        fs.makedirs(fs._parent(path), exist_ok=True)
        with fs.open(path, "wb") as file:
            file.write(data if isinstance(data, bytes) else json.dumps(data).encode())


def coco(num_images):
    return {
        "images": [{"id": i, "file_name": f"{i:04d}.jpg"} for i in range(num_images)],
        "annotations": [{"image_id": i, "caption": f"caption {i}"} for i in range(num_images)],
    }


@pytest.fixture(params=["local", "file", "memory", "gcs"])
def root(request, tmp_path):
    if request.param == "gcs":
        return f"{request.getfixturevalue('gcs').url}/in"
    local = str(tmp_path)
    return {"local": local, "file": f"file://{local}", "memory": f"memory://{uuid.uuid4().hex}"}[
        request.param
    ]


@pytest.fixture
def dataset(root):
    write(root, {"annotations/captions_val2017.json": coco(25)})
    write(root, {f"val2017/{i:04d}.jpg": b"image %d" % i for i in range(25)})
    return CocoSource((f"{root}/annotations/captions_val2017.json",), root)


def test_shards_cover_the_annotation_in_its_order(dataset, root):
    shards = dataset.shards(f"{root}/plans", 10)
    assert [shard.name for shard in shards] == [f"annotations__captions_val2017-0000{i}" for i in range(3)]
    assert [shard.num_rows for shard in shards] == [10, 10, 5]
    records = [record for shard in shards for record in shard.rows()]
    assert records == [
        Row(
            key=f"{i:04d}",
            image=b"image %d" % i,
            path=f"{i:04d}.jpg",
            captions=[f"caption {i}"],
            source="annotations/captions_val2017.json",
            row=i,
        )
        for i in range(25)
    ]


@pytest.mark.parametrize("skip", [0, 1, 7, 10, 11])
def test_skip_leaves_out_the_first_records(dataset, root, skip):
    for shard in dataset.shards(f"{root}/plans", 10):
        assert list(shard.rows(skip)) == list(shard.rows())[skip:]


def test_skip_fetches_only_what_is_left(dataset, root):
    [shard] = dataset.shards(f"{root}/plans", 100)
    fs, path = fsspec.core.url_to_fs(f"{root}/val2017/0003.jpg")
    fs.rm(path)
    assert len(list(shard.rows(4))) == 21
    assert [type(record) for record in shard.rows(3)] == [Reject, *[Row] * 21]


@pytest.mark.parametrize("gone", [[3], [0, 1, 2], [23, 24], [0, 24], list(range(24)), list(range(1, 25))])
def test_images_that_are_gone_cost_their_rows(dataset, root, gone):
    [shard] = dataset.shards(f"{root}/plans", 100)
    for number in gone:
        fs, path = fsspec.core.url_to_fs(f"{root}/val2017/{number:04d}.jpg")
        fs.rm(path)
    records = list(shard.rows())
    assert [record.row for record in records] == list(range(25))
    assert [record for record in records if isinstance(record, Reject)] == [
        Reject(f"{i:04d}", i, "missing_image", f"{i:04d}.jpg is gone since the job was planned") for i in gone
    ]
    assert [record.row for record in shard.rows(20)] == list(range(20, 25))


def test_folder_that_is_gone_ends_the_job(dataset, root):
    [shard] = dataset.shards(f"{root}/plans", 100)
    fs, path = fsspec.core.url_to_fs(f"{root}/val2017")
    fs.rm(path, recursive=True)
    for skip in (0, 10, 23, 24):
        with pytest.raises(
            InputError, match=r"val2017 is not there\. It was expected as an input: put it back"
        ):
            list(shard.rows(skip))
    fs.makedirs(path)  # a mount point without its disk
    with pytest.raises(InputError, match=r"val2017 (.*planned are gone.*mounted, not moved|is not there)"):
        list(shard.rows())


def test_folder_that_goes_while_it_is_read_ends_the_job(tmp_path):
    write(tmp_path, {"captions_a.json": coco(9), **{f"a/{i:04d}.jpg": b"x" for i in range(9)}})
    [shard] = CocoSource((f"{tmp_path}/captions_a.json",), str(tmp_path)).shards(f"{tmp_path}/plans", 10)
    records = shard.rows()
    assert [next(records).row for _ in range(4)] == [0, 1, 2, 3]
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(InputError, match=r"a is not there\. It was expected"):
        list(records)


def test_only_image_of_a_shard_that_is_gone_is_one_reject(tmp_path):
    write(tmp_path, {"captions_a.json": coco(1), "a/0000.jpg": b"x"})
    [shard] = CocoSource((f"{tmp_path}/captions_a.json",), str(tmp_path)).shards(f"{tmp_path}/plans", 10)
    (tmp_path / "a" / "0000.jpg").unlink()
    assert [record.reason for record in shard.rows()] == ["missing_image"]


def test_shard_is_small_when_pickled(dataset, root):
    shard = dataset.shards(f"{root}/plans", 10)[1]
    encoded = pickle.dumps(shard)
    assert len(encoded) < 1000
    assert list(pickle.loads(encoded).rows()) == list(shard.rows())


def test_plan_is_used_again_without_reading_the_annotation(dataset, root, monkeypatch):
    write(root, {"val2017/extra.jpg": b"x"})
    first = dataset.shards(f"{root}/plans", 10)
    monkeypatch.setattr(plan_builder.PlanBuilder, "__init__", None)
    again = dataset.shards(f"{root}/plans", 10)
    assert again == first
    assert plan_counters(again) == {"unlisted_images": 1}


def test_plan_made_otherwise_is_made_again(dataset, root):
    dataset.shards(f"{root}/plans", 10)
    shards = dataset.shards(f"{root}/plans", 20)
    assert [len(list(shard.rows())) for shard in shards] == [20, 5]


def test_damaged_plan_is_made_again(dataset, root):
    dataset.shards(f"{root}/plans", 10)
    write(root, {"plans/annotations__captions_val2017.arrow": b"ARROW1\0\0 cut off"})
    assert [len(list(shard.rows())) for shard in dataset.shards(f"{root}/plans", 10)] == [10, 10, 5]


def test_two_annotations_have_two_plans(root):
    for split in ("train2017", "val2017"):
        write(root, {f"annotations/captions_{split}.json": coco(2), f"{split}/0000.jpg": split.encode()})
        write(root, {f"{split}/0001.jpg": split.encode()})
    urls = tuple(f"{root}/annotations/captions_{split}.json" for split in ("train2017", "val2017"))
    shards = CocoSource(urls, root).shards(f"{root}/plans", 10)
    assert [(shard.name, [row.image for row in shard.rows()]) for shard in shards] == [
        ("annotations__captions_train2017-00000", [b"train2017"] * 2),
        ("annotations__captions_val2017-00000", [b"val2017"] * 2),
    ]


def test_inputs_are_the_annotations_with_their_digests(dataset, root):
    [before] = dataset.inputs()
    assert before == InputFile("annotations/captions_val2017.json", before.size_bytes, before.sha256)
    assert len(before.sha256) == 64
    write(root, {"annotations/captions_val2017.json": coco(24)})
    assert dataset.inputs() != [before]


def test_annotation_that_is_gone_is_an_input_error(dataset, root):
    fs, path = fsspec.core.url_to_fs(f"{root}/annotations/captions_val2017.json")
    fs.rm(path)
    with pytest.raises(InputError, match="is not there"):
        dataset.inputs()
    with pytest.raises(InputError, match="is not there"):
        dataset.shards(f"{root}/plans", 10)


def test_images_that_cannot_be_found_say_where_they_were_looked_for(root):
    write(root, {"annotations/captions_val2017.json": coco(1)})
    with pytest.raises(InputError, match=r"(?s)val2017.*images/val2017.*--images"):
        CocoSource((f"{root}/annotations/captions_val2017.json",), root).shards(f"{root}/plans", 10)


def test_images_option_that_is_not_there(dataset, root):
    source = CocoSource(dataset.annotations, root, f"{root}/nowhere")
    with pytest.raises(InputError, match=r"--images .*nowhere is neither"):
        source.shards(f"{root}/plans", 10)


def test_images_option_may_be_the_folder_above(dataset, root):
    source = CocoSource(dataset.annotations, root, root)
    assert source.find_images(dataset.annotations[0]).endswith("/val2017")


def test_wrong_folder_is_an_error_and_not_a_reject_a_row(dataset, root):
    write(root, {"other/photo.jpg": b"x"})
    with pytest.raises(InputError, match=r"None of the 25 images .* --images"):
        CocoSource(dataset.annotations, root, f"{root}/other").shards(f"{root}/plans", 10)


def test_zero_bytes_are_a_row(dataset, root):
    write(root, {"val2017/0007.jpg": b""})
    [shard] = dataset.shards(f"{root}/plans", 100)
    assert list(shard.rows())[7].image == b""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "may not be read: this user lacks the right"),
        (PermissionError("Access Denied"), "may not be read: this user lacks the right"),  # s3fs
        (OSError("Forbidden: b/o\nno access"), "may not be read: this user lacks the right"),  # gcsfs
        (IsADirectoryError(errno.EISDIR, "Is a directory"), "cannot be read: Is a directory"),
        (OSError(errno.ELOOP, "loop"), "cannot be read: Too many levels of symbolic links"),
        (OSError(errno.ENAMETOOLONG, "long"), "cannot be read: File name too long"),
        (NotADirectoryError(errno.ENOTDIR, "x"), "is gone since the job was planned"),
        (TimeoutError(errno.ETIMEDOUT, "no answer"), None),
        (OSError(errno.EIO, "Input/output error"), None),
        (OSError(errno.ESTALE, "Stale file handle"), None),
        (ConnectionResetError(errno.ECONNRESET, "reset"), None),
    ],
)
@pytest.mark.parametrize("all_of_them", [False, True])
def test_error_of_a_file_is_a_reject_and_one_of_the_store_ends_the_job(
    tmp_path, monkeypatch, error, message, all_of_them
):
    write(tmp_path, {"captions_a.json": coco(3), **{f"a/{i:04d}.jpg": b"x" for i in range(3)}})
    [shard] = CocoSource((f"{tmp_path}/captions_a.json",), str(tmp_path)).shards(f"{tmp_path}/plans", 10)
    read = LocalFileSystem.cat_file

    def fail(self, path, *args, **kwargs):
        if all_of_them or path.endswith("0001.jpg"):
            raise error
        return read(self, path, *args, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "cat_file", fail)
    if message is None or all_of_them:
        with pytest.raises(InputError, match="cannot be read" if message is None else "3 in a row"):
            list(shard.rows())
    else:
        records = list(shard.rows())
        assert [type(record) for record in records] == [Row, Reject, Row]
        assert records[1].message == f"0001.jpg {message}"


def test_link_to_itself_is_no_file_and_the_others_are_listed(tmp_path):
    write(tmp_path, {"captions_a.json": coco(2), "a/0000.jpg": b"x"})
    (tmp_path / "a" / "0001.jpg").symlink_to("0001.jpg")
    [shard] = CocoSource((f"{tmp_path}/captions_a.json",), str(tmp_path)).shards(f"{tmp_path}/plans", 10)
    assert [type(record) for record in shard.rows()] == [Row, Reject]


def test_metadata_columns_are_strings_or_null(root):
    entry = {
        "id": 7,
        "file_name": "a.jpg",
        "license": 3,
        "tags": ["x"],
        "coco_url": "http://é",
        "nothing": None,
    }
    write(root, {"captions_v.json": {"images": [entry], "annotations": []}, "v/a.jpg": b"x"})
    columns = ("license", "tags", "coco_url", "nothing", "id")
    source = CocoSource((f"{root}/captions_v.json",), root, metadata_columns=columns)
    [row] = source.shards(f"{root}/plans", 10)[0].rows()
    assert row.metadata == dict(zip(columns, ("3", '["x"]', "http://é", None, "7"), strict=True))
    source = CocoSource((f"{root}/captions_v.json",), root, metadata_columns=("id", "nope"))
    with pytest.raises(OptionError, match=r"--metadata_columns nope: .* They have id, file_name"):
        source.shards(f"{root}/plans", 10)


def test_rejects_have_null_metadata_in_the_plan(root):
    data = coco(2)
    data["annotations"].append({"image_id": 99, "caption": "x"})
    write(root, {"captions_v.json": data, "v/0000.jpg": b"x", "v/0001.jpg": b"x"})
    source = CocoSource((f"{root}/captions_v.json",), root, metadata_columns=("id",))
    records = list(source.shards(f"{root}/plans", 10)[0].rows())
    assert [type(record) for record in records] == [Row, Row, Reject]


def test_full_temporary_folder_is_an_output_error(dataset, root, monkeypatch):
    monkeypatch.setattr(plan_builder, "_SETTINGS", plan_builder._SETTINGS + "PRAGMA max_page_count=6;")
    with pytest.raises(OutputError, match=r"database or disk is full.*TMPDIR"):
        dataset.shards(f"{root}/plans", 10)


def test_plan_folder_that_cannot_be_written(tmp_path):
    write(tmp_path, {"captions_a.json": coco(1), "a/0000.jpg": b"x", "plans": b"a file"})
    with pytest.raises(OutputError, match="cannot be written"):
        CocoSource((f"{tmp_path}/captions_a.json",), str(tmp_path)).shards(f"{tmp_path}/plans", 10)


@pytest.mark.parametrize(
    ("url", "root", "name"),
    [
        ("/data/coco/a.json", "/data/coco", "a.json"),
        ("/data/coco/a/b.json", "/data/coco/", "a/b.json"),
        ("/data/other/a.json", "/data/coco", "a.json"),
        ("/data/coconut/a.json", "/data/coco", "a.json"),
        ("/data/coco", "/data/coco", ""),
        ("memory://x/y.json", "memory://x", "y.json"),
    ],
)
def test_relative_name(url, root, name):
    assert relative_name(url, root) == name
