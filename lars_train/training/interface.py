"""Which network interface the ranks' connections of gloo use: the one on which the other hosts are reached.

Left to itself gloo takes the address that the host's own name stands for, and on Debian and Ubuntu that is 127.0.1.1,
where no other host finds it. NCCL looks for an interface by itself.
"""

from __future__ import annotations

import os
import socket
import struct
import sys

from torch.distributed.distributed_c10d import Store

from lars_train.launch import Ranks

NAMED = "GLOO_SOCKET_IFNAME"
"""Gloo's own setting; what a user has put there stays."""

# From linux/sockios.h, and the length of an interface's name in linux/if.h.
_SIOCGIFADDR, _NAME = 0x8915, 16


def choose_interface(store: Store, ranks: Ranks) -> None:
    """Put this rank's interface into the environment, for gloo. Collective for a job of several hosts.

    Every rank has its way to the host of MASTER_ADDR. Those on that host itself, which reach it without a network, take
    the address at which another found it. Where there is none to be found (hosts that are one and the same, an
    address without IPv4), gloo chooses.
    """
    if ranks.world == ranks.local_world or not sys.platform.startswith("linux"):
        return
    here, there = _way(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    away = not _is_loopback(here)
    store.set(f"found{ranks.rank}", there if away else "")
    if not away:
        found = store.multi_get([f"found{rank}" for rank in range(ranks.world)])
        here = next((address.decode() for address in found if address), "")
    name = interface_of(here)
    if name is not None:
        os.environ.setdefault(NAMED, name)


def interface_of(address: str) -> str | None:
    """The interface of this host with that IPv4 address; None where there is none, or it is the loopback interface."""
    if _is_loopback(address):
        return None
    from fcntl import ioctl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = ioctl(any_socket, _SIOCGIFADDR, struct.pack(f"{_NAME}s240x", name.encode()))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _way(host: str, port: int) -> tuple[str, str]:
    """The IPv4 address from which a packet to `host` would go, and its own; empty where there is no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        try:
            way.connect((host, port))  # nothing is sent
        except OSError:
            return "", ""
        return way.getsockname()[0], way.getpeername()[0]


def _is_loopback(address: str) -> bool:
    return not address or address.startswith("127.")
