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
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import braceexpand
import fsspec
from fsspec.core import has_magic

from diptych.models.files.location import without_query
from diptych.transforms.errors import InputError, OptionError
from diptych.transforms.output_layout import JOB, is_of_output
from diptych.transforms.sources.base import passed_over_note
from diptych.transforms.sources.planned import image_folder
from diptych.transforms.sources.planned.entries import IMAGE_EXTENSIONS, is_image, is_leftover, may_be_image
from diptych.transforms.sources.planned.flickr30k import is_of_images
from diptych.transforms.sources.planned.image_metadata import IMAGE_METADATA
from diptych.transforms.sources.sharded.prompts import EXTENSIONS as PROMPT_EXTENSIONS
from diptych.transforms.sources.text.encoding import find_encoding, lines
from diptych.transforms.sources.text.json_stream import read_ends, read_head
from diptych.transforms.sources.text.tables import CAPTION_NAMES
from diptych.transforms.storage import exists, glob, input_errors, is_folder, join, locate

FORMATS = ("coco", "flickr30k", "karpathy", "webdataset", "parquet", "tfrecord", "files", "prompts")
_KINDS = {
    "coco": re.compile(r"^captions_.*\.json(\.gz)?$", re.I),
    "karpathy": re.compile(r"^dataset_.*\.json(\.gz)?$", re.I),
    "webdataset": re.compile(r"\.(tar(\.(gz|bz2|xz|zst|lz4))?|tgz|tbz2?|txz|tzst)$", re.I),
    # TensorFlow's writers name shards without an extension
    "tfrecord": re.compile(r"\.(tfrecords?|tfrec)(\.gz)?$|-\d{4,}-of-\d{4,}$", re.I),
    "parquet": re.compile(r"\.parquet$", re.I),
    "flickr30k": re.compile(
        r"\.token(\.txt)?$|^results.*\.csv$|^captions\.(txt|csv)$|^flickr_annotations.*\.csv$", re.I
    ),
    "prompts": re.compile(r"\.(jsonl|ndjson|tsv)(\.gz)?$", re.I),
}
_ANNOTATIONS, _SHARDS = ("coco", "karpathy", "flickr30k"), ("webdataset", "tfrecord", "parquet")
_ARCHIVE = re.compile(r"\.(zip|tar)$", re.I)
_JSON = re.compile(r"\.json(\.gz)?$", re.I)
# Roboflow's exports; other names that begin so are no data
_ROBOFLOW = re.compile(r"^(?:[^._/][^/]*/)*_annotations[^/]*\.(json|csv)$", re.I)
_USUAL_ANNOTATION = re.compile(r"anno|caption|coco|dataset|label|train|val|test", re.I)
_IMAGE_NAME = r"\"[^\"]+\.(?:jpe?g|png|gif|bmp|webp|tiff?)\""
_CAPTION_FIELD = re.compile(rf"\"(?:{'|'.join(CAPTION_NAMES)})\"\s*:", re.I)
_SIDE_CAR = re.compile(r"\.(txt|caption|json)$", re.I)
_TABLE = re.compile(r"\.(csv|tsv)$", re.I)
_HEAD_BYTES = 1 << 16
_MAX_STRAY_IMAGES, _MAX_SNIFFED, _MAX_NAMED, _LINES_TO_TELL = 10, 20, 3, 100


@dataclasses.dataclass
class Found:
    """What an input is.

    Attributes:
        format: One of `FORMATS`.
        urls: Its files; of images, what lists them.
        root: URL of the folder that names are relative to.
        num_passed_over: How many files are no part of it.
        passed_over: The names of the first of them.
        image_folders: Of a folder with annotations: how many images lie in each folder, by its path below the root.
        archives: Of such a folder: the archives in it, which may hold the images.
    """

    format: str
    urls: list[str]
    root: str
    num_passed_over: int = 0
    passed_over: list[str] = dataclasses.field(default_factory=list)
    image_folders: Mapping[str, int] = dataclasses.field(default_factory=dict)
    archives: Sequence[str] = ()

    def note(self) -> str | None:
        """Returns what to say of the files that are passed over; None where there are none."""
        if not self.num_passed_over:
            return None
        return passed_over_note(self.format, self.num_passed_over, self.passed_over)


class _Tree(NamedTuple):
    """The files of a folder by what they look like.

    Attributes:
        by_kind: Paths below the folder, of all kinds but images.
        num_images: How many images there are.
        others: Paths of what is no data, or belongs to another output.
        images: The names of the first images: of all where they may be strays.
        image_folders: How many images lie in each folder.
    """

    by_kind: dict[str, list[str]]
    num_images: int
    others: list[str]
    images: list[str]
    image_folders: Counter[str]


def expand_braces(url: str) -> list[str]:
    """Returns what `{000..009}` and `{a,b}` in a path stand for; the path itself where there is such a file.

    Raises:
        OptionError: They stand for more than a million paths.
    """
    if "{" not in url:
        return [url]
    fs, path = locate(url)
    with input_errors(url):
        if exists(fs, path):
            return [url]
    # the library lists each range before it gives the first path
    ranges = _BRACE_RANGE.findall(url)
    is_small = all(
        len(first + last) <= 18 and abs(int(last) - int(first)) < _MAX_PATHS for first, last in ranges
    )
    try:
        urls = list(itertools.islice(braceexpand.braceexpand(url), _MAX_PATHS + 1)) if is_small else []
    except braceexpand.UnbalancedBracesError:  # type: ignore[attr-defined]  # its stubs leave it out
        return [url]
    if not 0 < len(urls) <= _MAX_PATHS:
        raise OptionError(
            f"{url} stands for more than {_MAX_PATHS:,} files. Name the folder, or a glob such as part-*.tar, which "
            "stands for those that are there."
        )
    return urls


_BRACE_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
_MAX_PATHS = 1_000_000


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


def _find_in_folder(fs: fsspec.AbstractFileSystem, path: str, format: str) -> Found:
    root = fs.unstrip_protocol(path)
    if format in ("auto", "parquet") and exists(fs, join(path, JOB)):
        return _of_output(fs, join(path, "images"))
    tree = _walk(root)
    chosen, files = _choose(fs, path, root, tree, format)
    if chosen == "files":  # lists for itself, in bounded memory, and counts what it passes over
        return Found("files", [root], root)
    own = {*files}
    urls = [fs.unstrip_protocol(join(path, name)) for name in sorted(files)]
    rest = [name for names in tree.by_kind.values() for name in names if name not in own]
    if chosen in _ANNOTATIONS:  # the source knows which of the images and archives are its own
        archives = [name for name in rest if _ARCHIVE.search(name)]
        hidden = [name for name in tree.others if is_image(name)]
        rest = sorted({*rest, *tree.others} - {*archives, *hidden})
        folders = tree.image_folders + Counter(map(posixpath.dirname, hidden))
        return Found(chosen, urls, root, len(rest), rest[:_MAX_NAMED], folders, archives)
    rest = [*sorted([*rest, *tree.others]), *tree.images]
    num_passed_over = len(rest) - len(tree.images) + tree.num_images
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
    image_folders = Counter[str]()
    num_images = 0
    for member in image_folder.members(root):
        name = posixpath.basename(member.path)
        if name == JOB:
            outputs.add(posixpath.dirname(member.path))
        if is_leftover(member.path):
            others.append(member.path)
        elif is_image(name):
            num_images += 1
            image_folders[posixpath.dirname(member.path)] += 1
            if len(images) < _MAX_STRAY_IMAGES:
                images.append(member.path)
        elif any(part[:1] in (".", "_") for part in member.path.split("/")) and not _ROBOFLOW.search(
            member.path
        ):
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
    unread = _sniff_annotations(fs, path, tree, format) if format in ("auto", *_ANNOTATIONS) else ()
    if format != "auto":
        files = by_kind[format]
        if format == "parquet":
            files = [*files, *(name for name in by_kind["metadata"] if name.lower().endswith(".parquet"))]
        if format == "prompts":
            files = [*files, *by_kind["table"], *by_kind["text"], *by_kind["parquet"]]
        if not files and not (format == "files" and (tree.num_images or by_kind["unknown"])):
            raise _no_data(root, f"format {format}", tree)
        return format, files
    annotations = [kind for kind in _ANNOTATIONS if by_kind[kind]]
    _drop_metadata_of_shards(by_kind, tree)
    shards = [kind for kind in _SHARDS if by_kind[kind] and not (annotations and kind == "webdataset")]
    _refuse_two_kinds(fs, path, tree, annotations, shards)
    if annotations:
        _refuse_several(root, annotations[0], by_kind[annotations[0]])
        return annotations[0], by_kind[annotations[0]]
    if shards:
        return shards[0], by_kind[shards[0]]
    if tree.num_images or any(
        may_be_image(fs, join(path, name)) for name in by_kind["unknown"][:_MAX_SNIFFED]
    ):
        _refuse_unread(root, tree, unread)
        return "files", []
    if prompts := by_kind["prompts"] or (by_kind["metadata"] and not tree.num_images and by_kind["metadata"]):
        return "prompts", prompts
    raise _no_data(root, "any format", tree)


def _sniff_annotations(fs: fsspec.AbstractFileSystem, path: str, tree: _Tree, format: str) -> Sequence[str]:
    """Takes files near the top for annotations by their content, where no name tells of one.

    Returns:
        Files that have captions of images in a form that is not read.
    """
    by_kind = tree.by_kind
    if format == "auto" and any(by_kind[kind] for kind in _ANNOTATIONS):
        return []
    near = [
        (not _USUAL_ANNOTATION.search(posixpath.basename(name)), name.count("/"), name, kind)
        for kind in ("table", "text", "unknown", "prompts")
        for name in by_kind[kind]
        if name.count("/") <= 1 and (kind != "unknown" or _JSON.search(name))
    ]
    unread: list[str] = []
    for _, _, name, kind in sorted(near)[:_MAX_SNIFFED]:
        annotation = _annotation_kind(fs, join(path, name))
        if annotation is None or _is_side_car(fs, join(path, name)):
            continue
        if annotation in _ANNOTATIONS:
            by_kind[kind].remove(name)
            by_kind[annotation].append(name)
        else:
            unread.append(name)
    return unread


def _annotation_kind(fs: fsspec.AbstractFileSystem, path: str) -> str | None:
    """Returns the format of an annotation, by its content; "unread" of one that is not read, None of other files."""
    if path.lower().endswith(_NAMED_BY_CONTENT):
        return "flickr30k" if kind_of(fs, path) == "flickr30k" else None
    if not (is_lines := path.lower().endswith((".jsonl", ".ndjson"))) and not _JSON.search(path):
        return None
    with fs.open(path, "rb") as file:
        text = read_ends(file)
    has_captions = _CAPTION_FIELD.search(text) is not None
    if '"images"' in text and not is_lines:
        if '"sentences"' in text or '"sentids"' in text:
            return "karpathy"
        if '"annotations"' in text or '"image_id"' in text:
            return "coco" if has_captions else None
    names_image = re.search(_IMAGE_NAME + (r"" if has_captions else r"\s*:"), text) is not None
    return "unread" if names_image else None


def _is_side_car(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    """Tells whether a file of text is that of one image: there is an image of its name beside it."""
    root = posixpath.splitext(path)[0]
    return _SIDE_CAR.search(path) is not None and any(
        exists(fs, root + extension) for extension in IMAGE_EXTENSIONS
    )


_NAMED_BY_CONTENT = (".csv", ".tsv", ".txt")


def _drop_metadata_of_shards(by_kind: dict[str, list[str]], tree: _Tree) -> None:
    """Takes a Parquet of the name of a tar, a TFRecord or a folder of images for its metadata, as img2dataset's are."""
    stems = {name.split(".")[0] for kind in ("webdataset", "tfrecord") for name in by_kind[kind]}
    stems |= tree.image_folders.keys()
    about = [name for name in by_kind["parquet"] if name.removesuffix(".parquet") in stems]
    by_kind["parquet"] = [name for name in by_kind["parquet"] if name not in {*about}]
    tree.others.extend(about)


def _refuse_two_kinds(
    fs: fsspec.AbstractFileSystem, path: str, tree: _Tree, annotations: Sequence[str], shards: Sequence[str]
) -> None:
    root = fs.unstrip_protocol(path)
    kinds = [*annotations, *shards]
    described = [f"{len(tree.by_kind[kind])} of {kind} ({min(tree.by_kind[kind])}, …)" for kind in kinds]
    if shards and not annotations and (tree.num_images > _MAX_STRAY_IMAGES or _are_captioned(fs, path, tree)):
        kinds.append("files")
        described.append(f"{tree.num_images} image{'s' * (tree.num_images > 1)} ({tree.images[0]}, …)")
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


def _are_captioned(fs: fsspec.AbstractFileSystem, path: str, tree: _Tree) -> bool:
    """Tells whether a few images have captions beside them, and so are no strays."""
    texts = [name for kind in ("text", "unknown") for name in tree.by_kind[kind] if _SIDE_CAR.search(name)]
    if {posixpath.splitext(name)[0] for name in texts} & {
        posixpath.splitext(name)[0] for name in tree.images
    }:
        return True
    names = [posixpath.basename(name) for name in tree.images]
    for name in tree.by_kind["metadata"][:_MAX_SNIFFED] if names else ():
        if name.lower().endswith(".parquet"):
            return True
        with fs.open(join(path, name), "rb") as file:
            encoding = find_encoding(file)
            head = [line.text for line in itertools.islice(lines(file, encoding), _LINES_TO_TELL)]
        if any(image in line for line in head for image in names):
            return True
    return False


def _refuse_several(root: str, kind: str, files: Sequence[str]) -> None:
    if kind == "flickr30k" and len(files) > 1:
        raise OptionError(
            f"{root} holds several annotations: {', '.join(sorted(files)[:10])}. Name one of them as --input."
        )


def _refuse_unread(root: str, tree: _Tree, unread: Sequence[str]) -> None:
    if unread and not tree.by_kind["metadata"]:
        raise OptionError(
            f"{root} has images, and {unread[0]} has captions of images in a form that is not read. Write them as "
            "metadata.jsonl (file_name, text) beside the images, or as csv (image,caption); or say --format files, "
            "to read the images without them."
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
