"""Jobs that run in one output folder at the same time: every order of what they do to the store must end well."""

import concurrent.futures
import contextlib
import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from kills import files_in

from diptych.pipelines.lifecycle.output_contents import OutputContents
from diptych.pipelines.lifecycle.output_folder import (
    DatasetClaim,
    State,
    check_output,
    read_jobs,
    start_writing,
    take_output,
)
from diptych.transforms import output_layout, storage
from diptych.transforms.chunk import Chunk, ChunkKey, Reject, reject_batch
from diptych.transforms.errors import DiptychError, OutputError
from diptych.transforms.finish import Expected, Totals, finish, read_success
from diptych.transforms.output_layout import JOB, SUCCESS, read_json
from diptych.transforms.schemas import captions_schema, images_schema
from diptych.transforms.sink import Sink, WriteChunks, committed

SCHEMAS = {"images": images_schema(), "captions": captions_schema(), "embeddings": captions_schema()}
SEEDS = range(200)


class Scheduler:
    """Lets one of several threads at a time do its next step, in an order that follows from a seed."""

    def __init__(self, seed: int, jobs: list[Callable[[], None]]) -> None:
        self._random = random.Random(seed)
        self._turns = [threading.Semaphore(0) for _ in jobs]
        self._arrived = threading.Semaphore(0)
        self._alive = [True] * len(jobs)
        self._number = threading.local()
        self.errors: list[BaseException | None] = [None] * len(jobs)
        self._threads = [
            threading.Thread(target=self._run, args=item, daemon=True) for item in enumerate(jobs)
        ]

    def run(self) -> None:
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            assert self._arrived.acquire(timeout=60)
        while any(self._alive):
            number = self._random.choice([n for n, alive in enumerate(self._alive) if alive])
            self._turns[number].release()
            assert self._arrived.acquire(timeout=60)
        for thread in self._threads:
            thread.join()

    def step(self) -> None:
        """Waits for the thread's turn; called before whatever a job does to the store."""
        if (number := getattr(self._number, "value", None)) is not None:
            self._arrived.release()
            assert self._turns[number].acquire(timeout=60)

    def _run(self, number: int, job: Callable[[], None]) -> None:
        self._number.value = number
        try:
            self.step()
            job()
        except BaseException as error:
            self.errors[number] = error
        finally:
            self._alive[number] = False
            self._arrived.release()


class SameThread(concurrent.futures.Executor):
    """Runs what it is given at once, so that it is part of the order that the scheduler makes."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(
        self, call: Callable[..., Any], /, *args: Any, **options: Any
    ) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            future.set_result(call(*args, **options))
        except Exception as error:
            future.set_exception(error)
        return future


@contextlib.contextmanager
def steps_of(scheduler: Scheduler) -> Iterator[None]:
    """Has every use of a store be a step."""
    with pytest.MonkeyPatch.context() as patch:
        locate = storage.locate

        def step_and_locate(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
            scheduler.step()
            return locate(url)

        for module in (storage, output_layout):
            patch.setattr(module, "locate", step_and_locate)
        patch.setattr("diptych.transforms.sink.locate", step_and_locate)
        patch.setattr("diptych.pipelines.lifecycle.output_contents.locate", step_and_locate)
        for name in ("_replace", "_link"):
            place = getattr(storage, name)

            def step_and_place(temporary: str, path: str, place: Any = place) -> None:
                scheduler.step()
                place(temporary, path)

            patch.setattr(storage, name, step_and_place)
        patch.setattr(os, "fsync", lambda _: None)  # no power is cut here
        patch.setattr("diptych.transforms.sink.concurrent.futures.ThreadPoolExecutor", SameThread)
        yield


def rows_of(dataset: str, shard: str, index: int, size_px: int) -> pa.RecordBatch:
    row = {"key": f"{shard}/{index}"} | ({"width": size_px} if dataset == "images" else {"caption": "a"})
    return pa.RecordBatch.from_pylist([row], schema=SCHEMAS[dataset])


def job(
    root: str, dataset: str, size_px: int = 64, reads_own_images: bool = False, overwrite: bool = False
) -> Callable[[], None]:
    """Returns what `launch` and its workers do to an output, for two shards of two chunks."""

    def run() -> None:
        fingerprint = {"job": dataset, "options": {"size_px": size_px}}
        claim = DatasetClaim(dataset, fingerprint, overwrite, reads_own_images)
        contents = OutputContents.read(root)
        if check_output(root, claim, contents) is State.DONE:
            return
        record = take_output(root, claim, contents)
        left = start_writing(root, claim, ["a", "b"], contents=None if overwrite else contents)
        name = record.fingerprint
        sink = Sink(root, dataset, {"fingerprint": name}, SCHEMAS[dataset], record, (), *left)
        writer = WriteChunks(sink).dofn()
        writer.setup()
        totals = Totals()
        try:
            for shard in ("a", "b"):
                done = list(committed(sink, shard, shard))
                for index in range(len(done), 2):
                    rows = rows_of(dataset, shard, index, size_px)
                    lost = [Reject("", 1, "missing_image", "m")] if dataset == "images" and not index else []
                    rejects = reject_batch(shard, "read", lost)
                    chunk = Chunk(ChunkKey(shard, index), rows, rejects, index == 1, input=shard)
                    writer.start_bundle()
                    assert not list(writer.process(chunk))
                    done += [commit.value for commit in writer.finish_bundle()]
                for commit in done:
                    totals = totals.add(commit)
            finish({dataset: totals}, root, {dataset: Expected(2, claim=record)}, name)
        except DiptychError:
            if overwrite or check_output(root, claim) is not State.DONE:
                raise

    return run


def race(seed: int, jobs: list[Callable[[], None]]) -> list[BaseException | None]:
    scheduler = Scheduler(seed, jobs)
    with steps_of(scheduler):
        scheduler.run()
    return scheduler.errors


class TestSameCommandTwice:
    def test_both_end_well_and_the_files_are_those_of_one(self, tmp_path):
        job(str(tmp_path / "alone"), "images")()
        expected = files_in(tmp_path / "alone")
        for seed in SEEDS:
            root = tmp_path / str(seed)
            errors = race(seed, [job(str(root), "images"), job(str(root), "images")])
            assert errors == [None, None], seed
            assert files_in(root) == expected, seed


class TestTwoDifferentCommands:
    def test_one_is_refused_and_nothing_is_mixed(self, tmp_path):
        alone = {}
        for size_px in (64, 96):
            job(str(tmp_path / f"{size_px}px"), "images", size_px)()
            alone[size_px] = files_in(tmp_path / f"{size_px}px")
        winners = set()
        for seed in SEEDS:
            root = tmp_path / str(seed)
            errors = race(seed, [job(str(root), "images", 64), job(str(root), "images", 96)])
            refused = [error for error in errors if error is not None]
            assert len(refused) == 1, (seed, errors)
            assert isinstance(refused[0], OutputError)
            assert "options.size_px is" in str(refused[0])
            winner = 96 if errors[0] else 64
            winners.add(winner)
            assert files_in(root) == alone[winner], seed
        assert winners == {64, 96}

    def test_of_raw_data_one_is_refused_though_they_write_different_data_sets(self, tmp_path):
        winners = set()
        for seed in SEEDS[:60]:
            root = tmp_path / str(seed)
            errors = race(seed, [job(str(root), "images"), job(str(root), "captions")])
            refused = [error for error in errors if error is not None]
            assert len(refused) == 1, (seed, errors)
            assert isinstance(refused[0], OutputError)
            assert "made from another input" in str(refused[0])
            winner = "captions" if errors[0] else "images"
            winners.add(winner)
            assert set(read_success(str(root)) or {}) == {winner}
            assert set(read_jobs(str(root)) or {}) == {winner}
        assert winners == {"images", "captions"}


class TestOverwriteWhileAnotherIsAtWork:
    def test_what_is_said_to_be_complete_is_of_one_run(self, tmp_path):
        alone = {}
        for size_px in (64, 96):
            job(str(tmp_path / f"{size_px}px"), "images", size_px)()
            alone[size_px] = files_in(tmp_path / f"{size_px}px")
        ends = set()
        for seed in SEEDS[:60]:
            root = tmp_path / str(seed)
            errors = race(seed, [job(str(root), "images", 64), job(str(root), "images", 96, overwrite=True)])
            assert all(isinstance(error, OutputError | None) for error in errors), (seed, errors)
            ends.add(tuple(error is None for error in errors))
            owner = (read_jobs(str(root)) or {})["images"]["options"]["size_px"]
            if not read_success(str(root)):
                job(str(root), "images", owner)()  # whose it is goes on with the same command
            assert files_in(root) == alone[owner], (seed, errors)
        assert (False, True) in ends


class TestDataSetsOfOneOutput:
    def test_those_that_end_together_are_all_there(self, tmp_path):
        for seed in SEEDS[:60]:
            root = tmp_path / str(seed)
            job(str(root), "images")()
            names = ("captions", "embeddings")
            errors = race(seed, [job(str(root), name, reads_own_images=True) for name in names])
            assert errors == [None, None], seed
            expected = {"images", "captions", "embeddings"}
            for shown in (read_success(str(root)), read_json(str(root), SUCCESS), read_json(str(root), JOB)):
                assert set(shown or {}) == expected, seed
            assert not {"_tmp", "_plan"} & {path.name for path in root.iterdir()}, seed


def order_of(seed: int) -> list[str]:
    order: list[str] = []

    def work(name: str) -> Callable[[], None]:
        def run() -> None:
            for _ in range(8):
                scheduler.step()
                order.append(name)

        return run

    scheduler = Scheduler(seed, [work("a"), work("b")])
    scheduler.run()
    return order


def test_the_order_is_that_of_the_seed_and_differs():
    assert order_of(1) == order_of(1) != order_of(2)
    assert len(list(itertools.groupby(order_of(1)))) > 2
