"""Input of every format to shards: finds out what an input is and opens the source that reads it."""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

import fsspec

from transforms.errors import InputError, OptionError
from transforms.output_layout import JOB
from transforms.sources.annotations import AnnotationSource
from transforms.sources.base import ColumnNames, Source
from transforms.sources.coco import CocoSource
from transforms.sources.files import FilesSource
from transforms.sources.flickr30k import Flickr30kSource
from transforms.sources.karpathy import KarpathySource
from transforms.sources.parquet import ParquetSource
from transforms.sources.prompts import PromptsSource
from transforms.sources.tfrecord import TfrecordSource
from transforms.sources.webdataset import WebdatasetSource
from transforms.storage import exists, input_errors, is_file, is_folder, join, locate

FORMATS = ("coco", "flickr30k", "karpathy", "webdataset", "parquet", "tfrecord", "files", "prompts")


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """What the user says about the input beyond its place.

    Attributes:
        images: Folder or archive with the images of an annotation file; None looks beside it.
        split: Splits of a Karpathy file to read, separated by commas; None reads all.
        image_column: Column of a Parquet file with the images; None finds it.
        caption_column: Column with the captions; None finds it.
        key_column: Column with the keys; None finds it.
        metadata_columns: The source's own columns to carry.
    """

    images: str | None = None
    split: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    key_column: str | None = None
    metadata_columns: tuple[str, ...] = ()


def open_source(
    inputs: Sequence[str], format: str, options: SourceOptions, texts_only: bool = False
) -> Source:
    """Returns the source that reads these inputs.

    Args:
        inputs: Paths, fsspec URLs, globs or folders.
        format: One of `FORMATS`, or `auto`.
        options: What the user says about the input.
        texts_only: The job reads captions alone, so that prompts will do.

    Raises:
        InputError: An input is not there, or nothing in it is of the format.
        OptionError: The inputs are of several formats, or an option does not go with theirs.
    """
    found = [_find(url, format) for url in inputs]
    formats = sorted({kind for kind, _, _ in found})
    if len(formats) > 1:
        raise OptionError(f"The inputs are of several formats, {formats}. Give those of one format to a job.")
    if formats == ["prompts"] and not texts_only:
        raise OptionError(
            f"{inputs[0]} holds prompts, which have no images. Prompts go with `diptych embed` and `diptych generate`."
        )
    files = sorted({file for _, urls, _ in found for file in urls})
    root = found[0][2] if len(found) == 1 else _common_folder(files)
    return _open(formats[0], tuple(files), root, options)


def output_of(url: str) -> str | None:
    """Returns the Diptych output that an input names: `OUT`, `OUT/images`, or files in that; None of other data."""
    fs, path = locate(url)
    path = path.rstrip("/")
    folders = [path]
    for images in (path, os.path.dirname(path)):
        if os.path.basename(images) == "images":
            folders.append(os.path.dirname(images))
    with input_errors(url):
        found = next((folder for folder in folders if is_file(fs, join(folder, JOB))), None)
    return found and fs.unstrip_protocol(found)


def _open(format: str, urls: tuple[str, ...], root: str, options: SourceOptions) -> Source:
    if options.split and format != "karpathy":
        raise OptionError(
            f"--split {options.split} goes with a Karpathy file; the input is of format {format}."
        )
    if options.images and format not in ("coco", "flickr30k", "karpathy"):
        raise OptionError(
            f"--images {options.images} goes with an annotation file; the input is of format {format}."
        )
    kind = _SOURCES[format]
    for flag in ("image_column", "caption_column", "key_column", "metadata_columns"):
        value = getattr(options, flag)
        if value and flag not in kind.column_flags:
            value = value if isinstance(value, str) else ",".join(value)
            raise OptionError(
                f"--{flag} {value} does not go with the input, which is of format {format}: it has no such columns. "
                "Leave the flag out, or say with --format what the input is."
            )
    columns = ColumnNames(options.image_column, options.caption_column, options.key_column)
    values: dict[str, Any] = {"columns": columns}
    if "metadata_columns" in kind.column_flags:
        values["metadata_columns"] = options.metadata_columns
    if issubclass(kind, AnnotationSource):
        values["images"] = options.images
    if issubclass(kind, KarpathySource):
        values["split"] = options.split
    source: Source = kind(urls, root, **values)
    return dataclasses.replace(source, notes=(*source.notes, *source.column_notes()))


_SOURCES: dict[str, Any] = {
    "coco": CocoSource,
    "flickr30k": Flickr30kSource,
    "karpathy": KarpathySource,
    "webdataset": WebdatasetSource,
    "parquet": ParquetSource,
    "tfrecord": TfrecordSource,
    "files": FilesSource,
    "prompts": PromptsSource,
}
_KINDS = {
    "webdataset": re.compile(r"\.(tar(\.(gz|bz2|xz|zst|lz4))?|tgz|tbz2?|txz|tzst)$", re.I),
    "tfrecord": re.compile(r"\.(tfrecords?|tfrec)(\.gz)?$|\.tfrecord-\d+-of-\d+$", re.I),
    "parquet": re.compile(r"\.parquet$", re.I),
    "flickr30k": re.compile(
        r"\.token(\.txt)?$|^results.*\.csv$|^captions\.(txt|csv)$|^flickr_annotations.*\.csv$", re.I
    ),
    "prompts": re.compile(r"\.(jsonl|ndjson|tsv)(\.gz)?$", re.I),
    "files": re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?)$", re.I),
}
_COCO_NAME = re.compile(r"^captions_.*\.json$", re.I)
_KARPATHY_NAME = re.compile(r"^dataset_.*\.json$", re.I)
_ANNOTATIONS = ("coco", "karpathy", "flickr30k")
# A folder with several of these is read by the first: img2dataset puts a Parquet of metadata beside each tar
_RECORDS = ("webdataset", "tfrecord", "parquet", "files")


def _find(url: str, format: str) -> tuple[str, list[str], str]:
    """Returns the format, the files and the root of one input."""
    fs, path = locate(url)
    with input_errors(url):
        if fsspec.core.has_magic(path) and not exists(fs, path):
            files = [name for name, info in fs.glob(path, detail=True).items() if info["type"] == "file"]
            prefix = re.split(r"[*?\[]", path, maxsplit=1)[0]
            root = os.path.dirname(prefix)
        elif is_folder(fs, path):
            return _find_in_folder(fs, path, format)
        else:
            fs.info(path)
            files, root = [path], os.path.dirname(path)
    if not files:
        raise InputError(
            f"{url} matches no file. Expected a path, a URL, a glob or a folder with data: check it."
        )
    kinds = {_kind(fs, file) for file in files} if format == "auto" else {format}
    if len(kinds) > 1 or None in kinds:
        raise OptionError(
            f"{url}: cannot tell the format of {files[0]}. Name it with --format ({', '.join(FORMATS)})."
        )
    kind = str(kinds.pop())
    if kind == "files":  # lists for itself, in bounded memory
        files = [path]
    return kind, [fs.unstrip_protocol(file) for file in files], fs.unstrip_protocol(root)


def _kind(fs: fsspec.AbstractFileSystem, path: str) -> str | None:
    """Returns the format of a file, from its name and, of JSON, its first bytes."""
    name = os.path.basename(path)
    if name.lower().endswith(".json"):
        with fs.open(path, "rb") as file:
            head = file.read(1 << 16)
        return "karpathy" if b'"sentences"' in head or b'"sentids"' in head else "coco"
    if name.lower().endswith((".csv", ".txt")):
        with fs.open(path, "rb") as file:
            return "flickr30k" if _names_images(file.read(1 << 12)) else "prompts"
    return next((kind for kind, pattern in _KINDS.items() if pattern.search(name)), None)


def _names_images(head: bytes) -> bool:
    """Tells whether a text or csv file begins as Flickr's do: lines with the name of an image and a caption of it."""
    lines = head.decode("utf-8", "replace").lstrip("\ufeff").splitlines()[:20]
    if not lines or _IMAGE_HEADER.match(lines[0]):
        return True
    return 2 * sum(bool(_IMAGE_LINE.match(line)) for line in lines) > len(lines)


_IMAGE_HEADER = re.compile(r'"?image(_?name)?"?\s*[,|\t;]\s*"?(caption|comment)', re.I)
_IMAGE_LINE = re.compile(r'"?[^\t,|]+\.(jpe?g|png|gif|bmp|webp)[^\t,| ]*"?\s*[\t,|]', re.I)


def _find_in_folder(fs: fsspec.AbstractFileSystem, path: str, format: str) -> tuple[str, list[str], str]:
    root = fs.unstrip_protocol(path)
    entries = {os.path.basename(entry["name"].rstrip("/")): entry for entry in fs.ls(path, detail=True)}
    if JOB in entries and format in ("auto", "parquet"):
        path, format = join(path, "images"), "parquet"
        root = fs.unstrip_protocol(path)
        if not is_folder(fs, path):
            raise InputError(
                f"{root} is not there: the Diptych output it belongs to holds no images. Name another."
            )
        entries = {os.path.basename(entry["name"]): entry for entry in fs.ls(path, detail=True)}
    files = [entry["name"] for entry in entries.values() if entry["type"] == "file"]
    if "annotations" in entries:
        files += [
            entry["name"]
            for entry in fs.ls(join(path, "annotations"), detail=True)
            if entry["type"] == "file"
        ]
    by_kind = _sort_by_kind(files)
    if not any(by_kind.values()):
        by_kind = _sort_by_kind(_without_outputs(fs.find(path)))
    if format != "auto":
        chosen = [format] if by_kind.get(format) else []
    else:
        chosen = [kind for kind in _ANNOTATIONS if by_kind[kind]] or [k for k in _RECORDS if by_kind[k]][:1]
    if len(chosen) > 1 or (chosen == ["flickr30k"] and len(by_kind["flickr30k"]) > 1):
        names = sorted(name for kind in chosen for name in by_kind[kind])
        raise OptionError(
            f"{root} holds several annotations: {', '.join(names)}. Name one of them as --input."
        )
    if not chosen:
        what = "any format" if format == "auto" else f"format {format}"
        raise InputError(
            f"{root} holds no data of {what} ({len(entries)} entries). Name the files, or another folder."
        )
    if chosen == ["files"]:
        return "files", [root], root
    return chosen[0], [fs.unstrip_protocol(file) for file in by_kind[chosen[0]]], root


def _without_outputs(files: Sequence[str]) -> list[str]:
    """Returns files but those of Diptych outputs in between: an output may lie below its own input."""
    outputs = tuple(f"{os.path.dirname(file)}/" for file in files if os.path.basename(file) == JOB)
    return [file for file in files if not file.startswith(outputs)]


def _sort_by_kind(files: Sequence[str]) -> dict[str, list[str]]:
    """Returns files by format, from their names alone: those that are no data are left out."""
    by_kind: dict[str, list[str]] = {kind: [] for kind in FORMATS}
    for file in files:
        name = os.path.basename(file)
        if name.startswith((".", "_")):
            continue
        if _COCO_NAME.search(name):
            by_kind["coco"].append(file)
        elif _KARPATHY_NAME.search(name):
            by_kind["karpathy"].append(file)
        else:
            kind = next((kind for kind, pattern in _KINDS.items() if pattern.search(name)), None)
            if kind:
                by_kind[kind].append(file)
    return by_kind


def _common_folder(files: Sequence[str]) -> str:
    protocol, separator, _ = files[0].rpartition("://")
    shared = os.path.commonpath([os.path.dirname(file.rpartition("://")[2]) for file in files])
    return f"{protocol}{separator}{shared}"
