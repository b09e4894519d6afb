"""The shards that a stream's next samples lie in: held in the cache while they are needed, fetched before.

Threads of the process that reads the stream's batches do it; the workers, be they forked, read files that are there.
shard_windows.py says which shards are needed when; a `ShardCache` fetches them.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from lars_train.data.loading.shard_windows import Span, Windows, passed, reach
from lars_train.data.sources.shard_cache import Held, Wait
from lars_train.errors import DataError
from lars_train.messages import complain, counted

THREADS = 4
"""Shards that a stream fetches at a time."""

PATIENCE_S = 600.0
"""Seconds that a stream waits for threads that give no sign of life."""

_TELL_S = 30.0
_END_S = 5.0

Hold = Callable[[int, Wait], Held]
"""Holds a shard, by its number; calls the second argument with seconds to wait, now and then with 0."""


class _Ended(Exception):
    """The stream is closed."""


@dataclass
class _State:
    """The state that the threads share. `todo`: windows' shards in the order of their need; `left`: not yet held."""

    hold: Hold
    changed: threading.Condition = field(default_factory=threading.Condition)
    ended: threading.Event = field(default_factory=threading.Event)
    todo: deque[tuple[int, int]] = field(default_factory=deque)
    left: dict[int, int] = field(default_factory=dict)
    held: dict[int, list[Held]] = field(default_factory=dict)
    failed: dict[int, BaseException] = field(default_factory=dict)
    first: int = 0
    sign: float = field(default_factory=time.monotonic)


class ShardPrefetcher:
    """Holds the windows that a stream's `spans`, in ascending order, pass through.

    `rank`: ranks begin with different shards of a window, so that those of a machine share the work.
    """

    def __init__(self, hold: Hold, windows: Windows, spans: Iterable[Span], rank: int, url: str) -> None:
        self._windows, self._rank, self._url = windows, rank, url
        self._state = _State(hold)
        self._upcoming = passed(windows, spans)
        self._next = next(self._upcoming, None)
        threads: list[threading.Thread] = []
        self._end = weakref.finalize(self, _end, self._state, threads)
        for _ in range(THREADS):
            thread = threading.Thread(target=_work, args=(self._state,), daemon=True)
            thread.start()
            threads.append(thread)

    def holds(self, oldest: Span, wanted: Span, *, wait: bool) -> bool:
        """Return True if the windows of `wanted` are held; `wait`: until they are. Release what comes before `oldest`.

        Raises what prevents it, `DataError` in the first place.
        """
        self._move(self._windows.at(oldest.start), reach(self._windows, oldest))
        return self._held(self._windows.at(wanted.stop - 1), wait)

    def close(self) -> None:
        """Let go of everything; threads that are at work on a shard end with the next piece of it."""
        self._end()

    def _move(self, first: int, last: int) -> None:
        state = self._state
        with state.changed:
            state.first = first
            for number in [n for n in state.left if n < first]:
                del state.left[number]
                for held in state.held.pop(number, []):
                    held.release()
            while self._next is not None and self._next <= last:
                self._add(self._next)
                self._next = next(self._upcoming, None)
            state.changed.notify_all()

    def _add(self, number: int) -> None:
        shards = self._windows.shards[number].tolist()
        begin = self._rank * THREADS % len(shards)
        self._state.left[number] = len(shards)
        self._state.todo.extend((number, shard) for shard in shards[begin:] + shards[:begin])

    def _held(self, last: int, wait: bool) -> bool:
        state = self._state
        told = time.monotonic()
        with state.changed:
            while True:
                for number, error in state.failed.items():
                    if number <= last:
                        raise error
                missing = any(left for number, left in state.left.items() if number <= last)
                if not missing and (self._next is None or self._next > last):
                    return True
                if not wait:
                    return False
                state.changed.wait(1.0)
                now = time.monotonic()
                if now - state.sign > PATIENCE_S:
                    raise DataError(f"{self._url}: no answer for {PATIENCE_S:.0f} s.")
                if now - told > _TELL_S:
                    told = now
                    lacking = sum(left for number, left in state.left.items() if number <= last)
                    complain(f"waiting for {counted(lacking, 'shard')} of {self._url}")


def _work(state: _State) -> None:
    def wait(seconds: float) -> None:
        state.sign = time.monotonic()
        if state.ended.wait(seconds):
            raise _Ended

    while True:
        with state.changed:
            while not state.todo and not state.ended.is_set():
                state.changed.wait()
            if state.ended.is_set():
                return
            number, shard = state.todo.popleft()
            if number < state.first:
                continue
            state.sign = time.monotonic()
        try:
            held = state.hold(shard, wait)
        except _Ended:
            return
        except OSError as error:
            _note(state, number, DataError(f"the cache of shards cannot be written to ({error.strerror or error})."))
        except BaseException as error:
            _note(state, number, error)
        else:
            with state.changed:
                if number in state.left and not state.ended.is_set():
                    state.left[number] -= 1
                    state.held.setdefault(number, []).append(held)
                else:
                    held.release()
                state.changed.notify_all()


def _note(state: _State, number: int, error: BaseException) -> None:
    with state.changed:
        state.failed[number] = error
        state.changed.notify_all()


def _end(state: _State, threads: list[threading.Thread]) -> None:
    state.ended.set()
    with state.changed:
        state.changed.notify_all()
    end = time.monotonic() + _END_S
    for thread in threads:
        # One that waits for an answer in vain lets go of its shard when that comes.
        thread.join(max(0.0, end - time.monotonic()))
    with state.changed:
        for parts in state.held.values():
            for held in parts:
                held.release()
        state.held.clear()
        state.left.clear()
