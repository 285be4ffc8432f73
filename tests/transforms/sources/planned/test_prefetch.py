import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from diptych.transforms.sources.planned import prefetch
from diptych.transforms.sources.planned.prefetch import fetch_ahead


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread of its own, which must be empty in the end."""
    found = asyncio.new_event_loop()
    thread = threading.Thread(target=found.run_forever, daemon=True)
    thread.start()
    yield found
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0.01), found).result(5)  # what was asked for has begun
    deadline = time.monotonic() + 5
    while (left := asyncio.all_tasks(found)) and time.monotonic() < deadline:
        time.sleep(0.01)
    found.call_soon_threadsafe(found.stop)
    thread.join(5)
    found.close()
    assert not left


def files(sizes, asked, delays=()):
    """Yields what fetches files of these sizes; the first delay of a number is for its first request."""

    def get(number, size):
        async def fetch():
            asked.append(number)
            times = list(asked).count(number)
            await asyncio.sleep(dict(delays).get((number, times), 0))
            return bytes([number]) * size

        return fetch

    return [(size, get(number, size)) for number, size in enumerate(sizes)]


def test_files_come_in_order_whatever_comes_first(loop):
    delays = {(number, 1): 0.05 * (5 - number) for number in range(5)}
    found = list(fetch_ahead(files([1] * 5, [], delays), loop))
    assert found == [bytes([number]) for number in range(5)]


def test_what_is_asked_for_ahead_is_bounded_in_bytes(loop, monkeypatch):
    monkeypatch.setattr(prefetch, "_MOST_BYTES", 100)
    asked: list[int] = []
    sizes = [10, 10, 170, *[40] * 7]
    given = 0
    for data in fetch_ahead(files(sizes, asked), loop):
        assert len(data) == sizes[given]
        given += 1
        assert (
            sum(sizes[number] for number in list(asked)) - sum(sizes[:given]) <= 100
            or len(asked) <= given + 1
        )
    assert given == len(sizes)


def test_what_is_asked_for_ahead_is_bounded_in_number(loop, monkeypatch):
    monkeypatch.setattr(prefetch, "_MOST_FILES", 3)
    asked: list[int] = []
    for given, _ in enumerate(fetch_ahead(files([1] * 9, asked), loop)):
        assert len(asked) <= given + 4


def test_what_has_come_makes_room_for_the_next_though_the_first_is_late(loop, monkeypatch):
    monkeypatch.setattr(prefetch, "_REQUESTS_AT_ONCE", 2)
    monkeypatch.setattr(prefetch, "SLOW_S", 60)
    asked: list[int] = []
    found = fetch_ahead(files([1] * 9, asked, {(0, 1): 0.3}), loop)
    next(found)
    assert len(asked) == 9
    found.close()


def test_a_reader_that_stops_early_leaves_nothing_behind(loop):
    found = fetch_ahead(files([1] * 9, [], {(number, 1): 60 for number in range(1, 9)}), loop)
    next(found)
    found.close()


def test_a_file_that_is_late_is_asked_for_once_more(loop, monkeypatch):
    monkeypatch.setattr(prefetch, "SLOW_S", 0.05)
    asked: list[int] = []
    start = time.monotonic()
    found = list(fetch_ahead(files([1] * 5, asked, {(2, 1): 60, (3, 1): 0.2}), loop))
    assert found == [bytes([number]) for number in range(5)]
    assert sorted(asked) == [0, 1, 2, 2, 3, 3, 4]
    assert time.monotonic() - start < 30


def test_a_store_that_is_slow_as_a_whole_is_not_asked_twice_for_all(loop, monkeypatch):
    monkeypatch.setattr(prefetch, "SLOW_S", 0.01)
    asked: list[int] = []
    delays = {(number, times): 0.1 for number in range(100) for times in (1, 2)}
    assert len(list(fetch_ahead(files([1] * 100, asked, delays), loop))) == 100
    assert 100 < len(asked) <= 100 + 4 + 10


def test_what_a_client_raises_is_raised(loop):
    async def gone():
        raise FileNotFoundError("gone")

    found = fetch_ahead([*files([1], []), (1, gone), *[(1, gone)] * 3], loop)
    assert next(found) == b"\0"
    with pytest.raises(FileNotFoundError, match="gone"):
        next(found)
