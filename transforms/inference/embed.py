"""Captions to vectors: a row per caption goes in, the same row with its vector comes out."""

import dataclasses
from collections.abc import Mapping, Sequence

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.pvalue import PCollection

from diptych.models.base import TextVector
from diptych.transforms.chunk import Chunk, Reject
from diptych.transforms.inference.run_model import Task
from diptych.transforms.schemas import TEXTS, embeddings_schema

_NO_CAPTION = "no caption is left: it has none, or none of a length that is kept"


def explode_captions(chunk: Chunk, stage: str) -> Chunk:
    """Makes a row of each caption; an image without one is a reject.

    Args:
        chunk: Rows with `key`, `captions` and `row`, among others.
        stage: Of the reject: that of the model which gets the captions.

    Returns:
        A chunk of schema `TEXTS`.
    """
    captions = chunk.rows.column("captions")
    counts = pc.list_value_length(captions).to_numpy(zero_copy_only=False)
    parents = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    columns = [
        chunk.rows.column("key").take(pa.array(parents)),
        pa.array((np.arange(len(parents)) - starts[parents]).astype(np.int32)),
        captions.flatten(),
        chunk.rows.column("row").take(pa.array(parents)),
    ]
    rejects = [
        Reject(chunk.rows["key"][i].as_py(), chunk.rows["row"][i].as_py(), "no_caption", _NO_CAPTION)
        for i in np.flatnonzero(counts == 0).tolist()
    ]
    return chunk.explode(stage, pa.RecordBatch.from_arrays(columns, schema=TEXTS), rejects)


@dataclasses.dataclass(eq=False)  # not frozen: Beam labels its transforms
class ExplodeCaptions(beam.PTransform[PCollection[Chunk], PCollection[Chunk]]):
    """Chunks of images to chunks of captions.

    Attributes:
        stage: Of the rejects without a caption.
    """

    stage: str

    def expand(self, chunks: PCollection[Chunk]) -> PCollection[Chunk]:
        """Applies `explode_captions`."""
        return chunks | "Explode" >> beam.Map(explode_captions, self.stage).with_output_types(Chunk)


@dataclasses.dataclass(frozen=True)
class AddVectors:
    """Adds vectors to rows of captions.

    Attributes:
        dim: Length of the vectors.
        flags_unknown: Whether captions of which the model knows no word are flagged.
    """

    dim: int
    flags_unknown: bool

    def __call__(
        self, rows: pa.RecordBatch, vectors: Sequence[TextVector]
    ) -> tuple[pa.RecordBatch, Mapping[str, int]]:
        """Returns rows of `embeddings_schema`, and how many captions have no known word."""
        embedding = vector_array([vector.values for vector in vectors], self.dim)
        columns = [rows.column("key"), rows.column("caption_index"), rows.column("caption"), embedding]
        unknown = [not vector.known for vector in vectors]
        if self.flags_unknown:
            columns.append(pa.array(unknown, pa.bool_()))
        schema = embeddings_schema(self.dim, self.flags_unknown)
        counters = {"captions_without_known_word": sum(unknown)}
        return pa.RecordBatch.from_arrays(columns, schema=schema), counters


def vector_array(vectors: Sequence[np.ndarray], dim: int) -> pa.FixedSizeListArray:
    """Returns vectors of one length as an array of fixed-size lists."""
    flat = np.concatenate([np.empty(0, np.float32), *vectors], dtype=np.float32)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), dim)


def _captions(rows: pa.RecordBatch) -> list[str]:
    return list(rows.column("caption").to_pylist())


def embed_task(dim: int, flags_unknown: bool) -> Task:
    """Returns what a text model of this length does with a chunk of captions."""
    return Task("embed", _captions, AddVectors(dim, flags_unknown))
