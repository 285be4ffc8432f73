"""A store as it is on a bad day: a proxy that refuses, drops or never answers some of the requests."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import random
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

import aiohttp
from aiohttp import web

_NOT_PASSED_ON = frozenset({"host", "transfer-encoding", "connection", "content-encoding", "content-length"})
# Of clients that went away in mid-answer, as they do
_QUIET = logging.getLogger("flaky_proxy")
_QUIET.propagate = False
_QUIET.addHandler(logging.NullHandler())
_KINDS = ("unavailable", "busy", "reset", "cut")


class FlakyProxy:
    """Passes requests on, but for a share of them.

    Attributes:
        failing: Share that is refused (503 or 429), reset, or cut off in mid-answer.
        hanging: Share that is never answered.
        requests: What became of each, and its method and path.
        listings: The prefixes that were listed; the second and later pages of a listing do not count.
        target: Address of the store.
    """

    def __init__(self, target: str, failing: float = 0.0, hanging: float = 0.0, seed: int = 0) -> None:
        self.failing, self.hanging = failing, hanging
        self.requests: list[tuple[str, str, str]] = []
        self.listings: list[str] = []
        self.target, self._random = target, random.Random(seed)

    @property
    def counts(self) -> collections.Counter[str]:
        """Requests by what became of them."""
        return collections.Counter(fate for fate, _, _ in self.requests)

    def _fate(self) -> str:
        draw = self._random.random()
        if draw < self.hanging:
            return "hanging"
        return self._random.choice(_KINDS) if draw < self.hanging + self.failing else "passed"

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        fate = self._fate()
        self.requests.append((fate, request.method, request.path))
        query = request.query
        is_listing = "list-type" in query or request.path.endswith("/o")
        if request.method == "GET" and is_listing and not {"pageToken", "continuation-token"} & query.keys():
            self.listings.append(query.get("prefix", ""))
        body = await request.read()
        if fate == "hanging":
            await asyncio.sleep(3600)
        if fate == "unavailable":
            return web.Response(status=503, text="the store is busy")
        if fate == "busy":
            return web.Response(status=429, text="slow down")
        assert request.transport is not None
        if fate == "reset":
            request.transport.abort()
            return web.Response()
        headers = {name: value for name, value in request.headers.items() if name.lower() != "host"}
        url = f"{self.target}{request.raw_path}"
        async with (
            aiohttp.ClientSession(auto_decompress=False, skip_auto_headers=["User-Agent"]) as session,
            session.request(request.method, _as_is(url), headers=headers, data=body) as found,
        ):
            content = await found.read()
            passed = [
                (name, value) for name, value in found.headers.items() if name.lower() not in _NOT_PASSED_ON
            ]
            answer = web.StreamResponse(status=found.status)
            for name, value in passed:
                answer.headers.add(name, value)
            answer.content_length = int(found.headers.get("Content-Length", len(content)))
            await answer.prepare(request)
            if fate == "cut" and content:
                await answer.write(content[: len(content) // 2])
                request.transport.abort()
            elif request.method != "HEAD":
                await answer.write(content)
            return answer

    async def _serve(self, port: int, started: threading.Event, stopped: asyncio.Event) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None, logger=_QUIET, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        started.set()
        await stopped.wait()
        await runner.cleanup()

    @contextlib.contextmanager
    def serve(self, port: int) -> Iterator[None]:
        """Answers at a port of this machine while the body runs."""
        loop, started = asyncio.new_event_loop(), threading.Event()
        stopped = asyncio.Event()
        thread = threading.Thread(target=_run, args=(loop, self._serve(port, started, stopped)), daemon=True)
        thread.start()
        assert started.wait(10), "the proxy did not start"
        try:
            yield
        finally:
            loop.call_soon_threadsafe(stopped.set)
            thread.join(10)


def _as_is(url: str) -> Any:
    from yarl import URL

    return URL(url, encoded=True)  # names keep their quoting


def _run(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> None:
    with contextlib.closing(loop):
        loop.run_until_complete(work)
        left = asyncio.all_tasks(loop)  # those that hang
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
