import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple

import fsspec
import huggingface_hub
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from diptych.models.errors import ModelError
from diptych.models.files import cache
from diptych.models.files.cache import fetch, is_model_file, to_local_path

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def remote():
    fs = fsspec.filesystem("memory")
    yield fs
    with_files = fs.find("/model")
    for path in with_files:
        fs.rm_file(path)


def put(fs, files):
    for name, data in files.items():
        fs.pipe_file(f"/model/{name}", data)


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_folder_comes_with_what_a_model_is_made_of(root, remote):
    wanted = {
        "config.json": b"{}",
        "model.safetensors": b"x" * 100,
        "1_Pooling/config.json": b"{}",
        "vocab.txt": b"",
    }
    unwanted = ["pytorch_model.bin", "a.pt", "b.pkl", "README.md", ".hidden.json", "onnx/model.json"]
    unwanted += ["curve.png", "checkpoint/checkpoint.safetensors", "_tmp/a.json", "tf_model.h5"]
    put(remote, {**wanted, **dict.fromkeys(unwanted, b"no")})
    found = fetch("memory://model")
    assert {name: (found / name).read_bytes() for name in names(found)} == wanted
    assert found.is_relative_to(root)


def test_it_is_fetched_once_and_again_when_it_changes(root, remote, monkeypatch):
    put(remote, {"config.json": b"{}"})
    first = fetch("memory://model")
    fetched = []
    get_file = MemoryFileSystem.get_file
    monkeypatch.setattr(
        MemoryFileSystem, "get_file", lambda self, *args: (fetched.append(args[0]), get_file(self, *args))
    )
    assert fetch("memory://model") == first
    assert fetched == []
    put(remote, {"config.json": b'{"a": 1}'})
    second = fetch("memory://model")
    assert (second / "config.json").read_bytes() == b'{"a": 1}'
    assert (first / "config.json").read_bytes() == b"{}"
    assert len(fetched) == 1


def test_a_file_of_the_same_size_that_was_replaced_is_fetched_anew(root, remote):
    put(remote, {"config.json": b"1"})
    assert (fetch("memory://model") / "config.json").read_bytes() == b"1"
    time.sleep(0.01)
    put(remote, {"config.json": b"2"})
    assert (fetch("memory://model") / "config.json").read_bytes() == b"2"


def test_a_file_comes_with_its_arrays(root, remote):
    files = {"w.kv": b"1", "w.kv.vectors.npy": b"2", "w.kv.txt": b"no", "other.npy": b"no", "w2.kv": b"no"}
    put(remote, files)
    found = fetch("memory://model/w.kv")
    assert found.name == "w.kv"
    assert names(found.parent) == ["w.kv", "w.kv.vectors.npy"]


def test_what_is_not_there(root):
    with pytest.raises(ModelError, match="memory://nothing/here is not there"):
        fetch("memory://nothing/here")
    with pytest.raises(ModelError, match=r"nosuch://x cannot be read.*[Pp]rotocol"):
        fetch("nosuch://x")


def test_a_pickle_is_not_fetched(root, remote):
    put(remote, {"weights.pt": b"x", "pytorch_model.bin": b"x"})
    with pytest.raises(ModelError, match="pickle"):
        fetch("memory://model/weights.pt")
    with pytest.raises(ModelError, match=r"no file of a model.*safetensors"):
        fetch("memory://model")
    assert not root.exists()


def test_too_little_space_is_said_before_anything_is_fetched(root, remote, monkeypatch):
    put(remote, {"model.safetensors": b"x" * 3_000_000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(9, 9, 1_000_000))
    monkeypatch.setattr(MemoryFileSystem, "get_file", None)
    with pytest.raises(ModelError) as raised:
        fetch("memory://model")
    for part in (str(root), "3.0 MB are needed", "1.0 MB are free", "DIPTYCH_CACHE"):
        assert part in str(raised.value)
    assert names(root) == [path for path in names(root) if path.endswith(".lock")]


def test_a_disk_that_fills_up_leaves_nothing_behind(root, remote, monkeypatch):
    put(remote, {"a.json": b"1", "b.json": b"2"})
    get_file = MemoryFileSystem.get_file

    def fail(self, source, target):
        if source.endswith("b.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        get_file(self, source, target)

    monkeypatch.setattr(MemoryFileSystem, "get_file", fail)
    with pytest.raises(ModelError, match=r"No space left.*DIPTYCH_CACHE"):
        fetch("memory://model")
    assert not [path for path in root.iterdir() if path.is_dir()]
    monkeypatch.undo()


def test_a_cache_that_may_not_be_written(tmp_path, remote, monkeypatch):
    put(remote, {"config.json": b"{}"})
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match=r"file/cache cannot be written.*DIPTYCH_CACHE"):
        fetch("memory://model")


def test_a_store_that_fails_midway_leaves_nothing_behind(root, remote, monkeypatch):
    put(remote, {"config.json": b"{}"})

    def fail(self, source, target):
        raise ConnectionResetError("the line\nwent dead")

    monkeypatch.setattr(MemoryFileSystem, "get_file", fail)
    with pytest.raises(ModelError, match="the line went dead"):
        fetch("memory://model")
    assert not [path for path in root.iterdir() if path.is_dir()]


def test_a_file_that_is_cut_short_is_not_taken(root, remote, monkeypatch):
    put(remote, {"config.json": b"whole"})

    def cut(self, source, target):
        with open(target, "wb") as file:
            file.write(b"wh")

    monkeypatch.setattr(MemoryFileSystem, "get_file", cut)
    with pytest.raises(ModelError, match=r"2 bytes, 5 were announced"):
        fetch("memory://model")
    monkeypatch.undo()
    monkeypatch.setenv("DIPTYCH_CACHE", str(root))
    assert (fetch("memory://model") / "config.json").read_bytes() == b"whole"


def test_two_threads_at_once_fetch_once(root, remote, monkeypatch):
    put(remote, {"config.json": b"{}"})
    fetched, found = [], []
    get_file = MemoryFileSystem.get_file

    def slow(self, source, target):
        fetched.append(source)
        time.sleep(0.05)
        get_file(self, source, target)

    monkeypatch.setattr(MemoryFileSystem, "get_file", slow)
    threads = [threading.Thread(target=lambda: found.append(fetch("memory://model"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(fetched), len(set(found)), len(found)) == (1, 1, 4)


def test_without_locks_the_first_to_finish_wins(root, remote, monkeypatch):
    put(remote, {"config.json": b"{}"})

    def other_process(self, source, target):
        with open(target, "wb") as file:
            file.write(b"{}")
        key = os.path.basename(os.path.dirname(target))[1:17]
        (root / key).mkdir()
        (root / key / "config.json").write_bytes(b"{}")

    monkeypatch.setattr(MemoryFileSystem, "get_file", other_process)
    assert (fetch("memory://model") / "config.json").read_bytes() == b"{}"
    assert len([path for path in root.iterdir() if path.is_dir()]) == 1


def test_what_a_killed_process_left_is_removed(root, remote):
    old, new = root / ".0123-abc.part", root / ".4567-def.part"
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (1, 1))
    put(remote, {"config.json": b"{}"})
    fetch("memory://model")
    assert (old.exists(), new.exists()) == (False, True)


def test_processes_of_one_machine_share_the_cache(root, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    url = f"local://{tmp_path}/model"
    code = f"from diptych.models.files.cache import fetch; print(fetch({url!r}))"
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    outputs = {run.communicate(timeout=60)[0] for run in runs}
    assert [run.returncode for run in runs] == [0, 0, 0]
    (output,) = outputs
    assert os.listdir(output.strip()) == ["config.json"]


def test_google_cloud_storage(root, gcs):
    fs = fsspec.filesystem("gs")
    fs.pipe_file(f"{gcs.url}/m/config.json", b"{}")
    fs.pipe_file(f"{gcs.url}/m/1_Pooling/config.json", b"[]")
    found = fetch(f"{gcs.url}/m")
    assert names(found) == ["1_Pooling/config.json", "config.json"]
    fs.pipe_file(f"{gcs.url}/m/config.json", b"{1")
    assert (fetch(f"{gcs.url}/m/config.json")).read_bytes() == b"{1"
    with pytest.raises(ModelError, match="is not there"):
        fetch(f"{gcs.url}/none")


def test_the_default_folder(monkeypatch):
    monkeypatch.delenv("DIPTYCH_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(cache.cache_folder()) == "/home/someone/.cache/diptych/models"


def test_which_files_are_a_models():
    assert is_model_file("a/b.safetensors")
    assert not any(map(is_model_file, ["a.bin", "checkpoint.safetensors", ".a/b.json", "openvino/b.json"]))


class TestToLocalPath:
    def test_what_is_local_stays_where_it_is(self, tmp_path, monkeypatch):
        file = tmp_path / "w.kv"
        file.write_text("")
        assert to_local_path(str(tmp_path)) == tmp_path
        assert to_local_path(str(file)) == file
        assert to_local_path(f"file://{tmp_path}") == tmp_path
        monkeypatch.setenv("HOME", str(tmp_path))
        assert to_local_path("~/w.kv") == file

    def test_a_url_is_fetched(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path))
        monkeypatch.setattr("diptych.models.files.cache.fetch", lambda url: tmp_path / url.replace("/", "_"))
        assert to_local_path("gs://b/m") == tmp_path / "gs:__b_m"

    @pytest.mark.parametrize("location", ["", "/no/such/place", "./x", "org/name", "file:///no/such/place"])
    def test_nothing_there(self, location):
        with pytest.raises(ModelError, match="There is no model at"):
            to_local_path(location)

    def test_the_hub_is_asked_only_for_what_can_be_a_name_there(self):
        for location in ("/no/such/place", "./x", "a/b/c", "a b"):
            with pytest.raises(ModelError, match=r"There is no model at.*Hugging Face hub"):
                to_local_path(location, hub=True)

    def test_a_local_folder_goes_before_the_hub(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "org" / "name").mkdir(parents=True)
        assert to_local_path("org/name", hub=True).resolve() == tmp_path / "org" / "name"

    def test_the_hub_is_asked_for_no_pickles(self, tmp_path, monkeypatch):
        asked = {}

        def download(name, allow_patterns, ignore_patterns):
            asked.update(name=name, allow=allow_patterns, ignore=ignore_patterns)
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        assert to_local_path("org/name", hub=True) == tmp_path
        taken = huggingface_hub.utils.filter_repo_objects(
            [
                "config.json",
                "model.safetensors",
                "pytorch_model.bin",
                "a.pt",
                "onnx/config.json",
                "tokenizer.model",
            ],
            allow_patterns=asked["allow"],
            ignore_patterns=asked["ignore"],
        )
        assert list(taken) == ["config.json", "model.safetensors", "tokenizer.model"]

    def test_a_full_disk_under_the_hubs_cache(self, monkeypatch):
        def download(*args, **kwargs):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        with pytest.raises(ModelError, match=r"No space left.*HF_HUB_CACHE"):
            to_local_path("org/name", hub=True)

    @pytest.mark.parametrize("variable", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
    def test_no_network_is_one_clear_error(self, tmp_path, variable):
        code = "from diptych.models.files.cache import to_local_path; to_local_path('org/name', hub=True)"
        env = {**os.environ, "HF_HOME": str(tmp_path), **variable}
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
            env.pop(name, None)
        run = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100
        )
        last = run.stderr.strip().splitlines()[-1]
        assert last.startswith(
            "diptych.models.errors.ModelError: There is no local model 'org/name', nor one from the"
        )
        assert "cannot be reached" in last
