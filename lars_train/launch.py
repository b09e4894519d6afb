"""Which processes there are: those that torchrun or Slurm started, or how many to start (spawn.py does).

No process group is made here (training/distributed.py does), and no training code is imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lars_train.config import AUTO, Config
from lars_train.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """This process among all of the run (`rank` of `world`) and on its machine (`local_rank` of `local_world`)."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def first(self) -> bool:
        """True on the one process that writes and prints."""
        return self.rank == 0


def adopt(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """The ranks that torchrun or ``srun`` gave this process; None if it was started alone.

    Raises `ConfigError` when such an environment is there but incomplete.
    """
    if "TORCHELASTIC_RUN_ID" in environment or {"RANK", "WORLD_SIZE"} <= environment.keys():
        return _from_torchrun(environment)
    # A batch script's own shell carries SLURM_NTASKS too; only a step that srun started has several tasks.
    if environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return _from_slurm(environment)
    return None


def restarts(environment: Mapping[str, str] = os.environ) -> int:
    """How often torchrun has started this process again after a failure (``--max-restarts``)."""
    return int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))


def export_slurm(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that torch's ``env://`` rendezvous wants, derived from those of a Slurm step."""
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if not address:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
        if not nodes:
            raise ConfigError("Slurm: SLURM_STEP_NODELIST is not set; set MASTER_ADDR yourself.")
        address = first_host(nodes)
    if not port:
        job = int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
        port = str(20000 + job % 20000)
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: ``gpu[07-09,12],cpu1`` gives ``gpu07``.

    A name may have several ranges (``rack[0-3]_blade[0-41]``; https://slurm.schedmd.com/slurm.conf.html,
    NodeName). Raises `ConfigError` for what is no node list.
    """
    entry = re.match(r"(?:[^\[\],\s]|\[\w[^\[\]]*\])+(?=,|$)", nodes.strip())
    if entry is None:
        raise ConfigError(f"Slurm: the node list {nodes!r} cannot be read; set MASTER_ADDR yourself.")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", entry.group())


def processes(config: Config, devices: int, ghosts: int) -> int:
    """Processes to start on this machine: as asked for, or one per device while each has a ghost batch.

    `devices`: the accelerators of this machine (0: the CPU alone, where one process uses all cores).
    Raises `ConfigError` when there are fewer devices than processes asked for.
    """
    wanted = config.launch.nproc
    if wanted == AUTO:
        return max(1, min(devices, ghosts))
    count = int(wanted)
    if devices and count > devices and config.device != "cpu":
        raise ConfigError(
            f"launch.nproc={count}: this machine has {devices} CUDA device(s); use at most that many, or device=cpu."
        )
    return count


def check_nodes(config: Config, ranks: Ranks | None) -> None:
    """Raise `ConfigError` where ``launch.nodes`` is not the number of machines that this start is on."""
    wanted = config.launch.nodes
    found = 1 if ranks is None else -(-ranks.world // ranks.local_world)
    if wanted is not None and wanted != found:
        how = "start it on each with torchrun or srun (docs/clusters.md)" if ranks is None else "mend the launcher's"
        raise ConfigError(f"launch.nodes={wanted}: this start is on {found} machine(s); {how}, or drop the key.")


def _from_torchrun(environment: Mapping[str, str]) -> Ranks:
    try:
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", "0"))
        local_world = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    except (KeyError, ValueError) as error:
        raise ConfigError(f"the launcher's environment is incomplete: {error}; start with torchrun.") from None
    if not 0 <= rank < world or not 0 <= local_rank < max(local_world, local_rank + 1):
        raise ConfigError(f"RANK={rank} and WORLD_SIZE={world} do not fit together; start with torchrun.")
    if world > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        raise ConfigError("RANK and WORLD_SIZE are set but MASTER_ADDR or MASTER_PORT is not; start with torchrun.")
    return Ranks(rank, world, local_rank, max(local_world, local_rank + 1))


def _from_slurm(environment: Mapping[str, str]) -> Ranks:
    missing = [k for k in ("SLURM_PROCID", "SLURM_LOCALID") if k not in environment]
    if missing:
        raise ConfigError(f"Slurm: {', '.join(missing)} is not set; start the step with srun.")
    numbers = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
    odd = [f"{k}={environment[k]}" for k in numbers if not environment[k].isdigit()]
    if odd:
        raise ConfigError(f"Slurm: {', '.join(odd)} is no number; start the step with srun.")
    # "4(x2),3": tasks on each node; the first number is right for all but the last node of an uneven step.
    per_node = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    local_rank = int(environment["SLURM_LOCALID"])
    return Ranks(
        int(environment["SLURM_PROCID"]),
        int(environment["SLURM_STEP_NUM_TASKS"]),
        local_rank,
        max(int(per_node.group()) if per_node else 1, local_rank + 1),
    )
