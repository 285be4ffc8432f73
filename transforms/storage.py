"""Files anywhere: thin words over fsspec, with errors that say what to do."""

import asyncio
import contextlib
import errno
import json
import os
import pathlib
import posixpath
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import fsspec
from fsspec.asyn import sync
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.local import LocalFileSystem

from diptych.models.errors import one_line
from diptych.models.files.location import redacted
from diptych.models.files.object_stores import open_store
from diptych.transforms.errors import InputError, MissingInputError, OutputError

# Stores where one upload appears whole or not at all. A rename there is a copy and a delete: worse, not better.
_ATOMIC_UPLOAD = frozenset({"gs", "gcs", "s3", "s3a", "abfs", "abfss", "az", "memory"})
# Of one upload, with what its client tries again by itself; more where 256 kbit/s need longer
UPLOAD_S, _UPLOAD_BYTES_A_S = 300.0, 32 << 10
_UPLOADS = 3
_SCRATCH_TRIES = 5
_DELETE_TRIES = 20
# Packages whose errors are a store's answer (no rights, no credentials, no connection), though not OSErrors
_STORE_CLIENTS = frozenset(
    {"adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "requests"}
)


_CREDENTIALS = re.compile(r"(s3a?|gs|gcs)://[^/]*@", re.I)


def locate(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the file system of a URL or path, and the path in it.

    Raises:
        InputError: No file system is installed for the URL's protocol, or it cannot be opened.
    """
    if _CREDENTIALS.match(url):
        raise InputError(
            f"{redacted(url)} was given with credentials before an @, which a store's URL has no place for. Leave them "
            "out, and set the variables or the file that the store's client reads, such as AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY."
        )
    try:
        fs, path = open_store(url)
    except (ValueError, ImportError, OSError) as error:
        raise InputError(
            f"{url!r} cannot be opened: {error}. Expected a path or a URL of an installed fsspec file system."
        ) from error
    return fs, path


def relative_name(url: str, root: str) -> str:
    """Returns the path of a file below the input root, empty for the root; else its base name.

    It is the same for two URLs that differ in what gives access to the file alone, and does not hold it.
    """
    path, top = (redacted(locate(place)[1]).rstrip("/") for place in (url, root))
    if path == top:
        return ""
    return path.removeprefix(f"{top}/") if path.startswith(f"{top}/") else posixpath.basename(path)


def join(url: str, *names: str) -> str:
    """Returns the URL of a file below a folder."""
    return "/".join([url.rstrip("/"), *names])


@contextlib.contextmanager
def input_errors(url: str) -> Iterator[None]:
    """Turns a file that is gone, forbidden or out of reach into an `InputError` that names it.

    An `OSError` without an errno is left alone: decoders raise those for damaged data.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        if (cause := _unmasked(error)) is not error:
            raise _unread(url, cause) from cause
        raise MissingInputError(
            f"{url} is not there. It was expected as an input: put it back, or name another, and run again."
        ) from error
    except PermissionError as error:
        raise InputError(
            f"{url} may not be read ({error.strerror or error}). Give this user the right to read it, and run again."
        ) from error
    except Exception as error:
        if not _is_answer(error):
            raise
        raise _unread(url, error) from error


def _unread(url: str, error: Exception) -> InputError:
    return InputError(
        f"{url} cannot be read: {_what(error)}. Check its name and your rights to it, and run the same command again "
        "once the storage answers."
    )


def _unmasked(error: Exception) -> Exception:
    """Returns what went wrong: fsspec's client of HTTP says "not found" to a refusal or a lost connection as well."""
    cause = error.__cause__
    is_of_http = isinstance(cause, asyncio.TimeoutError) or type(cause).__module__.startswith("aiohttp")
    if isinstance(cause, Exception) and is_of_http and getattr(cause, "status", 0) not in (404, 410):
        return cause
    return error


def is_absence(error: InputError) -> bool:
    """Tells whether `input_errors` found that the file is not there, rather than out of reach."""
    return isinstance(error.__cause__, FileNotFoundError | NotADirectoryError)


def entry_type(fs: fsspec.AbstractFileSystem, path: str) -> str | None:
    """Returns `file`, `directory` or `other`; None only where the store says that nothing is there.

    fsspec's own `exists`, `isfile` and `isdir` answer False to a time-out or a refusal as well, and a job that took
    that for an answer would write over what is there.

    Raises:
        Exception: Whatever the file system raises when it cannot tell; `input_errors` words it.
    """
    try:
        return str(fs.info(path)["type"])
    except (FileNotFoundError, NotADirectoryError) as error:
        if (cause := _unmasked(error)) is not error:
            raise cause from error
        return None


def exists(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    """Tells whether a file or folder is there; raises what `entry_type` raises."""
    return entry_type(fs, path) is not None


def is_file(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    """Tells whether a file is there; raises what `entry_type` raises."""
    return entry_type(fs, path) == "file"


def is_folder(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    """Tells whether a folder is there; raises what `entry_type` raises."""
    return entry_type(fs, path) == "directory"


def glob(fs: fsspec.AbstractFileSystem, pattern: str) -> dict[str, dict[str, Any]]:
    """Returns what matches a pattern, with its details, by path; fsspec's own leaves out what it cannot list.

    Raises:
        Exception: Whatever the file system raises when a folder cannot be listed; `input_errors` words it.
    """
    try:
        return dict(fs.glob(pattern, detail=True, on_error="raise"))
    except (FileNotFoundError, NotADirectoryError):  # the folder that the pattern begins with
        return {}


@contextlib.contextmanager
def output_errors(url: str) -> Iterator[None]:
    """Turns whatever a store says to a write into an `OutputError` that names the file."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError | NotImplementedError) and not _is_answer(error):
            raise
        raise OutputError(
            f"{url} cannot be written: {_what(error)}. Nothing that was committed is lost: mend this "
            "(free space, rights, the folder's name) and run the same command again; it goes on where it stopped."
        ) from error


def is_refusal(error: Exception) -> bool:
    """Tells whether an error is the 403 of a Google store, for which gcsfs has no class."""
    return type(error) is OSError and str(error).startswith("Forbidden: ")


def _is_answer(error: Exception) -> bool:
    """Tells what a file system or a store's client raises from what a decoder raises for damaged data."""
    if isinstance(error, TimeoutError | asyncio.TimeoutError) or (
        isinstance(error, OSError) and error.errno is not None
    ):
        return True
    return is_refusal(error) or type(error).__module__.partition(".")[0] in _STORE_CLIENTS


def _what(error: Exception) -> str:
    said = error.strerror if isinstance(error, OSError) else None
    return said or one_line(error)


def delete(root: str, names: Iterable[str]) -> None:
    """Deletes files and folders below a folder, one after the other; what is not there is passed over.

    Raises:
        OutputError: The store refused.
    """
    for name in names:
        url = join(root, name)
        with output_errors(url), contextlib.suppress(FileNotFoundError):
            fs, path = locate(url)
            for tries_left in reversed(range(_DELETE_TRIES)):
                try:
                    fs.rm(path, recursive=True)
                    break
                except (
                    OSError
                ) as error:  # another job still writes there, and has not seen yet that it may not
                    if error.errno != errno.ENOTEMPTY or not tries_left:
                        raise


def delete_empty(root: str, names: Iterable[str]) -> None:
    """Deletes folders of a disk below a folder if nothing is in them any more; a store has no empty folders."""
    for name in names:
        fs, path = locate(join(root, name))
        if isinstance(fs, LocalFileSystem):
            with contextlib.suppress(OSError):
                os.rmdir(path)


def write_whole(root: str, name: str, data: bytes | memoryview, scratch: str = "_tmp") -> None:
    """Writes `root/name` so that it appears whole or not at all, over whatever is there.

    On an object store this is one upload. Elsewhere the bytes go to `root/scratch`, are synced, and renamed.

    Args:
        root: A folder.
        name: Path of the file below it.
        data: The file's content.
        scratch: Folder below `root` for what is not yet whole; another job may delete it at any moment.

    Raises:
        OutputError: The store refused.
    """
    url = join(root, name)
    with output_errors(url):
        fs, path = locate(url)
        if _is_object_store(fs):
            upload(fs, path, bytes(data))
            return
        place = _replace if isinstance(fs, LocalFileSystem) else fs.mv
        _write_and_place(fs, join(root, scratch), path, data, place)


def create(root: str, name: str, data: bytes, scratch: str = "_tmp") -> bool:
    """Writes `root/name` whole unless something has that name; of several that try at once, one does.

    On a disk the file is linked to its name, on an object store the upload is on condition that there is none
    (`if_generation_match=0`, `If-None-Match: *`).

    Args:
        root: A folder.
        name: Path of the file below it.
        data: The file's content.
        scratch: Folder below `root` for what is not yet whole.

    Returns:
        Whether this call wrote it.

    Raises:
        OutputError: The store refused for another reason.
    """
    url = join(root, name)
    with output_errors(url):
        fs, path = locate(url)
        try:
            if not isinstance(fs, LocalFileSystem):
                upload(fs, path, data, mode="create")
                return True
            _write_and_place(fs, join(root, scratch), path, data, _link)
            return True
        except FileExistsError:
            return False


def _is_object_store(fs: fsspec.AbstractFileSystem) -> bool:
    return not _ATOMIC_UPLOAD.isdisjoint([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


def _write_and_place(
    fs: fsspec.AbstractFileSystem,
    scratch: str,
    path: str,
    data: bytes | memoryview,
    place: Callable[[str, str], object],
) -> None:
    """Writes a file of a name that nobody else has, and then has it placed under its own."""
    _, temporary = locate(join(scratch, uuid.uuid4().hex))
    is_local = isinstance(fs, LocalFileSystem)
    for tries_left in reversed(range(_SCRATCH_TRIES)):
        try:
            for folder in (os.path.dirname(temporary), os.path.dirname(path)):
                if is_local:
                    _make_folder(folder)
                else:
                    fs.makedirs(folder, exist_ok=True)
            if is_local:
                _write_synced(temporary, data)
            else:
                fs.pipe_file(temporary, bytes(data))
            place(temporary, path)
            return
        except FileNotFoundError:  # another job that came to its end deleted the folder meanwhile
            if not tries_left:
                raise
        finally:
            with contextlib.suppress(OSError):
                fs.rm_file(temporary)


def _replace(temporary: str, path: str) -> None:
    os.replace(temporary, path)
    _sync_folder(os.path.dirname(path))


def _link(temporary: str, path: str) -> None:
    try:
        os.link(temporary, path)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError:
        with open(
            path, "xb"
        ) as file:  # a file system without links: the name is taken first, and filled at once
            file.write(pathlib.Path(temporary).read_bytes())
    _sync_folder(os.path.dirname(path))


def put_whole(url: str, file: str) -> None:
    """Copies a local file to where it appears whole or not at all, in the time that `write_whole` gives an upload.

    Args:
        url: Where to.
        file: Path of the local file; it is not held in memory.

    Raises:
        OutputError: The store refused.
    """
    with output_errors(url):
        fs, path = locate(url)
        size_bytes = os.path.getsize(file)
        if _is_object_store(fs):
            _within_time(fs, "put_file", size_bytes, file, path)
            return
        fs.makedirs(os.path.dirname(path), exist_ok=True)
        _within_time(fs, "put_file", size_bytes, file, f"{path}.part")
        fs.mv(f"{path}.part", path)


def make_folder_of(url: str) -> None:
    """Makes the folder that a file is to be written to, where there is none.

    Raises:
        OutputError: It cannot be made.
    """
    with output_errors(url):
        fs, path = locate(url)
        if isinstance(fs, LocalFileSystem):
            fs.makedirs(os.path.dirname(path), exist_ok=True)


def upload(fs: fsspec.AbstractFileSystem, path: str, data: bytes, mode: str = "overwrite") -> None:
    """Writes a file in one operation of its file system, in bounded time.

    Raises:
        FileExistsError: The mode is `create`, and there is such a file.
    """
    # the clients of some stores know only the one mode
    options = {} if mode == "overwrite" else {"mode": mode}
    _within_time(fs, "pipe_file", len(data), path, data, **options)


def _within_time(
    fs: fsspec.AbstractFileSystem, method: str, size_bytes: int, *args: object, **options: str
) -> None:
    """Uploads a file; begins anew where a store stops taking it in, which no client has a time-out for."""
    if not fs.async_impl:
        getattr(fs, method)(*args, **options)
        return
    limit_s = max(UPLOAD_S, size_bytes / _UPLOAD_BYTES_A_S)
    for left in reversed(range(_UPLOADS)):
        try:
            sync(fs.loop, getattr(fs, f"_{method}"), *args, timeout=limit_s, **options)
            return
        except FSTimeoutError as error:
            if type(error.__cause__) not in (asyncio.TimeoutError, type(None)):
                raise  # the client's own, which has tried again
            if not left:
                what = f"it took longer than {limit_s:.0f} s for {size_bytes:,} bytes, {_UPLOADS} times"
                raise TimeoutError(errno.ETIMEDOUT, what) from error


def _write_synced(path: str, data: bytes | memoryview) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _make_folder(path: str) -> None:
    """Makes a folder so that it outlives a power cut, as what is renamed into it must."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    _make_folder(parent)
    with contextlib.suppress(FileExistsError):  # another thread's
        os.mkdir(path)
    _sync_folder(parent)


def _sync_folder(path: str) -> None:
    with contextlib.suppress(PermissionError):  # to write into a folder is not yet to open it
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(url: str, value: Any) -> None:
    """Writes JSON for people and programs.

    Raises:
        OutputError: It cannot be written.
    """
    with output_errors(url):
        fs, path = locate(url)
        upload(fs, path, (json.dumps(value, indent=1) + "\n").encode())


def is_same_place(url: str, other: str) -> bool:
    """Tells whether two paths or URLs are one folder."""
    return real_path(url) == real_path(other)


def real_path(url: str) -> str:
    """Returns a URL by which two places can be compared: of a local path, links are followed."""
    fs, path = locate(url)
    return str(
        fs.unstrip_protocol(os.path.realpath(path) if isinstance(fs, LocalFileSystem) else path)
    ).rstrip("/")
