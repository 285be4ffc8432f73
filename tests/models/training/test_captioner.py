import dataclasses
import json
import os
import shutil

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch

from diptych.models.base import CaptionOptions
from diptych.models.captioning.captioner import Captioner
from diptych.models.captioning.encoder import create_encoder
from diptych.models.errors import ModelError
from diptych.models.training import trainer
from diptych.models.training.captioner import train_captioner
from diptych.models.training.data import Batch, CaptionData
from diptych.models.training.options import CaptionerTraining

COLOURS = {"red": (0, 0, 255), "green": (0, 255, 0), "blue": (255, 0, 0), "white": (255, 255, 255)}
OPTIONS = CaptionerTraining(
    encoder="timm:test_resnet",
    encoder_weights="none",
    encoder_size_px=32,
    fine_tune=True,
    embedding_dim=16,
    hidden_dim=16,
    attention_dim=8,
    dropout=0.1,
    min_word_count=1,
    max_words=6,
    epochs=3,
    batch_size=8,
    learning_rate=1e-2,
    beam_width=2,
)


def picture(colour, size_px=40):
    pixels = np.full((size_px, size_px, 3), colour, np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def batches(num_rows, captions=2):
    names = [*COLOURS]

    def rows():
        for start in range(0, num_rows, 10):
            picked = [names[i % 4] for i in range(start, min(num_rows, start + 10))]
            keys = [f"row {start + i}" for i in range(len(picked))]
            texts = [[f"a {name} square", f"the square is {name}"][:captions] for name in picked]
            yield Batch(keys, [picture(COLOURS[name]) for name in picked], texts)

    return rows


def data(num_train=40, num_validation=12, captions=2):
    return CaptionData(
        batches(num_train, captions), batches(num_validation, captions), num_train, num_validation, "squares"
    )


def train(folder, options=OPTIONS, rows=None, seen=None, cache=None):
    return train_captioner(rows or data(), folder, options, "cpu", seen or (lambda _: None), cache)


@pytest.fixture(scope="module")
def encoder_weights(tmp_path_factory):
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("encoder") / "weights.safetensors"
    state = create_encoder("timm:test_resnet", 32).network.state_dict()
    safetensors.torch.save_file({name: value.clone().contiguous() for name, value in state.items()}, path)
    return str(path)


def test_learns_what_it_sees(tmp_path):
    history = train(tmp_path, dataclasses.replace(OPTIONS, epochs=20, patience=20))
    model = Captioner.load(str(tmp_path), CaptionOptions(beam_width=2), "cpu", "cnn-lstm")
    for name, colour in COLOURS.items():
        (found,) = model.predict(model.prepare([picture(colour)]))
        assert name in found.candidates[0].split()
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert max(epoch["CIDEr"] for epoch in history) > 1
    assert history[0].keys() == {
        "epoch",
        "train_loss",
        "validation_loss",
        "seconds",
        "BLEU-1",
        "BLEU-4",
        "CIDEr",
    }


@pytest.mark.parametrize(
    ("decoder", "attention"), [("lstm", True), ("lstm", False), ("gru", True), ("rnn", False)]
)
def test_frozen_encoder(tmp_path, encoder_weights, decoder, attention):
    options = dataclasses.replace(
        OPTIONS,
        encoder_weights=encoder_weights,
        fine_tune=False,
        decoder=decoder,
        attention=attention,
        flips=True,
        epochs=2,
    )
    train(tmp_path, options)
    kind = "cnn-lstm" if decoder == "lstm" else "cnn-rnn"
    model = Captioner.load(str(tmp_path), CaptionOptions(features=True), "cpu", kind)
    (found,) = model.predict(model.prepare([picture((0, 0, 255))]))
    assert found.features.shape == (model.feature_dim,)
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for name, value in safetensors.torch.load_file(encoder_weights).items():
        assert torch.equal(saved[f"encoder.network.{name}"], value)


def test_threads_are_those_that_are_asked_for(tmp_path):
    before, seen = torch.get_num_threads(), set()
    options = dataclasses.replace(OPTIONS, epochs=1, threads=1)
    train(tmp_path, options, seen=lambda p: p.phase == "training" and seen.add(torch.get_num_threads()))
    assert seen == {1}
    assert torch.get_num_threads() == before


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("fine_tune", "at"), [(True, 4), (True, 8), (True, 16), (False, 5), (False, 13), (False, 18)]
)
def test_goes_on_to_the_same_weights(tmp_path, monkeypatch, encoder_weights, fine_tune, at):
    weights = "none" if fine_tune else encoder_weights
    options = dataclasses.replace(
        OPTIONS,
        fine_tune=fine_tune,
        encoder_weights=weights,
        flips=True,
        captions_per_image=1,
        cider_epochs=2 if at >= 15 else 0,
    )
    num_steps = 5 * (options.epochs + options.cider_epochs)
    undisturbed = train(tmp_path / "undisturbed", options)
    monkeypatch.setattr(trainer, "_CHECKPOINT_S", 0.0)
    steps = 0

    def kill(progress):
        nonlocal steps
        steps += progress.phase == "training"
        if steps == at:
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path / "killed", options, seen=kill)
    resumed = []
    history = train(tmp_path / "killed", options, seen=lambda progress: resumed.append(progress.phase))
    assert resumed.count("training") <= num_steps - at + 1
    assert "reading" not in resumed
    for name in ("model.safetensors", "vocabulary.txt", "config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    times = [{**epoch, "seconds": 0} for epoch in history]
    assert times == [{**epoch, "seconds": 0} for epoch in undisturbed]


def test_a_cache_serves_several_trainings(tmp_path, encoder_weights):
    options = dataclasses.replace(OPTIONS, encoder_weights=encoder_weights, fine_tune=False, epochs=1)
    read = []
    for decoder in ("lstm", "rnn"):
        train(
            tmp_path / decoder,
            dataclasses.replace(options, decoder=decoder),
            seen=lambda progress: read.append(progress.phase == "reading"),
            cache=tmp_path / "cache",
        )
        read.append(None)
    first, second = read[: read.index(None)], read[read.index(None) + 1 : -1]
    assert any(first)
    assert not any(second)


@pytest.mark.parametrize("cider_epochs", [0, 2])
def test_stops_when_it_gets_no_better(tmp_path, encoder_weights, cider_epochs):
    stuck = {"encoder_weights": encoder_weights, "fine_tune": False, "learning_rate": 1e-12, "patience": 2}
    history = train(tmp_path, dataclasses.replace(OPTIONS, epochs=30, cider_epochs=cider_epochs, **stuck))
    assert ["reward" in entry for entry in history] == [False] * 3 + [True] * cider_epochs


def test_learns_from_whole_captions(tmp_path):
    more = {"cider_epochs": 6, "cider_learning_rate": 3e-3, "ema": 0.5}
    options = dataclasses.replace(OPTIONS, epochs=8, patience=8, **more)
    history = train(tmp_path, options)
    assert ["reward" in entry for entry in history] == [False] * 8 + [True] * 6
    assert all(("train_loss" in entry) != ("reward" in entry) for entry in history)
    assert history[-1]["reward"] > history[8]["reward"] + 0.3


def test_rows_without_captions_are_left_out(tmp_path):
    def rows():
        batch = next(batches(10)())
        yield batch._replace(captions=[[] if i % 2 else texts for i, texts in enumerate(batch.captions)])
        yield batch._replace(captions=[["!!"]] * 10)

    history = train(tmp_path, rows=CaptionData(rows, rows, 20, 20, "holes"))
    assert json.loads((tmp_path / "_cache/train/cache.json").read_bytes())["rows"] == 5
    assert len(history) == 3


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (data(captions=0), {}, "none of the 40 train rows has a caption"),
        (data(num_validation=0), {}, "none of the 0 validation rows has a caption"),
        (data(), {"min_word_count": 1000}, "`min_word_count`"),
        (data(), {"fine_tune": False}, "`fine_tune`"),
        (data(), {"encoder": "resnet19"}, "resnet19"),
        (data(), {"encoder": "timm:nonsense"}, "nonsense"),
        (data(), {"encoder": "vit_b_16"}, "vit_b_16"),
        (data(), {"encoder": "keras:resnet50"}, "keras"),
        (data(), {"encoder_weights": "/nowhere/x.safetensors"}, "/nowhere/x.safetensors"),
        (data(), {"learning_rate": 1e12, "epochs": 30, "patience": 30}, "diverged.*`learning_rate`"),
        (
            data(),
            {"cider_learning_rate": 1e12, "epochs": 1, "cider_epochs": 9},
            "diverged.*`cider_learning_rate`",
        ),
    ],
)
def test_what_cannot_be_trained_is_said(tmp_path, rows, options, message):
    with pytest.raises(ModelError, match=message):
        train(tmp_path, dataclasses.replace(OPTIONS, **options), rows)
    assert not (tmp_path / "config.json").exists()


def test_weights_of_another_network(tmp_path, encoder_weights):
    options = dataclasses.replace(OPTIONS, encoder="resnet18", encoder_weights=encoder_weights)
    with pytest.raises(ModelError, match="does not fit the encoder resnet18"):
        train(tmp_path, options)


def test_an_image_that_cannot_be_decoded_names_its_neighbourhood(tmp_path):
    def rows():
        batch = next(batches(10)())
        yield batch._replace(images=[*batch.images[:9], b"nonsense"])

    with pytest.raises(ModelError, match="row 0 … row 9"):
        train(tmp_path, rows=CaptionData(rows, rows, 10, 10, "damaged"))


def test_no_room_for_the_cache_is_said_before_anything_is_read(tmp_path, monkeypatch):
    free = os.statvfs(tmp_path)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free.f_blocks, free.f_blocks, 1000)
    )
    seen = []
    with pytest.raises(ModelError, match="free"):
        train(tmp_path, seen=seen.append)
    assert seen == []


def test_a_cache_folder_with_other_files_is_left_alone(tmp_path):
    photo = tmp_path / "data" / "train" / "photo.jpg"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(b"x")
    with pytest.raises(ModelError, match=r"train is where the cache would be, but it holds photo\.jpg"):
        train(tmp_path / "model", cache=tmp_path / "data")
    assert photo.read_bytes() == b"x"


def test_a_cache_of_other_data_is_made_anew(tmp_path, encoder_weights):
    options = dataclasses.replace(OPTIONS, encoder_weights=encoder_weights, fine_tune=False, epochs=1)
    train(tmp_path / "one", options, cache=tmp_path / "cache")
    train(tmp_path / "two", options, data(20), cache=tmp_path / "cache")
    assert json.loads((tmp_path / "cache/train/cache.json").read_bytes())["rows"] == 40
    other = dataclasses.replace(data(20), fingerprint="others")
    train(tmp_path / "three", options, other, cache=tmp_path / "cache")
    assert json.loads((tmp_path / "cache/train/cache.json").read_bytes())["rows"] == 20


def test_of_equal_scores_the_least_surprised_is_kept(tmp_path):
    rows = data(num_validation=1)  # of one picture every CIDEr is 0
    history = train(tmp_path, dataclasses.replace(OPTIONS, epochs=6, patience=2), rows)
    assert [entry["CIDEr"] for entry in history] == [0] * len(history)
    assert len(history) > 3


@pytest.mark.parametrize("broken", ["weights", "std"])
def test_a_captioner_that_cannot_count_is_not_loaded(tmp_path, broken):
    train(tmp_path, dataclasses.replace(OPTIONS, epochs=1))
    if broken == "weights":
        tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
        tensors["decoder.bias"][3] = float("nan")
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    else:
        config = json.loads((tmp_path / "config.json").read_bytes())
        config["encoder"]["std"] = [0, 0, 0]
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"cannot be used: .*(not finite|divided by 0)"):
        Captioner.load(str(tmp_path), CaptionOptions(), "cpu", "cnn-lstm")
