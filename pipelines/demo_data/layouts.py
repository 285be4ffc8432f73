"""The drawn data set on disk, in the layouts of COCO, Flickr30k and WebDataset."""

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2

from diptych.pipelines.demo_data.scenes import draw_scene, scene_key

_VERSION = 2  # to be raised with every change that alters the bytes of a data set
_SHARD_SCENES = 500
_JPEG_QUALITY = 92


@dataclass(frozen=True)
class SceneFolders:
    """Where ``write_data_set`` puts the same scenes, in three layouts."""

    coco: Path
    flickr30k: Path
    webdataset: Path


def write_data_set(root: str, num_scenes: int, seed: int) -> SceneFolders:
    """Draws a data set into ``root`` in three layouts; does nothing if it is there already.

    It appears whole or not at all. Every tenth scene is for validation, the others for training
    (Flickr30k's layout has no splits). All three hold the same JPEGs under the same keys:

    - ``coco/{train2017,val2017}/KEY.jpg``, ``coco/annotations/captions_{train,val}2017.json``
    - ``flickr30k/flickr30k-images/KEY.jpg``, ``flickr30k/results_20130124.token``
    - ``webdataset/{train,val}-NNNNN.tar``: ``KEY.jpg``, ``KEY.json``, ``KEY.txt``

    Args:
        root: A local folder, missing or empty or drawn earlier by this function.
        num_scenes: How many, at least 10, so that both splits have some.
        seed: Seed of the data set, not negative.

    Returns:
        The three folders.

    Raises:
        ValueError: If an argument is out of range, or ``root`` holds anything else.
    """
    if num_scenes < 10 or seed < 0:
        raise ValueError(
            f"num_scenes is {num_scenes} and seed {seed}; draw at least 10 scenes, so that both "
            "splits have some, with a seed of 0 or more"
        )
    home = Path(root).resolve()
    folders = SceneFolders(home / "coco", home / "flickr30k", home / "webdataset")
    marker = json.dumps({"num_scenes": num_scenes, "seed": seed, "version": _VERSION})
    if _is_drawn(home, marker):
        return folders
    home.parent.mkdir(parents=True, exist_ok=True)
    # Beside the root, so that the rename stays on one disk.
    with tempfile.TemporaryDirectory(prefix=f".{home.name}-", dir=home.parent) as scratch:
        drawn = Path(scratch) / "drawn"
        _write_layouts(drawn, num_scenes, seed)
        (drawn / "scenes.json").write_text(marker, encoding="utf-8")
        drawn.rename(home)
    return folders


def _is_drawn(home: Path, marker: str) -> bool:
    if not home.exists() or not any(home.iterdir()):
        return False
    path = home / "scenes.json"
    found = path.read_text(encoding="utf-8") if path.exists() else "no scenes.json"
    if found != marker:
        raise ValueError(
            f"{home} holds {found}, but {marker} is to be drawn there; "
            "remove the folder, or draw into another one"
        )
    return True


@dataclass(frozen=True)
class _Sample:
    index: int
    jpeg: bytes
    width: int
    height: int
    captions: tuple[str, ...]


def _draw_sample(seed: int, folders: Sequence[Path], index: int) -> _Sample:
    """Draws a scene, and writes its JPEG into each of ``folders``."""
    scene = draw_scene(seed, index)
    height, width, _ = scene.image.shape
    bgr = cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    jpeg = encoded.tobytes()
    for folder in folders:
        (folder / f"{scene_key(index)}.jpg").write_bytes(jpeg)
    return _Sample(index, jpeg, width, height, scene.captions)


def _write_layouts(home: Path, num_scenes: int, seed: int) -> None:
    cv2.setNumThreads(1)  # OpenCV's own threads would contend with the pool's
    flickr = home / "flickr30k/flickr30k-images"
    for folder in (flickr, home / "coco/annotations", home / "webdataset"):
        folder.mkdir(parents=True)
    splits = {"train": [i for i in range(num_scenes) if i % 10 != 9], "val": range(9, num_scenes, 10)}
    captions: dict[int, tuple[str, ...]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for split, indices in splits.items():
            coco = home / f"coco/{split}2017"
            coco.mkdir()
            drawn: list[_Sample] = []
            # A shard at a time: the JPEGs held do not grow with the data set.
            for shard, start in enumerate(range(0, len(indices), _SHARD_SCENES)):
                part = indices[start : start + _SHARD_SCENES]
                samples = list(pool.map(partial(_draw_sample, seed, (coco, flickr)), part))
                _write_shard(home / f"webdataset/{split}-{shard:05d}.tar", samples)
                drawn += [replace(sample, jpeg=b"") for sample in samples]
            _write_coco_captions(home / f"coco/annotations/captions_{split}2017.json", drawn)
            captions |= {sample.index: sample.captions for sample in drawn}
    lines = [
        f"{scene_key(index)}.jpg#{number}\t{caption}\n"
        for index in range(num_scenes)
        for number, caption in enumerate(captions[index])
    ]
    (home / "flickr30k/results_20130124.token").write_bytes("".join(lines).encode())


def _write_coco_captions(path: Path, samples: Sequence[_Sample]) -> None:
    images = [
        {"id": s.index, "file_name": f"{scene_key(s.index)}.jpg", "width": s.width, "height": s.height}
        for s in samples
    ]
    annotations = [
        {"id": 5 * sample.index + number, "image_id": sample.index, "caption": caption}
        for sample in samples
        for number, caption in enumerate(sample.captions, start=1)
    ]
    info = {"description": "Diptych scenes", "version": str(_VERSION)}
    content = {"info": info, "licenses": [], "images": images, "annotations": annotations}
    path.write_text(json.dumps(content), encoding="utf-8")


def _write_shard(path: Path, samples: Sequence[_Sample]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            key = scene_key(sample.index)
            size = {"width": sample.width, "height": sample.height}
            described = json.dumps({"key": key, "captions": sample.captions, **size})
            members = {
                "jpg": sample.jpeg,
                "json": described.encode(),
                "txt": "\n".join(sample.captions).encode(),
            }
            for extension, content in members.items():
                header = tarfile.TarInfo(f"{key}.{extension}")  # its defaults: no time, no owner
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
