"""The command `diptych`."""

import argparse
import contextlib
import importlib
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from diptych.pipelines.terminal.console import console
from diptych.pipelines.terminal.streams import safe_streams, use_utf8
from diptych.transforms.errors import DiptychError, OptionError

if TYPE_CHECKING:
    from diptych.pipelines.lifecycle.result import Result

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
    if argv is None:
        use_utf8()
    argv = list(sys.argv[1:] if argv is None else argv)
    with safe_streams(), _stoppable() as signals:
        try:
            return _main(argv, signals)
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


class _Command(NamedTuple):
    """A command, whose parts are found by its name: only those of the command that runs are imported.

    Of a command `NAME`, `diptych.pipelines.NAME` has the function `NAME(options)`, and the module of its options has
    `add_NAME_flags(parser)` and `NAME_options(args)`. Two words are a command of a group, `GROUP_NAME` there.

    Attributes:
        help: What it does, in a line.
        options: The module of its options, in `diptych.pipelines.options`.
        is_job: Whether it runs on Apache Beam: flags that it does not know are Beam's.
    """

    help: str
    options: str
    is_job: bool = False


_COMMANDS = {
    "prepare": _Command("read, clean, resize, write OUT/images", "prepare", is_job=True),
    "embed": _Command("text vectors of captions, write OUT/embeddings", "models", is_job=True),
    "caption": _Command("captions of images, write OUT/captions", "models", is_job=True),
    "generate": _Command("images from text, write OUT/generated", "generate", is_job=True),
    "run": _Command("all of it in one graph, from raw data to every data set", "run", is_job=True),
    "train": _Command("fit a model on prepared or raw data", "train"),
    "evaluate captions": _Command("score what `diptych caption` wrote", "evaluate"),
    "evaluate images": _Command("score what `diptych generate` wrote", "evaluate"),
    "verify": _Command("check that an output is complete and sound", "verify"),
    "demo": _Command("the whole thing on data that it draws itself", "demo"),
}
_GROUPS = {"evaluate": "score the captions or the images of an output"}


def _main(argv: list[str], signals: list[int]) -> int:
    name, parser, commands = _parser(argv)
    args, rest = parser.parse_known_args(argv)
    command, parser = _COMMANDS[name], commands[name]
    make_options = _part(f"options.{command.options}", f"{_identifier(name)}_options")

    @_naming_flags(parser)
    def run(options: Any) -> Any:
        return _part(_identifier(name), _identifier(name))(options)

    if not command.is_job:
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        result = run(make_options(args))
        report = getattr(importlib.import_module(f"diptych.pipelines.{_identifier(name)}"), "report", None)
        if report and not getattr(args, "quiet", False):
            print(report(result, args, time.monotonic() - _START))
        return getattr(result, "exit_code", 0)
    from diptych.pipelines.runners.beam_flags import check_beam_args

    check_beam_args(rest, _flags_of(parser))
    if getattr(args, "gpu", None):
        from diptych.pipelines.runners.dataflow import gpu_flags

        rest += gpu_flags(rest, args.gpu)
    with console.without_workers():
        return _run_job(run, lambda: make_options(args, rest), args, signals)


@contextlib.contextmanager
def _naming_flags(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Runs the body; an error of it that names options in backquotes is worded with the flags of the command."""
    try:
        yield
    except DiptychError as error:
        names = [flag.removeprefix("--") for flag in _flags_of(parser)]
        error.args = (re.sub(rf"`({'|'.join(names)})`", r"--\1", str(error)),)
        raise


def _flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """Returns the flags of a command, with those of commands below it."""
    flags: list[str] = []
    for action in parser._actions:
        flags += action.option_strings
        for below in (
            (action.choices or {}).values() if isinstance(action, argparse._SubParsersAction) else ()
        ):
            flags += _flags_of(below)
    return flags


def _parser(argv: list[str]) -> tuple[str, argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Returns the command that a command line names, the parser of all, and those of the commands."""
    top = _Parser(prog="diptych", description=_DESCRIPTION, allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"diptych {metadata.version('diptych')}")
    groups = {"": top.add_subparsers(dest="command", required=True, metavar="COMMAND")}
    parsers: dict[str, argparse.ArgumentParser] = {}
    named = ""
    for name, command in _COMMANDS.items():
        group, _, last = name.rpartition(" ")
        if group not in groups:
            text = _GROUPS[group]
            parser = groups[""].add_parser(group, help=text, description=text, allow_abbrev=False)
            groups[group] = parser.add_subparsers(dest="subcommand", required=True, metavar="WHAT")
        text = command.help
        parsers[name] = groups[group].add_parser(last, help=text, description=text, allow_abbrev=False)
        if argv[: 1 + bool(group)] == name.split():
            named = name
            _part(f"options.{command.options}", f"add_{_identifier(name)}_flags")(parsers[name])
    return named, top, parsers


def _identifier(name: str) -> str:
    return name.replace(" ", "_")


def _part(module: str, name: str) -> Callable[..., Any]:
    """Returns a part of a command."""
    part: Callable[..., Any] = getattr(importlib.import_module(f"diptych.pipelines.{module}"), name)
    return part


def _run_job(
    run: Callable[[Any], "Result"],
    make_options: Callable[[], Any],
    args: argparse.Namespace,
    signals: list[int],
) -> int:
    from diptych.pipelines.lifecycle.summary import failure_json, summary, summary_json

    for_machines = args.summary == "json"
    try:
        result = run(make_options())
    except BaseException as error:
        if for_machines:
            print(failure_json(args.output, time.monotonic() - _START, error, bool(signals)), flush=True)
        raise
    if for_machines:
        print(summary_json(result, time.monotonic() - _START))
    elif not args.quiet:
        print(summary(result, time.monotonic() - _START))
    return 0
