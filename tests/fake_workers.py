"""What the pool of Python workers may find in the place of a worker; importable by the processes that it starts."""

import os
import signal
import time
from multiprocessing.connection import Connection


def leaves(control: str, worker: str, ready: Connection, output: Connection) -> None:
    os.write(output.fileno(), b"no such thing\n")
    os._exit(3)


def lacks_a_package(control: str, worker: str, ready: Connection, output: Connection) -> None:
    os.dup2(output.fileno(), 2)
    import not_installed  # type: ignore[import-not-found]  # noqa: F401


def hangs(control: str, worker: str, ready: Connection, output: Connection) -> None:
    time.sleep(60)


def is_killed(control: str, worker: str, ready: Connection, output: Connection) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def says_much(control: str, worker: str, ready: Connection, output: Connection) -> None:
    os.write(output.fileno(), b"x" * 300_000 + b"\n")
    ready.send_bytes(b"ready")
    time.sleep(60)
