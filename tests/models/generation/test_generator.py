import dataclasses
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from diptych.models.generation.gan import Discriminator, discriminator_loss, r1_penalty
from diptych.models.generation.generator import (
    Generator,
    GeneratorConfig,
    Trunk,
    from_pixels,
    is_size,
    to_pixels,
)
from diptych.models.generation.vae import ElboTerms, Vae, squared_bands, vae_loss
from diptych.models.training.image_objectives import GanObjective, ImageSplits
from diptych.models.training.options import GanTraining

CONFIG = GeneratorConfig(size_px=32, text_dim=6, latent_dim=8, condition_dim=10, channels=4, max_channels=12)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs(num=3, config=CONFIG):
    side = config.size_px
    return (
        torch.rand(num, 3, side, side) * 2 - 1,
        torch.randn(num, config.text_dim),
        torch.randn(num, config.latent_dim),
    )


class TestShape:
    @pytest.mark.parametrize(
        ("size_px", "grids"),
        [(16, [4, 8]), (64, [4, 8, 16, 32]), (96, [6, 12, 24, 48]), (224, [7, 14, 28, 56, 112])],
    )
    def test_grids_double_up_to_half_the_side(self, size_px, grids):
        config = dataclasses.replace(CONFIG, size_px=size_px)
        assert config.grids == grids
        images, texts, noise = inputs(2, config)
        assert Generator(config)(texts, noise).shape == images.shape
        assert Trunk(config, spectral=False)(images).shape[2:] == (grids[0], grids[0])

    def test_channels_double_up_to_the_most(self):
        assert [CONFIG.channels_at(side) for side in CONFIG.grids] == [12, 8, 4]

    @pytest.mark.parametrize("size_px", [0, 1, 4, 8, 14, 63, 100, 225])
    def test_no_other_side(self, size_px):
        assert not is_size(size_px)
        with pytest.raises(ValueError, match=f"images of {size_px} px cannot be made: the side must be 4, 5"):
            dataclasses.replace(CONFIG, size_px=size_px)

    def test_pixels_there_and_back(self):
        pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), np.uint8))
        assert torch.equal(to_pixels(from_pixels(pixels)), pixels)
        assert to_pixels(torch.tensor([-3.0, 3.0, 0.0]).view(1, 3, 1, 1)).flatten().tolist() == [0, 255, 128]


class TestGenerator:
    def test_text_and_noise_each_change_the_image(self):
        generator = Generator(CONFIG)
        _, texts, noise = inputs()
        image = generator(texts, noise)
        assert image.abs().max() <= 1
        assert not torch.allclose(image, generator(texts.roll(1, 0), noise))
        assert not torch.allclose(image, generator(texts, noise.roll(1, 0)))

    def test_texts_are_taken_as_they_were_spread_in_training(self):
        generator = Generator(CONFIG)
        _, texts, noise = inputs()
        wanted = generator(texts, noise)
        mixing = torch.randn(6, 6)
        generator.condition.mean.fill_(2.0)
        generator.condition.whitening.copy_(torch.linalg.inv(mixing))
        torch.testing.assert_close(generator(texts @ mixing + 2, noise), wanted, atol=1e-4, rtol=1e-4)

    def test_a_text_far_out_is_taken_to_be_less_far(self):
        generator = Generator(CONFIG)
        _, texts, noise = inputs()
        torch.testing.assert_close(generator(texts * 1e6, noise), generator(texts * 1e9, noise))

    def test_an_image_does_not_depend_on_those_beside_it(self):
        generator = Generator(CONFIG).eval()
        _, texts, noise = inputs(5)
        alone = torch.cat([generator(texts[i : i + 1], noise[i : i + 1]) for i in range(5)])
        torch.testing.assert_close(alone, generator(texts, noise))


class TestVae:
    def test_bound_of_known_values(self):
        # by hand: the divergence of N(1, e) from N(0, 1) is (1 + e - 1 - 1) / 2 a dimension
        vae = Vae(CONFIG)
        images, texts, noise = inputs()
        torch.nn.init.zeros_(vae.encoder.last.weight)
        torch.nn.init.ones_(vae.encoder.last.bias)
        bound = vae(images, texts, noise)
        assert bound.divergence.item() == pytest.approx(8 * (np.e - 1) / 2, rel=1e-5)
        made = vae.generator(texts, 1 + noise * np.exp(0.5))
        assert bound.errors.sum().item() == pytest.approx((made - images).square().mean().item(), rel=1e-5)

    def test_divergence_is_none_where_the_latent_says_nothing(self):
        vae = Vae(CONFIG)
        torch.nn.init.zeros_(vae.encoder.last.weight)
        assert vae(*inputs()).divergence.item() == 0

    def test_the_text_alone(self):
        vae = Vae(CONFIG)
        images, texts, noise = inputs()
        bound = vae(images, texts, noise, text_only=True)
        assert bound.divergence.item() == 0
        made = vae.generator(texts, noise)
        assert bound.errors.sum().item() == pytest.approx((made - images).square().mean().item(), rel=1e-5)

    def test_loss_of_known_values(self):
        # shares of 3/4, 3/16 and 1/16 of the values, whose roots are as 2√3, √3 and 1
        bound = ElboTerms(torch.tensor([0.25, 0.04, 0.01]), torch.tensor(30.0))
        logs = np.log(np.array([0.25, 0.04, 0.01]) + 127.5**-2) / 2
        error = logs @ [12**0.5, 3**0.5, 1] / (27**0.5 + 1)
        assert vae_loss(bound, 300).item() == pytest.approx(error + 0.1, rel=1e-4)
        assert vae_loss(bound, 300, 2.0).item() == pytest.approx(error + 0.2, rel=1e-4)


class TestPrior:
    PRIOR = dataclasses.replace(CONFIG, text_prior=True)

    def test_begins_as_the_standard_normal_distribution(self):
        generator = Generator(self.PRIOR)
        _, texts, noise = inputs()
        mean, log_variance = generator.prior(texts)
        assert mean.shape == log_variance.shape == (3, 8)
        assert not mean.any()
        assert not log_variance.any()
        torch.testing.assert_close(generator(texts, noise), generator.decode(texts, noise))

    def test_noise_is_scaled_and_shifted_by_the_text(self):
        generator = Generator(self.PRIOR)
        _, texts, noise = inputs()
        torch.nn.init.normal_(generator.prior.last.weight)
        mean, log_variance = generator.prior(texts)
        assert not torch.allclose(mean[0], mean[1])
        latent = mean + noise * torch.exp(log_variance / 2)
        torch.testing.assert_close(generator(texts, noise), generator.decode(texts, latent))

    def test_divergence_is_from_the_prior(self):
        # by hand: of N(1, e) from N(2, e**2), a dimension: ((1 + e) / e**2 - 1 + 2 - 1) / 2
        vae = Vae(self.PRIOR)
        for layer, value in ((vae.encoder.last, [1.0] * 16), (vae.generator.prior.last, [2.0] * 16)):
            torch.nn.init.zeros_(layer.weight)
            layer.bias.data.copy_(torch.tensor(value))
        assert vae(*inputs()).divergence.item() == pytest.approx(8 * (1 + np.e) / np.e**2 / 2, rel=1e-5)

    def test_a_gan_leaves_it_alone(self):
        generator = Generator(self.PRIOR)
        rows = mock.MagicMock(mean=torch.zeros(6), whitening=torch.eye(6))
        rows.__len__.return_value = 64
        options = GanTraining(generator="vae:x")
        splits = ImageSplits(rows, rows, Path("samples.png"))
        objective = GanObjective(generator, splits, options, torch.device("cpu"))
        before = {name: value.clone() for name, value in generator.state_dict().items()}
        images, told, _ = inputs()
        objective.learn(images, told, 0)
        changed = {
            name for name, value in generator.state_dict().items() if not torch.equal(value, before[name])
        }
        assert "condition.layers.0.weight" in changed
        assert not any(name.startswith("prior.") for name in changed)


class TestBands:
    def test_of_known_patterns(self):
        stripes = torch.tensor([1.0, -1.0]).repeat(1, 1, 8, 4)
        torch.testing.assert_close(squared_bands(stripes, 2), torch.tensor([1.0, 0.0, 0.0]))
        wide = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(1, 1, 8, 2)
        torch.testing.assert_close(squared_bands(wide, 2), torch.tensor([0.0, 1.0, 0.0]))
        torch.testing.assert_close(squared_bands(0.5 * torch.ones(1, 1, 8, 8), 2), torch.tensor([0, 0, 0.25]))

    def test_add_up_to_the_mean_square(self):
        images, _, _ = inputs()
        torch.testing.assert_close(squared_bands(images, 2).sum(), images.square().mean())


class TestGan:
    def test_hinges(self):
        real, other, fake = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0]), torch.tensor([-1.0, 0.0])
        # real: (0 + 1) / 2; other: (0 + 2) / 2; fake: (0 + 1) / 2
        assert discriminator_loss(real, other, fake).item() == pytest.approx(0.5 + (1.0 + 0.5) / 2)

    def test_penalty_is_the_squared_gradient(self):
        images = torch.randn(2, 3, 4, 4, requires_grad=True)
        verdicts = (images * torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)).sum([1, 2, 3])
        assert r1_penalty(verdicts, images).item() == pytest.approx((48 * 1 + 48 * 4) / 2)

    def test_verdicts_know_the_text(self):
        discriminator = Discriminator(CONFIG)
        images, texts, _ = inputs()
        grid = discriminator.features(images)
        assert discriminator.score(grid, texts).shape == (3,)
        assert not torch.allclose(
            discriminator.score(grid, texts), discriminator.score(grid, texts.roll(1, 0))
        )

    def test_layers_are_bounded_by_their_spectral_norm(self):
        discriminator = Discriminator(CONFIG).train()
        with torch.no_grad():
            for parameter in discriminator.trunk.parameters():
                parameter.mul_(50)
        images, _, _ = inputs(8)
        for _ in range(50):  # power iterations
            discriminator.features(images)
        discriminator.eval()
        for layer in (discriminator.trunk.first, discriminator.trunk.blocks[0].conv2):
            norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item()
            assert norm == pytest.approx(1, abs=0.05)
