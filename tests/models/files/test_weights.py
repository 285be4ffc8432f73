import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from diptych.models.errors import ModelError
from diptych.models.files.weights import (
    load_state,
    model_digest,
    read_config,
    read_tensors,
    write_file,
    write_tensors,
)


class TestDigest:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "sub").mkdir()
        for name in ("config.json", "model.safetensors", "sub/vocab.txt"):
            (tmp_path / name).write_text(name)
        return tmp_path

    def test_it_follows_content_and_names(self, folder, tmp_path_factory):
        before = model_digest(folder)
        assert len(before) == 16
        assert int(before, 16) >= 0
        copy = tmp_path_factory.mktemp("copy") / "elsewhere"
        shutil.copytree(folder, copy)
        assert model_digest(copy) == before
        (copy / "sub" / "vocab.txt").write_text("other")
        assert model_digest(copy) != before
        (folder / "config.json").rename(folder / "configs.json")
        assert model_digest(folder) != before

    def test_what_is_beside_a_model_is_not_in_it(self, folder):
        before = model_digest(folder)
        (folder / ".cache").mkdir()
        for name in (
            "README.md",
            "model_card.json",
            "card.json",
            "curve.png",
            ".hidden",
            ".cache/a.json",
            "x.bin",
        ):
            (folder / name).write_text("x")
        assert model_digest(folder) == before

    def test_names_limit_it(self, folder):
        before = model_digest(folder, ["config.json"])
        (folder / "model.safetensors").write_text("other")
        assert model_digest(folder, ["config.json"]) == before
        with pytest.raises(ModelError, match=r"none\.json cannot be read"):
            model_digest(folder, ["none.json"])

    def test_of_a_file(self, folder):
        assert model_digest(folder / "config.json") == model_digest(folder, ["config.json"])


class TestReadConfig:
    def test_ours(self, tmp_path):
        (tmp_path / "config.json").write_text('{"kind": "word2vec", "dim": 3}')
        assert read_config(tmp_path, ("bert", "word2vec")) == {"kind": "word2vec", "dim": 3}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "holds no config.json"),
            ("{", "is damaged"),
            (b"\xff\xfe", "is damaged"),
            ("[]", "not one of Diptych's"),
            ("{}", "not one of Diptych's"),
            ('{"kind": "vae"}', "of kind 'vae'"),
            ('{"model_type": "bert"}', "a Hugging Face model of type 'bert'"),
        ],
    )
    def test_anything_else_says_what_it_is_and_what_was_asked(self, tmp_path, content, message):
        if content is not None:
            (tmp_path / "config.json").write_bytes(
                content if isinstance(content, bytes) else content.encode()
            )
        with pytest.raises(ModelError, match=message) as raised:
            read_config(tmp_path, ("word2vec",))
        assert "kind word2vec" in str(raised.value)
        assert str(tmp_path) in str(raised.value)


class TestTensors:
    def test_they_come_back(self, tmp_path):
        shared = torch.arange(6.0).reshape(2, 3)
        tensors = {"a": shared, "b": shared.T, "tied": shared, "half": shared.half(), "none": torch.zeros(0)}
        write_tensors(tmp_path / "new" / "w.safetensors", tensors)
        found = read_tensors(tmp_path / "new" / "w.safetensors")
        assert {name: tensor.dtype for name, tensor in found.items()} == {
            k: t.dtype for k, t in tensors.items()
        }
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        assert os.listdir(tmp_path / "new") == ["w.safetensors"]

    def test_a_write_that_fails_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "w.safetensors"
        write_tensors(path, {"a": torch.ones(1)})

        def fail(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(ModelError, match="No space left"):
            write_tensors(path, {"a": torch.zeros(1)})
        assert torch.equal(read_tensors(path)["a"], torch.ones(1))
        assert os.listdir(tmp_path) == ["w.safetensors"]

    def test_where_a_file_is_in_the_way(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ModelError, match="cannot be written"):
            write_file(tmp_path / "file" / "config.json", b"")

    @pytest.mark.parametrize("cut", [0, 4, 20, -1])
    def test_damage(self, tmp_path, cut):
        path = tmp_path / "w.safetensors"
        write_tensors(path, {"a": torch.ones(100)})
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(ModelError, match="no whole safetensors file"):
            read_tensors(path)

    def test_missing(self, tmp_path):
        with pytest.raises(ModelError, match=r"w\.safetensors is not there"):
            read_tensors(tmp_path / "w.safetensors")

    def test_a_pickle_says_how_to_convert_it_and_that_works(self, tmp_path):
        tied = torch.ones(2)
        torch.save({"a": tied, "b": tied}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ModelError, match="is a pickle") as raised:
            read_tensors(tmp_path / "model.safetensors")
        command = str(raised.value).partition('python -c "')[2].rstrip('"')
        subprocess.run([sys.executable, "-c", command], check=True, timeout=60)
        assert torch.equal(read_tensors(tmp_path / "model.safetensors")["b"], tied)

    def test_a_header_whose_length_begins_as_a_pickle_does(self, tmp_path):
        heads = set()
        for length in range(0, 256, 8):
            safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "w", {"x": "x" * (200 + length)})
            heads.add((tmp_path / "w").read_bytes()[0])
            assert torch.equal(read_tensors(tmp_path / "w")["a"], torch.ones(2))
        assert 0x80 in heads

    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_pickle_under_another_name(self, tmp_path, zipped):
        torch.save({"a": torch.ones(2)}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ModelError, match="is a pickle"):
            read_tensors(tmp_path / "w.pt")


class TestLoadState:
    def test_it_fits(self):
        module, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
        load_state(module, other.state_dict(), "w")
        assert torch.equal(module.weight, other.weight)

    def test_nothing_is_loaded_of_what_does_not_fit(self):
        module = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        tensors = {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(3), "head": torch.ones(1)}
        with pytest.raises(ModelError) as raised:
            load_state(module, tensors, "some/file")
        message = str(raised.value)
        for part in (
            "some/file",
            "1 foreign (head)",
            "4 missing (1.bias, 1.weight, 2.bias, …)",
            "0.bias (3,) for (2,)",
        ):
            assert part in message
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_model_folder_written_by_parts_is_one_only_at_its_end(tmp_path):
    write_tensors(tmp_path / "w.safetensors", {})
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_config(tmp_path, ("word2vec",))
    write_file(tmp_path / "config.json", json.dumps({"kind": "word2vec"}).encode())
    assert read_config(tmp_path, ("word2vec",)) == {"kind": "word2vec"}
