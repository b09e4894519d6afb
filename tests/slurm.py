"""A Slurm cluster of one node on the loopback interface, with its files in a temporary folder.

The node may claim more cores than the machine has, so that several jobs run at once. Jobs in the partition `high`
preempt jobs in the partition `low`, which are requeued.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tiny import environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
# https://slurm.schedmd.com/slurm.conf.html. cred_expire is also the delay before a requeued job starts. The limits
# suit a busy machine, where daemons are slow to answer and to start a job (by default Slurm gives up on a job after
# 10 s). Slurm keeps the record of an ended job for MinJobAge; it reads 0 as 2 s, which is too short for the tests.
CONFIG = """
ClusterName=loopback
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
MpiDefault=none
MinJobAge=3600
MessageTimeout=60
BatchStartTimeout=120
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
NodeName=localhost CPUs={cores} CoresPerSocket={cores} RealMemory=1000
PartitionName=low Nodes=localhost PriorityTier=1 PreemptMode=REQUEUE GraceTime=120 Default=YES
PartitionName=high Nodes=localhost PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str:
    """Return why no Slurm can be started here, or an empty string."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} missing (Debian, Ubuntu: apt-get install slurm-wlm munge)"
    # slurmd starts a job as the user who submits it.
    return "" if os.geteuid() == 0 else "slurmd needs root"


def until(condition: Callable[[], object], what: str, seconds: float = 240, report: Callable[[], str] = str) -> None:
    """Wait until `condition()` is true. On a timeout, fail with `what` and the text that `report` returns."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}\n{report()}"
        time.sleep(0.2)


class Slurm:
    """The running daemons. With `environment`, commands find the daemons and lars-train.

    A daemon that has died is restarted before the next command, as a service manager would do.
    """

    def __init__(self, folder: Path, cores: int) -> None:
        self.folder = folder
        self.environment = environment(
            SLURM_CONF=str(folder / "slurm.conf"), PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        )
        self._daemons: dict[tuple[str, ...], subprocess.Popen[bytes]] = {}
        self._trouble = ""
        for name in ("state", "spool"):
            (folder / name).mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        with socket.socket() as first, socket.socket() as second:
            for probe in (first, second):
                probe.bind(("127.0.0.1", 0))
            ports = [probe.getsockname()[1] for probe in (first, second)]
        text = CONFIG.format(ports=ports, user=getpass.getuser(), folder=folder, cores=cores)
        (folder / "slurm.conf").write_text(text)

    def start(self) -> None:
        """Start the daemons. Fail the test if they do not become ready."""
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
        # Without --force, the daemon rejects a folder that other users cannot reach.
        munged = ["munged", "--foreground", "--force", *(f"--{k}={self.folder}/munge.{v}" for k, v in files.items())]
        self._daemon(munged)
        until((self.folder / "munge.socket").exists, "munged's socket")
        for name in ("slurmctld", "slurmd"):
            self._daemon([name, "-D", "-f", str(self.folder / "slurm.conf")])
        until(lambda: "idle" in self.command("sinfo", "--noheader", "--format=%t"), f"an idle node, {self.folder}")

    def stop(self) -> None:
        """Cancel all jobs, and end the daemons."""
        try:
            # A job that requeues itself when it ends may have to be canceled twice.
            until(lambda: not self._cancel_all(), "the end of all jobs", 60)
        finally:
            for daemon in reversed(self._daemons.values()):
                daemon.terminate()
            for daemon in self._daemons.values():
                try:
                    daemon.wait(20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()

    def command(self, *words: str) -> str:
        """Return the output of a Slurm command, or an empty string if it fails."""
        for daemon, process in list(self._daemons.items()):
            if process.poll() is not None:
                self._trouble += f"{daemon[0]} ended with {process.returncode} and was started again\n"
                self._daemon(daemon)
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=90, check=False)
        if done.returncode != 0:
            self._trouble += f"{' '.join(words)}: {done.returncode}: {done.stderr}"
        return done.stdout.strip() if done.returncode == 0 else ""

    def describe(self, job: str) -> str:
        """Return the controller's description of a job, the failed commands so far, and the end of its log."""
        log = (self.folder / "slurmctld.log").read_text(errors="replace")
        return f"{self.command('scontrol', 'show', 'job', job)}\n{self._trouble[:2000]}\n{log[-8000:]}"

    def submit(self, folder: Path, *words: str, **variables: str) -> str:
        """Return the id of the job that `sbatch` submits from `folder`."""
        done = subprocess.run(
            ["sbatch", "--parsable", *words],
            cwd=folder,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """Return one field of `scontrol show job`, such as JobState."""
        fields = dict(word.partition("=")[::2] for word in self.command("scontrol", "show", "job", job).split())
        return fields.get(name, "")

    def _cancel_all(self) -> str:
        self.command("scancel", f"--user={getpass.getuser()}")
        return self.command("squeue", "--noheader")

    def _daemon(self, words: Sequence[str]) -> None:
        log = (self.folder / f"{words[0]}.out").open("ab")
        with log:
            self._daemons[tuple(words)] = subprocess.Popen(words, stdout=log, stderr=log, env=self.environment)


def skip_without_slurm() -> None:
    """Skip the module if Slurm cannot run here, with the reason."""
    if reason := missing():
        pytest.skip(f"no Slurm: {reason}", allow_module_level=True)
