import io
import os
import sys

import pytest

from diptych.pipelines.training import progress
from diptych.pipelines.training.progress import Display, describe_entry


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2


def test_lines_now_and_then(clock, capsys):
    display = Display(epochs=15, quiet=False)
    for done in range(0, 301, 10):
        display.rows("training", 2, done, 1000, 3.14159)
        clock.now += 1
    assert capsys.readouterr().err.splitlines() == [
        "diptych: epoch 3/15, training 100/1,000 rows, loss 3.142, 10 rows/s, 1:30 left of it",
        "diptych: epoch 3/15, training 200/1,000 rows, loss 3.142, 10 rows/s, 1:20 left of it",
        "diptych: epoch 3/15, training 300/1,000 rows, loss 3.142, 10 rows/s, 1:10 left of it",
    ]


def test_rate_is_of_what_this_run_did(clock, capsys):
    display = Display(epochs=15, quiet=False)
    display.rows("training", 0, 900, 1000)
    clock.now += 10
    display.rows("training", 0, 950, 1000)
    assert "950/1,000 rows, 5 rows/s, 0:10 left" in capsys.readouterr().err


def test_a_phase_of_no_known_length(clock, capsys):
    display = Display(epochs=15, quiet=False, unit="captions")
    display.rows("reading", 0, 0, 0)
    clock.now += 10
    display.rows("reading", 0, 5000, 0)
    assert capsys.readouterr().err == "diptych: reading 5,000 captions, 500 captions/s\n"


def test_epochs(capsys):
    entry = {
        "epoch": 3,
        "seconds": 5.0,
        "train_loss": 2.5,
        "validation_loss": None,
        "CIDEr": 0.51234,
        "nan": float("nan"),
    }
    Display(epochs=15, quiet=False).epoch(entry)
    assert capsys.readouterr().err == "diptych: epoch 3/15: train loss 2.500, CIDEr 0.512\n"
    assert describe_entry({}) == ""


def test_time_left_is_that_of_the_epochs_of_this_run(clock, capsys):
    display = Display(epochs=15, quiet=False)
    display.rows("training", 4, 0, 100)
    clock.now += 600
    display.epoch({"epoch": 5, "loss": 1.0})
    clock.now += 400
    display.epoch({"epoch": 6, "loss": 1.0})
    display.epoch({"epoch": 15, "loss": 1.0})
    left = [line.partition("1.000")[2] for line in capsys.readouterr().err.splitlines()]
    assert left == [", at most 1:40:00 left", ", at most 1:15:00 left", ""]


def test_quiet(clock, capsys):
    with Display(epochs=15, quiet=True).shown() as display:
        for done in range(30):
            display.rows("training", 0, done, 100)
            clock.now += 1
        display.epoch({"epoch": 1, "train_loss": 1.0})
        display.line("text")
    assert capsys.readouterr() == ("", "")


def test_bar_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((0, 0)))
    with Display(epochs=15, quiet=False).shown() as display:
        display.rows("reading", 0, 0, 0)
        display.rows("training", 0, 50, 100, 2.5)
        display.rows("training", 0, 100, 100, 2.25)
        display.epoch({"epoch": 1, "train_loss": 2.0})
        display.rows("training", 1, 10, 100)
    text = terminal.getvalue()
    assert "epoch 1/15, training 50/100 rows, loss 2.500" in text
    assert "50%|" in text
    assert "diptych: epoch 1/15: train loss 2.000, at most " in text
    assert "epoch 2/15, training 10/100 rows" in text
    assert text.endswith("\r")  # the bar is gone
