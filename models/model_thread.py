"""Runs all models of a process on one thread.

OpenMP gives each computing thread its own team, of a thread per core. With two teams it puts the threads of both to
sleep after every operation, and small operations take twice as long.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


def run_on_model_thread(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Calls a function on the models' thread, one call at a time, and returns its result.

    The function must not call `run_on_model_thread`: it would wait for itself.
    """
    return _thread().submit(function, *args, **kwargs).result()


@functools.cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="compute")
