"""JSON annotations of any size, an entry at a time: what `json.load` reads, in memory that does not grow with the file.

Each entry is decoded by Python's own `json`, so NaN, Infinity and integers of any size are read as it reads them.
"""

import codecs
import collections
import contextlib
import gzip
import io
import itertools
import json
import math
import re
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple, cast

from diptych.transforms.errors import InputError

_READ_BYTES = 1 << 18
_MAX_ENTRY_CHARS = 16 << 20
_MAX_DIGITS = 1000
# A decoder's complaint so near to the end of what is held may only mean that more must be read
_LONGEST_TOKEN_CHARS = 32
_STRUCTURE = re.compile(r'\\.|["\[\]{}]', re.S)
_SPACE = re.compile(r"[ \t\n\r]*")
# What may be left of the last token of a file that is cut off
_CUT_TOKEN = re.compile(r"|-|\.|[eE][-+]?|t(ru?)?|f(a(ls?)?)?|n(ul?)?|N(a)?|-?I(n(f(i(n(it?)?)?)?)?)?")
_MOST_FIELDS = 12
# Of a packed file, so many are unpacked on the way to its end
_MAX_PIECES = 1 << 12


class Unread(NamedTuple):
    """An entry that is too large or too deep to decode.

    Attributes:
        message: Why, as in "image 3 is …".
    """

    message: str


class JsonEntries:
    """The entries of some lists of a JSON object, in one pass over a file.

    Gzip is unpacked. UTF-8, UTF-16 and UTF-32 are told apart, a byte-order mark is skipped, and what cannot be decoded
    becomes U+FFFD.

    Attributes:
        fields: What each top-level key holds, for messages; known when the pass is over.
    """

    def __init__(self, url: str, file: IO[bytes]) -> None:
        self.fields: dict[str, str] = {}
        self._kind = "nothing"
        self._url = url
        self._window = _Window(url, _characters(url, file))

    def read(self, *names: str) -> Iterator[tuple[str, Any]]:
        """Yields the entries of the lists that these top-level keys hold, each with its key, in the file's order.

        A file that is not an object yields nothing: `describe` says what it is.

        Raises:
            InputError: The file is not JSON, ends too early, or has something else than a list there.
        """
        window = self._window
        start = window.peek()
        if start != "{":
            self._kind = _describe(window.first(), window)
            return
        self._kind = "an object"
        window.take("{")
        while window.peek() != "}":
            name = window.key()
            if name in self.fields and name in names:
                raise InputError(
                    f"{self._url} has {name!r} twice, and readers of JSON take one of the two. Leave one in the file."
                )
            if name in names and window.peek() == "[":
                for value in window.elements():
                    self.fields.setdefault(name, f"a list of {_describe(value)}")
                    yield name, value
                self.fields.setdefault(name, "an empty list")
            else:
                self._pass_over(name, name in names)
            window.separate("}")
        window.take("}")
        if rest := window.peek():
            hint = " (an object a line is no JSON file: such a file is named .jsonl)" if rest == "{" else ""
            raise window.fault(f"{rest!r} follows after its end{hint}")

    def describe(self) -> str:
        """Returns what the file holds, for messages: "an object with images (a list of …), info (an object …)"."""
        if self._kind != "an object":
            return self._kind
        named = [f"{name[:40]} ({kind})" for name, kind in list(self.fields.items())[:_MOST_FIELDS]]
        return f"an object with {', '.join(named)}" if named else "an empty object"

    def _pass_over(self, name: str, wanted: bool) -> None:
        value = self._window.first()
        self.fields[name] = _describe(value, self._window)
        if wanted and value is not None:
            raise InputError(
                f"{self._url} is not an annotation that can be read: its {name!r} is {self.fields[name]}. Expected a "
                "list."
            )
        self._window.leave()


class _Window:
    """The part of a JSON text that is in memory, and the place in it."""

    def __init__(self, url: str, pieces: Iterator[str]) -> None:
        self._url = url
        self._pieces = pieces
        self._text = ""
        self._at = 0
        self._passed = 0
        self._ended = False
        self._surrogates = False
        self._decode = json.JSONDecoder(strict=False).raw_decode
        # Whether the place is inside a list of which only the first entry was decoded
        self.inside = False

    def peek(self) -> str:
        """Returns the next character that is no space; nothing at the end of the file."""
        while True:
            match = _SPACE.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self, expected: str) -> None:
        """Passes a character of punctuation."""
        if self.peek() != expected:
            raise self.fault(f"expected {expected!r}")
        self._at += 1

    def key(self) -> str:
        """Passes a key of an object, and its colon."""
        if self.peek() != '"':
            raise self.fault("expected a key in quotes")
        key = self.value()
        self.take(":")
        return str(key)

    def elements(self) -> Iterator[Any]:
        """Passes a list, and yields its entries."""
        self.take("[")
        while self.peek() != "]":
            yield self.value()
            self.separate("]")
        self.take("]")

    def separate(self, end: str) -> None:
        """Passes the comma before another entry; nothing before the end of the list or object."""
        if self.peek() != end:
            self.take(",")
            if self.peek() == end:
                raise self.fault(f"a comma stands before {end!r}")

    def first(self) -> Any:
        """Returns a value; of a list only `[first entry]`, and `leave` passes the rest of it."""
        if self.peek() != "[":
            self.inside = False
            return self.value()
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return []
        self.inside = True
        return [self.value()]

    def leave(self) -> None:
        """Passes the rest of the list that `first` began."""
        if self.inside:
            self._skip(depth=1)
        self.inside = False

    def value(self) -> Any:
        """Passes a value and returns it; `Unread` where it is too large or too deep."""
        if not self.peek():
            raise self.fault("")
        while True:
            try:
                value, end = self._decode(self._text, self._at)
                value = _without_surrogates(value) if self._surrogates else value
            except json.JSONDecodeError as error:
                if self._ended or not self._may_go_on(error):
                    raise self.fault(error.msg, error.pos) from error
            except RecursionError:
                self._skip()
                return Unread("nested too deep to be read")
            except ValueError:  # Python converts no integer of more than 4,300 digits
                self._decode = json.JSONDecoder(strict=False, parse_int=_to_int).raw_decode
                continue
            else:
                # A number may go on: of `1.5e+7` three characters are needed to see that it does not end after 1.5
                if self._ended or len(self._text) - end >= 3 or isinstance(value, str | list | dict):
                    self._at = end
                    return value
            if len(self._text) - self._at > _MAX_ENTRY_CHARS:
                self._skip()
                return Unread(f"longer than {_MAX_ENTRY_CHARS:,} characters")
            self._more()

    def fault(self, message: str, place: int | None = None) -> InputError:
        """Returns the error that the text is not JSON at a place, which is this one if None."""
        place = self._at if place is None else place
        self._at = place
        rest = self._text[place : place + _LONGEST_TOKEN_CHARS].strip()
        if self._ended and (_CUT_TOKEN.fullmatch(rest) or message.startswith("Unterminated string")):
            return self._cut_off()
        context = self._text[place : place + _LONGEST_TOKEN_CHARS]
        return InputError(
            f"{self._url} is not whole JSON: {message[:1].lower()}{message[1:]} at character {self._passed + place:,}, "
            f"where there is {context!r}. Mend it there, or fetch or unpack it again."
        )

    def _cut_off(self) -> InputError:
        length = self._passed + len(self._text)
        if not length:
            return InputError(f"{self._url} is not whole JSON: it is empty. Fetch or unpack it again.")
        return InputError(
            f"{self._url} is not whole JSON: it ends too early, after {length:,} characters. It may be cut off: fetch "
            "or unpack it again."
        )

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        return error.msg.startswith("Unterminated string") or (
            error.pos > len(self._text) - _LONGEST_TOKEN_CHARS
        )

    def _more(self) -> bool:
        """Reads at least as much as is held, so that a long value costs time in proportion to its length."""
        rest = self._text[self._at :]
        pieces, wanted = [rest], max(1, len(rest))
        while wanted > 0 and not self._ended:
            piece = next(self._pieces, None)
            self._ended = piece is None
            pieces.append(piece or "")
            wanted -= len(piece or "")
        self._passed += self._at
        self._text, self._at = "".join(pieces), 0
        self._surrogates = "\\ud" in self._text or "\\uD" in self._text
        return len(self._text) > len(rest)

    def _skip(self, depth: int = 0) -> None:
        """Passes a list or object undecoded, or a string; with a depth, the rest of one that is open."""
        in_string = False
        while True:
            end = self._at
            for match in _STRUCTURE.finditer(self._text, self._at):
                end = match.end()
                if match[0] == '"':
                    in_string = not in_string
                elif not in_string and match[0] in "[{":
                    depth += 1
                elif not in_string and match[0] in "]}":
                    depth -= 1
                if not depth and not in_string:
                    self._at = end
                    return
            # A backslash at the end belongs to the character that follows
            self._at = len(self._text) - (end < len(self._text) and self._text.endswith("\\"))
            if not self._more():
                raise self._cut_off()


def read_head(file: IO[bytes], num_bytes: int = 1 << 16) -> str:
    """Returns the text that a JSON file begins with, packed or not; what cannot be unpacked is left out."""
    try:
        return next(_characters("", file, num_bytes), "")
    except InputError:
        return ""


def read_ends(file: IO[bytes], num_bytes: int = 1 << 16) -> str:
    """Returns the text that a JSON file begins and ends with, packed or not."""
    head = read_head(file, num_bytes)
    file.seek(0)
    if file.read(2) != b"\x1f\x8b":
        size = file.seek(0, io.SEEK_END)
        file.seek(max(min(num_bytes, size), size - num_bytes))
        return head + file.read().decode("utf-8", "replace")
    file.seek(0)
    pieces = itertools.islice(_characters("", file, num_bytes), _MAX_PIECES)
    tail = collections.deque[str](maxlen=2)
    with contextlib.suppress(InputError):
        tail.extend(pieces)
    return head + "".join(tail)


def _characters(url: str, file: IO[bytes], read_bytes: int = _READ_BYTES) -> Iterator[str]:
    """Yields a file as text, in pieces."""
    first = file.read(read_bytes)
    if first[:2] == b"\x1f\x8b":
        file.seek(0)
        file = cast(IO[bytes], gzip.GzipFile(fileobj=file))
        first = _read(url, file, read_bytes)
    while 0 < len(first) < 4 and (more := _read(url, file, 4 - len(first))):
        first += more
    decoder = codecs.getincrementaldecoder(json.detect_encoding(first[:4]))("replace")
    data = first
    while data:
        yield decoder.decode(data)
        data = _read(url, file, read_bytes)
    yield decoder.decode(b"", final=True)


def _read(url: str, file: IO[bytes], num_bytes: int) -> bytes:
    try:
        return file.read(num_bytes)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{url} cannot be unpacked: {error}. It may be cut off: fetch it again.") from error


def parse_json(text: str) -> Any:
    """Parses a text of JSON; an integer of more digits than Python converts is the text of them.

    Raises:
        ValueError: It is not JSON.
        RecursionError: It is nested too deep.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return json.loads(
            text, parse_int=lambda digits: int(digits) if len(digits) <= _MAX_DIGITS else digits
        )


def _to_int(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MAX_DIGITS else math.inf


def _without_surrogates(value: Any) -> Any:
    """Returns a value with U+FFFD for each half of a surrogate pair, which no encoding can write."""
    if isinstance(value, str):
        return (
            value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        )
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return value


def _describe(value: Any, window: _Window | None = None) -> str:
    """Returns what a value is, for messages; without a window, what the entries of a list are that it is one of."""
    if isinstance(value, dict):
        names = ", ".join(str(name)[:40] for name in list(value)[:_MOST_FIELDS])
        kind = "objects" if window is None else "an object"
        return f"{kind} with {names}" if names else kind
    if isinstance(value, list) and window is not None:
        return f"a list of {_describe(value[0])}" if value else "an empty list"
    one = _KINDS.get(type(value), "null" if value is None else "an unreadable value")
    return one if window is not None else f"{one.removeprefix('an ').removeprefix('a ')}s"


_KINDS = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list"}
