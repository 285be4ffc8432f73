"""Ends a job at each change that it makes to the file system, and checks that it can be completed from there."""

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diptych.transforms import storage
from diptych.transforms.output_layout import JOB, PLAN, SCRATCH, SUCCESS

Step = Callable[[Path], object]

EVERY_THIRD_KILL = pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.long)])
"""Kills at every third change of the file system, and in a long test at each."""


class Killed(BaseException):
    """Stands for the end of the process."""


class Killer:
    """Ends what runs under it at its n-th change of the file system: from then on, nothing changes there any more.

    A write ends half way; what would clean up afterwards does not get to.
    """

    def __init__(self, patch: pytest.MonkeyPatch, at: int) -> None:
        self._num_events = 0
        self._at = at
        for name in ("mkdir", "replace", "link", "remove", "unlink", "rmdir"):
            patch.setattr(os, name, self._before(getattr(os, name)))
        killer = self

        class File(io.FileIO):
            def __init__(self, *args: Any) -> None:
                killer.event()
                super().__init__(*args)

            def write(self, data: Any) -> int:
                half = len(data) // 2
                super().write(memoryview(data)[:half])
                killer.event()
                return half + (super().write(memoryview(data)[half:]) or 0)

        patch.setattr(storage, "open", File, raising=False)

    @property
    def is_done(self) -> bool:
        return self._num_events > self._at

    def event(self) -> None:
        self._num_events += 1
        if self.is_done:
            raise Killed

    def _before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.event()
            return function(*args, **kwargs)

        return call


def files_in(folder: Path) -> dict[str, bytes]:
    """Returns the content of all files below a folder by their paths in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kills(tmp_path: Path, run: Step, prepare: Step = lambda _: None, step: int = 1) -> Iterator[Path]:
    """Yields the output that each kill of a run leaves, once for each state that is left; the last is a whole one.

    Args:
        tmp_path: An empty folder.
        run: What is killed, given the output.
        prepare: What was there before it.
        step: Of so many changes of the file system, the run is killed at one.
    """
    seen = set()
    at = 0
    is_done = True
    while is_done:
        out = tmp_path / f"killed-{at}"
        prepare(out)
        with pytest.MonkeyPatch.context() as patch:
            killer = Killer(patch, at)
            # The runner may wrap what its worker raises
            with contextlib.suppress(Killed, RuntimeError):
                run(out)
        is_done = killer.is_done
        if (left := _state(out)) not in seen or not is_done:
            seen.add(left)
            yield out
        shutil.rmtree(out, ignore_errors=True)
        at += step


def check_kills(
    tmp_path: Path, run: Step, expected: dict[str, bytes], prepare: Step = lambda _: None, step: int = 1
) -> int:
    """Checks that a run that is killed anywhere leaves no half file, and that the same run completes it.

    Args:
        tmp_path: An empty folder.
        run: What is killed, given the output, and what completes it.
        expected: The files of an undisturbed run.
        prepare: What was there before it.
        step: As of `kills`.

    Returns:
        How many different states were left.
    """
    prepare(tmp_path / "before")
    whole = expected.items() | files_in(tmp_path / "before").items()
    num_states = 0
    for out in kills(tmp_path, run, prepare, step):
        num_states += 1
        for name, data in files_in(out).items():
            if name in (JOB, SUCCESS):  # they show what there is of several data sets
                json.loads(data)
            elif not name.startswith((f"{SCRATCH}/", f"{PLAN}/")):
                assert (name, data) in whole, f"half of {name} in {out}"
        run(out)
        assert files_in(out) == expected, out
    return num_states


def _state(folder: Path) -> frozenset[tuple[str, bytes]]:
    """Returns what a later run could find; of scratch, only that there is some: nothing is read from there."""
    state = set()
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if name.startswith("_tmp/"):
            state.add(("_tmp/", b""))
        else:
            # a run that looks at its input anew names its plan by chance
            name = re.sub(r"^(_plan/\w+)-\w+", r"\1", name)
            state.add((name, path.read_bytes() if path.is_file() else b""))
    return frozenset(state)
