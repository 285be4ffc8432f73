import asyncio
import contextlib
import errno
import http.server
import io
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from kills import files_in

from diptych.transforms import storage
from diptych.transforms.errors import InputError, MissingInputError, OutputError
from diptych.transforms.storage import (
    delete,
    entry_type,
    exists,
    input_errors,
    is_absence,
    join,
    locate,
    output_errors,
    put_whole,
    write_whole,
)


class Killed(BaseException):
    """Stands for the end of the process: from here on, nothing may change on disk."""


class StuckUploads(AsyncFileSystem):
    """A store that stops taking in the first few uploads."""

    protocol = "gs"
    cachable = False

    def __init__(self, stuck: int) -> None:
        super().__init__()
        self.stuck, self.files = stuck, {}

    async def _put_file(self, local, path, **kwargs):
        await self._pipe_file(path, Path(local).read_bytes())

    async def _pipe_file(self, path, value, **kwargs):
        self.stuck -= 1
        if self.stuck >= 0:
            await asyncio.sleep(60)
        self.files[path] = value


class TestLocate:
    def test_urls_and_paths_are_the_same_file(self, tmp_path):
        path = str(tmp_path / "a b" / "ü.txt")
        assert locate(path)[1] == locate(f"file://{path}")[1] == path

    @pytest.mark.parametrize("url", ["nowhere://a/b", "zip://a::missing.zip"])
    def test_what_cannot_be_opened_is_named(self, url):
        with pytest.raises(InputError, match="cannot be opened"):
            locate(url)

    def test_join_takes_a_trailing_slash(self):
        assert join("gs://b/a/", "images", "x") == join("gs://b/a", "images", "x") == "gs://b/a/images/x"


class StoreError(Exception):
    """As gcsfs has them: neither an OSError nor anything else that is built in."""


StoreError.__module__ = "gcsfs.retry"


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (FileNotFoundError(errno.ENOENT, "x"), "a/b is not there"),
            (NotADirectoryError(errno.ENOTDIR, "x"), "a/b is not there"),
            (
                PermissionError(errno.EACCES, "Permission denied"),
                r"a/b may not be read \(Permission denied\)",
            ),
            (OSError(errno.EIO, "Input/output error"), "a/b cannot be read: Input/output error"),
            (StoreError("two\nlines"), "a/b cannot be read: two lines"),
        ],
    )
    def test_an_input_is_named_with_what_is_wrong(self, error, message):
        with pytest.raises(InputError, match=message) as raised, input_errors("a/b"):
            raise error
        assert raised.value.__cause__ is error
        assert is_absence(raised.value) == message.endswith("is not there")

    @pytest.mark.parametrize(
        "error", [OSError("damaged data"), KeyError("a bug"), InputError("said already")]
    )
    def test_what_is_not_about_the_input_passes(self, error):
        with pytest.raises(type(error)) as raised, input_errors("a/b"):
            raise error
        assert raised.value is error

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (
                OSError(errno.ENOSPC, "No space left on device"),
                "a/b cannot be written: No space left on device",
            ),
            (OSError("quota"), "a/b cannot be written: quota"),
            (StoreError(""), "a/b cannot be written: StoreError"),
            (NotImplementedError(), "a/b cannot be written: NotImplementedError"),
        ],
    )
    def test_an_output_is_named_with_what_is_wrong(self, error, message):
        with pytest.raises(OutputError, match=message), output_errors("a/b"):
            raise error

    def test_a_bug_while_writing_stays_one(self):
        with pytest.raises(ZeroDivisionError), output_errors("a/b"):
            raise ZeroDivisionError


class TestWriteWhole:
    def test_writes_and_writes_over(self, tmp_path):
        write_whole(str(tmp_path / "out"), "deep/er/file", b"one")
        assert files_in(tmp_path / "out") == {"deep/er/file": b"one"}
        write_whole(f"file://{tmp_path}/out/", "deep/er/file", memoryview(b"other"))
        assert files_in(tmp_path / "out") == {"deep/er/file": b"other"}

    @pytest.mark.parametrize("event", ["open", "write", "fsync", "replace"])
    @pytest.mark.parametrize("before", [None, b"old"])
    def test_an_error_leaves_what_was_there(self, tmp_path, monkeypatch, event, before):
        if before:
            (tmp_path / "file").write_bytes(before)
        fail_at(monkeypatch, event, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(OutputError, match=f"{tmp_path}/file cannot be written: No space left"):
            write_whole(str(tmp_path), "file", b"new")
        monkeypatch.undo()
        assert files_in(tmp_path) == ({"file": before} if before else {})

    @pytest.mark.parametrize("event", ["open", "write", "fsync", "replace"])
    @pytest.mark.parametrize("before", [None, b"old"])
    def test_a_kill_leaves_what_was_there_or_the_whole_file(self, tmp_path, monkeypatch, event, before):
        if before:
            (tmp_path / "file").write_bytes(before)
        (tmp_path / "_tmp").mkdir()
        fail_at(monkeypatch, event, Killed())
        monkeypatch.setattr(storage.os, "remove", die)
        with pytest.raises(Killed):
            write_whole(str(tmp_path), "file", b"new")
        monkeypatch.undo()
        found = files_in(tmp_path)
        assert found.pop("file", None) == before
        assert all(name.startswith("_tmp/") for name in found)
        assert bool(found) == (event != "open")
        write_whole(str(tmp_path), "file", b"new")
        assert (tmp_path / "file").read_bytes() == b"new"

    def test_the_bytes_are_on_disk_before_their_name_is(self, tmp_path, monkeypatch):
        events = []
        sync, replace = os.fsync, os.replace
        monkeypatch.setattr(
            storage.os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd))
        )
        monkeypatch.setattr(storage.os, "replace", lambda a, b: (events.append((a, b)), replace(a, b)))
        write_whole(str(tmp_path), "rejects/image/file", b"new")
        temporary, path = next(event for event in events if isinstance(event, tuple))
        after_data = events[events.index(temporary) :]
        assert after_data == [temporary, (temporary, path), os.path.dirname(path)]
        # And each folder that was made is in the one above it
        assert {str(tmp_path), f"{tmp_path}/rejects"} <= set(events[: events.index(temporary)])

    def test_a_file_in_the_way_is_an_error(self, tmp_path):
        (tmp_path / "images").write_bytes(b"mine")
        with pytest.raises(OutputError, match="images/file cannot be written: Not a directory"):
            write_whole(str(tmp_path), "images/file", b"new")
        assert files_in(tmp_path) == {"images": b"mine"}

    def test_many_writers_of_one_name_leave_one_whole_file(self, tmp_path):
        contents = [bytes([number]) * 100_000 for number in range(8)]
        threads = [
            threading.Thread(target=write_whole, args=(str(tmp_path), "a/file", data)) for data in contents
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = files_in(tmp_path)
        assert set(found) == {"a/file"}
        assert found["a/file"] in contents

    def test_an_object_store_gets_one_upload(self, monkeypatch):
        fs = fsspec.filesystem("memory")
        uploads = []
        upload = fs.pipe_file
        monkeypatch.setattr(fs, "pipe_file", lambda path, data: (uploads.append(path), upload(path, data)))
        write_whole("memory://upload/out", "images/file", memoryview(b"data"))
        assert uploads == ["/upload/out/images/file"]
        assert fs.cat("memory://upload/out/images/file") == b"data"
        assert fs.find("/upload") == ["/upload/out/images/file"]
        delete("memory://upload", ["out"])

    @pytest.mark.parametrize("stuck", [2, 3])
    def test_an_upload_that_gets_stuck_is_begun_anew(self, stuck, monkeypatch):
        fs = StuckUploads(stuck)
        monkeypatch.setattr(storage, "open_store", lambda url: (fs, url))
        monkeypatch.setattr(storage, "UPLOAD_S", 0.05)
        if stuck == 3:
            with pytest.raises(
                OutputError, match=r"gs://b/file cannot be written: it took longer than .* 3 times"
            ):
                write_whole("gs://b", "file", b"data")
            assert fs.files == {}
        else:
            write_whole("gs://b", "file", b"data")
            assert fs.files == {"gs://b/file": b"data"}

    @pytest.mark.parametrize("stuck", [2, 3])
    def test_a_file_that_gets_stuck_is_begun_anew_as_well(self, stuck, monkeypatch, tmp_path):
        fs = StuckUploads(stuck)
        monkeypatch.setattr(storage, "open_store", lambda url: (fs, url))
        monkeypatch.setattr(storage, "UPLOAD_S", 0.05)
        (tmp_path / "file").write_bytes(b"data")
        is_stuck = pytest.raises(
            OutputError, match=r"gs://b/file cannot be written: it took longer than .* 3 times"
        )
        with is_stuck if stuck == 3 else contextlib.nullcontext():
            put_whole("gs://b/file", f"{tmp_path}/file")
        assert fs.files == ({} if stuck == 3 else {"gs://b/file": b"data"})

    def test_a_file_is_put_whole_on_a_disk(self, tmp_path):
        (tmp_path / "file").write_bytes(b"data")
        put_whole(f"{tmp_path}/a/b/file", f"{tmp_path}/file")
        assert [path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()] == [b"data"]

    def test_another_store_gets_a_temporary_file_and_a_rename(self, monkeypatch):
        class PlainFileSystem(MemoryFileSystem):
            protocol = "plain"
            store: dict[str, object] = {}  # noqa: RUF012  # as its base has it
            pseudo_dirs = [""]  # noqa: RUF012

            @classmethod
            def _strip_protocol(cls, path):
                return super()._strip_protocol(path.removeprefix("plain://"))

        fsspec.register_implementation("plain", PlainFileSystem, clobber=True)
        fs = fsspec.filesystem("plain")
        written = []
        put = fs.pipe_file

        def put_half(path, data):
            written.append(path)
            put(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(fs, "pipe_file", put_half)
        with pytest.raises(OutputError, match="No space left"):
            write_whole("plain://host/out", "images/file", b"data")
        assert written[0].startswith("/host/out/_tmp/")
        assert fs.find("/host") == []
        monkeypatch.undo()
        write_whole("plain://host/out", "images/file", b"data")
        assert {name: fs.cat(name) for name in fs.find("/host")} == {"/host/out/images/file": b"data"}


class TestDelete:
    def test_files_and_folders_go_what_is_not_there_does_not_matter(self, tmp_path):
        (tmp_path / "folder" / "deep").mkdir(parents=True)
        (tmp_path / "folder" / "deep" / "file").touch()
        (tmp_path / "file").touch()
        (tmp_path / "kept").touch()
        delete(str(tmp_path), ("folder", "missing", "file"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]

    def test_a_refusal_names_the_file(self, tmp_path, monkeypatch):
        (tmp_path / "file").touch()

        def refuse(path):
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "remove", refuse)
        with pytest.raises(OutputError, match="file cannot be written: Operation not permitted"):
            delete(str(tmp_path), ["file"])


def die(*_: object) -> None:
    raise Killed


def fail_at(monkeypatch: pytest.MonkeyPatch, event: str, error: BaseException) -> None:
    """Makes one step of writing a file fail; a write fails half way."""

    def fail(*_: object) -> None:
        raise error

    class HalfFile(io.FileIO):
        def write(self, data):
            super().write(bytes(data)[: len(data) // 2])
            raise error

    if event == "open":
        monkeypatch.setattr(storage, "open", fail, raising=False)
    elif event == "write":
        monkeypatch.setattr(storage, "open", HalfFile, raising=False)
    else:
        monkeypatch.setattr(storage.os, event, fail)


class TestHttp:
    """fsspec's client says that a file is not there whatever the server says, and where there is none."""

    @pytest.fixture
    def server(self) -> Iterator[str]:
        class Answers(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(int(self.path.strip("/")))
                self.end_headers()

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as served:
            threading.Thread(target=served.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{served.server_port}"
            served.shutdown()

    @pytest.mark.parametrize("status", [404, 410])
    def test_absence(self, server, status):
        fs, path = locate(f"{server}/{status}")
        assert exists(fs, path) is False
        with pytest.raises(MissingInputError), input_errors("x"):
            fs.info(path)

    @pytest.mark.parametrize("status", [401, 403, 407, 429, 500, 502, 503])
    def test_failure(self, server, status):
        url = f"{server}/{status}"
        for ask in (entry_type, lambda fs, path: fs.info(path)):
            with pytest.raises(InputError, match=f"cannot be read: {status}") as caught, input_errors(url):
                ask(*locate(url))
            assert not is_absence(caught.value)

    def test_nobody_answers(self):
        with socket.create_server(("127.0.0.1", 0)) as closed:
            url = f"http://127.0.0.1:{closed.getsockname()[1]}/a"
        with (
            pytest.raises(InputError, match="cannot be read: Connect call failed") as caught,
            input_errors(url),
        ):
            exists(*locate(url))
        assert not is_absence(caught.value)


@pytest.mark.parametrize("url", ["s3://KEY:SECRET@bucket/x", "gs://user@bucket/x", "s3a://a:b@c"])
def test_credentials_in_a_stores_url_are_refused_and_not_shown(url):
    with pytest.raises(InputError, match="credentials before an @") as caught:
        locate(url)
    assert "KEY" not in str(caught.value).partition(" was given")[0]
    assert "SECRET@" not in str(caught.value)
