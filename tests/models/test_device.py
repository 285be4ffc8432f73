import contextlib

import pytest
import torch

from diptych.models.device import choose_device, half_precision
from diptych.models.errors import ModelError


def test_auto_is_the_cpu_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


def test_auto_is_the_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ModelError, match=r"cuda:2 is not there.*0 to 1"):
        choose_device("cuda:2")


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:3"):
        with pytest.raises(ModelError, match=f"{name} is not there.*`device` auto"):
            choose_device(name)


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "cpu:0"])
def test_a_name_that_says_nothing(name):
    with pytest.raises(ModelError, match="auto, cpu, cuda or cuda:N"):
        choose_device(name)


def test_the_cpu_keeps_full_precision():
    assert isinstance(half_precision(torch.device("cpu")), contextlib.nullcontext)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_half_precision_on_a_gpu():
    left = torch.ones(2, 2, device="cuda")
    with half_precision(left.device):
        assert (left @ left).dtype in (torch.bfloat16, torch.float16)
