"""Beam search over a decoder, for a whole batch at once on its device."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diptych.models.captioning.decoder import Decoder, ImageFeatures
from diptych.models.captioning.vocabulary import END, PAD, START, UNKNOWN


class Hypothesis(NamedTuple):
    """A finished caption.

    Attributes:
        words: Numbers, without `START` and `END`.
        log_probability: Of the words and the end, natural logarithm.
    """

    words: tuple[int, ...]
    log_probability: float


def search(
    decoder: Decoder,
    features: ImageFeatures,
    *,
    beam_width: int,
    num_captions: int,
    max_words: int,
    length_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
) -> list[list[Hypothesis]]:
    """Finds likely captions: the usual beam search (Graves 2012; Wu et al. 2016, 7, with their plain length norm).

    Hypotheses compare by log-probability / length ** length_penalty, where the length counts the end. What has not
    ended after `max_words` is ended there. A image's captions do not depend on the others in the batch.

    Args:
        decoder: In `eval` mode.
        features: N images.
        beam_width: K hypotheses kept a image; 1 is greedy search.
        num_captions: Captions wanted of an image, at most K.
        max_words: Longest caption.
        length_penalty: 0 compares plain log-probabilities.
        no_repeat_ngram: No n-gram of this many words occurs twice in a caption; 0 allows any.

    Returns:
        For each image `num_captions` hypotheses, the best first; fewer only where no more exist.
    """
    num_images, device = len(features.values), features.values.device
    image_index = torch.arange(num_images, device=device).repeat_interleave(beam_width)  # (N K,)
    features = features.select(image_index)
    state = decoder.init_state(features)
    words = torch.full((len(image_index), 1), START, device=device)
    scores = torch.full((num_images, beam_width), -math.inf, device=device)
    scores[:, 0] = 0  # all K are equal at first: one stands for them
    found = [_Found(beam_width, num_captions, length_penalty, max_words) for _ in range(num_images)]
    never = torch.tensor([PAD, START, UNKNOWN], device=device)
    for length in range(1, max_words + 2):
        outputs, state = decoder.step(words[:, -1], state, features)
        log_probabilities = torch.log_softmax(decoder.logits(outputs).float(), dim=-1)  # (N K, V)
        log_probabilities[:, never] = -math.inf
        if length == 1:
            log_probabilities[:, END] = -math.inf  # a caption has a word
        if length > max_words:
            log_probabilities = _only_end(log_probabilities)
        if no_repeat_ngram:
            _ban_repeats(log_probabilities, words, no_repeat_ngram)
        vocab = log_probabilities.shape[1]
        total = (scores.view(-1, 1) + log_probabilities).view(num_images, -1)  # (N, K V)
        best, place = total.topk(min(2 * beam_width, total.shape[1]), dim=1)  # half of them may be ends
        parents, tokens = place // vocab, place % vocab
        _collect(found, words, best, parents, tokens)
        if length > max_words or all(one.settled for one in found):
            break
        best = best.masked_fill(tokens == END, -math.inf)
        scores, order = best.topk(beam_width, dim=1)
        rows = parents.gather(1, order) + torch.arange(num_images, device=device)[:, None] * beam_width
        rows = rows.view(-1)
        words = torch.cat([words[rows], tokens.gather(1, order).view(-1, 1)], dim=1)
        state = state.select(rows)
    return [one.best() for one in found]


class _Found:
    """The finished hypotheses of one features."""

    def __init__(self, beam_width: int, num_captions: int, length_penalty: float, max_words: int) -> None:
        self._beam_width, self._num_captions, self._penalty = beam_width, num_captions, length_penalty
        self._longest = (max_words + 1) ** length_penalty
        self._ranked: list[tuple[float, Hypothesis]] = []
        self.settled = False

    def add(self, caption: list[int], score: float) -> None:
        """Adds a hypothesis: its words, and the log-probability of them and the end."""
        value = score / (len(caption) + 1) ** self._penalty
        self._ranked.append((value, Hypothesis(tuple(caption), score)))
        self._ranked = sorted(self._ranked, key=lambda item: (-item[0], item[1].words))[: self._beam_width]

    def settle(self, alive: float) -> None:
        """Notes whether a hypothesis of this log-probability that goes on can still come among the best.

        Log-probabilities only fall, so it can at most keep its own until it is as long as any may be.
        """
        if len(self._ranked) >= self._num_captions:
            worst = self._ranked[self._num_captions - 1][0]
            self.settled = self._beam_width == 1 or alive / self._longest <= worst

    def best(self) -> list[Hypothesis]:
        return [hypothesis for _, hypothesis in self._ranked[: self._num_captions]]


def _only_end(log_probabilities: Tensor) -> Tensor:
    only = torch.full_like(log_probabilities, -math.inf)
    only[:, END] = log_probabilities[:, END]
    return only


def _ban_repeats(log_probabilities: Tensor, words: Tensor, size: int) -> None:
    """Forbids each word that would repeat an n-gram of its caption."""
    for row, caption in enumerate(words[:, 1:].tolist()):
        before = tuple(caption[len(caption) - size + 1 :])
        for at in range(len(caption) - size + 1):
            if tuple(caption[at : at + size - 1]) == before:
                log_probabilities[row, caption[at + size - 1]] = -math.inf


def _collect(found: list[_Found], words: Tensor, best: Tensor, parents: Tensor, tokens: Tensor) -> None:
    """Adds the hypotheses that end here, where they are among the K best candidates.

    Args:
        found: Of N images.
        words: (N K, T) the hypotheses so far, from `START` on.
        best: (N, 2 K) log-probabilities of the best continuations, in order.
        parents: (N, 2 K) which of a image's hypotheses each goes on from.
        tokens: (N, 2 K) with which word.
    """
    beam_width = len(words) // len(found)
    is_end = tokens == END
    ends = is_end[:, :beam_width] & torch.isfinite(best[:, :beam_width])
    for i, rank in ends.nonzero().tolist():
        if not found[i].settled:
            caption = words[i * beam_width + int(parents[i, rank]), 1:].tolist()
            found[i].add(caption, float(best[i, rank]))
    alive = best.masked_fill(is_end, -math.inf).amax(dim=1).tolist()
    for one, score in zip(found, alive, strict=True):
        if not one.settled:
            one.settle(score)
