"""What `diptych verify` takes."""

import argparse

from diptych.pipelines.options.base import check


def add_verify_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the argument of `diptych verify`."""
    parser.add_argument("output", metavar="OUT")


def verify_options(args: argparse.Namespace) -> str:
    """Returns the output that is to be checked.

    Raises:
        OptionError: It is blank.
    """
    check(bool(args.output.strip()), "OUT", repr(args.output), "the --output of a job")
    return str(args.output)
