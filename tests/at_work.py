"""Functions for the ranks in test_spawn.py. `start_processes` imports them by name in new processes."""

import os
import signal
import threading
import time
from typing import Any

from lars_train import errors


def rank_variables() -> tuple[str, ...]:
    """Return the variables that a rank finds in its environment."""
    return tuple(os.environ[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))


def kill_rank_1_and_fail_the_other() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    # A lost connection is noticed after the peer's death.
    time.sleep(1)
    raise RuntimeError("connection closed by peer")


def kill_rank_1_after_its_work() -> str:
    if os.environ["RANK"] == "1":

        def kill() -> None:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=kill).start()
    return "done"


def sighup_disposition(folder: str) -> str:
    """Create a file named after the rank, give the test time to send SIGHUP, and return its disposition."""
    open(os.path.join(folder, os.environ["RANK"]), "w").close()  # noqa: PTH118, PTH123
    time.sleep(1)
    return str(signal.getsignal(signal.SIGHUP))


def raise_error(error: str) -> None:
    raise {**vars(errors), "KeyError": KeyError}[error]("the word")


def stop_at_sigusr1(folder: str) -> None:
    """Create a file named after the rank, wait for SIGUSR1, and raise `Stopped`."""
    given: list[Any] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: given.append(number))
    open(os.path.join(folder, os.environ["RANK"]), "w").close()  # noqa: PTH118, PTH123
    while not given:
        time.sleep(0.01)
    raise errors.Stopped("stopped after update 7")
