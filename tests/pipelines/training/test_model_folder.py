import json
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest

from diptych.pipelines.lifecycle.output_folder import State
from diptych.pipelines.training import model_folder
from diptych.pipelines.training.model_folder import ModelFolder, refuse_own_input
from diptych.transforms.errors import OptionError, OutputError

PRINT = {"job": "train word2vec", "options": {"epochs": 3, "seed": 0}, "data": {"train": "abc"}}
OTHER = {**PRINT, "options": {"epochs": 4, "seed": 0}}
FILES = {"config.json": "{}", "model.safetensors": "weights", "README.md": "card"}


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    return ModelFolder(str(tmp_path / "new" / "model"))


def work(folder: ModelFolder, files: dict[str, str] | None = None) -> None:
    for name, text in (FILES if files is None else files).items():
        (folder.model / name).write_text(text)
    (folder.model / "_checkpoint.safetensors").write_text("state")
    (folder.model / ".part").touch()
    (folder.model / "_cache").mkdir(exist_ok=True)
    (folder.model / "checkpoint").mkdir(exist_ok=True)
    (folder.model / "checkpoint" / "state").touch()


def names(folder: ModelFolder) -> set[str]:
    return set(os.listdir(folder.url))


class TestLife:
    def test_of_a_training(self, folder):
        assert folder.open(PRINT, overwrite=False) is State.FRESH
        assert json.loads(Path(folder.url, "_job.json").read_text()) == {"model": PRINT}
        assert names(folder) == {"_job.json", "_training"}
        work(folder)
        assert folder.open(PRINT, overwrite=False) is State.RESUMED
        folder.finish({"kind": "word2vec"})
        assert names(folder) == {*FILES, "_job.json", "_SUCCESS.json"}
        assert {name: Path(folder.url, name).read_text() for name in FILES} == FILES
        sizes = {name: len(text) for name, text in FILES.items()}
        assert folder.summary() == {"kind": "word2vec", "files": sizes}
        assert folder.open(PRINT, overwrite=False) is State.DONE
        assert names(folder) == {*FILES, "_job.json", "_SUCCESS.json"}

    def test_stopped_before_anything_was_trained(self, folder):
        folder.open(PRINT, overwrite=False)
        folder.prepared.mkdir()
        assert folder.open(PRINT, overwrite=False) is State.FRESH
        assert folder.prepared.exists()
        assert folder.open(OTHER, overwrite=False) is State.FRESH
        assert not folder.prepared.exists()
        assert json.loads(Path(folder.url, "_job.json").read_text()) == {"model": OTHER}

    @pytest.mark.parametrize("is_done", [False, True])
    def test_other_options(self, folder, is_done):
        folder.open(PRINT, overwrite=False)
        work(folder)
        if is_done:
            folder.finish({})
        message = "holds the model of another training: options.epochs is 3 there and 4 here. .*--overwrite"
        with pytest.raises(OutputError, match=message):
            folder.open(OTHER, overwrite=False)
        assert folder.open(PRINT, overwrite=False) is (State.DONE if is_done else State.RESUMED)

    @pytest.mark.parametrize("wanted", [PRINT, OTHER])
    @pytest.mark.parametrize("is_done", [False, True])
    def test_overwrite_deletes_what_trainings_wrote_and_nothing_else(self, folder, wanted, is_done):
        folder.open(PRINT, overwrite=False)
        work(folder)
        if is_done:
            folder.finish({})
        Path(folder.url, "notes.txt").touch()
        assert folder.open(wanted, overwrite=True) is State.FRESH
        assert names(folder) == {"_job.json", "_training", "notes.txt"}
        assert list(folder.model.iterdir()) == []
        work(folder, {"config.json": "new"})
        folder.finish({})
        assert names(folder) == {"config.json", "_job.json", "_SUCCESS.json", "notes.txt"}
        assert Path(folder.url, "config.json").read_text() == "new"

    def test_a_model_that_lost_a_file_is_trained_again(self, folder):
        folder.open(PRINT, overwrite=False)
        work(folder)
        folder.finish({})
        os.remove(f"{folder.url}/model.safetensors")
        assert folder.open(PRINT, overwrite=False) is State.FRESH
        work(folder)
        folder.finish({})
        assert folder.open(PRINT, overwrite=False) is State.DONE

    def test_killed_while_the_model_is_put_in_its_place(self, folder, monkeypatch):
        folder.open(PRINT, overwrite=False)
        work(folder)
        place, placed = model_folder._place, []

        def killed(source: Path, target: Path) -> None:
            if len(placed) == 2:
                raise KeyboardInterrupt
            placed.append(target.name)
            place(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(model_folder, "_place", killed)
            with pytest.raises(KeyboardInterrupt):
                folder.finish({})
        assert "config.json" not in placed
        assert folder.open(PRINT, overwrite=False) is State.RESUMED
        assert {name: (folder.model / name).read_text() for name in FILES} == FILES
        folder.finish({})
        assert folder.open(PRINT, overwrite=False) is State.DONE

    def test_killed_before_the_working_folder_was_gone(self, folder, monkeypatch):
        folder.open(PRINT, overwrite=False)
        work(folder)
        with monkeypatch.context() as patch:
            patch.setattr(ModelFolder, "_delete_working", lambda self: None)
            folder.finish({})
        assert folder.open(PRINT, overwrite=False) is State.DONE
        assert "_training" not in names(folder)

    def test_a_disk_without_links(self, folder, monkeypatch):
        def refuse(*_: Any) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
        folder.open(PRINT, overwrite=False)
        work(folder)
        folder.finish({})
        assert {name: Path(folder.url, name).read_text() for name in FILES} == FILES

    def test_a_working_folder_that_nobody_owns_is_not_gone_on_with(self, folder):
        folder.open(PRINT, overwrite=False)
        work(folder)
        os.remove(f"{folder.url}/_job.json")
        assert folder.open(OTHER, overwrite=False) is State.FRESH
        assert list(folder.model.iterdir()) == []


class TestRefused:
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_folder_of_somebody(self, tmp_path, overwrite):
        for name in ("a.txt", "b.txt", "c", "d"):
            (tmp_path / name).touch()
        with pytest.raises(OutputError, match=r"holds a.txt, b.txt, c and 1 more, but no _job.json"):
            ModelFolder(str(tmp_path)).open(PRINT, overwrite)
        assert set(os.listdir(tmp_path)) == {"a.txt", "b.txt", "c", "d"}

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_an_output_of_prepare(self, tmp_path, overwrite):
        (tmp_path / "_job.json").write_text(json.dumps({"images": PRINT, "captions": PRINT}))
        with pytest.raises(OutputError, match=r"is the output of another job \(images, captions\)"):
            ModelFolder(str(tmp_path)).open(PRINT, overwrite)

    def test_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match=r"is a file. --output must be a folder"):
            ModelFolder(str(tmp_path / "file")).open(PRINT, False)

    def test_a_damaged_job_file(self, tmp_path):
        (tmp_path / "_job.json").write_text("{")
        with pytest.raises(OutputError, match=r"_job.json is not what a job wrote"):
            ModelFolder(str(tmp_path)).open(PRINT, False)

    def test_unwritable(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="cannot be written"):
            ModelFolder(str(tmp_path / "file" / "model")).open(PRINT, False)

    @pytest.mark.parametrize("place", ["", "/_training/prepared/train", "/."])
    def test_own_input(self, tmp_path, place):
        folder = ModelFolder(str(tmp_path / "m"))
        with pytest.raises(OptionError, match=r"is where .* is read from"):
            refuse_own_input([str(tmp_path / "other"), f"{tmp_path}/m{place}"], folder)

    def test_inputs_elsewhere_pass(self, tmp_path):
        refuse_own_input(
            [str(tmp_path), str(tmp_path / "m2"), "memory://m"], ModelFolder(str(tmp_path / "m"))
        )


class TestUrl:
    def test_is_trained_in_the_cache_and_uploaded(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path))
        folder = ModelFolder("memory://test_training_output/model")
        memory = fsspec.filesystem("memory")
        try:
            assert folder.open(PRINT, overwrite=False) is State.FRESH
            assert folder.working.is_relative_to(tmp_path)
            work(folder)
            assert folder.open(PRINT, overwrite=False) is State.RESUMED
            folder.finish({"kind": "word2vec"})
            assert not folder.working.exists()
            found = {
                os.path.basename(path) for path in memory.ls("/test_training_output/model", detail=False)
            }
            assert found == {*FILES, "_job.json", "_SUCCESS.json"}
            assert memory.cat_file("/test_training_output/model/model.safetensors") == b"weights"
            assert folder.open(PRINT, overwrite=False) is State.DONE
            assert folder.open(OTHER, overwrite=True) is State.FRESH
            found = {
                os.path.basename(path) for path in memory.ls("/test_training_output/model", detail=False)
            }
            assert found == {"_job.json"}
        finally:
            memory.rm("/test_training_output", recursive=True)
