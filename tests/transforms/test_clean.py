import html
import random
import unicodedata

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that, equal_to
from hypothesis import example, given
from hypothesis import strategies as st

from diptych.transforms.chunk import Chunk, ChunkKey, reject_batch
from diptych.transforms.clean import CleanCaptions, CleanOptions, clean_caption, clean_captions, clean_chunk
from diptych.transforms.schemas import raw_schema

# Any text at all, lone surrogates too, and text dense with what is cleaned
WILD = st.text(st.characters(codec=None, exclude_categories=[]))
DENSE = st.lists(
    st.sampled_from(
        [
            *"<>&;#/!?='\"- \n\t\0\x85\u00a0\u00ad\u200b\u200d\u2028\u202e\u3000\ufeff",
            *"aAıİΣςßK\u0301\u0316\u0344\u0958\u1100\u1161\u11a8\ud800\udfff\U0001f600",
            *[
                "amp;",
                "&amp",
                "&Amp;",
                "&lt;",
                "&LT",
                "&gt;",
                "&nbsp;",
                "&#60;",
                "&#x3c;",
                "&#38;",
                "&#0;",
                "&#xd800;",
            ],
            *[
                "<b>",
                "</b>",
                "<br/>",
                "<p class=x>",
                "<script>",
                "</script>",
                "<style>",
                "<!--",
                "-->",
                "<!x>",
                "<?x?>",
            ],
        ]
    ),
    max_size=30,
).map("".join)
HOSTILE_CHARS = 1_000_000
HOSTILE_S = 20  # a quadratic step takes minutes


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A cat on a mat.", "A cat on a mat."),
        ("", ""),
        (" \n\t ", ""),
        ("  two   words\t\r\nthree ", "two words three"),
        ("a\u00a0b\u3000c\u2003d", "a b c d"),
        ("cafe\u0301", "caf\u00e9"),
        ("\u1112\u1161\u11ab", "\ud55c"),
        ("\u212b", "\u00c5"),
        ("\ufb01", "\ufb01"),
        ("bell\x07 null\x00 c1\x85 del\x7fx", "bell null c1 del x"),
        ("line\u2028para\u2029graph", "line para graph"),
        ("soft\u00adhyphen zero\u200bwidth \ufeffbom \u202ertl", "softhyphen zerowidth bom rtl"),
        ("\U0001f469\u200d\U0001f680 na\u200cme", "\U0001f469\u200d\U0001f680 na\u200cme"),
        ("lone \ud800 surrogate", "lone ? surrogate"),
    ],
)
def test_characters(text: str, cleaned: str) -> None:
    assert clean_caption(text) == cleaned


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a <b>bold</b> cat", "a bold cat"),
        ("un<i>believ</i>able", "unbelievable"),
        ("<p>one</p><p>two</p>", "one two"),
        ("one<br>two<BR/>three<hr />four", "one two three four"),
        ("<ul><li>a</li><li>b</li></ul>", "a b"),
        ("<h2>Title</h2>text", "Title text"),
        ('<img src="x.png" alt="a > b">cat', "cat"),
        ("<a href='x?a=1&b=2'\n title=\"it's\">link</a>", "link"),
        ("<b it's>loose</b> quotes", "loose quotes"),
        ("<o:p>word</o:p>", "word"),
        ("<!-- note -->cat<!----> <!-- a - b -- c -->dog", "cat dog"),
        ("<!DOCTYPE html><?xml version='1.0'?>cat", "cat"),
        ("<script>if (a < b) { x(); }</script>cat<style>p {}</style>", "cat"),
        ("<SCRIPT type=x>1</SCRIPT>cat", "cat"),
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("&lt;b&gt;bold&lt;/b&gt; escaped", "bold escaped"),
        ("twice &amp;amp;quot;quoted&amp;amp;quot;", 'twice "quoted"'),
        ("caf&eacute; &#233; &#xE9; &#0000000233;", "café é é é"),
        ("a&nbsp;b&#8203;c", "a bc"),
        ("&#x110000;&#99999999999999;", "\ufffd\ufffd"),
        ("AT&T, R&D, a & b", "AT&T, R&D, a & b"),
        ("I <3 cats, 1 < 2, x > y", "I <3 cats, 1 < 2, x > y"),
        ("<john@example.com> wrote", "<john@example.com> wrote"),
        ("<PERSON> plays guitar next to <PERSON>", "<PERSON> plays guitar next to <PERSON>"),
        ("a sign that reads vector<int> and x<y and y>z", "a sign that reads vector<int> and x<y and y>z"),
        ("a <TV> on a <Table>", "a <TV> on a <Table>"),
        ("<unk> <start> <end> <pad> <mask> <image> <eos>", "<unk> <start> <end> <pad> <mask> <image> <eos>"),
        ("<|endoftext|> <|im_start|>", "<|endoftext|> <|im_start|>"),
        ("see <https://a.b/c?d=e> or <mailto:a@b.c>", "see <https://a.b/c?d=e> or <mailto:a@b.c>"),
        ("if a<b and b>c, p <q or q> r", "if a<b and b>c, p <q or q> r"),
        ("map<string, int>, List<T>, Foo<Bar<Baz>>", "map<string, int>, List<T>, Foo<Bar<Baz>>"),
        ("<object> on the <time> of <title>", "<object> on the <time> of <title>"),
        ("<time datetime='2020'>noon</time> <object>x</object>", "noon x"),
        ("&lt;PERSON&gt; and &lt;b&gt;bold&lt;/b&gt;", "<PERSON> and bold"),
        ("<PERSON", "<PERSON"),
        ("<person_1> <my-tag> <猫>", "<person_1> <my-tag> <猫>"),
        ("<-- this <3 >_< <!> <?>", "<-- this <3 >_< <!> <?>"),
        ("A<I>italic</I><FONT COLOR=red>x</FONT>", "Aitalicx"),
        ("</object> </b> </p>", "</object>"),
        ("it ends in <b", "it ends in <b"),
        ("<" * 3 + "b" + ">" * 3, "<<>>"),
    ],
)
def test_markup(text: str, cleaned: str) -> None:
    assert clean_caption(text) == cleaned
    assert clean_caption(cleaned) == cleaned


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A CAT", "a cat"),
        ("ÉCOLE", "école"),
        ("ΟΔΟΣ", "οδος"),
        ("&Amp; &AMP; &Eacute;", "& & é"),
        ("K\u030c", "ǩ"),
    ],
)
def test_lowercase(text: str, cleaned: str) -> None:
    assert clean_caption(text, lowercase=True) == cleaned
    assert clean_caption(text) != cleaned


@given(WILD | DENSE, st.booleans())
@example("&" + "amp;" * 50 + "lt;b&gt;", False)
@example("&lt" * 20 + "b" + ">" * 20, False)
@example("<" * 40 + "b" + ">" * 40, False)
@example("&Lt;b> &QUot; \u212a", True)
@example("a" + "\u0301\u0316" * 3000, False)
def test_cleaning_is_idempotent_and_its_result_is_text(text: str, lowercase: bool) -> None:
    cleaned = clean_caption(text, lowercase)
    assert clean_caption(cleaned, lowercase) == cleaned
    assert cleaned.encode("utf-8").decode("utf-8") == cleaned
    assert unicodedata.is_normalized("NFC", cleaned)
    assert cleaned == " ".join(cleaned.split())
    assert not any(unicodedata.category(char) in ("Cc", "Zl", "Zp", "Cs") for char in cleaned)
    if lowercase:
        assert cleaned == unicodedata.normalize("NFC", cleaned.lower())


@given(WILD)
def test_text_without_markup_keeps_its_visible_characters(text: str) -> None:
    visible = [char for char in text if char not in "<&" and unicodedata.category(char)[0] in "LN"]
    cleaned = unicodedata.normalize("NFD", clean_caption("".join(visible)))
    assert cleaned == unicodedata.normalize("NFD", "".join(visible))


@given(st.text(st.characters(categories=["L", "N", "P", "Sm"]), min_size=1, max_size=40))
def test_escaped_text_comes_back(text: str) -> None:
    plain = clean_caption(text)
    assert clean_caption(html.escape(plain)) == plain
    assert clean_caption(html.escape(html.escape(plain))) == plain


def hostile_texts() -> dict[str, str]:
    units = [
        "<",
        "</",
        "<!",
        "<!--",
        "<?",
        "<a ",
        '<a b="',
        "<a '\"",
        "<a/",
        "<script>",
        "</script",
        "&",
        "&#",
        "&amp;",
    ]
    units += ["&amp;lt;", "<!--<!", "<![CDATA[", 'a<b "', '<a"<a" ', "\u0301", "e\u0301", " ", "\u0301\u0316"]
    texts = {unit: unit * (HOSTILE_CHARS // len(unit)) for unit in units}
    half = HOSTILE_CHARS // 2
    texts["nested"] = "<" * half + "b" + ">" * half
    texts["marks"] = "a" + "\u0301" * half + "\u0316" * half
    texts["digits"] = "&#" + "9" * HOSTILE_CHARS + ";"
    texts["zeros"] = "&#" + "0" * HOSTILE_CHARS + "65;"
    texts["hexadecimal"] = "&#x" + "f" * HOSTILE_CHARS + ";"
    texts["escapes"] = "&" + "amp;" * (HOSTILE_CHARS // 4) + "lt;b&gt;"
    draw = random.Random(1)
    parts = [
        "<",
        ">",
        "a",
        '"',
        "'",
        "=",
        "/",
        "!",
        "--",
        " ",
        "&",
        "#",
        "1",
        ";",
        "script",
        "<a ",
        "-->",
        "<!--",
    ]
    texts["mixed"] = "".join(draw.choices(parts, k=half))
    return texts


@pytest.mark.timeout(HOSTILE_S)
@pytest.mark.parametrize("name", hostile_texts())
def test_hostile_text_ends_in_reasonable_time(name: str) -> None:
    cleaned = clean_caption(hostile_texts()[name])
    assert len(cleaned) <= HOSTILE_CHARS + 10
    cleaned.encode()


def test_captions_are_counted_by_what_became_of_them() -> None:
    raw = ["A cat", " A  cat ", "<p></p>", "ab", "A dog!", "long " * 10, "\u200b", "A dog!"]
    kept, counters = clean_captions(raw, CleanOptions(min_chars=3, max_chars=20))
    assert kept == ["A cat", "A dog!"]
    assert counters == {
        "captions_read": 8,
        "captions_changed": 4,
        "captions_empty": 2,
        "captions_too_short": 1,
        "captions_too_long": 1,
        "captions_duplicate": 2,
        "captions_written": 2,
        "rows_without_caption": 0,
    }


@pytest.mark.parametrize(("length", "is_kept"), [(4, False), (5, True), (8, True), (9, False)])
def test_bounds_of_length_include_themselves(length: int, is_kept: bool) -> None:
    text = f" {'é' * length} "
    kept, _ = clean_captions([text], CleanOptions(min_chars=5, max_chars=8))
    assert kept == ([text.strip()] if is_kept else [])


def test_duplicates_are_found_after_cleaning_and_the_first_stays() -> None:
    assert clean_captions(["A cat", "a cat"], CleanOptions())[0] == ["A cat", "a cat"]
    assert clean_captions(["A cat", "a cat"], CleanOptions(lowercase=True))[0] == ["a cat"]
    assert clean_captions(["b", "caf\u00e9", "cafe\u0301", "a"], CleanOptions())[0] == ["b", "caf\u00e9", "a"]


@given(st.lists(WILD | DENSE, max_size=8), st.booleans(), st.integers(0, 5), st.integers(3, 20))
def test_every_caption_is_counted_once(
    captions: list[str], lowercase: bool, min_chars: int, max_chars: int
) -> None:
    kept, counters = clean_captions(captions, CleanOptions(lowercase, min_chars, max_chars))
    fates = ("empty", "too_short", "too_long", "duplicate", "written")
    assert sum(counters[f"captions_{fate}"] for fate in fates) == counters["captions_read"] == len(captions)
    assert counters["captions_written"] == len(kept) == len(set(kept))
    assert counters["rows_without_caption"] == (not kept)
    assert all(max(1, min_chars) <= len(caption) <= max_chars for caption in kept)


def chunk_of(captions: list[list[str]]) -> Chunk:
    count = len(captions)
    columns = [
        [f"k{i}" for i in range(count)],
        [bytes([i]) for i in range(count)],
        ["p.jpg"] * count,
        captions,
        ["a.tar"] * count,
        [10 + i for i in range(count)],
        [f"licence {i}" for i in range(count)],
    ]
    fields = raw_schema(["licence"])
    arrays = [pa.array(column, field.type) for column, field in zip(columns, fields, strict=True)]
    rows = pa.RecordBatch.from_arrays(arrays, schema=fields)
    return Chunk(ChunkKey("s", 3), rows, reject_batch("s", "read", []), True, {"captions_read": 7})


CAPTIONS = [["A <b>cat</b>"], ["<p>"], ["A dog", "A dog", "Dogs"], [], ["A cow"]]


def test_a_row_without_caption_is_kept_unless_one_is_required() -> None:
    chunk = chunk_of(CAPTIONS)
    cleaned = clean_chunk(chunk, CleanOptions())
    assert cleaned.rows.schema == chunk.rows.schema
    assert cleaned.rows.column("captions").to_pylist() == [["A cat"], [], ["A dog", "Dogs"], [], ["A cow"]]
    assert cleaned.rows.drop_columns(["captions"]) == chunk.rows.drop_columns(["captions"])
    assert cleaned.rejects.num_rows == 0
    assert cleaned.counters == {
        "captions_read": 13,
        "captions_changed": 2,
        "captions_empty": 1,
        "captions_duplicate": 1,
        "captions_written": 4,
        "rows_without_caption": 2,
    }


@pytest.mark.parametrize("keep_bytes", [False, True])
def test_no_caption(keep_bytes: bool) -> None:
    chunk = chunk_of(CAPTIONS)
    cleaned = clean_chunk(chunk, CleanOptions(require_caption=True, keep_bytes=keep_bytes))
    kept = [0, 2, 4]
    assert cleaned.rows.drop_columns(["captions"]) == chunk.rows.take(kept).drop_columns(["captions"])
    assert cleaned.rows.column("captions").to_pylist() == [["A cat"], ["A dog", "Dogs"], ["A cow"]]
    assert cleaned.rejects.to_pylist() == [
        {
            "key": f"k{i}",
            "shard": "s",
            "row": 10 + i,
            "stage": "text",
            "reason": "no_caption",
            "message": f"none of {len(CAPTIONS[i])} captions is left",
            "bytes": bytes([i]) if keep_bytes else None,
        }
        for i in (1, 3)
    ]
    assert (cleaned.key, cleaned.last, cleaned.num_read) == (chunk.key, True, 5)


def test_a_chunk_of_nothing() -> None:
    chunk = chunk_of([])
    cleaned = clean_chunk(chunk, CleanOptions(require_caption=True))
    assert (cleaned.rows, cleaned.counters) == (chunk.rows, {"captions_read": 7})


def test_a_slice_is_cleaned_as_the_slice() -> None:
    chunk = chunk_of([["A cow"], *CAPTIONS])
    part = Chunk(chunk.key, chunk.rows.slice(1), chunk.rejects, True)
    cleaned = clean_chunk(part, CleanOptions(require_caption=True))
    assert cleaned.rows.column("key").to_pylist() == ["k1", "k3", "k5"]
    assert cleaned.rejects.column("key").to_pylist() == ["k2", "k4"]


def test_in_beam() -> None:
    options = CleanOptions(lowercase=True, require_caption=True)
    expected = clean_chunk(chunk_of(CAPTIONS), options)
    with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
        cleaned = pipeline | beam.Create([chunk_of(CAPTIONS)], reshuffle=False) | CleanCaptions(options)
        described = cleaned | beam.Map(
            lambda chunk: (chunk.rows.to_pylist(), chunk.rejects.to_pylist(), chunk.counters)
        )
        assert_that(
            described,
            equal_to([(expected.rows.to_pylist(), expected.rejects.to_pylist(), expected.counters)]),
        )
    assert expected.rows.num_rows == 3


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a <b>bold</b>  cat", "a <b>bold</b> cat"),
        ("fish &amp; chips", "fish &amp; chips"),
        ("<PERSON>\u200b", "<PERSON>"),
    ],
)
def test_markup_that_is_kept(text: str, cleaned: str) -> None:
    assert clean_caption(text, keep_markup=True) == cleaned
    options = CleanOptions(keep_markup=True)
    assert clean_captions([text], options)[0] == [cleaned]
