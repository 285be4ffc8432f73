"""WebDataset shards: tar files in which consecutive members of one name are one sample.

`KEY.jpg KEY.txt KEY.json` is a sample with the key `KEY`; see
https://github.com/webdataset/webdataset and img2dataset's `--output_format webdataset`.
"""

import contextlib
import dataclasses
import itertools
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from diptych.models.files.location import redacted
from diptych.transforms.chunk import Reject
from diptych.transforms.errors import InputError, OptionError
from diptych.transforms.sources.archives.shard_file import (
    ShardDamage,
    encodable,
    metadata_text,
    open_shard,
    unpacked,
)
from diptych.transforms.sources.archives.tar import TarReader
from diptych.transforms.sources.archives.tar_index import SampleParts, TarIndex
from diptych.transforms.sources.base import (
    ColumnNames,
    InputFile,
    Record,
    Row,
    Shard,
)
from diptych.transforms.sources.sample import Sample, SampleTexts, is_image, split_name, text_bytes
from diptych.transforms.sources.sharded.columns import captions_note
from diptych.transforms.sources.sharded.sharded_source import ShardedSource

# Samples of the first shard in which the chosen columns are looked for before the job begins.
_NUM_CHECKED = 100
# Samples whose fields are looked at for a note to the user
_NUM_NOTED = 8


@dataclasses.dataclass(frozen=True)
class WebdatasetSource(ShardedSource):
    """Tar shards, plain or compressed."""

    format: ClassVar[str] = "webdataset"

    def shard(self, name: str, file: InputFile, url: str) -> "WebdatasetShard":
        """Returns the shard of a file."""
        return WebdatasetShard(
            name, file.size_bytes, None, url, file.name, self.metadata_columns, self.columns
        )

    def check(self, shards: Sequence[Shard]) -> None:
        """Checks that one of the first samples has the members and fields that are named as columns."""
        if self.columns != ColumnNames():
            for shard in shards[:1]:
                assert isinstance(shard, WebdatasetShard)
                shard.check_columns()

    def column_notes(self) -> tuple[str, ...]:
        """Returns what the first samples say of fields that might be captions and are not read."""
        if not self.urls or self.columns.caption:
            return ()
        shard = WebdatasetShard("", 0, None, self.urls[0], "")
        with contextlib.suppress(InputError):
            return tuple(captions_note(redacted(self.urls[0]), "field", shard.unused_texts()))
        return ()


@dataclasses.dataclass(frozen=True)
class WebdatasetShard(Shard):
    """One tar file.

    Attributes:
        url: Where it is.
        source: Its path below the input root.
        metadata_columns: Keys of the samples' `.json` members to keep as metadata.
        columns: The image's extension; the captions' field of the `.json` member, or their extension; the keys'
            field. None takes the usual ones, and the key from the members' names.
    """

    url: str
    source: str
    metadata_columns: tuple[str, ...] = ()
    columns: ColumnNames = ColumnNames()

    @property
    def input(self) -> str:
        """The file's path below the input root."""
        return self.source

    def records(self, skip: int) -> Iterator[Record]:
        """Yields the samples in order. One without an image is lost as `missing_image`.

        A sample is over when the next begins: of the one that damage cuts into, only the loss is given. Samples
        whose members do not follow each other are joined as far as `TarIndex` can; what cannot be joined is lost as
        `duplicate_key`.
        """
        reading = _Reading(self, skip)
        last: Record | None = None
        for record in reading.records():
            if last is not None:
                yield last
            # Of scattered samples the last place may give no record, which could say what was passed over before it.
            last = record if reading.is_scattered else None
            if last is None:
                yield record
        if last is not None:
            yield last._replace(counters=reading.take_counters(last.counters))
        elif num_others := reading.counters["members_passed_over"]:
            message = (
                f"{self.source}: none of its {num_others} members belongs to a sample. Expected names such as "
                f"KEY.jpg and KEY.txt; the first is {encodable(reading.first_other)!r}"
            )
            yield Reject("", 0, "missing_image", message, None, reading.take_counters({}))

    def unused_texts(self) -> set[str]:
        """Returns the fields of the first samples that hold words, where no sample has a caption.

        Raises:
            InputError: The shard is gone, or may not be read.
        """
        texts = [sample.texts() for sample in itertools.islice(_Reading(self, 0).samples(), _NUM_NOTED)]
        if any(text.captions for text in texts):
            return set()
        values = {name: value for text in texts for name, value in text.fields.items()}
        return {name for name, value in values.items() if isinstance(value, str) and " " in value}

    def check_columns(self) -> None:
        """Looks for the chosen columns in the first samples.

        Raises:
            OptionError: None of the samples has one.
            InputError: The shard is gone, or may not be read.
        """
        reading = _Reading(self, 0)
        samples = list(itertools.islice(reading.samples(), _NUM_CHECKED))
        extensions = {extension for sample in samples for extension in sample.members}
        fields = {field for sample in samples for field in sample.texts().fields}
        for flag, name, names, kind in (
            ("image_column", self.columns.image, extensions, "member"),
            ("caption_column", self.columns.caption, fields | extensions, "field or member"),
            ("key_column", self.columns.key, fields, "field of a .json member"),
        ):
            if samples and name is not None and name not in names and name.lower() not in extensions & names:
                there = ", ".join(sorted(map(str, names))) or "none"
                raise OptionError(
                    f"--{flag} {name}: the first {len(samples)} samples of {self.url} have no such {kind}. "
                    f"Expected one of theirs: {there}."
                )


class _Reading:
    """One pass over a shard.

    Attributes:
        counters: What was passed over since the last record, by name.
        first_other: Name of the first member that belongs to no sample.
    """

    def __init__(self, shard: WebdatasetShard, skip: int) -> None:
        self.counters: Counter[str] = Counter()
        self.first_other = ""
        self._shard = shard
        self._skip = skip
        self._row = 0
        self._keys: set[int] = set()
        self._scattered: dict[str, SampleParts] | None = None
        self._index = TarIndex(shard.url, split_name, lambda extension: text_bytes(extension, shard.columns))
        self._damage: tuple[ShardDamage, str, Sample | None] | None = None

    @property
    def is_scattered(self) -> bool:
        """Whether samples that lie in several places are joined."""
        return bool(self._scattered)

    def records(self) -> Iterator[Record]:
        """Yields the records of all samples, and of damage."""
        for sample in self.samples():
            for record in self._finish(sample):
                yield self._counted(record)
                self._row += 1
        if self._damage is not None:
            damage, place, cut = self._damage
            key, image = ("", None) if cut is None else (cut.key, cut.image)
            yield self._counted(Reject(key, self._row, damage.reason, f"{place}: {damage}", image))

    def _counted(self, record: Record) -> Record:
        if not self.counters:
            return record
        return record._replace(counters=self.take_counters(record.counters))

    def samples(self) -> Iterator[Sample]:
        """Yields members that follow each other and have one key, as a sample."""
        with open_shard(self._shard.url) as file:
            stream = unpacked(file)
            tar = TarReader(stream)
            sample: Sample | None = None
            try:
                while (name := tar.next()) is not None:
                    key, extension = split_name(name)
                    if not key:
                        self.first_other = self.first_other or name
                        self.counters["members_passed_over"] += 1
                        continue
                    if sample is None or key != sample.key or extension in sample.members:
                        if sample is not None:
                            yield sample
                        sample = Sample(key, self._shard.columns)
                    sample.add(extension, tar, self._index, needed=self._row >= self._skip)
            except ShardDamage as damage:
                unit = " of the unpacked tar" if stream is not file else ""
                self._damage = damage, f"{self._shard.source}, byte {tar.offset}{unit}", sample
                return
            if sample is not None:
                yield sample

    def take_counters(self, counters: Any) -> dict[str, int]:
        """Returns counters of a record with what was passed over before it, which is forgotten."""
        total = Counter(counters) + self.counters
        self.counters.clear()
        return dict(total)

    def _finish(self, sample: Sample) -> Iterator[Record]:
        texts = sample.texts()
        if self._scattered is None and not (sample.image_extension and texts.captions):
            self._scattered = {
                key: parts for key, parts in self._index.scattered.items() if hash(key) not in self._keys
            }
        parts = self._scattered.get(sample.key) if self._scattered else None
        is_again = hash(sample.key) in self._keys
        self._keys.add(hash(sample.key))
        if parts is not None:
            waits = not sample.image_extension and any(
                is_image(extension, self._shard.columns) for extension in parts.extensions
            )
            if waits or parts.is_given:
                return
            parts.is_given = True
            sample.join(parts, self._index)
            self.counters["samples_joined"] += 1
            texts = sample.texts()
        elif is_again and not sample.image_extension:
            message = (
                f"{self._shard.source}: {', '.join(sorted(sample.members))} of this sample do not follow its other "
                "members, which are a record already. Sort the tar by name, so that the members of a sample lie "
                "side by side"
            )
            yield Reject(sample.key, self._row, "duplicate_key", message, None, texts.counters)
            return
        yield from self._records_of(sample, texts)

    def _records_of(self, sample: Sample, texts: SampleTexts) -> Iterator[Record]:
        shard, key = self._shard, sample.key
        if shard.columns.key is not None:
            value = texts.fields.get(shard.columns.key)
            if value is None or value == "" or isinstance(value, list | dict):
                message = f"the .json of the sample has no field {shard.columns.key!r} that can be a key"
                yield Reject(key, self._row, "bad_annotation", message, sample.image, texts.counters)
                return
            key = encodable(str(value))
        if sample.loss is not None:
            yield Reject(key, self._row, *sample.loss, sample.image, texts.counters)
        elif sample.image is None:
            yield from self._missing_images(key, sample, texts)
        elif "broken_json" in texts.counters and not texts.captions:
            message = "its json is damaged, or nested too deep, and it has no other caption"
            yield Reject(key, self._row, "bad_annotation", message, sample.image, texts.counters)
        else:
            counters = texts.counters
            if sample.other_images:
                counters = {**counters, "images_passed_over": len(sample.other_images)}
            name = f"{posixpath.basename(sample.key)}.{sample.image_extension}"
            metadata = {column: metadata_text(texts.fields.get(column)) for column in shard.metadata_columns}
            yield Row(key, sample.image, name, texts.captions, shard.source, self._row, metadata, counters)

    def _missing_images(self, key: str, sample: Sample, texts: SampleTexts) -> Iterator[Reject]:
        """Yields the loss of a sample without an image, or one for each picture that might be it."""
        there = ", ".join(sorted(sample.members))
        error = texts.fields.get("error_message")
        told = f"; its error_message: {encodable(str(error))}" if error else ""
        if self._shard.columns.image is not None:
            message = f"the sample has no member {self._shard.columns.image}; its members: {there}{told}"
        elif not sample.other_images:
            message = f"the sample has no image (jpg, png, webp, ...); its members: {there}{told}"
        else:
            for extension in sample.other_images:
                message = (
                    f"{extension} may be the sample's image or another picture: a key ends at the first dot of a "
                    f"name; its members: {there}{told}. Take the dots out of the name, or choose with "
                    f"--image_column {extension}"
                )
                yield Reject(key, self._row, "missing_image", message, None, texts.counters)
                texts = texts._replace(counters={})
            return
        yield Reject(key, self._row, "missing_image", message, None, texts.counters)
