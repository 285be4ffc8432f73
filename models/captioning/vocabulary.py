"""The words that a captioner knows, and their numbers."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from diptych.models.errors import ModelError, one_line

PAD, START, END, UNKNOWN = range(4)
_SPECIAL = ("<pad>", "<start>", "<end>", "<unknown>")


class Vocabulary:
    """The words that a captioner knows; the first four numbers are special.

    Attributes:
        words: The words in the order of their numbers.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = (*_SPECIAL, *words)
        self._numbers = {word: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def build(cls, counts: Mapping[str, int], min_count: int) -> "Vocabulary":
        """Makes a vocabulary of the words that occur at least `min_count` times, the most frequent first.

        Raises:
            ModelError: No word does.
        """
        kept = sorted((word for word, n in counts.items() if n >= min_count), key=lambda w: (-counts[w], w))
        kept = [word for word in kept if word not in _SPECIAL]
        if not kept:
            raise ModelError(
                f"none of the {len(counts)} words of the captions occurs {min_count} times, so there is no vocabulary. "
                "Lower `min_word_count`, or train on more captions."
            )
        return cls(kept)

    def number(self, word: str) -> int:
        """Returns the number of a word, or `UNKNOWN`."""
        return self._numbers.get(word, UNKNOWN)

    def decode(self, numbers: Iterable[int]) -> str:
        """Returns the words of a caption up to its end, separated by spaces."""
        words = []
        for number in numbers:
            if number in (END, PAD):
                break
            words.append(self.words[number])
        return " ".join(words)

    def to_text(self) -> str:
        """Returns the words, one per line, as `load` reads them."""
        return "".join(f"{word}\n" for word in self.words[len(_SPECIAL) :])

    @classmethod
    def load(cls, path: Path) -> "Vocabulary":
        """Reads a file of words, one per line.

        Raises:
            ModelError: It cannot be read, or names a word twice.
        """
        try:
            words = path.read_text(encoding="utf-8").split("\n")[:-1]
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(
                f"{path} cannot be read ({one_line(error)}). It must be a text file, one word a line."
            ) from error
        if len({*words, *_SPECIAL}) != len(words) + len(_SPECIAL):
            raise ModelError(f"{path} names a word twice. It must be the file that was saved with the model.")
        return cls(words)
