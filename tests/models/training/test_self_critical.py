import math

import numpy as np
import pytest
import torch
from aac_metrics.functional import cider_d

from diptych.models.captioning.decoder import Decoder, DecoderConfig
from diptych.models.captioning.vocabulary import END, PAD, START, UNKNOWN
from diptych.models.training.self_critical import CiderReward, advantages, sample_captions

CORPUS = [
    ["a dog runs on the grass", "a brown dog is running", "the dog runs"],
    ["two men on a boat", "men in a boat on the water"],
    ["a girl in a red dress jumps", "a red dress", "a a a girl"],
    ["the dog sits in a boat"],
]
CANDIDATES = [
    "a dog runs",
    "two men sit on the water",
    "a girl girl girl in a red dress",
    "the dog sits in a boat",
]
WORDS = sorted({word for texts in CORPUS for text in texts for word in text.split()} | {"sit"})


def numbers(text):
    return [WORDS.index(word) + 4 for word in text.split()]


def test_the_reward_is_cider_d_as_others_compute_it():
    reward = CiderReward([[numbers(text) for text in texts] for texts in CORPUS])
    _, expected = cider_d(CANDIDATES, CORPUS)
    found = [
        reward([numbers(candidate)], [numbers(text) for text in texts])[0]
        for candidate, texts in zip(CANDIDATES, CORPUS, strict=True)
    ]
    np.testing.assert_allclose(found, expected["cider_d"].numpy(), atol=1e-6)
    assert found[3] == pytest.approx(10)


def test_a_corpus_of_one_picture_rewards_nothing():
    reward = CiderReward([[numbers("a dog runs")]])
    assert reward([numbers("a dog runs"), numbers("the boat")], [numbers("a dog runs")]) == [0, 0]


def test_advantages_are_against_the_other_samples():
    found = advantages(np.array([[1, 2, 6], [5, 5, 5]], np.float32))
    np.testing.assert_allclose(found, [[1 - 4, 2 - 3.5, 6 - 1.5], [0, 0, 0]], atol=1e-6)


@pytest.fixture(params=[True, False])
def decoder(request):
    torch.manual_seed(0)
    config = DecoderConfig("lstm", request.param, 7, 3, 4, embedding_dim=6, hidden_dim=5, attention_dim=4)
    return Decoder(config).eval()


def test_samples_are_captions(decoder):
    picture = decoder.encode_image(torch.randn(3, 4, 3))
    found = sample_captions(decoder, picture, 50, 6)
    assert found.shape[0] == 150
    assert found.shape[1] <= 8
    for caption in found.tolist():
        assert caption[0] == START
        assert caption.count(END) == 1
        end = caption.index(END)
        assert end >= 2
        assert set(caption[end + 1 :]) <= {PAD}
        assert not {PAD, START, UNKNOWN} & set(caption[1:end])
    assert len({tuple(caption) for caption in found.tolist()}) > 20
    assert {caption.index(END) for caption in found.tolist()} == {2, 3, 4, 5, 6, 7}


def test_samples_come_as_often_as_the_decoder_says(decoder):
    picture = decoder.encode_image(torch.randn(1, 4, 3))
    found = sample_captions(decoder, picture, 20_000, 1)
    assert found.shape == (20_000, 3)
    output, _ = decoder.step(torch.tensor([START]), decoder.init_state(picture), picture)
    logits = decoder.logits(output)[0]
    logits[[PAD, START, END, UNKNOWN]] = -math.inf
    shares = torch.bincount(found[:, 1], minlength=7) / 20_000
    assert torch.allclose(shares, torch.softmax(logits, 0), atol=0.015)
