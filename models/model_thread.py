"""The one thread in which the models of a process compute.

OpenMP gives each thread that computes a team of its own, one for every core. As soon as there are two, it lets the
threads of both sleep after every operation, and small operations take twice as long.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


def run_on_model_thread(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Returns what a function returns, called in the thread of the models; one call at a time.

    The function itself must not call `compute`: it would wait for itself.
    """
    return _thread().submit(function, *args, **kwargs).result()


@functools.cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="compute")
