"""Functions that ranks run in the tests of `start_processes`, which imports them by name in new processes."""

import os
import signal
import threading
import time
from typing import Any

from lars_train.errors import DataError, Stopped


def sees() -> tuple[str, ...]:
    """Return the variables that a rank finds in its environment."""
    return tuple(os.environ[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))


def is_killed_and_its_peer_fails() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("connection closed by peer")


def is_killed_after_its_work() -> str:
    if os.environ["RANK"] == "1":

        def kill() -> None:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=kill).start()
    return "done"


def hears_nothing(folder: str) -> str:
    """Return the disposition of SIGHUP after it was sent."""
    open(os.path.join(folder, os.environ["RANK"]), "w").close()  # noqa: PTH118, PTH123
    time.sleep(1)
    return str(signal.getsignal(signal.SIGHUP))


def fails(error: str) -> None:
    raise {"DataError": DataError, "Stopped": Stopped, "KeyError": KeyError}[error]("the word")


def takes_note(folder: str) -> None:
    """Waits for SIGUSR1, and says so."""
    given: list[Any] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: given.append(number))
    open(os.path.join(folder, os.environ["RANK"]), "w").close()  # noqa: PTH118, PTH123
    while not given:
        time.sleep(0.01)
    raise Stopped("stopped after update 7")
