"""What an input is: finds the format of a path, a glob or a folder, and which of its files are the data.

A folder is walked once, at any depth. One kind of data makes its format; what else lies there is passed over and
counted, and two kinds in earnest are refused. Images beside shards are strays as long as they are ten or fewer.
"""

import dataclasses
import io
import itertools
import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import braceexpand
import fsspec
from fsspec.core import has_magic

from transforms.errors import InputError, OptionError
from transforms.output_layout import JOB, is_of_output
from transforms.sources import folder
from transforms.sources.encoding import find_encoding, lines
from transforms.sources.flickr30k import is_of_images
from transforms.sources.image_metadata import IMAGE_METADATA
from transforms.sources.json_stream import read_head
from transforms.sources.parts import is_image, is_leftover, may_be_image
from transforms.sources.prompts import EXTENSIONS as PROMPT_EXTENSIONS
from transforms.storage import exists, glob, input_errors, is_folder, join, locate

FORMATS = ("coco", "flickr30k", "karpathy", "webdataset", "parquet", "tfrecord", "files", "prompts")
_KINDS = {
    "coco": re.compile(r"^captions_.*\.json(\.gz)?$", re.I),
    "karpathy": re.compile(r"^dataset_.*\.json(\.gz)?$", re.I),
    "webdataset": re.compile(r"\.(tar(\.(gz|bz2|xz|zst|lz4))?|tgz|tbz2?|txz|tzst)$", re.I),
    "tfrecord": re.compile(r"\.(tfrecords?|tfrec)(\.gz)?$|\.tfrecord-\d+-of-\d+$", re.I),
    "parquet": re.compile(r"\.parquet$", re.I),
    "flickr30k": re.compile(
        r"\.token(\.txt)?$|^results.*\.csv$|^captions\.(txt|csv)$|^flickr_annotations.*\.csv$", re.I
    ),
    "prompts": re.compile(r"\.(jsonl|ndjson|tsv)(\.gz)?$", re.I),
}
_ANNOTATIONS, _SHARDS = ("coco", "karpathy", "flickr30k"), ("webdataset", "tfrecord", "parquet")
_ARCHIVE = re.compile(r"\.(zip|tar)$", re.I)
_TABLE = re.compile(r"\.(csv|tsv)$", re.I)
_HEAD_BYTES = 1 << 16
_MAX_STRAY_IMAGES, _MAX_SNIFFED, _MAX_NAMED = 10, 20, 3


@dataclasses.dataclass
class Found:
    """What an input is.

    Attributes:
        format: One of `FORMATS`.
        urls: Its files; of images, what lists them.
        root: URL of the folder that names are relative to.
        num_passed_over: How many files are no part of it.
        passed_over: The names of the first of them.
    """

    format: str
    urls: list[str]
    root: str
    num_passed_over: int = 0
    passed_over: list[str] = dataclasses.field(default_factory=list)

    def note(self) -> str | None:
        """Returns what to say of the files that are passed over; None where there are none."""
        if not self.num_passed_over:
            return None
        more = self.num_passed_over - len(self.passed_over)
        names = ", ".join(self.passed_over) + (f" and {more} more" if more else "")
        files = "file" if self.num_passed_over == 1 else "files"
        return (
            f"Passed over {self.num_passed_over} {files} that are no data of format {self.format}: {names}."
        )


class _Tree(NamedTuple):
    """The files of a folder by what they look like.

    Attributes:
        by_kind: Paths below the folder, of all kinds but images.
        num_images: How many images there are.
        others: Paths of what is no data, or belongs to another output.
        images: The names of the first images.
        image_folders: The folders that images lie in.
    """

    by_kind: dict[str, list[str]]
    num_images: int
    others: list[str]
    images: list[str]
    image_folders: set[str]


def expand_braces(url: str) -> list[str]:
    """Returns what `{000..009}` and `{a,b}` in a path stand for; the path itself where there is such a file."""
    if "{" not in url:
        return [url]
    fs, path = locate(url)
    with input_errors(url):
        if exists(fs, path):
            return [url]
    try:
        return list(braceexpand.braceexpand(url))
    except braceexpand.UnbalancedBracesError:  # type: ignore[attr-defined]  # its stubs leave it out
        return [url]


def find(url: str, format: str) -> Found:
    """Returns what one input is.

    Raises:
        InputError: It is not there, may not be read, or holds no data of the format.
        OptionError: Its format cannot be told, or it is of several.
    """
    fs, path = locate(url)
    with input_errors(url):
        if has_magic(without_query(path)) and not exists(fs, path):
            return _find_in_glob(fs, url, path, format)
        if is_folder(fs, path):
            return _find_in_folder(fs, path, format)
        fs.info(path)
    root = os.path.dirname(without_query(path))
    return _of_files(fs, url, [path], root, format)


def _find_in_glob(fs: fsspec.AbstractFileSystem, url: str, path: str, format: str) -> Found:
    matches = glob(fs, path)
    files = [name for name, info in matches.items() if info["type"] == "file"]
    folders = [name for name, info in matches.items() if info["type"] == "directory"]
    root = os.path.dirname(re.split(r"[*?\[]", path, maxsplit=1)[0])
    parts = [_find_in_folder(fs, name, format) for name in sorted(folders)]
    if files:
        parts.append(_of_files(fs, url, files, root, format))
    if not parts:
        raise InputError(
            f"{url} matches no file. Expected a path, a URL, a glob or a folder with data: check it."
        )
    if len(formats := sorted({part.format for part in parts})) > 1:
        raise OptionError(
            f"{url} matches inputs of several formats, {formats}. Give those of one format to a job."
        )
    urls = [one for part in parts for one in part.urls]
    if formats == ["files"] and files:  # the pattern lists its files for itself, in bounded memory
        urls = [fs.unstrip_protocol(path), *(one for part in parts[:-1] for one in part.urls)]
    merged = Found(formats[0], urls, fs.unstrip_protocol(root))
    for part in parts:
        merged.num_passed_over += part.num_passed_over
        merged.passed_over += part.passed_over
    merged.passed_over = merged.passed_over[:_MAX_NAMED]
    return merged


def _of_files(fs: fsspec.AbstractFileSystem, url: str, files: list[str], root: str, format: str) -> Found:
    kinds = {kind_of(fs, file) for file in files} if format == "auto" else {format}
    if len(kinds) > 1 or None in kinds:
        raise OptionError(
            f"{url}: cannot tell the format of {files[0]}. Name it with --format ({', '.join(FORMATS)})."
        )
    kind = str(kinds.pop())
    urls = [fs.unstrip_protocol(file) for file in files]
    return Found(kind, urls, fs.unstrip_protocol(root))


def kind_of(fs: fsspec.AbstractFileSystem, path: str) -> str | None:
    """Returns the format of a file, from its name and, of JSON and text, its first bytes."""
    name = os.path.basename(without_query(path))
    if name.lower().endswith((".json", ".json.gz")):
        with fs.open(path, "rb") as file:
            head = read_head(file)
        return "karpathy" if '"sentences"' in head or '"sentids"' in head else "coco"
    if is_table(name):
        with fs.open(path, "rb") as file:
            return "flickr30k" if _names_images(file.read(_HEAD_BYTES)) else "prompts"
    kind = next((kind for kind, pattern in _KINDS.items() if pattern.search(name)), None)
    if kind is None and PROMPT_EXTENSIONS.search(name):  # packed text
        return "prompts"
    if kind is None and (is_image(name) or may_be_image(fs, path)):
        return "files"
    return kind


def is_table(name: str) -> bool:
    """Tells whether a file may be a table of captions, by its name."""
    return name.lower().endswith((".csv", ".tsv", ".txt"))


def _names_images(head: bytes) -> bool:
    """Tells whether a text file begins as tables of images do: lines with the name of an image and a caption of it."""
    if not head.strip():
        return False
    file = io.BytesIO(head)
    encoding = find_encoding(file)
    first = [line.text for line in itertools.islice(lines(file, encoding), 100)]
    if len(head) == _HEAD_BYTES:
        first = first[:-1] or first  # the last line may be cut off
    return is_of_images(first)


def without_query(path: str) -> str:
    """Returns the path of a file without the query that its URL may end in, where paths are URLs.

    A question mark that no `NAME=` follows is one of a pattern.
    """
    return _QUERY.split(path, maxsplit=1)[0] if path.startswith(("http://", "https://")) else path


_QUERY = re.compile(r"\?(?=[\w.~%+-]+=)|#")


def _find_in_folder(fs: fsspec.AbstractFileSystem, path: str, format: str) -> Found:
    root = fs.unstrip_protocol(path)
    if format in ("auto", "parquet") and exists(fs, join(path, JOB)):
        return _of_output(fs, join(path, "images"))
    tree = _walk(root)
    chosen, files = _choose(fs, path, root, tree, format)
    if chosen == "files":  # lists for itself, in bounded memory, and counts what it passes over
        return Found("files", [root], root)
    own = {*files}
    theirs = chosen in _ANNOTATIONS
    rest = [name for names in tree.by_kind.values() for name in names if name not in own]
    rest = sorted([*(name for name in rest if not (theirs and _ARCHIVE.search(name))), *tree.others])
    num_passed_over = len(rest)
    if not theirs:
        rest, num_passed_over = [*rest, *tree.images], num_passed_over + tree.num_images
    urls = [fs.unstrip_protocol(join(path, name)) for name in sorted(files)]
    return Found(chosen, urls, root, num_passed_over, rest[:_MAX_NAMED])


def _of_output(fs: fsspec.AbstractFileSystem, path: str) -> Found:
    root = fs.unstrip_protocol(path)
    if not is_folder(fs, path):
        raise InputError(
            f"{root} is not there: the Diptych output it belongs to holds no images. Name another."
        )
    names = [info["name"] for info in fs.ls(path, detail=True) if info["type"] == "file"]
    own = [name for name in names if _KINDS["parquet"].search(name) and os.path.basename(name)[0] not in "._"]
    return Found("parquet", [fs.unstrip_protocol(name) for name in own], root)


def _walk(root: str) -> _Tree:
    """Sorts all files below a folder by their names; images are counted, and not held."""
    by_kind: dict[str, list[str]] = {kind: [] for kind in (*FORMATS, "table", "metadata", "text", "unknown")}
    others: list[str] = []
    images: list[str] = []
    outputs: set[str] = set()
    image_folders: set[str] = set()
    num_images = 0
    for member in folder.members(root):
        name = posixpath.basename(member.path)
        if name == JOB:
            outputs.add(posixpath.dirname(member.path))
        if is_leftover(member.path):
            others.append(member.path)
        elif is_image(name):
            num_images += 1
            image_folders.add(posixpath.dirname(member.path))
            if len(images) < _MAX_NAMED:
                images.append(member.path)
        elif any(part[:1] in (".", "_") for part in member.path.split("/")):
            others.append(member.path)
        else:
            by_kind[_kind_by_name(name)].append(member.path)
    # A job's output may lie below its own input; it is not counted, or the count would grow as the job runs
    for names in (*by_kind.values(), others):
        names[:] = [name for name in names if not is_of_output(name, outputs)]
    return _Tree(by_kind, num_images, others, sorted(images), image_folders)


def _kind_by_name(name: str) -> str:
    if IMAGE_METADATA.match(name):
        return "metadata"
    kind = next((kind for kind, pattern in _KINDS.items() if pattern.search(name)), None)
    if kind and not (kind == "prompts" and _TABLE.search(name)):
        return kind
    if _TABLE.search(name):
        return "table"
    return "text" if PROMPT_EXTENSIONS.search(name) else "unknown"


def _choose(
    fs: fsspec.AbstractFileSystem, path: str, root: str, tree: _Tree, format: str
) -> tuple[str, Sequence[str]]:
    """Returns the format of a folder and its files of that format, below it."""
    by_kind = tree.by_kind
    if format == "auto" or format == "flickr30k":
        _sniff_tables(fs, path, tree, needed=format != "auto")
    if format != "auto":
        files = by_kind[format]
        if format == "parquet":
            files = [*files, *(name for name in by_kind["metadata"] if name.lower().endswith(".parquet"))]
        if format == "prompts":
            files = [*files, *by_kind["table"], *by_kind["text"], *by_kind["parquet"]]
        if not files and not (format == "files" and (tree.num_images or by_kind["unknown"])):
            raise _no_data(root, f"format {format}", tree)
        _refuse_several(root, format, files)
        return format, files
    annotations = [kind for kind in _ANNOTATIONS if by_kind[kind]]
    _drop_metadata_of_shards(by_kind, tree)
    shards = [kind for kind in _SHARDS if by_kind[kind] and not (annotations and kind == "webdataset")]
    _refuse_two_kinds(root, tree, annotations, shards)
    if annotations:
        _refuse_several(root, annotations[0], by_kind[annotations[0]])
        return annotations[0], by_kind[annotations[0]]
    if shards:
        return shards[0], by_kind[shards[0]]
    if tree.num_images or any(
        may_be_image(fs, join(path, name)) for name in by_kind["unknown"][:_MAX_SNIFFED]
    ):
        return "files", []
    if prompts := by_kind["prompts"] or (by_kind["metadata"] and not tree.num_images and by_kind["metadata"]):
        return "prompts", prompts
    raise _no_data(root, "any format", tree)


def _sniff_tables(fs: fsspec.AbstractFileSystem, path: str, tree: _Tree, needed: bool) -> None:
    """Takes csv files near the top whose lines name images for captions of theirs, where no other file has these."""
    by_kind = tree.by_kind
    if any(by_kind[kind] for kind in _ANNOTATIONS) and not needed:
        return
    near = [name for name in by_kind["table"] if name.count("/") <= 1][:_MAX_SNIFFED]
    for name in near:
        if kind_of(fs, join(path, name)) == "flickr30k":
            by_kind["table"].remove(name)
            by_kind["flickr30k"].append(name)


def _drop_metadata_of_shards(by_kind: dict[str, list[str]], tree: _Tree) -> None:
    """Takes a Parquet of the name of a tar, a TFRecord or a folder of images for its metadata, as img2dataset's are."""
    stems = {name.split(".")[0] for kind in ("webdataset", "tfrecord") for name in by_kind[kind]}
    stems |= tree.image_folders
    about = [name for name in by_kind["parquet"] if name.removesuffix(".parquet") in stems]
    by_kind["parquet"] = [name for name in by_kind["parquet"] if name not in {*about}]
    tree.others.extend(about)


def _refuse_two_kinds(root: str, tree: _Tree, annotations: Sequence[str], shards: Sequence[str]) -> None:
    kinds = [*annotations, *shards]
    described = [f"{len(tree.by_kind[kind])} of {kind} ({min(tree.by_kind[kind])}, …)" for kind in kinds]
    if shards and not annotations and tree.num_images > _MAX_STRAY_IMAGES:
        kinds.append("files")
        described.append(f"{tree.num_images} images ({tree.images[0]}, …)")
    if len(annotations) > 1:
        names = sorted(name for kind in annotations for name in tree.by_kind[kind])
        raise OptionError(
            f"{root} holds several annotations: {', '.join(names[:10])}. Name one of them as --input."
        )
    if len(kinds) > 1:
        raise OptionError(
            f"{root} holds data of several kinds: {'; '.join(described)}. Say which is meant with --format "
            f"({', '.join(kinds)}), or name its files as --input."
        )


def _refuse_several(root: str, kind: str, files: Sequence[str]) -> None:
    if kind == "flickr30k" and len(files) > 1:
        raise OptionError(
            f"{root} holds several annotations: {', '.join(sorted(files)[:10])}. Name one of them as --input."
        )


def _no_data(root: str, what: str, tree: _Tree) -> InputError:
    names = sorted([*itertools.chain(*tree.by_kind.values()), *tree.others, *tree.images])
    num_files = sum(map(len, tree.by_kind.values())) + len(tree.others) + tree.num_images
    there = f"{num_files} files: {', '.join(names[:_MAX_NAMED])}" if names else "it is empty"
    return InputError(f"{root} holds no data of {what} ({there}). Name the files, or another folder.")


def common_folder(files: Iterable[str]) -> str:
    """Returns the URL of the folder that all files lie below."""
    paths = [without_query(file) for file in files]
    protocol, separator, _ = paths[0].rpartition("://")
    shared = os.path.commonpath([os.path.dirname(file.rpartition("://")[2]) for file in paths])
    return f"{protocol}{separator}{shared}"
