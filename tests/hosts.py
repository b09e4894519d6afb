"""Two simulated hosts, connected by a virtual cable, each with its own name, address, network and processes.

A host is a set of Linux namespaces; creating them needs no root where the system allows user namespaces. The host
ends with its initial process, which ends when the creator closes a pipe or dies. The kernel then kills all other
processes of the host, and removes the cable. Nothing outside the two hosts changes.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tiny import children

TOOLS = ("unshare", "nsenter", "ip", "mount", "hostname")
ADDRESSES = {"left": "10.0.0.1", "right": "10.0.0.2"}
# As on Debian and Ubuntu, a host's own name means a loopback address, which other hosts cannot reach.
HOSTS = "127.0.0.1 localhost\n127.0.1.1 {own}\n{address} {other}\n"
SETUP = 'hostname "$1" && mount --bind "$2" /etc/hosts && ip link set lo up && echo ready && exec cat'


class Unavailable(Exception):
    """An operation that this machine does not allow."""


class Host:
    """A host, in the user namespace of the host `beside` if given. Raises `Unavailable`."""

    def __init__(self, name: str, hosts: Path, beside: Host | None = None) -> None:
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if missing:
            raise Unavailable(f"no {', '.join(missing)} here")
        rights = ["--user", "--map-root-user"] if beside is None else []
        self.name = name
        self._holder = subprocess.Popen(
            [
                *(beside._inside("--user") if beside is not None else []),
                *("unshare", *rights, "--net", "--pid", "--mount", "--uts", "--fork", "--kill-child"),
                *("sh", "-c", SETUP, "sh", name, str(hosts)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        assert self._holder.stderr is not None
        if self._holder.stdout.readline() != "ready\n":
            reason = self._holder.stderr.read().strip()
            self.lose()
            raise Unavailable(reason)
        (self.first,) = children(self._holder.pid)

    def _inside(self, *namespaces: str) -> list[str]:
        return ["nsenter", "--target", str(self.first), "--preserve-credentials", *namespaces, "--"]

    def command(self, words: list[str], folder: Path) -> list[str]:
        """Return `words` as a command that runs on this host, in `folder`."""
        return [*self._inside("--user", "--net", "--pid", "--mount", "--uts", f"--wd={folder}"), *words]

    def ip(self, words: str) -> None:
        """Run `ip` in the host's network, but outside its pid namespace: `words` may hold process ids as seen here.

        Raises `Unavailable`.
        """
        done = subprocess.run([*self._inside("--user", "--net"), "ip", *words.split()], capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"ip {words}: {done.stderr.strip()}")

    def lose(self) -> None:
        """Kill every process of the host."""
        self._holder.kill()
        self._holder.communicate()


def two_hosts(folder: Path) -> tuple[Host, Host]:
    """Return two hosts, left and right, which reach each other by name. Raises `Unavailable`.

    Their /etc/hosts are files in `folder`.
    """
    names = list(ADDRESSES)
    for own, other in (names, names[::-1]):
        (folder / f"hosts-{own}").write_text(HOSTS.format(own=own, other=other, address=ADDRESSES[other]))
    left = Host("left", folder / "hosts-left")
    try:
        right = Host("right", folder / "hosts-right", beside=left)
    except BaseException:
        left.lose()
        raise
    try:
        left.ip(f"link add cable0 type veth peer name cable0 netns {right.first}")
        for host in (left, right):
            host.ip(f"address add {ADDRESSES[host.name]}/24 dev cable0")
            host.ip("link set cable0 up")
    except BaseException:
        left.lose()
        right.lose()
        raise
    return left, right
