"""Two torchrun agents, as of two nodes: one joins later, loses its worker, and is lost."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from nodes import NODE, SETTINGS, assert_same_curve, launcher, lines, undisturbed_losses, until
from tiny import Program, begin, children

from lars_train.launch import Ranks
from lars_train.training.distributed import _agree_on_start

RESUMED = "resumed        at update"


class Cluster:
    """The torchrun agents of one run, which share a working directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.agents: dict[str, Program] = {}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])

    def start(self, name: str) -> None:
        command = [*launcher(f"localhost:{self.port}", 2), *SETTINGS]
        self.agents[name] = begin(command, self.folder, self.folder / f"{name}.log", **NODE)

    def output(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def all_output(self) -> str:
        return "".join(self.output(name) for name in self.agents)

    def worker(self, name: str) -> int:
        (pid,) = children(self.agents[name].pid)
        return pid

    def lose(self, name: str) -> None:
        """Kill the agent and its worker, as if the node was lost."""
        worker = self.worker(name)
        self.agents[name].kill()
        os.kill(worker, signal.SIGKILL)
        self.agents[name].wait()

    def end(self) -> None:
        for agent in self.agents.values():
            if agent.poll() is None:
                for pid in children(agent.pid):
                    os.kill(pid, signal.SIGKILL)
                agent.kill()
                agent.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.end()


@pytest.mark.slow
def test_nodes_that_join_and_are_lost_do_not_change_the_curve(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def wait_for_updates() -> None:
        begun = len(lines(run))
        until(lambda: len(lines(run)) >= begun + 3, "updates")

    cluster.start("host")
    wait_for_updates()
    # Pause the worker until the other node has joined.
    worker = cluster.worker("host")
    os.kill(worker, signal.SIGSTOP)
    assert "world size     1" in cluster.output("host")
    cluster.start("other")
    until(lambda: "closing signal SIGTERM" in cluster.output("host"), "the restart")
    os.kill(worker, signal.SIGCONT)
    until(lambda: "world size     2" in cluster.all_output(), "both nodes train")
    assert "SIGTERM: stopped after update" in cluster.output("host")
    wait_for_updates()
    resumed = cluster.all_output().count(RESUMED)
    os.kill(cluster.worker("other"), signal.SIGKILL)
    until(lambda: cluster.all_output().count(RESUMED) > resumed, "both nodes continue after the loss of a worker")
    wait_for_updates()
    cluster.lose("other")
    assert cluster.agents["host"].wait(120) == 0, cluster.output("host")
    alone = cluster.output("host").rpartition("world size")[2]
    assert alone.split()[0] == "1"
    assert RESUMED in alone
    (tmp_path / "undisturbed").mkdir()
    assert_same_curve(run, undisturbed_losses(tmp_path / "undisturbed"))


def test_ranks_of_one_start_agree_despite_an_earlier_start() -> None:
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    limit = timedelta(seconds=30)
    # Keys of an earlier start that ended: two greetings, one of them answered.
    server.set("greeting1", "old")
    server.set("answer.old", "ended")
    server.set("ended.1", "")
    server.set("greeting2", "older")
    found = []
    for _ in range(2):
        names: dict[int, str] = {}

        def meet(rank: int, names: dict[int, str] = names) -> None:
            store = dist.TCPStore("localhost", server.port, is_master=False)
            names[rank] = _agree_on_start(store, Ranks(rank, 3), limit)

        threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join()
        assert len(names) == 3
        assert len(set(names.values())) == 1
        found.append(names[0])
    assert found[0] != found[1]
    assert "ended" not in found


def test_a_rank_that_never_joins_is_named() -> None:
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(RuntimeError, match=r"^ranks 1, 2 of 3 did not join within distributed.timeout=0.1 s"):
        _agree_on_start(server, Ranks(0, 3), timedelta(seconds=0.1))
