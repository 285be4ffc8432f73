"""What the faster ways cost in quality, on every photo below a folder.

    python benchmarks/quality.py --photos PHOTOS

First the reduced-scale JPEG decode: the pixels before encoding, against a full decode with the same filter; at least
30 dB on every photo and 36 dB on average is asked for, and the command fails where that does not hold. Then the
filter: `resize_pixels` and OpenCV's INTER_AREA against Pillow's antialiased filters, from the same full decode.
"""

import argparse
import io
import statistics
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from diptych.transforms.images.decode import BadImage, decode
from diptych.transforms.images.resize import ResizeOptions, resize_image, resize_pixels

_WORST_DB, _MEAN_DB = 30.0, 36.0
_EQUAL_DB = 99.0


def psnr_db(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> float:
    """Returns the peak signal-to-noise ratio of two 8-bit pictures in dB, 99 where they are equal."""
    error = float(np.mean((left.astype(np.float64) - right) ** 2))
    return min(_EQUAL_DB, 10 * float(np.log10(255**2 / error))) if error else _EQUAL_DB


def check_reduced_decode(photos: dict[str, bytes], size_px: int) -> bool:
    """Prints how the reduced decode differs from the full one; returns whether it is good enough."""
    good = True
    for mode in ("squash", "center_crop", "pad"):
        options = ResizeOptions(size_px=size_px, mode=mode)
        values = {}
        for name, data in photos.items():
            fast, full = resize_image(data, options), resize_image(data, options, full_decode=True)
            values[name] = psnr_db(fast.pixels, full.pixels)
        reduced = {name: value for name, value in values.items() if value < _EQUAL_DB}
        line = f"{mode:12} {len(photos)} photos, {len(reduced)} decoded at a reduced scale"
        if reduced:
            worst = min(reduced, key=lambda name: reduced[name])
            mean = statistics.mean(reduced.values())
            line += f": mean of these {mean:.1f} dB, worst {reduced[worst]:.1f} dB ({worst})"
            good &= reduced[worst] >= _WORST_DB and mean >= _MEAN_DB
        print(line)
    return good


def compare_filters(photos: dict[str, bytes], size_px: int) -> None:
    """Prints how near two filters are to Pillow's."""
    options = ResizeOptions()
    pictures = [decode(data, options.limits).pixels.copy() for data in photos.values()]
    pictures = [picture for picture in pictures if picture.ndim == 3 and picture.shape[2] == 3]
    filters = {
        "resize_pixels": lambda pixels: resize_pixels(pixels, size_px, size_px),
        "INTER_AREA": lambda pixels: cv2.resize(pixels, (size_px, size_px), interpolation=cv2.INTER_AREA),
        "INTER_LINEAR (aliases)": lambda pixels: cv2.resize(pixels, (size_px, size_px)),
    }
    for label, reference in (("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)):
        expected = [np.asarray(Image.fromarray(p).resize((size_px, size_px), reference)) for p in pictures]
        for name, resize in filters.items():
            values = [psnr_db(resize(p), e) for p, e in zip(pictures, expected, strict=True)]
            mean, worst = statistics.mean(values), min(values)
            print(f"{name:24} against Pillow's {label:9} mean {mean:.1f} dB, worst {worst:.1f} dB")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True, help="folder of JPEGs, searched in depth")
    parser.add_argument("--size", type=int, default=224, metavar="PX")
    args = parser.parse_args()
    photos = {}
    for path in sorted(args.photos.rglob("*.jp*g")):
        data = path.read_bytes()
        try:
            decode(data, ResizeOptions().limits)
            Image.open(io.BytesIO(data)).verify()
        except (BadImage, OSError) as error:
            print(f"{path.name} left out: {error}")
            continue
        photos[path.name] = data
    if not photos:
        sys.exit(f"{args.photos} holds no JPEG that decodes. --photos names a folder of photos.")
    good = check_reduced_decode(photos, args.size)
    compare_filters(photos, args.size)
    if not good:
        sys.exit(
            f"not good enough: {_WORST_DB:g} dB on every photo and {_MEAN_DB:g} dB on average are asked for"
        )


if __name__ == "__main__":
    main()
