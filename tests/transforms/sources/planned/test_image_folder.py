import asyncio
import concurrent.futures
import io
import os
import tarfile
import uuid
import zipfile

import fsspec
import pytest
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.local import LocalFileSystem

from diptych.transforms.errors import InputError
from diptych.transforms.sources.planned import image_folder
from diptych.transforms.sources.planned.coco import CocoSource
from diptych.transforms.sources.planned.image_folder import ImageFile
from diptych.transforms.sources.planned.plan import plan_counters

FILES = {f"deep/{i:03d} é.jpg": os.urandom(i * 37) for i in range(50)} | {"top.png": b"top", "empty.jpg": b""}


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        tar.add(os.path.dirname(path), "folder", recursive=False)
        for name, data in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_zip(path, files, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.mkdir("folder")
        for name, data in files.items():
            archive.writestr(name, data)


def write_streamed_zip(path, files):
    class Pipe(io.RawIOBase):
        """Cannot seek, so that sizes go behind the data."""

        def writable(self):
            return True

        def write(self, data):
            return file.write(data)

    with open(path, "wb") as file, zipfile.ZipFile(Pipe(), "w") as archive:
        for ordinal, (name, data) in enumerate(files.items()):
            method = zipfile.ZIP_STORED if ordinal % 2 else zipfile.ZIP_DEFLATED
            archive.writestr(zipfile.ZipInfo(name), data, method)


def write_folder(path, files):
    for name, data in files.items():
        target = os.path.join(path, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "wb") as file:
            file.write(data)


WRITERS = {
    "images": write_folder,
    "images.tar": write_tar,
    "images.zip": write_zip,
    "stored.zip": lambda path, files: write_zip(path, files, zipfile.ZIP_STORED),
    "streamed.zip": write_streamed_zip,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_container_gives_every_file(tmp_path, name):
    url = str(tmp_path / name)
    WRITERS[name](url, FILES)
    members = sorted(image_folder.members(url))
    assert [member.path for member in members] == sorted(FILES)
    wanted = members[::-3]
    assert list(image_folder.fetch(url, wanted)) == [FILES[member.path] for member in wanted]


@pytest.mark.parametrize("name", ["images", "images.tar", "images.zip"])
@pytest.mark.parametrize("store", ["memory", "gcs", "s3"])
def test_object_store(tmp_path, name, store, request):
    WRITERS[name](str(tmp_path / name), FILES)
    top = request.getfixturevalue(store).url if store != "memory" else f"memory://{uuid.uuid4().hex}"
    fs, path = fsspec.core.url_to_fs(top)
    fs.put(str(tmp_path / name), f"{path}/{name}", recursive=True)
    members = sorted(image_folder.members(f"{top}/{name}"))
    assert [member.path for member in members] == sorted(FILES)
    assert list(image_folder.fetch(f"{top}/{name}", members)) == [FILES[member.path] for member in members]


@pytest.mark.parametrize("name", ["images.tar", "images.zip"])
def test_archives_are_read_from_many_threads(tmp_path, name):
    url = str(tmp_path / name)
    WRITERS[name](url, FILES)
    members = list(image_folder.members(url)) * 20
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda member: next(image_folder.fetch(url, [member])), members))
    assert results == [FILES[member.path] for member in members]


class Slow(AsyncFileSystemWrapper):
    """Local files as a store that answers late, one of them very late; counts what is asked for at a time."""

    def __init__(self, late: str = "") -> None:
        super().__init__(LocalFileSystem(), asynchronous=False)
        self._cat_file = self.answer  # over what it was given of the local files
        self.late = late
        self.asked = self.most = self.total = 0
        self.before_late = None

    async def answer(self, path, start=None, end=None, **kwargs):
        self.asked, self.total = self.asked + 1, self.total + 1
        self.most = max(self.most, self.asked)
        await asyncio.sleep(0.002)
        if self.late and self.late in path:
            await asyncio.sleep(0.3)
            self.before_late = self.total
        self.asked -= 1
        with open(path, "rb") as file:
            return file.read()[start:end]


@pytest.mark.parametrize("name", WRITERS)
def test_store_with_latency_is_asked_for_many_files_at_a_time(tmp_path, name, monkeypatch):
    url = str(tmp_path / name)
    WRITERS[name](url, FILES)
    members = sorted(image_folder.members(url))
    fs = Slow()
    monkeypatch.setattr(image_folder.storage, "locate", lambda url: (fs, url))
    assert list(image_folder.fetch(url, members)) == [FILES[member.path] for member in members]
    assert 4 < fs.most <= 32
    # of an empty one in an archive nothing needs to be asked for
    assert fs.total == len([member for member in members if member.offset is None or member.size_bytes])
    assert list(image_folder.fetch(str(tmp_path), [ImageFile("gone.jpg")])) == [
        image_folder.Absent("is gone since the job was planned")
    ]


def test_one_late_answer_does_not_hold_up_the_others(tmp_path, monkeypatch):
    write_folder(str(tmp_path), FILES)
    members = sorted(image_folder.members(str(tmp_path), sizes=True))
    fs = Slow(late=members[3].path)
    monkeypatch.setattr(image_folder.storage, "locate", lambda url: (fs, url))
    assert list(image_folder.fetch(str(tmp_path), members)) == [FILES[member.path] for member in members]
    assert fs.before_late == len(FILES)  # so few may all come before it


def test_archive_with_a_folder_inside_serves_an_annotation(tmp_path):
    write_zip(str(tmp_path / "val2017.zip"), {"val2017/1.jpg": b"one", "__MACOSX/val2017/._1.jpg": b"junk"})
    (tmp_path / "captions_val2017.json").write_text('{"images": [{"id": 1, "file_name": "1.jpg"}]}')
    source = CocoSource(
        (str(tmp_path / "captions_val2017.json"),), str(tmp_path), str(tmp_path / "val2017.zip")
    )
    [row] = source.shards(str(tmp_path / "plans"), 10)[0].rows()
    assert (row.image, row.path) == (b"one", "1.jpg")


def test_member_that_cannot_be_unpacked_is_a_lost_row(tmp_path):
    path = tmp_path / "images.zip"
    write_zip(str(path), {"1.jpg": b"one" * 100, "2.jpg": b"two" * 100})
    member = min(member for member in image_folder.members(str(path)))
    data = bytearray(path.read_bytes())
    start = member.offset + 30 + len("1.jpg")
    data[start : start + member.packed_bytes] = b"\xff" * member.packed_bytes
    path.write_bytes(data)
    (tmp_path / "captions.json").write_text(
        '{"images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}]}'
    )
    source = CocoSource((str(tmp_path / "captions.json"),), str(tmp_path), str(path))
    lost, row = source.shards(str(tmp_path / "plans"), 10)[0].rows()
    assert (lost.reason, lost.key) == ("record_corrupt", "1")
    assert lost.message.startswith("1.jpg: cannot be unpacked (Error")
    assert row.image == b"two" * 100


@pytest.mark.parametrize("name", ["images.tar", "images.zip"])
def test_archive_that_is_cut_off_is_an_input_error(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](str(path), FILES)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(InputError, match="cut off"):
        list(image_folder.members(str(path)))


@pytest.mark.parametrize(
    "name", ["images.tar.gz", "images.tgz", "images.tar.zst", "images.tbz2", "images.tar.lz4"]
)
def test_compressed_tar_is_an_input_error(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match="compressed tar"):
        list(image_folder.members(str(tmp_path / name)))


def test_zip_that_nobody_can_unpack_is_an_input_error(tmp_path):
    path = tmp_path / "images.zip"
    write_zip(str(path), {"1.jpg": b"one", "2.jpg": b"two"})
    data = bytearray(path.read_bytes())
    for start in (at for at in range(len(data)) if data[at : at + 4] == b"PK\x01\x02"):
        data[start + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"'1.jpg', like all others in it, is encrypted"):
        list(image_folder.members(str(path)))


@pytest.mark.parametrize("name", ["images.tar", "images.zip"])
def test_links_in_an_archive_are_followed(tmp_path, name):
    path = str(tmp_path / name)
    links = {"b.jpg": "d/a.jpg", "d/c.jpg": "../b.jpg", "loop.jpg": "loop.jpg", "gone.jpg": "/etc/passwd"}
    if name.endswith("tar"):
        with tarfile.open(path, "w") as archive:
            for link, target in links.items():
                info = tarfile.TarInfo(link)
                info.type, info.linkname = tarfile.SYMTYPE, target
                archive.addfile(info)
            for name, data in (("./d/a.jpg", b"a"), ("d/h.jpg", b"")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                if not data:
                    info.type, info.linkname = tarfile.LNKTYPE, "d/a.jpg"
                archive.addfile(info, io.BytesIO(data))
        links["d/h.jpg"] = "d/a.jpg"
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for link, target in links.items():
                info = zipfile.ZipInfo(link)
                info.create_system, info.external_attr = 3, 0o120777 << 16
                archive.writestr(info, target)
            archive.writestr("d/a.jpg", b"a")
    members = sorted(image_folder.members(path))
    assert [member.path for member in members] == sorted(
        {"b.jpg", "d/a.jpg", "d/c.jpg", *links} - {"loop.jpg", "gone.jpg"}
    )
    assert set(image_folder.fetch(path, members)) == {b"a"}


@pytest.mark.parametrize("name", ["images", "images.tar", "images.zip"])
def test_a_file_that_is_too_large_costs_its_row(tmp_path, name, monkeypatch):
    path = str(tmp_path / name)
    WRITERS[name](path, {"a.jpg": b"a" * 99, "b.jpg": bytes(1_000_000), "c.jpg": b"c"})
    monkeypatch.setattr(image_folder, "MAX_IMAGE_BYTES", 500_000)
    first, second, third = image_folder.fetch(path, sorted(image_folder.members(path)))
    assert (first, third) == (b"a" * 99, b"c")
    assert "500000" in second.message


@pytest.mark.parametrize("name", ["images.tar", "images.zip"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_last_of_two_files_of_one_path_counts(tmp_path, name):
    path = str(tmp_path / name)
    if name.endswith("tar"):
        with tarfile.open(path, "w") as archive:
            for data in (b"first", b"last"):
                info = tarfile.TarInfo("1.jpg")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("1.jpg", b"first")
            archive.writestr("1.jpg", b"last")
    (tmp_path / "captions.json").write_text('{"images": [{"id": 1, "file_name": "1.jpg"}]}')
    shards = CocoSource((str(tmp_path / "captions.json"),), str(tmp_path), path).shards(
        str(tmp_path / "plans"), 10
    )
    [row] = shards[0].rows()
    assert row.image == b"last"
    assert plan_counters(shards) == {"repeated_files": 1}


def test_a_tar_whose_size_goes_back_is_an_input_error(tmp_path):
    """The standard library reads such a tar for ever (CVE-2025-8194)."""
    path = tmp_path / "images.tar"
    write_tar(str(path), {"a.jpg": b"a", "b.jpg": b"b"})
    data = bytearray(path.read_bytes())
    start = data.index(b"./b.jpg")
    data[start + 124 : start + 136] = (-1024).to_bytes(12, "big", signed=True)
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)
    with pytest.raises(InputError, match="cut off"):
        list(image_folder.members(str(path)))


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_folder(str(tmp_path / "real"), {"a.jpg": b"a"})
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "folder").symlink_to(tmp_path / "real")
    (tmp_path / "images" / "up").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "file.jpg").symlink_to(tmp_path / "real" / "a.jpg")
    (tmp_path / "images" / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    found = sorted(image_folder.members(str(tmp_path / "images"), sizes=True))
    # of a link that leads nowhere its reader will say so
    assert found == [ImageFile("dangling.jpg", 0), ImageFile("file.jpg", 1), ImageFile("folder/a.jpg", 1)]


@pytest.mark.parametrize("name", ["images", "images.tar"])
def test_what_is_not_there_is_an_input_error(tmp_path, name):
    with pytest.raises(InputError, match="is not there"):
        list(image_folder.members(str(tmp_path / name)))
