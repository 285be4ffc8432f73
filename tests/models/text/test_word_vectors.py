import gzip
import os
import pickle
import shutil

import numpy as np
import pytest
from gensim.models import FastText, KeyedVectors
from gensim.models import Word2Vec as Trainer
from gensim.models.fasttext import save_facebook_model

from diptych.models.errors import ModelError
from diptych.models.text.word_vectors import read_word_vectors

SENTENCES = [["a", "red", "dog"], ["a", "naïve", "cat"], ["犬", "a"]] * 20


@pytest.fixture(scope="module")
def trainer():
    return Trainer(SENTENCES, vector_size=7, min_count=1, workers=1, seed=1)


def assert_equal(path, vectors, atol=0.0):
    words, found = read_word_vectors(path)
    assert words == vectors.index_to_key
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, vectors.vectors, rtol=0, atol=atol)


@pytest.mark.parametrize("limit", [10 << 20, 1], ids=["one file", "arrays beside"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_gensims_own_saves(tmp_path, trainer, limit, protocol):
    trainer.wv.save(str(tmp_path / "w.kv"), sep_limit=limit, pickle_protocol=protocol)
    trainer.save(str(tmp_path / "w.model"), sep_limit=limit, pickle_protocol=protocol)
    assert (tmp_path / "w.model.wv.vectors.npy").exists() == (limit == 1)
    assert_equal(tmp_path / "w.kv", trainer.wv)
    assert_equal(tmp_path / "w.model", trainer.wv)


@pytest.mark.parametrize("options", [{"hs": 1, "negative": 0}, {"sg": 1}, {"max_vocab_size": 100}])
def test_saves_of_other_trainings(tmp_path, options):
    trainer = Trainer(SENTENCES, vector_size=7, min_count=1, workers=1, **options)
    trainer.save(str(tmp_path / "w.model"))
    assert_equal(tmp_path / "w.model", trainer.wv)


def test_a_packed_save(tmp_path, trainer):
    for limit in (10 << 20, 1):
        trainer.wv.save(str(tmp_path / "w.kv.gz"), sep_limit=limit)
        assert_equal(tmp_path / "w.kv.gz", trainer.wv)


def test_an_array_that_is_not_beside(tmp_path, trainer):
    trainer.wv.save(str(tmp_path / "w.kv"), sep_limit=1)
    (tmp_path / "w.kv.vectors.npy").unlink()
    with pytest.raises(ModelError, match=r"w\.kv\.vectors\.npy is not there"):
        read_word_vectors(tmp_path / "w.kv")


def test_an_array_beside_that_is_a_pickle_is_not_loaded(tmp_path, trainer):
    trainer.wv.save(str(tmp_path / "w.kv"), sep_limit=1)
    np.save(tmp_path / "w.kv.vectors.npy", np.array([Trap(tmp_path / "sprung")]), allow_pickle=True)
    with pytest.raises(ModelError, match="cannot be read"):
        read_word_vectors(tmp_path / "w.kv")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_word2vecs_formats(tmp_path, trainer, binary, packed):
    path = tmp_path / f"w.vec{packed}"
    trainer.wv.save_word2vec_format(str(path), binary=binary)
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == bool(packed)
    assert_equal(path, trainer.wv, atol=1e-7)


def test_binary_vectors_that_look_like_text(tmp_path):
    vectors = KeyedVectors(4)
    vectors.add_vectors(["one", "two"], np.frombuffer(b" 1 two 3 four 5\n" * 2, np.float32)[:8].reshape(2, 4))
    vectors.save_word2vec_format(str(tmp_path / "w.bin"), binary=True)
    assert_equal(tmp_path / "w.bin", vectors)


@pytest.mark.parametrize("others", [[b"dog", b"a"], [b"a", b"a"], [b"\xff", b"\xfe"]])
def test_repeated_and_broken_words_in_binary(tmp_path, others):
    """Words that cannot be decoded become the same word."""
    rows = np.arange(16, dtype=np.float32).reshape(4, 4)
    lines = (word + b" " + row.tobytes() for word, row in zip([b"a", b"dog", *others], rows, strict=True))
    (tmp_path / "w.bin").write_bytes(b"4 4\n" + b"\n".join(lines))
    words, vectors = read_word_vectors(tmp_path / "w.bin")
    assert words == ["a", "dog", *(["\ufffd"] if others[0] == b"\xff" else [])]
    np.testing.assert_array_equal(vectors, rows[: len(words)])


def test_text_without_a_header(tmp_path):
    (tmp_path / "glove.txt").write_text("the 0.5 1 -2e-3\ndog 1 2 3\n")
    words, vectors = read_word_vectors(tmp_path / "glove.txt")
    assert words == ["the", "dog"]
    np.testing.assert_array_equal(vectors, np.array([[0.5, 1, -2e-3], [1, 2, 3]], np.float32))


@pytest.mark.parametrize("binary", [False, True])
def test_a_file_that_is_cut_short(tmp_path, trainer, binary):
    path = tmp_path / "w.bin"
    trainer.wv.save_word2vec_format(str(path), binary=binary)
    whole = path.read_bytes()
    for size in (len(whole) - 20, len(whole) // 2, 8):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"w\.bin"):
            read_word_vectors(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello\n",
        b"3 x\n",
        b"\x00\x01\x02",
        b"PK\x03\x04 a zip",
        b"0 3\n",
        b"2 2\na 1 2\nb 3\n",
        b"2 2\na 1 2\nb 3 x\n",
        b"3 2\na 1 2\nb 3 4\n",
        b"9 9\n",
        b"1 2\nword nan 1\n",
        b"1 2\nword 1 inf\n",
        gzip.compress(b"99 2\n" + b"".join(b"w%d 1 2\n" % i for i in range(99)))[:-9],
    ],
)
def test_other_files(tmp_path, content):
    path = tmp_path / "w.txt"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"w\.txt"):
        read_word_vectors(path)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_hostile_pickle_runs_nothing(tmp_path, protocol):
    sprung = tmp_path / "sprung"
    (tmp_path / "w.kv").write_bytes(pickle.dumps({"vectors": Trap(sprung)}, protocol))
    with pytest.raises(ModelError, match=r"names \w+\.mkdir.*It was not loaded.*save_word2vec_format"):
        read_word_vectors(tmp_path / "w.kv")
    assert not sprung.exists()
    pickle.loads((tmp_path / "w.kv").read_bytes())
    assert sprung.exists(), "the trap works"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"), ("posix", "system"), ("subprocess", "Popen"), ("builtins", "eval"), ("builtins", "exec"),
        ("builtins", "getattr"), ("builtins", "__import__"), ("gensim.utils", "unpickle"), ("numpy", "load"),
        ("gensim.models.keyedvectors", "KeyedVectors.load"), ("gensim.models.word2vec", "Word2Vec.load"),
        ("gensim.models.keyedvectors", "pickle.loads"), ("diptych.models.text.word_vectors", "_open"),
        ("numpyXrandom", "x"),
        ("numpy.randomevil", "x"), ("numpy.core.os", "system"), ("numpy._core.multiarray", "os.system"),
    ],
)  # fmt: skip
def test_names_that_are_not_in_a_save(tmp_path, module, name):
    for call in (f"c{module}\n{name}\n(S'x'\ntR.", f"c{module}\n{name}\n."):
        (tmp_path / "w.kv").write_bytes(b"\x80\x04" + call.encode())
        with pytest.raises(ModelError, match="not a plain save"):
            read_word_vectors(tmp_path / "w.kv")


def test_names_of_a_save_are_containers_of_our_own(tmp_path):
    for module, name in [("builtins", "hash"), ("numpy", "ndarray"), ("numpy.random", "seed")]:
        (tmp_path / "w.kv").write_bytes(f"\x80\x04c{module}\n{name}\n(S'x'\ntR.".encode("latin1"))
        with pytest.raises(ModelError, match="holds no word vectors"):
            read_word_vectors(tmp_path / "w.kv")


def test_states_that_lie(tmp_path, trainer):
    trainer.wv.save(str(tmp_path / "w.kv"))
    whole = (tmp_path / "w.kv").read_bytes()
    for size in range(0, len(whole) - 1, 37):
        (tmp_path / "w.kv").write_bytes(whole[:size])
        with pytest.raises(ModelError):
            read_word_vectors(tmp_path / "w.kv")


@pytest.mark.parametrize("state", [None, 7, [], {"a": 1}, ({"index_to_key": ["a"]}, {"x": 1})])
def test_pickles_of_other_things(tmp_path, state):
    (tmp_path / "w.kv").write_bytes(pickle.dumps(state))
    with pytest.raises(ModelError, match="holds no word vectors"):
        read_word_vectors(tmp_path / "w.kv")


@pytest.mark.parametrize("name", ["ft.model", "ft.kv", "ft.bin", "ft.vec"])
def test_fasttext(tmp_path, name):
    trainer = FastText(SENTENCES, vector_size=7, min_count=1, workers=1, bucket=500)
    trainer.save(str(tmp_path / "ft.model"))
    trainer.wv.save(str(tmp_path / "ft.kv"))
    save_facebook_model(trainer, str(tmp_path / "ft.bin"))
    trainer.wv.save_word2vec_format(str(tmp_path / "ft.vec"))
    words, vectors = read_word_vectors(tmp_path / name)
    assert words == trainer.wv.index_to_key
    np.testing.assert_allclose(vectors, trainer.wv.vectors, atol=1e-5)


def test_a_damaged_fasttext_file_is_an_error(tmp_path):
    trainer = FastText(SENTENCES, vector_size=7, min_count=1, workers=1, bucket=500)
    save_facebook_model(trainer, str(tmp_path / "ft.bin"))
    data = (tmp_path / "ft.bin").read_bytes()
    for size in (4, 20, 200, len(data) // 2):
        (tmp_path / "cut.bin").write_bytes(data[:size])
        with pytest.raises(ModelError, match="fetch it again"):
            read_word_vectors(tmp_path / "cut.bin")


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf2 2\ndog 1 2\nnew york 3 4\n",
        b"2 2\r\ndog 1 2\r\nnew york 3 4\r\n",
        b"2\t2\ndog\t1\t2\nnew york\t3\t4\n",
        b"2 2 \ndog 1 2 \nnew york 3 4 \n",
        b"dog 1 2\nnew york 3 4\n",
        b"\xef\xbb\xbfdog 1 2\nnew york 3 4\n",
        b"3 2\ndog 1 2\ndog 9 9\nnew york 3 4\n",
        b"1 2\ndog 1 2\nnew york 3 4\n",
        b"2 2\ndog 1.0 2e0\n\nnew york 3 4",
        b"dog  1  2\nnew york  3 4\n",
    ],
)
def test_text_of_every_form(tmp_path, text):
    (tmp_path / "w.txt").write_bytes(text)
    words, vectors = read_word_vectors(tmp_path / "w.txt")
    assert words == ["dog", "new york"]
    assert vectors.tolist() == [[1, 2], [3, 4]]
    with gzip.open(tmp_path / "w.txt.gz", "wb") as file:
        file.write(text)
    assert read_word_vectors(tmp_path / "w.txt.gz").words == words


def test_words_that_are_not_utf8_are_kept_apart_from_others(tmp_path):
    (tmp_path / "w.txt").write_bytes(b"3 1\ncaf\xe9 1\n\xc2\xa0 2\ndog 3\n")
    assert read_word_vectors(tmp_path / "w.txt").words == ["caf\ufffd", "\xa0", "dog"]


def test_gone(tmp_path):
    shutil.rmtree(tmp_path)
    with pytest.raises(ModelError, match="cannot be read"):
        read_word_vectors(tmp_path / "w.kv")
