"""Connect the ranks of a job to one store: rank 0 listens at MASTER_PORT and sends its job's name to each client.

torch's ``env://`` rendezvous joins any store that answers there, even another job's, and waits forever for a server
that sends nothing. Here rank 0 sends one line, its job's name and the port of its store, and closes MASTER_PORT when
all ranks have connected.
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
# Between two attempts to reach rank 0.
_PAUSE_S = 0.2
# If rank 0 has sent no valid answer for this long, another program is listening.
_WRONG_S = 10.0


@contextmanager
def open_job_store(job: str, ranks: Ranks, limit: timedelta) -> Iterator[TCPStore]:
    """Yield the store of `job`, a name that no other job with the same MASTER_PORT has. Collective.

    Rank 0 accepts the others within the context.

    Raises:
        ConfigError: rank 0 cannot listen at MASTER_PORT, or another program answers there.
        RuntimeError: rank 0 does not listen within `limit`.
    """
    address, port = os.environ["MASTER_ADDR"], _port(os.environ["MASTER_PORT"])
    if not ranks.first:
        yield TCPStore(address, _find_store_port(address, port, job, limit), ranks.world, False, limit, False)
        return
    with closing(_listen(port)) as listener:
        store = TCPStore("localhost", 0, ranks.world, True, limit, False)
        greeting = f"{_greeting(job)}{store.port}\n".encode()
        threading.Thread(target=_greet, args=(listener, greeting), name="rendezvous", daemon=True).start()
        try:
            yield store
        finally:
            # `close` alone leaves the thread in `accept`, which keeps the port open.
            listener.shutdown(socket.SHUT_RDWR)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 1 << 16:
        raise ConfigError(f"MASTER_PORT={text}: not a port. Set a number from 1 to 65535.")
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
            f"MASTER_PORT={port}: this port {reason} on {platform.node()}, where rank 0 listens for the other ranks. "
            "Set MASTER_PORT to a free port, the same for all ranks."
        ) from None


def _greet(listener: socket.socket, greeting: bytes) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # shut down: all ranks have connected
            return
        with connection:
            try:
                connection.sendall(greeting)
            except OSError:
                continue


def _find_store_port(address: str, port: int, job: str, limit: timedelta) -> int:
    """Return the port of rank 0's store. Retry: rank 0 may start later, or another job may still use `port`."""
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
                    answer = lines.readline(256).decode(errors="replace")
            if answer.startswith(_greeting(job)) and answer.endswith("\n"):
                return int(answer.split()[-1])
        except ConnectionRefusedError:
            wrong_since = None
        except OSError:  # a host without a name or a route yet, or a server that does not answer
            pass
        time.sleep(_PAUSE_S)
    if wrong_since is not None:
        raise ConfigError(
            f"MASTER_PORT={port}: a program other than rank 0 of this job answers at this port of {address}. "
            "Set MASTER_PORT to a free port, the same for all ranks, and check MASTER_ADDR."
        )
    raise RuntimeError(
        f"rank 0 did not listen at {address}, port {port} (MASTER_ADDR, MASTER_PORT), within "
        f"distributed.timeout={limit.total_seconds():g} s."
    )


GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
"""The environment variable that gloo reads. A value set by the user is kept."""

# From linux/sockios.h, and IFNAMSIZ, the length of an interface's name, from linux/if.h.
_SIOCGIFADDR, _IFNAMSIZ = 0x8915, 16


def choose_interface(store: Store, ranks: Ranks) -> None:
    """Set gloo's network interface in the environment of this rank. Collective for a job on several hosts.

    A rank uses the interface that leads to the host of MASTER_ADDR. Ranks on that host, which reach it without a
    network, use the interface whose address the other hosts reach. If no interface is found (all ranks are on one host,
    or the address has no IPv4), gloo chooses one.
    """
    if ranks.world == ranks.local_world or not sys.platform.startswith("linux"):
        return
    own, master = _route(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    remote = not _is_loopback(own)
    store.set(f"found{ranks.rank}", master if remote else "")
    if not remote:
        found = store.multi_get([f"found{rank}" for rank in range(ranks.world)])
        own = next((address.decode() for address in found if address), "")
    name = interface_of(own)
    if name is not None:
        os.environ.setdefault(GLOO_INTERFACE, name)


def interface_of(address: str) -> str | None:
    """Return the interface of this host with the IPv4 `address`; None for loopback, or if there is none."""
    if _is_loopback(address):
        return None
    from fcntl import ioctl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = ioctl(any_socket, _SIOCGIFADDR, struct.pack(f"{_IFNAMSIZ}s240x", name.encode()))
            except OSError:  # the interface has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _route(host: str, port: int) -> tuple[str, str]:
    """Return the IPv4 addresses of this host and of `host` on the route between them; empty without a route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        try:
            udp.connect((host, port))  # sends nothing
        except OSError:
            return "", ""
        return udp.getsockname()[0], udp.getpeername()[0]


def _is_loopback(address: str) -> bool:
    return not address or address.startswith("127.")
