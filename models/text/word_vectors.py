"""Reads word vectors that others wrote: gensim's own saves, and word2vec's text and binary formats.

gensim saves are pickles. An unpickler reads them that knows a fixed list of names and replaces each by a plain
container of this module. No code of gensim, NumPy or anyone else runs, whatever a file contains.
"""

import codecs
import gzip
import io
import os
import pickle
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diptych.models.errors import ModelError, one_line

Vectors = np.ndarray[Any, np.dtype[np.float32]]

_GZIP_MAGIC = b"\x1f\x8b"
_PICKLE_MAGIC = b"\x80"
_FASTTEXT_MAGIC = (793712314).to_bytes(4, "little")
_BLANKS = b" \t\r\n"
_LONGEST_LINE_BYTES = 1 << 20
_NUMBERS = ("f2", "f4", "f8")
_FORMATS = (
    "a gensim save (KeyedVectors, Word2Vec or FastText), word2vec's text or binary format, plain or .gz, or fastText's "
    ".bin or .vec"
)


class WordVectors(NamedTuple):
    """Words and their vectors.

    Attributes:
        words: V different words.
        vectors: (V, D) float32.
    """

    words: list[str]
    vectors: Vectors


def read_word_vectors(path: Path) -> WordVectors:
    """Reads the word vectors of a file, whose format is detected from its content.

    A gensim save may have `.npy` files beside it, as gensim names them. Text may lack the header line, as GloVe's does.

    Raises:
        ModelError: The file is of another format, damaged, or a pickle of anything but word vectors.
    """
    try:
        with _open(path) as file:
            magic = file.peek(1)[:1]
            first = file.readline(_LONGEST_LINE_BYTES)
            second = file.readline(_LONGEST_LINE_BYTES)
        if first.startswith(_FASTTEXT_MAGIC):
            vectors = _read_fasttext(path)
        elif magic == _PICKLE_MAGIC:
            vectors = _read_gensim(path)
        else:
            vectors = _read_word2vec(path, first.removeprefix(codecs.BOM_UTF8), second)
    except ModelError:
        raise
    except (MemoryError, EOFError, ValueError, OSError, zlib.error) as error:
        raise ModelError(
            f"{path} cannot be read: {one_line(error)}. Expected {_FORMATS}: fetch it again."
        ) from error
    _check(path, *vectors)
    return vectors


def _check(path: Path, words: list[str], vectors: Vectors) -> None:
    """Raises `ModelError` unless there is a finite vector for each word."""
    if vectors.ndim != 2 or not vectors.size or len(words) != len(vectors):
        raise ModelError(
            f"{path} is damaged: {len(words)} words, but vectors of shape {vectors.shape}. Fetch it again."
        )
    is_finite = np.isfinite(vectors).all(axis=1)
    if not is_finite.all():
        word = words[int(np.argmin(is_finite))]
        raise ModelError(f"{path}: the vector of {word!r} is not finite. Train again, or leave the word out.")


def _open(path: Path) -> Any:
    with open(path, "rb") as file:
        is_gzip = file.read(2) == _GZIP_MAGIC
    return io.BufferedReader(gzip.open(path)) if is_gzip else open(path, "rb")


def _read_fasttext(path: Path) -> WordVectors:
    """Reads the word vectors of fastText's own format, without those of parts of words."""
    from gensim.models.fasttext import load_facebook_vectors

    try:
        keyed_vectors = load_facebook_vectors(str(path))
    except Exception as error:  # gensim raises what a damaged file leads to
        raise ModelError(
            f"{path} is damaged: {one_line(error)}. Expected {_FORMATS}: fetch it again."
        ) from error
    return WordVectors(
        list(keyed_vectors.index_to_key), np.ascontiguousarray(keyed_vectors.vectors, np.float32)
    )


def _read_word2vec(path: Path, first: bytes, second: bytes) -> WordVectors:
    header = first.split()
    has_header = len(header) == 2 and all(part.isdigit() for part in header)
    dim = int(header[1]) if has_header else len(first.split()) - 1
    if _is_text_row(second if has_header else first, dim):
        return _read_text(path, int(header[0]) if has_header else None, dim)
    if not has_header:
        raise ModelError(f"{path} holds no word vectors. Expected {_FORMATS}.")
    from gensim.models import KeyedVectors

    keyed_vectors = KeyedVectors.load_word2vec_format(str(path), binary=True, unicode_errors="replace")
    # gensim keeps the first vector of a repeated word, and leaves a row without a word at the end for each repetition
    words = [word for word in keyed_vectors.index_to_key if word is not None]
    return WordVectors(words, np.ascontiguousarray(keyed_vectors.vectors[: len(words)], np.float32))


def _is_text_row(line: bytes, dim: int) -> bool:
    """Tells whether a line is a word and its numbers, rather than the start of binary vectors."""
    try:
        _, *numbers = line.rstrip(_BLANKS).rsplit(None, dim)
        return len([float(number) for number in numbers]) == dim > 0
    except ValueError:
        return False


def _read_text(path: Path, count: int | None, dim: int) -> WordVectors:
    """Reads text with a word and its numbers on each line; gensim would not notice a line with too few numbers.

    The first vector of a repeated word counts, as in gensim. Words may contain blanks.
    """
    vectors: dict[str, Vectors] = {}
    num_lines = 0
    with _open(path) as file:
        if count is not None:
            file.readline()
        for line in file:
            if not line.strip(_BLANKS):
                continue
            num_lines += 1
            line = line.removeprefix(codecs.BOM_UTF8) if num_lines == 1 else line
            word, *numbers = line.rstrip(_BLANKS).rsplit(None, dim)
            if len(numbers) != dim:
                raise ValueError(f"vector {num_lines} has {len(numbers)} numbers, not {dim}")
            vectors.setdefault(word.decode("utf-8", "replace"), np.array(numbers, np.float32))
    if count is not None and num_lines < count:
        raise EOFError(f"it ends after {num_lines} words of {count}")
    return WordVectors(list(vectors), np.stack(list(vectors.values())))


def _read_gensim(path: Path) -> WordVectors:
    with _open(path) as file:
        is_gzip = not isinstance(file.raw, io.FileIO)
        try:
            state = _Unpickler(file).load()
        except ModelError as error:
            raise ModelError(
                f"{path} is a pickle that is not a plain save of gensim's word vectors: {error}. It was not loaded. "
                "Where you trust it, save its vectors from gensim: model.wv.save_word2vec_format('vectors.bin', "
                "binary=True)."
            ) from error
        except Exception as error:  # a damaged pickle may raise anything that its containers raise
            raise ModelError(f"{path} is damaged: {one_line(error)}. Expected {_FORMATS}.") from error
    prefix = str(path)
    fields = _fields(state)
    if "wv" in fields:
        fields, prefix = _fields(fields["wv"]), f"{prefix}.wv"
    words = next(
        (fields[name] for name in ("index_to_key", "index2word", "index2entity") if name in fields), None
    )

    def read_array(name: str) -> Any:
        if name in (fields.get("__numpys") or ()):
            return _read_numpy(f"{prefix}.{name}", is_gzip)
        return fields[name].values if isinstance(fields.get(name), _Array) else None

    arrays = (read_array(name) for name in ("vectors", "syn0"))
    vectors = next((values for values in arrays if values is not None), None)
    if vectors is None and isinstance(words, list):
        vectors = _subword_vectors(words, read_array("vectors_vocab"), read_array("vectors_ngrams"), fields)
    if not isinstance(words, list) or vectors is None:
        raise ModelError(f"{path} is a save of gensim's, but holds no word vectors. Expected {_FORMATS}.")
    return WordVectors([str(word) for word in words], np.ascontiguousarray(vectors, np.float32))


def _subword_vectors(words: list[Any], vocab: Any, ngrams: Any, fields: dict[Any, Any]) -> Any:
    """Returns the word vectors of a FastText save, which holds the vectors of their parts; None where it does not.

    A word's vector is the mean of its own and those of its character n-grams (Bojanowski et al. 2017), as gensim
    computes it at loading.
    """
    shape = [fields.get(name) for name in ("min_n", "max_n", "bucket")]
    if (
        vocab is None
        or ngrams is None
        or len(vocab) != len(words)
        or not all(isinstance(n, int) for n in shape)
    ):
        return None
    from gensim.models.fasttext import ft_ngram_hashes

    vectors = np.array(vocab, np.float32)
    for row, word in enumerate(words):
        hashes = ft_ngram_hashes(str(word), *shape)
        if hashes:
            vectors[row] = (vectors[row] + ngrams[hashes].sum(axis=0)) / (len(hashes) + 1)
    return vectors


def _read_numpy(path: str, is_gzip: bool) -> Any:
    """Reads an array that gensim saved in a file of its own."""
    name = path + (".npz" if is_gzip else ".npy")
    if not os.path.exists(name):
        raise ModelError(
            f"{name} is not there. gensim saved the vectors in it: keep it beside the other file."
        )
    content = np.load(name, allow_pickle=False)
    if not is_gzip:
        return content
    with content:
        return content["val"]


def _fields(state: Any) -> dict[Any, Any]:
    return state.fields if isinstance(state, _Object) else {}


class _Object(dict):  # type: ignore[type-arg]
    """Stands for any object or class of a save: accepts any state and call, and keeps fields only."""

    fields: dict[Any, Any]

    def __new__(cls, *args: Any) -> "_Object":
        instance = super().__new__(cls)
        instance.fields = {}
        return instance

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.fields = state


class _Dtype:
    """Stands for `numpy.dtype`."""

    def __init__(self, code: Any = "", *args: Any) -> None:
        self.code, self.order = str(code), "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1] if isinstance(state, tuple) and state[1:2] in {("<",), (">",)} else "="


class _Array:
    """Stands for `numpy.ndarray`: arrays of numbers are built from their bytes, others stay empty."""

    values: Any = None

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.fill(data, dtype, shape, "F" if fortran else "C")

    def fill(self, data: Any, dtype: Any, shape: Any, order: str) -> None:
        """Sets the values where they are numbers."""
        if isinstance(dtype, _Dtype) and dtype.code in _NUMBERS and isinstance(data, bytes | bytearray):
            flat = np.frombuffer(data, dtype.order + dtype.code)
            self.values = flat.reshape(shape, order=order)  # type: ignore[call-overload]


class _Buffer:
    """Stands for NumPy's `_frombuffer`, by which newer protocols make arrays."""

    def __new__(cls, data: Any, dtype: Any, shape: Any, order: str, *args: Any) -> _Array:  # type: ignore[misc]
        array = _Array()
        array.fill(data, dtype, shape, order)
        return array


class _Latin1:
    """Stands for `_codecs.encode`, in which old protocols wrap bytes."""

    def __new__(cls, text: str, encoding: str = "latin1") -> bytes:  # type: ignore[misc]
        return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Reads gensim saves; raises `ModelError` at the first name that is not in the list."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns the container that stands for a class or function."""
        container = _NAMES.get((module.replace("numpy.core.", "numpy._core."), name))
        if container is None and (module == "numpy.random" or module.startswith("numpy.random.")):
            container = _Object
        if container is None:
            raise ModelError(f"it names {module}.{name}")
        return container


_GENSIM = {
    "gensim.models.keyedvectors": (
        "KeyedVectors", "Word2VecKeyedVectors", "EuclideanKeyedVectors", "BaseKeyedVectors",
        "WordEmbeddingsKeyedVectors", "FastTextKeyedVectors", "Vocab", "CompatVocab", "SimpleVocab",
    ),
    "gensim.models.fasttext": ("FastText", "FastTextKeyedVectors", "FastTextVocab", "FastTextTrainables"),
    "gensim.models.word2vec": ("Word2Vec", "Word2VecVocab", "Word2VecTrainables", "Vocab"),
    "gensim.utils": ("call_on_class_only",),
    "builtins": ("int", "hash", "object", "set", "frozenset"),
    "__builtin__": ("int", "long", "hash", "object", "set", "frozenset"),
    "collections": ("defaultdict", "OrderedDict", "Counter"),
    "copyreg": ("_reconstructor",),
    "copy_reg": ("_reconstructor",),
    "numpy._core.multiarray": ("scalar",),
}  # fmt: skip
_NAMES: dict[tuple[str, str], type] = {
    **{(module, name): _Object for module, names in _GENSIM.items() for name in names},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.numeric", "_frombuffer"): _Buffer,
    ("_codecs", "encode"): _Latin1,
}
