"""The command `diptych`."""

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any, NoReturn, TextIO, cast

from transforms.errors import DiptychError, OptionError
from transforms.progress import PROGRESS_THREAD

_START = time.monotonic()  # before the libraries load: that time is the user's as well
_DESCRIPTION = (
    "Batch pipelines for image-caption data sets. Flags that a job does not know go to Apache Beam."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit code: 0 done, 1 the run failed, 2 the command line is wrong; 130 or 143 stopped by a signal.
    """
    # Beam warns of extras that are not installed as it is imported
    logging.getLogger().setLevel(logging.CRITICAL)
    argv = list(sys.argv[1:] if argv is None else argv)
    with _stoppable() as signals:
        try:
            code = _main(argv)
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # whoever reads the output has seen enough, as `head` has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except BaseException as error:
            if signals:  # whatever became of the interrupt on its way through a runner
                print("diptych: stopped. The same command goes on from here.", file=sys.stderr)
                return 128 + signals[0]
            if not isinstance(error, DiptychError):
                raise
            print(f"diptych: {error}", file=sys.stderr)
            return 2 if isinstance(error, OptionError) else 1


@contextlib.contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Makes SIGINT and SIGTERM interrupt the body, and the second of them end the process; gives those received."""
    received: list[int] = []

    def stop(signum: int, _: object) -> None:
        if received:
            os._exit(128 + signum)
        received.append(signum)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}. `{self.prog} --help` lists what there is.")


class _OwnWords:
    """Standard error for this program's own threads.

    Of a worker that fails in a thread of this process, Beam prints the traceback, as well as handing it on.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if threading.current_thread().name in (threading.main_thread().name, PROGRESS_THREAD):
            self._stream.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _main(argv: list[str]) -> int:
    parser = _Parser(prog="diptych", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"diptych {metadata.version('diptych')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    prepare = commands.add_parser("prepare", help="read, clean, resize, write OUT/images", allow_abbrev=False)
    verify = commands.add_parser(
        "verify", help="check that an output is complete and sound", allow_abbrev=False
    )
    verify.add_argument("output", metavar="OUT")
    demo = commands.add_parser(
        "demo", help="the whole thing on data that it draws itself", allow_abbrev=False
    )
    if argv[:1] == ["prepare"]:
        from pipelines.options import add_prepare_flags

        add_prepare_flags(prepare)
    elif argv[:1] == ["demo"]:
        from pipelines.demo import add_demo_flags

        add_demo_flags(demo)
    args, rest = parser.parse_known_args(argv)
    run: dict[str, Callable[[argparse.Namespace, list[str]], int]] = {
        "prepare": _prepare,
        "verify": _verify,
        "demo": _demo,
    }
    if args.command == "prepare":
        from pipelines.options import check_beam_args

        check_beam_args(rest, [flag for action in prepare._actions for flag in action.option_strings])
    elif rest:
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(rest)}")
    return run[args.command](args, rest)


def _prepare(args: argparse.Namespace, beam_args: list[str]) -> int:
    from pipelines.options import prepare_options
    from pipelines.prepare import prepare
    from pipelines.summary import summary

    sys.stderr = cast(TextIO, _OwnWords(sys.stderr))
    options = prepare_options(args, beam_args)
    result = prepare(options)
    if not options.quiet:
        print(summary(result, time.monotonic() - _START))
    return 0


def _verify(args: argparse.Namespace, _: list[str]) -> int:
    from pipelines.verify import verify

    if not args.output.strip():
        raise OptionError(f"OUT is {args.output!r}. It must be the --output of a job.")
    findings = verify(args.output)
    print("\n".join(findings.lines()))
    return 1 if findings.problems else 0


def _demo(args: argparse.Namespace, _: list[str]) -> int:
    from pipelines.demo import demo

    demo(args.output, args.seed, args.scenes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
