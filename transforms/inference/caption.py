"""Images to captions: what a captioner does with a chunk of images."""

import dataclasses
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from diptych.models.base import Captions
from diptych.transforms.inference.embed import vector_array
from diptych.transforms.inference.run_model import Task
from diptych.transforms.schemas import captions_schema


@dataclasses.dataclass(frozen=True)
class AddCaptions:
    """Puts captions in the place of images.

    Attributes:
        feature_dim: Length of the encoder's pooled vectors; None where they are not written.
    """

    feature_dim: int | None

    def __call__(
        self, rows: pa.RecordBatch, results: Sequence[Captions]
    ) -> tuple[pa.RecordBatch, Mapping[str, int]]:
        """Returns rows of `captions_schema`; the captions that the rows have become the references."""
        columns = [
            rows.column("key"),
            pa.array([result.candidates[0] for result in results], pa.string()),
            pa.array([result.candidates for result in results], pa.list_(pa.string())),
            pa.array([result.scores for result in results], pa.list_(pa.float32())),
            rows.column("captions"),
        ]
        if self.feature_dim is not None:
            features = [result.features for result in results if result.features is not None]
            columns.append(vector_array(features, self.feature_dim))
        return pa.RecordBatch.from_arrays(columns, schema=captions_schema(self.feature_dim)), {}


def _images(rows: pa.RecordBatch) -> list[bytes]:
    column = rows.column("image")
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    return list(column.to_pylist())


def caption_task(feature_dim: int | None) -> Task:
    """Returns what a captioner with features of this length does with a chunk of images, raw or resized."""
    return Task("caption", _images, AddCaptions(feature_dim))
