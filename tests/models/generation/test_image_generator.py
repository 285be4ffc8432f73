import dataclasses
import io
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from diptych.models.base import ImageOptions, Prompt, TextOptions
from diptych.models.errors import ModelError, ModelOptionError
from diptych.models.generation.generator import Generator, GeneratorConfig
from diptych.models.generation.image_generator import (
    ImageGenerator,
    draw_noise,
    encode_pixels,
    save_generator,
)
from diptych.models.text.text_model import TextModelRef
from diptych.models.text.word2vec import Word2Vec

WORDS = ["red", "blue", "square", "circle"]
CONFIG = GeneratorConfig(size_px=16, text_dim=3, latent_dim=5, condition_dim=6, channels=4)


def save_text(folder, seed=0):
    folder.mkdir(exist_ok=True)
    vectors = np.random.default_rng(seed).standard_normal((len(WORDS), 3)).astype(np.float32)
    Word2Vec(WORDS, vectors).save(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    return save_text(tmp_path / "words")


@pytest.fixture
def folder(tmp_path, text):
    torch.manual_seed(0)
    generator = Generator(CONFIG)
    with torch.no_grad():
        generator.last.weight.mul_(20)  # pictures that differ
    source = TextModelRef.of(
        f"word2vec:{text}", TextOptions(), Word2Vec.load(str(text), TextOptions()).digest
    )
    save_generator(tmp_path / "model", "gan", generator, source)
    return tmp_path / "model"


def load(folder, kind="gan", **options):
    return ImageGenerator.load(str(folder), ImageOptions(**options), "cpu", kind)


def draw(model, prompts):
    return [model.finish(drawn) for drawn in model.predict(model.prepare(prompts))]


def pixels(image):
    return np.asarray(Image.open(io.BytesIO(image.data)))


PROMPTS = [Prompt(f"a {WORDS[i % 2]} {WORDS[2 + i % 2]}", 2**64 - 1 - i * 2**40) for i in range(7)]


class TestImages:
    def test_are_those_of_the_network(self, folder, text):
        model = load(folder)
        found = draw(model, PROMPTS)
        assert model.size_px == (16, 16)
        generator = Generator(CONFIG)
        generator.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
        words = Word2Vec.load(str(text), TextOptions())
        vectors = words.predict(words.prepare([prompt.text for prompt in PROMPTS]))
        noise = np.stack([draw_noise(prompt.seed, 5) for prompt in PROMPTS])
        with torch.inference_mode():
            images = generator(
                torch.from_numpy(np.stack([v.values for v in vectors])), torch.from_numpy(noise)
            )
        wanted = ((images + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
        assert np.abs(np.stack(list(map(pixels, found))) - wanted).max() == 0

    def test_batch_and_order_change_nothing(self, folder):
        model = load(folder)
        together = [pixels(image).astype(int) for image in draw(model, PROMPTS)]
        alone = [pixels(draw(model, [prompt])[0]).astype(int) for prompt in PROMPTS]
        backwards = [pixels(image).astype(int) for image in draw(model, PROMPTS[::-1])][::-1]
        assert max(np.abs(a - b).max() for a, b in zip(together, alone, strict=True)) == 0
        assert max(np.abs(a - b).max() for a, b in zip(together, backwards, strict=True)) == 0

    def test_seed_and_text_each_change_the_image(self, folder):
        model = load(folder)
        one, seed, words = draw(
            model, [Prompt("red square", 1), Prompt("red square", 2), Prompt("blue square", 1)]
        )
        assert one.data != seed.data
        assert one.data != words.data
        assert one.data == draw(model, [Prompt("red square", 1)])[0].data

    def test_format(self, folder):
        png, jpeg = (draw(load(folder, image_format=name), PROMPTS[:1])[0] for name in ("png", "jpeg"))
        assert [Image.open(io.BytesIO(image.data)).format for image in (png, jpeg)] == ["PNG", "JPEG"]
        assert np.abs(pixels(png).astype(int) - pixels(jpeg)).mean() < 20

    def test_png_is_exact(self):
        made = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_pixels(made, ImageOptions())))), made)

    @pytest.mark.parametrize("prompt", ["红色的圆", "", "zebra", "🦓" * 10])
    def test_a_prompt_without_a_known_word_is_no_image_to_keep(self, folder, prompt):
        assert draw(load(folder), [Prompt(prompt, 0)])[0].fault == "no_known_word"

    def test_ten_thousand_words(self, folder):
        (image,) = draw(load(folder), [Prompt("red square " * 5000, 0)])
        assert image.fault is None
        assert image.data == draw(load(folder), [Prompt("red square", 0)])[0].data  # the same mean

    def test_numbers_that_are_none_are_not_drawn(self, folder, monkeypatch):
        model = load(folder)
        monkeypatch.setattr(
            model._generator, "forward", lambda texts, noise: torch.full((1, 3, 16, 16), np.nan)
        )
        with pytest.raises(ValueError, match="not finite"):
            draw(model, PROMPTS[:1])


class TestNoise:
    def test_follows_from_the_seed_alone(self):
        assert np.array_equal(draw_noise(7, 100), draw_noise(7, 100))
        assert np.array_equal(draw_noise(7, 100)[:10], draw_noise(7, 10))
        assert not np.array_equal(draw_noise(7, 100), draw_noise(7 + 2**32, 100))  # all 64 bits count

    def test_is_standard_normal(self):
        noise = np.concatenate([draw_noise(seed, 100) for seed in range(200)])
        assert noise.dtype == np.float32
        assert abs(noise.mean()) < 0.03
        assert abs(noise.std() - 1) < 0.03


class TestWhatCannotBe:
    def test_a_gan_given_as_a_vae(self, folder):
        with pytest.raises(ModelError, match=r"is of kind 'gan'. Expected a folder with a model of kind vae"):
            load(folder, "vae")

    def test_a_size_that_it_does_not_make(self, folder):
        assert load(folder, size_px=16).size_px == (16, 16)
        with pytest.raises(ModelOptionError, match=r"`size` is 32, and this model makes images of 16 px"):
            load(folder, size_px=32)

    def test_settings_of_another_kind(self, folder):
        with pytest.raises(ModelOptionError, match="`setting` guidance_scale: these settings go with"):
            load(folder, settings=(("guidance_scale", 2.0),))

    def test_another_text_model(self, folder, text):
        other = save_text(text.parent / "other", seed=1)
        with pytest.raises(
            ModelOptionError, match=r"is another text model \(digest \w+\) than the one that this"
        ):
            load(folder, text_model=f"word2vec:{other}")

    def test_a_text_model_that_was_trained_again(self, folder, text):
        save_text(text, seed=1)
        with pytest.raises(ModelError, match=r"has changed since: its digest is \w+, and was \w+\. .* again"):
            load(folder)

    def test_a_text_model_that_is_gone(self, folder, text, tmp_path):
        shutil.move(text, tmp_path / "elsewhere")
        with pytest.raises(
            ModelError, match=r"trained with, word2vec:.*words, cannot be loaded: .* `text_model`"
        ):
            load(folder)
        moved = load(folder, text_model=f"word2vec:{tmp_path / 'elsewhere'}")
        assert draw(moved, PROMPTS[:1])[0].fault is None

    def test_where_the_text_model_lies_decides_nothing(self, folder, text, tmp_path):
        before = load(folder).digest
        shutil.copytree(text, tmp_path / "copy")
        assert load(folder, text_model=f"word2vec:{tmp_path / 'copy'}").digest == before
        assert load(folder, image_format="jpeg").digest != before

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c.pop("text"), "does not describe a generator of this version: KeyError"),
            (lambda c: c["generator"].update(size_px=17), "images of 17 px cannot be made"),
            (lambda c: c["generator"].update(colour=1), "does not describe a generator"),
            (lambda c: c["generator"].update(channels=8), "of another shape"),
            (lambda c: c["generator"].update(text_dim=4), "of another shape"),
        ],
    )
    def test_a_configuration_that_does_not_fit(self, folder, change, message):
        config = json.loads((folder / "config.json").read_bytes())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=message):
            load(folder)

    def test_weights_that_are_no_numbers(self, folder):
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        tensors["first.bias"].fill_(np.nan)
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
        with pytest.raises(ModelError, match=r"1 tensors hold numbers that are not finite \(first.bias\)"):
            load(folder)

    def test_foreign_weights(self, folder):
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        safetensors.torch.save_file({**tensors, "extra": torch.ones(1)}, folder / "model.safetensors")
        with pytest.raises(ModelError, match=r"1 foreign \(extra\)"):
            load(folder)


def test_options_are_part_of_the_digest(folder):
    digests = {
        load(folder, **dataclasses.asdict(ImageOptions(quality=quality))).digest for quality in (90, 95)
    }
    assert len(digests) == 2
