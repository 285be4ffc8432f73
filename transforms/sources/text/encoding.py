"""Text files in whatever encoding they are: found once a file, so that no line is guessed at by itself."""

import codecs
import functools
import io
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple, TypeVar

from charset_normalizer import from_bytes

_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_HEAD_BYTES = 1 << 16
MAX_LINE_BYTES = 16 << 20
_PIECE_BYTES = 1 << 20
_SAMPLE_BYTES = 1 << 16
# What captions are found in beside UTF-8, the likelier first
_ENCODINGS = (
    *("cp1252", "cp1251", "gb18030", "cp932", "euc_jp", "euc_kr", "cp949", "big5", "koi8_r", "koi8_u"),
    *("cp1250", "iso8859_2", "cp1254", "cp1257", "cp1253", "cp1255", "cp1256", "iso8859_6", "cp874", "cp866"),
)
# The letters that languages have beside a to z: what codepages of Latin letters are told apart by
_ALPHABETS = [
    *map(frozenset, ("àâæçèéêëîïôœùûüÿ", "äöüß", "áâãàçéêíóôõú", "áéíñóúü", "àèéìíòóùî", "åäöé", "æøåéó")),
    *map(frozenset, ("áðéíóúýþæö", "éëïóöü", "ąćęłńóśźż", "áčďéěíňóřšťúůýž", "áäčďéíĺľňóôŕšťúýž")),
    *map(frozenset, ("áéíóöőúüű", "ăâîşţ", "ćčđšž", "çğıöşüâîû", "ąčęėįšųūž", "āčēģīķļņšūž", "äõöüšž")),
]
_ASCII_BUT_LETTERS = re.compile(rb"(?<![\x80-\xff])[\t!-?]+")  # behind another byte it may be half a letter
_WORD = re.compile(r"[^\W_]+")
_JUDGED_CHARS = 4000


class Encoding(NamedTuple):
    """How the lines of a file become text.

    Attributes:
        name: The file's encoding.
        fallback: The encoding of single lines that are not UTF-8 in a file that is.
        newline: What ends a line.
    """

    name: str
    fallback: str
    newline: str


class Line(NamedTuple):
    """A line of a file, without its end.

    Attributes:
        text: The line.
        is_utf: Whether it was in UTF-8, 16 or 32.
        is_cut: Whether it is longer than what is read of a line; the text says so then, and is no record of any kind.
    """

    text: str
    is_utf: bool
    is_cut: bool = False


_CUT = Line(f"a line of more than {MAX_LINE_BYTES} bytes", True, True)
_Text = TypeVar("_Text", str, bytes)


def decode(data: bytes) -> tuple[str, bool]:
    """Decodes a text that is a whole file or value; returns it, and whether all of it was in UTF-8, 16 or 32."""
    if name := _wide_name(data[:_HEAD_BYTES]):
        text = data.decode(name, "replace").removeprefix("\ufeff")
        return text, "\ufffd" not in text
    try:
        return data.decode("utf-8-sig"), True
    except UnicodeDecodeError:
        name = "utf-8-sig" if _is_mostly_utf8(data) else _detected(data[:_SAMPLE_BYTES])
        return data.decode(name, "replace"), False


def find_encoding(file: IO[bytes]) -> Encoding:
    """Finds the encoding of a file, which is read once and left at its start.

    UTF-16 and 32 are told by their mark, or by zeros. A file is UTF-8 unless most of its lines that are not ASCII are
    something else; then the library `charset-normalizer` tells what, from a sample of them.
    """
    file.seek(0)
    head = file.read(_HEAD_BYTES)
    if name := _wide_name(head):
        file.seek(0)
        text = head.decode(name, "ignore")
        return Encoding(name, name, "\r" if "\r" in text and "\n" not in text else "\n")
    newline = "\r" if b"\r" in head and b"\n" not in head else "\n"
    file.seek(0)
    num_utf8 = num_other = 0
    sample = bytearray()
    while line := file.readline(_PIECE_BYTES):
        if line.isascii():
            continue
        if _is_mostly_utf8(line):
            num_utf8 += 1
        else:
            num_other += 1
            if len(sample) < _SAMPLE_BYTES:
                sample += line
    file.seek(0)
    fallback = _detected(bytes(sample)) if sample else "utf-8"
    return Encoding(fallback if num_other > num_utf8 else "utf-8-sig", fallback, newline)


def _wide_name(head: bytes) -> str | None:
    """Returns which of UTF-16 and 32 a text is in, from its first bytes; None of any other."""
    for mark, name in sorted(_MARKS.items(), key=lambda item: -len(item[0])):
        if head.startswith(mark):
            return name
    if b"\0" in head[:2000]:
        zeros = [head[:2000:2].count(0), head[1:2000:2].count(0)]
        if max(zeros) > 0.2 * min(len(head), 2000) and max(zeros) > 5 * min(zeros):
            return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    return None


def _is_mostly_utf8(data: bytes) -> bool:
    """Tells whether a text that is not ASCII is UTF-8, or is but for less than half of it: cut off in a letter, say."""
    try:
        data.decode()
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
        return 2 * text.count("\ufffd") < sum(not letter.isascii() for letter in text)
    return True


def peek_encoding(file: io.BufferedReader) -> Encoding:
    """Finds the encoding of a stream from its first bytes, and leaves them in it."""
    return find_encoding(
        io.BytesIO(file.peek(_HEAD_BYTES)[:_HEAD_BYTES].rpartition(b"\n")[0] or file.peek(1))
    )


def _detected(sample: bytes) -> str:
    """Returns the encoding in which a sample is words of a language; cp1252 where it is words in none."""
    sample = _ASCII_BUT_LETTERS.sub(b" ", sample)
    scores = {
        name: _COHERENCE_WEIGHT * match.coherence - match.chaos - _oddness(sample.decode(name, "replace"))
        for match in from_bytes(sample, cp_isolation=[*_ENCODINGS])
        for name in match.could_be_from_charset
    }
    scores.setdefault("cp1252", -1)
    return max(scores, key=lambda name: (scores[name] + _BONUS.get(name, 0), -_ENCODINGS.index(name)))


# In 860 samples of 30 languages, of one line to 200, these give the fewest mistakes
_COHERENCE_WEIGHT = 0.3
_BONUS = {"cp1252": 0.03, "cp949": -0.03}


def _oddness(text: str) -> float:
    """Returns the share of words that no language has: of several scripts, or of letters of several languages."""
    words = [word for word in _WORD.findall(text[:_JUDGED_CHARS]) if not word.isascii()]
    latin = []
    num_odd = 0.0
    for word in words:
        scripts = {_script(letter) for letter in word if letter.isalpha()}
        if scripts == {"LATIN"}:
            latin.append(word)
            num_odd += 0 if word[1:].islower() or word.isupper() or not word[1:] else 0.5
        elif _is_odd_mixture(scripts):
            num_odd += 1
        elif len(word) > 2 and word[1:] != word[1:].lower():
            num_odd += 0.5
    if latin:
        letters = [{letter for letter in word.lower() if not letter.isascii()} for word in latin]
        num_odd += min(sum(not word <= alphabet for word in letters) for alphabet in _ALPHABETS)
    return num_odd / max(len(words), 1)


def _is_odd_mixture(scripts: set[str]) -> bool:
    return "HALFWIDTH" in scripts or (len(scripts) > 1 and not scripts <= {"LATIN", "EAST ASIAN"})


@functools.cache
def _script(letter: str) -> str:
    first = re.split("[ -]", unicodedata.name(letter, "UNKNOWN"), maxsplit=1)[0]
    return "EAST ASIAN" if first in ("CJK", "HIRAGANA", "KATAKANA", "IDEOGRAPHIC") else first


def lines(file: IO[bytes], encoding: Encoding) -> Iterator[Line]:
    """Yields the lines of a file; bytes that are no text even so become U+FFFD."""
    if encoding.name.startswith(("utf-16", "utf-32")):
        newline = "\n" if encoding.newline == "\n" else None
        text = io.TextIOWrapper(file, encoding=encoding.name, errors="replace", newline=newline)
        try:
            for line in _bounded(text.readline, "\n"):
                yield Line(line.rstrip("\r\n").removeprefix("\ufeff"), True) if line is not None else _CUT
        finally:
            text.detach()  # the file is the caller's to close
        return
    is_utf8 = encoding.name == "utf-8-sig"
    first = True
    pieces = _bounded(file.readline, b"\n") if encoding.newline == "\n" else _split(file, b"\r")
    for data in pieces:
        if data is None:
            first = False
            yield _CUT
            continue
        data = data.rstrip(b"\r\n")
        if first:
            data, first = data.removeprefix(codecs.BOM_UTF8), False
        if data.isascii():
            yield Line(data.decode(), True)
            continue
        try:
            yield Line(data.decode(encoding.name.removesuffix("-sig")), is_utf8)
        except UnicodeDecodeError:
            name = "utf-8" if is_utf8 and _is_mostly_utf8(data) else encoding.fallback
            yield Line(data.decode(name, "replace"), False)


def _bounded(readline: Callable[[int], _Text], newline: _Text) -> Iterator[_Text | None]:
    """Yields lines, and None for one that is too long, which is passed over."""
    while line := readline(MAX_LINE_BYTES):
        is_cut = len(line) == MAX_LINE_BYTES and not line.endswith(newline)
        rest = line
        while is_cut and rest and not rest.endswith(newline):
            rest = readline(_PIECE_BYTES)
        yield None if is_cut else line


def _split(file: IO[bytes], newline: bytes) -> Iterator[bytes | None]:
    """Yields the same as `_bounded`, of lines that do not end as those of a file do."""
    rest, is_cut = b"", False
    while block := file.read(_HEAD_BYTES):
        *whole, rest = (rest + block).split(newline)
        for line in whole:
            yield None if is_cut else line
            is_cut = False
        is_cut = is_cut or len(rest) >= MAX_LINE_BYTES
        rest = b"" if is_cut else rest
    if rest or is_cut:
        yield None if is_cut else rest
