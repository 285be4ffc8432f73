"""What this program says on standard error, apart from what libraries print there."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO, cast


class _MainThreadOnly:
    """Standard error for the main thread; what other threads print is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if threading.current_thread() is threading.main_thread():
            self._stream.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Console:
    """Standard error for this program's own words, from whichever thread."""

    def __init__(self) -> None:
        self._own: TextIO | None = None

    @property
    def stream(self) -> TextIO:
        """The stream to write to."""
        return self._own or sys.stderr

    def line(self, text: str) -> None:
        """Prints a message with the program's name before it."""
        print(f"diptych: {text}", file=self.stream, flush=True)

    @contextlib.contextmanager
    def without_workers(self) -> Iterator[None]:
        """Drops what other threads than the main one print by themselves while the body runs.

        Apache Beam prints the traceback of a worker that fails in a thread of this process, and raises the error too.
        """
        stream, own = sys.stderr, self._own
        self._own = stream
        sys.stderr = cast(TextIO, _MainThreadOnly(stream))
        try:
            yield
        finally:
            sys.stderr, self._own = stream, own


console = Console()
