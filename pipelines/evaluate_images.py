"""Scores images that a job made: `diptych evaluate images --input OUT --references OUT2`.

FID and KID beside real images, how different the images of one prompt are, and how well they show it. In memory are a
micro-batch of images, the features of some thousands, and a few numbers of each.
"""

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch

from diptych.models.base import TextVector
from diptych.models.errors import ModelError, one_line
from diptych.models.files.location import redacted
from diptych.models.metrics.image_scores import Distances, Features, pairwise_distances
from diptych.models.metrics.matching import cosines
from diptych.models.pixels import decode_pixels, resize_square
from diptych.models.spec import load_model
from diptych.pipelines.options.evaluate import EvaluateImagesOptions
from diptych.transforms.errors import InputError, OutputError
from diptych.transforms.finish import read_success
from diptych.transforms.inference.micro_batches import Failure, ModelRunner
from diptych.transforms.output_layout import data_files
from diptych.transforms.prepared import PreparedImages
from diptych.transforms.sink import READ_ERRORS
from diptych.transforms.storage import input_errors, join, locate, write_json

_BATCH_ROWS = 32
# Images of one prompt whose pairs are compared
_MAX_SAMPLES = 16
_BOOTSTRAPS = 1000


class _Made(NamedTuple):
    """An image that is scored.

    Attributes:
        name: Of its prompt: key and ordinal.
        prompt: Its prompt; empty where it has none.
        data: Encoded.
    """

    name: tuple[str, int]
    prompt: str
    data: bytes


def evaluate_images(options: EvaluateImagesOptions) -> dict[str, Any]:
    """Scores the images of an output, and writes the file that is asked for.

    Returns:
        `scores`, and the counts and names that say what they are of, as JSON values.

    Raises:
        InputError: There are no finished images, too few, or a network cannot be loaded.
        OutputError: A file cannot be written, or the output is damaged.
    """
    try:
        features = Features.load(options.features, options.feature_weights, options.device)
        report = _evaluate(options, features)
    except ModelError as error:
        raise InputError(str(error)) from error
    if options.scores:
        write_json(options.scores, report)
    return report


def _evaluate(options: EvaluateImagesOptions, features: Features) -> dict[str, Any]:
    distances, spread, matches = Distances(features.dim), _Spread(), _Matches(options)
    size_px = options.size_px
    for batch in _batched(_chosen(options.input, options.dataset, options.max_images)):
        size_px = size_px or len(_decode([batch[0].data], 0)[0])
        pixels = _decode([row.data for row in batch], size_px)
        found = features(_resize(pixels, features.size_px))
        distances.add(found, real=False)
        spread.add(batch, pixels, found)
        matches.add(batch)
    if size_px is None:
        raise InputError(f"{join(options.input, options.dataset)} holds no image. There is nothing to score.")
    for batch in _batched(_chosen(options.references or options.input, "images", options.max_images)):
        pixels = _decode([row.data for row in batch], size_px)
        distances.add(features(_resize(pixels, features.size_px)), real=True)
    return {
        "input": redacted(join(options.input, options.dataset)),
        "references": redacted(join(options.references or options.input, "images")),
        "features": features.name,
        "size_px": size_px,
        "num_made": distances.counts[False],
        "num_real": distances.counts[True],
        "scores": {**distances.scores(), **spread.scores(), **matches.scores()},
        "num_prompts_with_several": spread.num_prompts,
        "num_matched": len(matches.own),
        "num_not_matched": matches.num_failures,
        "match_with": str(options.match_with) if options.match_with else None,
        "match_by": str(options.match_by) if options.match_by else None,
    }


class _Spread:
    """How different images of one prompt are; those of a prompt come one after the other."""

    def __init__(self) -> None:
        self._name: tuple[str, int] | None = None
        self._pixels: list[np.ndarray[Any, Any]] = []
        self._features: list[torch.Tensor] = []
        self._within: list[tuple[float, float]] = []
        self._between: list[tuple[float, float]] = []
        self.num_prompts = 0

    def add(self, batch: Sequence[_Made], pixels: np.ndarray[Any, Any], features: torch.Tensor) -> None:
        for row, image, feature in zip(batch, pixels, features, strict=True):
            if row.name != self._name:
                if self._name and row.name[0] != self._name[0]:  # with the last of another image's prompt
                    pair = np.stack([self._pixels[-1], image]), torch.stack([self._features[-1], feature])
                    self._between.append(pairwise_distances(*pair))
                self._end()
                self._name, self._pixels, self._features = row.name, [], []
            if len(self._pixels) < _MAX_SAMPLES:
                self._pixels.append(image)
                self._features.append(feature)

    def _end(self) -> None:
        if len(self._pixels) > 1:
            self.num_prompts += 1
            self._within.append(pairwise_distances(np.stack(self._pixels), torch.stack(self._features)))

    def scores(self) -> dict[str, float]:
        self._end()
        self._pixels = []
        scores: dict[str, float] = {}
        for name, values in (("within_prompt", self._within), ("between_prompts", self._between)):
            if values:
                of_pixels, of_features = np.mean(values, axis=0).tolist()
                scores |= {f"{name}_pixels": of_pixels, f"{name}_features": of_features}
        return scores


class _Matches:
    """How near what a captioner says of images is to their prompts, and to the prompts of others."""

    def __init__(self, options: EvaluateImagesOptions) -> None:
        specs = [spec for spec in (options.match_with, options.match_by) if spec]
        self._runners = [ModelRunner(load_model(spec)) for spec in specs]
        self.own: list[float] = []
        self._gains: list[float] = []
        self.num_failures = 0

    def add(self, batch: Sequence[_Made]) -> None:
        if not self._runners:
            return
        captioner, text = self._runners
        captions = captioner.run([row.data for row in batch])
        self.num_failures += sum(isinstance(caption, Failure) for caption in captions)
        said = {i: found.candidates[0] for i, found in enumerate(captions) if not isinstance(found, Failure)}
        if not said:
            return
        told = dict(zip(said, _vectors(text, list(said.values())), strict=True))
        own = cosines(list(told.values()), _vectors(text, [batch[i].prompt for i in told])).tolist()
        self.own += own
        others = {i: prompt for i in told if (prompt := _other_prompt(batch, i)) is not None}
        if others:
            other = cosines([told[i] for i in others], _vectors(text, list(others.values()))).tolist()
            matches = dict(zip(told, own, strict=True))
            self._gains += [matches[i] - value for i, value in zip(others, other, strict=True)]

    def scores(self) -> dict[str, Any]:
        if not self.own:
            return {}
        scores = {"match": float(np.mean(self.own))}
        if not self._gains:
            return scores
        draw, gains = np.random.default_rng(0), np.asarray(self._gains)
        means = [gains[draw.integers(0, len(gains), len(gains))].mean() for _ in range(_BOOTSTRAPS)]
        low, high = np.quantile(means, (0.025, 0.975)).tolist()
        gain = float(gains.mean())
        return {**scores, "match_gain": gain, "match_gain_low": low, "match_gain_high": high}


def _vectors(text: "ModelRunner[str, TextVector]", texts: Sequence[str]) -> list[np.ndarray[Any, Any]]:
    found = text.run(texts)
    if failure := next((vector for vector in found if isinstance(vector, Failure)), None):
        raise ModelError(f"the text model of --match_by fails on a text: {failure.message}. Name another.")
    return [vector.values for vector in found if not isinstance(vector, Failure)]


def _other_prompt(batch: Sequence[_Made], number: int) -> str | None:
    """Returns the prompt of another key of a batch, None where there is none: captions of one photo are much alike."""
    here = batch[number]
    rows = itertools.chain(batch[number + 1 :], batch[:number])
    return next(
        (row.prompt for row in rows if row.name[0] != here.name[0] and row.prompt != here.prompt), None
    )


def _chosen(root: str, dataset: str, most: int | None) -> Iterator[_Made]:
    """Yields images of an output, all or about evenly chosen ones; of a prompt all samples or none, but the last's."""
    rows = _read_made(root, dataset)
    if most is None:
        return rows
    totals = (read_success(root) or {}).get(dataset)
    share = most / totals.written if totals and totals.written > most else 1.0
    return itertools.islice(_thinned(rows, share), most)


def _thinned(rows: Iterator[_Made], share: float) -> Iterator[_Made]:
    seen = taken = 0
    for _, samples in itertools.groupby(rows, key=lambda row: row.name):
        takes = taken < (seen + 1) * share
        for row in samples:
            seen += 1
            if takes:
                taken += 1
                yield row


def _batched(rows: Iterator[Any]) -> Iterator[list[Any]]:
    while batch := list(itertools.islice(rows, _BATCH_ROWS)):
        yield batch


def _decode(images: Sequence[bytes], size_px: int) -> np.ndarray[Any, Any]:
    try:
        return np.stack([decode_pixels(data, size_px) for data in images])
    except (ValueError, OSError) as error:
        raise InputError(
            f"an image cannot be decoded ({one_line(error)}). `diptych verify` names the file at fault."
        ) from error


def _resize(pixels: np.ndarray[Any, Any], size_px: int) -> np.ndarray[Any, Any]:
    return np.stack([resize_square(image, size_px) for image in pixels])


def _read_made(root: str, dataset: str) -> Iterator[_Made]:
    if dataset == "images":
        for number, data in enumerate(_read_real(root)):
            yield _Made((str(number), 0), "", data)
        return
    if "generated" not in (read_success(root) or {}):
        raise InputError(
            f"{root} holds no generated images, or not all. Expected the --output of `diptych generate`."
        )
    for name in data_files(root, "generated"):
        url = join(root, "generated", name)
        try:
            with input_errors(url):
                fs, path = locate(url)
                with fs.open(path, "rb") as file:
                    parquet = pq.ParquetFile(file, page_checksum_verification=True)
                    columns = ["key", "prompt_index", "prompt", "image"]
                    for batch in parquet.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
                        for row in batch.to_pylist():
                            yield _Made(
                                (row["key"], row["prompt_index"]), row["prompt"], row["image"]["bytes"]
                            )
        except READ_ERRORS as error:
            what = one_line(error)
            raise OutputError(f"{url} cannot be read: {what}. Delete it, and run the job again.") from error


def _read_real(root: str) -> Iterator[bytes]:
    for batch in PreparedImages.open(root).rows(["image"]):
        yield from batch.column("image").field("bytes").to_pylist()


_NAMES = {
    "fid": "FID",
    "kid": "KID",
    "kid_std": "KID, deviation over subsets",
    "within_prompt_pixels": "distance within a prompt, pixels",
    "between_prompts_pixels": "distance between prompts, pixels",
    "within_prompt_features": "distance within a prompt, features",
    "between_prompts_features": "distance between prompts, features",
    "match": "match with the prompt",
    "match_gain": "difference",
    "match_gain_low": "at least (95 %)",
    "match_gain_high": "at most (95 %)",
}


def report(scores: dict[str, Any], args: argparse.Namespace, _: float) -> str:
    """Returns what the command prints."""
    return json.dumps(scores) if args.json else table(scores)


def table(report: dict[str, Any]) -> str:
    """Returns a report of `evaluate_images` for people."""
    lines = [
        f"{report['num_made']:,} images of {report['input']} against {report['num_real']:,} of {report['references']}, "
        f"at {report['size_px']} px, by features of {report['features']}"
    ]
    scores = report["scores"]
    lines += [f"{text:36} {scores[name]:9.4f}" for name, text in _NAMES.items() if name in scores]
    if report["num_not_matched"]:
        lines.append(f"{report['num_not_matched']:,} images that the captioner failed on, not compared")
    return "\n".join(lines)
