"""What an annotation says, on its way to a plan: any order goes in, rows come out in order, in little memory.

The images, captions and files of a data set are joined in a temporary SQLite database: lines of one image may
stand anywhere in an annotation, and a folder is listed once, with no look-up per row.
"""

import collections
import contextlib
import errno
import json
import mmap
import os
import posixpath
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence

from transforms import storage
from transforms.errors import OutputError
from transforms.sources.folder import Member
from transforms.sources.parts import Bad, Caption, Image, is_image, stem
from transforms.sources.planned import Entry, PlanFacts, write_plan


class Draft:
    """A data set that is being planned, in a temporary database. `open_draft` makes one.

    Attributes:
        counters: What was noticed, by name.
    """

    def __init__(self, database: sqlite3.Connection, folder: str) -> None:
        self.counters: collections.Counter[str] = collections.Counter()
        self._database = database
        self._folder = folder
        self._num_parts = 0
        self._num_files = 0
        database.create_function("stem", 1, stem, deterministic=True)
        database.create_function("root", 1, lambda path: posixpath.splitext(path)[0], deterministic=True)
        database.create_function("basename", 1, posixpath.basename, deterministic=True)
        database.create_function("is_image", 1, is_image, deterministic=True)
        database.executescript(_TABLES)
        database.execute("BEGIN")  # one transaction, never committed: the database dies with the run

    def add(self, parts: Iterable[Image | Caption | Bad]) -> None:
        """Adds what an annotation says, in its order."""
        execute = self._database.execute
        for position, part in enumerate(parts, self._num_parts):
            self._num_parts = position + 1
            if isinstance(part, Caption):
                execute(
                    "INSERT INTO captions VALUES (?, ?, ?, ?)", (position, part.ref, part.ordinal, part.text)
                )
                self.counters["repaired_captions"] += part.repaired
            elif isinstance(part, Image):
                path = posixpath.normpath(part.path)
                values = (
                    position,
                    part.row,
                    part.ref,
                    stem(path),
                    path,
                    json.dumps(part.metadata),
                    part.wanted,
                )
                execute(_ADD_IMAGE, values)
            else:
                execute(_ADD_LOST, (position, part.row, part.key, part.reason, part.message))

    def add_files(self, members: Iterable[Member]) -> list[str]:
        """Adds the files that there are; returns, escaped, the names that are not UTF-8: no use."""
        nameless = []
        for member in members:
            try:
                member.path.encode()
            except UnicodeEncodeError:
                nameless.append(os.fsencode(member.path).decode("utf-8", "backslashreplace"))
                continue
            self._num_files += 1
            values = (member.path, posixpath.basename(member.path), *member[1:])
            self._database.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", values)
        return nameless

    def list_captioned(self) -> None:
        """Lists the images that the captions name, for an annotation that has only captions."""
        self._database.execute(
            "INSERT INTO records (position, ref, key, path) "
            "SELECT min(position), ref, stem(ref), ref FROM captions GROUP BY ref"
        )

    def list_files(self) -> None:
        """Lists every file as an image, in the order of the bytes of their paths.

        The key is the path without its extension, or the whole path where that is another file's too.
        """
        self._database.execute(_LIST_FILES, (self._num_parts,))

    def settle(self) -> None:
        """Decides which rows are lost: the later of two with one id or key, and what has no image or entry.

        Messages say nothing of where the data set is, so that rejects are the same wherever it is.
        """
        for index in _INDEXES:
            self._database.execute(index)
        self._database.execute(_LOSE_UNKNOWN)
        self._database.execute(_LOSE_SAME_REF)
        self._database.execute(_FIND_FILES)
        self._database.execute(_LOSE_MISSING)
        self._database.execute(_LOSE_SAME_KEY)
        # An archive may have a path twice; the last is the one that unpacking it would leave.
        self.counters["repeated_files"] = self._num_files - self._count("files")
        self.counters["unlisted_images"] = self._count(
            "files WHERE is_image(path) AND path NOT IN (SELECT file FROM records WHERE file IS NOT NULL)"
        )

    def num_images(self) -> tuple[int, int]:
        """Returns how many images are asked for, and how many of those have a file. Only after `settle`."""
        return (
            self._count("records WHERE wanted AND path IS NOT NULL"),
            self._count("records WHERE wanted AND file IS NOT NULL"),
        )

    def files(self) -> Iterator[tuple[str, int]]:
        """Yields the path and size in bytes of each file, in the order of the bytes of their paths."""
        yield from self._database.execute("SELECT path, size_bytes FROM files ORDER BY path")

    def entries(self) -> Iterator[Entry]:
        """Yields the rows of the plan in order."""
        columns = "row, ref, key, reason, message, metadata, file, size_bytes, offset, packed_bytes, crc32"
        rows = self._database.execute(f"SELECT {columns} {_WANTED} ORDER BY {_ORDER}")
        query = "SELECT text FROM captions WHERE ref = ? ORDER BY ordinal, position"
        for ordinal, (row, ref, key, reason, message, metadata, *member) in enumerate(rows):
            image = Member(*member) if reason is None else None
            captions = [text for (text,) in self._database.execute(query, (ref,))] if image else []
            row = ordinal if row is None else row
            yield Entry(
                row, key, image, captions, reason, message, json.loads(metadata) if metadata else None
            )

    def publish(
        self,
        plan: str,
        made_from: Mapping[str, object],
        rows_per_shard: int,
        metadata_columns: Sequence[str] = (),
    ) -> PlanFacts:
        """Writes the plan file: it appears whole or not at all.

        Args:
            plan: URL of the plan file.
            made_from: Everything that decides the plan, in JSON's types.
            rows_per_shard: Rows of each shard but the last.
            metadata_columns: Names of the metadata columns.
        """
        counters = {name: count for name, count in self.counters.items() if count}
        num_rows = self._count("records WHERE wanted")
        facts = PlanFacts(
            made_from, num_rows, rows_per_shard, self._shard_sizes_bytes(rows_per_shard), counters
        )
        path = os.path.join(self._folder, "plan.arrow")
        write_plan(path, facts, self.entries(), metadata_columns)
        root, _, name = plan.rpartition("/")
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as data,
        ):
            storage.write_whole(root, name, data)
        return facts

    def _shard_sizes_bytes(self, rows_per_shard: int) -> list[int]:
        query = (
            "SELECT sum(coalesce(size_bytes, 0)) FROM (SELECT size_bytes, "
            f"(row_number() OVER (ORDER BY {_ORDER}) - 1) / ? AS shard {_WANTED}) "
            "GROUP BY shard ORDER BY shard"
        )
        return [size for (size,) in self._database.execute(query, (rows_per_shard,))] or [0]

    def _count(self, what: str) -> int:
        (count,) = self._database.execute(f"SELECT count(*) FROM {what}").fetchone()
        return int(count)


@contextlib.contextmanager
def open_draft() -> Iterator[Draft]:
    """Opens an empty draft in a temporary folder.

    Raises:
        OutputError: The temporary folder is full or cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="diptych-plan-") as folder:
        try:
            with contextlib.closing(
                sqlite3.connect(os.path.join(folder, "draft"), isolation_level=None)
            ) as database:
                database.executescript(_SETTINGS)
                yield Draft(database, folder)
        except (sqlite3.OperationalError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.ENOSPC:
                raise
            raise OutputError(
                f"{tempfile.gettempdir()} cannot hold the plan that is being made: {error}. "
                "Free space there, or set TMPDIR to a folder with room, and run again."
            ) from error


# Nothing here outlives the run: no journal, no sync.
_SETTINGS = """
PRAGMA journal_mode=OFF;
PRAGMA synchronous=OFF;
PRAGMA locking_mode=EXCLUSIVE;
PRAGMA cache_size=-65536; -- KiB
"""

_TABLES = """
CREATE TABLE records (
    position INTEGER PRIMARY KEY, row INTEGER, ref, key TEXT, path TEXT, file TEXT,
    reason TEXT, message TEXT NOT NULL DEFAULT '', metadata TEXT, wanted INTEGER NOT NULL DEFAULT 1
);
CREATE TABLE captions (position INTEGER PRIMARY KEY, ref, ordinal INTEGER, text TEXT);
CREATE TABLE files (
    path TEXT PRIMARY KEY, name TEXT, size_bytes INTEGER, offset INTEGER, packed_bytes INTEGER, crc32 INTEGER
) WITHOUT ROWID;
"""

_INDEXES = (
    "CREATE INDEX records_ref ON records (ref)",
    "CREATE INDEX records_key ON records (key)",
    "CREATE INDEX captions_ref ON captions (ref, ordinal)",
    "CREATE INDEX files_name ON files (name)",
)

_ADD_IMAGE = (
    "INSERT INTO records (position, row, ref, key, path, metadata, wanted) VALUES (?, ?, ?, ?, ?, ?, ?)"
)
_ADD_LOST = "INSERT INTO records (position, row, key, reason, message) VALUES (?, ?, ?, ?, ?)"

# Images by their ordinal; what is not an image's entry comes after them (or, in text, where it stands).
_ORDER = "row IS NULL, row, position"
_WANTED = "FROM records LEFT JOIN files ON files.path = records.file WHERE wanted"

_NUM_CAPTIONS = "(SELECT count(*) FROM captions WHERE captions.ref = records.ref)"

_LOSE_UNKNOWN = """
INSERT INTO records (position, key, reason, message)
SELECT min(position), '', 'unknown_image',
    printf('%d captions refer to an image %s that the annotation does not list', count(*), ref)
FROM captions WHERE NOT EXISTS (SELECT 1 FROM records WHERE records.ref = captions.ref) GROUP BY ref
"""

_LOSE_SAME_REF = """
UPDATE records SET reason = 'duplicate_key',
    message = printf('image id %s is listed before; this is %s', ref, path)
WHERE reason IS NULL AND EXISTS (
    SELECT 1 FROM records AS other WHERE other.ref = records.ref AND other.position < records.position
)
"""

# The path itself, or the only file where one path is the end of the other: `val2017/1.jpg` in an archive for
# `1.jpg`, or `1.jpg` in a folder for `val2014/1.jpg`. Never another folder's file of the same name.
_FIND_FILES = """
UPDATE records SET file = coalesce(
    (SELECT path FROM files WHERE path = records.path),
    (SELECT min(path) FROM files WHERE name = basename(records.path) AND (
        substr('/' || path, -length('/' || records.path)) = '/' || records.path
        OR substr('/' || records.path, -length('/' || path)) = '/' || path
    ) HAVING count(*) = 1)
) WHERE reason IS NULL
"""

_LOSE_MISSING = f"""
UPDATE records SET reason = 'missing_image',
    message = printf('%s is not among the images; %d captions go with it', path, {_NUM_CAPTIONS})
WHERE reason IS NULL AND file IS NULL
"""

_LOSE_SAME_KEY = f"""
UPDATE records SET reason = 'duplicate_key',
    message = printf('key %s occurs before; this is %s; %d captions go with it', key, path, {_NUM_CAPTIONS})
WHERE reason IS NULL AND EXISTS (
    SELECT 1 FROM records AS other WHERE other.key = records.key AND other.position < records.position
        AND other.wanted AND other.file IS NOT NULL
)
"""

_LIST_FILES = """
INSERT INTO records (position, key, path, file)
SELECT ? + row_number() OVER (ORDER BY path),
    iif(
        count(*) OVER (PARTITION BY root(path)) > 1
            OR EXISTS (SELECT 1 FROM files AS other WHERE other.path = root(files.path)),
        path, root(path)
    ),
    path, path
FROM files
"""
