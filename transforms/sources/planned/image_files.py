"""Plain image files: a folder, a glob, or files one by one, with the captions that lie beside them.

Captions are found where others put them: in `metadata.jsonl`, `.csv` or `.parquet` (Hugging Face's imagefolder), or in
a file of the image's name that ends in `.txt`, `.caption` or `.json` (img2dataset's `files`).
"""

import dataclasses
import hashlib
import itertools
import posixpath
import sys
from collections.abc import Iterator, Sequence
from typing import ClassVar

import fsspec
from fsspec.core import has_magic

from diptych.transforms import storage
from diptych.transforms.errors import InputError, OptionError
from diptych.transforms.output_layout import JOB, is_of_output
from diptych.transforms.sources.base import InputFile, Shard, Source, passed_over_note, shard_names
from diptych.transforms.sources.planned import image_folder
from diptych.transforms.sources.planned.entries import (
    IMAGE_EXTENSIONS,
    BadEntry,
    is_image,
    is_leftover,
    may_be_image,
)
from diptych.transforms.sources.planned.image_folder import ImageFile
from diptych.transforms.sources.planned.image_metadata import IMAGE_METADATA, MetadataReader
from diptych.transforms.sources.planned.plan import plan_shards, read_facts
from diptych.transforms.sources.planned.plan_builder import PlanBuilder, open_plan_builder
from diptych.transforms.storage import relative_name


@dataclasses.dataclass(frozen=True)
class FilesSource(Source):
    """Image files. A row is a file, in the order of the bytes of their paths below `root`.

    A folder gives the files in it and below it that have an image's extension; a glob, or a named file, is
    taken whatever its extension. The key is the path below `root` without the extension (or with it where
    `a.jpg` and `a.png` are both there), unless the user names a column of the metadata for it.

    Attributes:
        urls: Folders, globs and files, all below `root`.
        root: URL of the folder that keys and names are relative to.
        metadata_columns: Columns of the metadata, or fields of `.json` files, to keep as metadata.
    """

    format: ClassVar[str] = "files"

    urls: tuple[str, ...]
    root: str
    metadata_columns: tuple[str, ...] = ()

    column_flags: ClassVar[frozenset[str]] = frozenset({"caption_column", "key_column", "metadata_columns"})

    def inputs(self) -> list[InputFile]:
        """Returns one entry for all the files: their total size, and a digest of their names and sizes."""
        digest = hashlib.sha256()
        total_bytes = 0
        with open_plan_builder() as builder:
            metadata = self._list(builder)
            for path, size_bytes in builder.files():
                digest.update(f"{path}\t{size_bytes}\n".encode())
                total_bytes += size_bytes or 0
            for url in metadata:
                digest.update(_digest(url))
            for path, size_bytes in builder.texts():
                digest.update(f"{path}\t{size_bytes}\n".encode())
        return [InputFile(self._name(), total_bytes, digest.hexdigest())]

    def shards(self, plan_folder: str, rows_per_shard: int) -> list[Shard]:
        """Plans the files, or takes up the plan that an earlier run left."""
        [plan_name] = shard_names([self._name()])
        plan = storage.join(plan_folder, f"{plan_name}.arrow")
        names = "\n".join(relative_name(url, self.root) for url in self.urls)
        made_from = {
            "source": self.format,
            "urls_sha256": hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest(),
            "rows_per_shard": rows_per_shard,
            "caption_column": self.columns.caption,
            "key_column": self.columns.key,
            "metadata_columns": list(self.metadata_columns),
        }
        facts = read_facts(plan)
        if facts is None or facts.made_from != made_from:
            with open_plan_builder() as builder:
                self._list(builder)
                facts = builder.write(plan, made_from, rows_per_shard, self.metadata_columns)
        return plan_shards(plan, facts, plan_name, self.root, None, self.metadata_columns, self.columns)

    def _name(self) -> str:
        names = {relative_name(url, self.root) for url in self.urls}
        return names.pop() if len(names) == 1 and "" not in names else "files"

    def _list(self, builder: PlanBuilder) -> list[str]:
        """Lists the files; returns the URLs of those with metadata of others."""
        metadata: list[str] = []
        passed_over: list[str] = []
        for url in self.urls:
            with storage.input_errors(url):
                builder.add_files(self._images(builder, url, metadata, passed_over))
        message = "its name is not UTF-8: rename it"
        builder.add(
            BadEntry(f"{name}: {message}", key=name, reason="missing_image")
            for name in sorted({*builder.nameless})
        )
        if not builder.nameless and next(builder.files(), None) is None:
            raise InputError(
                f"There is no image in {', '.join(self.urls)}: expected files ending in "
                f"{', '.join(IMAGE_EXTENSIONS)}. Files with other names are taken from a glob, such as "
                f"{storage.join(self.urls[0], '*')}."
            )
        reader = MetadataReader(self.columns, self.metadata_columns)
        for path in sorted(metadata):
            builder.add(reader.read(storage.join(self.root, path), path))
        builder.list_files(self.columns.key)
        self._check_columns(builder, reader)
        builder.counters["passed_over_files"] += len(passed_over)
        if number := builder.counters["passed_over_files"]:
            names = sorted([*passed_over, *itertools.islice(builder.unused_texts(), _MAX_NAMED)])
            builder.notes.append(passed_over_note(self.format, number, names))
        return [storage.join(self.root, path) for path in sorted(metadata)]

    def _check_columns(self, builder: PlanBuilder, reader: MetadataReader) -> None:
        """Checks that the columns that the user names are those of the metadata, or may be of files beside images.

        Raises:
            OptionError: One is not.
        """
        flags: dict[str, Sequence[str | None]] = {
            "caption_column": [self.columns.caption],
            "key_column": [self.columns.key],
            "metadata_columns": self.metadata_columns,
        }
        missing = [
            (flag, name) for flag in flags for name in flags[flag] if name and name not in reader.columns
        ]
        if not missing:
            return
        beside = {posixpath.splitext(path)[1].lower()[1:] for path, _ in builder.texts()}
        if "json" in beside:  # what is in them shows when they are read
            return
        for flag, name in missing:
            if flag != "caption_column" or name.lower() not in beside:
                there = ", ".join(map(repr, [*reader.columns, *sorted(beside)][:10]))
                has = f"it has {there}" if there else "its images have no metadata"
                raise OptionError(
                    f"{', '.join(self.urls)} has no column {name!r}, which --{flag} names; {has}. "
                    "Name one that it has, or leave the flag out."
                )

    def _images(
        self, builder: PlanBuilder, url: str, metadata: list[str], passed_over: list[str]
    ) -> Iterator[ImageFile]:
        """Yields the images of a folder, a glob, or a single file, with paths below the root; fills the two lists."""
        fs, path = storage.locate(url)
        start = len(storage.locate(self.root)[1].rstrip("/")) + 1
        try:
            found = {path: fs.info(path)}
        except FileNotFoundError:
            if not has_magic(path):
                raise
            found = storage.glob(fs, path)
        if not (path in found and found[path]["type"] == "directory"):
            for name, info in found.items():
                if info["type"] == "file":
                    yield ImageFile(name[start:], info["size"])
            return
        above = relative_name(url, self.root)
        num_looked_at = 0
        strays: list[str] = []
        for member in image_folder.members(url, sizes=True):
            member = member._replace(path=f"{above}/{member.path}" if above else member.path)
            name = posixpath.basename(member.path)
            if is_of_output(member.path, ()):
                continue
            if is_leftover(member.path):
                strays.append(member.path)
            elif is_image(name):
                yield member
            elif name[0] in "._":
                strays.append(member.path)
            elif IMAGE_METADATA.match(name):
                metadata.append(member.path)
            elif name.lower().endswith(_TEXT_EXTENSIONS):
                builder.add_texts([member])
            else:
                num_looked_at += 1
                place = storage.join(path, member.path.removeprefix(f"{above}/") if above else member.path)
                if num_looked_at <= _most_looked_at(fs) and may_be_image(fs, place):
                    yield member
                else:
                    strays.append(member.path)
        # a job's output may lie below its own input; it is not counted, or the count would grow as the job runs
        outputs = {posixpath.dirname(name) for name in strays if posixpath.basename(name) == JOB}
        passed_over.extend(name for name in strays if not is_of_output(name, outputs))


_MAX_NAMED = 3
_TEXT_EXTENSIONS = (".txt", ".caption", ".json")


def _most_looked_at(fs: fsspec.AbstractFileSystem) -> int:
    """Returns of how many files without a telling name the first bytes are read: on a store each is a request."""
    return 1000 if fs.async_impl else sys.maxsize


def _digest(url: str) -> bytes:
    fs, path = storage.locate(url)
    with storage.input_errors(url):
        return hashlib.sha256(fs.cat_file(path)).digest()
