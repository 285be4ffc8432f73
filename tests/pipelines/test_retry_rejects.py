"""`--retry_rejects`: the same command again, only what failed; the result is that of a run that never failed."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_models import FakeText, use_fakes
from kills import EVERY_THIRD_KILL, files_in, kills
from PIL import Image

from diptych.models.base import TextOptions
from diptych.models.spec import ModelSpec
from diptych.pipelines.demo_data.layouts import write_data_set
from diptych.pipelines.embed import embed
from diptych.pipelines.lifecycle.output_folder import State
from diptych.pipelines.options.models import ModelJobOptions
from diptych.pipelines.options.prepare import PrepareOptions
from diptych.pipelines.options.run import RunOptions
from diptych.pipelines.prepare import prepare
from diptych.pipelines.run import run as run_job
from diptych.pipelines.verify import verify
from diptych.transforms import read as read_module
from diptych.transforms.errors import OptionError

CHUNK_ROWS = 4


def run(data: Path, out: Path, *reasons: str, **options: Any) -> State:
    values = {"inputs": (str(data),), "output": str(out), "chunk_rows": CHUNK_ROWS, "quiet": True} | options
    return prepare(PrepareOptions(retry_rejects=reasons, **values)).state


def times_in(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """40 scenes in COCO's layout; of the 36 for training, the 6th, 7th and 21st image are away."""
    folder = write_data_set(str(tmp_path / "data"), 40, seed=1).coco
    (tmp_path / "away").mkdir()
    images = sorted((folder / "train2017").iterdir())
    for number in (5, 6, 20):
        shutil.move(images[number], tmp_path / "away")
    return folder / "annotations" / "captions_train2017.json"


@pytest.fixture
def undisturbed(data: Path, tmp_path: Path) -> dict[str, bytes]:
    """The files of a run that never failed."""
    copy = tmp_path / "copy"
    shutil.copytree(data.parents[1], copy / "coco")
    bring_back(copy / "coco" / "annotations" / data.name, tmp_path / "away", keep=True)
    run(copy / "coco" / "annotations" / data.name, tmp_path / "undisturbed")
    return files_in(tmp_path / "undisturbed")


def bring_back(data: Path, away: Path, keep: bool = False) -> None:
    for image in list(away.iterdir()):
        (shutil.copy if keep else shutil.move)(str(image), data.parents[1] / "train2017" / image.name)


class TestPrepare:
    def test_only_the_chunks_with_such_rejects_are_made_anew(self, data, tmp_path, undisturbed):
        out = tmp_path / "out"
        run(data, out)
        before = times_in(out)
        bring_back(data, tmp_path / "away")
        assert run(data, out) is State.DONE
        assert run(data, out, "corrupt", "truncated") is State.DONE
        assert times_in(out) == before
        assert run(data, out, "corrupt", "missing_image") is State.RESUMED
        assert files_in(out) == undisturbed
        after = times_in(out)
        changed = {name for name in after if after[name] != before[name]}
        assert {name.rpartition("-")[2] for name in changed} == {"00001.parquet", "00005.parquet"}
        assert len(changed) == 2
        assert verify(str(out)).problems == []
        assert run(data, out, "missing_image") is State.DONE

    def test_what_fails_again_is_rejected_again(self, data, tmp_path):
        out = tmp_path / "out"
        run(data, out)
        before = files_in(out)
        assert run(data, out, "missing_image") is State.RESUMED
        assert files_in(out) == before

    @EVERY_THIRD_KILL
    def test_killed_at_any_moment_any_run_completes_it(self, data, tmp_path, undisturbed, step):
        failed = tmp_path / "failed"
        run(data, failed)
        bring_back(data, tmp_path / "away")
        (tmp_path / "kills").mkdir()
        num_states = 0
        for out in kills(
            tmp_path / "kills",
            lambda out: run(data, out, "missing_image"),
            lambda out: shutil.copytree(failed, out),
            step,
        ):
            num_states += 1
            # the plain command completes it, but for chunks whose turn had not come; the other, all
            shutil.rmtree(tmp_path / "plain", ignore_errors=True)
            shutil.copytree(out, tmp_path / "plain")
            run(data, tmp_path / "plain")
            assert verify(str(tmp_path / "plain")).problems == [], out
            run(data, out, "missing_image")
            assert files_in(out) == undisturbed, out
        assert num_states > 2 * 3 / step

    def test_images_that_end_a_chunk_earlier_by_now_move_what_follows(self, tmp_path, monkeypatch):
        monkeypatch.setattr(read_module, "_MAX_CHUNK_BYTES", 60_000)
        data = write_data_set(str(tmp_path / "data"), 20, seed=1).coco
        noise = np.random.default_rng(1).integers(0, 256, (130, 130, 3), np.uint8)
        large = sorted((data / "train2017").iterdir())[4:7]
        for path in large:
            Image.fromarray(noise).save(path, quality=100)
        annotation = data / "annotations" / "captions_train2017.json"
        run(annotation, tmp_path / "undisturbed")
        for path in large:
            path.rename(tmp_path / path.name)
        out = tmp_path / "out"
        run(annotation, out)
        assert len(list((out / "images").iterdir())) < len(list((tmp_path / "undisturbed/images").iterdir()))
        for path in large:
            (tmp_path / path.name).rename(path)
        run(annotation, out, "missing_image")
        assert files_in(out) == files_in(tmp_path / "undisturbed")

    def test_a_reason_that_is_none_lists_those_there_are(self, data, tmp_path):
        with pytest.raises(
            OptionError, match=r"--retry_rejects is missing\. It must be some of .*missing_image"
        ):
            run(data, tmp_path / "out", "missing")
        with pytest.raises(OptionError, match="without --overwrite"):
            run(data, tmp_path / "out", "corrupt", overwrite=True)


class TestModels:
    def run(self, data: Path, out: Path, *reasons: str) -> State:
        model = ModelSpec("bert", "fake", TextOptions())
        values = {"inputs": (str(data),), "output": str(out), "chunk_rows": CHUNK_ROWS, "quiet": True}
        return embed(ModelJobOptions(**values, model=model, retry_rejects=reasons)).state

    def test_a_model_that_failed_on_some_rows(self, tmp_path, monkeypatch):
        use_fakes(monkeypatch)
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("".join(f"prompt {number}\n" for number in range(40)))
        self.run(prompts, tmp_path / "undisturbed")
        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            is_fine = FakeText.is_fine

            def fail_on_some(model: FakeText, text: str) -> bool:
                if text in ("prompt 6", "prompt 7", "prompt 30"):
                    raise ValueError("a bug that is mended later")
                return is_fine(model, text)

            patch.setattr(FakeText, "is_fine", fail_on_some)
            self.run(prompts, out)
        before = times_in(out)
        assert len([name for name in before if name.startswith("rejects/embed/")]) == 2
        assert self.run(prompts, out) is State.DONE
        assert self.run(prompts, out, "model_error") is State.RESUMED
        assert files_in(out) == files_in(tmp_path / "undisturbed")
        after = times_in(out)
        assert sum(after[name] != before[name] for name in after) == 2

    def test_every_data_set_of_a_run_has_the_same_rows_afterwards(self, data, tmp_path, monkeypatch):
        use_fakes(monkeypatch)

        def run_all(out: Path, *reasons: str) -> State:
            values = {"inputs": (str(data),), "output": str(out), "chunk_rows": CHUNK_ROWS, "quiet": True}
            model = ModelJobOptions(**values, model=ModelSpec("bert", "fake", TextOptions()))
            return run_job(RunOptions(**values, embed=model, retry_rejects=reasons)).state

        run_all(tmp_path / "out")
        bring_back(data, tmp_path / "away")
        run_all(tmp_path / "undisturbed")
        assert run_all(tmp_path / "out", "missing_image") is State.RESUMED
        assert files_in(tmp_path / "out") == files_in(tmp_path / "undisturbed")
