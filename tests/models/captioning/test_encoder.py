import pytest
import timm
import torch
import torchvision

from diptych.models.captioning.encoder import create_encoder, load_weights, restore_encoder
from diptych.models.errors import ModelError

PIXELS = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "stride", "regions", "dim"),
    [
        ("resnet18", 0, 4, 512),
        ("resnet18", 16, 16, 256),
        ("resnet18", 4, 256, 64),
        ("squeezenet1_1", 16, 9, 512),
        ("mobilenet_v3_small", 16, 16, 48),
        ("timm:tf_efficientnet_lite0", 0, 4, 1280),
        ("timm:tf_efficientnet_lite0", 16, 16, 112),
        ("timm:test_resnet", 8, 64, 48),
    ],
)
def test_regions(name, stride, regions, dim):
    encoder = create_encoder(name, 64, stride).eval()
    assert (encoder.num_regions, encoder.dim) == (regions, dim)
    with torch.inference_mode():
        found = encoder(PIXELS)
        again = restore_encoder(encoder.config).eval()
        again.load_state_dict(encoder.state_dict())
        assert torch.equal(again(PIXELS), found)
    assert found.shape == (2, regions, dim)


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_strides_of_timm_are_its_own_features(stride):
    torch.manual_seed(0)
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    encoder = create_encoder("timm:tf_efficientnet_lite0", 64, stride).eval()
    load_weights(encoder, whole.state_dict(), "memory")
    normalised = (PIXELS - encoder.mean) / encoder.std
    with torch.inference_mode():
        grids = whole.forward_intermediates(normalised, intermediates_only=True)
        (expected,) = (grid for grid in grids if grid.shape[-1] == 64 // stride)
        assert torch.allclose(encoder(PIXELS), expected.flatten(2).transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize(("stride", "last"), [(0, "layer4"), (32, "layer4"), (16, "layer3"), (8, "layer2")])
def test_strides_of_resnet_are_its_stages(stride, last):
    torch.manual_seed(0)
    whole = torchvision.models.resnet18().eval()
    encoder = create_encoder("resnet18", 64, stride).eval()
    load_weights(encoder, whole.state_dict(), "memory")
    grids = {}
    getattr(whole, last).register_forward_hook(lambda module, args, grid: grids.update(found=grid))
    with torch.inference_mode():
        whole((PIXELS - encoder.mean) / encoder.std)
        # values reach 10, and processors add up in different orders
        assert torch.allclose(encoder(PIXELS), grids["found"].flatten(2).transpose(1, 2), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "known"), [("resnet18", "2, 4, 8, 16, 32"), ("timm:tf_efficientnet_lite0", "2, 4, 8, 16, 32")]
)
def test_a_stride_that_is_not_there(name, known):
    with pytest.raises(ModelError, match=f"every 12 pixels. Expected `encoder_stride` of {known}, or none"):
        create_encoder(name, 64, 12)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("resnet19", "torchvision has no network 'resnet19'"),
        ("timm:resnet19", "timm has no network 'resnet19'"),
        ("keras:resnet18", "of no known library"),
        ("vit_b_16", "no grid of features"),
    ],
)
def test_an_encoder_that_is_not_there(name, match):
    with pytest.raises(ModelError, match=match):
        create_encoder(name, 224)


def test_weights_of_another_network():
    encoder = create_encoder("resnet18", 64)
    with pytest.raises(ModelError, match=r"does not fit the encoder resnet18: .* have another shape"):
        load_weights(encoder, torchvision.models.resnet50().state_dict(), "file")


class _Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize("content", [_Evil(), {"conv1.weight": torch.zeros(2)}, "text"])
def test_what_lies_in_the_cache_of_weights_is_not_run(tmp_path, monkeypatch, content):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub/checkpoints/resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    torch.save(content, path)
    with pytest.raises(ModelError, match="the ImageNet weights of resnet18 cannot be had"):
        create_encoder("resnet18", 64, pretrained=True)
