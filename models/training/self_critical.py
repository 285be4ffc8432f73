"""Learning from whole captions: self-critical training (Rennie et al. 2017), each sample against the others.

Captions are drawn from the model, and each is rewarded by its CIDEr-D (Vedantam et al. 2015) against those that people
wrote. Its advantage is measured against the other samples of its image (Luo 2020, "A better variant of
self-critical sequence training"), so that no second search is needed.
"""

import collections
import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diptych.models.captioning.decoder import Decoder, ImageFeatures
from diptych.models.captioning.vocabulary import END, PAD, START, UNKNOWN

_ORDERS = 4
_LENGTH_SIGMA = 6.0
_SCALE = 10.0

_Caption = Sequence[int]
_Counts = collections.Counter[tuple[int, ...]]


class CiderReward:
    """CIDEr-D of one caption at a time, with the document frequencies of a whole training set.

    Args:
        corpus: The captions of each image, as numbers; read once.
    """

    def __init__(self, corpus: Iterable[Sequence[_Caption]]) -> None:
        num_images = 0
        frequency: _Counts = collections.Counter()
        for captions in corpus:
            num_images += 1
            frequency.update(set().union(*(_ngrams(caption) for caption in captions)))
        self._log_images = math.log(max(1, num_images))
        # Most n-grams occur once, and weigh as much as one that never occurs: they need not be kept.
        self._log_frequency = {ngram: math.log(count) for ngram, count in frequency.items() if count > 1}

    def __call__(self, candidates: Sequence[_Caption], references: Sequence[_Caption]) -> list[float]:
        """Returns the CIDEr-D, 0 to 10, of each candidate against the references of one image."""
        wanted = [self._weigh(reference) for reference in references]
        return [self._score(self._weigh(candidate), wanted) for candidate in candidates]

    def _weigh(self, caption: _Caption) -> "_Weighed":
        weights: list[dict[tuple[int, ...], float]] = [{} for _ in range(_ORDERS)]
        for ngram, count in _ngrams(caption).items():
            rarity = self._log_images - self._log_frequency.get(ngram, 0.0)
            weights[len(ngram) - 1][ngram] = count * rarity
        norms = [math.sqrt(sum(value * value for value in by.values())) for by in weights]
        return len(caption), weights, norms

    @staticmethod
    def _score(candidate: "_Weighed", references: Sequence["_Weighed"]) -> float:
        length, weights, norms = candidate
        total = 0.0
        for other_length, other_weights, other_norms in references:
            likeness = 0.0
            for mine, theirs, norm, other_norm in zip(
                weights, other_weights, norms, other_norms, strict=True
            ):
                if norm and other_norm:
                    shared = (
                        min(mine[ngram], theirs[ngram]) * theirs[ngram] for ngram in mine.keys() & theirs
                    )
                    likeness += sum(shared) / (norm * other_norm)
            total += likeness * math.exp(-((length - other_length) ** 2) / (2 * _LENGTH_SIGMA**2))
        return _SCALE * total / (_ORDERS * len(references))


_Weighed = tuple[int, list[dict[tuple[int, ...], float]], list[float]]


def _ngrams(caption: _Caption) -> _Counts:
    counts: _Counts = collections.Counter()
    for order in range(1, _ORDERS + 1):
        counts.update(zip(*(caption[at:] for at in range(order)), strict=False))
    return counts


@torch.no_grad()
def sample_captions(decoder: Decoder, features: ImageFeatures, num_samples: int, max_words: int) -> Tensor:
    """Draws captions from a decoder, as it is: `eval` draws from the model that is searched.

    Args:
        decoder: The decoder to draw from, in its present mode.
        features: N images.
        num_samples: The captions drawn of each image.
        max_words: The most words of a caption, which is ended there.

    Returns:
        (N * num_samples, T + 1) numbers from `START` to `END`, then `PAD`; those of an image one after the other.

    Raises:
        FloatingPointError: The decoder's probabilities are not finite.
    """
    device = features.values.device
    image_index = torch.arange(len(features.values), device=device).repeat_interleave(num_samples)
    features = features.select(image_index)
    state = decoder.init_state(features)
    words = [torch.full((len(image_index),), START, device=device)]
    ended = torch.zeros(len(image_index), dtype=torch.bool, device=device)
    never = torch.tensor([PAD, START, UNKNOWN], device=device)
    for length in range(max_words):
        output, state = decoder.step(words[-1], state, features)
        logits = decoder.logits(output).float()
        logits[:, never] = -math.inf
        if not length:
            # A caption has at least one word.
            logits[:, END] = -math.inf
        probabilities = torch.softmax(logits, dim=-1)
        if not torch.isfinite(probabilities.sum()):
            raise FloatingPointError("the probabilities of the next word are not finite")
        drawn = torch.multinomial(probabilities, 1)[:, 0]
        words.append(torch.where(ended, PAD, drawn))
        ended |= drawn == END
        if ended.all():
            return torch.stack(words, dim=1)
    return torch.stack([*words, torch.where(ended, PAD, END)], dim=1)


def advantages(rewards: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Returns how much better each of (N, K) samples is than the mean of the others of its image."""
    count = rewards.shape[1]
    return (rewards - rewards.mean(axis=1, keepdims=True)) * np.float32(count / (count - 1))
