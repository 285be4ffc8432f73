import copy
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from diptych.models.errors import ModelError
from diptych.models.training.checkpoint import Checkpoints, flatten_optimizer, restore_optimizer

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "rng": torch.arange(5, dtype=torch.uint8)}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestCheckpoints:
    def test_gives_back_what_was_saved(self, tmp_path):
        state = {"best": float("inf"), "third": 1 / 3, "big": 2**90, "words": ["à", "b"], "none": None}
        Checkpoints(tmp_path / "new" / "folder").save(7, TENSORS, state)
        found = Checkpoints(tmp_path / "new" / "folder").latest()
        assert found is not None
        assert found.step == 7
        assert found.state == state
        assert found.tensors.keys() == TENSORS.keys()
        assert all(torch.equal(found.tensors[name], TENSORS[name]) for name in TENSORS)
        assert found.tensors["rng"].dtype == torch.uint8

    def test_there_is_none(self, tmp_path):
        assert Checkpoints(tmp_path / "nowhere").latest() is None

    def test_keeps_only_the_last(self, tmp_path):
        checkpoints = Checkpoints(tmp_path)
        for step in range(3):
            checkpoints.save(step, TENSORS, {})
        assert files(tmp_path) == ["_checkpoint.safetensors"]
        assert checkpoints.latest().step == 2

    def test_tensors_that_share_memory_or_are_views(self, tmp_path):
        whole = torch.arange(12.0).reshape(3, 4)
        tensors = {"tied": whole, "same": whole, "turned": whole.T, "part": whole[:, 1]}
        Checkpoints(tmp_path).save(1, tensors, {})
        found = Checkpoints(tmp_path).latest().tensors
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)

    def test_what_is_read_does_not_change_with_the_file(self, tmp_path):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, {"a": torch.zeros(1000)}, {})
        found = checkpoints.latest()
        found.tensors["a"].add_(5)
        assert checkpoints.latest().tensors["a"].sum() == 0
        checkpoints.save(2, {"a": torch.ones(1000)}, {})
        assert found.tensors["a"].sum() == 5000

    @pytest.mark.parametrize("kept", [0, 4, 50, -1])
    def test_a_file_cut_short_is_no_checkpoint(self, tmp_path, kept):
        Checkpoints(tmp_path).save(1, TENSORS, {})
        path = tmp_path / "_checkpoint.safetensors"
        path.write_bytes(path.read_bytes()[:kept])
        assert Checkpoints(tmp_path).latest() is None

    def test_a_half_written_file_is_ignored_and_goes_away(self, tmp_path):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, TENSORS, {})
        (tmp_path / "._checkpoint.safetensors.tmp").write_bytes(b"half")
        assert checkpoints.latest().step == 1
        checkpoints.save(2, TENSORS, {})
        assert files(tmp_path) == ["_checkpoint.safetensors"]

    def test_a_file_of_something_else_is_no_checkpoint(self, tmp_path):
        safetensors.torch.save_file(TENSORS, tmp_path / "_checkpoint.safetensors")
        assert Checkpoints(tmp_path).latest() is None

    def test_a_failing_write_leaves_the_one_before(self, tmp_path, monkeypatch):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, TENSORS, {})

        def full(*_):
            raise OSError(28, "No space left on device")

        for name in ("fsync", "replace"):
            with monkeypatch.context() as patch:
                patch.setattr(os, name, full)
                with pytest.raises(
                    ModelError, match=r"checkpoint.safetensors cannot be written: No space left"
                ):
                    checkpoints.save(2, TENSORS, {})
            assert files(tmp_path) == ["_checkpoint.safetensors"]
            assert checkpoints.latest().step == 1

    def test_full_disk_as_the_writer_meets_it(self, tmp_path):
        code = (
            "import resource, signal, sys, torch; from pathlib import Path\n"
            "from diptych.models.training.checkpoint import Checkpoints\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "checkpoints = Checkpoints(Path(sys.argv[1]))\n"
            "checkpoints.save(1, {}, {})\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
            "checkpoints.save(2, {'a': torch.zeros(10_000)}, {})\n"
        )
        run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
        assert "diptych.models.errors.ModelError" in run.stderr
        assert "checkpoint.safetensors cannot be written: " in run.stderr
        assert files(tmp_path) == ["_checkpoint.safetensors"]
        assert Checkpoints(tmp_path).latest().step == 1

    def test_folder_is_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(ModelError, match=r"cannot be written: (File exists|Not a directory)"):
            Checkpoints(tmp_path / "file").save(1, TENSORS, {})
        assert Checkpoints(tmp_path / "file").latest() is None

    def test_killed_at_any_instant_there_is_a_whole_one(self, tmp_path):
        code = (
            "import sys, torch; from pathlib import Path; from diptych.models.training.checkpoint import Checkpoints\n"
            "checkpoints = Checkpoints(Path(sys.argv[1]))\n"
            "for step in range(1, 10**9):\n"
            "    checkpoints.save(step, {'a': torch.full((100_000,), float(step))}, {'step': step})\n"
            "    print(step, flush=True)\n"
        )
        with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
            lines = list(itertools.islice(process.stdout, 20))
            process.send_signal(signal.SIGKILL)
        found = Checkpoints(tmp_path).latest()
        assert found.step >= len(lines)
        assert found.state == {"step": found.step}
        assert torch.equal(found.tensors["a"], torch.full((100_000,), float(found.step)))


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    first, last = model[0], model[2]
    groups = [{"params": first.parameters(), "lr": 3e-3}, {"params": last.parameters(), "weight_decay": 0.1}]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), amsgrad=True)


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(inputs) ** 2).mean().backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9


class TestOptimizer:
    @pytest.mark.parametrize("make", [adamw, sgd])
    @pytest.mark.parametrize("stop", [0, 1, 5])
    def test_training_on_after_a_restore_is_as_undisturbed(self, tmp_path, make, stop):
        whole = network()
        optimizer = make(whole)
        train(whole, optimizer, range(10))

        half = network()
        before = make(half)
        train(half, before, range(stop))
        tensors, state = flatten_optimizer(before)
        Checkpoints(tmp_path).save(stop, {**half.state_dict(), **tensors}, state)

        found = Checkpoints(tmp_path).latest()
        other = network()
        other.load_state_dict({name: found.tensors[name] for name in other.state_dict()})
        after = make(other)
        restore_optimizer(after, found.tensors, found.state)
        assert after.state_dict()["param_groups"] == before.state_dict()["param_groups"]
        train(other, after, range(stop, 10))

        for ours, theirs in zip(other.parameters(), whole.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        for index, values in optimizer.state_dict()["state"].items():
            for name, value in values.items():
                assert torch.equal(
                    torch.as_tensor(after.state_dict()["state"][index][name]), torch.as_tensor(value)
                )

    def test_values_that_are_tensors_in_a_group(self):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01))
        tensors, state = flatten_optimizer(optimizer)
        assert "optimizer.groups.0.lr" in tensors
        restore_optimizer(optimizer, copy.deepcopy(tensors), state)
        assert optimizer.param_groups[0]["lr"] == torch.tensor(0.01)

    def test_of_other_parameters(self):
        model = network()
        optimizer = adamw(model)
        train(model, optimizer, range(1))
        tensors, state = flatten_optimizer(optimizer)
        smaller = torch.optim.AdamW(torch.nn.Linear(4, 8).parameters())
        wider = adamw(torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2)))
        for other in (smaller, wider):
            with pytest.raises(ModelError, match=r"does not fit this model \(.*delete the checkpoint"):
                restore_optimizer(other, tensors, state)

    def test_without_a_state(self):
        with pytest.raises(ModelError, match="does not fit"):
            restore_optimizer(adamw(network()), {}, {})
