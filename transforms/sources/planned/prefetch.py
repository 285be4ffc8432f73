"""Small files of a store, fetched side by side: in order, in bounded memory, and none waits long for a lost answer."""

import asyncio
import collections
from collections.abc import Callable, Coroutine, Generator, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

_REQUESTS_AT_ONCE = 32
# Of what is asked for or has come, before its turn
_MOST_FILES, _MOST_BYTES = 256, 32 << 20
_BYTES_WHERE_UNKNOWN = 1 << 20
# An answer that has not come by then is asked for once more
SLOW_S = 1.0
# Of all that are asked for, so that a store that is slow as a whole does not get twice the work
_ASKED_AGAIN_SHARE, _ASKED_AGAIN_AT_LEAST = 0.1, 4

Content = TypeVar("Content")
Get = Callable[[], Coroutine[Any, Any, Content]]


def fetch_ahead(
    wanted: Iterable[tuple[int, Get[Content]]], loop: asyncio.AbstractEventLoop
) -> Generator[Content, None, None]:
    """Yields files in the order asked; up to 32 MiB of those that come next are fetched meanwhile.

    A file that is late is asked for a second time, and the first answer is taken: "hedged requests" of Dean and
    Barroso, The Tail at Scale (2013). Otherwise one answer in a hundred that is lost would set the pace.

    Args:
        wanted: Of each file its size in bytes (0 where unknown), and what fetches it.
        loop: The event loop of the store's client, which runs in a thread of its own.

    Raises:
        Exception: What the client raised for a file.
    """
    asked: collections.deque[tuple[int, Future[Content]]] = collections.deque()
    num_bytes, hedge = 0, _Hedge()
    try:
        for size_bytes, get in wanted:
            size_bytes = size_bytes or _BYTES_WHERE_UNKNOWN
            while asked and (len(asked) == _MOST_FILES or num_bytes + size_bytes > _MOST_BYTES):
                yield asked[0][1].result()
                num_bytes -= asked.popleft()[0]
            asked.append((size_bytes, asyncio.run_coroutine_threadsafe(hedge.fetch(get), loop)))
            num_bytes += size_bytes
        while asked:
            yield asked[0][1].result()
            asked.popleft()
    finally:
        for _, future in asked:
            future.cancel()


class _Hedge:
    """Asks for a bounded number of files at a time, and once more, for a bounded share of them, for what is late."""

    def __init__(self) -> None:
        self._num_asked = self._num_again = 0
        self._room = asyncio.Semaphore(_REQUESTS_AT_ONCE)

    async def fetch(self, get: Get[Content]) -> Content:
        async with self._room:
            return await self._first_answer(get)

    async def _first_answer(self, get: Get[Content]) -> Content:
        self._num_asked += 1
        tasks = [asyncio.ensure_future(get())]
        try:
            done, _ = await asyncio.wait(tasks, timeout=SLOW_S)
            if not done and self._num_again < _ASKED_AGAIN_AT_LEAST + _ASKED_AGAIN_SHARE * self._num_asked:
                self._num_again += 1
                tasks.append(asyncio.ensure_future(get()))
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if all(task.exception() for task in done):
                    done, _ = await asyncio.wait(tasks)
            good = (task for task in done if not task.exception())
            return await next(good, tasks[0])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
