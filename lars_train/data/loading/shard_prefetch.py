"""Prefetch the shards of a stream's next samples into the cache, and hold them there while they are needed.

Threads in the stream's process fetch the shards. Workers, including forked ones, only read files that exist already.
shard_windows.py gives the order of the shards; a `ShardCache` fetches them.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from lars_train.data.loading.shard_windows import Span, Windows, last_to_hold, window_numbers
from lars_train.data.shard_cache import Held, Wait
from lars_train.errors import DataError
from lars_train.messages import complain, counted

THREADS = 4
"""Threads of a stream, each of which fetches one shard at a time."""

PATIENCE_S = 600.0
"""Seconds that a stream waits for threads that show no activity."""

_REPORT_S = 30.0
_CLOSE_S = 5.0

Hold = Callable[[int, Wait], Held]
"""A function that fetches the shard with the given number, and holds it in the cache.

It calls its second argument in place of `time.sleep`, and from time to time with 0 s, to report activity.
"""


class _Closed(Exception):
    """The stream is closed."""


@dataclass
class _State:
    """The state that the threads share. The keys of the dicts are window numbers.

    `todo`: (window, shard) pairs to fetch, the most urgent first. `missing`: how many shards of a window are not held
    yet. `first`: the first window that is still needed.
    """

    hold: Hold
    changed: threading.Condition = field(default_factory=threading.Condition)
    closed: threading.Event = field(default_factory=threading.Event)
    todo: deque[tuple[int, int]] = field(default_factory=deque)
    missing: dict[int, int] = field(default_factory=dict)
    held: dict[int, list[Held]] = field(default_factory=dict)
    failed: dict[int, BaseException] = field(default_factory=dict)
    first: int = 0
    last_activity: float = field(default_factory=time.monotonic)


class ShardPrefetcher:
    """Hold the windows that overlap a stream's `spans`, which are in ascending order.

    `rank`: each rank begins with a different shard of a window, so that the ranks of a machine share the work.
    """

    def __init__(self, hold: Hold, windows: Windows, spans: Iterable[Span], rank: int, url: str) -> None:
        self._windows, self._rank, self._url = windows, rank, url
        self._state = _State(hold)
        self._upcoming = window_numbers(windows, spans)
        self._next = next(self._upcoming, None)
        threads: list[threading.Thread] = []
        self._finalizer = weakref.finalize(self, _close, self._state, threads)
        for _ in range(THREADS):
            thread = threading.Thread(target=_fetch_shards, args=(self._state,), daemon=True)
            thread.start()
            threads.append(thread)

    def holds(self, oldest: Span, request: Span, *, wait: bool) -> bool:
        """Return True if the windows of `request` are held; with `wait`, wait until they are.

        Releases the windows before `oldest`. If fetching a shard failed, raises its error, usually a `DataError`.
        """
        self._advance(self._windows.at(oldest.start), last_to_hold(self._windows, oldest))
        return self._all_held(self._windows.at(request.stop - 1), wait)

    def close(self) -> None:
        """Release all shards, and end the threads. A thread that is fetching a shard ends after the current request."""
        self._finalizer()

    def _advance(self, first: int, last: int) -> None:
        state = self._state
        with state.changed:
            state.first = first
            for number in [n for n in state.missing if n < first]:
                del state.missing[number]
                for held in state.held.pop(number, []):
                    held.release()
            while self._next is not None and self._next <= last:
                self._add(self._next)
                self._next = next(self._upcoming, None)
            state.changed.notify_all()

    def _add(self, number: int) -> None:
        shards = self._windows.shards[number].tolist()
        begin = self._rank * THREADS % len(shards)
        self._state.missing[number] = len(shards)
        self._state.todo.extend((number, shard) for shard in shards[begin:] + shards[:begin])

    def _all_held(self, last: int, wait: bool) -> bool:
        state = self._state
        reported = time.monotonic()
        with state.changed:
            while True:
                for number, error in state.failed.items():
                    if number <= last:
                        raise error
                incomplete = any(count for number, count in state.missing.items() if number <= last)
                if not incomplete and (self._next is None or self._next > last):
                    return True
                if not wait:
                    return False
                state.changed.wait(1.0)
                now = time.monotonic()
                if now - state.last_activity > PATIENCE_S:
                    raise DataError(f"{self._url}: no response for {PATIENCE_S:.0f} s.")
                if now - reported > _REPORT_S:
                    reported = now
                    awaited = sum(count for number, count in state.missing.items() if number <= last)
                    complain(f"waiting for {counted(awaited, 'shard')} of {self._url}")


def _fetch_shards(state: _State) -> None:
    def wait(seconds: float) -> None:
        state.last_activity = time.monotonic()
        if state.closed.wait(seconds):
            raise _Closed

    while True:
        with state.changed:
            while not state.todo and not state.closed.is_set():
                state.changed.wait()
            if state.closed.is_set():
                return
            number, shard = state.todo.popleft()
            if number < state.first:
                continue
            state.last_activity = time.monotonic()
        try:
            held = state.hold(shard, wait)
        except _Closed:
            return
        except OSError as error:
            # The text of an OSError names the file.
            wrong = f"the shard cache cannot be written to ({error}); is the disk full, or were files removed there?"
            _fail(state, number, DataError(wrong))
        except BaseException as error:
            _fail(state, number, error)
        else:
            with state.changed:
                if number in state.missing and not state.closed.is_set():
                    state.missing[number] -= 1
                    state.held.setdefault(number, []).append(held)
                else:
                    held.release()
                state.changed.notify_all()


def _fail(state: _State, number: int, error: BaseException) -> None:
    with state.changed:
        state.failed[number] = error
        state.changed.notify_all()


def _close(state: _State, threads: list[threading.Thread]) -> None:
    state.closed.set()
    with state.changed:
        state.changed.notify_all()
    end = time.monotonic() + _CLOSE_S
    for thread in threads:
        # A thread that still waits for a response releases its shard when the response comes.
        thread.join(max(0.0, end - time.monotonic()))
    with state.changed:
        for parts in state.held.values():
            for held in parts:
                held.release()
        state.held.clear()
        state.missing.clear()
