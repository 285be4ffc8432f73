"""A model at work: micro-batches, prepared ahead, halved where the device is too small, bisected to the row at fault.

While the device is at one micro-batch, background threads prepare the next ones, those of the next chunk too, and
finish what came of the last; so a model loses nothing against the bare loop over the same rows.
"""

import collections
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from diptych.models.base import Model
from diptych.models.errors import one_line
from diptych.models.model_thread import run_on_model_thread
from diptych.transforms.chunk import ChunkKey
from diptych.transforms.inference.device_errors import (
    device_error,
    is_of_machine,
    is_out_of_device_memory,
    model_error,
)
from diptych.transforms.worker import num_cores

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


# A chunk that is begun in a bundle that fails is never asked for; of more than so many, the oldest are such
_MOST_BEGUN = 64


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
        self._begun: dict[ChunkKey, _Work] = {}
        self._good: Input | None = None
        self._finishes = type(model).finish is not Model.finish

    @property
    def batch_size(self) -> int:
        """Most rows of a micro-batch, as far as is known by now."""
        return self._batch_size

    def begin(self, key: ChunkKey, inputs: Sequence[Input]) -> None:
        """Starts to prepare the inputs of a chunk, which `run` will be given later."""
        self._begun[key] = self._work(inputs)
        for oldest in list(self._begun)[:-_MOST_BEGUN]:
            self.forget(oldest)

    def forget(self, key: ChunkKey) -> None:
        """Lets go of a chunk that was begun, if it was; `run` can do it all the same."""
        if work := self._begun.pop(key, None):
            for _, prepared in work.pending:
                prepared.cancel()

    def run(
        self, inputs: Sequence[Input] | Callable[[], Sequence[Input]], key: ChunkKey | None = None
    ) -> list[Output | Failure]:
        """Returns what the model makes of each input, in their order.

        Out of memory, micro-batches are halved, and stay so. Any other error is followed down to the row at fault; no
        row is, where the model fails on all of a micro-batch and on one that it could do before.

        Args:
            inputs: The inputs, or what gives them where they were not begun.
            key: The chunk that `begin` was given.

        Raises:
            DeviceError: The device, its libraries or the machine's memory failed.
        """
        work = self._begun.pop(key, None) if key else None
        work = work or self._work(inputs() if callable(inputs) else inputs)
        results: list[Any] = [None] * len(work.inputs)
        while work.pending:
            ordinals, prepared = work.pending.popleft()
            self._prepare_next(work)
            items = [work.inputs[ordinal] for ordinal in ordinals]
            batch = self._results(items, prepared)
            self._check(items, batch)
            for ordinal, result in zip(ordinals, batch, strict=True):
                results[ordinal] = result
        return [result.result() if isinstance(result, Future) else result for result in results]

    def _check(self, items: list[Input], results: list[Any]) -> None:
        """Keeps an input that the model can do, and tries it again when the model fails on all of a micro-batch.

        Raises:
            DeviceError: The model fails on that one too, by now.
        """
        good = next(
            (item for item, result in zip(items, results, strict=True) if not _is_failure(result)), None
        )
        if good is not None:
            self._good = good
        elif items and self._good is not None:
            [again] = self._run_now([self._good])
            if _is_failure(again):
                raise model_error(results[0].message, again.message)

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

    def _results(self, items: list[Input], prepared: "Future[Any]") -> list[Any]:
        """Returns the results of a micro-batch that is being prepared, or those of its halves; some still come."""
        if len(items) > self._batch_size:  # halved since
            return self._halves(items)
        try:
            return self._predict(prepared.result(), len(items))
        except Exception as error:
            failure = _failure(error)
        del prepared  # and with it what lies on the device
        return self._after(failure, items)

    def _run_now(self, items: list[Input]) -> list[Any]:
        try:
            return self._predict(self._model.prepare(items), len(items))
        except Exception as error:
            failure = _failure(error)
        return self._after(failure, items)

    def _predict(self, prepared: Any, num_inputs: int) -> list[Any]:
        outputs = run_on_model_thread(self._model.predict, prepared)
        if len(outputs) != num_inputs:
            raise _Bug(f"{type(self._model).__name__} gave {len(outputs)} results for {num_inputs} inputs")
        checked = list(map(_checked, outputs, _are_finite(outputs)))
        if self._finishes:
            return [out if isinstance(out, Failure) else _pool().submit(self._finish, out) for out in checked]
        return checked

    def _finish(self, predicted: Any) -> Output | Failure:
        try:
            return self._model.finish(predicted)
        except Exception as error:
            return _failure(error)

    def _after(self, failure: Failure, items: list[Input]) -> list[Any]:
        if len(items) == 1:
            return [failure]
        before = self._batch_size
        if failure.out_of_memory:
            self._batch_size = min(before, (len(items) + 1) // 2)
        results = self._halves(items)
        if any(isinstance(result, Failure) and result.out_of_memory for result in results):
            self._batch_size = before  # it was that row: the others have room
        return results

    def _halves(self, items: list[Input]) -> list[Any]:
        middle = (len(items) + 1) // 2
        results: list[Any] = []
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
    """Returns the threads that prepare and finish, for all models of this process."""
    return ThreadPoolExecutor(_LOOKAHEAD, thread_name_prefix="prepare")


def _failure(error: Exception) -> Failure:
    """Returns what an error makes of the rows that it comes of; raises it where it is none of theirs."""
    if isinstance(error, _Bug):
        raise error
    if is_of_machine(error):
        raise device_error(one_line(error, 500, with_type=True)) from error
    return Failure(one_line(error, 500, with_type=True), is_out_of_device_memory(error))


def _is_failure(result: Any) -> bool:
    return isinstance(result, Failure)


def _checked(output: Output, is_finite: bool) -> Output | Failure:
    return output if is_finite else Failure("the result holds numbers that are not finite")


def _are_finite(outputs: Sequence[Any]) -> list[bool]:
    """Tells of each result, a named tuple, whether its numbers are finite."""
    finite = np.ones(len(outputs), np.bool_)
    for column in zip(*outputs, strict=True):
        if isinstance(column[0], np.ndarray) and column[0].dtype.kind == "f":
            finite &= np.isfinite(np.stack(column)).all(axis=1)
        elif isinstance(column[0], tuple):
            finite &= [
                all(not isinstance(value, float) or math.isfinite(value) for value in values)
                for values in column
            ]
    return list(map(bool, finite))
