import gc
import hashlib
import json
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import webdataset
from pycocotools.coco import COCO  # type: ignore[import-untyped]  # has no stubs

from diptych.pipelines.demo_data import layouts
from diptych.pipelines.demo_data.layouts import SceneFolders, write_data_set
from diptych.pipelines.demo_data.scenes import Scene, draw_scene

REPOSITORY = Path(__file__).parents[3]


def _run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class TestDeterminism:
    def test_another_process_draws_the_same_files(self, tmp_path: Path) -> None:
        code = (
            "import sys; from diptych.pipelines.demo_data.layouts import write_data_set\n"
            "write_data_set(sys.argv[1], 40, seed=3)\n"
            "print(sorted({'torch', 'apache_beam'} & set(sys.modules)))"
        )
        done = _run(code, tmp_path / "there")
        assert done.stdout == "[]\n", done.stderr
        write_data_set(str(tmp_path / "here"), 40, seed=3)
        digests = _digests(tmp_path / "here")
        assert digests == _digests(tmp_path / "there")
        # JPEGs twice, two annotation files, one token file, two tars, the marker.
        assert len(digests) == 2 * 40 + 2 + 1 + 2 + 1

    def test_a_scene_does_not_depend_on_how_many_are_drawn(self, tmp_path: Path) -> None:
        few = write_data_set(str(tmp_path / "few"), 10, seed=3)
        many = write_data_set(str(tmp_path / "many"), 30, seed=3)
        few_jpegs, many_jpegs = _digests(few.coco), _digests(many.coco)
        names = [name for name in few_jpegs if name.endswith(".jpg")]
        assert len(names) == 10
        assert {few_jpegs[name] for name in names} == {many_jpegs[name] for name in names}
        few_lines, many_lines = _token_lines(few.flickr30k), _token_lines(many.flickr30k)
        assert few_lines == many_lines[:50]


def _token_lines(folder: Path) -> list[str]:
    return (folder / "results_20130124.token").read_text(encoding="utf-8").splitlines()


def _read_shards(paths: list[str]) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        # webdataset leaves its files for the collector to close.
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset(paths, shardshuffle=False))
        gc.collect()
    return samples


NUM_SCENES = 60


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> SceneFolders:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "_SHARD_SCENES", 20)
        return write_data_set(str(tmp_path_factory.mktemp("scenes") / "data"), NUM_SCENES, seed=2)


@pytest.fixture(scope="module")
def expected() -> dict[str, Scene]:
    return {f"{index:012d}": draw_scene(2, index) for index in range(NUM_SCENES)}


class TestLayouts:
    def test_coco_opens_with_pycocotools(self, folders: SceneFolders, expected: dict[str, Scene]) -> None:
        read: dict[str, tuple[str, ...]] = {}
        for split, num_scenes in {"train": 54, "val": 6}.items():
            path = folders.coco / "annotations" / f"captions_{split}2017.json"
            coco = COCO(str(path))
            assert set(coco.dataset) == {"info", "licenses", "images", "annotations"}
            assert len(coco.getImgIds()) == num_scenes == len(list((folders.coco / f"{split}2017").iterdir()))
            assert len(coco.getAnnIds()) == 5 * num_scenes
            for image in coco.loadImgs(coco.getImgIds()):
                pixels = cv2.imread(str(folders.coco / f"{split}2017" / image["file_name"]))
                assert pixels is not None
                assert pixels.shape == (image["height"], image["width"], 3)
                assert int(Path(image["file_name"]).stem) == image["id"]
                annotations = coco.loadAnns(sorted(coco.getAnnIds(imgIds=[image["id"]])))
                read[Path(image["file_name"]).stem] = tuple(each["caption"] for each in annotations)
        assert read == {key: scene.captions for key, scene in expected.items()}

    def test_flickr30k_lists_the_same_captions_and_pictures(
        self, folders: SceneFolders, expected: dict[str, Scene]
    ) -> None:
        assert _token_lines(folders.flickr30k) == [
            f"{key}.jpg#{number}\t{scene.captions[number]}"
            for key, scene in expected.items()
            for number in range(5)
        ]
        images = folders.flickr30k / "flickr30k-images"
        assert {path.name for path in images.iterdir()} == {f"{key}.jpg" for key in expected}
        for key in expected:
            split = "val" if int(key) % 10 == 9 else "train"
            jpeg = (folders.coco / f"{split}2017" / f"{key}.jpg").read_bytes()
            assert (images / f"{key}.jpg").read_bytes() == jpeg

    def test_shards_open_with_webdataset(self, folders: SceneFolders, expected: dict[str, Scene]) -> None:
        shards = {"train": ["train-00000", "train-00001", "train-00002"], "val": ["val-00000"]}
        names = sorted(path.stem for path in folders.webdataset.iterdir())
        assert names == shards["train"] + shards["val"]
        seen: list[str] = []
        for split, stems in shards.items():
            paths = [str(folders.webdataset / f"{stem}.tar") for stem in stems]
            for sample in _read_shards(paths):
                key = sample["__key__"]
                scene = expected[key]
                height, width, _ = scene.image.shape
                assert json.loads(sample["json"]) == {
                    **{"key": key, "captions": list(scene.captions)},
                    **{"width": width, "height": height},
                }
                assert sample["txt"].decode().split("\n") == list(scene.captions)
                assert sample["jpg"] == (folders.coco / f"{split}2017" / f"{key}.jpg").read_bytes()
                seen.append(key)
        assert sorted(seen) == list(expected)
        assert seen[-6:] == [key for key in expected if int(key) % 10 == 9]

    def test_tar_headers_carry_no_time_and_no_owner(self, folders: SceneFolders) -> None:
        with tarfile.open(folders.webdataset / "train-00000.tar") as tar:
            members = tar.getmembers()
        assert len(members) == 3 * 20
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
            (0, 0, 0, "", "", 0o644)
        }

    def test_jpegs_look_like_what_was_drawn(self, folders: SceneFolders, expected: dict[str, Scene]) -> None:
        for key, scene in expected.items():
            bgr = cv2.imread(str(folders.flickr30k / "flickr30k-images" / f"{key}.jpg"))
            assert bgr is not None
            error = bgr[:, :, ::-1].astype(float) - scene.image
            assert np.sqrt(np.square(error).mean()) < 8, key


class TestWholeOrNotAtAll:
    def test_a_complete_set_is_left_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = write_data_set(str(tmp_path / "data"), 10, seed=1)

        def refuse(*_: Any) -> None:
            raise RuntimeError("drawn again")

        monkeypatch.setattr(layouts, "draw_scene", refuse)
        assert write_data_set(str(tmp_path / "data"), 10, seed=1) == first
        with pytest.raises(RuntimeError, match="drawn again"):
            write_data_set(str(tmp_path / "elsewhere"), 10, seed=1)

    def test_an_empty_folder_is_filled(self, tmp_path: Path) -> None:
        folders = write_data_set(str(tmp_path), 10, seed=1)
        assert {folders.coco, folders.flickr30k, folders.webdataset} < set(tmp_path.iterdir())
        marker = json.loads((tmp_path / "scenes.json").read_text())
        assert set(marker) == {"seed", "num_scenes", "version"}
        assert (marker["seed"], marker["num_scenes"]) == (1, 10)

    @pytest.mark.parametrize(("num_scenes", "seed"), [(11, 1), (10, 2)])
    def test_another_set_is_refused_and_kept(self, tmp_path: Path, num_scenes: int, seed: int) -> None:
        write_data_set(str(tmp_path / "data"), 10, seed=1)
        before = _digests(tmp_path)
        with pytest.raises(ValueError, match="remove the folder") as error:
            write_data_set(str(tmp_path / "data"), num_scenes, seed)
        assert '"num_scenes": 10, "seed": 1,' in str(error.value)
        assert f'"num_scenes": {num_scenes}, "seed": {seed},' in str(error.value)
        assert _digests(tmp_path) == before

    def test_a_folder_of_something_else_is_refused_and_kept(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("mine")
        with pytest.raises(ValueError, match=r"no scenes\.json"):
            write_data_set(str(tmp_path), 10, seed=1)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    @pytest.mark.parametrize(("num_scenes", "seed"), [(9, 1), (0, 1), (10, -1)])
    def test_arguments_out_of_range_are_refused(self, tmp_path: Path, num_scenes: int, seed: int) -> None:
        with pytest.raises(ValueError, match=f"num_scenes is {num_scenes} and seed {seed}"):
            write_data_set(str(tmp_path / "data"), num_scenes, seed)
        assert list(tmp_path.iterdir()) == []

    def test_a_disk_error_passes_and_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(layouts, "_write_coco_captions", fail)
        with pytest.raises(OSError, match="No space left"):
            write_data_set(str(tmp_path / "data"), 10, seed=1)
        assert list(tmp_path.iterdir()) == []

    def test_a_killed_drawing_leaves_no_data_set_and_the_next_completes(self, tmp_path: Path) -> None:
        code = (
            "import os, sys; from diptych.pipelines.demo_data import layouts\n"
            "layouts._write_coco_captions = lambda *_: os._exit(9)\n"
            "layouts.write_data_set(sys.argv[1], 10, seed=1)"
        )
        assert _run(code, tmp_path / "data").returncode == 9
        assert not (tmp_path / "data").exists()
        assert len(list(tmp_path.glob(".data-*"))) == 1
        write_data_set(str(tmp_path / "data"), 10, seed=1)
        write_data_set(str(tmp_path / "whole"), 10, seed=1)
        assert _digests(tmp_path / "data") == _digests(tmp_path / "whole")
