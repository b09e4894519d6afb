"""Every way to start the program, for real: alone, self-launched, torchrun, Slurm's environment, sweeps, killed."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

DATA = (
    "data=synthetic data.train_count=640 data.val_count=101 data.num_classes=4 data.image_size=16 "
    "model=small model.ghost_batch=8 precision=fp32 schedule.warmup_epochs=0.5 log_every=2 launch.threads=1"
).split()
TINY = [*DATA, "batch.size=64", "optimizer.lr=2", "epochs=2"]
ALONE = [sys.executable, "-m", "lars_train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lars_train"]


def environment(**extra: str) -> dict[str, str]:
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "IMAGENET_DIR")
    kept = {k: v for k, v in os.environ.items() if k not in launcher and not k.startswith("SLURM_")}
    return {**kept, "OMP_NUM_THREADS": "1", **extra}


def start(command: Sequence[str], folder: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment(**extra), capture_output=True, text=True, timeout=240, check=False
    )


def ran(command: Sequence[str], folder: Path, **extra: str) -> str:
    done = start(command, folder, **extra)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def final(folder: Path) -> dict[str, object]:
    content = json.loads((folder / "final.json").read_text())
    assert isinstance(content, dict)
    return content


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[float, float]]:
    return [(line["update"], line["train/loss"]) for line in metrics(folder) if "train/loss" in line]


def test_the_same_command_finds_its_own_finished_run(tmp_path: Path) -> None:
    first = ran([*ALONE, *TINY], tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    assert not set("=, ") & set(folder.name)
    assert "| 64 " in first
    assert f"tensorboard --logdir runs/{folder.name}" in first
    before = (folder / "final.json").read_bytes()
    again = ran([*ALONE, *TINY, "log_every=3"], tmp_path)
    assert "resume=never" in again
    assert "epoch 1/2" not in again
    assert (folder / "final.json").read_bytes() == before
    anew = ran([*ALONE, *TINY, "resume=never"], tmp_path)
    assert "epoch 1/2" in anew
    assert final(folder)["weights_sha256"] == json.loads(before)["weights_sha256"]
    assert (tmp_path / "runs" / f"{folder.name}.old1" / "final.json").read_bytes() == before


def test_a_run_goes_on_with_another_world_size(tmp_path: Path) -> None:
    settings = [*TINY, "precision=fp64"]
    ran([*ALONE, *settings, "run.name=unbroken"], tmp_path)
    ran([*ALONE, *settings, "run.name=moved", "max_updates=7"], tmp_path)
    ran([*ALONE, *settings, "run.name=moved", "launch.nproc=2"], tmp_path)
    unbroken, moved = losses(tmp_path / "runs/unbroken"), losses(tmp_path / "runs/moved")
    common = dict(moved)
    assert [common[u] for u, _ in unbroken if u != 8] == pytest.approx(
        [loss for u, loss in unbroken if u != 8], rel=1e-10
    )


def test_slurm_s_environment_is_adopted(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    step = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
    }
    ranks = [
        subprocess.Popen(
            [*ALONE, *TINY, "run.name=slurm"],
            cwd=tmp_path,
            env=environment(**step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    told = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told
    assert "world size     2" in told[0]
    assert told[1] == ""


@pytest.mark.parametrize("launcher", [ALONE, TORCHRUN], ids=["alone", "torchrun"])
def test_a_failed_job_of_a_sweep_is_reported_and_the_others_finish(launcher: list[str], tmp_path: Path) -> None:
    settings = [*DATA, "data.train_count=12800", "max_updates=4", "epochs=2"]
    done = start([*launcher, "-m", "batch=8k,1k,32k", *settings], tmp_path)
    assert done.returncode != 0
    assert "2 of 3 jobs done" in done.stdout
    assert "job failed: batch=1k" in done.stderr
    assert "no row" in done.stderr
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(names) == 2
    for name in names:
        assert final(tmp_path / "runs" / name)["updates"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def broken_pictures(folder: Path) -> tuple[Path, list[str]]:
    """A tree of pictures, one of them broken, and the settings of a short run on it."""
    tree = folder / "pictures"
    make_pictures(tree, broken_train_class="b")
    settings = (
        f"data=folder data.root={tree} data.image_size=8 data.augment=none data.eval_crop=1.0 model=small "
        "precision=fp32 model.ghost_batch=4 batch.size=8 optimizer.lr=1 epochs=1 schedule.warmup_epochs=0"
    ).split()
    return tree, settings


def test_a_rank_that_fails_within_a_sweep_under_torchrun_ends_only_its_job(tmp_path: Path) -> None:
    tree, settings = broken_pictures(tmp_path)
    done = start([*TORCHRUN, "-m", *settings, "data.on_error=fail,skip"], tmp_path)
    assert "1 of 2 jobs done" in done.stdout, done.stdout + done.stderr
    reason = done.stderr[done.stderr.index("job failed: ") :]
    assert f"{tree / 'train/b/05.png'}" in reason


def test_a_rank_that_fails_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    tree, settings = broken_pictures(tmp_path)
    done = start([*ALONE, *settings, "data.on_error=fail", "launch.nproc=2"], tmp_path)
    assert done.returncode == 1
    assert f"{tree / 'train/b/05.png'}" in done.stderr
    assert str(tree / "train/b/05.png") in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def make_pictures(tree: Path, broken_train_class: str) -> None:
    from PIL import Image

    for split in ("train", "val"):
        for kind, colour in (("a", (200, 30, 30)), ("b", (30, 30, 200))):
            folder = tree / split / kind
            folder.mkdir(parents=True)
            for number in range(12):
                Image.new("RGB", (8, 8), colour).save(folder / f"{number:02}.png")
    (tree / "train" / broken_train_class / "05.png").write_bytes(b"no picture")


def test_an_undecodable_image_is_named_counted_and_limited(tmp_path: Path) -> None:
    tree = tmp_path / "pictures"
    make_pictures(tree, broken_train_class="a")
    (tree / "val" / "b" / "03.png").write_bytes(b"")
    settings = (
        f"data=folder data.root={tree} data.image_size=8 data.augment=none data.eval_crop=1.0 model=small "
        "precision=fp32 batch.size=8 optimizer.lr=1 epochs=2 schedule.warmup_epochs=0"
    ).split()
    told = ran([*ALONE, *settings, "run.name=skip"], tmp_path)
    assert told.count("WARNING: image") == 2
    listed = [json.loads(line)["image"] for line in (tmp_path / "runs/skip/bad_images.jsonl").read_text().splitlines()]
    assert sorted(listed) == [str(tree / "train/a/05.png"), str(tree / "val/b/03.png")]
    assert final(tmp_path / "runs/skip")["val_count"] == 24
    limited = start([*ALONE, *settings, "run.name=limited", "data.max_bad=1"], tmp_path)
    assert limited.returncode == 1
    assert "data.max_bad=1" in limited.stderr
    failed = start([*ALONE, *settings, "run.name=fail", "data.on_error=fail", "data.workers=2"], tmp_path)
    assert failed.returncode == 1
    assert str(tree / "train/a/05.png") in failed.stderr
    assert "Traceback" not in failed.stderr


def wait_for_checkpoint(folder: Path, update: int, process: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + 120
    while not (folder / "checkpoints" / f"update-{update:09d}.pt").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end, "no checkpoint appeared"
        time.sleep(0.005)


CURVE = [*TINY, "data.augment=pad_crop", "data.workers=1", "epochs=12", "log_every=4"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The run directory of CURVE by so many processes, which nobody disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")

    @functools.cache
    def run(processes: int) -> Path:
        ran([*ALONE, *CURVE, f"launch.nproc={processes}", f"run.name={processes}"], folder)
        return folder / "runs" / str(processes)

    return run


def assert_same_run(one: Path, other: Path) -> None:
    assert final(one)["weights_sha256"] == final(other)["weights_sha256"]
    curves = [[(m["update"], m.get("train/loss"), m.get("val/top1")) for m in metrics(run)] for run in (one, other)]
    assert curves[0] == curves[1]


def test_killed_run_ends_with_the_same_weights(unbroken: Callable[[int], Path], tmp_path: Path) -> None:
    # Augmentation, a checkpoint in mid-epoch and one between two log lines; killed twice.
    settings = [*CURVE, "checkpoint.every_updates=15", "checkpoint.keep=100", "launch.nproc=1"]
    folder = tmp_path / "runs/killed"
    for update in (15, 75):
        process = subprocess.Popen(
            [*ALONE, *settings, "run.name=killed"],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for_checkpoint(folder, update, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        end = time.monotonic() + 30
        while any(alive_in_group(process.pid)) and time.monotonic() < end:
            time.sleep(0.05)
    assert "resumed" in ran([*ALONE, *settings, "run.name=killed"], tmp_path)
    assert_same_run(folder, unbroken(1))


def alive_in_group(group: int) -> list[int]:
    alive = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            alive.append(int(status.parent.name))
    return alive


def test_evaluate_and_export_need_nothing_but_the_checkpoint(tmp_path: Path) -> None:
    import torch
    import torchvision

    ran([*ALONE, *TINY, "model=resnet18", "max_updates=3", "run.name=r"], tmp_path)
    want = final(tmp_path / "runs/r")
    told = ran([*ALONE, "mode=evaluate", "checkpoint.path=runs/r"], tmp_path)
    assert f"top-1 {want['final_top1']:.2f} %" in told
    assert "101 images" in told
    assert ran([*TORCHRUN, "mode=evaluate", "checkpoint.path=runs/r"], tmp_path) == told
    other = start([*ALONE, "mode=evaluate", "checkpoint.path=runs/r", "data=mini"], tmp_path)
    assert other.returncode == 2
    assert "another data set" in other.stderr
    ran([*ALONE, "mode=export", "checkpoint.path=runs/r", "export.path=weights.pth"], tmp_path)
    state = torch.load(tmp_path / "weights.pth", weights_only=True)
    torchvision.models.resnet18(num_classes=4).load_state_dict(state)


def test_bad_input_ends_with_2_and_writes_nothing(tmp_path: Path) -> None:
    for arguments, told in (
        (["bach=8k"], "batch"),
        ([*TINY, "batch.size=60"], "56 and 64"),
        ([*TINY, "launch.nproc=9"], "ghost batch"),
        ([*TINY, "checkpoint.path=nowhere.pt"], "nowhere.pt"),
        ([*TINY, "model.weights=nowhere.pt"], "nowhere.pt"),
    ):
        done = start([*ALONE, *arguments], tmp_path)
        assert done.returncode == 2, done.stderr
        assert told in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
        assert list(tmp_path.iterdir()) == []


def test_another_config_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    ran([*ALONE, *TINY, "max_updates=2", "run.name=r"], tmp_path)
    done = start([*ALONE, *TINY, "max_updates=2", "run.name=r", "seed=5"], tmp_path)
    assert done.returncode == 2
    assert "seed: 0 there, 5 now" in done.stderr


def test_any_torch_optimizer_runs_under_lars(tmp_path: Path) -> None:
    adam = ["optimizer=lars", "optimizer.base=AdamW", "optimizer.lr=0.01", "optimizer.kwargs.betas=[0.8,0.9]"]
    told = ran([*ALONE, *TINY, *adam, "max_updates=3", "run.name=adam"], tmp_path)
    assert "LARS over AdamW" in told
    told = ran([*ALONE, *TINY, "optimizer=sgd", "optimizer.kwargs.nesterov=true", "max_updates=3"], tmp_path)
    assert "optimizer      SGD" in told


def test_compile_changes_no_number_but_rounding(tmp_path: Path) -> None:
    ran([*ALONE, *TINY, "max_updates=2", "run.name=eager"], tmp_path)
    ran([*ALONE, *TINY, "max_updates=2", "run.name=compiled", "compile=true"], tmp_path)
    eager, compiled = losses(tmp_path / "runs/eager"), losses(tmp_path / "runs/compiled")
    assert [loss for _, loss in compiled] == pytest.approx([loss for _, loss in eager], rel=1e-3)


def test_the_embedded_set_trains_and_says_what_it_is(tmp_path: Path) -> None:
    told = ran([*ALONE, "max_updates=3", "epochs=1"], tmp_path)
    assert "embedded" in told.splitlines()[0]
    assert "data=imagenet data.root=" in told
    assert "= 255.8, rounded to a multiple of 32: 256" in told
    (folder,) = (tmp_path / "runs").iterdir()
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "final.json", "run.json", ".hydra", "tensorboard"} <= {
        path.name for path in folder.iterdir()
    }


def test_real_photographs_train_from_a_zip(tmp_path: Path) -> None:
    data = os.environ.get("LARS_TEST_DATA")
    if not data:
        pytest.skip("LARS_TEST_DATA is not set: no real photographs here")
    told = ran(
        [
            *ALONE,
            "data=folder",
            f"data.root={Path(data).resolve() / 'cifar10_jpeg.zip'}",
            *"model=small data.image_size=32 data.augment=pad_crop data.eval_crop=1.0".split(),
            *"batch=32k epochs=5 schedule.warmup_epochs=1 max_updates=6 log_every=1".split(),
        ],
        tmp_path,
    )
    assert "rounded to a multiple of 32: 1,280" in told
    (folder,) = (tmp_path / "runs").iterdir()
    assert metrics(folder)[-1]["val/count"] == 10000
    assert losses(folder)[-1][1] < losses(folder)[0][1]


def test_the_wheel_works_from_any_folder_with_the_checkout_gone(tmp_path: Path) -> None:
    import shutil

    checkout = Path(__file__).resolve().parent.parent
    copy, target, elsewhere = tmp_path / "copy", tmp_path / "site", tmp_path / "elsewhere"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "runs", "build", "*.egg-info", ".venv"))
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    # No build isolation and no dependencies: the test needs no network; torch comes from this environment.
    build = ["wheel", str(copy), "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(tmp_path)]
    assert start([*pip, *build], tmp_path).returncode == 0
    shutil.rmtree(copy)
    (wheel,) = tmp_path.glob("*.whl")
    assert (
        start([*pip, "install", "--no-deps", "--no-index", "-q", "-t", str(target), str(wheel)], tmp_path).returncode
        == 0
    )
    found = "import lars_train, lars_train.config as c; print(lars_train.__file__); print(c.config_dir())"
    where = ran([sys.executable, "-c", found], elsewhere, PYTHONPATH=str(target))
    assert all(line.startswith(str(target)) for line in where.splitlines())
    told = ran([*ALONE, "max_updates=2", "epochs=1"], elsewhere, PYTHONPATH=str(target))
    assert "embedded" in told


def test_torchrun_s_restart_goes_on_even_where_the_command_says_never(tmp_path: Path) -> None:
    settings = [*TINY, "run.name=r"]
    ran([*ALONE, *settings, "max_updates=4"], tmp_path)
    told = ran([*ALONE, *settings, "resume=never"], tmp_path, TORCHELASTIC_RESTART_COUNT="1")
    assert "resumed        at update 4" in told
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["r"]


def test_torchrun_restarts_after_a_killed_rank_and_ends_with_the_same_weights(
    unbroken: Callable[[int], Path], tmp_path: Path
) -> None:
    # The static rendezvous, whose store outlives the processes.
    command = [*TORCHRUN[:3], "--max-restarts", "1", *TORCHRUN[3:], *CURVE, "checkpoint.every_updates=5"]
    process = subprocess.Popen(
        [*command, "run.name=killed"], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    wait_for_checkpoint(tmp_path / "runs/killed", 10, process)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    told, _ = process.communicate(timeout=200)
    assert process.returncode == 0, told
    assert "resumed" in told
    assert_same_run(tmp_path / "runs/killed", unbroken(2))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_ranks_whose_launcher_is_killed_end_with_a_checkpoint(unbroken: Callable[[int], Path], tmp_path: Path) -> None:
    command = [*ALONE, *CURVE, "launch.nproc=2", "checkpoint.every_updates=10", "run.name=killed"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for_checkpoint(tmp_path / "runs/killed", 10, process)
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while alive_in_group(process.pid):
        assert time.monotonic() < end, "ranks go on without their launcher"
        time.sleep(0.1)
    assert "resumed" in ran(command, tmp_path)
    assert_same_run(tmp_path / "runs/killed", unbroken(2))


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ([*ALONE, "launch.nproc=1"], signal.SIGTERM),
        ([*ALONE, "launch.nproc=2"], signal.SIGUSR1),
        # One rank alone is told, as when one node is to be given back; the others end with it.
        (TORCHRUN, signal.SIGTERM),
    ],
    ids=["alone", "nproc", "torchrun"],
)
def test_a_notice_ends_the_run_with_a_checkpoint_and_it_goes_on_to_the_same_weights(
    launcher: list[str], number: signal.Signals, unbroken: Callable[[int], Path], tmp_path: Path
) -> None:
    # No checkpoint is due before the end, of updates or of minutes, and none for a best result: the one that is
    # found is that of the notice.
    command = [*launcher, *CURVE, "checkpoint.every_updates=1000", "evaluate.every_epochs=12", "run.name=stopped"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    logged, end = tmp_path / "runs/stopped/metrics.jsonl", time.monotonic() + 120
    while not (logged.exists() and logged.read_text().count("\n") >= 4):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(children(process.pid)[1] if launcher is TORCHRUN else process.pid, number)
    _, told = process.communicate(timeout=60)
    assert f"{number.name}: stopped" in told
    assert process.returncode == (1 if launcher is TORCHRUN else 75), told
    stopped = tmp_path / "runs/stopped"
    assert len(list((stopped / "checkpoints").glob("update-*.pt"))) == 1
    assert "resumed" in ran(command, tmp_path)
    reference = unbroken(1 if "launch.nproc=1" in launcher else 2)
    assert final(stopped)["weights_sha256"] == final(reference)["weights_sha256"]
    assert losses(stopped) == losses(reference)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupt_ends_a_sweep_at_once_and_the_run_can_go_on(processes: int, tmp_path: Path) -> None:
    settings = [*TINY, f"launch.nproc={processes}", "epochs=400", "checkpoint.every_updates=5"]
    process = subprocess.Popen(
        [*ALONE, "-m", *settings, "run.name=first,second"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # A shell's background job, which CI may be, ignores the signal; a terminal's does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for_checkpoint(tmp_path / "runs/first", 5, process)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75, told
    assert b"SIGINT: stopped" in told
    assert b"the same command goes on" in told
    assert b"Traceback" not in told
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["first"]
