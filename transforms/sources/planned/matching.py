"""What belongs together in a draft: captions to images by ids, images to files by paths, entries of one file.

Each step is a statement or two over the draft's tables (`diptych.transforms.sources.planned.plan_builder`), with an
index for every look-up: no row is compared with all others.
"""

import json
import re
import sqlite3
from typing import Any

from diptych.transforms.sources.planned.entries import Ref
from diptych.transforms.sources.text.spelling import backwards, ends, fold, respell, unescape

StoredRef = int | float | str | bytes
"""An id as the database has it."""


def add_functions(database: sqlite3.Connection) -> None:
    """Adds the SQL functions that the statements of this module use."""
    for function in (backwards, ends, fold, respell, unescape, quoted, of_other_type):
        database.create_function(function.__name__, 1, function, deterministic=True)


def match_refs(database: sqlite3.Connection) -> int:
    """Joins captions to images whose ids are the same but for their type; captions of no image are lost.

    Returns:
        How many captions were joined so.
    """
    database.execute(_LIST_STRAYS)
    if database.execute("SELECT 1 FROM strays LIMIT 1").fetchone() is None:
        return 0
    num_matched = database.execute(_MATCH_OTHER_TYPE).rowcount
    database.execute(_LOSE_UNKNOWN)
    return num_matched


def join_same_ref(database: sqlite3.Connection) -> int:
    """Makes one row of entries with one id and path; with another path, the later entries are lost.

    Returns:
        How many entries were joined to an earlier one.
    """
    num_joined = database.execute(_JOIN_SAME_REF).rowcount
    database.execute(_LOSE_SAME_REF)
    return num_joined


def find_files(database: sqlite3.Connection) -> int:
    """Finds each image's file: by its path, else by a path that one of the two is the end of.

    What is left is looked for in other spellings, among the files that are nobody's.

    Returns:
        How many images were found by another spelling.
    """
    database.execute(_FIND_FILES)
    database.execute("CREATE INDEX records_file ON records (file)")
    num_missing = _num_missing(database)
    if not num_missing:
        return 0
    database.execute(f"{_find_spelled('files', 'respell')} AND respell(path) != path")
    for spelling in ("unescape", "fold"):
        database.execute("DROP TABLE IF EXISTS spelled")
        database.execute(_SPELL_FILES.format(spelling=spelling))
        database.execute("CREATE INDEX spelled_backwards ON spelled (backwards)")
        database.execute(_find_spelled("spelled", spelling))
    # names without extension
    database.execute("DROP TABLE spelled")
    database.execute(_SPELL_FILES.format(spelling="root"))
    database.execute("CREATE INDEX spelled_backwards ON spelled (backwards)")
    database.execute(_find_spelled("spelled", "respell"))
    return num_missing - _num_missing(database)


def respell_refs(database: sqlite3.Connection) -> int:
    """Gives what names no file to the one file that is nobody's, and whose name is another spelling of the same.

    Returns:
        How many names were found by another spelling.
    """
    num_found = 0
    for spelling in ("respell", "unescape", "fold"):
        if database.execute(f"SELECT 1 FROM fields WHERE {_NAMES_NO_FILE} LIMIT 1").fetchone() is None:
            break
        for statement in _RESPELL_REFS.format(spelling=spelling).split(";"):
            database.execute(statement)
        (count,) = database.execute("SELECT count(*) FROM respelled").fetchone()
        num_found += int(count)
    return num_found


def join_same_file(database: sqlite3.Connection, images: str = "") -> int:
    """Makes one row of the entries of one file and path; those of another path are lost: they may be other images.

    Args:
        database: The draft's.
        images: What a path may begin with or not, and be the same.

    Returns:
        How many entries were joined to another one.
    """
    num_joined = 0
    leader: tuple[Any, ...] = ("", 0, None, "", False)
    database.execute(_LIST_SHARED)
    for entry in database.execute("SELECT file, position, ref, path, is_exact FROM shared ORDER BY ordinal"):
        file, position, ref, path, _ = entry
        if file != leader[0]:
            leader = entry
        elif respell(path).removeprefix(images) == respell(leader[3]).removeprefix(images):
            database.execute("UPDATE captions SET ref = ? WHERE ref = ?", (leader[2], ref))
            database.execute("UPDATE records SET wanted = 0, file = NULL WHERE position = ?", (position,))
            num_joined += 1
        else:
            database.execute(_LOSE_SHARED, (file, leader[3], position))
            if not leader[4]:
                database.execute(_LOSE_SHARED, (file, path, leader[1]))
    return num_joined


def stored_ref(ref: Ref) -> StoredRef:
    """Returns an id as the database has it: 1.0 is 1, and what is too large for its integers is bytes."""
    if isinstance(ref, float) and ref.is_integer():
        ref = int(ref)
    return str(ref).encode() if isinstance(ref, int) and not -(2**63) <= ref < 2**63 else ref


def original_ref(ref: StoredRef) -> Ref:
    """Returns an id that `stored_ref` made ready."""
    return int(ref) if isinstance(ref, bytes) else ref


def of_other_type(ref: StoredRef) -> StoredRef | None:
    """Returns the number that a text is, or the text of a whole number; None where there is none."""
    if isinstance(ref, str):
        return stored_ref(int(ref.partition(".")[0])) if _WHOLE_NUMBER.fullmatch(ref) else None
    return ref.decode() if isinstance(ref, bytes) else str(ref)


def quoted(ref: StoredRef) -> str:
    """Returns an id as JSON has it, so that a message tells 1 from "1"."""
    return ref.decode() if isinstance(ref, bytes) else json.dumps(ref, ensure_ascii=False)


def _num_missing(database: sqlite3.Connection) -> int:
    (count,) = database.execute(f"SELECT count(*) FROM records WHERE {_MISSING}").fetchone()
    return int(count)


def _find_spelled(table: str, spelling: str) -> str:
    path = f"{spelling}(records.path)"
    by_end = _FIND_BY_END.format(table=table, path=path)
    exact = f"(SELECT path FROM {table} WHERE backwards = backwards({path}))"
    return f"UPDATE records SET file = coalesce({exact}, {by_end}) WHERE {_MISSING}"


_WHOLE_NUMBER = re.compile(r"-?(0|[1-9]\d{0,999})(\.0+)?", re.A)

_LIST_STRAYS = """
CREATE TABLE strays AS SELECT ref FROM captions
WHERE NOT EXISTS (SELECT 1 FROM records WHERE records.ref = captions.ref) GROUP BY ref
"""

_MATCH_OTHER_TYPE = """
UPDATE captions SET ref = (SELECT ref FROM records WHERE records.ref = of_other_type(captions.ref))
WHERE ref IN (
    SELECT ref FROM strays WHERE EXISTS (SELECT 1 FROM records WHERE records.ref = of_other_type(strays.ref))
)
"""

_LOSE_UNKNOWN = """
INSERT INTO records (position, key, reason, message)
SELECT min(position), '', 'unknown_image',
    printf('%d captions refer to an image %s that the annotation does not list', count(*), quoted(ref))
FROM captions WHERE ref IN (SELECT ref FROM strays) GROUP BY ref
"""

_SAME_REF = """reason IS NULL AND wanted AND EXISTS (
    SELECT 1 FROM records AS other WHERE other.ref = records.ref AND other.position < records.position
"""

_JOIN_SAME_REF = f"""
UPDATE records SET wanted = 0 WHERE {_SAME_REF} AND other.path = records.path AND other.wanted)
"""

_LOSE_SAME_REF = f"""
UPDATE records SET reason = 'duplicate_key',
    message = printf('image id %s is listed before; this is %s', quoted(ref), path)
WHERE {_SAME_REF})
"""

_MISSING = "reason IS NULL AND file IS NULL AND wanted AND path IS NOT NULL"

# The only file that ends in the image's path, `val2017/1.jpg` in an archive for `1.jpg`; else the file with the longest
# path that the image's ends in, `1.jpg` in a folder for `val2014/1.jpg`. Never another folder's file of the same name.
_FIND_BY_END = """
    (SELECT min(path) FROM (
        SELECT path FROM {table}
        WHERE backwards > backwards({path}) || '/' AND backwards < backwards({path}) || '0' LIMIT 2
    ) HAVING count(*) = 1),
    (SELECT path FROM {table} WHERE backwards IN (SELECT value FROM json_each(ends({path})))
        ORDER BY length(backwards) DESC LIMIT 1)
"""

_FIND_FILES = f"""
UPDATE records SET file = coalesce(
    (SELECT path FROM files WHERE path = records.path),
    {_FIND_BY_END.format(table="files", path="records.path")}
) WHERE reason IS NULL AND file IS NULL AND path IS NOT NULL
"""

_SPELL_FILES = """
CREATE TABLE spelled AS SELECT backwards({spelling}(path)) AS backwards, min(path) AS path
FROM files WHERE NOT EXISTS (SELECT 1 FROM records WHERE records.file = files.path)
GROUP BY 1 HAVING count(*) = 1
"""

_NAMES_NO_FILE = "NOT EXISTS (SELECT 1 FROM files WHERE path = ref)"

_RESPELL_REFS = f"""
DROP TABLE IF EXISTS spelled;
CREATE TABLE spelled AS SELECT {{spelling}}(path) AS spelling, min(path) AS path
FROM files WHERE NOT EXISTS (SELECT 1 FROM fields WHERE ref = path) GROUP BY 1 HAVING count(*) = 1;
CREATE INDEX spelled_spelling ON spelled (spelling);
DROP TABLE IF EXISTS respelled;
CREATE TABLE respelled AS SELECT ref, spelled.path AS path
FROM fields JOIN spelled ON spelling = {{spelling}}(ref) WHERE {_NAMES_NO_FILE};
CREATE INDEX respelled_ref ON respelled (ref);
UPDATE captions SET ref = (SELECT path FROM respelled WHERE respelled.ref = captions.ref)
WHERE ref IN (SELECT ref FROM respelled);
INSERT OR IGNORE INTO fields SELECT path, key, metadata FROM fields JOIN respelled USING (ref);
DELETE FROM fields WHERE ref IN (SELECT ref FROM respelled)
"""

_LIST_SHARED = """
CREATE TABLE shared AS
SELECT file, position, ref, path, path = file AS is_exact,
    row_number() OVER (ORDER BY file, path != file, position) AS ordinal
FROM records WHERE wanted AND reason IS NULL AND file IN (
    SELECT file FROM records WHERE wanted AND reason IS NULL AND file IS NOT NULL
    GROUP BY file HAVING count(*) > 1
)
"""

_LOSE_SHARED = """
UPDATE records SET file = NULL, reason = 'missing_image',
    message = printf('%s is not among the images: %s, which is there, may be that of %s', path, ?, ?)
WHERE position = ?
"""
