import itertools
import math

import pytest
import torch

from diptych.models.captioning.beam_search import search
from diptych.models.captioning.decoder import Decoder, DecoderConfig
from diptych.models.captioning.vocabulary import END, START

VOCAB = 7  # three words
WORDS = range(4, VOCAB)
MAX_WORDS = 4
REGIONS = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(3)) * 4


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(4)
    model = Decoder(
        DecoderConfig("lstm", True, VOCAB, 6, 3, embedding_dim=8, hidden_dim=8, attention_dim=4)
    ).eval()
    torch.nn.init.normal_(model.words.weight, std=2.0)
    torch.nn.init.normal_(model.bias, std=0.5)
    return model.requires_grad_(False)


def log_probability(decoder, region, words):
    picture = decoder.encode_image(REGIONS[region : region + 1])
    state, total = decoder.init_state(picture), 0.0
    for word, following in itertools.pairwise((START, *words, END)):
        output, state = decoder.step(torch.tensor([word]), state, picture)
        total += torch.log_softmax(decoder.logits(output), 1)[0, following].item()
    return total


def every_caption(decoder, region, length_penalty):
    found = []
    for length in range(1, MAX_WORDS + 1):
        for words in itertools.product(WORDS, repeat=length):
            score = log_probability(decoder, region, words)
            found.append((score / (length + 1) ** length_penalty, score, words))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0, 2.0])
def test_a_beam_as_wide_as_there_are_captions_finds_the_best_of_all(decoder, length_penalty):
    found = search(
        decoder,
        decoder.encode_image(REGIONS),
        beam_width=130,
        num_captions=5,
        max_words=MAX_WORDS,
        length_penalty=length_penalty,
    )
    for region, hypotheses in enumerate(found):
        best = every_caption(decoder, region, length_penalty)[:5]
        assert [hypothesis.words for hypothesis in hypotheses] == [words for _, _, words in best]
        for hypothesis, (_, score, _) in zip(hypotheses, best, strict=True):
            assert hypothesis.log_probability == pytest.approx(score, abs=1e-4)


def greedy(decoder, region):
    picture = decoder.encode_image(REGIONS[region : region + 1])
    state, words = decoder.init_state(picture), [START]
    while len(words) <= MAX_WORDS:
        output, state = decoder.step(torch.tensor(words[-1:]), state, picture)
        logits = decoder.logits(output)[0]
        logits[[0, 1, 3]] = -math.inf
        if len(words) == 1:
            logits[END] = -math.inf
        if (word := int(logits.argmax())) == END:
            break
        words.append(word)
    return tuple(words[1:])


def test_a_beam_of_one_is_greedy(decoder):
    found = search(decoder, decoder.encode_image(REGIONS), beam_width=1, num_captions=1, max_words=MAX_WORDS)
    assert [hypotheses[0].words for hypotheses in found] == [greedy(decoder, i) for i in range(len(REGIONS))]


@pytest.mark.parametrize("beam_width", [1, 2, 3, 8])
def test_a_picture_is_not_moved_by_its_neighbours(decoder, beam_width):
    asked = {"beam_width": beam_width, "num_captions": beam_width, "max_words": 9, "length_penalty": 0.5}
    together = search(decoder, decoder.encode_image(REGIONS), **asked)
    for region in range(len(REGIONS)):
        (alone,) = search(decoder, decoder.encode_image(REGIONS[region : region + 1]), **asked)
        assert [h.words for h in alone] == [h.words for h in together[region]]
        assert [h.log_probability for h in alone] == pytest.approx(
            [h.log_probability for h in together[region]], abs=1e-4
        )


def test_scores_are_those_of_the_words(decoder):
    found = search(decoder, decoder.encode_image(REGIONS), beam_width=4, num_captions=4, max_words=6)
    for region, hypotheses in enumerate(found):
        for hypothesis in hypotheses:
            expected = log_probability(decoder, region, hypothesis.words)
            assert hypothesis.log_probability == pytest.approx(expected, abs=1e-4)
            assert 1 <= len(hypothesis.words) <= 6
            assert {*hypothesis.words} <= {*WORDS}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_twice(decoder, size):
    asked = {"beam_width": 3, "num_captions": 3, "max_words": 8, "length_penalty": 2.0}
    free = search(decoder, decoder.encode_image(REGIONS), **asked)
    found = search(decoder, decoder.encode_image(REGIONS), no_repeat_ngram=size, **asked)

    def repeats(hypothesis):
        grams = [hypothesis.words[i : i + size] for i in range(len(hypothesis.words) - size + 1)]
        return len({*grams}) < len(grams)

    assert any(repeats(h) for hypotheses in free for h in hypotheses)
    assert not any(repeats(h) for hypotheses in found for h in hypotheses)
