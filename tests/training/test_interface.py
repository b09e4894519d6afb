"""Which network interface gloo is told to use. That it works between hosts is tested in test_two_hosts.py."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest
import torch.distributed as dist

from lars_train.launch import Ranks
from lars_train.rendezvous import NAMED, choose_interface, interface_of

HERE = Ranks(rank=0, world=2, local_rank=0, local_world=1)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv(NAMED, "x")  # so that it is taken back, whatever the test makes of it
    monkeypatch.delenv(NAMED)
    return dist.HashStore()


@pytest.fixture
def outward() -> tuple[str, str]:
    """The interface of this machine's default route, and its address there."""
    route = Path("/proc/net/route")
    for line in route.read_text().splitlines()[1:] if route.exists() else ():
        name, destination, gateway, *_ = line.split()
        if destination == "00000000" and gateway != "00000000":
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
                way.connect((socket.inet_ntoa(struct.pack("<I", int(gateway, 16))), 9))
                return name, way.getsockname()[0]
    pytest.skip("this machine has no default route")


def test_an_interface_is_found_by_its_address(outward: tuple[str, str]) -> None:
    assert interface_of(outward[1]) == outward[0]
    assert interface_of("127.0.0.1") is None
    assert interface_of("192.0.2.1") is None


def test_the_host_of_the_first_rank_takes_the_interface_on_which_another_found_it(
    store: dist.Store, outward: tuple[str, str]
) -> None:
    store.set("found1", outward[1])
    choose_interface(store, HERE)
    assert os.environ[NAMED] == outward[0]


def test_what_the_user_has_set_stays(
    store: dist.Store, outward: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAMED, "mine")
    store.set("found1", outward[1])
    choose_interface(store, HERE)
    assert os.environ[NAMED] == "mine"


@pytest.mark.parametrize("ranks", [HERE, Ranks(0, 2, 0, 2)], ids=["agents of one host", "one agent"])
def test_on_one_host_gloo_chooses_as_ever(ranks: Ranks, store: dist.Store) -> None:
    store.set("found1", "")
    choose_interface(store, ranks)
    assert NAMED not in os.environ
