"""How many threads this process may keep busy."""

import os


def num_cores() -> int:
    """Returns the number of cores that this process may run on (not those of the machine)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
