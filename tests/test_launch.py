"""Ranks and the number of processes to start are derived from the launcher's environment variables."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lars_train.config import Config
from lars_train.errors import ConfigError
from lars_train.launch import Ranks, WorkerError, adopt, export_slurm, first_host, processes, share_cores

# torchrun on the second of two machines with two processes each.
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29400",
}
# In the batch script of `sbatch --nodes 2 --ntasks-per-node 4`: variables of the job, but not of a step.
SBATCH = {
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_NTASKS": "8",
    "SLURM_NPROCS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
# The sixth task of `srun` in that job.
SRUN = {
    **SBATCH,
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def without(environment: dict[str, str], *keys: str) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key not in keys}


def test_a_process_started_alone_has_no_ranks() -> None:
    assert adopt({}) is None
    assert adopt({"PATH": "/bin", "RANK": "1"}) is None
    assert Ranks() == Ranks(rank=0, world=1, local_rank=0, local_world=1)


def test_torchruns_ranks_are_adopted() -> None:
    ranks = adopt(TORCHRUN)
    assert ranks == Ranks(rank=3, world=4, local_rank=1, local_world=2)
    assert not ranks.first
    first = adopt({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0"})
    assert first is not None
    assert first.first


def test_ranks_set_by_hand_are_adopted() -> None:
    by_hand = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert adopt(by_hand) == Ranks(rank=1, world=2)
    assert adopt({"RANK": "0", "WORLD_SIZE": "1"}) == Ranks()
    # LOCAL_RANK 2 exists, so this machine has at least three.
    assert adopt({**by_hand, "LOCAL_RANK": "2"}) == Ranks(rank=1, world=2, local_rank=2, local_world=3)


@pytest.mark.parametrize(
    "environment",
    [
        without(TORCHRUN, "RANK"),
        without(TORCHRUN, "WORLD_SIZE"),
        without(TORCHRUN, "MASTER_ADDR"),
        without(TORCHRUN, "MASTER_PORT"),
        {**TORCHRUN, "RANK": "4"},
        {**TORCHRUN, "RANK": "-1"},
        {**TORCHRUN, "RANK": "one"},
        {**TORCHRUN, "LOCAL_RANK": "-1"},
    ],
)
def test_a_broken_environment_of_torchrun_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="torchrun"):
        adopt(environment)


def test_a_slurm_steps_ranks_are_adopted() -> None:
    assert adopt(SRUN) == Ranks(rank=5, world=8, local_rank=1, local_world=4)


def test_torchrun_within_a_slurm_step_takes_precedence() -> None:
    assert adopt({**SRUN, **TORCHRUN}) == Ranks(rank=3, world=4, local_rank=1, local_world=2)


def test_the_shell_of_a_batch_script_is_one_process() -> None:
    assert adopt(SBATCH) is None
    # A step with one task: `srun` of a single process, or an interactive shell on a node.
    assert adopt({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_LOCALID"])
def test_an_incomplete_slurm_step_names_the_missing_variable(missing: str) -> None:
    with pytest.raises(ConfigError, match=rf"{missing}.*srun"):
        adopt(without(SRUN, missing))


@pytest.mark.parametrize(("per_node", "local_world"), [("4(x2)", 4), ("3,2", 3), ("1", 2), ("", 2)])
def test_tasks_per_machine_are_read_from_slurms_list(per_node: str, local_world: int) -> None:
    ranks = adopt({**SRUN, "SLURM_STEP_TASKS_PER_NODE": per_node})
    assert ranks is not None
    # LOCALID 1 exists, so this machine has at least two.
    assert ranks.local_world == local_world


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[1-4]", "gpu1"),
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("gpu[12]", "gpu12"),
        ("gpu[3,5,7-9]", "gpu3"),
        ("a-b[001-128]-ib", "a-b001-ib"),
        ("a-b[1-2,4]-ib.site.org,c", "a-b1-ib.site.org"),
        ("login,gpu[1-4]", "login"),
        ("rack[0-3]_blade[10-41]", "rack0_blade10"),
        ("rack[2,5]n[03,05],x[1-2]", "rack2n03"),
        ("node-1.cluster.local", "node-1.cluster.local"),
        (" gpu[1-2] ", "gpu1"),
        ("10.0.0.[7-9]", "10.0.0.7"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", ",gpu1", "gpu[1-4", "gpu[]", "gpu]1[", "gpu[1-[2]]"])
def test_an_invalid_node_list_is_refused(nodes: str) -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        first_host(nodes)


@given(
    prefix=st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True),
    numbers=st.lists(st.integers(0, 999), min_size=1, max_size=5, unique=True),
    rest=st.lists(st.sampled_from(["cpu1", "x[1-2,9]", "y[01-99]z"]), max_size=3),
)
def test_the_first_host_is_the_first_of_the_expanded_list(prefix: str, numbers: list[int], rest: list[str]) -> None:
    packed = f"{prefix}[{','.join(f'{n:03}' for n in numbers)}]"
    assert first_host(",".join([packed, *rest])) == f"{prefix}{numbers[0]:03}"


def test_torchs_rendezvous_variables_are_derived_from_the_step() -> None:
    exported = export_slurm(SRUN)
    port = exported.pop("MASTER_PORT")
    assert exported == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07"}
    assert 20_000 <= int(port) < 32_768
    # The port is the same on every task of the step, and differs for the next step and the next job.
    others = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert export_slurm({**SRUN, **others})["MASTER_PORT"] == port
    for key, value in (("SLURM_STEP_ID", "4"), ("SLURM_JOB_ID", "4243")):
        assert export_slurm({**SRUN, key: value})["MASTER_PORT"] != port


def port_of(job: int | str, step: int | str) -> int:
    return int(export_slurm({**SRUN, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"])


def test_a_slurm_steps_port_depends_on_job_and_step_alone() -> None:
    # SHA-256 of "1000.1" and "1001.0" by coreutils: the first 16 digits, modulo 12,768, plus 20,000.
    assert (port_of(1000, 1), port_of(1001, 0)) == (20_694, 22_353)
    # The step number of a shell started by `salloc`.
    assert 20_000 <= port_of(7, 4294967290) < 32_768


def test_slurm_steps_of_one_host_rarely_share_a_port() -> None:
    ports = [port_of(job, step) for job in range(100_000, 100_050) for step in range(2)]
    assert all(20_000 <= port < 32_768 for port in ports)
    # 100 random ports have 0.4 equal pairs on average. Ports from the sum of job and step would have 49.
    assert len(set(ports)) >= 97


def test_each_rendezvous_variable_set_by_the_user_is_kept() -> None:
    derived = export_slurm(SRUN)
    assert export_slurm({**SRUN, "MASTER_ADDR": "ib-gpu07"}) == {**derived, "MASTER_ADDR": "ib-gpu07"}
    assert export_slurm({**SRUN, "MASTER_PORT": "12345"}) == {**derived, "MASTER_PORT": "12345"}
    both = {"MASTER_ADDR": "ib-gpu07", "MASTER_PORT": "12345"}
    assert export_slurm({**SRUN, **both}) == {**derived, **both}


def test_the_jobs_node_list_replaces_a_missing_one_of_the_step() -> None:
    lone = without(SRUN, "SLURM_STEP_NODELIST")
    assert export_slurm({**lone, "SLURM_JOB_NODELIST": "n[3-4]"})["MASTER_ADDR"] == "n3"
    with pytest.raises(ConfigError, match=r"SLURM_STEP_NODELIST.*MASTER_ADDR"):
        export_slurm(without(lone, "SLURM_JOB_NODELIST"))


def nproc_config(nproc: int | str, device: str = "auto") -> Config:
    config = Config(device=device)
    config.launch.nproc = nproc
    return config


@pytest.mark.parametrize(
    ("devices", "ghosts", "expected"),
    [(0, 1024, 1), (1, 1024, 1), (8, 1024, 8), (8, 3, 3), (8, 1, 1), (0, 0, 1)],
)
def test_one_process_per_device_while_each_has_a_ghost_batch(devices: int, ghosts: int, expected: int) -> None:
    assert processes(nproc_config("auto"), devices, ghosts) == expected


def test_requested_processes_need_as_many_devices_or_the_cpu() -> None:
    assert processes(nproc_config(2), 8, 1024) == 2
    assert processes(nproc_config("4"), 8, 1024) == 4
    assert processes(nproc_config(2), 0, 1024) == 2
    assert processes(nproc_config(4, device="cpu"), 2, 1024) == 4
    with pytest.raises(ConfigError, match=r"launch\.nproc=3: this machine has 2 CUDA"):
        processes(nproc_config(3), 2, 1024)


def test_a_worker_error_has_rank_and_traceback() -> None:
    assert str(WorkerError(1, "KeyError: 'x'", "Traceback ...")) == "rank 1: KeyError: 'x'\nTraceback ..."
    assert str(WorkerError(0, "Signal 9 (SIGKILL) received")) == "rank 0: Signal 9 (SIGKILL) received"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_waiting_threads_sleep_soon_unless_the_user_chose(given: dict[str, str], expected: dict[str, str]) -> None:
    environment = dict(given)
    share_cores(environment)
    assert environment == expected


def test_garbage_is_collected_rarely_until_training_begins() -> None:
    # In its own process: the exit handler stays registered.
    code = (
        "import gc; gc.set_threshold(700, 10, 10)\n"
        "from lars_train.launch import collect_garbage_as_usual, collect_garbage_rarely\n"
        "collect_garbage_rarely(); assert gc.get_threshold()[0] >= 100_000\n"
        "collect_garbage_as_usual(); assert gc.get_threshold() == (700, 10, 10)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_detecting_the_launcher_needs_no_torch() -> None:
    code = "import sys; from lars_train.launch import adopt; adopt(); sys.exit('torch' in sys.modules)"
    clean = without(dict(os.environ), *TORCHRUN)
    assert subprocess.run([sys.executable, "-c", code], env=clean, check=False).returncode == 0
