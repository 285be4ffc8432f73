"""What one pass over a tar cannot know: where its links lead, and which of its samples lie in several places.

Most shards have neither, so a shard is gone over again only when the first of either shows. What is kept of it is
bounded; what does not fit is named by the reader, not left out.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from diptych.transforms import storage
from diptych.transforms.sources.archives.links import Link, LinkError, Links, normalise
from diptych.transforms.sources.archives.shard_file import ShardDamage, open_shard, unpacked
from diptych.transforms.sources.archives.tar import TarReader

# About 100,000 samples or links, or fewer with long texts or names.
_MAX_INDEX_BYTES = 64 << 20
_ENTRY_BYTES = 500


class SampleParts:
    """The members of a sample that lies in several places of a tar.

    Attributes:
        texts: The text members: their bytes, or the links that they are.
        extensions: The extensions of all members.
        is_given: Whether the sample has been given out already.
    """

    __slots__ = ("_is_repeated", "_is_split", "extensions", "is_given", "texts")

    def __init__(self) -> None:
        self.texts: dict[str, bytes | Link] = {}
        self.extensions: dict[str, None] = {}
        self.is_given = False
        self._is_split = self._is_repeated = False

    @property
    def can_be_joined(self) -> bool:
        """Whether there are several places, and no extension twice."""
        return self._is_split and not self._is_repeated

    def add(self, extension: str, is_next: bool) -> None:
        """Adds a member; `is_next` tells whether it comes right after another of the sample."""
        self._is_split |= bool(self.extensions) and not is_next
        self._is_repeated |= extension in self.extensions
        self.extensions[extension] = None


class _Place(NamedTuple):
    """Where a member that links lead to lies.

    Attributes:
        offset: Where its header begins, in bytes.
        size: Size of its payload, in bytes.
        payload: Where that begins; in a compressed tar the payload itself, None where it is too much to be kept.
    """

    offset: int
    size: int
    payload: bytes | int | None


class TarIndex:
    """Links and scattered samples of one tar, looked for when they are first asked for.

    Args:
        url: The tar, compressed or not.
        split_name: Gives key and extension of a member, and an empty key where it is no part of a sample.
        text_bytes: Gives, of an extension, the most bytes of a text member; 0 of any other.
    """

    def __init__(
        self, url: str, split_name: Callable[[str], tuple[str, str]], text_bytes: Callable[[str], int]
    ) -> None:
        self._url = url
        self._split_name = split_name
        self._text_bytes = text_bytes
        self._parts: dict[str, SampleParts] | None = None
        self._links: Links | None = None
        self._places: dict[str, list[_Place]] = {}

    @property
    def scattered(self) -> Mapping[str, SampleParts]:
        """The samples that lie in several places and can be joined, by key.

        Raises:
            InputError: The tar is gone, or may not be read.
        """
        if self._parts is None:
            self._parts = self._find_scattered()
        return self._parts

    def follow(self, link: Link, max_bytes: int, fetch: bool = True) -> bytes:
        """Returns the payload of the file that a link leads to.

        Args:
            link: The link.
            max_bytes: Most bytes that are read.
            fetch: Whether the payload is wanted; if not, it is empty.

        Raises:
            LinkError: There is no such file, or it cannot be read.
            InputError: The tar is gone, or may not be read.
        """
        if self._links is None:
            self._links = self._find_links()
        target = link.target
        places = self._places.get(self._links.resolve(target), [])
        # a hard link may lie before its file where members were sorted
        place = next((place for place in reversed(places) if link.may_be(place.offset)), None) or next(
            iter(places), None
        )
        if place is None:
            if self._links.num_passed_over:
                raise LinkError("record_corrupt", f"a link to {target}; the tar has too many links to follow")
            raise LinkError("missing_image", f"a link to {target}, which is not in the tar")
        if place.payload is None:
            raise LinkError(
                "record_corrupt",
                f"a link to {target}, which is too far back in a compressed tar: unpack the tar",
            )
        if place.size > max_bytes:
            raise LinkError(
                "record_corrupt",
                f"a link to {target}, which has {place.size} bytes; at most {max_bytes} are read",
            )
        if not fetch or not place.size:
            return b""
        if isinstance(place.payload, bytes):
            return place.payload
        with storage.input_errors(self._url):
            fs, path = storage.locate(self._url)
            return bytes(fs.cat_file(path, start=place.payload, end=place.payload + place.size))

    def _walk(self) -> Iterator[tuple[str, TarReader, bool]]:
        """Yields each member's name with the reader and whether the tar is compressed, up to damage."""
        with open_shard(self._url) as file:
            stream = unpacked(file)
            tar = TarReader(stream)
            try:
                while (name := tar.next()) is not None:
                    yield name, tar, stream is not file
            except ShardDamage:
                return

    def _find_scattered(self) -> dict[str, SampleParts]:
        samples: dict[str, SampleParts] = {}
        previous = ""
        num_bytes = 0
        for name, tar, _ in self._walk():
            key, extension = self._split_name(name)
            if not key:
                continue
            if key not in samples:
                samples[key] = SampleParts()
                num_bytes += _ENTRY_BYTES + len(key)
            sample = samples[key]
            sample.add(extension, is_next=key == previous)
            num_bytes += len(extension)
            previous = key
            if tar.link is not None and self._text_bytes(extension):
                sample.texts[extension] = tar.link
            elif not tar.unreadable and tar.size <= self._text_bytes(extension):
                sample.texts[extension] = text = tar.read()
                num_bytes += len(text)
            if num_bytes > _MAX_INDEX_BYTES:
                return {}
        return {key: sample for key, sample in samples.items() if sample.can_be_joined}

    def _find_links(self) -> Links:
        links = Links()
        for name, tar, _ in self._walk():
            if tar.link is not None:
                links.add(name, tar.link)
        targets = links.resolved()
        num_bytes = 0
        for name, tar, is_packed in self._walk():
            if tar.link is not None or tar.unreadable or (name := normalise(name)) not in targets:
                continue
            payload: bytes | int | None = tar.payload_offset
            if is_packed:
                payload = tar.read() if num_bytes + tar.size <= _MAX_INDEX_BYTES else None
                num_bytes += tar.size if payload is not None else 0
            place = _Place(tar.offset, tar.size, payload)
            places = self._places.setdefault(name, [])
            # of members of one name, those that no hard link can mean are forgotten
            if places and all(link.before is None for _, link in targets[name]):
                places[0] = place
            else:
                places.append(place)
        return links
