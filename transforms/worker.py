"""What a worker's process does with its cores: how many threads it may keep busy, and what it need not look through."""

import atexit
import gc
import os


def num_cores() -> int:
    """Returns the number of cores that this process may run on (not those of the machine)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def freeze_gc() -> None:
    """Keeps what the imports and models made out of garbage collection: it stays, and to look costs 2 % of the time."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # or libraries that look for leaks at the end find all of it
