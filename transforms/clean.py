"""Captions to plain text: Unicode NFC, no markup, no control characters, single spaces, no duplicates."""

import collections
import dataclasses
import html
import re
import unicodedata
from collections.abc import Collection, Sequence

import apache_beam as beam
import pyarrow as pa
from apache_beam.pvalue import PCollection

from diptych.transforms.chunk import Chunk, Reject, take_rows


@dataclasses.dataclass(frozen=True)
class CleanOptions:
    """What captions become.

    Attributes:
        lowercase: Whether to lower-case them (Unicode, not locale).
        min_chars: Shorter captions are dropped.
        max_chars: Longer captions are dropped.
        require_caption: Whether an image without a caption left is a reject (`no_caption`).
        keep_bytes: Whether a reject keeps the original bytes.
        keep_markup: Whether tags and entities stay as they are.
    """

    lowercase: bool = False
    min_chars: int = 1
    max_chars: int = 10_000
    require_caption: bool = False
    keep_bytes: bool = False
    keep_markup: bool = False


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
    |</?(?P<quoted>[a-z][a-z0-9:]*)(?=[\s/>])[^<>"']*(?:"[^"]*"[^<>"']*|'[^']*'[^<>"']*)*>
    |</?(?P<plain>[a-z][a-z0-9:]*)(?=[\s/>])[^<>]*>
    |<(?:!doctype|!\[cdata|\?xml|\?php)\b[^<>]*>
    """,
    re.I | re.X,
)
_BARE = re.compile(r"</?[a-z][a-z0-9:]*\s*/?>", re.I)
_PAIRS = re.compile(r"<(/?)([a-z][a-z0-9:]*)(?=[\s/>])", re.I)
# Elements of HTML (Living Standard, with those that it calls obsolete) whose names stand for nothing else in a caption
_ELEMENTS = frozenset(
    re.findall(
        r"\w+",
        "a abbr acronym applet b bdi bdo bgsound blockquote br center cite code colgroup dd del dfn dir div "
        "dl dt em embed fieldset figcaption font frameset h1 h2 h3 h4 h5 h6 hgroup hr html i iframe img ins "
        "isindex kbd li link listing meta nobr noembed noframes noscript ol optgroup p plaintext pre q rb rp "
        "rt rtc s samp small span strike strong sub sup svg tbody td textarea tfoot th thead tr tt u ul var "
        "wbr xmp",
    )
)
# Elements whose names are words, and so may be somebody's placeholder: `<object>`, `<time>`, `<title>`
_WORD_ELEMENTS = frozenset(
    re.findall(
        r"\w+",
        "address area article aside audio base basefont big blink body button canvas caption col data "
        "datalist details dialog figure footer form frame head header image input keygen label legend main "
        "map mark marquee math menu menuitem meter nav object option output param picture progress ruby "
        "script search section select slot source spacer style summary table template time title track video",
    )
)
# Tags of Office's HTML: `<o:p>`, `<st1:place>`
_OFFICE = re.compile(r"(?:o|w|v|m|x|st1):[a-z]+", re.I)
_BLOCK = re.compile("br|hr|p|div|[uo]l|li|t[dhr]|table|h[1-6]|blockquote|section|article", re.I)
_AMPERSANDS = re.compile("&(?:amp;)+")
_NUMBERS = re.compile(r"&#0*(\d+)")
_MAX_ROUNDS = 5
# Unicode normalisation sorts the marks on a letter, in quadratic time; UAX #15, 13 has no more than these on one
_MAX_MARKS = 30
_LONG_CHARS = 4096


def clean_caption(text: str, lowercase: bool = False, keep_markup: bool = False) -> str:
    """Returns a caption as plain text; cleaning it again changes nothing.

    HTML tags go, entities become their characters (also where a page escaped them twice), control characters and
    white space become single spaces, and what is left is in Unicode normal form C (UAX #15).

    A tag is one of HTML's own elements: `<PERSON>`, `vector<int>` and `<https://a.b>` are text. What follows its name
    must hold an attribute's `=`, so that `a<b and b>c` is text too, unless the caption has both its tags. An element
    whose name is a word (`<object>`) is a tag with an attribute, or where both its tags are there.

    Args:
        text: The caption.
        lowercase: Whether to lower-case it.
        keep_markup: Whether tags and entities stay as they are.
    """
    if _CLEAN.fullmatch(text):
        return text.lower() if lowercase else text
    for _ in range(_MAX_ROUNDS):
        before, text = text, _clean_once(text, lowercase, keep_markup)
        if text == before:
            return text
    # markup that hides markup, without end
    return _clean_once(text.replace("<", " ").replace("&", " "), lowercase, keep_markup)


def _clean_once(text: str, lowercase: bool, keep_markup: bool) -> str:
    if not keep_markup and ("<" in text or "&" in text):
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
    text = _AMPERSANDS.sub("&", text)
    if "<" in text:
        starts: set[str] = set()
        ends: set[str] = set()
        for slash, name in _PAIRS.findall(text):
            (ends if slash else starts).add(name.lower())
        pairs = starts & ends
        text = _MARKUP.sub(lambda match: _replacement(match, pairs), text)
    # no character has a number of more than 7 digits, and Python converts none of more than 4300
    return html.unescape(_NUMBERS.sub(lambda match: "&#" + match[1][:8], text))


def _replacement(match: re.Match[str], pairs: Collection[str]) -> str:
    """Returns what takes the place of something that looks like markup: itself, where it is none."""
    tag, whole = match["quoted"] or match["plain"], match[0]
    if tag and not _is_tag(tag.lower(), whole, pairs):
        return whole
    return " " if tag and _BLOCK.fullmatch(tag) else ""


def _is_tag(name: str, whole: str, pairs: Collection[str]) -> bool:
    if name not in _ELEMENTS and name not in _WORD_ELEMENTS:
        return _OFFICE.fullmatch(name) is not None
    if name in pairs or "=" in whole:
        return True
    return name in _ELEMENTS and _BARE.fullmatch(whole) is not None


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
        caption = clean_caption(raw, options.lowercase, options.keep_markup)
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
