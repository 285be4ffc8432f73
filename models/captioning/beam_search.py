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
        words: The words' numbers, without `START` and `END`.
        log_probability: The sum over the words and the end, natural logarithm.
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

    Hypotheses are ranked by log-probability / length ** length_penalty, where the length includes the end. A hypothesis
    that reaches `max_words` is ended there. The captions of an image do not depend on the other images in the batch.

    Args:
        decoder: The decoder, in `eval` mode.
        features: The features of N images.
        beam_width: K, the hypotheses kept for each image; 1 is greedy search.
        num_captions: The captions returned for each image, at most K.
        max_words: The length of the longest caption.
        length_penalty: The exponent of the length; 0 compares plain log-probabilities.
        no_repeat_ngram: The size of n-grams that may not occur twice in a caption; 0 allows any.

    Returns:
        `num_captions` hypotheses for each image, the best first; fewer only where no more exist.
    """
    num_images, device = len(features.values), features.values.device
    image_index = torch.arange(num_images, device=device).repeat_interleave(beam_width)  # (N K,)
    features = features.select(image_index)
    state = decoder.init_state(features)
    words = torch.full((len(image_index), 1), START, device=device)
    scores = torch.full((num_images, beam_width), -math.inf, device=device)
    # All K hypotheses are equal at first, so only one of them may be continued
    scores[:, 0] = 0
    finished = [_Finished(beam_width, num_captions, length_penalty, max_words) for _ in range(num_images)]
    for length in range(1, max_words + 2):
        outputs, state = decoder.step(words[:, -1], state, features)
        log_probabilities = torch.log_softmax(decoder.logits(outputs).float(), dim=-1)  # (N K, V)
        if length > max_words:
            log_probabilities = _only_end(log_probabilities)
        _ban(log_probabilities, words, no_repeat_ngram)
        best, parents, tokens = _best_continuations(scores, log_probabilities)
        _collect(finished, words, best, parents, tokens)
        if length > max_words or all(one.settled for one in finished):
            break
        best = best.masked_fill(tokens == END, -math.inf)
        scores, order = best.topk(beam_width, dim=1)
        rows = parents.gather(1, order) + torch.arange(num_images, device=device)[:, None] * beam_width
        rows = rows.view(-1)
        words = torch.cat([words[rows], tokens.gather(1, order).view(-1, 1)], dim=1)
        state = state.select(rows)
    return [one.best() for one in finished]


def _best_continuations(scores: Tensor, log_probabilities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the 2 K best continuations of each image: half of them may be ends, which leaves K to continue.

    Args:
        scores: (N, K) the log-probabilities of the hypotheses.
        log_probabilities: (N K, V) the log-probabilities of each next word.

    Returns:
        Their log-probabilities, in descending order, the indices of the hypotheses within their image, and the words
        that they add, (N, 2 K) each.
    """
    vocab = log_probabilities.shape[1]
    totals = (scores.view(-1, 1) + log_probabilities).view(len(scores), -1)  # (N, K V)
    best, index = totals.topk(min(2 * scores.shape[1], totals.shape[1]), dim=1)
    return best, index // vocab, index % vocab


class _Finished:
    """The best finished hypotheses of one image.

    Attributes:
        settled: Whether no hypothesis that continues can still come among the best.
    """

    def __init__(self, beam_width: int, num_captions: int, length_penalty: float, max_words: int) -> None:
        self._beam_width, self._num_captions, self._penalty = beam_width, num_captions, length_penalty
        self._longest = (max_words + 1) ** length_penalty
        self._ranked: list[tuple[float, Hypothesis]] = []
        self.settled = False

    def add(self, caption: list[int], score: float) -> None:
        """Adds a hypothesis by its words and its log-probability, which includes the end."""
        value = score / (len(caption) + 1) ** self._penalty
        self._ranked.append((value, Hypothesis(tuple(caption), score)))
        self._ranked = sorted(self._ranked, key=lambda item: (-item[0], item[1].words))[: self._beam_width]

    def settle(self, log_probability: float) -> None:
        """Updates `settled`, from the log-probability of the best hypothesis that continues.

        A log-probability only falls, so the best case is that it stays the same up to the greatest length.
        """
        if len(self._ranked) >= self._num_captions:
            worst = self._ranked[self._num_captions - 1][0]
            self.settled = self._beam_width == 1 or log_probability / self._longest <= worst

    def best(self) -> list[Hypothesis]:
        """Returns up to `num_captions` hypotheses, the best first."""
        return [hypothesis for _, hypothesis in self._ranked[: self._num_captions]]


def _only_end(log_probabilities: Tensor) -> Tensor:
    only = torch.full_like(log_probabilities, -math.inf)
    only[:, END] = log_probabilities[:, END]
    return only


def _ban(log_probabilities: Tensor, words: Tensor, no_repeat_ngram: int) -> None:
    """Forbids, in place, special words, the end of an empty caption, and repeated n-grams."""
    for word in (PAD, START, UNKNOWN):
        log_probabilities[:, word] = -math.inf
    if words.shape[1] == 1:
        log_probabilities[:, END] = -math.inf
    if no_repeat_ngram:
        _ban_repeats(log_probabilities, words, no_repeat_ngram)


def _ban_repeats(log_probabilities: Tensor, words: Tensor, size: int) -> None:
    """Forbids, in place, each word that would repeat an n-gram of its caption."""
    for row, caption in enumerate(words[:, 1:].tolist()):
        prefix = tuple(caption[len(caption) - size + 1 :])
        for start in range(len(caption) - size + 1):
            if tuple(caption[start : start + size - 1]) == prefix:
                log_probabilities[row, caption[start + size - 1]] = -math.inf


def _collect(finished: list[_Finished], words: Tensor, best: Tensor, parents: Tensor, tokens: Tensor) -> None:
    """Adds the hypotheses that end at this step and are among the K best candidates.

    Args:
        finished: The finished hypotheses of each of N images.
        words: (N K, T) the hypotheses so far, from `START` on.
        best: (N, 2 K) the log-probabilities of the best continuations, in descending order.
        parents: (N, 2 K) the index, within its image, of the hypothesis that each continues.
        tokens: (N, 2 K) the word that each adds.
    """
    beam_width = len(words) // len(finished)
    is_end = tokens == END
    ends = is_end[:, :beam_width] & torch.isfinite(best[:, :beam_width])
    for i, rank in ends.nonzero().tolist():
        if not finished[i].settled:
            caption = words[i * beam_width + int(parents[i, rank]), 1:].tolist()
            finished[i].add(caption, float(best[i, rank]))
    alive = best.masked_fill(is_end, -math.inf).amax(dim=1).tolist()
    for hypotheses, log_probability in zip(finished, alive, strict=True):
        if not hypotheses.settled:
            hypotheses.settle(log_probability)
