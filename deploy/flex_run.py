"""The entry of the Flex Template: `diptych run` with the template's parameters as its flags."""

import sys

from diptych.pipelines.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
