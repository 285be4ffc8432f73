"""Input of every format to shards: finds out what an input is and opens the source that reads it."""

import collections
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from diptych.models.files.location import redacted, without_query
from diptych.transforms.chunk import add_counts
from diptych.transforms.errors import OptionError
from diptych.transforms.output_layout import JOB
from diptych.transforms.sources.base import ColumnNames, Source
from diptych.transforms.sources.detect import FORMATS as FORMATS
from diptych.transforms.sources.detect import common_folder, expand_braces, find, is_table
from diptych.transforms.sources.planned.annotations import AnnotationSource
from diptych.transforms.sources.planned.coco import CocoSource
from diptych.transforms.sources.planned.flickr30k import Flickr30kSource
from diptych.transforms.sources.planned.image_files import FilesSource
from diptych.transforms.sources.planned.karpathy import KarpathySource
from diptych.transforms.sources.sharded.parquet import ParquetSource
from diptych.transforms.sources.sharded.prompts import PromptsSource
from diptych.transforms.sources.sharded.tfrecord import TfrecordSource
from diptych.transforms.sources.sharded.webdataset import WebdatasetSource
from diptych.transforms.storage import input_errors, is_file, join, locate


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """What the user says about the input beyond its place.

    Attributes:
        images: Folder or archive with the images of an annotation file; None looks beside it.
        split: Splits of a Karpathy file to read, separated by commas; None reads all.
        columns: The columns, fields or features that the user names.
        metadata_columns: The source's own columns to carry.
    """

    images: str | None = None
    split: str | None = None
    columns: ColumnNames = ColumnNames()
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
    found = [find(one, format) for url in inputs for one in expand_braces(url)]
    formats = sorted({part.format for part in found})
    if len(formats) > 1:
        raise OptionError(f"The inputs are of several formats, {formats}. Give those of one format to a job.")
    files = sorted({file for part in found for file in part.urls})
    if formats == ["prompts"] and not texts_only:
        if not (options.columns.image and format == "auto" and all(map(is_table, files))):
            raise OptionError(
                f"{inputs[0]} holds prompts, which have no images: no column of its first lines has names such as "
                "a.jpg. Prompts go with `diptych embed` and `diptych generate`. If a column names images, say which "
                "with --image_column."
            )
        formats = ["flickr30k"]
    names = collections.Counter(map(redacted, files))
    if twice := sorted(name for name, count in names.items() if count > 1):
        raise OptionError(
            f"{twice[0]} is given {names[twice[0]]} times, under several signatures or users. Give each input once."
        )
    root = found[0].root if len(found) == 1 else common_folder(files)
    source = _open(formats[0], tuple(files), root, options, texts_only)
    passed_over = {"passed_over_files": sum(part.num_passed_over for part in found)}
    if isinstance(source, AnnotationSource):
        for part in found:
            elsewhere = source.count_elsewhere(part.root, part.image_folders, part.archives)
            passed_over = add_counts(passed_over, elsewhere)
    return dataclasses.replace(
        source,
        passed_over=add_counts(passed_over, {}),
        notes=(*(note for part in found if (note := part.note())), *source.column_notes()),
    )


def output_of(url: str) -> str | None:
    """Returns the Diptych output that an input names: `OUT`, `OUT/images`, or files in that; None of other data."""
    fs, path = locate(url)
    if without_query(path) != path:  # it gives access to one file
        return None
    path = path.rstrip("/")
    folders = [path]
    for images in (path, os.path.dirname(path)):
        if os.path.basename(images) == "images":
            folders.append(os.path.dirname(images))
    with input_errors(url):
        found = next((folder for folder in folders if is_file(fs, join(folder, JOB))), None)
    return found and fs.unstrip_protocol(found)


def _open(format: str, urls: tuple[str, ...], root: str, options: SourceOptions, texts_only: bool) -> Source:
    if options.split and format != "karpathy":
        raise OptionError(
            f"--split {options.split} goes with a Karpathy file; the input is of format {format}."
        )
    if options.images and format not in ("coco", "flickr30k", "karpathy"):
        raise OptionError(
            f"--images {options.images} goes with an annotation file; the input is of format {format}."
        )
    kind = _SOURCES[format]
    flags = {f"{name}_column": value for name, value in vars(options.columns).items()}
    for flag, value in (flags | {"metadata_columns": ",".join(options.metadata_columns)}).items():
        if value and flag not in kind.column_flags:
            raise OptionError(
                f"--{flag} {value} does not go with the input, which is of format {format}: it has no such columns. "
                "Leave the flag out, or say with --format what the input is."
            )
    values: dict[str, Any] = {"columns": options.columns}
    if "metadata_columns" in kind.column_flags:
        values["metadata_columns"] = options.metadata_columns
    if issubclass(kind, AnnotationSource):
        values |= {"images": options.images, "texts_only": texts_only}
    if issubclass(kind, KarpathySource):
        values["split"] = options.split
    source: Source = kind(urls, root, **values)
    return source


_SOURCES: dict[str, Any] = {
    source.format: source
    for source in (
        CocoSource,
        Flickr30kSource,
        KarpathySource,
        WebdatasetSource,
        ParquetSource,
        TfrecordSource,
        FilesSource,
        PromptsSource,
    )
}
