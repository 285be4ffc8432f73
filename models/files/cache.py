"""Local copies of models that are elsewhere: fetched once, whole or not at all, and again when they change."""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
import posixpath
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import fsspec

from diptych.models.errors import ModelError, ModelOutageError, one_line
from diptych.models.files.object_stores import open_store

# The files of models, without pickles and the files of other frameworks (ONNX, OpenVINO, TensorFlow)
MODEL_SUFFIXES = (".json", ".txt", ".safetensors", ".model", ".jinja", ".npy", ".kv", ".vec", ".gz")
OTHER_FOLDERS = ("onnx", "openvino", "coreml", "checkpoint", "checkpoints")
PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_VERSION_KEYS = (
    "etag", "ETag", "md5Hash", "content_md5", "crc32c", "generation", "VersionId",
    "mtime", "created", "updated", "LastModified", "last_modified",
)  # fmt: skip
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_STALE_S = 86_400


@dataclasses.dataclass(frozen=True)
class _RemoteFile:
    path: str
    name: str  # below the model's folder
    size_bytes: int | None  # a web server may not say
    version: str


def cache_folder() -> Path:
    """Returns the folder of fetched models: `DIPTYCH_CACHE`, else `~/.cache/diptych/models`."""
    return Path(os.environ.get("DIPTYCH_CACHE") or "~/.cache/diptych/models").expanduser()


def to_local_path(location: str, hub: bool = False, download: Callable[[str], Any] | None = None) -> Path:
    """Returns the local path of a model, which is fetched first where it is elsewhere.

    Args:
        location: A local file or folder, an fsspec URL (`gs://`, `s3://`, …: fetched to the cache), or, with `hub`, a
            name on the Hugging Face hub.
        hub: The model may be on the Hugging Face hub.
        download: Fetches the model of a name from there and returns its local folder; None fetches every file that
            models are made of.

    Raises:
        ModelError: There is no such model, it is out of reach, or there is no room for it.
    """
    if location.startswith(("file://", "local://")):
        location = location.partition("://")[2]
    if "://" in location:
        return fetch(location)
    path = Path(location).expanduser()
    # `os.path.exists` rather than `Path.exists`, which raises where a name is too long for a path
    if location and os.path.exists(path):
        return path
    if hub and _HUB_NAME.fullmatch(location):
        return _fetch_from_hub(location, download or _download)
    expected = "a local file or folder, or a URL such as gs://BUCKET/FOLDER"
    expected += ", or a name on the Hugging Face hub" if hub else ""
    raise ModelError(f"There is no model at {location!r}. Expected {expected}: check the spelling.")


def _download(name: str) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(
        name,
        allow_patterns=[f"*{suffix}" for suffix in MODEL_SUFFIXES],
        ignore_patterns=[f"{folder}/*" for folder in OTHER_FOLDERS],
    )


def _fetch_from_hub(name: str, download: Callable[[str], Any]) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        folder = download(name)
    except GatedRepoError as error:
        why, remedy = (
            "the hub gives it only to those who agreed to its terms",
            "Agree there, and set HF_TOKEN",
        )
        raise _no_hub_model(name, why, remedy) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        why = "the hub knows no such model, or only for those with a token"
        raise _no_hub_model(name, why, "Check the spelling, or set HF_TOKEN") from error
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        why = "the hub cannot be reached, and there is no copy in the local cache"
        remedy = "Run again with a network (or without HF_HUB_OFFLINE), or give the folder of a model"
        raise _no_hub_model(name, why, remedy) from error
    except OSError as error:
        why = f"its cache {HF_HUB_CACHE} cannot be written ({error.strerror or error})"
        remedy = "Make room or give the right to write there, or name another folder with HF_HUB_CACHE"
        raise _no_hub_model(name, why, remedy) from error
    except (
        Exception
    ) as error:  # the hub's client has changed its HTTP library before, and with it these errors
        why = f"the hub cannot be reached ({one_line(error, with_type=True)})"
        raise _no_hub_model(name, why, "Run again with a network, or give the folder of a model") from error
    return Path(folder)


def _no_hub_model(name: str, why: str, remedy: str) -> ModelError:
    return ModelError(
        f"There is no local model {name!r}, nor one from the Hugging Face hub: {why}. {remedy}."
    )


def fetch(url: str) -> Path:
    """Returns a local copy of a file or folder on any fsspec file system.

    Of a folder only the files of models are fetched; with a file also the `.npy` files that gensim saved beside it. The
    copy's name depends on the URL and the files' checksums, sizes and times, so a replaced model is fetched again.

    Args:
        url: An fsspec URL.

    Raises:
        ModelError: It does not exist or cannot be read, or the cache is full or cannot be written.
    """
    try:
        fs, path = open_store(url)
        fs.invalidate_cache()
        is_folder = fs.info(path)["type"] == "directory"
        files = _list_folder(fs, path) if is_folder else _list_file(fs, path)
    except ModelError:
        raise
    except FileNotFoundError as error:
        raise ModelError(f"{url} is not there. Expected a model's file or folder: check the URL.") from error
    except Exception as error:  # each store raises its own
        raise ModelOutageError(
            f"{url} cannot be read: {one_line(error)}. Check its name and your rights to it."
        ) from error
    if not files:
        raise ModelError(
            f"{url} holds no file of a model (none of {', '.join(MODEL_SUFFIXES)}). Check the URL; weights that are "
            "pickles (.bin, .pt) must be converted to safetensors first."
        )
    name = posixpath.basename(path.rstrip("/"))
    listing = repr([(file.name, file.size_bytes, file.version) for file in files])
    key = hashlib.sha256(f"{url}\n{listing}".encode()).hexdigest()[:16]
    folder = cache_folder() / key
    with _locked(folder):
        if not folder.is_dir():
            _fetch_files(fs, url, files, folder)
    return folder if is_folder else folder / name


def _list_file(fs: fsspec.AbstractFileSystem, path: str) -> list[_RemoteFile]:
    if path.lower().endswith(PICKLE_SUFFIXES):
        raise ModelError(
            f"{path} is named as a pickle, which is not loaded: it could run anything. Use safetensors."
        )
    infos = [fs.info(path)]
    folder, name = posixpath.split(path)
    with contextlib.suppress(FileNotFoundError, NotImplementedError, PermissionError):
        for info in fs.ls(folder, detail=True):
            sibling = posixpath.basename(info["name"])
            if sibling.startswith(f"{name}.") and sibling.endswith(".npy"):
                infos.append(info)
    return sorted(
        (_remote_file(info, posixpath.basename(info["name"])) for info in infos), key=lambda file: file.name
    )


def _list_folder(fs: fsspec.AbstractFileSystem, path: str) -> list[_RemoteFile]:
    root = path.rstrip("/") + "/"
    files = []
    for file_path, info in sorted(fs.find(path, detail=True, on_error="raise").items()):
        name = file_path[file_path.index(root.lstrip("/")) + len(root.lstrip("/")) :]
        if is_model_file(name):
            files.append(_remote_file(info, name))
    return files


def is_model_file(name: str) -> bool:
    """Tells by a file's path in its folder whether it is part of the model: not hidden, a pickle or a checkpoint."""
    *folders, last = name.split("/")
    is_hidden = any(part.startswith((".", "_")) for part in (*folders, last))
    is_other = not {*folders}.isdisjoint(OTHER_FOLDERS) or last.startswith("checkpoint.")
    return last.lower().endswith(MODEL_SUFFIXES) and not is_hidden and not is_other


def _remote_file(info: dict[str, Any], name: str) -> _RemoteFile:
    version = "|".join(f"{key}={info[key]}" for key in _VERSION_KEYS if info.get(key) is not None)
    return _RemoteFile(info["name"], name, _size(info), version)


def _size(info: dict[str, Any]) -> int | None:
    return None if info.get("size") is None else int(info["size"])


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lets one process of this machine fetch at a time; the lock ends with its process."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = open(folder.parent / f".{folder.name}.lock", "w")  # noqa: SIM115
    except OSError as error:
        _refuse(folder.parent, 0, error)
    with file:
        # On a file system without locks both processes fetch, and one of the copies is kept
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_files(fs: fsspec.AbstractFileSystem, url: str, files: list[_RemoteFile], folder: Path) -> None:
    needed_bytes = sum(file.size_bytes or 0 for file in files)
    _remove_stale(folder.parent)
    if shutil.disk_usage(folder.parent).free < needed_bytes:
        _refuse(folder.parent, needed_bytes, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    partial = folder.parent / f".{folder.name}-{uuid.uuid4().hex}.part"
    try:
        for file in files:
            local = partial / file.name
            try:
                local.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                _refuse(folder.parent, needed_bytes, error)
            _fetch_file(fs, url, file, local, needed_bytes)
        with contextlib.suppress(FileExistsError, NotADirectoryError):
            _rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fetch_file(
    fs: fsspec.AbstractFileSystem, url: str, file: _RemoteFile, local: Path, needed_bytes: int
) -> None:
    try:
        fs.get_file(file.path, str(local))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            _refuse(cache_folder(), needed_bytes, error)
        raise ModelOutageError(
            f"{url} cannot be read at {file.name}: {one_line(error)}. Run again once the storage answers."
        ) from error
    size_bytes = local.stat().st_size
    if file.size_bytes is not None and size_bytes != file.size_bytes:
        raise ModelError(
            f"{url} changed while it was fetched: {file.name} has {size_bytes} bytes, {file.size_bytes} were "
            "announced. Run again once it is complete."
        )


def _rename(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError as error:
        # Another process may have been first, with the same files
        if not folder.is_dir():
            _refuse(folder.parent, 0, error)


def _remove_stale(root: Path) -> None:
    """Removes the partial copies of killed processes."""
    for partial in root.glob(".*.part"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > _STALE_S:
                shutil.rmtree(partial, ignore_errors=True)


def _refuse(root: Path, needed_bytes: int, error: OSError) -> NoReturn:
    there = root
    while not there.exists():
        there = there.parent
    free_mb = shutil.disk_usage(there).free / 1e6
    needs = f"{needed_bytes / 1e6:,.1f} MB are needed, " if needed_bytes else ""
    raise ModelError(
        f"The model cache {root} cannot be written: {error.strerror or error} ({needs}{free_mb:,.1f} MB are free). "
        "Make room or give the right to write there, or name another folder with the environment variable "
        "DIPTYCH_CACHE."
    ) from error
