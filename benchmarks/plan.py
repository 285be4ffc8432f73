"""How long an annotation of COCO's real size takes to plan, and how much memory."""

import argparse
import json
import multiprocessing
import os
import random
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from diptych.transforms.sources.base import Row
from diptych.transforms.sources.planned.coco import CocoSource

_WORDS = ("a", "man", "dog", "red", "large", "sitting", "standing", "on", "near", "table", "street", "beach")
_LINKS_PER_FILE = 60_000  # ext4 allows 65,000


def make_coco(folder: Path, num_images: int, num_captions: int, photos: Sequence[Path] = ()) -> None:
    """Writes captions_train2017.json as COCO has it, and its images as links to photos, else to one tiny JPEG."""
    rng = random.Random(0)
    images = folder / "train2017"
    images.mkdir()
    tiny = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    encoded = [photo.read_bytes() for photo in photos] or [tiny]
    links_per_round = _LINKS_PER_FILE * len(encoded)
    ids = rng.sample(range(1, 600_000), num_images)
    for ordinal, image_id in enumerate(ids):
        photo = folder / f"photo-{ordinal // links_per_round}-{ordinal % len(encoded)}.jpg"
        if ordinal % links_per_round < len(encoded):
            photo.write_bytes(encoded[ordinal % len(encoded)])
        os.link(photo, images / f"{image_id:012d}.jpg")
    listed = [
        {
            "license": 3,
            "file_name": f"{image_id:012d}.jpg",
            "coco_url": f"http://images.cocodataset.org/train2017/{image_id:012d}.jpg",
            "height": 480,
            "width": 640,
            "date_captured": "2013-11-14 11:18:45",
            "flickr_url": "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg",
            "id": image_id,
        }
        for image_id in ids
    ]
    refs = [ids[ordinal % num_images] for ordinal in range(num_captions)]
    rng.shuffle(refs)
    captions = [
        {"image_id": ref, "id": ordinal, "caption": " ".join(rng.choices(_WORDS, k=11)) + "."}
        for ordinal, ref in enumerate(refs)
    ]
    path = folder / "annotations" / "captions_train2017.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"info": {}, "images": listed, "licenses": [], "annotations": captions}))


def measure(annotation: Path, rows_per_shard: int) -> None:
    source = CocoSource((str(annotation),), str(annotation.parent.parent))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    inputs = source.inputs()
    hashed = time.perf_counter()
    shards = source.shards(str(annotation.parent / "plans"), rows_per_shard)
    planned = time.perf_counter()
    source.shards(str(annotation.parent / "plans"), rows_per_shard)
    again = time.perf_counter()
    num_captions = sum(len(record.captions) for record in shards[0].rows() if isinstance(record, Row))
    read = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    num_rows = sum(shard.num_rows or 0 for shard in shards)
    print(f"annotation        {inputs[0].size_bytes / 1e6:8.1f} MB, {num_rows} images, {len(shards)} shards")
    print(f"digest            {hashed - start:8.2f} s")
    print(f"plan              {planned - hashed:8.2f} s")
    print(f"plan, taken up    {again - planned:8.2f} s")
    print(f"read one shard    {read - again:8.2f} s, {shards[0].num_rows} rows, {num_captions} captions")
    print(f"peak memory       {peak / 1024:8.0f} MB, {before / 1024:.0f} MB of it before planning")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Makes a COCO annotation file of the real size with an image folder (hard links to a tiny "
        "JPEG) in a temporary folder, plans it, and reads a shard. Prints seconds, and the peak memory of "
        "planning and reading."
    )
    parser.add_argument("--num_images", type=int, default=118_000)
    parser.add_argument("--num_captions", type=int, default=600_000)
    parser.add_argument("--rows_per_shard", type=int, default=2_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: making the file takes more memory than planning it
        maker = multiprocessing.get_context("spawn").Process(
            target=make_coco, args=(Path(folder), args.num_images, args.num_captions)
        )
        maker.start()
        maker.join()
        measure(Path(folder, "annotations", "captions_train2017.json"), args.rows_per_shard)


if __name__ == "__main__":
    main()
