"""Captions to plain text: Unicode NFC, no markup, no control characters, single spaces, no duplicates."""

import collections
import dataclasses
import html
import re
import unicodedata
from collections.abc import Sequence

import apache_beam as beam
import pyarrow as pa
from apache_beam.pvalue import PCollection

from transforms.chunk import Chunk, Reject, take_rows


@dataclasses.dataclass(frozen=True)
class CleanOptions:
    """What captions become.

    Attributes:
        lowercase: Whether to lower-case them (Unicode, not locale).
        min_chars: Shorter captions are dropped.
        max_chars: Longer captions are dropped.
        require_caption: Whether an image without a caption left is a reject (`no_caption`).
        keep_bytes: Whether a reject keeps the original bytes.
    """

    lowercase: bool = False
    min_chars: int = 1
    max_chars: int = 10_000
    require_caption: bool = False
    keep_bytes: bool = False


# Nothing but printable ASCII, no markup, no doubled or outer spaces: clean already, as most captions are
_CLEAN = re.compile(r"[!-%'-;=?-~]+(?: [!-%'-;=?-~]+)*")
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_SPACES = re.compile(r"\s+")
# Zero-width and direction marks that only disturb text. The joiners (200C, 200D) belong to words and emoji.
_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]")
# Comments, hidden elements, tags (an attribute's quotes may hold a ">"), declarations. No alternative passes the
# beginning of another of its kind, so the time is linear; that of html.parser is quadratic in unclosed tags.
_MARKUP = re.compile(
    r"""
    <!--(?:[^<-]|-(?!->)|<(?!!--))*-->
    |<(?:script|style)\b[^<>]*>(?:[^<]|<(?!/?(?:script|style)\b))*</(?:script|style)\b[^<>]*>
    |</?(?P<quoted>[a-z][a-z0-9:-]*)(?=[\s/>])[^<>"']*(?:"[^"]*"[^<>"']*|'[^']*'[^<>"']*)*>
    |</?(?P<plain>[a-z][a-z0-9:-]*)(?=[\s/>])[^<>]*>
    |<[!?][^<>]*>
    """,
    re.I | re.X,
)
_BLOCK = re.compile("br|hr|p|div|[uo]l|li|t[dhr]|table|h[1-6]|blockquote|section|article", re.I)
_AMPERSANDS = re.compile("&(?:amp;)+")
_NUMBERS = re.compile(r"&#0*(\d+)")
_MAX_ROUNDS = 5
# Unicode normalisation sorts the marks on a letter, in quadratic time; UAX #15, 13 has no more than these on one
_MAX_MARKS = 30
_LONG_CHARS = 4096


def clean_caption(text: str, lowercase: bool = False) -> str:
    """Returns a caption as plain text; cleaning it again changes nothing.

    HTML tags go, entities become their characters (also where a page escaped them twice), control characters and
    white space become single spaces, and what is left is in Unicode normal form C (UAX #15).
    """
    if _CLEAN.fullmatch(text):
        return text.lower() if lowercase else text
    for _ in range(_MAX_ROUNDS):
        before, text = text, _clean_once(text, lowercase)
        if text == before:
            return text
    return _clean_once(
        text.replace("<", " ").replace("&", " "), lowercase
    )  # markup that hides markup, without end


def _clean_once(text: str, lowercase: bool) -> str:
    if "<" in text or "&" in text:
        text = _strip_markup(text)
    text = _CONTROLS.sub(" ", _INVISIBLE.sub("", text))
    text = text.encode("utf-8", "replace").decode()  # a lone surrogate is not text
    if len(text) > _LONG_CHARS:
        text = _drop_surplus_marks(text)
    if lowercase:
        text = text.lower()
    return _SPACES.sub(" ", unicodedata.normalize("NFC", text)).strip()


def _strip_markup(text: str) -> str:
    """Returns text without tags, its entities as characters."""
    text = _MARKUP.sub(_replacement, _AMPERSANDS.sub("&", text))
    # no character has a number of more than 7 digits, and Python converts none of more than 4300
    return html.unescape(_NUMBERS.sub(lambda match: "&#" + match[1][:8], text))


def _replacement(match: re.Match[str]) -> str:
    tag = match["quoted"] or match["plain"]
    return " " if tag and _BLOCK.fullmatch(tag) else ""


def _drop_surplus_marks(text: str) -> str:
    kept, num_marks = [], 0
    for char in text:
        num_marks = num_marks + 1 if unicodedata.combining(char) else 0
        if num_marks <= _MAX_MARKS:
            kept.append(char)
    return "".join(kept)


def clean_captions(
    captions: Sequence[str], options: CleanOptions
) -> tuple[list[str], collections.Counter[str]]:
    """Cleans the captions of one image.

    Returns:
        The captions that are left, in their order, and counters of what was done.
    """
    kept: dict[str, None] = {}
    counters: collections.Counter[str] = collections.Counter()
    for raw in captions:
        caption = clean_caption(raw, options.lowercase)
        counters["captions_read"] += 1
        counters["captions_changed"] += caption != raw
        if not caption:
            counters["captions_empty"] += 1
        elif len(caption) < options.min_chars:
            counters["captions_too_short"] += 1
        elif len(caption) > options.max_chars:
            counters["captions_too_long"] += 1
        elif caption in kept:
            counters["captions_duplicate"] += 1
        else:
            kept[caption] = None
    counters["captions_written"] += len(kept)
    counters["rows_without_caption"] += not kept
    return list(kept), counters


def clean_chunk(chunk: Chunk, options: CleanOptions) -> Chunk:
    """Cleans the captions of a chunk of raw rows; rows that must have one and do not are rejects of `text`."""
    counters: collections.Counter[str] = collections.Counter()
    captions, kept, rejects = [], [], []
    for i, raw in enumerate(chunk.rows.column("captions").to_pylist()):
        cleaned, done = clean_captions(raw, options)
        counters.update(done)
        if cleaned or not options.require_caption:
            captions.append(cleaned)
            kept.append(i)
        else:
            row = {name: chunk.rows.column(name)[i].as_py() for name in ("key", "row")}
            data = chunk.rows.column("image")[i].as_py() if options.keep_bytes else None
            rejects.append(
                Reject(row["key"], row["row"], "no_caption", f"none of {len(raw)} captions is left", data)
            )
    rows = take_rows(chunk.rows, kept)
    index = rows.schema.get_field_index("captions")
    rows = rows.set_column(index, rows.schema.field(index), pa.array(captions, pa.list_(pa.string())))
    return chunk.advance("text", rows, rejects, counters)


@dataclasses.dataclass(eq=False)  # not frozen: Beam labels its transforms
class CleanCaptions(beam.PTransform[PCollection[Chunk], PCollection[Chunk]]):
    """Chunks of raw rows to chunks of raw rows with clean captions.

    Attributes:
        options: What captions become.
    """

    options: CleanOptions

    def expand(self, chunks: PCollection[Chunk]) -> PCollection[Chunk]:
        """Applies `clean_chunk`."""
        return chunks | "Clean" >> beam.Map(clean_chunk, self.options).with_output_types(Chunk)
