"""WebDataset shards: tar files in which consecutive members of one name are one sample.

`KEY.jpg KEY.txt KEY.json` is a sample with the key `KEY`; see
https://github.com/webdataset/webdataset and img2dataset's `--output_format webdataset`.
"""

import dataclasses
import json
import posixpath
from collections.abc import Iterator
from typing import Any, ClassVar

from transforms.sources.base import InputFile, Lost, Record, Row, Shard, Source, shard_names
from transforms.sources.shardfile import (
    MAX_RECORD_BYTES,
    ShardDamage,
    encodable,
    input_files,
    metadata_text,
    open_shard,
    to_text,
    unpacked,
)
from transforms.sources.tar import TarReader

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})
_CAPTION_EXTENSIONS = ("txt", "caption")
_TEXT_EXTENSIONS = frozenset({"json", *_CAPTION_EXTENSIONS})


@dataclasses.dataclass(frozen=True)
class WebdatasetSource(Source):
    """Tar shards, plain or gzipped.

    Attributes:
        urls: The shard files, sorted.
        root: The input root; shards are named by their path below it.
        metadata_columns: Keys of the samples' `.json` members to keep as metadata.
    """

    urls: tuple[str, ...]
    root: str
    metadata_columns: tuple[str, ...] = ()

    column_flags: ClassVar[frozenset[str]] = frozenset({"metadata_columns"})

    def inputs(self) -> list[InputFile]:
        """Returns the shard files with their sizes."""
        return input_files(self.urls, self.root)

    def shards(self, plan_folder: str, rows_per_shard: int) -> list[Shard]:
        """Returns a shard for each file."""
        files = self.inputs()
        names = shard_names(file.name for file in files)
        return [
            WebdatasetShard(name, file.size_bytes, None, url, file.name, self.metadata_columns)
            for name, file, url in zip(names, files, self.urls, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class WebdatasetShard(Shard):
    """One tar file.

    Attributes:
        url: Where it is.
        source: Its path below the input root.
        metadata_columns: Keys of the samples' `.json` members to keep as metadata.
    """

    url: str
    source: str
    metadata_columns: tuple[str, ...] = ()

    @property
    def input(self) -> str:
        """The file's path below the input root."""
        return self.source

    def records(self, skip: int) -> Iterator[Record]:
        """Yields the samples in order. One without an image is lost as `missing_image`.

        A sample is over when the next begins: of the one that damage cuts into, only the loss is given.
        """
        with open_shard(self.url) as file:
            stream = unpacked(file)
            tar = TarReader(stream)
            sample: _Sample | None = None
            num_samples = 0
            try:
                while (name := tar.next()) is not None:
                    key, extension = _split(name)
                    if not key:
                        continue
                    if sample is None or key != sample.key or extension in sample.members:
                        if sample is not None:
                            yield self._record(sample)
                        sample = _Sample(key, num_samples)
                        num_samples += 1
                    sample.add(extension, tar, needed=sample.row >= skip)
            except ShardDamage as damage:
                yield self._lost(damage, sample, tar.offset, packed=stream is not file)
                return
            if sample is not None:
                yield self._record(sample)

    def _lost(self, damage: ShardDamage, sample: "_Sample | None", offset: int, packed: bool) -> Lost:
        place = f"{self.source}, byte {offset}" + (" of the unpacked tar" if packed else "")
        if sample is None:
            return Lost("", 0, damage.reason, f"{place}: {damage}")
        return Lost(sample.key, sample.row, damage.reason, f"{place}: {damage}", sample.image)

    def _record(self, sample: "_Sample") -> Record:
        fields = _json_object(sample.members.get("json", b""))
        if sample.oversize:
            return Lost(sample.key, sample.row, "record_corrupt", sample.oversize)
        if sample.image is None:
            there = ", ".join(sorted(sample.members))
            message = f"the sample has no image (jpg, png, webp, ...); its members: {there}"
            if error := fields.get("error_message"):
                message += f"; its error_message: {encodable(str(error))}"
            return Lost(sample.key, sample.row, "missing_image", message)
        return Row(
            sample.key,
            sample.image,
            f"{posixpath.basename(sample.key)}.{sample.image_extension}",
            _json_captions(fields) or _text_captions(sample),
            self.source,
            sample.row,
            {column: metadata_text(fields.get(column)) for column in self.metadata_columns},
        )


class _Sample:
    """Members seen so far of one sample; those that are not needed are there, but empty."""

    __slots__ = ("image", "image_extension", "key", "members", "oversize", "row")

    def __init__(self, key: str, row: int) -> None:
        self.key = key
        self.row = row
        self.members: dict[str, bytes] = {}
        self.image: bytes | None = None
        self.image_extension = ""
        self.oversize = ""

    def add(self, extension: str, tar: TarReader, needed: bool) -> None:
        self.members[extension] = b""
        is_image = self.image is None and extension in IMAGE_EXTENSIONS
        if not is_image and extension not in _TEXT_EXTENSIONS:
            return
        if tar.size > MAX_RECORD_BYTES:
            self.oversize = f"its {extension} has {tar.size} bytes; at most {MAX_RECORD_BYTES} are read"
            return
        data = tar.read() if needed else b""
        if is_image:
            self.image, self.image_extension = data, extension
        else:
            self.members[extension] = data


def _split(name: str) -> tuple[str, str]:
    """Returns key and extension of a member; an empty key where it belongs to no sample.

    webdataset's rule: the key ends at the first dot of the last path component. Hidden files (`._x` of macOS)
    have no key by it.
    """
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, _, extension = last.partition(".")
    if not stem or not extension or folder.partition("/")[0] == "__MACOSX":
        return "", ""
    return folder + slash + stem, extension.lower()


def _json_object(data: bytes) -> dict[str, Any]:
    if not data:
        return {}
    try:
        value = json.loads(to_text(data))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _json_captions(fields: dict[str, Any]) -> list[str]:
    value = fields.get("captions") or fields.get("caption")
    values = value if isinstance(value, list) else [value]
    return [encodable(caption) for caption in values if isinstance(caption, str) and caption.strip()]


def _text_captions(sample: _Sample) -> list[str]:
    # Only line ends part captions: str.splitlines would also cut at form feeds and Unicode separators.
    texts = [to_text(sample.members[name]) for name in _CAPTION_EXTENSIONS if name in sample.members]
    lines = "\n".join(texts).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line for line in lines if line.strip()]
