"""The command `diptych`."""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, cast

from diptych.pipelines.streams import safe_streams, use_utf8
from diptych.transforms.errors import DiptychError, OptionError
from diptych.transforms.progress import PROGRESS_THREAD

if TYPE_CHECKING:
    from diptych.pipelines.runners.run_pipeline import Result

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


# The jobs run on Beam: flags that they do not know are its own
_JOBS = {
    "prepare": "read, clean, resize, write OUT/images",
    "embed": "text vectors of captions, write OUT/embeddings",
    "caption": "captions of images, write OUT/captions",
    "generate": "images from text, write OUT/generated",
    "run": "all of it in one graph, from raw data to every data set",
}
_OTHERS = {
    "train": "fit a model on prepared or raw data",
    "evaluate": "score the captions of an output against references",
    "verify": "check that an output is complete and sound",
    "demo": "the whole thing on data that it draws itself",
}


def _main(argv: list[str], signals: list[int]) -> int:
    parser = _Parser(prog="diptych", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"diptych {metadata.version('diptych')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in {**_JOBS, **_OTHERS}.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if argv[:1] == [name]:  # a command pays only for its own libraries
            _add_flags(name, command)
    args, rest = parser.parse_known_args(argv)
    command = commands.choices[args.command]
    if args.command in _JOBS:
        from diptych.pipelines.runners.beam_flags import check_beam_args

        check_beam_args(rest, [flag for action in command._actions for flag in action.option_strings])
        return _run_job(args, rest, signals)
    if rest:
        command.error(f"unrecognized arguments: {' '.join(rest)}")
    run: dict[str, Callable[[argparse.Namespace], int]] = {
        "train": _train,
        "evaluate": _evaluate,
        "verify": _verify,
        "demo": _demo,
    }
    return run[args.command](args)


def _add_flags(name: str, parser: argparse.ArgumentParser) -> None:
    if name in _JOBS:
        from diptych.pipelines.options import models, prepare

        adders = {
            "prepare": prepare.add_prepare_flags,
            "embed": models.add_embed_flags,
            "caption": models.add_caption_flags,
            "generate": models.add_generate_flags,
            "run": models.add_run_flags,
        }
        adders[name](parser)
    elif name == "train":
        from diptych.pipelines.train import add_train_flags

        add_train_flags(parser)
    elif name == "evaluate":
        from diptych.pipelines.options.evaluate import add_evaluate_flags

        add_evaluate_flags(parser)
    elif name == "demo":
        from diptych.pipelines.demo import add_demo_flags

        add_demo_flags(parser)
    else:
        parser.add_argument("output", metavar="OUT")


def _run_job(args: argparse.Namespace, beam_args: list[str], signals: list[int]) -> int:
    from diptych.pipelines.lifecycle.summary import failure_json, summary, summary_json

    sys.stderr = cast(TextIO, _OwnWords(sys.stderr))
    for_machines = args.summary == "json"
    try:
        result = _job_result(args, beam_args)
    except BaseException as error:
        if for_machines:
            print(failure_json(args.output, time.monotonic() - _START, error, bool(signals)), flush=True)
        raise
    if for_machines:
        print(summary_json(result, time.monotonic() - _START))
    elif not args.quiet:
        print(summary(result, time.monotonic() - _START))
    return 0


def _job_result(args: argparse.Namespace, beam_args: list[str]) -> "Result":
    from diptych.pipelines.options import models
    from diptych.pipelines.options.prepare import prepare_options

    if args.command == "prepare":
        from diptych.pipelines.prepare import prepare

        return prepare(prepare_options(args, beam_args))
    if args.command == "embed":
        from diptych.pipelines.embed import embed

        return embed(models.embed_options(args, beam_args))
    if args.command == "caption":
        from diptych.pipelines.caption import caption

        return caption(models.caption_options(args, beam_args))
    if args.command == "run":
        from diptych.pipelines.run import run

        return run(models.run_options(args, beam_args))
    from diptych.pipelines.generate import generate

    return generate(models.generate_options(args, beam_args))


def _train(args: argparse.Namespace) -> int:
    from diptych.pipelines.train import train

    return train(args)


def _evaluate(args: argparse.Namespace) -> int:
    if args.what == "images":
        from diptych.pipelines import evaluate_images

        scored = evaluate_images.evaluate_images(evaluate_images.images_options(args))
        print(json.dumps(scored) if args.json else evaluate_images.table(scored))
        return 0
    from diptych.pipelines import evaluate_captions

    report = evaluate_captions.evaluate_captions(evaluate_captions.evaluate_options(args))
    print(json.dumps(report) if args.json else evaluate_captions.table(report))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from diptych.pipelines.verify import verify

    if not args.output.strip():
        raise OptionError(f"OUT is {args.output!r}. It must be the --output of a job.")
    findings = verify(args.output)
    print("\n".join(findings.lines()))
    return 1 if findings.problems else 0


def _demo(args: argparse.Namespace) -> int:
    from diptych.pipelines.demo import demo

    demo(args.output, args.seed, args.scenes)
    return 0
