"""Annotated data sets: what COCO, Flickr30k and Karpathy's splits have in common.

Each annotation file is read once on the launcher and joined with one listing of the image folder into a plan
(`diptych.transforms.sources.planned.plan`); workers then read images only. A source says how its file is parsed and
where its images usually are.
"""

import abc
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, ClassVar, NamedTuple, TypeGuard

import fsspec
from fsspec.implementations.local import LocalFileSystem

from diptych.transforms import storage
from diptych.transforms.errors import InputError
from diptych.transforms.sources.base import InputFile, Shard, Source, shard_names
from diptych.transforms.sources.planned import image_folder
from diptych.transforms.sources.planned.entries import BadEntry, Caption, Fields, Image, Ref
from diptych.transforms.sources.planned.plan import plan_shards, read_facts
from diptych.transforms.sources.planned.plan_builder import PlanBuilder, open_plan_builder
from diptych.transforms.sources.text.json_stream import Unread
from diptych.transforms.sources.text.spelling import respell
from diptych.transforms.storage import relative_name as relative_name

_READ_BYTES = 1 << 18
# Of an annotation, so many of its first parts are looked at for the name of an image
_PARTS_TO_TELL = 100
# So many of them, and so many folders beside it, are looked at
_IMAGES_TO_TELL, _MAX_FOLDERS = 5, 20


class _Plan(NamedTuple):
    """What the plan of an annotation is made from.

    Attributes:
        annotation: URL of the annotation file.
        name: Its path below the input root.
        file_name: The plan's name, without extension.
        images: URL of the images; None where none is wanted.
        made_from: Everything that decides the plan.
    """

    annotation: str
    name: str
    file_name: str
    images: str | None
    made_from: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class AnnotationSource(Source):
    """Annotation files with a folder of images.

    Attributes:
        annotations: URLs of the annotation files.
        root: URL of the folder that names are relative to.
        images: URL of the image folder, `.tar` or `.zip`; None to look beside the annotation.
        metadata_columns: Keys of an image's entry that become columns; null where there is none.
        texts_only: Whether no image is wanted: where `images` is None, each image counts as there.
    """

    annotations: tuple[str, ...]
    root: str
    images: str | None = None
    metadata_columns: tuple[str, ...] = ()
    texts_only: bool = False

    column_flags: ClassVar[frozenset[str]] = frozenset({"metadata_columns"})

    captions_name_images: ClassVar[bool] = False
    """Whether an image is listed by its captions, and nowhere else."""

    @abc.abstractmethod
    def parts(self, url: str, file: IO[bytes]) -> Iterator[Image | Caption | Fields | BadEntry]:
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
        columns = {name: value for name, value in dataclasses.asdict(self.columns).items() if value}
        return {"metadata_columns": list(self.metadata_columns), **columns}

    def inputs(self) -> list[InputFile]:
        """Returns the annotation files, with digests of their content."""
        return [_input_file(url, relative_name(url, self.root)) for url in self.annotations]

    def shards(self, plan_folder: str, rows_per_shard: int) -> list[Shard]:
        """Plans each annotation file, or takes up the plan that an earlier run left."""
        names = [relative_name(url, self.root) for url in self.annotations]
        plans: list[_Plan] = []
        for url, name, plan_name in zip(self.annotations, names, shard_names(names), strict=True):
            with storage.input_errors(url):
                fs, path = storage.locate(url)
                size_bytes = fs.size(path)
            images = None if self.texts_only and self.images is None else self.find_images(url)
            made_from = {
                "source": self.format,
                "annotation": name,
                "size_bytes": size_bytes,
                "images": images and relative_name(images, self.root),
                "rows_per_shard": rows_per_shard,
                **self.options(),
            }
            plans.append(_Plan(url, name, plan_name, images, made_from))
        shards: list[Shard] = []
        for images in {plan.images: None for plan in plans}:
            shards += self._shards_of([plan for plan in plans if plan.images == images], plan_folder)
        order = {name: place for place, name in enumerate(names)}
        return sorted(shards, key=lambda shard: order[shard.input.rpartition("#")[0]])

    def _shards_of(self, plans: "Sequence[_Plan]", plan_folder: str) -> list[Shard]:
        """Returns the shards of annotations with one image folder: what none of them lists is counted with the last."""
        urls = [storage.join(plan_folder, f"{plan.file_name}.arrow") for plan in plans]
        every_facts = [read_facts(url) for url in urls]
        is_planned = all(
            facts is not None and facts.made_from == plan.made_from
            for facts, plan in zip(every_facts, plans, strict=True)
        )
        shards: list[Shard] = []
        unlisted: set[str] | None = None
        for plan, url, facts in zip(plans, urls, every_facts, strict=True):
            if facts is None or not is_planned:
                with self.open_plan_builder(plan.annotation, plan.images) as builder:
                    if len(plans) > 1:
                        own = set(builder.unlisted_images())
                        unlisted = own if unlisted is None else unlisted & own
                        builder.counters["unlisted_images"] = len(unlisted) if plan is plans[-1] else 0
                    facts = builder.write(
                        url, plan.made_from, plan.made_from["rows_per_shard"], self.metadata_columns
                    )
            shards += plan_shards(
                url, facts, plan.file_name, plan.images or "", plan.name, self.metadata_columns
            )
        return shards

    def count_elsewhere(
        self, root: str, folders: Mapping[str, int], archives: Sequence[str]
    ) -> dict[str, int]:
        """Returns how many images and archives of an input are not where the annotations have theirs, as counters.

        Args:
            root: URL of the input.
            folders: How many images lie in each folder of it, by its path below the root.
            archives: Paths of the archives in it.
        """
        if self.texts_only and self.images is None:
            return {}
        try:
            used = [storage.locate(self.find_images(url))[1].rstrip("/") for url in self.annotations]
        except InputError:  # will be said when the images are needed
            return {}
        top = storage.locate(root)[1].rstrip("/")

        def is_elsewhere(name: str) -> bool:
            path = f"{top}/{name}".rstrip("/") + "/"
            return not any(path.startswith(f"{folder}/") for folder in used)

        return {
            "unlisted_images": sum(count for name, count in folders.items() if is_elsewhere(name)),
            "passed_over_files": sum(map(is_elsewhere, archives)),
        }

    def find_images(self, annotation: str) -> str:
        """Returns the URL of the image folder or archive of an annotation.

        Raises:
            InputError: There is none where it is looked for.
        """
        fs, path = storage.locate(self.images or annotation)
        parent, name = posixpath.split(storage.locate(annotation)[1])
        if self.images:
            if image_folder.is_archive(self.images) and storage.is_file(fs, path):
                return self.images
            below = [posixpath.join(path, posixpath.basename(folder)) for folder in self.folders(name)]
            named = _holds_one(fs, path, self._first_images(annotation))
            tried = [path, *below] if named else [*below, path]
        else:
            tried = [
                posixpath.normpath(posixpath.join(parent, candidate)) for candidate in self.folders(name)
            ]
        with storage.input_errors(self.images or annotation):
            found = next((candidate for candidate in tried if storage.is_folder(fs, candidate)), None)
            if found is None and not self.images:
                found = self._find_beside(fs, parent, annotation)
        if found is not None:
            return found if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(found))
        if self.images:
            raise InputError(
                f"--images {self.images} is neither a folder nor a .tar or .zip that can be found."
            )
        raise InputError(
            f"The images of {annotation} cannot be found: they are not beside it, and there is no folder "
            f"{', '.join(tried)}. Name the folder (or a .tar or .zip) with --images."
        )

    def _find_beside(self, fs: fsspec.AbstractFileSystem, parent: str, annotation: str) -> str | None:
        """Returns the folder of an annotation, or one in it, that has its first images; else the only archive there."""
        infos = sorted(fs.ls(parent, detail=True), key=lambda info: str(info["name"]))
        folders = [info["name"].rstrip("/") for info in infos if info["type"] == "directory"]
        names = self._first_images(annotation)
        for candidate in (parent, *folders[:_MAX_FOLDERS]):
            if _holds_one(fs, candidate, names):
                return candidate
        archives = [info["name"] for info in infos if image_folder.is_image_archive(info["name"])]
        return archives[0] if len(archives) == 1 else None

    def _first_images(self, annotation: str) -> Sequence[str]:
        """Returns the paths of a few images that an annotation names at its beginning."""
        with storage.input_errors(annotation):
            fs, path = storage.locate(annotation)
            with fs.open(path, "rb") as file:
                parts = itertools.islice(self.parts(annotation, file), _PARTS_TO_TELL)
                names = (
                    part.path if isinstance(part, Image) else part.ref
                    for part in parts
                    if isinstance(part, Image) or (isinstance(part, Caption) and self.captions_name_images)
                )
                return list(dict.fromkeys(respell(str(name)).lstrip("/") for name in names))[:_IMAGES_TO_TELL]

    @contextlib.contextmanager
    def open_plan_builder(self, url: str, images: str | None) -> Iterator[PlanBuilder]:
        """Reads an annotation file, and settles which rows it has.

        Args:
            url: One of `annotations`.
            images: URL of its image folder or archive; None takes each image for there.

        Raises:
            InputError: It is no annotation of this format, or none of its images is in the folder.
            OptionError: An option asks for something it does not have.
        """
        with open_plan_builder() as builder:
            with storage.input_errors(url):
                fs, path = storage.locate(url)
                with fs.open(path, "rb") as file:
                    builder.add(self.parts(url, file))
            if self.captions_name_images:
                builder.list_captioned()
            if images is None:
                builder.assume_files()
            else:
                builder.add_files(image_folder.members(images))
            above = posixpath.dirname(url)
            builder.resolve(f"{relative_name(images, above)}/" if images else "")
            num_named, num_found = builder.num_images()
            if num_named and not num_found:
                raise InputError(
                    f"None of the {num_named} images that {url} names is in {images}. "
                    "Name the folder (or the .tar or .zip) that they are in with --images."
                )
            yield builder


def _holds_one(fs: fsspec.AbstractFileSystem, path: str, names: Sequence[str]) -> bool:
    """Tells whether one of some files is in a folder, under the very name."""
    with storage.input_errors(path):
        return any(storage.is_file(fs, posixpath.join(path, name)) for name in names)


def metadata_values(entry: dict[str, Any], columns: Sequence[str]) -> list[str | None]:
    """Returns values of an image's entry as strings, and as JSON where they are something else.

    NaN is None: where JSON has it, it stands for a value that is missing.
    """
    values = [entry.get(column) for column in columns]
    return [_metadata_value(value) for value in values]


def _metadata_value(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return None if isinstance(value, float) and math.isnan(value) else json.dumps(value, ensure_ascii=False)


def is_ref(value: object) -> TypeGuard[Ref]:
    """Tells whether a value can be an id: a finite number or a text."""
    return (
        isinstance(value, str | int | float)
        and not isinstance(value, bool)
        and not (isinstance(value, float) and not math.isfinite(value))
    )


def show(value: object) -> str:
    """Returns a value of an annotation for a message: as JSON has it, and not all of a long one."""
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}…"


def not_an_object(name: str, ordinal: int, entry: object, row: int | None = None) -> BadEntry:
    """Returns the reject of an entry that is no object."""
    why = entry.message if isinstance(entry, Unread) else f"not an object: {show(entry)}"
    return BadEntry(f"{name} {ordinal} is {why}", row)


_MOST_SHOWN = 80


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
