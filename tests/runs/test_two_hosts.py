"""A run on two hosts, each with its own name, address and network, survives the loss of one host."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Host, Unavailable, two_hosts
from nodes import NODE, SETTINGS, assert_same_curve, launcher, lines, undisturbed_losses, until
from tiny import environment

# The seconds after which a silent rank counts as lost.
TIMEOUT = "distributed.timeout=10"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    try:
        made = two_hosts(tmp_path)
    except Unavailable as error:
        pytest.skip(f"cannot simulate two hosts: {error}")
    yield made
    for host in made:
        host.lose()


@pytest.mark.slow
def test_a_run_across_two_hosts_survives_the_loss_of_one(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    def output(host: Host) -> str:
        return (tmp_path / f"{host.name}.log").read_text()

    def train(host: Host) -> subprocess.Popen[bytes]:
        with (tmp_path / f"{host.name}.log").open("wb") as log:
            command = host.command([*launcher("left:29400", 2), *SETTINGS, TIMEOUT], tmp_path)
            return subprocess.Popen(command, env=environment(**NODE), stdout=log, stderr=subprocess.STDOUT)

    left, right = hosts
    staying, leaving = train(left), train(right)
    until(lambda: "world size     2" in output(left) + output(right), "both hosts train")
    until(lambda: len(lines(tmp_path / "run")) >= 4, "updates")
    # As in a power failure, no process of that host can close its connections.
    right.ip("link set cable0 down")
    right.lose()
    leaving.wait(20)
    assert staying.wait(120) == 0, output(left)
    resumed = output(left).rpartition("world size")[2]
    assert resumed.split()[0] == "1"
    assert "resumed        at update" in resumed
    (tmp_path / "alone").mkdir()
    assert_same_curve(tmp_path / "run", undisturbed_losses(tmp_path / "alone"))
