"""Locations: paths and URLs made absolute, and shown without users, passwords and signatures."""

import os
import re

from fsspec.core import split_protocol
from fsspec.implementations.local import LocalFileSystem

# The part before the @ is a container, an organisation or a repository rather than a user
_PLACE_BEFORE_AT = frozenset(
    {"abfs", "abfss", "wasb", "wasbs", "adl", "az", "github", "git", "gist", "dropbox"}
)
# Other URLs may be patterns, where a question mark is a wildcard
_WITH_QUERY = ("http", "https", "webdav", "webhdfs", "ftp", "hf")
_LOCAL = (None, "file", "local", "memory")
_SCHEME = r"[a-zA-Z][a-zA-Z0-9+.-]*://"
_URL = re.compile(rf"\b({_SCHEME})((?:(?!::{_SCHEME})[^\s'\"<>`])*)")
_QUERY_OR_FRAGMENT = re.compile(r"\?(?=[\w.~%+-]+=)|#")
_QUERY = re.compile(r"[?][\w.~%+-]+=[^?*]*$")


def absolute(location: str) -> str:
    """Makes a local path absolute, whether anything exists there or not.

    Args:
        location: A path or pattern (relative to the working folder, `~` is the home), or a URL. In a chain such as
            `zip://a.jpg::b.zip` the last part is the location.

    Returns:
        The absolute path; a URL of anything but a local file is unchanged.
    """
    head, chain, place = location.rpartition("::") if "://" in location else ("", "", location)
    if split_protocol(place)[0] not in (None, "file", "local") or not place.strip():
        return location
    path = str(LocalFileSystem._strip_protocol(place))
    # fsspec does not make `~x` absolute where there is no user x
    path = os.path.join(os.getcwd(), path)
    # `link/..` is not the link's own folder, so it must not be normalised
    plain = os.path.normpath(path)
    return head + chain + (plain if os.path.realpath(plain) == os.path.realpath(path) else path)


def absolute_if_there(location: str) -> str:
    """Makes a local path absolute where it exists; anything else, such as a model's name, is unchanged."""
    path = absolute(location)
    return path if path != location and os.path.exists(path) else location


def is_local(location: str) -> bool:
    """Tells whether a path or URL is on this machine: on its disks, or in its memory."""
    return "://" not in location or split_protocol(location.rpartition("::")[2])[0] in _LOCAL


def without_query(path: str) -> str:
    """Returns an HTTP URL without its query; other paths are unchanged.

    A question mark without a following `NAME=` is a wildcard.
    """
    return _QUERY_OR_FRAGMENT.split(path, maxsplit=1)[0] if path.startswith(("http://", "https://")) else path


def redacted(text: str) -> str:
    """Removes user, password, query and fragment from the URLs in a text, so that it may be shown and stored.

    A query may be a signature, which gives access to the data. URLs of one object that differ in it become equal.
    """
    return _URL.sub(_redact, text) if "://" in text else text


def _redact(match: re.Match[str]) -> str:
    scheme, rest = match[1].lower().removesuffix("://"), match[2]
    if scheme in _LOCAL:
        return match[0]
    host, slash, path = rest.partition("/")
    if scheme.rpartition("+")[2] in _WITH_QUERY:
        # Punctuation after a URL in a sentence may have been matched as its end
        end = re.search(r"[),.;:\]}]*$", rest)
        host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
        path += end[0] if end and re.search(r"[?#]", rest) else ""
    else:
        path = _QUERY.sub("", path)
    if scheme not in _PLACE_BEFORE_AT:
        host = host.rpartition("@")[2]
    return f"{match[1]}{host}{slash}{path}"
