import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diptych.models.base import TextOptions
from diptych.models.errors import ModelError
from diptych.models.text.word2vec import Word2Vec
from diptych.models.training import word2vec
from diptych.models.training.checkpoint import Checkpoints
from diptych.models.training.options import Word2VecTraining
from diptych.models.training.word2vec import train_word2vec

COLOURS, SHAPES, PLACES = ["red", "green", "blue"], ["ball", "cube", "cone"], ["left", "right", "top"]
OPTIONS = Word2VecTraining(vector_size=12, window=3, min_count=1, epochs=4, sample=0, alpha=0.05, patience=0)


def captions(count, seed=0):
    draw = np.random.default_rng(seed)
    for _ in range(count):
        colour, shape, place = draw.choice(COLOURS), draw.choice(SHAPES), draw.choice(PLACES)
        yield f"A {colour} {shape} at the {place}."


def train(output, options=OPTIONS, count=300, on_progress=lambda progress: None, validation=50):
    return train_word2vec(
        lambda: captions(count), lambda: captions(validation, seed=1), output, options, on_progress
    )


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


class Killed(BaseException):
    """Ends a training wherever it is."""


def replaced(**changes):
    return dataclasses.replace(OPTIONS, **changes)


@pytest.mark.parametrize("skip_gram", [True, False])
def test_it_learns_and_its_model_loads(tmp_path, skip_gram):
    found = train(tmp_path, replaced(skip_gram=skip_gram, epochs=25), count=500)
    losses = [record["validation_loss"] for record in found["history"]]
    assert losses[-1] < losses[0] < 6 * np.log(2)  # what a model that knows nothing has
    assert losses[-1] < 2.4
    assert found["history"][-1]["train_loss"] == pytest.approx(losses[-1], abs=0.2)
    model = Word2Vec.load(str(tmp_path), TextOptions(normalize=True))
    assert model.digest != found["digest"]
    assert Word2Vec.load(str(tmp_path), TextOptions()).digest == found["digest"]
    counts = {name: found[name] for name in ("num_captions", "num_words", "vocabulary_size")}
    assert counts == {"num_captions": 500, "num_words": 3000, "vocabulary_size": 12}
    red, green, ball = (model.predict(model.prepare([word]))[0].values for word in ("red", "green", "ball"))
    assert red @ green > red @ ball


def test_the_same_bytes_each_time_whatever_the_hash_seed(tmp_path):
    here = str(Path(__file__).parent)
    code = f"import sys; from pathlib import Path; sys.path.insert(0, {here!r})\n"
    code += "from test_word2vec import train; train(Path(sys.argv[1]))"
    env = {**os.environ, "PYTHONHASHSEED": "1234"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "1")], env=env, check=True, timeout=100)
    train(tmp_path / "2")
    assert content(tmp_path / "1") == content(tmp_path / "2")
    assert set(content(tmp_path / "1")) == {"config.json", "words.json", "vectors.safetensors"}


def test_another_seed_is_another_model(tmp_path):
    assert train(tmp_path / "a")["digest"] != train(tmp_path / "b", replaced(seed=1))["digest"]


@pytest.mark.parametrize("phase", ["training", "validating", "saving"])
def test_killed_and_resumed_is_as_undisturbed(tmp_path, monkeypatch, phase):
    undisturbed = train(tmp_path / "whole")

    def kill(progress):
        if progress.epoch == 2 and progress.phase == "validating":
            raise Killed

    def kill_at_save(self, step, tensors, state, save=Checkpoints.save):
        if step == 3:
            raise Killed
        save(self, step, tensors, state)

    epochs = []
    if phase == "training":

        def kill_in_epoch(trainer, *args, train_epoch=word2vec._train_epoch):
            train_epoch(trainer, *args)
            if args[2] == 2:
                raise Killed

        monkeypatch.setattr(word2vec, "_train_epoch", kill_in_epoch)
    if phase == "saving":
        monkeypatch.setattr(Checkpoints, "save", kill_at_save)
    with pytest.raises(Killed):
        train(tmp_path / "killed", on_progress=kill if phase == "validating" else lambda progress: None)
    monkeypatch.undo()
    assert not (tmp_path / "killed" / "config.json").exists()
    resumed = train(tmp_path / "killed", on_progress=lambda progress: epochs.append(progress.epoch))
    assert resumed == undisturbed
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert min(epochs) == (3 if phase == "validating" else 2)
    epochs.clear()
    again = train(tmp_path / "killed", on_progress=lambda progress: epochs.append(progress.epoch))
    assert (again, epochs) == (undisturbed, []), "a training that is done is not done again"


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    def kill(progress):
        if progress.phase == "validating":
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path, on_progress=kill)
    for changed in ({"options": replaced(window=2)}, {"count": 301}):
        with pytest.raises(ModelError, match=r"of a training with other options or other captions"):
            train(tmp_path, **changed)


def test_it_stops_early_and_keeps_the_best_epoch(tmp_path, monkeypatch):
    losses = iter([9.0, 3.0, 2.0, 2.5, 2.0, 1.0] * 2)
    measured = word2vec._Loss.measure
    turn = []

    def measure(self, trainer):
        turn.append(measured(self, trainer))
        return next(losses) if len(turn) % 2 == 0 else turn[-1]  # training and validation by turns

    monkeypatch.setattr(word2vec._Loss, "measure", measure)
    found = train(tmp_path / "stopped", replaced(epochs=10, patience=2))
    assert [record["validation_loss"] for record in found["history"]] == [9.0, 3.0, 2.0, 2.5, 2.0]
    assert found["best_epoch"] == 3
    saved = []
    monkeypatch.undo()
    monkeypatch.setattr(
        Checkpoints,
        "save",
        lambda self, step, tensors, state: saved.append(tensors["vectors"].clone()),
    )
    train(tmp_path / "whole", replaced(epochs=10, patience=0))
    model = Word2Vec.load(str(tmp_path / "stopped"), TextOptions())
    np.testing.assert_array_equal(model.vectors, saved[2].numpy())


def test_the_loss_is_that_of_its_definition(tmp_path):
    for skip_gram in (True, False):
        options = replaced(skip_gram=skip_gram)
        vocabulary = word2vec._count_words(lambda: captions(30), 1, lambda progress: None)
        trainer = word2vec._new_trainer(vocabulary, options)
        trainer.syn1neg[:] = np.random.default_rng(0).normal(size=trainer.syn1neg.shape)
        measure = word2vec._Loss.of(lambda: ["a red ball", "cone zzz blue", "cube"], trainer, options)
        rows, out, vectors = trainer.wv.key_to_index, trainer.syn1neg, trainer.wv.vectors
        sentences = [[rows[w] for w in words] for words in (["a", "red", "ball"], ["cone", "blue"], ["cube"])]
        total, pair = 0.0, 0
        for sentence in sentences:
            for place, word in enumerate(sentence):
                around = sentence[:place] + sentence[place + 1 :]
                for context in [[c] for c in around] if skip_gram else [around] if around else []:
                    hidden = np.mean([vectors[c].astype(float) for c in context], axis=0)
                    total += np.log1p(np.exp(-hidden @ out[word]))
                    negatives = measure.targets[pair][1:]
                    total += sum(np.log1p(np.exp(hidden @ out[n])) for n in negatives if n != word)
                    assert measure.targets[pair][0] == word
                    pair += 1
        assert pair == len(measure.targets) == (8 if skip_gram else 5)
        assert measure.measure(trainer) == pytest.approx(total / pair, rel=1e-5)


def test_without_validation_the_last_epoch_counts(tmp_path):
    found = train(tmp_path, replaced(patience=1), validation=0)
    assert found["best_epoch"] == len(found["history"]) == 4
    assert set(found["history"][0]) == {"epoch", "alpha", "train_loss"}
    json.dumps(found)


def test_captions_are_streamed(tmp_path):
    alive, most = set(), []

    class Caption(str):
        def __init__(self, text):
            alive.add(id(self))
            most.append(len(alive))

        def __del__(self):
            alive.discard(id(self))

    found = train_word2vec(
        lambda: map(Caption, captions(5000)), lambda: [], tmp_path, replaced(epochs=1), lambda progress: None
    )
    assert found["num_captions"] == 5000
    assert max(most) < 10


def test_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(word2vec, "_REPORTED", 100)
    told = []
    found = train(tmp_path, replaced(epochs=2), on_progress=told.append)
    assert [(p.phase, p.epoch, p.done, p.total) for p in told] == [
        *[("reading", 0, n, 0) for n in (100, 200, 300)],
        *[("training", 0, n, 300) for n in (0, 100, 200)],
        ("validating", 0, 300, 300),
        *[("training", 1, n, 300) for n in (0, 100, 200)],
        ("validating", 1, 300, 300),
    ]
    validated = [p for p in told if p.phase == "validating"]
    assert [p.entry for p in validated] == found["history"]
    assert [p.loss for p in validated] == [entry["train_loss"] for entry in found["history"]]
    assert [record["alpha"] for record in found["history"]] == pytest.approx([0.05, 0.02505])


def test_what_reading_raises_comes_out(tmp_path):
    calls = []

    def broken():
        calls.append(None)
        for ordinal, caption in enumerate(captions(300)):
            if len(calls) > 3 and ordinal == 200:
                raise ConnectionError("the line went dead")
            yield caption

    with pytest.raises(ConnectionError, match="went dead"):
        train_word2vec(broken, lambda: [], tmp_path, OPTIONS, lambda progress: None)
    assert Checkpoints(tmp_path / "checkpoint").latest().step == len(calls) - 3


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "There are no captions to train on"),
        (["", "…", "!"], "Of 0 different words in 3 captions"),
        (["one two", "three"], r"Of 3 different words in 2 captions, 0 occur 2 times.*`min_count`"),
    ],
)
def test_nothing_to_learn_from(tmp_path, texts, message):
    with pytest.raises(ModelError, match=message):
        train_word2vec(lambda: texts, lambda: [], tmp_path, replaced(min_count=2), lambda progress: None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [("vector_size", 0), ("epochs", 0), ("negative", 0), ("window", -1), ("patience", -1), ("min_alpha", 1)],
)
def test_options_that_cannot_be(name, value):
    with pytest.raises(ModelError, match=f"alpha is|{name} is {value}"):
        replaced(**{name: value})


@pytest.mark.parametrize(
    "values", [{"alpha": float("inf")}, {"sample": float("nan")}, {"vector_size": 2_000_000_000}]
)
def test_numbers_that_gensim_would_break_on(values):
    with pytest.raises(ModelError, match=next(iter(values))):
        Word2VecTraining(**values)
