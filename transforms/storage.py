"""Files anywhere: thin words over fsspec, with errors that say what to do."""

import contextlib
import os
import uuid
from collections.abc import Iterator

import fsspec
from fsspec.implementations.local import LocalFileSystem

from transforms.errors import InputError, OutputError

# Stores where one upload appears whole or not at all. A rename there is a copy and a delete: worse, not better.
_ATOMIC_UPLOAD = frozenset({"gs", "gcs", "s3", "s3a", "abfs", "abfss", "az", "memory"})


def locate(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the file system of a URL or path, and the path in it.

    Raises:
        InputError: No file system is installed for the URL's protocol.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise InputError(
            f"{url!r} cannot be opened: {error}. Expected a path or a URL of an installed fsspec file system."
        ) from error
    return fs, path


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
    except FileNotFoundError as error:
        raise InputError(
            f"{url} is not there. It was expected as an input: put it back, or name another, and run again."
        ) from error
    except PermissionError as error:
        raise InputError(
            f"{url} may not be read ({error.strerror or error}). Give this user the right to read it, and run again."
        ) from error
    except OSError as error:
        if error.errno is None:
            raise
        raise InputError(
            f"{url} cannot be read: {error.strerror or error}. Run the same command again once the storage answers."
        ) from error


@contextlib.contextmanager
def output_errors(url: str) -> Iterator[None]:
    """Turns whatever a store says to a write into an `OutputError` that names the file."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{url} cannot be written: {error.strerror or error}. Nothing that was committed is lost: mend this "
            "(free space, rights, the folder's name) and run the same command again; it goes on where it stopped."
        ) from error


def write_whole(root: str, name: str, data: bytes | memoryview) -> None:
    """Writes `root/name` so that it appears whole or not at all, over whatever is there.

    On an object store this is one upload. Elsewhere the bytes go to `root/_tmp`, are synced, and renamed.

    Raises:
        OutputError: The store refused.
    """
    url = join(root, name)
    with output_errors(url):
        fs, path = locate(url)
        if not _ATOMIC_UPLOAD.isdisjoint([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol):
            fs.pipe_file(path, bytes(data))
            return
        _, temporary = locate(join(root, "_tmp", uuid.uuid4().hex))
        fs.makedirs(os.path.dirname(temporary), exist_ok=True)
        fs.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            if isinstance(fs, LocalFileSystem):
                _write_and_rename(temporary, path, data)
            else:
                fs.pipe_file(temporary, bytes(data))
                fs.mv(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                fs.rm_file(temporary)
            raise


def _write_and_rename(temporary: str, path: str, data: bytes | memoryview) -> None:
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
