"""Tiny pipelines of diffusers, saved, and loaded by the code that loads the large ones."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import pre_tokenizers

from diptych.models.base import ImageOptions, Prompt
from diptych.models.errors import ModelError, ModelOptionError
from diptych.models.generation.diffusion import DiffusionPipeline

diffusers = pytest.importorskip("diffusers")

STEPS = (("num_inference_steps", 2),)
PROMPTS = [Prompt("a red square", 2**64 - 1), Prompt("ein blauer Kreis 🦓", 5), Prompt("", 2**40)]


def save_tokenizer(folder):
    """CLIP's tokenizer, of single bytes."""
    folder.mkdir(parents=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16
    )
    tokenizer.save_pretrained(folder)
    return tokenizer, len(tokens)


def tiny_pipeline(folder):
    torch.manual_seed(0)
    tokenizer, num_tokens = save_tokenizer(folder / "made")
    text = transformers.CLIPTextConfig(
        vocab_size=num_tokens,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=num_tokens - 2,
        eos_token_id=num_tokens - 1,
        pad_token_id=num_tokens - 1,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers")
    tiny_pipeline(folder).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture
def folder(saved, tmp_path):
    """A copy, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "pipeline"))


def load(folder, settings=STEPS, **options):
    return DiffusionPipeline.load(str(folder), ImageOptions(settings=settings, **options), "cpu")


def draw(model, prompts):
    return [model.finish(drawn) for drawn in model.predict(model.prepare(prompts))]


def pixels(image):
    return np.asarray(Image.open(io.BytesIO(image.data)))


class TestImages:
    def test_are_the_pipelines_own(self, saved):
        ours = draw(load(saved), PROMPTS)
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(saved)
        pipeline.set_progress_bar_config(disable=True)
        for image, prompt in zip(ours, PROMPTS, strict=True):
            generator = torch.Generator().manual_seed(prompt.seed)
            (theirs,) = pipeline(prompt.text, generator=generator, num_inference_steps=2).images
            assert theirs.size == (16, 16)
            difference = np.abs(pixels(image).astype(int) - np.asarray(theirs))
            assert difference.max() <= 1  # theirs alone, ours in a batch
        alone = draw(load(saved), PROMPTS[:1])[0]
        generator = torch.Generator().manual_seed(PROMPTS[0].seed)
        (theirs,) = pipeline(PROMPTS[0].text, generator=generator, num_inference_steps=2).images
        assert np.array_equal(pixels(alone), np.asarray(theirs))

    def test_settings_are_passed_on(self, saved):
        plain = draw(load(saved), PROMPTS[:1])[0].data
        assert draw(load(saved), PROMPTS[:1])[0].data == plain
        guided = (*STEPS, ("guidance_scale", 1.0))
        assert draw(load(saved, guided), PROMPTS[:1])[0].data != plain
        assert draw(load(saved, (("num_inference_steps", 3),)), PROMPTS[:1])[0].data != plain

    def test_a_negative_prompt_is_that_of_each(self, saved):
        plain = [image.data for image in draw(load(saved), PROMPTS)]
        told = [image.data for image in draw(load(saved, (*STEPS, ("negative_prompt", "blurry"))), PROMPTS)]
        assert all(one != other for one, other in zip(plain, told, strict=True))

    def test_size(self, saved):
        assert load(saved).size_px == (16, 16)
        assert pixels(draw(load(saved, size_px=24), PROMPTS[:1])[0]).shape == (24, 24, 3)
        with pytest.raises(
            ModelOptionError, match=r"`size` is 23. StableDiffusionPipeline makes .* multiple of 2 px"
        ):
            load(saved, size_px=23)

    def test_what_the_safety_checker_blanked_is_no_image_to_keep(self, saved, monkeypatch):
        model = load(saved)
        call = type(model._pipeline).__call__

        def flag(self, **arguments):
            found = call(self, **arguments)
            return type(found)(found.images, [i == 1 for i in range(len(found.images))])

        monkeypatch.setattr(type(model._pipeline), "__call__", flag)
        assert [image.fault for image in draw(model, PROMPTS)] == [None, "flagged", None]

    def test_nothing_is_printed(self, saved, capfd):
        draw(load(saved), PROMPTS[:1])
        assert capfd.readouterr() == ("", "")


class TestWhatCannotBe:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                "num_images_per_prompt",
                "Setting 'num_images_per_prompt' of `setting` is `images_per_prompt` here",
            ),
            ("height", "Setting 'height' of `setting` is `size` here"),
            ("generator", "`setting` generator: StableDiffusionPipeline takes no such setting"),
            ("guidance", "`setting` guidance: StableDiffusionPipeline takes no such setting"),
        ],
    )
    def test_settings(self, saved, name, message):
        with pytest.raises(ModelOptionError, match=message):
            load(saved, ((name, 1),))

    def test_no_pipeline(self, tmp_path):
        with pytest.raises(ModelError, match=r"holds no model_index.json. Expected a text-to-image pipeline"):
            load(tmp_path)

    def test_pickles_alone(self, folder):
        (folder / "unet/diffusion_pytorch_model.safetensors").rename(
            folder / "unet/diffusion_pytorch_model.bin"
        )
        with pytest.raises(ModelError, match="holds the weights of unet as pickles alone"):
            load(folder)

    def test_a_part_that_is_missing(self, folder):
        shutil.rmtree(folder / "vae")
        with pytest.raises(ModelError, match="holds no pipeline that can be loaded: "):
            load(folder)

    def test_a_pipeline_of_another_task(self, folder):
        index = json.loads((folder / "model_index.json").read_bytes())
        (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "DDPMPipeline"}))
        with pytest.raises(ModelError, match="holds no pipeline that can be loaded: ValueError"):
            load(folder)

    def test_without_the_package(self, saved, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
        with pytest.raises(ModelError, match=r"pip install 'diptych\[diffusers\]'"):
            load(saved)


def test_options_are_part_of_the_digest(saved):
    assert load(saved).digest == load(saved).digest
    assert load(saved).digest != load(saved, (("num_inference_steps", 3),)).digest
