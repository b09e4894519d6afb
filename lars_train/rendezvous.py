"""Bring the ranks of a job to one store: rank 0 listens at MASTER_PORT and names its job to whoever connects.

torch's ``env://`` rendezvous joins any store that answers there, another job's too, and waits without end for a server
that sends nothing. Here rank 0 sends one line, its job's name and the port of its store, and closes the port when all
ranks have come.
"""

from __future__ import annotations

import errno
import os
import platform
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from lars_train.errors import ConfigError
from lars_train.launch import Ranks

_BACKLOG = 4096
# Between two attempts to reach rank 0, and how long a wrong answer, or none, stands for another program's.
_PAUSE_S = 0.2
_WRONG_S = 10.0


@contextmanager
def open_job_store(job: str, ranks: Ranks, limit: timedelta) -> Iterator[TCPStore]:
    """Yield the store of `job`, whose name no other job with the same MASTER_PORT has.

    Within the context rank 0 lets the others in. Collective.

    Raises:
        ConfigError: rank 0 cannot listen at MASTER_PORT, or another program answers there.
        RuntimeError: rank 0 does not listen within `limit`.
    """
    address, port = os.environ["MASTER_ADDR"], _port(os.environ["MASTER_PORT"])
    if not ranks.first:
        host, store_port = address, _ask(address, port, job, limit)
        yield TCPStore(host, store_port, ranks.world, False, limit, False)
        return
    with closing(_listen(port)) as listener:
        store = TCPStore("localhost", 0, ranks.world, True, limit, False)
        greeting = f"{_greeting(job)}{store.port}\n".encode()
        threading.Thread(target=_answer, args=(listener, greeting), name="rendezvous", daemon=True).start()
        try:
            yield store
        finally:
            # `close` alone leaves a thread in `accept` that keeps the port.
            listener.shutdown(socket.SHUT_RDWR)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 1 << 16:
        raise ConfigError(f"MASTER_PORT={text}: this is no port; give a number from 1 to 65535.")
    return int(text)


def _greeting(job: str) -> str:
    return f"lars-train {job} "


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            try:
                return socket.create_server(("", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:  # a host whose IPv6 is switched off
                    raise
        return socket.create_server(("", port), backlog=_BACKLOG)
    except OSError as error:
        reason = (
            "is in use" if error.errno == errno.EADDRINUSE else f"cannot be opened ({os.strerror(error.errno or 0)})"
        )
        raise ConfigError(
            f"MASTER_PORT={port}: this port {reason} on {platform.node()}, where rank 0 listens for the other ranks; "
            "set MASTER_PORT to a free port, the same for all ranks."
        ) from None


def _answer(listener: socket.socket, greeting: bytes) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # shut down: all have come
            return
        with connection:
            try:
                connection.sendall(greeting)
            except OSError:
                continue


def _ask(address: str, port: int, job: str, limit: timedelta) -> int:
    """Return the port of rank 0's store. Rank 0 may come later, also after another job at the same port."""
    end = time.monotonic() + limit.total_seconds()
    wrong_since: float | None = None
    while True:
        now = time.monotonic()
        patience = (end if wrong_since is None else wrong_since + _WRONG_S) - now
        if patience <= 0:
            break
        try:
            with socket.create_connection((address, port), timeout=min(patience, _WRONG_S)) as connection:
                if wrong_since is None:
                    wrong_since = now
                connection.settimeout(max(wrong_since + _WRONG_S - time.monotonic(), _PAUSE_S))
                with connection.makefile("rb") as lines:
                    said = lines.readline(256).decode(errors="replace")
            if said.startswith(_greeting(job)) and said.endswith("\n"):
                return int(said.split()[-1])
        except ConnectionRefusedError:
            wrong_since = None
        except OSError:  # a name that cannot be looked up yet, a way that is not there yet, a server without an answer
            pass
        time.sleep(_PAUSE_S)
    if wrong_since is not None:
        raise ConfigError(
            f"MASTER_PORT={port}: another program than rank 0 of this job answers at this port of {address}; "
            "set MASTER_PORT to a free port, the same for all ranks, and check MASTER_ADDR."
        )
    raise RuntimeError(
        f"rank 0 did not listen at {address}, port {port} (MASTER_ADDR, MASTER_PORT), within "
        f"distributed.timeout={limit.total_seconds():g} s."
    )


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
