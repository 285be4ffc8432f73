import pytest

from diptych.models.captioning.vocabulary import END, PAD, START, UNKNOWN, Vocabulary
from diptych.models.errors import ModelError


class TestVocabulary:
    def test_keeps_frequent_words_in_order_of_count_then_name(self):
        vocabulary = Vocabulary.build({"dog": 3, "a": 9, "cat": 3, "rare": 2}, min_count=3)
        assert vocabulary.words[4:] == ("a", "cat", "dog")
        assert vocabulary.number("rare") == UNKNOWN

    def test_numbers_and_words_are_inverse(self):
        vocabulary = Vocabulary.build({"a": 2, "naïve": 2, "狗": 2}, 1)
        numbers = [vocabulary.number(word) for word in ("狗", "a", "naïve")]
        assert len({*numbers, PAD, START, END, UNKNOWN}) == 7
        assert vocabulary.decode([*numbers, END, numbers[0]]) == "狗 a naïve"

    def test_a_caption_cannot_smuggle_in_a_special_word(self):
        assert Vocabulary.build({"<end>": 9, "a": 9}, 1).words.count("<end>") == 1

    def test_no_frequent_word_is_an_error(self):
        with pytest.raises(ModelError, match="`min_word_count`"):
            Vocabulary.build({"a": 1}, 2)

    def test_comes_back_from_its_file(self, tmp_path):
        words = ("a", "it's", "naïve", "\u2028", "狗")
        (tmp_path / "v.txt").write_text(Vocabulary(words).to_text(), encoding="utf-8")
        assert Vocabulary.load(tmp_path / "v.txt").words[4:] == words

    @pytest.mark.parametrize("content", [b"a\nb\na\n", b"a\n<end>\n", b"\xff\xfe"])
    def test_a_damaged_file_is_an_error(self, tmp_path, content):
        (tmp_path / "v.txt").write_bytes(content)
        with pytest.raises(ModelError, match=r"v\.txt"):
            Vocabulary.load(tmp_path / "v.txt")

    def test_a_missing_file_is_an_error(self, tmp_path):
        with pytest.raises(ModelError, match=r"v\.txt"):
            Vocabulary.load(tmp_path / "v.txt")
