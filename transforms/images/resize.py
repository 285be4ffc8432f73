"""Images to one size: decode, resize, turn upright, convert to sRGB, encode, hash."""

import dataclasses
import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import apache_beam as beam
import cv2
import numpy as np
import pyarrow as pa
import simplejpeg
from apache_beam.pvalue import PCollection
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from diptych.transforms.arrow_binary import binary_array, binary_views
from diptych.transforms.chunk import Chunk, Reject, take_rows
from diptych.transforms.images.colour import to_srgb
from diptych.transforms.images.decode import BadImage, Limits, Pixels, decode
from diptych.transforms.schemas import RAW_COLUMNS, images_schema
from diptych.transforms.worker import freeze_gc, num_cores

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class ResizeOptions:
    """What the images become.

    Attributes:
        size_px: Side of the square.
        mode: `squash` ignores the aspect ratio, `center_crop` cuts the longer side, `pad` adds white bars.
        image_format: `jpeg` (4:2:0) or `png` (lossless).
        quality: JPEG quality, 1 to 100.
        pixels: Also write the tensor, as `uint8` (0 to 255) or normalised `float32`.
        mean: Per channel, RGB, of values in 0 to 1; the tensor is (x / 255 - mean) / std.
        std: The same.
        limits: Bounds on the original's size.
        keep_bytes: Whether a reject keeps the original bytes.
    """

    size_px: int = 224
    mode: Literal["squash", "center_crop", "pad"] = "squash"
    image_format: Literal["jpeg", "png"] = "jpeg"
    quality: int = 95
    pixels: Literal["uint8", "float32"] | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    limits: Limits = Limits()
    keep_bytes: bool = False


class Resized(NamedTuple):
    """An image after resizing.

    Attributes:
        pixels: (S, S, 3) uint8, upright sRGB, before encoding.
        width: Width of the original, upright, in pixels.
        height: Height of the original, upright, in pixels.
        changes: Names of the counters of what was done to it.
    """

    pixels: Pixels
    width: int
    height: int
    changes: tuple[str, ...]


def resize_image(data: bytes | memoryview, options: ResizeOptions, full_decode: bool = False) -> Resized:
    """Decodes an image and brings it to (S, S, 3), upright, in sRGB.

    Args:
        data: The encoded image.
        options: What it becomes.
        full_decode: Never decode at a reduced scale.

    Raises:
        BadImage: The image is rejected.
    """
    raster = decode(data, options.limits, *((0, 0) if full_decode else _enough_px(options)))
    pixels, size, changes = raster.pixels, options.size_px, []
    if options.mode == "center_crop":
        pixels = _center_crop(pixels, raster.orientation)
    pixels = _upright(pixels, raster.orientation)  # before any rounding: equal however it was stored
    height, width = size, size
    if options.mode == "pad":
        longer = max(raster.width, raster.height)
        height, width = (max(1, round(size * side / longer)) for side in (raster.height, raster.width))
    pixels, converted = to_srgb(resize_pixels(pixels, width, height), raster.profile)
    if options.mode == "pad":
        pixels = _pad(pixels, size)
    if raster.orientation != 1:
        changes.append("images_turned_upright")
    if converted:
        changes.append("images_converted_to_srgb")
    return Resized(np.ascontiguousarray(pixels), raster.width, raster.height, tuple(changes))


def _enough_px(options: ResizeOptions) -> tuple[int, int]:
    """Returns how long the shorter and the longer side of a reduced decode must stay so that it does not show.

    Twice the target at least, in both directions; four times where the picture is cut, because the cut may be off
    by half a pixel of the reduced picture. `benchmarks/quality.py` shows what that costs: nothing visible.
    """
    size = options.size_px
    return {"squash": (2 * size, 0), "center_crop": (4 * size, 0), "pad": (0, 3 * size)}[options.mode]


# Up to this reduction, a bilinear step to twice the target and then the mean of each 2x2 is a third of the cost of
# INTER_AREA, and as near to Pillow's antialiased filters as that (`benchmarks/quality.py` measures both).
_MAX_TWO_STEP_RATIO = 3.0

_scratch = threading.local()


def resize_pixels(pixels: Pixels, width: int, height: int) -> Pixels:
    """Resizes with a filter that antialiases: area means downwards, bicubic (Keys, a = -0.75) upwards.

    Args:
        pixels: (H, W) or (H, W, C) uint8.
        width: Width wanted, in pixels.
        height: Height wanted, in pixels.

    Returns:
        (height, width) or (height, width, C) uint8.
    """
    rows, columns = pixels.shape[:2]
    ratios = rows / height, columns / width
    if (rows, columns) == (height, width):
        return pixels.copy()
    if max(ratios) <= 1:
        return np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)
    if max(ratios) <= _MAX_TWO_STEP_RATIO:
        shape = (2 * height, 2 * width, *pixels.shape[2:])
        double = cv2.resize(pixels, shape[1::-1], _buffer("double", shape))
        return np.asarray(cv2.resize(double, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    # OpenCV averages areas only where neither side grows: shrink first, then enlarge what is left
    small = (min(columns, width), min(rows, height))
    shrunk = cv2.resize(pixels, small, interpolation=cv2.INTER_AREA)
    if small != (width, height):
        shrunk = cv2.resize(shrunk, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(shrunk, np.uint8)


def _buffer(use: str, shape: tuple[int, ...]) -> Pixels:
    """Returns this thread's buffer for one use: fresh memory costs more than what is done with it."""
    buffer: Pixels | None = getattr(_scratch, use, None)
    if buffer is None or buffer.shape != shape:
        buffer = np.empty(shape, np.uint8)
        if buffer.nbytes <= 16 << 20:  # a rare giant is not held on to
            setattr(_scratch, use, buffer)
    return buffer


def _center_crop(pixels: Pixels, orientation: int) -> Pixels:
    """Returns the middle square; of two middles the one that is upper left once the picture is upright."""
    rows, columns = pixels.shape[:2]
    side = min(rows, columns)
    top, left = (rows - side) // 2, (columns - side) // 2
    if orientation in (3, 4, 6, 7):  # the rows will be read backwards
        top = rows - side - top
    if orientation in (2, 3, 7, 8):
        left = columns - side - left
    return pixels[top : top + side, left : left + side]


_FLIPS = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}  # OpenCV's codes: 0 swaps the rows, 1 the columns, -1 both


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undoes an EXIF orientation (EXIF 3.0, tag 0x0112)."""
    if orientation >= 5:
        rows, columns, *channels = pixels.shape
        pixels = np.asarray(cv2.transpose(pixels, _buffer("turned", (columns, rows, *channels))), np.uint8)
    if orientation in _FLIPS:
        pixels = np.asarray(cv2.flip(pixels, _FLIPS[orientation], _buffer("flipped", pixels.shape)), np.uint8)
    return pixels


def _pad(pixels: Pixels, size: int) -> Pixels:
    canvas = np.full((size, size, 3), 255, np.uint8)
    top, left = (size - pixels.shape[0]) // 2, (size - pixels.shape[1]) // 2
    canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return canvas


def encode_image(pixels: Pixels, options: ResizeOptions) -> bytes:
    """Encodes (S, S, 3) RGB as JPEG (4:2:0, no metadata) or PNG."""
    if options.image_format == "jpeg":
        return bytes(simplejpeg.encode_jpeg(pixels, options.quality, "RGB", "420", fastdct=False))
    return bytes(cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1])


def perceptual_hashes(thumbnails: Pixels) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Returns 64-bit perceptual hashes: the signs, about their median, of the lowest 8x8 DCT coefficients.

    The method is pHash's (Zauner 2010, 3.2.1), bit for bit in the order of the package `imagehash`. Sums are of
    integers, so that no machine rounds them another way.

    Args:
        thumbnails: (N, 32, 32) grey, uint8.

    Returns:
        (N,) uint64.
    """
    frequency, sample = np.arange(8)[:, None], np.arange(32)[None, :]
    basis = np.rint(np.cos(np.pi * frequency * (2 * sample + 1) / 64) * 4096)  # (8, 32)
    # not `@`: the threads of its BLAS go on spinning beside ours
    columns = np.einsum("nij,gj->nig", thumbnails.astype(np.float64), basis)  # (N, 32, 8)
    low = np.einsum("fi,nig->nfg", basis, columns).reshape(-1, 64)
    middle = np.sort(low, axis=1)[:, 31:33].sum(axis=1, keepdims=True)
    bits = np.packbits(2 * low > middle, axis=1)  # (N, 8)
    return bits.view(">u8")[:, 0].astype(np.uint64)


class _Done(NamedTuple):
    """A row whose image is ready."""

    encoded: bytes
    width: int
    height: int
    sha256: str
    thumbnail: Pixels
    tensor: np.ndarray[Any, Any]
    changes: tuple[str, ...]


def _process(data: memoryview, options: ResizeOptions) -> _Done | BadImage:
    try:
        resized = resize_image(data, options)
    except BadImage as error:
        return error
    grey = cv2.cvtColor(resized.pixels, cv2.COLOR_RGB2GRAY)
    return _Done(
        encode_image(resized.pixels, options),
        resized.width,
        resized.height,
        hashlib.sha256(data).hexdigest(),
        np.asarray(cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA), np.uint8),
        _tensor(resized.pixels, options),
        resized.changes,
    )


def _tensor(pixels: Pixels, options: ResizeOptions) -> np.ndarray[Any, Any]:
    """Returns the tensor to write, (3, S, S), or an empty one where none is wanted."""
    if options.pixels is None:
        return np.empty(0, np.uint8)
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    if options.pixels == "uint8":
        return planes
    mean = np.asarray(options.mean, np.float32)[:, None, None]
    std = np.asarray(options.std, np.float32)[:, None, None]
    return np.asarray((planes / np.float32(255) - mean) / std, np.float32)


# Rows a task: enough that handing over costs nothing, few enough that the threads end together
_TASK_ROWS = 8


def resize_chunk(chunk: Chunk, options: ResizeOptions, pool: ThreadPoolExecutor) -> Chunk:
    """Resizes the images of a chunk of raw rows, in the threads of a pool.

    Returns:
        A chunk of schema `images_schema`; images that cannot be used are rejects of the stage `image`.
    """
    return _collect(chunk, _start(chunk, options, pool), options)


_Results = list[Future[list[_Done | BadImage]]]


def _start(chunk: Chunk, options: ResizeOptions, pool: ThreadPoolExecutor) -> _Results:
    """Hands the images of a chunk to the pool."""
    data = binary_views(chunk.rows.column("image"))
    tasks = (data[start : start + _TASK_ROWS] for start in range(0, len(data), _TASK_ROWS))
    return [pool.submit(lambda task: [_process(image, options) for image in task], task) for task in tasks]


def _collect(chunk: Chunk, results: _Results, options: ResizeOptions) -> Chunk:
    """Waits for the images of a chunk and puts it together."""
    kept, done, rejects = [], [], []
    for i, result in enumerate(result for task in results for result in task.result()):
        if isinstance(result, BadImage):
            original = chunk.rows.column("image")[i].as_py() if options.keep_bytes else None
            key, row = chunk.rows.column("key")[i].as_py(), chunk.rows.column("row")[i].as_py()
            rejects.append(Reject(key, row, result.reason, str(result), original))
        else:
            kept.append(i)
            done.append(result)
    counters: dict[str, int] = {}
    for change in (change for result in done for change in result.changes):
        counters[change] = counters.get(change, 0) + 1
    return chunk.advance("image", _image_rows(chunk, kept, done, options), rejects, counters)


def _image_rows(chunk: Chunk, kept: list[int], done: list[_Done], options: ResizeOptions) -> pa.RecordBatch:
    rows = take_rows(chunk.rows.drop_columns(["image"]), kept)
    extension = "jpg" if options.image_format == "jpeg" else "png"
    keys = rows.column("key").to_pylist()
    image = pa.StructArray.from_arrays(
        [
            binary_array([result.encoded for result in done]),
            pa.array([f"{key.rpartition('/')[2]}.{extension}" for key in keys], pa.string()),
        ],
        names=["bytes", "path"],
    )
    thumbnails = np.stack([result.thumbnail for result in done]) if done else np.empty((0, 32, 32), np.uint8)
    made = {
        "image": image,
        "width": pa.array([result.width for result in done], pa.int32()),
        "height": pa.array([result.height for result in done], pa.int32()),
        "sha256": pa.array([result.sha256 for result in done], pa.string()),
        "phash": pa.array(perceptual_hashes(thumbnails), pa.uint64()),
    }
    metadata_columns = [name for name in rows.schema.names if name not in RAW_COLUMNS]
    schema = images_schema(metadata_columns, options.size_px, options.pixels)
    if options.pixels:
        flat = np.concatenate([np.empty(0, options.pixels), *(result.tensor.ravel() for result in done)])
        storage = pa.FixedSizeListArray.from_arrays(flat, 3 * options.size_px**2)
        made["pixels"] = pa.ExtensionArray.from_storage(schema.field("pixels").type, storage)
    return pa.RecordBatch.from_arrays(
        [made[name] if name in made else rows.column(name) for name in schema.names], schema=schema
    )


@dataclasses.dataclass(eq=False)  # not frozen: Beam labels its transforms
class ResizeImages(beam.PTransform[PCollection[Chunk], PCollection[Chunk]]):
    """Chunks of raw rows to chunks of images of one size.

    Attributes:
        options: What the images become.
    """

    options: ResizeOptions

    def expand(self, chunks: PCollection[Chunk]) -> PCollection[Chunk]:
        """Applies `resize_chunk`."""
        return chunks | "Resize" >> beam.ParDo(_Resize(self.options)).with_output_types(Chunk)


class _Resize(beam.DoFn):
    """Puts a chunk together while the pool is at the next: it never waits for either."""

    def __init__(self, options: ResizeOptions) -> None:
        self._options = options

    def setup(self) -> None:
        freeze_gc()
        cv2.setNumThreads(0)  # the pool's threads are the parallelism
        self._pool = ThreadPoolExecutor(num_cores(), thread_name_prefix="resize")

    def start_bundle(self) -> None:
        self._resizing: tuple[Chunk, _Results] | None = None

    def process(self, chunk: Chunk) -> Iterator[Chunk]:
        before, self._resizing = self._resizing, (chunk, _start(chunk, self._options, self._pool))
        if before is not None:
            yield _collect(*before, self._options)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self._resizing is not None:
            chunk = _collect(*self._resizing, self._options)
            yield WindowedValue(chunk, GlobalWindow().max_timestamp(), (GlobalWindow(),))

    def teardown(self) -> None:
        self._pool.shutdown(cancel_futures=True)
