"""Turns captions into vectors: the mean of the vectors of their known words."""

import functools
import hashlib
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from diptych.models.base import TextModel, TextOptions, TextVector
from diptych.models.errors import ModelError, ModelOptionError, one_line
from diptych.models.files.cache import to_local_path
from diptych.models.files.weights import read_config, read_tensors, write_file, write_tensors
from diptych.models.text.word_vectors import Vectors, read_word_vectors

KIND = "word2vec"
WEIGHTS = "vectors.safetensors"
WORDS = "words.json"

_FILES = ("*.kv", "*.model", "*.vec", "*.vec.gz", "*.bin", "*.bin.gz", "*.txt", "*.txt.gz")
_ASCII_WORD = re.compile(r"[A-Za-z0-9]+(?:'[A-Za-z0-9]+)*")
_BATCH_SIZE = 1024


def lowercase_words(text: str) -> list[str]:
    """Returns the words of a text in lower case, split by `split_words`; training and inference share it."""
    return split_words(text, lowercase=True)


def split_words(text: str, lowercase: bool = False) -> list[str]:
    """Splits a text into its words, in their own case or in lower case.

    A word is a run of letters, digits and combining marks, with apostrophes inside it (`don't`). All other characters,
    hyphens and underscores included, separate words. Text is normalised to Unicode NFKC, so that a word is spelt in one
    way. In scripts without spaces (Chinese, Thai) words are long runs, few of which are known: use `bert` for those.
    """
    if text.isascii():
        return _ASCII_WORD.findall(text.lower() if lowercase else text)
    text = unicodedata.normalize("NFKC", text).replace("’", "'")
    return _unicode_word().findall(text.lower() if lowercase else text)


@functools.cache
def _unicode_word() -> re.Pattern[str]:
    # Python's \w does not match combining marks, so it would split Hindi and Arabic words
    marks = "".join(
        _ranges(code for code in range(0x300, sys.maxunicode) if unicodedata.category(chr(code))[0] == "M")
    )
    letter = rf"(?:[^\W_]|[{marks}])"
    return re.compile(rf"{letter}+(?:'{letter}+)*")


def _ranges(codes: Iterator[int]) -> Iterator[str]:
    """Yields ascending codes as the ranges of a character class."""
    start = end = next(codes)
    for code in codes:
        if code != end + 1:
            yield f"{chr(start)}-{chr(end)}"
            start = code
        end = code
    yield f"{chr(start)}-{chr(end)}"


class _Prepared(NamedTuple):
    """Captions as rows of the table of vectors.

    Attributes:
        rows: (N,) the rows of all known words, one caption after the other.
        lengths: (B,) the number of known words of each caption.
    """

    rows: np.ndarray[Any, np.dtype[np.int64]]
    lengths: np.ndarray[Any, np.dtype[np.int64]]


class Word2Vec(TextModel):
    """The mean of the vectors of a caption's words.

    A folder of this kind holds `config.json`, `words.json` (a list) and `vectors.safetensors` (`vectors`).

    Attributes:
        words: The vocabulary, V words.
        vectors: (V, D) float32.
        options: The user's options.
    """

    def __init__(self, words: Sequence[str], vectors: Vectors, options: TextOptions | None = None) -> None:
        """Makes the model.

        Args:
            words: V different words.
            vectors: (V, D) float32, all finite.
            options: The user's options; pooling may only be `mean`.

        Raises:
            ModelOptionError: The pooling is another.
        """
        self.options = options or TextOptions()
        if self.options.pooling not in (None, "mean"):
            raise ModelOptionError(
                f"`pooling` {self.options.pooling} does not go with word2vec, which has no such token. Expected mean, "
                "or a model of kind bert."
            )
        self.words = list(words)
        self.vectors = vectors
        self.dim = int(vectors.shape[1])
        self.batch_size = _BATCH_SIZE
        # A digest of the content rather than of files: the same vectors in another format are the same model
        content = hashlib.sha256("\0".join(self.words).encode("utf-8", "replace"))
        content.update(np.ascontiguousarray(vectors).data)
        content.update(f"{vectors.shape} mean normalize={self.options.normalize}".encode())
        self.digest = content.hexdigest()[:16]
        self._rows = {word: row for row, word in reversed(list(enumerate(self.words)))}
        self._has_capitals = any(word != word.lower() for word in self.words)

    @classmethod
    def load(cls, location: str, options: TextOptions) -> "Word2Vec":
        """Loads a folder of `diptych train word2vec`, or a file of gensim's or word2vec's, from anywhere.

        Args:
            location: Path or fsspec URL: a folder of ours, a file (`diptych.models.text.word_vectors`), or a folder
                with one such.
            options: The user's options.

        Raises:
            ModelError: There is no such model, or it is damaged or of another kind.
        """
        path = to_local_path(location)
        if path.is_dir() and not (path / "config.json").exists():
            path = _only_file(path)
        if path.is_file():
            return cls(*read_word_vectors(path), options)
        read_config(path, (KIND,))
        return cls(*_read_own(path), options)

    def save(self, folder: Path) -> None:
        """Writes the model as a folder, `config.json` last: a folder that has it is complete.

        Raises:
            ModelError: It cannot be written.
        """
        config = {"kind": KIND, "dim": self.dim, "num_words": len(self.words)}
        write_tensors(folder / WEIGHTS, {"vectors": torch.from_numpy(self.vectors)})
        write_file(
            folder / WORDS, json.dumps(self.words, ensure_ascii=False, indent=0).encode("utf-8", "replace")
        )
        write_file(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())

    def prepare(self, inputs: Sequence[str]) -> _Prepared:
        """Looks up the words of captions."""
        row_of: Callable[[str], int | None] = self._find if self._has_capitals else self._rows.get
        split = split_words if self._has_capitals else lowercase_words
        captions = [[row for row in map(row_of, split(text)) if row is not None] for text in inputs]
        lengths = np.fromiter(map(len, captions), np.int64, len(captions))
        rows = np.fromiter((row for caption in captions for row in caption), np.int64, int(lengths.sum()))
        return _Prepared(rows, lengths)

    def _find(self, word: str) -> int | None:
        """Returns the row of a word as written, else in lower case: the vectors may be of text with capitals."""
        row = self._rows.get(word)
        return self._rows.get(word.lower()) if row is None else row

    def predict(self, prepared: _Prepared) -> list[TextVector]:
        """Returns the mean vector of each caption."""
        rows, lengths = prepared
        means = np.zeros((len(lengths), self.dim), np.float32)  # (B, D)
        known = lengths > 0
        if known.any():
            starts = (np.cumsum(lengths) - lengths)[known]
            means[known] = np.add.reduceat(self.vectors[rows], starts, axis=0)  # (N, D) -> (known, D)
            means[known] /= lengths[known, None]
        if self.options.normalize:
            norms = np.linalg.norm(means, axis=1, keepdims=True)  # (B, 1)
            np.divide(means, norms, out=means, where=norms > 0)
        return list(map(TextVector, means, known.tolist()))


def _only_file(folder: Path) -> Path:
    files = sorted(
        {file for pattern in _FILES for file in folder.glob(pattern) if not file.name.startswith(".")}
    )
    if len(files) != 1:
        content = "none"
        if files:
            content = f"several files of word vectors ({', '.join(file.name for file in files[:3])})"
        raise ModelError(
            f"{folder} should hold word vectors: expected a folder of `diptych train word2vec`, with its config.json, "
            f"or one file of gensim's or word2vec's; there are {content}. Name the file itself."
        )
    return files[0]


def _read_own(folder: Path) -> tuple[list[str], Vectors]:
    tensors = read_tensors(folder / WEIGHTS)
    try:
        words = json.loads((folder / WORDS).read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder / WORDS} cannot be read: {one_line(error)}. Fetch or train the model again."
        ) from error
    vectors = tensors.get("vectors")
    is_list = isinstance(words, list) and all(isinstance(word, str) for word in words)
    if set(tensors) != {"vectors"} or vectors is None or vectors.dim() != 2 or not is_list or not words:
        raise ModelError(
            f"{folder} is damaged: expected a list of words in {WORDS} and one matrix `vectors` in {WEIGHTS}. Fetch or "
            "train it again."
        )
    if len(words) != len(vectors) or len(set(words)) != len(words):
        raise ModelError(
            f"{folder}: the vocabulary does not fit, {len(set(words))} different words in {WORDS} and {len(vectors)} "
            f"vectors in {WEIGHTS}. Both must be of one training: fetch or train it again."
        )
    if not torch.isfinite(vectors).all():
        raise ModelError(f"{folder / WEIGHTS} holds vectors that are not finite. Train again.")
    return words, vectors.float().numpy()
