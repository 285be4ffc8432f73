import numpy as np
import pytest
import safetensors.torch
import scipy.linalg
import torch

from diptych.models.captioning.encoder import create_encoder
from diptych.models.errors import ModelError
from diptych.models.metrics.image_scores import Distances, Features, pairwise_distances


def fid(left, right):
    """Heusel et al. 2017, equation 6, with scipy's square root of a matrix."""
    means = [features.mean(0) for features in (left, right)]
    covariances = [np.cov(features, rowvar=False) for features in (left, right)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return ((means[0] - means[1]) ** 2).sum() + np.trace(sum(covariances) - 2 * root)


def kid(left, right):
    """Binkowski et al. 2018, section 4: the unbiased squared MMD of the cubic polynomial kernel, of all images."""
    dim = left.shape[1]
    of = lambda a, b: (a @ b.T / dim + 1) ** 3  # noqa: E731
    n, m = len(left), len(right)
    inside = [(of(x, x).sum() - np.trace(of(x, x))) / (len(x) * (len(x) - 1)) for x in (left, right)]
    return sum(inside) - 2 * of(left, right).sum() / (n * m)


def draw(seed, num, shift=0.0):
    return np.random.default_rng(seed).standard_normal((num, 6)) * np.arange(1, 7) + shift


def distances(made, real, step=7):
    found = Distances(6)
    for features, is_real in ((made, False), (real, True)):
        for start in range(0, len(features), step):
            found.add(torch.from_numpy(features[start : start + step]).float(), real=is_real)
    return found


class TestDistances:
    @pytest.mark.parametrize("shift", [0.0, 1.5])
    def test_fid_is_that_of_the_formula(self, shift):
        made, real = draw(0, 300, shift), draw(1, 400)
        assert distances(made, real).scores()["fid"] == pytest.approx(fid(made, real), rel=1e-3)

    def test_kid_is_that_of_the_formula(self):
        made, real = draw(0, 60, 1.0), draw(1, 60)
        scores = distances(made, real).scores()
        assert scores["kid"] == pytest.approx(kid(made, real), rel=1e-3)  # subsets of all images
        assert scores["kid_std"] == pytest.approx(0, abs=abs(scores["kid"]) * 1e-3)

    def test_the_same_images_are_at_no_distance(self):
        made = draw(0, 200)
        assert distances(made, made).scores()["fid"] == pytest.approx(0, abs=1e-3)

    def test_parts_and_calls_change_nothing(self):
        made, real = draw(0, 90, 1.0), draw(1, 100)
        torch.manual_seed(5)
        state = torch.get_rng_state()
        one, other = distances(made, real, 7).scores(), distances(made, real, 50).scores()
        assert one == pytest.approx(other, rel=1e-4)
        assert torch.equal(torch.get_rng_state(), state)

    def test_counts(self):
        assert distances(draw(0, 30), draw(1, 40)).counts == {False: 30, True: 40}

    @pytest.mark.parametrize("num", [0, 1])
    def test_too_few(self, num):
        with pytest.raises(ModelError, match=f"there are {num} made and 40 real images"):
            distances(draw(0, num), draw(1, 40)).scores()


class TestFeatures:
    @pytest.fixture
    def weights(self, tmp_path):
        torch.manual_seed(0)
        state = create_encoder("timm:test_resnet", 224).network.state_dict()
        tensors = {name: value.clone().contiguous() for name, value in state.items()}
        safetensors.torch.save_file(tensors, tmp_path / "weights.safetensors")
        return str(tmp_path / "weights.safetensors")

    def test_are_the_pooled_vectors_of_the_network(self, weights):
        features = Features.load("timm:test_resnet", weights, "cpu")
        pixels = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), np.uint8)
        found = features(pixels)
        assert found.shape == (3, features.dim)
        encoder = create_encoder("timm:test_resnet", 224)
        encoder.network.load_state_dict(safetensors.torch.load_file(weights))
        with torch.inference_mode():
            wanted = encoder.eval()(torch.from_numpy(pixels).permute(0, 3, 1, 2)).mean(1)
        torch.testing.assert_close(found, wanted)
        assert features.name.startswith("timm:test_resnet (")

    def test_inception_that_cannot_be_had(self, monkeypatch):
        from torchmetrics.image import fid as module

        monkeypatch.setattr(module, "_TORCH_FIDELITY_AVAILABLE", False)
        with pytest.raises(
            ModelError, match=r"cannot be had \(ModuleNotFoundError: .* name other `features`"
        ):
            Features.load("inception", "imagenet", "cpu")


def test_pairwise_distances_by_hand():
    pixels = np.zeros((3, 2, 2, 3), np.uint8)
    pixels[1] = 255
    features = torch.tensor([[1.0, 0], [2.0, 0], [0, 5.0]])
    # pairs: (0, 1), (0, 2), (1, 2)
    assert pairwise_distances(pixels, features) == pytest.approx(((1 + 0 + 1) / 3, (0 + 1 + 1) / 3))
