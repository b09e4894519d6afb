"""Ranks join only rank 0 of the same job at MASTER_PORT, and gloo uses a network interface that reaches it.

runs/test_two_hosts.py tests the interface between hosts.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from tiny import TINY, environment, shell

from lars_train import rendezvous
from lars_train.errors import ConfigError
from lars_train.launch import Ranks, export_slurm
from lars_train.rendezvous import GLOO_INTERFACE, choose_interface, interface_of, open_job_store

HERE = Ranks(rank=0, world=2, local_rank=0, local_world=1)
LIMIT = timedelta(seconds=60)
STEP = {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_JOB_ID": "1000",
    "SLURM_STEP_ID": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """Return a free port, and set MASTER_PORT to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found = int(probe.getsockname()[1])
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(found))
    return found


@pytest.mark.slow
def test_a_port_in_use_is_reported_in_one_line(tmp_path: Path) -> None:
    port = int(export_slurm(STEP)["MASTER_PORT"])
    with socket.create_server(("127.0.0.1", port)):
        own = [STEP | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
        ranks = shell().run_together(["lars-train", *TINY, "run.name=taken"], tmp_path, [environment(**o) for o in own])
    errors = [rank.stderr for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], errors
    assert errors[0].startswith(f"lars-train: MASTER_PORT={port}: this port is in use on "), errors[0]
    assert errors[0].count("\n") == 1
    assert errors[1] == ""


def test_a_rank_waits_for_its_own_rank_0_at_a_shared_port(port: int) -> None:
    values = {}

    def join(job: str, rank: int) -> None:
        with open_job_store(job, Ranks(rank, 2), LIMIT) as store:
            values[job, rank] = store.get("whose").decode()

    with ExitStack() as first, ExitStack() as second:
        first.enter_context(open_job_store("1000.1", Ranks(0, 2), LIMIT)).set("whose", "1000.1")
        with pytest.raises(ConfigError, match=f"MASTER_PORT={port}: this port is in use"):
            second.enter_context(open_job_store("1001.0", Ranks(0, 2), LIMIT))
        others = [threading.Thread(target=join, args=(job, 1)) for job in ("1001.0", "1000.1")]
        for other in others:
            other.start()
        others[1].join(30)
        assert values == {("1000.1", 1): "1000.1"}
        # All ranks of the first job have joined, so it no longer needs the port.
        first.close()
        second.enter_context(open_job_store("1001.0", Ranks(0, 2), LIMIT)).set("whose", "1001.0")
        others[0].join(30)
    assert values == {("1000.1", 1): "1000.1", ("1001.0", 1): "1001.0"}


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"lars-train 7.0 29500\n", None])
def test_a_rank_answered_by_another_program_fails_soon(
    answer: bytes | None, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "_WRONG_S", 0.5)
    with socket.create_server(("127.0.0.1", port)) as server:
        if answer is not None:
            threading.Thread(target=rendezvous._greet, args=(server, answer), daemon=True).start()
        began = time.monotonic()
        with pytest.raises(ConfigError, match=f"MASTER_PORT={port}: a program other"):  # noqa: SIM117
            with open_job_store("7.1", Ranks(1, 2), LIMIT):
                pass
        assert time.monotonic() - began < 10
        server.shutdown(socket.SHUT_RDWR)


def test_a_rank_without_rank_0_reports_address_and_timeout(port: int) -> None:
    with (
        pytest.raises(RuntimeError, match=rf"localhost, port {port} \(MASTER_ADDR, .*distributed\.timeout=0\.5 s"),
        open_job_store("7.1", Ranks(1, 2), timedelta(seconds=0.5)),
    ):
        pass


@pytest.mark.parametrize("text", ["0", "65536", "-1", "ssh", "٣"])
def test_an_invalid_port_is_refused(text: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", text)
    with (
        pytest.raises(ConfigError, match=f"MASTER_PORT={text}: not a port"),
        open_job_store("-", Ranks(0, 2), LIMIT),
    ):
        pass


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv(GLOO_INTERFACE, "x")  # so that monkeypatch removes it even if the test sets it
    monkeypatch.delenv(GLOO_INTERFACE)
    return dist.HashStore()


@pytest.fixture
def default_interface() -> tuple[str, str]:
    """Return the interface of this machine's default route, and its address."""
    route = Path("/proc/net/route")
    for line in route.read_text().splitlines()[1:] if route.exists() else ():
        name, destination, gateway, *_ = line.split()
        if destination == "00000000" and gateway != "00000000":
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
                way.connect((socket.inet_ntoa(struct.pack("<I", int(gateway, 16))), 9))
                return name, way.getsockname()[0]
    pytest.skip("this machine has no default route")


def test_an_interface_is_found_by_its_address(default_interface: tuple[str, str]) -> None:
    assert interface_of(default_interface[1]) == default_interface[0]
    assert interface_of("127.0.0.1") is None
    assert interface_of("192.0.2.1") is None


def test_rank_0_takes_the_interface_that_another_rank_found(
    store: dist.Store, default_interface: tuple[str, str]
) -> None:
    store.set("found1", default_interface[1])
    choose_interface(store, HERE)
    assert os.environ[GLOO_INTERFACE] == default_interface[0]


def test_an_interface_set_by_the_user_is_kept(
    store: dist.Store, default_interface: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(GLOO_INTERFACE, "mine")
    store.set("found1", default_interface[1])
    choose_interface(store, HERE)
    assert os.environ[GLOO_INTERFACE] == "mine"


@pytest.mark.parametrize("ranks", [HERE, Ranks(0, 2, 0, 2)], ids=["agents of one host", "one agent"])
def test_on_one_host_gloo_chooses_its_interface(ranks: Ranks, store: dist.Store) -> None:
    store.set("found1", "")
    choose_interface(store, ranks)
    assert GLOO_INTERFACE not in os.environ
