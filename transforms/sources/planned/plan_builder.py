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

from diptych.transforms import storage
from diptych.transforms.errors import OutputError
from diptych.transforms.sources.planned import matching
from diptych.transforms.sources.planned.entries import (
    Caption,
    Fields,
    Image,
    Noticed,
    Part,
    Ref,
    is_image,
    stem,
)
from diptych.transforms.sources.planned.image_folder import ImageFile
from diptych.transforms.sources.planned.plan import Entry, PlanFacts, write_plan
from diptych.transforms.sources.text.spelling import backwards, text_root


class PlanBuilder:
    """A data set that is being planned, in a temporary database. `open_plan_builder` makes one.

    Attributes:
        counters: What was noticed, by name.
        notes: Sentences that the user is told.
        nameless: Names of files that are not UTF-8, escaped: they are of no use.
    """

    def __init__(self, database: sqlite3.Connection, folder: str) -> None:
        self.counters: collections.Counter[str] = collections.Counter()
        self.notes: list[str] = []
        self.nameless: list[str] = []
        self._database = database
        self._folder = folder
        self._num_parts = 0
        self._num_files = 0
        database.create_function("stem", 1, stem, deterministic=True)
        database.create_function("root", 1, lambda path: posixpath.splitext(path)[0], deterministic=True)
        database.create_function("is_image", 1, is_image, deterministic=True)
        database.create_function("text_root", 1, text_root, deterministic=True)
        matching.add_functions(database)
        database.executescript(_TABLES)
        database.execute("BEGIN")  # one transaction, never committed: the database dies with the run

    def add(self, parts: Iterable[Part]) -> None:
        """Adds what an annotation says, in its order."""
        execute = self._database.execute
        for position, part in enumerate(parts, self._num_parts):
            self._num_parts = position + 1
            if isinstance(part, Caption):
                ref = part.ref if isinstance(part.ref, str) else matching.stored_ref(part.ref)
                execute("INSERT INTO captions VALUES (?, ?, ?, ?)", (position, ref, part.ordinal, part.text))
                self.counters["repaired_captions"] += part.repaired
                self.counters["captions_not_utf8"] += part.redecoded or "\ufffd" in part.text
            elif isinstance(part, Fields):
                execute(
                    "INSERT OR IGNORE INTO fields VALUES (?, ?, ?)",
                    (part.ref, part.key, json.dumps(part.metadata)),
                )
            elif isinstance(part, Noticed):
                self.counters.update(part.counters)
                self.notes += [part.note] if part.note else []
            elif isinstance(part, Image):
                path = posixpath.normpath(part.path)
                values = (
                    position,
                    part.row,
                    part.ref if isinstance(part.ref, str) else matching.stored_ref(part.ref),
                    stem(path) if part.key is None else part.key,
                    path,
                    json.dumps(part.metadata),
                    part.wanted,
                    part.key is not None,
                )
                execute(_ADD_IMAGE, values)
            else:
                execute(_ADD_LOST, (position, part.row, part.key, part.reason, part.message))

    def add_files(self, members: Iterable[ImageFile]) -> None:
        """Adds the files that there are."""
        for member in members:
            try:
                member.path.encode()
            except UnicodeEncodeError:
                self.nameless.append(os.fsencode(member.path).decode("utf-8", "backslashreplace"))
                continue
            self._num_files += 1
            values = (member.path, backwards(member.path), *member[1:])
            self._database.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", values)

    def list_captioned(self) -> None:
        """Lists the images that the captions name, for an annotation that has only captions."""
        self._database.execute(
            "INSERT INTO records (position, ref, key, path, metadata, has_own_key) SELECT min(position), captions.ref, "
            "coalesce(fields.key, stem(captions.ref)), captions.ref, metadata, fields.key IS NOT NULL "
            "FROM captions LEFT JOIN fields ON fields.ref = captions.ref GROUP BY captions.ref"
        )

    def list_files(self, key_column: str | None = None) -> None:
        """Lists every file as an image, in the order of the bytes of their paths.

        The key is the path without its extension, or the whole path where that is another file's too.

        Args:
            key_column: What the user names for the key. It is the metadata's then, or left empty where a `.json` beside
                the image may have it; an image with neither is lost.
        """
        self._database.execute("CREATE INDEX captions_ref ON captions (ref, ordinal)")
        self._database.execute("CREATE INDEX texts_root ON texts (root)")
        self.counters["similar_file_names"] += matching.respell_refs(self._database)
        self._database.execute(_LIST_FILES, (self._num_parts,))
        if key_column is not None:
            for statement in (
                _LEAVE_KEYS,
                _TAKE_KEYS,
                "CREATE INDEX records_key ON records (key)",
                _LOSE_SAME_KEY,
            ):
                self._database.execute(statement)
            self._database.execute(_LOSE_KEYLESS, (key_column,))
        self._database.execute(_LOSE_UNLISTED, (self._num_parts + self._num_files,))
        self._database.execute("CREATE INDEX files_root ON files (text_root(path))")
        self.counters["passed_over_files"] += self._count(f"texts WHERE NOT {_USED_TEXT}")
        captioned = "EXISTS (SELECT 1 FROM fields WHERE ref = path)"
        if self._count("fields"):
            self.counters["images_without_metadata"] += self._count(f"files WHERE NOT {captioned}")

    def add_texts(self, members: Iterable[ImageFile]) -> None:
        """Adds files of text that may belong to an image of the same name."""
        values = ((member.path, text_root(member.path), member.size_bytes) for member in members)
        self._database.executemany("INSERT OR REPLACE INTO texts VALUES (?, ?, ?)", values)

    def texts(self) -> Iterator[tuple[str, int]]:
        """Yields path and size in bytes of each file of text that belongs to an image, in order."""
        yield from self._database.execute(
            f"SELECT path, size_bytes FROM texts WHERE {_USED_TEXT} ORDER BY path"
        )

    def unused_texts(self) -> Iterator[str]:
        """Yields the path of each file of text that belongs to no image, in order."""
        for (path,) in self._database.execute(f"SELECT path FROM texts WHERE NOT {_USED_TEXT} ORDER BY path"):
            yield path

    def assume_files(self) -> None:
        """Takes each image for there, for a job that needs none."""
        self._database.execute("UPDATE records SET file = respell(path) WHERE path IS NOT NULL")

    def resolve(self, images: str = "") -> None:
        """Decides which rows are lost: the later of two with one id or key, and what has no image or entry.

        Captions whose ids differ from the images' in type alone are theirs, and entries of one file are one row.

        Messages say nothing of where the data set is, so that rejects are the same wherever it is.

        Args:
            images: What paths may begin with that are no part of the files': the image folder below the annotation's.
        """
        for index in _INDEXES:
            self._database.execute(index)
        self.counters["ids_of_other_type"] += matching.match_refs(self._database)
        self.counters["entries_joined"] += matching.join_same_ref(self._database)
        self.counters["similar_file_names"] += matching.find_files(self._database)
        self.counters["entries_joined"] += matching.join_same_file(self._database, images)
        self._database.execute(_LOSE_MISSING)
        start = self._start_of_absolute()
        for path in ("root({0})", "{0}"):
            below = f"iif({_IS_ABSOLUTE}, substr(respell(path), {start}), respell(path))"
            self._database.execute(_TELL_APART.format(path=path.format(below)))
        self._database.execute(_LOSE_SAME_KEY)
        # An archive may have a path twice; the last is the one that unpacking it would leave.
        self.counters["repeated_files"] = self._num_files - self._count("files")
        self.counters["unlisted_images"] = self._count(_UNLISTED) + len(self.nameless)

    def unlisted_images(self) -> Iterator[str]:
        """Yields the path of each image that is in no record. Only after `settle`."""
        for (path,) in self._database.execute(f"SELECT path FROM {_UNLISTED}"):
            yield path
        yield from self.nameless

    def _start_of_absolute(self) -> int:
        """Returns where absolute paths begin to tell images apart: behind the folder that all lie in."""
        query = f"SELECT min(path), max(path) FROM (SELECT respell(path) AS path FROM records WHERE {_IS_ABSOLUTE})"
        first, last = self._database.execute(query).fetchone()
        if first is None:
            return 1
        shared = posixpath.commonprefix([posixpath.dirname(first) + "/", posixpath.dirname(last) + "/"])
        return len(shared.rpartition("/")[0]) + 2 if "/" in shared else 1

    def num_images(self) -> tuple[int, int]:
        """Returns how many images are asked for, and how many of those have a file. Only after `settle`."""
        return (
            self._count("records WHERE wanted AND path IS NOT NULL"),
            self._count("records WHERE wanted AND file IS NOT NULL"),
        )

    def refs(self) -> Iterator[tuple[str, Ref]]:
        """Yields the key of each row that has one and is not lost, with what the annotation calls it."""
        query = "SELECT key, ref FROM records WHERE wanted AND reason IS NULL ORDER BY position"
        for key, ref in self._database.execute(query):
            yield key, matching.original_ref(ref)

    def files(self) -> Iterator[tuple[str, int]]:
        """Yields the path and size in bytes of each file, in the order of the bytes of their paths."""
        yield from self._database.execute("SELECT path, size_bytes FROM files ORDER BY path")

    def entries(self) -> Iterator[Entry]:
        """Yields the rows of the plan in order."""
        columns = "row, ref, key, reason, message, metadata, file, size_bytes, offset, packed_bytes, crc32"
        rows = self._database.execute(f"SELECT {columns} {_WANTED} ORDER BY {_ORDER}")
        query = "SELECT text FROM captions WHERE ref = ? ORDER BY ordinal, position"
        has_texts = self._count("texts") > 0
        for ordinal, (row, ref, key, reason, message, metadata, *member) in enumerate(rows):
            image = ImageFile(*member) if reason is None else None
            captions = [text for (text,) in self._database.execute(query, (ref,))] if image else []
            row = ordinal if row is None else row
            values = json.loads(metadata) if metadata else None
            texts: list[str] = []
            if has_texts and image:
                texts = [path for (path,) in self._database.execute(_TEXTS, (text_root(image.path),))]
            yield Entry(row, key or "", image, captions, reason, message, values, texts)

    def write(
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
            made_from, num_rows, rows_per_shard, self._shard_sizes_bytes(rows_per_shard), counters, self.notes
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
def open_plan_builder() -> Iterator[PlanBuilder]:
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
                yield PlanBuilder(database, folder)
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
    reason TEXT, message TEXT NOT NULL DEFAULT '', metadata TEXT, wanted INTEGER NOT NULL DEFAULT 1,
    has_own_key INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE captions (position INTEGER PRIMARY KEY, ref, ordinal INTEGER, text TEXT);
CREATE TABLE fields (ref TEXT PRIMARY KEY, key TEXT, metadata TEXT) WITHOUT ROWID;
CREATE TABLE texts (path TEXT PRIMARY KEY, root TEXT, size_bytes INTEGER) WITHOUT ROWID;
CREATE TABLE files (
    path TEXT PRIMARY KEY, backwards TEXT, size_bytes INTEGER, offset INTEGER, packed_bytes INTEGER, crc32 INTEGER
) WITHOUT ROWID;
"""

_INDEXES = (
    "CREATE INDEX records_ref ON records (ref)",
    "CREATE INDEX records_key ON records (key)",
    "CREATE INDEX captions_ref ON captions (ref, ordinal)",
    "CREATE INDEX files_backwards ON files (backwards)",
)

_ADD_IMAGE = (
    "INSERT INTO records (position, row, ref, key, path, metadata, wanted, has_own_key) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
_ADD_LOST = "INSERT INTO records (position, row, key, reason, message) VALUES (?, ?, ?, ?, ?)"

# Images by their ordinal; what is not an image's entry comes after them (or, in text, where it stands).
_ORDER = "row IS NULL, row, position"
_WANTED = "FROM records LEFT JOIN files ON files.path = records.file WHERE wanted"

_NUM_CAPTIONS = "(SELECT count(*) FROM captions WHERE captions.ref = records.ref)"

_LOSE_MISSING = f"""
UPDATE records SET reason = 'missing_image',
    message = printf('%s is not among the images; %d captions go with it', path, {_NUM_CAPTIONS})
WHERE reason IS NULL AND file IS NULL
"""

_IS_ABSOLUTE = r"(path GLOB '/*' OR path GLOB '[A-Za-z]:[\/]*')"

# Names without folder and extension that several files have: `cat/1.jpg` beside `dog/1.jpg`, `1.jpg` beside `1.png`
_TELL_APART = """
UPDATE records SET key = {path}
WHERE NOT has_own_key AND reason IS NULL AND wanted AND file IS NOT NULL AND key IN (
    SELECT key FROM records WHERE reason IS NULL AND wanted AND file IS NOT NULL
    GROUP BY key HAVING count(DISTINCT file) > 1
)
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
INSERT INTO records (position, ref, key, metadata, path, file)
SELECT ? + row_number() OVER (ORDER BY path), path,
    iif(
        count(*) OVER (PARTITION BY root(path)) > 1
            OR EXISTS (SELECT 1 FROM files AS other WHERE other.path = root(files.path)),
        path, root(path)
    ),
    (SELECT metadata FROM fields WHERE ref = path), path, path
FROM files
"""

_LEAVE_KEYS = """
UPDATE records SET key = NULL WHERE file IS NOT NULL AND EXISTS (
    SELECT 1 FROM texts WHERE texts.root = text_root(file) AND lower(texts.path) LIKE '%.json'
)
"""

_TAKE_KEYS = """
UPDATE records SET key = fields.key, has_own_key = 1 FROM fields
WHERE fields.ref = records.file AND fields.key IS NOT NULL
"""

_LOSE_KEYLESS = """
UPDATE records SET reason = 'bad_annotation', message = printf('%s has no %s for its key', path, ?)
WHERE reason IS NULL AND file IS NOT NULL AND key IS NOT NULL AND NOT has_own_key
"""

_LOSE_UNLISTED = """
INSERT INTO records (position, key, reason, message)
SELECT ? + row_number() OVER (ORDER BY ref), root(ref), 'missing_image',
    printf('%s is named by the metadata, and is not there', ref)
FROM fields WHERE NOT EXISTS (SELECT 1 FROM files WHERE path = ref)
"""

_UNLISTED = "files WHERE is_image(path) AND path NOT IN (SELECT file FROM records WHERE file IS NOT NULL)"

_USED_TEXT = "EXISTS (SELECT 1 FROM files WHERE text_root(files.path) = texts.root)"

_TEXTS = "SELECT path FROM texts WHERE root = ? ORDER BY path"
