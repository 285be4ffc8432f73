"""A row a caption: records of one image that follow each other become one row with all their captions."""

import zlib
from collections import Counter
from collections.abc import Iterator

from diptych.transforms.chunk import Reject
from diptych.transforms.sources.archives.shard_file import image_name
from diptych.transforms.sources.base import MAX_TEXT_BYTES, Record, Row

DUPLICATE_HINT = (
    "; captions of one image are joined where its rows follow each other with the same image: sort by key"
)
"""What a reject of a key that was there before says of how to mend it."""

# Records that are lost between those of one image: behind more of them, the image counts as another
_MAX_WAITING = 8
# Images of numbered rows that are remembered, and how much of each end of one: 32 MB at most
_MAX_SEEN, _SAMPLE_BYTES = 200_000, 1024
_Seen = tuple[int, int, int, str | None]


def join_captions(records: Iterator[Record], shard: str) -> Iterator[Record]:
    """Yields records, those of one image as one: the first, with the captions of all.

    Two records that follow each other are of one image where their images are the same bytes and they have the same
    key; where neither has a key but a number, where their file names are the same too, or not given. The second must
    have a caption: else it is no caption of the first, but the row once more. `captions_joined` counts the captions
    that came from others than the first, `metadata_passed_over` the records whose metadata differ from those of the
    first, `repeated_images_not_joined` the rows without a key whose image a row far before has.

    Args:
        records: The records of a shard, with their images.
        shard: The shard's name, of which numbered keys are made.
    """
    row: Row | None = None
    others = _Others()
    waiting: list[Reject] = []
    seen: set[_Seen] = set()
    for record in records:
        if row is not None:
            if isinstance(record, Reject):
                if len(waiting) < _MAX_WAITING:
                    waiting.append(record)
                    continue
            elif _is_same_image(row, record, shard) and others.take(record, row):
                continue
            yield others.join(row) if others.captions else row
            yield from waiting
            if waiting or others.captions:
                waiting, others = [], _Others()
            row = None
        if isinstance(record, Row):
            row = _counted(record, seen) if _is_numbered(record, shard) and record.image else record
        else:
            yield record
    if row is not None:
        yield others.join(row)
    yield from waiting


def _counted(row: Row, seen: set[_Seen]) -> Row:
    """Returns a row that says whether its image was there before, as far as so many can be remembered."""
    image = row.image
    sample = (
        len(image),
        zlib.crc32(image[:_SAMPLE_BYTES]),
        zlib.crc32(image[-_SAMPLE_BYTES:]),
        _file_name(row),
    )
    if sample in seen:
        return row._replace(counters={**row.counters, "repeated_images_not_joined": 1})
    if len(seen) < _MAX_SEEN:
        seen.add(sample)
    return row


class _Others:
    """What other rows bring to the first of an image.

    Attributes:
        captions: Their captions.
    """

    def __init__(self) -> None:
        self.captions: list[str] = []
        self._num_bytes = 0
        self._counters = Counter[str]()

    def take(self, row: Row, first: Row) -> bool:
        """Takes the captions of a row; returns whether it has any, and there was room for them."""
        if not row.captions or self._num_bytes > MAX_TEXT_BYTES:
            return False
        self.captions += row.captions
        self._num_bytes += sum(map(len, row.captions))
        self._counters.update(row.counters)
        self._counters["captions_joined"] += len(row.captions)
        if row.metadata != first.metadata:
            self._counters["metadata_passed_over"] += 1
        return True

    def join(self, first: Row) -> Row:
        """Returns the row with all captions."""
        if not self.captions:
            return first
        counters = Counter(first.counters)
        counters.update(self._counters)
        return first._replace(captions=[*first.captions, *self.captions], counters=dict(counters))


def _is_same_image(first: Row, second: Row, shard: str) -> bool:
    if first.image != second.image:
        return False
    if first.key == second.key:
        return True
    are_numbered = _is_numbered(first, shard) and _is_numbered(second, shard)
    return are_numbered and len(first.image) > 0 and _file_name(first) == _file_name(second)


def _is_numbered(row: Row, shard: str) -> bool:
    return row.key == numbered_key(shard, row.row)


def _file_name(row: Row) -> str | None:
    """Returns the image's file name, None where it was made of the key."""
    return None if row.path == image_name(row.key, row.image) else row.path


def numbered_key(shard: str, row: int) -> str:
    """Returns the key of a row that has none."""
    return f"{shard}-{row:08d}"
