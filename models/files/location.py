"""Where things are: places that mean the same on every machine, and their names without what gives access to them."""

import os
import re

from fsspec.core import split_protocol
from fsspec.implementations.local import LocalFileSystem

# What stands before the @ is a container, an organisation, a repository
_PLACE_BEFORE_AT = frozenset(
    {"abfs", "abfss", "wasb", "wasbs", "adl", "az", "github", "git", "gist", "dropbox"}
)
# Elsewhere a question mark may be one of a pattern
_WITH_QUERY = ("http", "https", "webdav", "webhdfs", "ftp", "hf")
_LOCAL = (None, "file", "local", "memory")
_SCHEME = r"[a-zA-Z][a-zA-Z0-9+.-]*://"
_URL = re.compile(rf"\b({_SCHEME})((?:(?!::{_SCHEME})[^\s'\"<>`])*)")
_QUERY_OR_FRAGMENT = re.compile(r"\?(?=[\w.~%+-]+=)|#")
_QUERY = re.compile(r"[?][\w.~%+-]+=[^?*]*$")


def absolute(location: str) -> str:
    """Returns a local path, whether there is something or not, as it is on any process of this machine.

    Args:
        location: A path or pattern (relative ones are below the working folder, `~` is the home), or a URL. In a chain
            such as `zip://a.jpg::b.zip` the last part is what lies somewhere.

    Returns:
        The absolute path; a URL of anything but a local file as it is.
    """
    head, chain, place = location.rpartition("::") if "://" in location else ("", "", location)
    if split_protocol(place)[0] not in (None, "file", "local") or not place.strip():
        return location
    path = str(LocalFileSystem._strip_protocol(place))
    path = os.path.join(os.getcwd(), path)  # it leaves `~x` as it is where there is no user x
    plain = os.path.normpath(path)  # but for `link/..`, which is not the link's own folder
    return head + chain + (plain if os.path.realpath(plain) == os.path.realpath(path) else path)


def absolute_if_there(location: str) -> str:
    """Returns `absolute` of a local path where something is, and anything else, such as a model's name, as it is."""
    path = absolute(location)
    return path if path != location and os.path.exists(path) else location


def is_local(location: str) -> bool:
    """Tells whether a path or URL is of this machine alone: on its disks, or in its memory."""
    return "://" not in location or split_protocol(location.rpartition("::")[2])[0] in _LOCAL


def without_query(path: str) -> str:
    """Returns the path of a file without the query that its URL may end in, where paths are URLs.

    A question mark that no `NAME=` follows is one of a pattern.
    """
    return _QUERY_OR_FRAGMENT.split(path, maxsplit=1)[0] if path.startswith(("http://", "https://")) else path


def redacted(text: str) -> str:
    """Returns text with URLs as they may be shown and kept: without user, password, query and fragment.

    A query may be a signature, which lets whoever reads it read the data. Two URLs of one object that differ in that
    are one name.
    """
    return _URL.sub(_redact, text) if "://" in text else text


def _redact(match: re.Match[str]) -> str:
    scheme, rest = match[1].lower().removesuffix("://"), match[2]
    if scheme in _LOCAL:
        return match[0]
    host, slash, path = rest.partition("/")
    if scheme.rpartition("+")[2] in _WITH_QUERY:
        # what is put around a URL in a sentence may be taken for its end
        end = re.search(r"[),.;:\]}]*$", rest)
        host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
        path += end[0] if end and re.search(r"[?#]", rest) else ""
    else:
        path = _QUERY.sub("", path)
    if scheme not in _PLACE_BEFORE_AT:
        host = host.rpartition("@")[2]
    return f"{match[1]}{host}{slash}{path}"
