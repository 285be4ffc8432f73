"""What a training tells whoever started it, of whichever model: how far it is, and how it went."""

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a training is; told often enough for a progress bar, and once after each epoch.

    Attributes:
        phase: What it does now, a word or two: `features`, `train`, `validate`, …
        epoch: Counted from 1; 0 before the first.
        epochs: At most so many.
        rows: Rows done of this phase of this epoch.
        num_rows: Of so many.
        entry: After an epoch, its entry in the history; empty otherwise.
    """

    phase: str
    epoch: int
    epochs: int
    rows: int
    num_rows: int
    entry: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class History:
    """How a training went.

    Attributes:
        kind: The kind of model that was written, see `models.spec`.
        epochs: An entry an epoch: `epoch`, `train_loss`, `validation_loss`, and scores by their names (`CIDEr`,
            `BLEU-4`, …).
        scores: Of the model that was kept, on the validation rows.
        digest: Of the model that was kept.
        notes: More that its card should say, as JSON values, e.g. the number of words.
    """

    kind: str
    epochs: Sequence[Mapping[str, float]]
    scores: Mapping[str, float]
    digest: str
    notes: Mapping[str, object] = dataclasses.field(default_factory=dict)
