import json
import threading

import fsspec
import numpy as np
import pytest
import torch
from gensim.models import KeyedVectors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from diptych.models.base import TextOptions
from diptych.models.errors import ModelError
from diptych.models.files.weights import write_tensors
from diptych.models.spec import ModelSpec, load_model
from diptych.models.text.word2vec import Word2Vec, lowercase_words

WORDS = ["dog", "red", "don't", "犬", "zero"]
VECTORS = np.array([[3, 4], [1, 0], [0, 2], [-3, -4], [0, 0]], np.float32)


def vectors_of(model, captions):
    return model.predict(model.prepare(captions))


def test_words_with_capitals_are_tried_as_they_are_and_then_in_lower_case():
    vectors = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    model = Word2Vec(["Paris", "paris", "dog"], vectors)
    for text, row in (("Paris", 0), ("PARIS", 1), ("paris", 1), ("Dog", 2), ("DOG!", 2)):
        [vector] = model.predict(model.prepare([text]))
        assert vector.values.tolist() == vectors[row].tolist(), text
    [vector] = model.predict(model.prepare(["LONDON"]))
    assert not vector.known


class TestTokenize:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("A red dog .", ["a", "red", "dog"]),
            ("black-and-white, x_y; 3.5", ["black", "and", "white", "x", "y", "3", "5"]),
            ("Don't! the dogs' 'quoted'", ["don't", "the", "dogs", "quoted"]),
            ("don’t", ["don't"]),
            ("Café CAFÉ cafe\u0301", ["café"] * 3),
            ("हिन्दी, العَرَبِيَّة", ["हिन्दी", "العَرَبِيَّة"]),
            ("ＦＵＬＬ", ["full"]),
            ("🐕 犬と猫\u3000鳥", ["犬と猫", "鳥"]),
            (" \t\n", []),
            ("", []),
        ],
    )
    def test_words(self, text, words):
        assert lowercase_words(text) == words

    @given(st.text(st.characters(max_codepoint=127)))
    def test_ascii_takes_no_other_way(self, text):
        assert lowercase_words(text) == lowercase_words(text + " é")[:-1]

    @given(st.text())
    def test_a_word_is_its_own_only_word(self, text):
        for word in lowercase_words(text):
            assert lowercase_words(word) == [word]


class TestPredict:
    def test_the_mean_of_the_known_words(self):
        known, twice = vectors_of(Word2Vec(WORDS, VECTORS), ["A RED, red dog!", "犬 Don’t"])
        np.testing.assert_allclose(known.values, [5 / 3, 4 / 3], rtol=1e-6)
        np.testing.assert_allclose(twice.values, [-1.5, -1])
        assert known.values.dtype == np.float32
        assert known.known is True

    @pytest.mark.parametrize("normalize", [False, True])
    def test_no_known_word_is_zero_and_flagged(self, normalize):
        model = Word2Vec(WORDS, VECTORS, TextOptions(normalize=normalize))
        captions = ["", "unknown words", "dog", "…", "dog 犬", "zero"]
        found = vectors_of(model, captions)
        assert [vector.known for vector in found] == [False, False, True, False, True, True]
        for caption, vector in zip(captions, found, strict=True):
            assert (vector.values == 0).all() == (caption != "dog")
            assert np.isfinite(vector.values).all()

    def test_only_unknown_and_none(self):
        model = Word2Vec(WORDS, VECTORS)
        assert [vector.known for vector in vectors_of(model, ["x", "y"])] == [False, False]
        assert vectors_of(model, []) == []

    def test_length_one_on_request(self):
        (found,) = vectors_of(Word2Vec(WORDS, VECTORS, TextOptions(normalize=True)), ["dog"])
        np.testing.assert_allclose(found.values, [0.6, 0.8], rtol=1e-6)

    def test_a_row_does_not_depend_on_those_beside_it(self):
        draw = np.random.default_rng(0)
        words = [f"w{i}" for i in range(50)]
        model = Word2Vec(words, draw.random((50, 30), np.float32))
        captions = [" ".join(draw.choice([*words, "x"], draw.integers(0, 9))) for _ in range(200)]
        together = vectors_of(model, captions)
        for caption, vector in zip(captions, together, strict=True):
            (alone,) = vectors_of(model, [caption])
            np.testing.assert_array_equal(alone.values, vector.values)
            assert alone.known == vector.known

    def test_from_many_threads(self):
        model, found = Word2Vec(WORDS, VECTORS), []
        threads = [
            threading.Thread(target=lambda: found.append(model.prepare(["naïve red dog"] * 500)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        assert all(prepared.rows.tolist() == [1, 0] * 500 for prepared in found)


class TestStore:
    def test_a_folder_comes_back(self, tmp_path):
        model = Word2Vec(WORDS, VECTORS)
        model.save(tmp_path / "m")
        found = Word2Vec.load(str(tmp_path / "m"), TextOptions())
        assert (found.words, found.dim, found.digest) == (WORDS, 2, model.digest)
        np.testing.assert_array_equal(found.vectors, VECTORS)
        assert {path.name for path in (tmp_path / "m").iterdir()} == {
            "config.json", "words.json", "vectors.safetensors",
        }  # fmt: skip

    def test_gensim_opens_a_folder_in_two_lines(self, tmp_path):
        Word2Vec(WORDS, VECTORS).save(tmp_path)
        opened = KeyedVectors(2)
        opened.add_vectors(
            json.loads((tmp_path / "words.json").read_text(encoding="utf-8")),
            load_file(tmp_path / "vectors.safetensors")["vectors"],
        )
        np.testing.assert_array_equal(opened["犬"], VECTORS[3])

    def test_the_digest_is_of_content_and_options(self, tmp_path):
        vectors = KeyedVectors(2)
        vectors.add_vectors(WORDS, VECTORS)
        vectors.save(str(tmp_path / "w.kv"))
        ours = Word2Vec(WORDS, VECTORS)
        assert Word2Vec.load(str(tmp_path / "w.kv"), TextOptions()).digest == ours.digest
        others = [
            Word2Vec(WORDS, VECTORS, TextOptions(normalize=True)),
            Word2Vec(WORDS, VECTORS + 1),
            Word2Vec([*WORDS[:-1], "nil"], VECTORS),
            Word2Vec(WORDS[:4], VECTORS[:4]),
        ]
        assert len({model.digest for model in [ours, *others]}) == 5

    def test_a_folder_with_one_file_of_others(self, tmp_path):
        vectors = KeyedVectors(2)
        vectors.add_vectors(WORDS, VECTORS)
        vectors.save(str(tmp_path / "w.kv"), sep_limit=1)
        assert Word2Vec.load(str(tmp_path), TextOptions()).words == WORDS
        vectors.save_word2vec_format(str(tmp_path / "w.txt"))
        with pytest.raises(ModelError, match=r"several.*w\.kv, w\.txt"):
            Word2Vec.load(str(tmp_path), TextOptions())

    def test_by_url(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "cache"))
        Word2Vec(WORDS, VECTORS).save(tmp_path / "m")
        fsspec.filesystem("memory").put(str(tmp_path / "m"), "/w2v", recursive=True)
        spec = ModelSpec("word2vec", "memory://w2v", TextOptions())
        model = load_model(spec)
        assert load_model(spec) is model
        assert model.digest == Word2Vec(WORDS, VECTORS).digest
        fsspec.filesystem("memory").rm("/w2v", recursive=True)


class TestErrors:
    @pytest.fixture
    def folder(self, tmp_path):
        Word2Vec(WORDS, VECTORS).save(tmp_path)
        return tmp_path

    def load(self, folder):
        return Word2Vec.load(str(folder), TextOptions())

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(ModelError, match=r"should hold word vectors.*there are none"):
            self.load(tmp_path)

    def test_another_kind(self, folder):
        (folder / "config.json").write_text('{"model_type": "bert"}')
        with pytest.raises(ModelError, match="Hugging Face model of type 'bert'"):
            self.load(folder)

    def test_a_vocabulary_that_does_not_fit(self, folder):
        (folder / "words.json").write_text('["one", "two"]')
        with pytest.raises(ModelError, match=r"vocabulary does not fit.*2 different words.*5 vectors"):
            self.load(folder)
        (folder / "words.json").write_text(json.dumps(["same"] * 5))
        with pytest.raises(ModelError, match="vocabulary does not fit"):
            self.load(folder)

    @pytest.mark.parametrize("words", ["{", "{}", "[]", "[1, 2, 3, 4, 5]"])
    def test_damaged_words(self, folder, words):
        (folder / "words.json").write_text(words)
        with pytest.raises(ModelError, match=r"damaged|cannot be read"):
            self.load(folder)

    @pytest.mark.parametrize(
        "tensors",
        [
            {},
            {"weight": torch.ones(5, 2)},
            {"vectors": torch.ones(5, 2), "x": torch.ones(1)},
            {"vectors": torch.ones(5)},
        ],
    )
    def test_foreign_tensors(self, folder, tensors):
        write_tensors(folder / "vectors.safetensors", tensors)
        with pytest.raises(ModelError, match="one matrix `vectors`"):
            self.load(folder)

    def test_values_that_are_not_finite(self, folder):
        write_tensors(folder / "vectors.safetensors", {"vectors": torch.full((5, 2), float("nan"))})
        with pytest.raises(ModelError, match="not finite"):
            self.load(folder)

    def test_missing_files(self, folder):
        (folder / "words.json").unlink()
        with pytest.raises(ModelError, match=r"words\.json cannot be read"):
            self.load(folder)
        (folder / "vectors.safetensors").unlink()
        with pytest.raises(ModelError, match=r"vectors\.safetensors is not there"):
            self.load(folder)

    def test_pooling_that_word_vectors_do_not_have(self):
        with pytest.raises(ModelError, match="`pooling` cls does not go with word2vec"):
            Word2Vec(WORDS, VECTORS, TextOptions(pooling="cls"))
        Word2Vec(WORDS, VECTORS, TextOptions(pooling="mean"))
