"""Runs the command: `python -m diptych`."""

import sys

from diptych.pipelines.cli import main

if __name__ == "__main__":
    sys.exit(main())
