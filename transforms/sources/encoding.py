"""Text files in whatever encoding they are: found once a file, so that no line is guessed at by itself."""

import codecs
import io
import re
from collections.abc import Iterator
from typing import IO, NamedTuple

from charset_normalizer import from_bytes

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_HEAD_BYTES = 1 << 16
_SAMPLE_BYTES = 1 << 16
# What captions are found in beside UTF-8; of the Latin ones the web's default (WHATWG Encoding Standard) stands for all
_WORD, _ASCII_LETTER = re.compile(rb"[A-Za-z\x80-\xff]+"), re.compile(rb"[A-Za-z]")
_ENCODINGS = ["cp1252", "gb18030", "shift_jis", "euc_jp", "euc_kr", "big5", "cp1251", "koi8_r"]


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
    """

    text: str
    is_utf: bool


def find_encoding(file: IO[bytes]) -> Encoding:
    """Finds the encoding of a file, which is read once and left at its start.

    UTF-16 and 32 are told by their mark, or by zeros. A file is UTF-8 unless most of its lines that are not ASCII are
    something else; then the library `charset-normalizer` tells what, from a sample of them.
    """
    file.seek(0)
    head = file.read(_HEAD_BYTES)
    newline = "\r" if b"\r" in head and b"\n" not in head else "\n"
    for mark, name in sorted(_MARKS.items(), key=lambda item: -len(item[0])):
        if head.startswith(mark) and name != "utf-8-sig":
            file.seek(0)
            return _wide(name, head)
    if b"\0" in head[:2000]:
        zeros = [head[:2000:2].count(0), head[1:2000:2].count(0)]
        if max(zeros) > 0.2 * min(len(head), 2000) and max(zeros) > 5 * min(zeros):
            file.seek(0)
            name = "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
            return _wide(name, head)
    file.seek(0)
    num_utf8 = num_other = 0
    sample = bytearray()
    for line in file:
        if line.isascii():
            continue
        try:
            line.decode()
            num_utf8 += 1
        except UnicodeDecodeError:
            num_other += 1
            if len(sample) < _SAMPLE_BYTES:
                sample += line
    file.seek(0)
    fallback = _detected(bytes(sample)) if sample else "utf-8"
    return Encoding(fallback if num_other > num_utf8 else "utf-8-sig", fallback, newline)


def _wide(name: str, head: bytes) -> Encoding:
    text = head.decode(name, "ignore")
    return Encoding(name, name, "\r" if "\r" in text and "\n" not in text else "\n")


def _detected(sample: bytes) -> str:
    words = _WORD.findall(sample)
    mixed = sum(not word.isascii() and _ASCII_LETTER.search(word) is not None for word in words)
    if 2 * mixed >= sum(not word.isascii() for word in words):
        return "cp1252"  # letters with accents among plain ones; for a few of them the library's choice is chance
    best = from_bytes(sample, cp_isolation=_ENCODINGS).best()
    return best.encoding if best else "cp1252"


def lines(file: IO[bytes], encoding: Encoding) -> Iterator[Line]:
    """Yields the lines of a file; bytes that are no text even so become U+FFFD."""
    if encoding.name.startswith(("utf-16", "utf-32")):
        newline = "\n" if encoding.newline == "\n" else None
        text = io.TextIOWrapper(file, encoding=encoding.name, errors="replace", newline=newline)
        try:
            for line in text:
                yield Line(line.rstrip("\r\n").removeprefix("\ufeff"), True)
        finally:
            text.detach()  # the file is the caller's to close
        return
    is_utf8 = encoding.name == "utf-8-sig"
    first = True
    for data in _split(file, encoding.newline.encode()):
        data = data.rstrip(b"\r\n")
        if first:
            data, first = data.removeprefix(codecs.BOM_UTF8), False
        if data.isascii():
            yield Line(data.decode(), True)
            continue
        try:
            yield Line(data.decode(encoding.name.removesuffix("-sig")), is_utf8)
        except UnicodeDecodeError:
            yield Line(data.decode(encoding.fallback, "replace"), False)


def _split(file: IO[bytes], newline: bytes) -> Iterator[bytes]:
    if newline == b"\n":
        for line in file:  # noqa: UP028 (`yield from` closes the file with this generator)
            yield line
        return
    rest = b""
    while block := file.read(_HEAD_BYTES):
        *whole, rest = (rest + block).split(newline)
        yield from whole
    if rest:
        yield rest
