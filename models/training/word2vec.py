"""Fits word vectors to captions with gensim: streamed, repeatable to the bit, and resumed after a kill.

gensim is driven one epoch at a time, with one worker and a random state that is seeded by the epoch: so an epoch
depends on nothing but the weights before it, and a checkpoint of those is all that a training needs to go on.
"""

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import gensim.models
import numpy as np
import torch

from diptych.models.base import TextOptions
from diptych.models.errors import ModelError
from diptych.models.text.word2vec import Word2Vec, lowercase_words
from diptych.models.text.word_vectors import Vectors
from diptych.models.training.checkpoint import Checkpoint, Checkpoints
from diptych.models.training.data import OnProgress, Progress
from diptych.models.training.options import Word2VecTraining

# Captions that a loss is measured on: the first of each set
_NUM_SCORED = 2000
# Captions between two reports
_REPORTED = 5000
_NUM_PAIRS_AT_ONCE = 16_384
_SAMPLING_POWER = 0.75

ReadCaptions = Callable[[], Iterable[str]]
Ids = np.ndarray[Any, np.dtype[np.int64]]


def train_word2vec(
    captions: ReadCaptions,
    validation: ReadCaptions,
    output: Path,
    options: Word2VecTraining,
    on_progress: OnProgress,
) -> dict[str, Any]:
    """Fits word vectors and writes them to a folder that `Word2Vec.load` takes: those of the best epoch.

    The loss is that of negative sampling (Mikolov et al. 2013, equation 4), the mean over all word-context pairs of the
    first 2,000 captions of a set, without thinning, against negatives drawn once. A checkpoint is kept in
    `output/checkpoint`, which the caller deletes; until then the same call goes on from it, and its result is the same.

    Args:
        captions: Gives the training captions, the same ones in the same order in each call.
        validation: Gives captions to measure by; there may be none, and then the last epoch is the best.
        output: Local folder.
        options: What and how to learn.
        on_progress: Receives the progress: `reading` for the vocabulary, `training` in each epoch (from a thread of
            its own), and `validating` with the epoch's entry of `history` at the end of one.

    Returns:
        `history`, a list of {epoch, alpha, train_loss, validation_loss} (epochs from 1; no loss where there is nothing
        to measure), `best_epoch`, `num_captions`, `num_words` (running), `vocabulary_size`, `digest`.

    Raises:
        ModelError: There are no captions or no words, or the checkpoint there is of another training.
    """
    vocabulary = _count_words(captions, options.min_count, on_progress)
    trainer = _new_trainer(vocabulary, options)
    fingerprint = _fingerprint(vocabulary, options)
    train_loss = _Loss.of(captions, trainer, options)
    validation_loss = _Loss.of(validation, trainer, options)
    checkpoints = Checkpoints(output / "checkpoint")
    run = _resume(checkpoints.latest(), trainer, fingerprint, checkpoints.folder)
    while len(run.history) < options.epochs and not _has_stopped(run, options.patience):
        epoch = len(run.history)
        _train_epoch(trainer, captions, vocabulary, epoch, options, on_progress)
        losses = {
            "train_loss": train_loss.measure(trainer),
            "validation_loss": validation_loss.measure(trainer),
        }
        record: dict[str, float] = {"epoch": epoch + 1, "alpha": _alphas(epoch, options)[0]}
        record.update({name: loss for name, loss in losses.items() if loss is not None})
        run.add(record, trainer.wv.vectors)
        checkpoints.save(epoch + 1, run.tensors(trainer), run.state(fingerprint))
        total = vocabulary.num_captions
        on_progress(Progress("validating", epoch, total, total, losses["train_loss"], record))
    model = Word2Vec(list(trainer.wv.index_to_key), run.best, TextOptions())
    model.save(output)
    return {
        "history": run.history,
        "best_epoch": run.best_epoch,
        "num_captions": vocabulary.num_captions,
        "num_words": vocabulary.num_words,
        "vocabulary_size": len(model.words),
        "digest": model.digest,
    }


class _Vocabulary(NamedTuple):
    counts: dict[str, int]  # the most frequent first
    num_captions: int
    num_words: int


def _count_words(captions: ReadCaptions, min_count: int, on_progress: OnProgress) -> _Vocabulary:
    counter: Counter[str] = Counter()
    num_captions = num_words = 0
    for caption in captions():
        words = lowercase_words(caption)
        counter.update(words)
        num_captions += 1
        num_words += len(words)
        if num_captions % _REPORTED == 0:
            on_progress(Progress("reading", 0, num_captions, 0))
    kept = sorted((-count, word) for word, count in counter.items() if count >= min_count)
    if not num_captions:
        raise ModelError(
            "There are no captions to train on. Expected an input with captions: check it, or the split."
        )
    if len(kept) < 2:
        raise ModelError(
            f"Of {len(counter)} different words in {num_captions} captions, {len(kept)} occur {min_count} times or "
            "more. Expected at least 2: give more captions, or a lower `min_count`."
        )
    return _Vocabulary({word: -count for count, word in kept}, num_captions, num_words)


def _new_trainer(vocabulary: _Vocabulary, options: Word2VecTraining) -> Any:
    trainer = gensim.models.Word2Vec(
        vector_size=options.vector_size,
        window=options.window,
        min_count=1,  # applied already
        sg=int(options.skip_gram),
        hs=0,
        negative=options.negative,
        ns_exponent=_SAMPLING_POWER,
        sample=options.sample,
        alpha=options.alpha,
        min_alpha=options.min_alpha,
        seed=options.seed,
        workers=1,  # several race for the weights
    )
    trainer.build_vocab_from_freq(dict(vocabulary.counts), corpus_count=vocabulary.num_captions)
    return trainer


def _alphas(epoch: int, options: Word2VecTraining) -> tuple[float, float]:
    """Returns the learning rates at the start and the end of an epoch, counted from 0."""
    fall = (options.alpha - options.min_alpha) / options.epochs
    return options.alpha - fall * epoch, options.alpha - fall * (epoch + 1)


def _train_epoch(
    trainer: Any,
    captions: ReadCaptions,
    vocabulary: _Vocabulary,
    epoch: int,
    options: Word2VecTraining,
    on_progress: OnProgress,
) -> None:
    total = vocabulary.num_captions
    corpus = _Corpus(captions, lambda done: on_progress(Progress("training", epoch, done, total)))
    trainer.random = np.random.RandomState((options.seed + epoch) % 2**32)
    start_alpha, end_alpha = _alphas(epoch, options)
    trainer.train(
        corpus,
        total_examples=total,
        total_words=vocabulary.num_words,
        epochs=1,
        start_alpha=start_alpha,
        end_alpha=end_alpha,
    )
    corpus.check()


class _Corpus:
    """Captions as gensim reads them: in a thread of its own, where an exception would leave it waiting for ever."""

    def __init__(self, captions: ReadCaptions, on_caption: Callable[[int], None]) -> None:
        self._captions = captions
        self._on_caption = on_caption
        self._error: BaseException | None = None

    def __iter__(self) -> Iterator[list[str]]:
        try:
            for ordinal, caption in enumerate(self._captions()):
                if ordinal % _REPORTED == 0:
                    self._on_caption(ordinal)
                yield lowercase_words(caption)
        except Exception as error:
            self._error = error

    def check(self) -> None:
        """Raises the error that reading raised, if any."""
        if self._error is not None:
            raise self._error


@dataclasses.dataclass
class _Run:
    """The progress of a training.

    Attributes:
        history: A record for each epoch.
        best: The vectors of the best epoch.
        best_epoch: The number of that epoch, from 1; 0 before the first.
    """

    history: list[dict[str, float]]
    best: Vectors
    best_epoch: int

    def add(self, record: dict[str, float], vectors: Vectors) -> None:
        """Adds an epoch."""
        least = min((before.get("validation_loss", math.inf) for before in self.history), default=math.inf)
        self.history.append(record)
        if record.get("validation_loss", -math.inf) < least:
            self.best, self.best_epoch = vectors.copy(), int(record["epoch"])

    def tensors(self, trainer: Any) -> dict[str, torch.Tensor]:
        """Returns what the next epoch starts from."""
        arrays = {"vectors": trainer.wv.vectors, "output": trainer.syn1neg, "best": self.best}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def state(self, fingerprint: str) -> dict[str, Any]:
        """Returns the rest of it."""
        return {"history": self.history, "best_epoch": self.best_epoch, "fingerprint": fingerprint}


def _resume(checkpoint: Checkpoint | None, trainer: Any, fingerprint: str, folder: Path) -> _Run:
    if checkpoint is None:
        return _Run([], trainer.wv.vectors.copy(), 0)
    if checkpoint.state.get("fingerprint") != fingerprint:
        raise ModelError(
            f"The checkpoint in {folder} is of a training with other options or other captions. Train with those, name "
            "another `output`, or delete it to train from the start."
        )
    trainer.wv.vectors[:] = checkpoint.tensors["vectors"].numpy()
    trainer.syn1neg[:] = checkpoint.tensors["output"].numpy()
    return _Run(
        list(checkpoint.state["history"]),
        checkpoint.tensors["best"].numpy(),
        int(checkpoint.state["best_epoch"]),
    )


def _has_stopped(run: _Run, patience: int) -> bool:
    return bool(patience) and len(run.history) - run.best_epoch >= patience


def _fingerprint(vocabulary: _Vocabulary, options: Word2VecTraining) -> str:
    identity = repr(
        (sorted(dataclasses.asdict(options).items()), list(vocabulary.counts.items()), vocabulary[1:])
    )
    return hashlib.sha256(identity.encode("utf-8", "replace")).hexdigest()[:16]


class _Loss(NamedTuple):
    """The P pairs of words and contexts that the loss is measured on.

    Attributes:
        contexts: (P, C) rows of the words that each is predicted from; skip-gram has one, CBOW up to two windows.
        weights: (P, C) 1 / their number; 0 fills up.
        targets: (P, 1 + negative) rows: the word itself, then the negatives.
    """

    contexts: Ids
    weights: Vectors
    targets: Ids

    @classmethod
    def of(cls, captions: ReadCaptions, trainer: Any, options: Word2VecTraining) -> "_Loss":
        """Collects the pairs of the first captions."""
        rows = trainer.wv.key_to_index
        contexts: list[list[int]] = []
        words: list[int] = []
        for caption in islice(captions(), _NUM_SCORED):
            known = [rows[word] for word in lowercase_words(caption) if word in rows]
            for place, word in enumerate(known):
                around = (
                    known[max(0, place - options.window) : place]
                    + known[place + 1 : place + 1 + options.window]
                )
                pairs = [[other] for other in around] if options.skip_gram else [around] if around else []
                contexts += pairs
                words += [word] * len(pairs)
        sizes = np.fromiter(map(len, contexts), np.int64, len(contexts))
        filled = np.arange(sizes.max(initial=0)) < sizes[:, None]  # (P, C)
        ids = np.zeros(filled.shape, np.int64)
        ids[filled] = [word for context in contexts for word in context]
        counts = np.array(
            [trainer.wv.get_vecattr(word, "count") for word in trainer.wv.index_to_key], np.float64
        )
        share = counts**_SAMPLING_POWER
        draw = np.random.RandomState(options.seed % 2**32)
        negatives = draw.choice(len(share), (len(words), options.negative), p=share / share.sum())
        targets = np.concatenate([np.array(words, np.int64)[:, None], negatives], axis=1)
        return cls(ids, (filled / np.maximum(sizes, 1)[:, None]).astype(np.float32), targets)

    def measure(self, trainer: Any) -> float | None:
        """Returns the mean loss of a pair under the weights of now; None where there is no pair."""
        total = 0.0
        for start in range(0, len(self.targets), _NUM_PAIRS_AT_ONCE):
            part = slice(start, start + _NUM_PAIRS_AT_ONCE)
            inputs = trainer.wv.vectors[self.contexts[part]]  # (p, C, D)
            hidden = np.einsum("pcd,pc->pd", inputs, self.weights[part])
            targets = self.targets[part]  # (p, 1 + K)
            logits = np.einsum("pd,pkd->pk", hidden, trainer.syn1neg[targets]).astype(np.float64)
            losses = np.logaddexp(0, np.concatenate([-logits[:, :1], logits[:, 1:]], axis=1))
            # a negative that is the word itself is passed over, as gensim does
            losses[:, 1:] *= targets[:, 1:] != targets[:, :1]
            total += float(losses.sum())
        return total / len(self.targets) if len(self.targets) else None
