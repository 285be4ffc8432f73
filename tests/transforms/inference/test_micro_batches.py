import errno
import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diptych.models.base import Captions, Model, TextVector
from diptych.transforms.chunk import ChunkKey
from diptych.transforms.errors import DeviceError
from diptych.transforms.inference import micro_batches
from diptych.transforms.inference.micro_batches import Failure, ModelRunner, run_model


class Lengths(Model[str, TextVector]):
    """A text becomes its length; what it is asked is kept, and some texts are trouble.

    Attributes:
        room: Rows for which there is memory.
        prepared: Micro-batches that were prepared.
        predicted: Micro-batches that were predicted.
    """

    digest, batch_size, dim = "d" * 16, 4, 1

    def __init__(self, room: int = 10**6, by_cost: bool = False) -> None:
        self.room, self.by_cost = room, by_cost
        self.prepared: list[list[str]] = []
        self.predicted: list[list[str]] = []

    def prepare(self, inputs: Sequence[str]) -> list[str]:
        self.prepared.append(list(inputs))
        if any("unreadable" in text for text in inputs):
            raise ValueError("this text\ncannot be read")
        return list(inputs)

    def predict(self, prepared: list[str]) -> list[TextVector]:
        self.predicted.append(prepared)
        if len(prepared) > self.room or any("huge" in text for text in prepared):
            raise torch.OutOfMemoryError("no room")
        if any("bad" in text for text in prepared):
            raise RuntimeError("bad row")
        return [self.vector(text) for text in prepared]

    def vector(self, text: str) -> TextVector:
        value = {"nan": math.nan, "inf": math.inf}.get(text, len(text))
        return TextVector(np.array([value], np.float32), known=text != "")

    def cost(self, item: str) -> int:
        return len(item) if self.by_cost else 0


def lengths_of(results: Sequence[Any]) -> list[float | None]:
    return [None if isinstance(result, Failure) else float(result.values[0]) for result in results]


TEXTS_OF_LENGTHS = ["x" * length for length in (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5)]
LENGTHS: list[float | None] = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


class TestMicroBatches:
    @pytest.mark.parametrize("batch_size", [None, 1, 3, 11, 100])
    @pytest.mark.parametrize("by_cost", [False, True])
    def test_results_come_in_the_order_of_the_inputs(self, batch_size, by_cost):
        model = Lengths(by_cost=by_cost)
        assert lengths_of(run_model(model, TEXTS_OF_LENGTHS, batch_size)) == LENGTHS
        most = batch_size or 4
        sizes = [len(batch) for batch in model.predicted]
        assert sizes == [most] * (11 // most) + ([11 % most] if 11 % most else [])

    def test_nothing_is_nothing(self):
        assert run_model(Lengths(), []) == []

    def test_equal_costs_keep_their_order(self):
        model = Lengths()
        run_model(model, list("abcdefghij"))
        assert model.predicted == [list("abcd"), list("efgh"), list("ij")]

    def test_inputs_of_one_cost_go_together(self):
        model = Lengths(by_cost=True)
        run_model(model, ["a", "xxx", "b", "yyy", "c", "zzz", "d", "www"])
        assert model.predicted == [["xxx", "yyy", "zzz", "www"], ["a", "b", "c", "d"]]


class TestOutOfMemory:
    @pytest.mark.parametrize(("room", "left"), [(100, 4), (4, 4), (3, 2), (2, 2), (1, 1)])
    def test_micro_batches_are_halved_and_stay_so(self, room, left):
        model = Lengths(room)
        runner = ModelRunner(model)
        assert lengths_of(runner.run(TEXTS_OF_LENGTHS)) == LENGTHS
        assert runner.batch_size == left
        before = len(model.predicted)
        assert lengths_of(runner.run(TEXTS_OF_LENGTHS)) == LENGTHS
        assert {len(batch) for batch in model.predicted[before:]} <= {left, 11 % left}

    def test_what_is_prepared_already_is_halved_before_it_is_tried(self):
        model = Lengths(2)
        run_model(model, TEXTS_OF_LENGTHS)
        assert [len(batch) for batch in model.predicted if len(batch) > 2] == [4]

    def test_one_row_that_has_no_room_leaves_the_others_theirs(self):
        model = Lengths()
        runner = ModelRunner(model, 8)
        results = runner.run(["a", "b", "huge", *"defgh"])
        assert lengths_of(results) == [1, 1, None, 1, 1, 1, 1, 1]
        assert results[2] == Failure("OutOfMemoryError: no room", True)
        assert runner.batch_size == 8

    def test_a_device_without_room_for_any_fails_every_row(self):
        assert lengths_of(run_model(Lengths(0), ["a", "b", "c"])) == [None] * 3


class TestFailures:
    @pytest.mark.parametrize("trouble", ["bad", "unreadable", "nan", "inf", "huge"])
    @pytest.mark.parametrize("place", range(9))
    def test_cost_the_row_at_fault(self, trouble, place):
        texts = list("abcdefghi")
        texts[place] = trouble
        results = run_model(Lengths(), texts)
        assert lengths_of(results) == [None if text == trouble else 1 for text in texts]

    @given(st.lists(st.sampled_from(["a", "bb", "bad", "unreadable", "nan", "huge"])), st.integers(1, 9))
    def test_however_many_there_are(self, texts, batch_size):
        expected = [len(text) if text in ("a", "bb") else None for text in texts]
        assert lengths_of(run_model(Lengths(by_cost=True), texts, batch_size)) == expected

    def test_say_why_in_a_line(self):
        bad, unreadable, nan = run_model(Lengths(), ["bad", "unreadable", "nan"])
        assert bad == Failure("RuntimeError: bad row")
        assert unreadable == Failure("ValueError: this text cannot be read")
        assert nan == Failure("the result holds numbers that are not finite")

    def test_rows_that_are_whole_are_not_tried_again(self):
        model = Lengths()
        run_model(model, ["a", "b", "c", "nan"])
        assert model.predicted == [["a", "b", "c", "nan"]]

    @pytest.mark.parametrize(
        ("result", "is_whole"),
        [
            (Captions(("a",), (-1.5,)), True),
            (Captions(("a", "b"), (-1.5, math.nan)), False),
            (Captions(("a",), (-math.inf,)), False),
            (Captions(("a",), (-1.5,), np.array([1, 2], np.float32)), True),
            (Captions(("a",), (-1.5,), np.array([1, math.nan], np.float32)), False),
        ],
    )
    def test_numbers_of_captions_are_looked_at_too(self, result, is_whole):
        class Says(Lengths):
            def predict(self, prepared: list[str]) -> list[Any]:
                return [result for _ in prepared]

        (found,) = run_model(Says(), ["x"])
        assert isinstance(found, Captions) is is_whole

    def test_a_model_that_loses_rows_is_a_bug(self):
        class Loses(Lengths):
            def predict(self, prepared: list[str]) -> list[TextVector]:
                return [self.vector(text) for text in prepared[1:]]

        with pytest.raises(AssertionError, match="gave 3 results for 4 inputs"):
            run_model(Loses(), list("abcd"))


class Dies(Lengths):
    """A model whose device dies: from then on every call fails, as after a sticky CUDA error.

    Attributes:
        after: Calls that go well.
        error: What each later call raises.
    """

    def __init__(self, after: int, error: Exception) -> None:
        super().__init__()
        self.after, self.error = after, error

    def predict(self, prepared: list[str]) -> list[TextVector]:
        if len(self.predicted) >= self.after:
            self.predicted.append(prepared)
            raise self.error
        return super().predict(prepared)


SYSTEM_ERRORS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("NCCL Error 2: unhandled system error"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:83] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("can't start new thread"),
    RuntimeError("HIP error: unspecified launch failure"),
    RuntimeError("driver shutting down"),
    MemoryError(),
    np._core._exceptions._ArrayMemoryError((1 << 40,), np.dtype("u1")),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EMFILE, "Too many open files"),
    ConnectionResetError("reset"),
    ModuleNotFoundError("No module named 'x'"),
    BrokenProcessPool("a worker died"),
]


class TestMachine:
    @pytest.mark.parametrize("error", SYSTEM_ERRORS, ids=lambda error: f"{type(error).__name__}-{error}"[:40])
    def test_its_errors_end_the_job_at_once_and_blame_no_row(self, error):
        model = Dies(2, error)
        with pytest.raises(DeviceError, match=r"^The model cannot go on: .* run the same command again"):
            ModelRunner(model).run(list("abcdefghijkl"))
        assert len(model.predicted) == 3

    @pytest.mark.parametrize("error", SYSTEM_ERRORS[:3], ids=str)
    def test_so_do_those_of_the_threads_that_prepare_and_finish(self, error, monkeypatch):
        def fail(*_: object) -> None:
            raise error

        for name in ("prepare", "finish"):
            model = Finishes()
            model.threads = set()
            monkeypatch.setattr(model, name, fail)
            monkeypatch.setattr(Finishes, name, fail)
            with pytest.raises(DeviceError, match="cannot go on"):
                ModelRunner(model).run(list("abc"))
            monkeypatch.undo()

    def test_one_that_is_wrapped_is_seen(self):
        class Wraps(Lengths):
            def predict(self, prepared: list[str]) -> list[TextVector]:
                try:
                    raise RuntimeError("CUDA error: unknown error")
                except RuntimeError as error:
                    raise ValueError("cannot caption this") from error

        with pytest.raises(DeviceError):
            run_model(Wraps(), ["a"])

    @pytest.mark.parametrize(
        "error",
        [
            ValueError("a CUDA error of yours"),
            RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
            RuntimeError("expected scalar type Half but found Float"),
            IndexError("index out of range in self"),
            OSError("image file is truncated"),
            KeyError("pixel_values"),
        ],
        ids=str,
    )
    def test_errors_of_a_row_cost_the_row(self, error):
        class Fails(Lengths):
            def predict(self, prepared: list[str]) -> list[TextVector]:
                if "bad" in prepared:
                    raise error
                return super().predict(prepared)

        assert lengths_of(run_model(Fails(), ["a", "bad", "b"])) == [1, None, 1]

    def test_a_fault_that_has_no_words_shows_on_a_row_that_was_done_before(self):
        model = Dies(3, RuntimeError("unlucky"))
        runner = ModelRunner(model)
        assert lengths_of(runner.run(list("abcdefgh"))) == [1] * 8
        with pytest.raises(DeviceError, match=r"every row .*unlucky.*could do before .*unlucky"):
            runner.run(list("abcdefgh"))

    def test_numbers_that_are_not_finite_for_all_show_so_as_well(self):
        model = Lengths()
        runner = ModelRunner(model)
        runner.run(["a"])
        model.vector = lambda text: TextVector(np.array([math.nan], np.float32))  # type: ignore[method-assign]
        with pytest.raises(DeviceError, match="not finite"):
            runner.run(["b", "c"])

    @pytest.mark.parametrize("number", [1, 2, 4])
    def test_a_whole_micro_batch_of_bad_rows_costs_these_alone(self, number):
        runner = ModelRunner(Lengths(), number)
        texts = ["a"] * number + ["bad"] * number + ["b"] * number
        assert lengths_of(runner.run(texts)) == [1] * number + [None] * number + [1] * number

    def test_of_100_000_rows_after_it_none_is_rejected(self):
        model = Dies(1000, RuntimeError("CUDA error: unspecified launch failure"))
        runner = ModelRunner(model, 8)

        def run_all() -> None:
            for _ in range(1000):
                assert not any(isinstance(result, Failure) for result in runner.run(["x"] * 100))

        with pytest.raises(DeviceError):
            run_all()


class TestBegun:
    def test_a_chunk_that_is_forgotten_leaves_nothing(self):
        runner = ModelRunner(Lengths())
        runner.begin(ChunkKey("a", 0), ["a"])
        runner.forget(ChunkKey("a", 0))
        runner.forget(ChunkKey("a", 1))
        assert runner._begun == {}
        assert lengths_of(runner.run(lambda: ["bb"], ChunkKey("a", 0))) == [2]

    def test_of_bundles_that_failed_only_so_many_are_kept(self):
        runner = ModelRunner(Lengths())
        for index in range(500):
            runner.begin(ChunkKey("a", index), ["a"])
        assert len(runner._begun) == micro_batches._MOST_BEGUN
        assert lengths_of(runner.run(lambda: ["bb"], ChunkKey("a", 0))) == [2]
        assert lengths_of(runner.run(lambda: [], ChunkKey("a", 499))) == [1]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert condition()


class Finishes(Lengths):
    """The length is doubled afterwards; some texts are trouble only then."""

    def predict(self, prepared: list[str]) -> list[Any]:
        super().predict(prepared)
        return [(text,) for text in prepared]

    def finish(self, predicted: tuple[str]) -> TextVector:
        self.threads.add(threading.current_thread().name)
        if "late" in predicted[0]:
            raise ValueError("too late")
        return TextVector(np.array([2 * len(predicted[0])], np.float32))

    threads: set[str]


class TestFinish:
    @pytest.fixture
    def model(self) -> Finishes:
        model = Finishes()
        model.threads = set()
        return model

    @pytest.mark.parametrize("batch_size", [1, 3, 100])
    def test_what_is_finished_comes_in_the_order_of_the_inputs(self, model, batch_size):
        texts = ["a" * i for i in range(10)]
        assert lengths_of(run_model(model, texts, batch_size)) == [2 * i for i in range(10)]
        assert all(name.startswith("prepare") for name in model.threads)  # in the background

    def test_one_that_cannot_be_finished_costs_its_row(self, model):
        found = run_model(model, ["a", "late", "bad", "bbb"])
        assert lengths_of(found) == [2, None, None, 6]
        assert [found[1], found[2]] == [Failure("ValueError: too late"), Failure("RuntimeError: bad row")]
        assert model.predicted.count(["late"]) <= 1  # it is not tried again for that

    def test_the_next_is_predicted_meanwhile(self, model, monkeypatch):
        """The first finishes only when the second micro-batch is predicted: in turn, it would wait for ever."""
        second = threading.Event()
        predict, finish = Finishes.predict, Finishes.finish

        def predicting(self: Finishes, prepared: list[str]) -> list[Any]:
            if "b" in prepared:
                second.set()
            return predict(self, prepared)

        def finishing(self: Finishes, predicted: tuple[str]) -> TextVector:
            assert second.wait(10)
            return finish(self, predicted)

        monkeypatch.setattr(Finishes, "predict", predicting)
        monkeypatch.setattr(Finishes, "finish", finishing)
        assert lengths_of(run_model(model, ["a", "b"], 1)) == [2, 2]


class TestOverlap:
    def test_the_next_are_prepared_while_one_is_predicted_and_no_more(self):
        ahead = micro_batches._LOOKAHEAD
        seen: list[int] = []

        class Slow(Lengths):
            def predict(self, prepared: list[str]) -> list[TextVector]:
                if len(self.predicted) == 2:  # in the middle, when all that may be is under way
                    wait_for(lambda: len(self.prepared) == 3 + ahead)
                    time.sleep(0.05)
                seen.append(len(self.prepared) - len(self.predicted) - 1)
                return super().predict(prepared)

        run_model(Slow(), ["x"] * 4 * 20)
        assert len(seen) == 20
        assert seen[2] == ahead
        assert max(seen) <= ahead

    def test_the_next_chunk_is_begun_too(self):
        model = Lengths()
        runner = ModelRunner(model)
        runner.begin(ChunkKey("a", 1), ["later"])
        wait_for(lambda: model.prepared == [["later"]])
        assert lengths_of(runner.run(["x"])) == [1]
        never = iter(())
        assert lengths_of(runner.run(lambda: next(never), ChunkKey("a", 1))) == [5]
        assert model.prepared == [["later"], ["x"]]

    def test_a_chunk_that_was_not_begun_is_run_all_the_same(self):
        assert lengths_of(ModelRunner(Lengths()).run(lambda: ["abc"], ChunkKey("a", 0))) == [3]

    def test_one_predict_at_a_time_whoever_asks(self):
        inside = itertools.count()
        most = 0

        class Alone(Lengths):
            running = 0

            def predict(self, prepared: list[str]) -> list[TextVector]:
                nonlocal most
                self.running += 1
                most = max(most, self.running)
                time.sleep(0.001)
                next(inside)
                self.running -= 1
                return super().predict(prepared)

        model = Alone()
        runners = [ModelRunner(model), ModelRunner(model)]
        threads = [
            threading.Thread(target=runners[number % 2].run, args=(["x"] * 40,)) for number in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (most, next(inside)) == (1, 40)
