import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.transforms.sources.text.spelling import backwards, ends, fold, respell, unescape

paths = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/"), min_size=1), min_size=1
)


@given(paths)
def test_backwards_is_undone_by_itself_and_ends_are_its_beginnings(names):
    path = "/".join(names)
    assert backwards(backwards(path)) == path
    found = json.loads(ends(path))
    assert [backwards(end) for end in found] == ["/".join(names[-count:]) for count in range(1, len(names))]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_one_name_has_one_spelling(text):
    usual = respell(text)
    assert respell(unicodedata.normalize("NFD", text)) == usual
    assert fold(unicodedata.normalize("NFD", text)) == fold(text)


@pytest.mark.parametrize(
    ("path", "usual"),
    [
        ("a/b.jpg", "a/b.jpg"),
        ("a\\b.jpg", "a/b.jpg"),
        ("./a//b/../c.jpg", "a/c.jpg"),
        ("file:///data/a.jpg", "data/a.jpg"),
        ("s3://bucket/a%20b.jpg", "bucket/a b.jpg"),
        ("http:/host/a.jpg?x=1&y=2#z", "host/a.jpg"),
        ("a%20b.jpg", "a%20b.jpg"),
        ("a?b#c.jpg", "a?b#c.jpg"),
    ],
)
def test_usual_spelling(path, usual):
    assert respell(path) == usual


def test_escapes_and_case():
    assert unescape("a%20b%C3%A9.jpg") == "a bé.jpg"
    assert unescape("100%.jpg") == "100%.jpg"
    assert fold("A%20B.JPG") == "a b.jpg"
