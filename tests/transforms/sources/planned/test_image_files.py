import os
import pickle
import random
import uuid

import fsspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from diptych.transforms.errors import InputError
from diptych.transforms.sources.base import Row
from diptych.transforms.sources.planned.image_files import FilesSource


@pytest.fixture(params=["local", "file", "memory", "gcs"])
def root(request, tmp_path):
    if request.param == "gcs":
        return f"{request.getfixturevalue('gcs').url}/in"
    local = str(tmp_path / "in")
    return {"local": local, "file": f"file://{local}", "memory": f"memory://{uuid.uuid4().hex}"}[
        request.param
    ]


def write(root, names):
    for name in names:
        fs, folder = fsspec.core.url_to_fs(str(root))  # a `::` in the name is no chain of file systems
        path = f"{folder}/{name}"
        fs.makedirs(fs._parent(path), exist_ok=True)
        with fs.open(path, "wb") as file:
            file.write(name.encode())


def read(source, plans, rows_per_shard=10):
    return [record for shard in source.shards(f"{plans}/plans", rows_per_shard) for record in shard.rows()]


def test_folder_gives_images_by_extension_at_any_depth(root, tmp_path):
    images = ["b.JPG", "a.jpeg", "sub/deep/c.png", "sub/d.webp", "e.gif", "f.bmp", "g.tif", "h.tiff"]
    write(root, [*images, "README.md", "notes.txt", "jpg", "sub/x.json"])
    records = read(FilesSource((root,), root), tmp_path)
    assert [(record.path, record.source, record.row, record.image) for record in records] == [
        (os.path.basename(name), name, row, name.encode()) for row, name in enumerate(sorted(images))
    ]
    assert [record.key for record in records] == [name.rpartition(".")[0] for name in sorted(images)]
    assert all(record.captions == [] and record.metadata == {} for record in records)


def test_order_does_not_depend_on_the_listing(tmp_path):
    names = [f"{name}.jpg" for name in ["a", "B", "ä", "a-b", "a/b", "10", "9", "日本", "𝔸"]]
    orders = []
    for seed in range(3):
        root = tmp_path / str(seed)
        random.Random(seed).shuffle(names)
        write(root, names)
        orders.append([record.key for record in read(FilesSource((str(root),), str(root)), root)])
    assert orders[0] == orders[1] == orders[2]
    assert orders[0] == sorted((name[:-4] for name in names), key=lambda key: f"{key}.jpg".encode())


def test_glob_and_named_files_are_taken_whatever_they_are_called(root, tmp_path):
    write(root, ["a.jpg", "b.dat", "sub/c", "sub/d.jpg"])
    source = FilesSource((f"{root}/*", f"{root}/sub/c", f"{root}/a.jpg"), root)
    assert [record.key for record in read(source, tmp_path)] == ["a", "b", "sub/c"]


def test_file_that_is_named_twice_is_one_row(root, tmp_path):
    write(root, ["sub/a.jpg", "sub/b.jpg"])
    source = FilesSource((root, f"{root}/sub", f"{root}/sub/a.jpg"), root)
    assert [record.key for record in read(source, tmp_path)] == ["sub/a", "sub/b"]


def test_key_has_the_extension_where_it_must(root, tmp_path):
    write(root, ["a.jpg", "a.png", "b.jpg", "c.jpg", "c.jpg.png"])
    assert [record.key for record in read(FilesSource((root,), root), tmp_path)] == [
        "a.jpg",
        "a.png",
        "b",
        "c",
        "c.jpg.png",
    ]


def test_name_may_look_like_a_glob(root, tmp_path):
    write(root, ["a[1].jpg", "a1.jpg", "x*.jpg", "[dir]/b.jpg"])
    keys = [record.key for record in read(FilesSource((f"{root}/a[1].jpg", f"{root}/[dir]"), root), tmp_path)]
    assert keys == ["[dir]/b", "a[1]"]


@pytest.mark.parametrize(
    ("urls", "shard"), [([""], "files"), (["/sub"], "sub"), (["/sub", "/a.jpg"], "files")]
)
def test_shards_are_named_after_the_folder(root, tmp_path, urls, shard):
    write(root, ["a.jpg", "sub/b.jpg", "sub/c.jpg"])
    source = FilesSource(tuple(root + url for url in urls), root)
    shards = source.shards(f"{tmp_path}/plans", 1)
    assert [s.name for s in shards] == [f"{shard}-0000{i}" for i in range(len(shards))]
    assert [s.size_bytes for s in shards] == [len(record.source) for s in shards for record in s.rows()]


def test_skip_and_pickle(root, tmp_path):
    write(root, [f"{i:02d}.jpg" for i in range(12)])
    [shard] = FilesSource((root,), root).shards(f"{tmp_path}/plans", 100)
    records = list(shard.rows())
    assert [list(pickle.loads(pickle.dumps(shard)).rows(skip)) for skip in range(13)] == [
        records[skip:] for skip in range(13)
    ]


def test_plan_is_used_again(root, tmp_path):
    write(root, ["a.jpg"])
    source = FilesSource((root,), root)
    before = source.shards(f"{tmp_path}/plans", 10)
    write(root, ["b.jpg"])
    assert source.shards(f"{tmp_path}/plans", 10) == before


def test_inputs_are_one_entry_that_changes_with_names_and_sizes(root):
    write(root, ["sub/a.jpg", "sub/bc.jpg"])
    source = FilesSource((f"{root}/sub",), root)
    [before] = source.inputs()
    assert (before.name, before.size_bytes, len(before.sha256)) == (
        "sub",
        len("sub/a.jpg") + len("sub/bc.jpg"),
        64,
    )
    assert source.inputs() == [before]
    write(root, ["sub/notes.txt"])
    assert source.inputs() == [before]
    write(root, ["sub/d.jpg"])
    assert source.inputs() != [before]


def test_nothing_to_read_is_an_input_error(root, tmp_path):
    write(root, ["notes.txt"])
    with pytest.raises(InputError, match="There is no image in"):
        read(FilesSource((root,), root), tmp_path)
    with pytest.raises(InputError, match="There is no image in"):
        read(FilesSource((f"{root}/*.jpg",), root), tmp_path)
    with pytest.raises(InputError, match=r"gone\.jpg is not there"):
        read(FilesSource((f"{root}/gone.jpg",), root), tmp_path)


def test_name_that_is_not_utf8_is_lost(tmp_path):
    root = tmp_path / "in"
    write(root, ["a.jpg"])
    with open(os.fsencode(root) + b"/caf\xe9.jpg", "wb") as file:
        file.write(b"x")
    good, bad = read(FilesSource((str(root),), str(root)), tmp_path)
    assert isinstance(good, Row) or isinstance(bad, Row)
    [lost] = [record for record in (good, bad) if not isinstance(record, Row)]
    assert (lost.key, lost.reason) == ("caf\\xe9.jpg", "missing_image")


names = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=8
)


@given(st.sets(names, min_size=1, max_size=20))
@example({"::", "a::b", "0::", "::0", "zip::file"})
def test_every_file_is_a_row_with_a_key_of_its_own(tmp_path_factory, stems):
    folder = tmp_path_factory.mktemp("files")
    extensions = (".jpg", ".png", ".jpg.png")
    files = [stem + extensions[i % 3] for i, stem in enumerate(sorted(stems))]
    write(folder / "in", files)
    root = f"file://{folder / 'in'}"  # as `open_source` gives it: a bare path with `::` is a chain of file systems
    records = read(FilesSource((root,), root), folder, 7)
    assert sorted(record.path for record in records) == sorted(files)
    assert len({record.key for record in records}) == len(files)
    assert [record.row for record in records] == list(range(len(files)))


def test_captions_beside_images_are_decoded_as_what_they_are(tmp_path):
    root = tmp_path / "in"
    write(root, ["a.jpg", "b.jpg", "c.jpg"])
    (root / "a.txt").write_bytes("une fête".encode("utf-16"))
    (root / "b.txt").write_bytes("Собака".encode("cp1251"))
    (root / "c.json").write_bytes('{"caption": "café"}'.encode("cp1252"))
    records = read(FilesSource((str(root),), str(root)), tmp_path)
    assert [record.captions for record in records] == [["une fête"], ["Собака"], ["café"]]
    assert [record.counters.get("captions_not_utf8") for record in records] == [None, 1, 1]
