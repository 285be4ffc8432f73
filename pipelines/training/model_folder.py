"""The life of a model's folder: whose it is, what is in it already, and when it is done.

A model is trained in a local working folder: `MODEL_DIR/_training`, or one in the cache where `MODEL_DIR` is a URL.
Only what is done is put (or uploaded) to `MODEL_DIR`, and `_SUCCESS.json`, which names the files, comes last.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from diptych.models.files.cache import cache_folder
from diptych.pipelines.lifecycle.output_folder import State
from diptych.transforms.errors import OptionError, OutputError
from diptych.transforms.output_layout import JOB, SUCCESS, read_json
from diptych.transforms.storage import (
    delete,
    exists,
    is_file,
    is_folder,
    join,
    locate,
    output_errors,
    put_whole,
    write_whole,
)

_WORKING = "_training"
# The one entry of `_job.json`, where an output has one for each of its data sets
_ENTRY = "model"


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A folder that a model is trained for.

    Attributes:
        url: Of the folder.
    """

    url: str

    @property
    def working(self) -> Path:
        """Where everything is kept until the training is done."""
        fs, path = locate(self.url)
        if isinstance(fs, LocalFileSystem):
            return Path(path) / _WORKING
        return cache_folder() / _WORKING / hashlib.sha256(self.url.encode()).hexdigest()[:16]

    @property
    def model(self) -> Path:
        """Where the model is written first."""
        return self.working / "model"

    @property
    def prepared(self) -> Path:
        """Where rows are prepared."""
        return self.working / "prepared"

    def open(self, fingerprint: Mapping[str, Any], overwrite: bool) -> State:
        """Makes the folder ready for a training: it belongs to this fingerprint afterwards.

        Args:
            fingerprint: Of the training: data, options, versions.
            overwrite: Delete what an earlier training wrote there.

        Raises:
            OutputError: The folder belongs to another training or to nobody, or cannot be written.
        """
        fingerprint = json.loads(json.dumps(fingerprint))
        found = self._owner()
        if found == fingerprint and not overwrite:
            if self._is_done():
                with contextlib.suppress(
                    OutputError
                ):  # what is done may lie where nothing can be written any more
                    self._delete_working()
                return State.DONE
            if self._has_begun():
                return State.RESUMED
        elif found is not None and not overwrite and (self._has_begun() or self._success() is not None):
            differences = "; ".join(_differences(found, fingerprint))
            raise OutputError(
                f"{self.url} holds the model of another training: {differences}. Choose another --output, give the "
                "options of that training, or delete it with --overwrite."
            )
        if found != fingerprint or overwrite:
            self._forget()
        with output_errors(os.fspath(self.working)):
            self.model.mkdir(parents=True, exist_ok=True)
        write_whole(
            self.url, JOB, (json.dumps({_ENTRY: fingerprint}, indent=2, sort_keys=True) + "\n").encode()
        )
        delete(self.url, ("_tmp",))
        return State.FRESH

    def _owner(self) -> Mapping[str, Any] | None:
        """Returns the fingerprint of the training that the folder belongs to, or None of a new or empty folder."""
        with output_errors(self.url):
            fs, path = locate(self.url)
            if is_file(fs, path):
                raise OutputError(
                    f"{self.url} is a file. --output must be a folder; it is made where there is none."
                )
            fs.invalidate_cache(path)
            entries = fs.ls(path, detail=False) if is_folder(fs, path) else []
        job = read_json(self.url, JOB)
        if job is None:
            names = sorted(os.path.basename(entry.rstrip("/")) for entry in entries)
            foreign = [name for name in names if name and name[0] not in "._"]
            if foreign:
                more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
                raise OutputError(
                    f"{self.url} holds {', '.join(foreign[:3])}{more}, but no {JOB}, so no training owns it. "
                    "Choose another --output, or move that away."
                )
            return None
        if not isinstance(job, dict) or [*job] != [_ENTRY]:
            raise OutputError(
                f"{self.url} is the output of another job ({', '.join(job) if isinstance(job, dict) else JOB}). A "
                "model wants a folder of its own: choose another --output."
            )
        return dict(job[_ENTRY])

    def _has_begun(self) -> bool:
        """Tells whether a model has been worked on, which a change of options would lose."""
        return self.model.is_dir() and any(self.model.iterdir())

    def _success(self) -> Any:
        return read_json(self.url, SUCCESS)

    def _is_done(self) -> bool:
        fs, path = locate(self.url)
        files = self._files()
        with output_errors(self.url):
            return bool(files) and all(
                exists(fs, join(path, name)) and fs.size(join(path, name)) == size
                for name, size in files.items()
            )

    def _files(self) -> dict[str, int]:
        success = self._success()
        files = success.get(_ENTRY, {}).get("files", {}) if isinstance(success, dict) else {}
        return {name: size for name, size in files.items() if os.path.basename(name) == name}

    def _forget(self) -> None:
        """Deletes what earlier trainings left, and nothing else; what says whose it is goes last."""
        files = self._files()
        delete(self.url, (SUCCESS,))
        self._delete_working()
        delete(self.url, (*files, "_tmp", JOB))

    def _delete_working(self) -> None:
        with output_errors(os.fspath(self.working)), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.working)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Moves the model to its place, says so in `_SUCCESS.json`, and deletes the working folder.

        Args:
            summary: More for `_SUCCESS.json`, as JSON values.

        Raises:
            OutputError: A file cannot be written; the same command goes on from here.
        """
        with output_errors(os.fspath(self.model)):
            files = {
                file.name: file.stat().st_size for file in sorted(self.model.iterdir()) if _is_of_model(file)
            }
        fs, root = locate(self.url)
        is_local = isinstance(fs, LocalFileSystem)
        # the configuration makes a folder a model, so it comes last
        for name in sorted(files, key=lambda name: name == "config.json"):
            if is_local:  # a link or a copy, so that a training that is killed here still has its files
                with output_errors(join(self.url, name)):
                    _place(self.model / name, Path(root) / name)
            else:
                put_whole(join(self.url, name), os.fspath(self.model / name))
        success = {_ENTRY: {**summary, "files": files}}
        write_whole(self.url, SUCCESS, (json.dumps(success, indent=2, sort_keys=True) + "\n").encode())
        self._delete_working()
        delete(self.url, ("_tmp",))

    def summary(self) -> dict[str, Any]:
        """Returns what `finish` was given."""
        success = self._success()
        return dict(success[_ENTRY]) if isinstance(success, dict) and _ENTRY in success else {}


def _is_of_model(file: Path) -> bool:
    return file.is_file() and file.name[0] not in "._"


def _place(source: Path, target: Path) -> None:
    """Makes a file appear whole in another place of the same disk, over whatever is there, and stay here as well."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a disk without links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def refuse_own_input(inputs: list[str], folder: ModelFolder) -> None:
    """Checks that a training does not read what lies in its own folder, which `--overwrite` deletes.

    Raises:
        OptionError: It does.
    """
    own = _real_path(folder.url)
    for url in inputs:
        path = _real_path(url)
        if path == own or path.startswith(f"{own}/_"):
            raise OptionError(
                f"--output {folder.url} is where {url} is read from. The training would write into its own input: "
                "choose another --output."
            )


def _real_path(url: str) -> str:
    fs, path = locate(url)
    return str(
        fs.unstrip_protocol(os.path.realpath(path) if isinstance(fs, LocalFileSystem) else path)
    ).rstrip("/")


def _differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        names = sorted({*found, *wanted})
        parts = [_differences(found.get(n), wanted.get(n), f"{name}.{n}".lstrip(".")) for n in names]
        return [difference for part in parts for difference in part]
    return [] if found == wanted else [f"{name} is {found!r} there and {wanted!r} here"]
