import dataclasses
import os
import shutil

import cv2
import numpy as np
import pytest
import safetensors.torch
from PIL import Image

from diptych.models.base import ImageOptions, Prompt, TextOptions
from diptych.models.errors import ModelError
from diptych.models.generation.image_generator import ImageGenerator
from diptych.models.text.word2vec import Word2Vec
from diptych.models.training import image_objectives, images, trainer
from diptych.models.training.cache import SplitRows
from diptych.models.training.data import Batch, CaptionData
from diptych.models.training.image_batches import epoch_batches, open_image_data
from diptych.models.training.images import train_image_model
from diptych.models.training.options import GanTraining, VaeTraining

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
SMALL = {
    "size_px": 16,
    "latent_dim": 4,
    "condition_dim": 8,
    "channels": 8,
    "epochs": 3,
    "batch_size": 8,
    "ema": 0.9,
}


def picture(colour, size_px=20, noise=None):
    pixels = np.full((size_px, size_px, 3), colour[::-1], np.uint8)
    if noise is not None:
        pixels = cv2.addWeighted(pixels, 0.6, noise.integers(0, 256, pixels.shape, np.uint8), 0.4, 0)
    return cv2.imencode(".png", pixels)[1].tobytes()


def batches(num_rows, captions=2, seed=None):
    names = [*COLOURS]
    noise = None if seed is None else np.random.default_rng(seed)

    def rows():
        for start in range(0, num_rows, 10):
            picked = [names[i % 4] for i in range(start, min(num_rows, start + 10))]
            keys = [f"row {start + i}" for i in range(len(picked))]
            texts = [[f"a {name} square", f"{name} it is"][:captions] for name in picked]
            yield Batch(keys, [picture(COLOURS[name], noise=noise) for name in picked], texts)

    return rows


def data(num_train=40, num_validation=12, captions=2):
    return CaptionData(
        batches(num_train, captions), batches(num_validation, captions), num_train, num_validation, "squares"
    )


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    Word2Vec([*COLOURS, "square"], np.eye(5, 6, dtype=np.float32)).save(folder)
    return f"word2vec:{folder}"


@pytest.fixture(params=["vae", "gan"])
def options(request, words):
    kind = {"vae": VaeTraining, "gan": GanTraining}[request.param]
    return kind(text_model=words, **SMALL)


def train(folder, options, rows=None, seen=None, cache=None):
    return train_image_model(rows or data(), folder, options, "cpu", seen or (lambda _: None), cache)


def weights(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def test_a_vae_draws_what_it_is_told(tmp_path, words):
    options = VaeTraining(text_model=words, **{**SMALL, "epochs": 80}, learning_rate=8e-3)
    options = dataclasses.replace(options, divergence_weight=100.0)
    noisy = dataclasses.replace(data(), train=lambda: batches(40, seed=0)(), validation=batches(12, seed=1))
    history = train(tmp_path, options, noisy)
    model = ImageGenerator.load(str(tmp_path), ImageOptions(), "cpu", "vae")
    for name, colour in COLOURS.items():
        drawn = model.predict(model.prepare([Prompt(f"a {name} square", seed) for seed in range(4)]))
        for image in drawn:
            wanted = 0.6 * np.array(colour) + 0.4 * 127.5
            assert np.abs(image.pixels.reshape(-1, 3).mean(0) - wanted).max() < 40, name
    assert history[-1]["validation_loss"] < history[0]["validation_loss"]
    assert history[-1]["text_distance"] > 5 * history[-1]["sample_distance"]


def test_figures(tmp_path, options):
    history = train(tmp_path, options)
    shared = {"epoch", "seconds", "sample_distance", "text_distance", "real_distance", "gradient_norm"}
    own = {
        "vae": {"train_loss", "validation_loss", "error", "divergence"},
        "gan": {
            *("generator_loss", "discriminator_loss", "real", "mismatched", "fake"),
            "discriminator_gradient_norm",
        },
    }
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    assert all(entry.keys() == shared | own[options.kind] for entry in history)
    with Image.open(tmp_path / "samples.png") as sheet:
        assert sheet.width > 5 * 96
        assert sheet.height > 8 * 96
    assert (tmp_path / "encoder.safetensors").exists() == (options.kind == "vae")


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [3, 5, 9, 14])
def test_killed_and_gone_on_with(tmp_path, options, at, monkeypatch):
    """A checkpoint at each step; the end is the same to the last bit."""
    train(tmp_path / "undisturbed", options)
    monkeypatch.setattr(trainer, "_CHECKPOINT_S", -1.0)
    steps = 0

    def kill(progress):
        nonlocal steps
        steps += progress.phase == "training"
        if steps == at:
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path / "killed", options, seen=kill)
    assert not (tmp_path / "killed" / "config.json").exists()
    history = train(tmp_path / "killed", options)
    ours, theirs = weights(tmp_path / "killed"), weights(tmp_path / "undisturbed")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert len(history) == 3


def test_the_seed_decides(tmp_path, options):
    first, second, other = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    train(first, options)
    train(second, options)
    train(other, dataclasses.replace(options, seed=1))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_a_gan_goes_on_with_the_generator_of_a_vae(tmp_path, words):
    vae = VaeTraining(text_model=words, **SMALL)
    train(tmp_path / "vae", vae)
    gan = GanTraining(text_model=words, generator=f"vae:{tmp_path / 'vae'}", epochs=1, batch_size=8)
    train(tmp_path / "gan", dataclasses.replace(gan, learning_rate=1e-12))
    before, after = weights(tmp_path / "vae"), weights(tmp_path / "gan")
    assert before.keys() == after.keys()  # its shape, whatever the options say
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 1e-6


def test_the_generator_of_another_text_model_is_refused(tmp_path, words):
    train(tmp_path / "vae", VaeTraining(text_model=words, **SMALL))
    (tmp_path / "other").mkdir()
    Word2Vec(["red"], np.ones((1, 6), np.float32)).save(tmp_path / "other")
    gan = GanTraining(
        text_model=f"word2vec:{tmp_path / 'other'}", generator=f"vae:{tmp_path / 'vae'}", epochs=1
    )
    with pytest.raises(ModelError, match=r"was trained with the text model .* Give the one that it knows"):
        images.check_models(gan)


@pytest.mark.parametrize("rate", [1e6, 1e30])
def test_a_training_that_diverges_says_so(tmp_path, options, rate):
    wild = dataclasses.replace(options, learning_rate=rate, epochs=50)
    if options.kind == "gan":
        wild = dataclasses.replace(wild, discriminator_learning_rate=rate)
    with pytest.raises(
        ModelError, match=r"the training diverged: .* Lower `learning_rate` \(it is 1(e\+30|000000)"
    ):
        train(tmp_path, wild)


def test_a_generator_that_ignores_its_noise_has_collapsed(tmp_path, words, monkeypatch):
    monkeypatch.setattr(image_objectives, "_COLLAPSED", 1e6)
    with pytest.raises(ModelError, match="the generator has collapsed, two samples of one prompt are 0"):
        train(tmp_path, GanTraining(text_model=words, **{**SMALL, "epochs": 4}))


def test_early_stop(tmp_path, words):
    options = VaeTraining(text_model=words, **{**SMALL, "epochs": 50}, learning_rate=1e-12, patience=2)
    options = dataclasses.replace(options, ema=0.0)
    history = train(tmp_path, options)
    # not before the encoder has begun, in the 13th: its first epochs choose nothing
    assert 13 + 2 <= len(history) < 50


def test_fewer_rows_than_a_batch(tmp_path, options):
    assert len(train(tmp_path, options, data(3, 1))) == 3


def test_no_captions(tmp_path, options):
    with pytest.raises(ModelError, match=r"none of the 40 train rows has a caption"):
        train(tmp_path, options, data(captions=0))


class TestData:
    def open(self, folder, words, rows=40, size_px=16):
        text = Word2Vec.load(words.partition(":")[2], TextOptions())
        return open_image_data(
            folder, "squares", size_px, text, SplitRows(batches(rows), rows, lambda _: None)
        )

    def test_an_epoch_is_every_row_once(self, tmp_path, words):
        found = self.open(tmp_path, words)
        seen = list(epoch_batches(found, 0, 0, 8, seed=3, flips=False))
        assert [len(batch.pixels) for batch in seen] == [8] * 5
        colours = np.concatenate([batch.pixels[:, 0, 0].numpy() for batch in seen])
        assert sorted(map(tuple, colours.tolist())) == sorted([*COLOURS.values()] * 10)

    def test_texts_are_those_of_the_pictures(self, tmp_path, words):
        found = self.open(tmp_path, words)
        for batch in epoch_batches(found, 1, 0, 8, seed=3, flips=False):
            for pixels, vector in zip(batch.pixels.numpy(), batch.text_vectors.numpy(), strict=True):
                name = [*COLOURS][int(vector[:4].argmax())]
                assert tuple(pixels[0, 0]) == COLOURS[name]

    def test_from_the_middle_of_an_epoch(self, tmp_path, words):
        found = self.open(tmp_path, words)
        whole = list(epoch_batches(found, 2, 0, 8, seed=3, flips=True))
        rest = list(epoch_batches(found, 2, 3, 8, seed=3, flips=True))
        for one, other in zip(whole[3:], rest, strict=True):
            assert one.pixels.equal(other.pixels)
            assert one.text_vectors.equal(other.text_vectors)

    def test_texts_are_whitened(self, tmp_path, words):
        found = self.open(tmp_path, words)
        text = Word2Vec.load(words.partition(":")[2], TextOptions())
        texts = [caption for batch in batches(40)() for captions in batch.captions for caption in captions]
        vectors = np.stack([vector.values for vector in text.predict(text.prepare(texts))])
        np.testing.assert_allclose(found.mean.numpy(), vectors.mean(0), atol=1e-6)
        white = (vectors - found.mean.numpy()) @ found.whitening.numpy()
        variances = np.linalg.eigvalsh(np.cov(white, rowvar=False, bias=True))
        rank = np.linalg.matrix_rank(vectors - vectors.mean(0), tol=1e-4)
        np.testing.assert_allclose(variances[-rank:], 1, atol=1e-3)
        np.testing.assert_allclose(variances[:-rank], 0, atol=1e-3)  # what never varies is not blown up

    def test_is_made_once(self, tmp_path, words, monkeypatch):
        self.open(tmp_path, words)
        before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        monkeypatch.setattr(Word2Vec, "predict", lambda *_: pytest.fail("vectors were made again"))
        self.open(tmp_path, words)
        assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before

    def test_vectors_that_were_cut_short_are_made_again(self, tmp_path, words):
        good = self.open(tmp_path, words).mean
        os.truncate(tmp_path / "vectors.bin", 10)
        assert self.open(tmp_path, words).mean.equal(good)
        (tmp_path / ".vectors.tmp").write_bytes(b"half")
        shutil.copy(tmp_path / "vectors.bin", tmp_path / "copy")
        os.remove(tmp_path / "copy")
        assert self.open(tmp_path, words, size_px=32).mean.equal(good)
