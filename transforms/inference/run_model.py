"""Any model over chunks: one `ModelHandler` for Beam's `RunInference`, where a chunk is the batch."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.ml.inference.base import ModelHandler, RunInference
from apache_beam.pvalue import PCollection
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.shared import Shared
from apache_beam.utils.windowed_value import WindowedValue

from diptych.models.errors import ModelError, ModelOutageError
from diptych.models.spec import ModelSpec, load_model
from diptych.transforms.chunk import Chunk, ChunkKey, Reject, take_rows
from diptych.transforms.errors import InputError, ModelInputError
from diptych.transforms.inference.failures import MODEL_ERROR, FailureCount, FailureLimit
from diptych.transforms.inference.micro_batches import Failure, ModelRunner
from diptych.transforms.worker import freeze_gc


@dataclasses.dataclass(frozen=True)
class Task:
    """What a model does with the rows of a chunk.

    Attributes:
        stage: Stage of the rejects, one of `diptych.transforms.schemas.REASONS`.
        inputs: Gives what the model gets of rows.
        outputs: Gives, of rows and the model's results, the rows to write and counters.
        fault: Gives the reason and the message of a result that is a reject nevertheless, None of others.
    """

    stage: str
    inputs: Callable[[pa.RecordBatch], list[Any]]
    outputs: Callable[[pa.RecordBatch, list[Any]], tuple[pa.RecordBatch, Mapping[str, int]]]
    fault: Callable[[Any], tuple[str, str] | None] | None = None

    def fault_of(self, result: Any) -> tuple[str, str] | None:
        """Returns reason and message of a result that is a reject, None of others."""
        if isinstance(result, Failure):
            return MODEL_ERROR, result.message
        return self.fault(result) if self.fault else None


def add_results(chunk: Chunk, results: Sequence[Any], task: Task) -> Chunk:
    """Returns a chunk with a model's results; rows that it failed on are rejects, `model_error`."""
    faults = [task.fault_of(result) for result in results]
    kept = [i for i, fault in enumerate(faults) if fault is None]
    lost = [
        Reject(chunk.rows["key"][i].as_py(), chunk.rows["row"][i].as_py(), *fault)
        for i, fault in enumerate(faults)
        if fault is not None
    ]
    rows, counters = task.outputs(take_rows(chunk.rows, kept), [results[i] for i in kept])
    return chunk.advance(task.stage, rows, lost, counters)


class ChunkModelHandler(ModelHandler[Chunk, Chunk, ModelRunner[Any, Any]]):
    """Runs a model over chunks. The model is chosen, and its device, where it runs.

    Args:
        spec: The model.
        task: What it does.
        batch_size: Most rows of a micro-batch; None takes the model's own.
        max_failure_rate: The share of rows that it may fail on.
        digest: Of the model where the job started; None takes what is there.
    """

    def __init__(
        self,
        spec: ModelSpec,
        task: Task,
        batch_size: int | None,
        max_failure_rate: float,
        digest: str | None = None,
    ) -> None:
        super().__init__()
        self._spec, self._task, self._batch_size, self._digest = spec, task, batch_size, digest
        self._limit = FailureLimit(task.stage, max_failure_rate)
        self._shared_runner, self._shared_count = Shared(), Shared()
        self._count: FailureCount | None = None

    def load_model(self) -> ModelRunner[Any, Any]:
        """Returns the model of this process, loaded once.

        Raises:
            ModelInputError: It cannot be loaded, or is another than where the job started.
        """
        return self._shared_runner.acquire(self._load)

    def _load(self) -> ModelRunner[Any, Any]:
        try:
            model = load_model(self._spec)
        except ModelOutageError as error:
            raise InputError(str(error)) from error
        except ModelError as error:
            raise ModelInputError(str(error)) from error
        if self._digest not in (None, model.digest):
            raise ModelInputError(
                f"{self._spec} is another model on a worker (digest {model.digest}) than where the job started "
                f"({self._digest}). Keep the model as it is while a job runs, or give a place that all workers see."
            )
        return ModelRunner(model, self._batch_size)

    def begin(self, chunk: Chunk, model: ModelRunner[Any, Any]) -> None:
        """Starts to prepare a chunk that `run_inference` will be given later."""
        model.begin(chunk.key, self._task.inputs(chunk.rows))

    def run_inference(
        self, batch: Any, model: ModelRunner[Any, Any], inference_args: dict[str, Any] | None = None
    ) -> list[Chunk]:
        """Returns the chunk with the model's results.

        Raises:
            FailureLimitError: The model has failed on too many rows.
        """
        chunk: Chunk = batch
        results = model.run(functools.partial(self._task.inputs, chunk.rows), chunk.key)
        messages = [result.message for result in results if isinstance(result, Failure)]
        self._count = self._count or self._shared_count.acquire(lambda: FailureCount(self._limit))
        self._count.add(len(results), messages)
        return [add_results(chunk, results, self._task)]

    def should_skip_batching(self) -> bool:
        """Returns True: a chunk is a batch already."""
        return True

    def get_num_bytes(self, batch: Any) -> int:
        """Returns the size of a chunk's rows."""
        return int(batch.rows.nbytes)

    def get_metrics_namespace(self) -> str:
        """Returns the namespace of Beam's own metrics."""
        return "diptych"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_count": None}


@dataclasses.dataclass(eq=False)  # not frozen: Beam labels its transforms
class RunModel(beam.PTransform[PCollection[Chunk], PCollection[Chunk]]):
    """Chunks to chunks with a model's results.

    Attributes:
        spec: The model.
        task: What it does.
        batch_size: Most rows of a micro-batch; None takes the model's own.
        max_failure_rate: The share of rows that it may fail on.
        digest: Of the model where the job started; None takes what is there.
    """

    spec: ModelSpec
    task: Task
    batch_size: int | None = None
    max_failure_rate: float = 0.1
    digest: str | None = None

    def expand(self, chunks: PCollection[Chunk]) -> PCollection[Chunk]:
        """Applies the model by Beam's `RunInference`, a chunk behind what is being prepared."""
        handler = ChunkModelHandler(self.spec, self.task, self.batch_size, self.max_failure_rate, self.digest)
        return (
            chunks
            | "Prepare" >> beam.ParDo(_Prepare(handler)).with_output_types(Chunk)
            | "Infer" >> RunInference(handler, model_identifier=str(self.spec)).with_output_types(Chunk)
        )


class _Prepare(beam.DoFn):
    """Hands on a chunk when the next is being prepared: the device has never to wait for its first micro-batch."""

    def __init__(self, handler: ChunkModelHandler) -> None:
        self._handler = handler

    def setup(self) -> None:
        self._model = self._handler.load_model()
        self._begun: list[ChunkKey] = []
        freeze_gc()

    def start_bundle(self) -> None:
        self._forget()
        self._waiting: Chunk | None = None

    def process(self, chunk: Chunk) -> Iterator[Chunk]:
        before, self._waiting = self._waiting, chunk
        self._begun = [*self._begun[-1:], chunk.key]  # those before are done
        self._handler.begin(chunk, self._model)
        if before is not None:
            yield before

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self._waiting is not None:
            yield WindowedValue(self._waiting, GlobalWindow().max_timestamp(), (GlobalWindow(),))

    def teardown(self) -> None:
        self._forget()

    def _forget(self) -> None:
        """Lets go of what was begun in a bundle that failed before its turn came."""
        for key in self._begun:
            self._model.forget(key)
        self._begun = []
