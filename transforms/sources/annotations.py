"""Annotated data sets: what COCO, Flickr30k and Karpathy's splits have in common.

Each annotation file is read once on the launcher and joined with one listing of the image folder into a plan
(`transforms.sources.planned`); workers then read images only. A source says how its file is parsed and where
its images usually are.
"""

import abc
import codecs
import dataclasses
import hashlib
import json
import posixpath
from collections.abc import Iterator, Sequence
from typing import IO, Any, ClassVar

import ijson
from fsspec.implementations.local import LocalFileSystem

from transforms import storage
from transforms.errors import InputError
from transforms.sources import folder
from transforms.sources.base import InputFile, Shard, Source, shard_names
from transforms.sources.draft import open_draft
from transforms.sources.parts import Bad, Caption, Image
from transforms.sources.planned import PlanFacts, plan_shards, read_facts
from transforms.storage import relative_name as relative_name

_READ_BYTES = 1 << 18


@dataclasses.dataclass(frozen=True)
class AnnotationSource(Source):
    """Annotation files with a folder of images.

    Attributes:
        annotations: URLs of the annotation files.
        root: URL of the folder that names are relative to.
        images: URL of the image folder, `.tar` or `.zip`; None to look beside the annotation.
        metadata_columns: Keys of an image's entry that become columns; null where there is none.
    """

    annotations: tuple[str, ...]
    root: str
    images: str | None = None
    metadata_columns: tuple[str, ...] = ()

    column_flags: ClassVar[frozenset[str]] = frozenset({"metadata_columns"})

    captions_name_images: ClassVar[bool] = False
    """Whether an image is listed by its captions, and nowhere else."""

    @abc.abstractmethod
    def parts(self, url: str, file: IO[bytes]) -> Iterator[Image | Caption | Bad]:
        """Parses an annotation file in bounded memory.

        Raises:
            InputError: It is not a whole annotation of this format.
            OptionError: An option asks for something it does not have.
        """

    @abc.abstractmethod
    def folders(self, name: str) -> Sequence[str]:
        """Returns where images may be, relative to the folder of an annotation file of this name."""

    def options(self) -> dict[str, object]:
        """Returns the options that decide the plan."""
        return {"metadata_columns": list(self.metadata_columns)}

    def inputs(self) -> list[InputFile]:
        """Returns the annotation files, with digests of their content."""
        return [_input_file(url, relative_name(url, self.root)) for url in self.annotations]

    def shards(self, plan_folder: str, rows_per_shard: int) -> list[Shard]:
        """Plans each annotation file, or takes up the plan that an earlier run left."""
        names = [relative_name(url, self.root) for url in self.annotations]
        shards: list[Shard] = []
        for url, name, plan_name in zip(self.annotations, names, shard_names(names), strict=True):
            with storage.input_errors(url):
                fs, path = storage.locate(url)
                size_bytes = fs.size(path)
            images = self.find_images(url)
            made_from = {
                "source": type(self).__name__,
                "annotation": name,
                "size_bytes": size_bytes,
                "images": relative_name(images, self.root),
                "rows_per_shard": rows_per_shard,
                **self.options(),
            }
            plan = storage.join(plan_folder, f"{plan_name}.arrow")
            facts = read_facts(plan)
            if facts is None or facts.made_from != made_from:
                facts = self._write_plan(url, images, made_from, plan, rows_per_shard)
            shards += plan_shards(plan, facts, plan_name, images, name, self.metadata_columns)
        return shards

    def find_images(self, annotation: str) -> str:
        """Returns the URL of the image folder or archive of an annotation.

        Raises:
            InputError: There is none where it is looked for.
        """
        fs, path = storage.locate(self.images or annotation)
        parent, name = posixpath.split(storage.locate(annotation)[1])
        if self.images:
            if folder.is_archive(self.images) and storage.is_file(fs, path):
                return self.images
            tried = [*(posixpath.join(path, posixpath.basename(f)) for f in self.folders(name)), path]
        else:
            tried = [
                posixpath.normpath(posixpath.join(parent, candidate)) for candidate in self.folders(name)
            ]
        with storage.input_errors(self.images or annotation):
            for candidate in tried:
                if storage.is_folder(fs, candidate):
                    return (
                        candidate if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(candidate))
                    )
        if self.images:
            raise InputError(
                f"--images {self.images} is neither a folder nor a .tar or .zip that can be found."
            )
        raise InputError(
            f"The images of {annotation} cannot be found: there is no folder {', '.join(tried)}. "
            "Name the folder (or a .tar or .zip) with --images."
        )

    def _write_plan(
        self, url: str, images: str, made_from: dict[str, object], plan: str, rows_per_shard: int
    ) -> PlanFacts:
        with open_draft() as draft:
            with storage.input_errors(url):
                fs, path = storage.locate(url)
                with fs.open(path, "rb") as file:
                    draft.add(self.parts(url, file))
            if self.captions_name_images:
                draft.list_captioned()
            nameless = draft.add_files(folder.members(images))
            draft.settle()
            draft.counters["unlisted_images"] += len(nameless)
            num_named, num_found = draft.num_images()
            if num_named and not num_found:
                raise InputError(
                    f"None of the {num_named} images that {url} names is in {images}. "
                    "Name the folder (or the .tar or .zip) that they are in with --images."
                )
            return draft.publish(plan, made_from, rows_per_shard, self.metadata_columns)


def json_items(url: str, file: IO[bytes], *prefixes: str) -> Iterator[tuple[str, Any]]:
    """Yields each value at these places of a JSON file, with the place, reading it once in bounded memory.

    A byte-order mark is skipped, bytes that are not UTF-8 become U+FFFD.

    Raises:
        InputError: The file is not JSON, or ends too early.
    """
    found = {prefix: ijson.sendable_list() for prefix in prefixes}
    parsers = [ijson.items_coro(values, prefix, use_float=True) for prefix, values in found.items()]
    for text in _utf8(file):
        try:
            for parser in parsers:
                parser.send(text) if text else parser.close()
        except (ijson.JSONError, UnicodeDecodeError) as error:
            what = " ".join(str(error).split())
            raise InputError(
                f"{url} is not whole JSON: {what}. It may be cut off: fetch or unpack it again."
            ) from error
        for prefix, values in found.items():
            yield from ((prefix, value) for value in values)
            values.clear()


def json_keys(file: IO[bytes]) -> set[str]:
    """Returns the keys of the object that a whole JSON file is; none where it is something else."""
    file.seek(0)
    events = ijson.sendable_list()
    parser = ijson.parse_coro(events)
    keys: set[str] = set()
    for text in _utf8(file):
        parser.send(text) if text else parser.close()
        keys.update(value for prefix, event, value in events if not prefix and event == "map_key")
        events.clear()
    return keys


def _utf8(file: IO[bytes]) -> Iterator[bytes]:
    """Yields a file as clean UTF-8, in pieces, and at its end an empty one."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
    while chunk := file.read(_READ_BYTES):
        if text := decoder.decode(chunk).encode():
            yield text
    if text := decoder.decode(b"", final=True).encode():
        yield text
    yield b""


def metadata_values(entry: dict[str, Any], columns: Sequence[str]) -> list[str | None]:
    """Returns values of an image's entry as strings: as JSON where they are something else, or None."""
    values = (entry.get(column) for column in columns)
    return [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]


def _input_file(url: str, name: str) -> InputFile:
    digest = hashlib.sha256()
    size_bytes = 0
    with storage.input_errors(url):
        fs, path = storage.locate(url)
        with fs.open(path, "rb") as file:
            while chunk := file.read(_READ_BYTES):
                digest.update(chunk)
                size_bytes += len(chunk)
    return InputFile(name, size_bytes, digest.hexdigest())
