"""The workers of a stream: forked processes, threads, or none. They fill pieces of batches in a pool's buffers.

Free workers take pieces in order, and each result names its piece. A piece does not hold its sample ids, which are in
the pool. Workers share no lock, so the death of one does not block the others.
"""

from __future__ import annotations

import gc
import os
import queue
import select
import signal
import struct
import threading
import time
import traceback
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import NamedTuple, Protocol

import torch

from lars_train.data.loading.buffers import BufferPool
from lars_train.data.loading.reader import Outcome, Reader
from lars_train.errors import DataError
from lars_train.signals import handle_termination

START_S = 20.0  # for all processes to start
START_ATTEMPTS = 4  # for a process that does not start
_CHECK_S = 5.0  # between a process's checks that its parent is alive; also the longest wait for a thread to end
# The format of a piece in the pipe. Its length divides the page size, so that a read never returns part of a piece.
_PIECE = struct.Struct("=IIIxxxx")
_MEMORY = "a loader worker ran out of memory; reduce data.workers, or give the job more memory."


class Piece(NamedTuple):
    """The samples from `start` to `stop` of the batch in a slot of the pool."""

    slot: int
    start: int
    stop: int


class Done(NamedTuple):
    """A filled piece, and the wall time of filling it in seconds."""

    piece: Piece
    outcome: Outcome
    seconds: float


class Workers(Protocol):
    """Workers that fill pieces."""

    def put(self, piece: Piece) -> None:
        """Queue a piece."""
        ...

    def get(self, timeout: float | None = None) -> Done | None:
        """Return a filled piece, in any order; None if no piece is filled within `timeout` seconds.

        Raises `DataError` for a worker that died, `RuntimeError` with the traceback for one that failed.
        """
        ...

    def close(self) -> None:
        """End the workers without filling the queued pieces. Do not read buffers of unfinished batches afterwards."""
        ...


def fill(reader: Reader, pool: BufferPool, piece: Piece) -> Done:
    """Fill a piece in the calling thread."""
    started = time.perf_counter()
    outcome = reader.fill(*pool.assigned(*piece), *pool.part(*piece))
    return Done(piece, outcome, time.perf_counter() - started)


class NoWorkers:
    """No workers: `get` fills a piece in the calling thread."""

    def __init__(self, reader: Reader, pool: BufferPool) -> None:
        self._reader, self._pool = reader, pool
        self._pieces: deque[Piece] = deque()

    def put(self, piece: Piece) -> None:
        """Queue a piece."""
        self._pieces.append(piece)

    def get(self, timeout: float | None = None) -> Done | None:
        """Fill and return the next piece; None if no piece is queued, or with a `timeout` of 0."""
        if timeout == 0 or not self._pieces:
            return None
        return fill(self._reader, self._pool, self._pieces.popleft())

    def close(self) -> None:
        """Drop the queued pieces."""
        self._pieces.clear()


class Threads:
    """Worker threads of this process."""

    def __init__(self, reader: Reader, pool: BufferPool, count: int) -> None:
        self._pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Done | BaseException] = queue.SimpleQueue()
        self._ended = threading.Event()
        arguments = (reader, pool, self._pieces, self._done, self._ended)
        threads = [threading.Thread(target=_run_thread, args=arguments, daemon=True) for _ in range(count)]
        started: list[threading.Thread] = []
        # A finalizer must not refer to its object.
        self._end = weakref.finalize(self, _end_threads, started, self._pieces, self._ended)
        try:
            for thread in threads:
                thread.start()
                started.append(thread)
        except RuntimeError as error:
            self.close()
            raise DataError(f"a loader worker cannot be started ({error}); reduce data.workers.") from None

    def put(self, piece: Piece) -> None:
        """Queue a piece."""
        self._pieces.put(piece)

    def get(self, timeout: float | None = None) -> Done | None:
        """Return a filled piece; see `Workers.get`."""
        try:
            found = self._done.get(timeout=timeout) if timeout != 0 else self._done.get_nowait()
        except queue.Empty:
            return None
        if isinstance(found, MemoryError):
            raise DataError(_MEMORY)
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self) -> None:
        """End the threads."""
        self._end()


def _run_thread(
    reader: Reader,
    pool: BufferPool,
    pieces: queue.SimpleQueue[Piece | None],
    done: queue.SimpleQueue[Done | BaseException],
    ended: threading.Event,
) -> None:
    while (piece := pieces.get()) is not None and not ended.is_set():
        try:
            done.put(fill(reader, pool, piece))
        except BaseException as error:
            done.put(error)


def _end_threads(
    threads: list[threading.Thread], pieces: queue.SimpleQueue[Piece | None], ended: threading.Event
) -> None:
    ended.set()
    for _ in threads:
        pieces.put(None)
    for thread in threads:
        # Do not wait longer for a thread blocked by storage: nobody reads the buffer that it may still write to.
        thread.join(_CHECK_S)


class Processes:
    """Forked worker processes, which share the memory of the source and of the pool.

    The constructor returns when all have started. Before Python 3.12, a forked process hangs if another thread holds
    the lock of the interpreter's thread list during the fork. Threads of gloo and NCCL take this lock when they call
    into Python. Processes that hang are killed and replaced.
    """

    def __init__(self, reader: Reader, pool: BufferPool, count: int) -> None:
        self._work: Callable[[Piece], Done] = lambda piece: fill(reader, pool, piece)
        self._pieces, self._requests = os.pipe()
        # All idle workers poll for the same piece. Those that do not get it must not block in `os.read`.
        os.set_blocking(self._pieces, False)
        self._workers: dict[Connection[object, object], int] = {}
        self._arrived: deque[Done] = deque()
        self._end = weakref.finalize(self, _end_processes, self._workers, (self._pieces, self._requests), os.getpid())
        try:
            self._start(count)
        except OSError as error:
            self.close()
            raise DataError(f"a loader worker cannot be started ({error.strerror}); reduce data.workers.") from None
        except BaseException:
            self.close()
            raise

    def _start(self, count: int) -> None:
        for _ in range(START_ATTEMPTS):
            fresh = [self._fork() for _ in range(count - len(self._workers))]
            end = time.monotonic() + START_S
            silent = set(fresh)
            while silent and (ready := wait(list(silent), max(0.0, end - time.monotonic()))):
                for results in ready:
                    assert isinstance(results, Connection)
                    with suppress(EOFError):  # `_receive` reports a worker that died
                        results.recv()
                    silent.remove(results)
            for results in silent:
                _kill(self._workers.pop(results))
                results.close()
            if not silent:
                return
        raise DataError(f"{count - len(self._workers)} of {count} loader workers did not start; use data.workers=0.")

    def _fork(self) -> Connection[object, object]:
        results, answer = _pipe()
        parent = os.getpid()
        with warnings.catch_warnings():
            # A worker uses none of the parent's threads.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            process = os.fork()
        if process == 0:
            code = 1
            try:
                results.close()
                os.close(self._requests)
                _run_process(self._work, self._pieces, answer, parent)
                code = 0
            finally:
                os._exit(code)
        answer.close()
        self._workers[results] = process
        return results

    def put(self, piece: Piece) -> None:
        """Queue a piece."""
        # Short writes to a pipe are atomic, and stream.py requests far fewer pieces than a pipe holds (4096).
        os.write(self._requests, _PIECE.pack(*piece))

    def get(self, timeout: float | None = None) -> Done | None:
        """Return a filled piece; see `Workers.get`."""
        if not self._arrived:
            for results in wait(list(self._workers), timeout):
                assert isinstance(results, Connection)
                self._arrived.append(self._receive(results))
        return self._arrived.popleft() if self._arrived else None

    def _receive(self, results: Connection[object, object]) -> Done:
        try:
            found = results.recv()
        except (EOFError, OSError):
            process = self._workers.pop(results)
            results.close()
            raise DataError(f"a loader worker (process {process}) {_describe_end(process)}.") from None
        if isinstance(found, Done):
            return found
        if isinstance(found, DataError):
            raise found
        raise DataError(_MEMORY) if found is None else RuntimeError(str(found))

    def close(self) -> None:
        """Kill the processes."""
        self._end()


def _pipe() -> tuple[Connection[object, object], Connection[object, object]]:
    read, write = os.pipe()
    return Connection(read, writable=False), Connection(write, readable=False)


def _run_process(work: Callable[[Piece], Done], pieces: int, answer: Connection[object, object], parent: int) -> None:
    """Run a worker process until no pieces are left."""
    # Ctrl-C signals the whole process group, and Slurm all processes of a step. Only the parent handles the signal: it
    # ends the workers. Workers also end when the parent is gone.
    handle_termination(signal.SIG_IGN)
    # The code of a dataset object may use torch, whose threads do not exist after a fork: it would wait for them.
    torch.set_num_threads(1)
    # Do not run finalizers here for objects of the parent.
    gc.freeze()
    answer.send(None)
    try:
        while (piece := _next_piece(pieces, parent)) is not None:
            answer.send(work(piece))
    except MemoryError:
        answer.send(None)
    except DataError as error:
        answer.send(error)
    except BrokenPipeError:
        pass
    except BaseException:
        answer.send(f"a loader worker failed:\n{traceback.format_exc()}")


def _next_piece(pieces: int, parent: int) -> Piece | None:
    """Wait for the next piece; return None when the pipe is closed or the parent is gone."""
    ready = select.poll()
    ready.register(pieces, select.POLLIN)
    while os.getppid() == parent:
        if not ready.poll(1000 * _CHECK_S):
            continue
        with suppress(BlockingIOError):
            data = os.read(pieces, _PIECE.size)
            return Piece(*_PIECE.unpack(data)) if data else None
    return None


def _describe_end(process: int) -> str:
    """Wait for a process, and describe how it ended, for a message."""
    try:
        _, status = os.waitpid(process, 0)
    except ChildProcessError:
        return "no longer exists"
    number = -os.waitstatus_to_exitcode(status)
    if number <= 0:
        return f"ended with code {-number}"
    try:
        name = signal.Signals(number).name
    except ValueError:  # a real-time signal
        name = f"signal {number}"
    if number == signal.SIGKILL:
        return (
            f"was killed by {name}; the kernel does this when memory runs out (see dmesg). Reduce data.workers, or "
            "give the job more memory. The same command resumes from the last checkpoint"
        )
    return f"was killed by {name}: a fault in a library or in the machine; try data.decoder=pillow"


def _kill(process: int) -> None:
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def _end_processes(workers: dict[Connection[object, object], int], pipe: tuple[int, int], owner: int) -> None:
    if os.getpid() != owner:
        return
    for process in workers.values():
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    for results, process in workers.items():
        _kill(process)
        results.close()
    workers.clear()
    for end in pipe:
        os.close(end)
