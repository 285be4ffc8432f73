"""Text to images: a row per caption goes in, a row per image that is made of it comes out."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.pvalue import PCollection

from diptych.models.base import GeneratedImage, Prompt
from diptych.models.metrics.matching import ImageAndPrompt, Match
from diptych.transforms.chunk import Chunk
from diptych.transforms.inference.run_model import Task
from diptych.transforms.schemas import IMAGE, PROMPTS, REASONS, generated_schema


def explode_samples(chunk: Chunk, images_per_prompt: int, seed: int) -> Chunk:
    """Makes a row of each image that is to be made, with a seed of its own.

    Args:
        chunk: Rows of schema `TEXTS`.
        images_per_prompt: How many of each caption.
        seed: Of the job.

    Returns:
        A chunk of schema `PROMPTS`.
    """
    parents = pa.array(np.repeat(np.arange(len(chunk)), images_per_prompt))
    key, index, caption, row = (column.take(parents) for column in chunk.rows.columns)
    sample = np.tile(np.arange(images_per_prompt, dtype=np.int32), len(chunk))
    names = zip(key.to_pylist(), index.to_pylist(), sample.tolist(), strict=True)
    seeds = pa.array([sample_seed(seed, *name) for name in names], pa.uint64())
    columns = [key, index, pa.array(sample), caption, seeds, row]
    return chunk.explode("text", pa.RecordBatch.from_arrays(columns, schema=PROMPTS))


def sample_seed(seed: int, key: str, prompt_index: int, sample: int) -> int:
    """Returns 64 bits that decide all that is drawn for an image; they depend on nothing else.

    Args:
        seed: Of the job.
        key: Of the row that the prompt is of.
        prompt_index: Of the prompt among those of the key.
        sample: Of the image among those of the prompt.
    """
    name = f"{seed}\0{key}\0{prompt_index}\0{sample}".encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")


@dataclasses.dataclass(eq=False)  # not frozen: Beam labels its transforms
class ExplodeSamples(beam.PTransform[PCollection[Chunk], PCollection[Chunk]]):
    """Chunks of captions to chunks of images that are to be made.

    Attributes:
        images_per_prompt: How many of each caption.
        seed: Of the job.
    """

    images_per_prompt: int
    seed: int

    def expand(self, chunks: PCollection[Chunk]) -> PCollection[Chunk]:
        """Applies `explode_samples`."""
        return chunks | "Explode" >> beam.Map(
            explode_samples, self.images_per_prompt, self.seed
        ).with_output_types(Chunk)


@dataclasses.dataclass(frozen=True)
class AddImages:
    """Puts images beside their prompts.

    Attributes:
        extension: Of the images' names.
        keeps_row: Whether the ordinal of the row stays, for a step after this one.
    """

    extension: str
    keeps_row: bool = False

    def __call__(
        self, rows: pa.RecordBatch, results: Sequence[GeneratedImage]
    ) -> tuple[pa.RecordBatch, Mapping[str, int]]:
        """Returns rows of `generated_schema`."""
        names = zip(
            *(rows.column(name).to_pylist() for name in ("key", "prompt_index", "sample")), strict=True
        )
        image = pa.StructArray.from_arrays(
            [
                pa.array([result.data for result in results], pa.binary()),
                pa.array(["_".join(map(str, name)) + f".{self.extension}" for name in names], pa.string()),
            ],
            fields=list(IMAGE),
        )
        columns = [rows.column(name) for name in ("key", "prompt_index", "sample", "prompt")]
        columns += [image, rows.column("seed")]
        schema = generated_schema()
        if self.keeps_row:
            columns.append(rows.column("row"))
            schema = schema.append(PROMPTS.field("row"))
        return pa.RecordBatch.from_arrays(columns, schema=schema), {}


def _prompts(rows: pa.RecordBatch) -> list[Prompt]:
    return list(map(Prompt, rows.column("prompt").to_pylist(), rows.column("seed").to_pylist()))


def _fault(image: GeneratedImage) -> tuple[str, str] | None:
    return None if image.fault is None else (image.fault, REASONS["generate"][image.fault])


def generate_task(image_format: str, is_matched: bool = False) -> Task:
    """Returns what a model that makes images does with a chunk of prompts.

    Args:
        image_format: `png` or `jpeg`.
        is_matched: Whether `match_task` comes after it.
    """
    extension = {"jpeg": "jpg"}.get(image_format, image_format)
    return Task("generate", _prompts, AddImages(extension, is_matched), _fault)


@dataclasses.dataclass(frozen=True)
class AddMatches:
    """Puts what a captioner says of images, and how near that is to their prompts, beside them."""

    def __call__(
        self, rows: pa.RecordBatch, results: Sequence[Match]
    ) -> tuple[pa.RecordBatch, Mapping[str, int]]:
        """Returns rows of `generated_schema` with matches."""
        schema = generated_schema(with_match=True)
        columns = [rows.column(name) for name in generated_schema().names]
        columns.append(pa.array([result.caption for result in results], pa.string()))
        columns.append(pa.array([result.similarity for result in results], pa.float32()))
        return pa.RecordBatch.from_arrays(columns, schema=schema), {}


@dataclasses.dataclass(frozen=True)
class BelowMinMatch:
    """Tells images that do not show their prompt.

    Attributes:
        min_match: The least similarity that will do.
    """

    min_match: float

    def __call__(self, match: Match) -> tuple[str, str] | None:
        """Returns the reason and the message of a reject, None of an image that shows its prompt."""
        if match.similarity >= self.min_match:
            return None
        return "low_match", f"{match.similarity:.3f} is below {self.min_match:g}: it shows {match.caption!r}"


def match_task(min_match: float) -> Task:
    """Returns what a matcher does with a chunk of images that were made of prompts."""
    return Task("generate", _pairs, AddMatches(), BelowMinMatch(min_match))


def _pairs(rows: pa.RecordBatch) -> list[ImageAndPrompt]:
    images = pc.struct_field(rows.column("image"), "bytes").to_pylist()
    return list(map(ImageAndPrompt, images, rows.column("prompt").to_pylist()))
