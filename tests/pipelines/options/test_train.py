import argparse
import dataclasses
import re
from typing import Any

import pytest

from diptych.models.training.options import CaptionerTraining, GanTraining, VaeTraining, Word2VecTraining
from diptych.pipelines.options.train import RowSource, TrainOptions, add_train_flags, train_options
from diptych.transforms.errors import OptionError
from diptych.transforms.sources.base import ColumnNames
from diptych.transforms.sources.open import SourceOptions


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    add_train_flags(made)
    return made


def parse(model: str, *flags: str) -> TrainOptions:
    return train_options(parser().parse_args([model, "--input", "a", "--output", "b", *flags]))


def actions(model: str) -> list[argparse.Action]:
    (models,) = [action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return models.choices[model]._actions


class TestFlags:
    def test_defaults_are_those_of_the_classes(self):
        assert parse("captioner") == TrainOptions(RowSource(("a",)), "b", CaptionerTraining())
        assert parse("word2vec") == TrainOptions(RowSource(("a",)), "b", Word2VecTraining())

    @pytest.mark.parametrize(
        ("model", "kind", "missing"),
        [
            ("captioner", CaptionerTraining, set()),
            ("word2vec", Word2VecTraining, {"min_alpha"}),
            ("vae", VaeTraining, set()),
            ("gan", GanTraining, set()),
        ],
    )
    def test_every_option_of_a_training_has_a_flag(self, model, kind, missing):
        names = {field.name for field in dataclasses.fields(kind)}
        assert names - {action.dest for action in actions(model)} == missing

    @pytest.mark.parametrize("model", ["captioner", "word2vec", "vae", "gan"])
    def test_every_flag_says_what_it_does(self, model):
        assert [action.dest for action in actions(model) if not action.help] == []

    def test_every_flag_of_a_captioner_has_its_place(self):
        expected = CaptionerTraining(
            encoder="timm:x",
            encoder_weights="w.safetensors",
            encoder_size_px=96,
            encoder_stride_px=16,
            fine_tune=True,
            decoder="gru",
            attention=False,
            embedding_dim=1,
            hidden_dim=2,
            attention_dim=3,
            dropout=0.1,
            label_smoothing=0.2,
            min_word_count=4,
            max_words=5,
            epochs=6,
            cider_epochs=12,
            cider_learning_rate=0.5,
            cider_samples=13,
            batch_size=7,
            learning_rate=0.3,
            encoder_learning_rate=0.4,
            weight_decay=0.6,
            ema=0.7,
            patience=8,
            beam_width=9,
            max_scored=10,
            precision="bfloat16",
            captions_per_image=3,
            threads=14,
            seed=11,
            flips=True,
        )
        default, renamed = (
            CaptionerTraining(),
            {
                "encoder_size_px": "encoder_size",
                "encoder_stride_px": "encoder_stride",
                "attention": "no_attention",
            },
        )
        flags = []
        for name, value in dataclasses.asdict(expected).items():
            assert value != getattr(default, name)
            flags += [f"--{renamed.get(name, name)}"] + ([] if isinstance(value, bool) else [str(value)])
        options = parse("captioner", *flags, "--device=cuda:1", "--cache=c", "--overwrite", "--quiet")
        rest: dict[str, Any] = {"device": "cuda:1", "cache": "c", "overwrite": True, "quiet": True}
        assert options == TrainOptions(RowSource(("a",)), "b", expected, **rest)

    def test_every_flag_of_word_vectors_has_its_place(self):
        flags = (
            "--vector_size=1 --window=2 --min_count=3 --epochs=4 --cbow --negative=5 --sample=0.1 --alpha=0.2"
        )
        values = {
            "vector_size": 1,
            "window": 2,
            "min_count": 3,
            "epochs": 4,
            "skip_gram": False,
            "negative": 5,
        }
        expected = Word2VecTraining(**values, sample=0.1, alpha=0.2, patience=6, seed=7)
        assert parse("word2vec", *flags.split(), "--patience=6", "--seed=7").training == expected
        assert parse("word2vec", "--sg").training == Word2VecTraining()

    @pytest.mark.parametrize(
        ("model", "expected"),
        [
            ("vae", VaeTraining(divergence_weight=0.4, text_first=0.3, patience=14)),
            (
                "gan",
                GanTraining(generator="vae:v", discriminator_learning_rate=0.5, r1_weight=0.6, r1_every=15),
            ),
        ],
    )
    def test_every_flag_of_an_image_model_has_its_place(self, model, expected):
        expected = dataclasses.replace(
            expected,
            text_model="bert:t",
            size_px=96,
            latent_dim=1,
            condition_dim=2,
            channels=3,
            max_channels=4,
            epochs=5,
            batch_size=6,
            learning_rate=0.7,
            ema=0.8,
            precision="float32",
            threads=9,
            seed=10,
            flips=True,
        )
        flags = []
        for name, value in dataclasses.asdict(expected).items():
            assert value != getattr(type(expected)(), name)
            flags += [f"--{name.removesuffix('_px')}"] + ([] if value is True else [str(value)])
        options = parse(model, *flags, "--device=cpu", "--cache=c")
        assert options == TrainOptions(RowSource(("a",)), "b", expected, device="cpu", cache="c")
        assert parse(model, "--text_model=word2vec:w").training == type(expected)(text_model="word2vec:w")

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (
                ["--text_model=gan:x"],
                "--text_model is 'gan:x'. It must be KIND:LOC, of kind word2vec or bert",
            ),
            (["--text_model=bert:"], "--text_model is 'bert:'"),
            (["--size=65"], "--size is 65. It must be another: the side must be 4, 5, 6 or 7, doubled"),
            (["--batch_size=1"], "--batch_size is 1. It must be at least 2"),
            (["--generator=bert:x"], "--generator is 'bert:x'. It must be KIND:LOC, of kind vae or gan"),
            (["--r1_weight=nan"], "--r1_weight is nan"),
            (["--r1_every=0"], "--r1_every is 0"),
            (["--learning_rate=0"], "--learning_rate is 0.0"),
            (["--discriminator_learning_rate=-1"], "--discriminator_learning_rate is -1.0"),
            (["--ema=1"], "--ema is 1.0"),
            (["--channels=0"], "--channels is 0"),
        ],
    )
    def test_what_an_image_model_cannot_be(self, flags, message):
        with pytest.raises(OptionError, match=re.escape(message)):
            parse("gan", "--text_model=word2vec:w", *flags)

    def test_flags_of_the_other_model_are_unknown(self):
        assert parser().parse_known_args(["word2vec", "--input=a", "--output=b", "--fine_tune"])[1] == [
            "--fine_tune"
        ]
        assert parser().parse_known_args(["captioner", "--input=a", "--output=b", "--cbow"])[1] == ["--cbow"]


class TestRowsToValidateBy:
    def test_another_split_of_the_same_file(self):
        options = parse(
            "captioner", "--images=d", "--split=train", "--validation_split=val", "--format=karpathy"
        )
        assert options.rows == RowSource(("a",), "karpathy", SourceOptions("d", "train"))
        assert options.validation == RowSource(("a",), "karpathy", SourceOptions("d", "val"))

    def test_another_file_has_images_of_its_own(self):
        options = parse("captioner", "--images=d", "--validation=v", "--validation=w", "--caption_column=c")
        assert options.validation == RowSource(
            ("v", "w"), "auto", SourceOptions(columns=ColumnNames(caption="c"))
        )
        options = parse("captioner", "--images=d", "--validation=v", "--validation_images=e")
        assert options.validation == RowSource(("v",), "auto", SourceOptions("e"))

    def test_a_share(self):
        options = parse("captioner", "--validation_share=0.2")
        assert (options.validation, options.validation_share) == (None, 0.2)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("--validation=a", r"rows to validate by are those to train on"),
            ("--split=val --validation_split=val", r"rows to validate by are those to train on"),
            ("--validation=v --validation_share=0.1", r"--validation_share 0.1 holds rows of --input out"),
            (
                "--validation_images=e",
                r"--validation_images e are the images of --validation, which is not given",
            ),
        ],
    )
    def test_contradictions(self, flags, message):
        with pytest.raises(OptionError, match=message):
            parse("captioner", *flags.split())


class TestBounds:
    @pytest.mark.parametrize(
        "flag", ["--validation_share=0", "--validation_share=1", "--validation_share=nan"]
    )
    def test_share(self, flag):
        with pytest.raises(OptionError, match=r"--validation_share is .*between 0 and 1"):
            parse("word2vec", flag)

    @pytest.mark.parametrize(
        "flag",
        [
            *(
                "--embedding_dim=0",
                "--hidden_dim=0",
                "--attention_dim=0",
                "--min_word_count=0",
                "--max_words=0",
            ),
            *(
                "--epochs=0",
                "--batch_size=0",
                "--patience=0",
                "--beam_width=0",
                "--max_scored=0",
                "--seed=-1",
            ),
            *(
                "--learning_rate=0",
                "--learning_rate=inf",
                "--encoder_learning_rate=-1",
                "--dropout=1",
                "--ema=1",
            ),
            *(
                "--label_smoothing=-0.1",
                "--weight_decay=-1",
                "--encoder_size=16",
                "--encoder_size=5000",
                "--encoder_stride=-1",
            ),
            *("--cider_epochs=-1", "--cider_samples=1", "--cider_learning_rate=0"),
            "--threads=-1",
            *(
                "--encoder= ",
                "--encoder_weights= ",
                "--encoder_weights=none",
                "--device=gpu",
                "--device=cuda:x",
            ),
            *(
                "--cache= ",
                "--cache=gs://b/c",
                "--output= ",
                "--input= ",
                "--validation= ",
                "--seed=4294967296",
            ),
        ],
    )
    def test_captioner(self, flag):
        with pytest.raises(OptionError, match=f"^{flag.split('=')[0]} is .* It must be "):
            parse("captioner", flag)

    @pytest.mark.parametrize(
        "flag", ["--vector_size=0", "--epochs=0", "--negative=0", "--seed=-1", "--sample=-1"]
    )
    def test_word_vectors(self, flag):
        with pytest.raises(OptionError, match=f"^{flag.split('=')[0]} is "):
            parse("word2vec", flag)

    def test_random_weights_that_are_trained(self):
        assert parse("captioner", "--encoder_weights=none", "--fine_tune").training.encoder_weights == "none"
