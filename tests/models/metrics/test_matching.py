import numpy as np
import pytest

from diptych.models.base import CaptionModel, Captions
from diptych.models.metrics.matching import ImageAndPrompt, Match, Matcher, cosines
from diptych.models.text.word2vec import Word2Vec


class Reads(CaptionModel):
    """An image says itself what is in it."""

    digest, batch_size, feature_dim = "r" * 16, 3, None

    def prepare(self, inputs):
        return [data.decode() for data in inputs]

    def predict(self, prepared):
        return [Captions((text, "other"), (-1.0, -2.0)) for text in prepared]


@pytest.fixture
def matcher():
    vectors = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    return Matcher(Reads(), Word2Vec(["red", "blue", "square"], vectors))


def test_similarity_is_the_cosine_of_caption_and_prompt(matcher):
    pairs = [
        ImageAndPrompt(b"red", "red"),
        ImageAndPrompt(b"red", "blue"),
        ImageAndPrompt(b"red square", "blue square"),
        ImageAndPrompt(b"zebra", "red"),
        ImageAndPrompt(b"red", "zebra"),
    ]
    found = matcher.predict(matcher.prepare(pairs))
    # means: (1, 0.5) and (0.5, 1)
    assert found == [
        Match("red", pytest.approx(1)),
        Match("red", 0.0),
        Match("red square", pytest.approx(0.8)),
        Match("zebra", 0.0),
        Match("red", 0.0),
    ]
    assert matcher.batch_size == 3


def test_cosines_of_zero_vectors_are_zero():
    assert cosines([np.zeros(3), np.ones(3)], [np.ones(3), np.full(3, 2.0)]).tolist() == [0, pytest.approx(1)]
