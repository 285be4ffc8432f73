"""Any model over chunks: one `ModelHandler` for Beam's `RunInference`, where a chunk is the batch.

A chunk becomes micro-batches. While the device is at one, background threads prepare the next ones, those of the
next chunk too; so the pipeline costs the model nothing that the bare loop over the same rows does not.
"""

import collections
import dataclasses
import functools
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.ml.inference.base import ModelHandler, RunInference
from apache_beam.pvalue import PCollection
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.shared import Shared
from apache_beam.utils.windowed_value import WindowedValue

from models.base import Model
from models.errors import ModelError
from models.spec import ModelSpec, load_model
from transforms.chunk import Chunk, ChunkKey, Reject, take_rows
from transforms.cores import keep_imports, num_cores
from transforms.errors import InputError
from transforms.failures import MODEL_ERROR, FailureCount, FailureLimit

Input = TypeVar("Input")
Output = TypeVar("Output")

# Micro-batches that are prepared ahead of the one on the device, a thread each
_LOOKAHEAD = max(2, min(4, num_cores() // 2))


class Failure(NamedTuple):
    """What comes of a row that the model fails on.

    Attributes:
        message: Why, in one line.
        out_of_memory: Whether the device is too small for the row alone.
    """

    message: str
    out_of_memory: bool = False


class _Bug(AssertionError):
    """A model that breaks its contract: no row is at fault."""


class _Work(NamedTuple):
    """Inputs on their way through a model.

    Attributes:
        inputs: All of them.
        order: Their ordinals in the order in which they go.
        pending: Micro-batches that are being prepared, first come first: their ordinals and what becomes of them.
    """

    inputs: Sequence[Any]
    order: list[int]
    pending: collections.deque[tuple[list[int], "Future[Any]"]]


class ModelRunner(Generic[Input, Output]):
    """A model at work in this process, and the micro-batch that its device has room for.

    Args:
        model: The model.
        batch_size: Most rows of a micro-batch; None takes the model's own.
    """

    def __init__(self, model: Model[Input, Output], batch_size: int | None = None) -> None:
        self._model = model
        self._batch_size = batch_size or model.batch_size
        self._device_lock = _lock_of(model)
        self._begun: dict[ChunkKey, _Work] = {}

    @property
    def batch_size(self) -> int:
        """Most rows of a micro-batch, as far as is known by now."""
        return self._batch_size

    def begin(self, key: ChunkKey, inputs: Sequence[Input]) -> None:
        """Starts to prepare the inputs of a chunk, which `run` will be given later."""
        self._begun[key] = self._work(inputs)

    def run(
        self, inputs: Sequence[Input] | Callable[[], Sequence[Input]], key: ChunkKey | None = None
    ) -> list[Output | Failure]:
        """Returns what the model makes of each input, in their order.

        Out of memory, micro-batches are halved, and stay so. Any other error is followed down to the row at fault.

        Args:
            inputs: The inputs, or what gives them where they were not begun.
            key: The chunk that `begin` was given.
        """
        work = self._begun.pop(key, None) if key else None
        work = work or self._work(inputs() if callable(inputs) else inputs)
        results: list[Any] = [None] * len(work.inputs)
        while work.pending:
            ordinals, prepared = work.pending.popleft()
            self._prepare_next(work)
            items = [work.inputs[ordinal] for ordinal in ordinals]
            for ordinal, result in zip(ordinals, self._finish(items, prepared), strict=True):
                results[ordinal] = result
        return results

    def _work(self, inputs: Sequence[Input]) -> _Work:
        costs = [self._model.cost(item) for item in inputs]
        order = list(range(len(inputs)))
        if len(set(costs)) > 1:
            # The dearest first: a device that is too small shows at once
            order.sort(key=lambda ordinal: -costs[ordinal])
        work = _Work(inputs, order, collections.deque())
        for _ in range(_LOOKAHEAD):
            self._prepare_next(work)
        return work

    def _prepare_next(self, work: _Work) -> None:
        ordinals = work.order[: self._batch_size]
        if ordinals:
            del work.order[: len(ordinals)]
            items = [work.inputs[ordinal] for ordinal in ordinals]
            work.pending.append((ordinals, _pool().submit(self._model.prepare, items)))

    def _finish(self, items: list[Input], prepared: "Future[Any]") -> list[Output | Failure]:
        """Returns the results of a micro-batch that is being prepared, or those of its halves."""
        if len(items) > self._batch_size:  # halved since
            return self._halves(items)
        try:
            return self._predict(prepared.result(), len(items))
        except _Bug:
            raise
        except Exception as error:
            failure = Failure(_one_line(error), _is_out_of_memory(error))
        del prepared  # and with it what lies on the device
        return self._after(failure, items)

    def _run_now(self, items: list[Input]) -> list[Output | Failure]:
        try:
            return self._predict(self._model.prepare(items), len(items))
        except _Bug:
            raise
        except Exception as error:
            failure = Failure(_one_line(error), _is_out_of_memory(error))
        return self._after(failure, items)

    def _predict(self, prepared: Any, num_inputs: int) -> list[Output | Failure]:
        with self._device_lock:
            outputs = self._model.predict(prepared)
        if len(outputs) != num_inputs:
            raise _Bug(f"{type(self._model).__name__} gave {len(outputs)} results for {num_inputs} inputs")
        return list(map(_checked, outputs, _are_finite(outputs)))

    def _after(self, failure: Failure, items: list[Input]) -> list[Output | Failure]:
        if len(items) == 1:
            return [failure]
        before = self._batch_size
        if failure.out_of_memory:
            self._batch_size = min(before, (len(items) + 1) // 2)
        results = self._halves(items)
        if any(isinstance(result, Failure) and result.out_of_memory for result in results):
            self._batch_size = before  # it was that row: the others have room
        return results

    def _halves(self, items: list[Input]) -> list[Output | Failure]:
        middle = (len(items) + 1) // 2
        results = []
        for half in (items[:middle], items[middle:]):
            results += self._halves(half) if len(half) > self._batch_size else self._run_now(half)
        return results


def run_model(
    model: Model[Input, Output], inputs: Sequence[Input], batch_size: int | None = None
) -> list[Output | Failure]:
    """Returns what a model makes of each input: `ModelRunner.run`, where there is no second chunk."""
    return ModelRunner(model, batch_size).run(inputs)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """Returns the threads that prepare, for all models of this process."""
    return ThreadPoolExecutor(_LOOKAHEAD, thread_name_prefix="prepare")


_locks: dict[int, threading.Lock] = {}


def _lock_of(model: Model[Any, Any]) -> threading.Lock:
    """Returns the one lock of a model: several transforms of a process may share it."""
    return _locks.setdefault(id(model), threading.Lock())


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # a model without it has no device to fill
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500].removesuffix(": ")


def _checked(output: Output, is_finite: bool) -> Output | Failure:
    return output if is_finite else Failure("the result holds numbers that are not finite")


def _are_finite(outputs: Sequence[Any]) -> list[bool]:
    """Tells of each result, a named tuple, whether its numbers are finite."""
    finite = np.ones(len(outputs), np.bool_)
    for column in zip(*outputs, strict=True):
        if isinstance(column[0], np.ndarray):
            finite &= np.isfinite(np.stack(column)).all(axis=1)
        elif isinstance(column[0], tuple):
            finite &= [
                all(not isinstance(value, float) or math.isfinite(value) for value in values)
                for values in column
            ]
    return list(map(bool, finite))


@dataclasses.dataclass(frozen=True)
class Task:
    """What a model does with the rows of a chunk.

    Attributes:
        stage: Stage of the rejects, one of `transforms.schemas.REASONS`.
        inputs: Gives what the model gets of rows.
        outputs: Gives, of rows and the model's results, the rows to write and counters.
    """

    stage: str
    inputs: Callable[[pa.RecordBatch], list[Any]]
    outputs: Callable[[pa.RecordBatch, list[Any]], tuple[pa.RecordBatch, Mapping[str, int]]]


def add_results(chunk: Chunk, results: Sequence[Any], task: Task) -> Chunk:
    """Returns a chunk with a model's results; rows that it failed on are rejects, `model_error`."""
    kept = [i for i, result in enumerate(results) if not isinstance(result, Failure)]
    lost = [
        Reject(chunk.rows["key"][i].as_py(), chunk.rows["row"][i].as_py(), MODEL_ERROR, result.message)
        for i, result in enumerate(results)
        if isinstance(result, Failure)
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
    """

    def __init__(self, spec: ModelSpec, task: Task, batch_size: int | None, max_failure_rate: float) -> None:
        super().__init__()
        self._spec, self._task, self._batch_size = spec, task, batch_size
        self._limit = FailureLimit(task.stage, max_failure_rate)
        self._shared_runner, self._shared_count = Shared(), Shared()
        self._count: FailureCount | None = None

    def load_model(self) -> ModelRunner[Any, Any]:
        """Returns the model of this process, loaded once.

        Raises:
            InputError: It cannot be loaded.
        """
        return self._shared_runner.acquire(self._load)

    def _load(self) -> ModelRunner[Any, Any]:
        try:
            return ModelRunner(load_model(self._spec), self._batch_size)
        except ModelError as error:
            raise InputError(str(error)) from error

    def begin(self, chunk: Chunk, model: ModelRunner[Any, Any]) -> None:
        """Starts to prepare a chunk that `run_inference` will be given later."""
        model.begin(chunk.key, self._task.inputs(chunk.rows))

    def run_inference(
        self, batch: Any, model: ModelRunner[Any, Any], inference_args: dict[str, Any] | None = None
    ) -> list[Chunk]:
        """Returns the chunk with the model's results.

        Raises:
            DiptychError: The model has failed on too many rows.
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
    """

    spec: ModelSpec
    task: Task
    batch_size: int | None = None
    max_failure_rate: float = 0.1

    def expand(self, chunks: PCollection[Chunk]) -> PCollection[Chunk]:
        """Applies the model by Beam's `RunInference`, a chunk behind what is being prepared."""
        handler = ChunkModelHandler(self.spec, self.task, self.batch_size, self.max_failure_rate)
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
        keep_imports()

    def start_bundle(self) -> None:
        self._waiting: Chunk | None = None

    def process(self, chunk: Chunk) -> Iterator[Chunk]:
        before, self._waiting = self._waiting, chunk
        self._handler.begin(chunk, self._model)
        if before is not None:
            yield before

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self._waiting is not None:
            yield WindowedValue(self._waiting, GlobalWindow().max_timestamp(), (GlobalWindow(),))
