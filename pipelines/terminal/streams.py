"""Standard streams that cannot cost a job its work: closed, full, left by their reader, or of few characters."""

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class _Output(io.FileIO):
    """The raw end of an output stream: what it cannot take is let go, and the program works on.

    Attributes:
        failure: Why something was let go; None where nothing was.
    """

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Writes some bytes, or lets them go; returns how many."""
        view = memoryview(data)
        try:
            while (
                count := super().write(view)
            ) is None:  # not blocking, and its reader is slower than we are
                select.select([], [self], [])
            return count
        except (
            OSError
        ) as error:  # a disk that is full, a pipe whose reader has left, a terminal that was closed
            self.failure = error
            with contextlib.suppress(OSError):
                _open_null(self.fileno())
            return len(view)


def use_utf8() -> None:
    """Begins this program again in Python's UTF-8 mode, where the locale takes file names for something else.

    The names in an annotation are text, and a file system encoding such as ASCII has no bytes for them.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        environment = {**os.environ, "PYTHONUTF8": "1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Makes standard output and error of this process such that writing to them never fails while the body runs.

    A closed descriptor is opened to the null device first: else the next file that is opened, such as a data file,
    takes its number, and what is printed goes into it. Streams that a caller has put in the place of the process's own
    are left alone.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            _open_null(number)
    before = sys.stdin, sys.stdout, sys.stderr
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  # for as long as the process lives
    sys.stdout = out = _safe(1, sys.stdout, sys.__stdout__)
    sys.stderr = err = _safe(2, sys.stderr, sys.__stderr__)
    try:
        yield
    finally:
        for stream in (out, err):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        raw = getattr(getattr(out, "buffer", None), "raw", None)
        # a reader that has left has seen enough, as `head` has
        if isinstance(raw, _Output) and raw.failure and raw.failure.errno != errno.EPIPE:
            print(
                f"diptych: standard output cannot be written ({raw.failure.strerror}).", file=err, flush=True
            )
        sys.stdin, sys.stdout, sys.stderr = before


def _safe(number: int, stream: TextIO | None, own: TextIO | None) -> TextIO:
    """Returns a stream to a descriptor, in the place of the process's own; any other stream is returned itself."""
    if stream is None:  # the descriptor was closed, and may be a file's by now
        return open(os.devnull, "w", encoding="utf-8")
    if stream is not own:
        return stream
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    raw = _Output(number, "w", closefd=False)
    # what the stream's encoding has no sign for, such as a name in another script, is written as its number
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=number == 2 or raw.isatty(),
    )


def _open_null(number: int) -> None:
    """Makes a descriptor one of the null device, for programs that this one starts as well."""
    null = os.open(os.devnull, os.O_RDWR)
    if null == number:
        os.set_inheritable(null, True)
        return
    os.dup2(null, number)
    os.close(null)
