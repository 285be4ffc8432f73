"""How far a training is, on the terminal: a bar where there is one, else a line now and then."""

import contextlib
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tqdm import tqdm

from diptych.pipelines.terminal.console import console

_LINE_S = 10.0
# Of an epoch's entry in the history, what is no loss and no score
_ASIDE = ("epoch", "epochs", "seconds", "alpha", "learning_rate")


class Display:
    """Shows progress on standard error.

    Attributes:
        epochs: At most so many are trained.
        unit: What is counted.
    """

    def __init__(self, epochs: int, quiet: bool, unit: str = "rows") -> None:
        self.epochs, self.unit = epochs, unit
        self._quiet = quiet
        self._is_terminal = console.stream.isatty()
        self._bar: tqdm[Any] | None = None
        self._phase: tuple[str, int] | None = None
        self._phase_start = self._last_line = time.monotonic()
        self._first_done = 0
        self._begun: tuple[int, float] | None = None  # the first epoch of this run, and when

    def rows(self, phase: str, epoch: int, done: int, total: int, loss: float | None = None) -> None:
        """Shows how far a phase is.

        Args:
            phase: What is being done, a word.
            epoch: From 0; of no meaning before the first.
            done: Rows done of the phase.
            total: Of so many; 0 where that is not known yet.
            loss: So far in this epoch.
        """
        if self._quiet:
            return
        now = time.monotonic()
        if phase == "training" and self._begun is None:
            self._begun = epoch, now
        if (phase, epoch) != self._phase:
            self._phase, self._phase_start, self._first_done = (phase, epoch), now, done
            self._close()
        text = self._describe(phase, epoch, done, total, loss, now)
        if self._is_terminal:
            if self._bar is None:
                self._bar = self._new_bar(total or None)
            self._bar.n = done
            self._bar.set_description_str(text)
        elif now - self._last_line >= _LINE_S:
            self._last_line = now
            self.line(text)

    def epoch(self, entry: Mapping[str, Any]) -> None:
        """Shows the losses and scores of an epoch that is over."""
        if not self._quiet:
            self._close()
            text = f"epoch {entry['epoch']}/{self.epochs}: {describe_entry(entry)}"
            if self._begun is not None and entry["epoch"] < self.epochs:
                epoch, start = self._begun
                each_s = (time.monotonic() - start) / (entry["epoch"] - epoch)
                text += f", at most {_clock(each_s * (self.epochs - entry['epoch']))} left"
            self.line(text)

    def line(self, text: str) -> None:
        """Shows a line, unless all is to be quiet."""
        if not self._quiet:
            tqdm.write(f"diptych: {text}", file=console.stream)
            console.stream.flush()

    def _describe(self, phase: str, epoch: int, done: int, total: int, loss: float | None, now: float) -> str:
        elapsed_s = now - self._phase_start
        in_epoch = f"epoch {epoch + 1}/{self.epochs}, " if phase != "reading" else ""
        text = f"{in_epoch}{phase} {done:,}{f'/{total:,}' if total else ''} {self.unit}"
        if loss is not None:
            text += f", loss {loss:.3f}"
        moved = done - self._first_done
        if moved > 0 and elapsed_s > 0:
            rate = moved / elapsed_s
            text += f", {rate:,.0f} {self.unit}/s"
            if total:
                text += f", {_clock((total - done) / rate)} left"
                text += " of it" if in_epoch else ""
        return text

    def _new_bar(self, total: int | None) -> "tqdm[Any]":
        size = os.get_terminal_size(console.stream.fileno())
        columns, lines = (
            size.columns or 80,
            size.lines or 24,
        )  # 0 where nobody set them, and nothing would show
        layout = "{percentage:3.0f}%|{bar:20}| {desc}"
        return tqdm(
            total=total, file=console.stream, bar_format=layout, leave=False, ncols=columns, nrows=lines
        )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @contextlib.contextmanager
    def shown(self) -> Iterator["Display"]:
        """Leaves the terminal as it was, however the body ends."""
        try:
            yield self
        finally:
            self._close()


def _clock(seconds: float) -> str:
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours}:{minutes:02d}:{int(seconds) % 60:02d}" if hours else f"{minutes}:{int(seconds) % 60:02d}"


def describe_entry(entry: Mapping[str, Any]) -> str:
    """Returns the losses and scores of an epoch's entry in the history, as text."""
    shown = [
        (n, v)
        for n, v in entry.items()
        if n not in _ASIDE and isinstance(v, int | float) and math.isfinite(v)
    ]
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in shown)
