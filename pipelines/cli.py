"""The command `diptych`."""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata

from transforms.errors import DiptychError, OptionError

_START = time.monotonic()  # before the libraries load: that time is the user's as well
_DESCRIPTION = (
    "Batch pipelines for image-caption data sets. Flags that a job does not know go to Apache Beam."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit code: 0 done, 1 the run failed, 2 the command line is wrong.
    """
    logging.getLogger().setLevel(
        logging.CRITICAL
    )  # Beam warns of extras that are not installed as it is imported
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(argv)
    except OptionError as error:
        print(f"diptych: {error}", file=sys.stderr)
        return 2
    except DiptychError as error:
        print(f"diptych: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("diptych: stopped. The same command goes on from here.", file=sys.stderr)
        return 130


def _stop(*_: object) -> None:
    sys.exit(143)


def _main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="diptych", description=_DESCRIPTION, allow_abbrev=False)
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
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return run[args.command](args, rest)


def _prepare(args: argparse.Namespace, beam_args: list[str]) -> int:
    from pipelines.options import prepare_options
    from pipelines.prepare import prepare
    from pipelines.summary import summary

    options = prepare_options(args, beam_args)
    result = prepare(options)
    if not options.quiet:
        print(summary(result, time.monotonic() - _START))
    return 0


def _verify(args: argparse.Namespace, _: list[str]) -> int:
    from pipelines.verify import verify

    findings = verify(args.output)
    print("\n".join(findings.lines()))
    return 1 if findings.problems else 0


def _demo(args: argparse.Namespace, _: list[str]) -> int:
    from pipelines.demo import demo

    demo(args.output, args.seed, args.scenes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
