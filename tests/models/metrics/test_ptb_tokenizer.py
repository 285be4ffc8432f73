import pytest
from pycocoevalcap.tokenizer import ptbtokenizer

from diptych.models.metrics.ptb_tokenizer import tokenize

# What Stanford's PTBTokenizer (3.4.1, -lowerCase) makes of each, less the punctuation
CASES = {
    "A man's t-shirt, it's red.": "a man 's t-shirt it 's red",
    "it’s a dog’s life": "it 's a dog 's life",
    "“curly” ‘quoted’ it": "curly quoted it",
    "50's \"50's\" 'quoted' words": "50 's 50 's quoted words",
    "a black-and-white dog - close up": "a black-and-white dog close up",
    "the boys' toys": "the boys toys",
    "naïve café — dash – and so on…": "naïve café dash and so on",
    "日本語 text": "日本語 text",
    "Two dogs , one cat ; no bird : none !": "two dogs one cat no bird none",
    "wait... what? A dog! Yes": "wait what a dog yes",
    "A dog. It runs. It sits .": "a dog it runs it sits",
    "Mr. Smith at 5 p.m. in the U.S. army, St. John no. 5": (
        "mr. smith at 5 p.m. in the u.s. army st. john no. 5"
    ),
    "J. Smith": "j. smith",
    "don't can't cannot": "do n't ca n't can not",
    "$5.00 #1 5% a & b 3:30 1/2 1,000": "$ 5.00 # 1 5 % a & b 3:30 1/2 1,000",
    "a_b *star*": "a_b * star *",
    "a\tdog \n runs\r\n": "a dog runs",
    "": "",
    " .. , ' ": "",
}


@pytest.mark.parametrize("caption", CASES)
def test_is_cut_as_the_coco_evaluation_cuts_it(caption):
    assert tokenize(caption) == CASES[caption].split()


def test_brackets_are_dropped_as_the_evaluation_means_to():
    assert tokenize("a dog (brown) [sic] {x}") == ["a", "dog", "brown", "sic", "x"]
    assert {"-LRB-", "-RRB-"} < set(ptbtokenizer.PUNCTUATIONS)


def test_what_the_evaluation_drops_is_dropped():
    kept = [
        token
        for token in ptbtokenizer.PUNCTUATIONS
        if not token.endswith("B-") and tokenize(f"a {token} b") != ["a", "b"]
    ]
    assert kept == []


@pytest.mark.parametrize("caption", ["A dog's t-shirt is red.", "It's 5 p.m. here; don't wait!"])
def test_tokens_stay_tokens(caption):
    words = [token for token in tokenize(caption) if "'" not in token]
    assert tokenize(" ".join(words)) == words
