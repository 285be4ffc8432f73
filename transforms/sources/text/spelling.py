"""Spellings of one file's name: what Windows, macOS, a browser and another machine make of the same path."""

import json
import posixpath
import re
import unicodedata
import urllib.parse

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/+")


def respell(path: str) -> str:
    """Returns the usual spelling of a path: slashes, composed letters (NFC), no `.` and no needless `..`.

    Of a URL the scheme and the query go, and its %-escapes are undone.
    """
    if match := _SCHEME.match(path):
        path = urllib.parse.unquote(re.split(r"[?#]", path[match.end() :], maxsplit=1)[0])
    return unicodedata.normalize("NFC", posixpath.normpath(path.replace("\\", "/")))


def text_root(path: str) -> str:
    """Returns what the names of an image and of a text that goes with it have in common, in composed letters."""
    return unicodedata.normalize("NFC", posixpath.splitext(path)[0])


def unescape(path: str) -> str:
    """Returns the usual spelling of a path with its %-escapes undone, as of a name that was taken from a URL."""
    return respell(urllib.parse.unquote(path) if "%" in path else path)


def fold(path: str) -> str:
    """Returns a path so that spellings that differ in upper and lower case, too, are equal."""
    return unicodedata.normalize("NFC", unescape(path).casefold())


def backwards(path: str) -> str:
    """Returns a path with its last name first, so that paths with one end stand together in an index."""
    return "/".join(reversed(path.split("/")))


def ends(path: str) -> str:
    """Returns the ends of a path, `c.jpg` and `b/c.jpg` of `a/b/c.jpg`, backwards and as a JSON list."""
    names = path.split("/")[::-1]
    return json.dumps(["/".join(names[:count]) for count in range(1, len(names))])
