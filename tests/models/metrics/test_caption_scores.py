import random

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from diptych.models.metrics.caption_scores import SCORES, score_captions

Tokens = list[str]
SUBJECTS = ["a dog", "two small dogs", "a man in a red t-shirt", "the children", "a woman 's hat", "nobody"]
VERBS = ["runs", "is running", "jumps over a log", "sits", "plays with the ball", "looks at a dog"]
PLACES = ["on the beach", "in a field", "in the snow near a tree", "", "by the water", "on the the street"]


def peer_scores(candidates: list[Tokens], references: list[list[Tokens]]) -> dict[str, float]:
    wanted = {i: [" ".join(tokens) for tokens in row] for i, row in enumerate(references)}
    given = {i: [" ".join(tokens)] for i, tokens in enumerate(candidates)}
    bleus = Bleu(4).compute_score(wanted, given, verbose=0)[0]
    values = [*bleus, *(scorer.compute_score(wanted, given)[0] for scorer in (Rouge(), Cider()))]
    return dict(zip(SCORES, map(float, values), strict=True))


def caption(draw: random.Random) -> Tokens:
    return " ".join(map(draw.choice, (SUBJECTS, VERBS, PLACES))).split()


def noise(draw: random.Random) -> Tokens:
    return [draw.choice("abcdé") for _ in range(draw.randrange(9))]


class TestEqualsTheCocoEvaluation:
    @pytest.mark.parametrize("write", [caption, noise])
    @pytest.mark.parametrize("seed", range(4))
    def test_on_rows_with_different_numbers_of_references(self, write, seed):
        draw = random.Random(seed)
        references = [[write(draw) for _ in range(draw.randint(1, 6))] for _ in range(150)]
        # as good as the reference, nearly, unrelated, and empty
        candidates = [
            draw.choice([row[0], row[-1][1:], write(draw), write(draw) * 2, []]) for row in references
        ]
        scores = score_captions(candidates, references)
        assert scores == pytest.approx(peer_scores(candidates, references), abs=1e-9)
        assert scores["cider"] > 0.1

    @pytest.mark.parametrize("num_rows", [1, 2, 3])
    def test_on_very_few_rows(self, num_rows):
        draw = random.Random(num_rows)
        references = [[caption(draw) for _ in range(5)] for _ in range(num_rows)]
        candidates = [row[1] for row in references]
        assert score_captions(candidates, references) == pytest.approx(
            peer_scores(candidates, references), abs=1e-9
        )

    def test_where_no_candidate_has_a_token(self):
        references = [[["a", "dog"]], [["a", "cat"], ["one", "cat"]]]
        scores = score_captions([[], []], references)
        assert scores == pytest.approx(peer_scores([[], []], references), abs=1e-9)
        assert max(scores.values()) < 1e-6

    def test_where_a_reference_has_no_token(self):
        references = [[[], ["a", "dog"]], [["a", "cat"]], [[]]]
        candidates = [["a", "dog"], ["cat"], ["x"]]
        assert score_captions(candidates, references) == pytest.approx(
            peer_scores(candidates, references), abs=1e-9
        )


class TestValues:
    def test_captions_that_are_their_references(self):
        references = [[["a", "dog", "runs", "on", "it"]], [["two", "cats", "sit", "by", "a", "tree"]]]
        scores = score_captions([row[0] for row in references], references)
        assert scores == pytest.approx({**dict.fromkeys(SCORES, 1.0), "cider": 10.0}, abs=1e-6)

    def test_by_hand(self):
        # 3 of 4 words, 1 of 3 pairs; as long as its reference
        scores = score_captions([["a", "dog", "runs", "here"]], [[["a", "dog", "here", "now"]]])
        assert scores["bleu_1"] == pytest.approx(3 / 4)
        assert scores["bleu_2"] == pytest.approx((3 / 4 * 1 / 3) ** 0.5)
        assert scores["rouge_l"] == pytest.approx(3 / 4)
        assert scores["cider"] == 0

    def test_no_word_anywhere(self):
        assert score_captions([["x"], []], [[[]], [[]]])["cider"] == 0


class TestRefused:
    @pytest.mark.parametrize(("candidates", "references"), [([], []), ([["a"]], []), ([], [[["a"]]])])
    def test_nothing_to_score(self, candidates, references):
        with pytest.raises(ValueError, match="at least 1"):
            score_captions(candidates, references)

    def test_a_row_without_references(self):
        with pytest.raises(ValueError, match=r"1 of 2 rows have no reference\. Leave them out\."):
            score_captions([["a"], ["b"]], [[["a"]], []])
