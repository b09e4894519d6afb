"""Every way to start the program: alone, with its own launcher, by torchrun, in Slurm's environment, in sweeps."""

from __future__ import annotations

import csv
import json
import os
import socket
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest
from tiny import (
    ALONE,
    DATA,
    TINY,
    TORCHRUN,
    environment,
    final,
    losses,
    metrics,
    ran,
    shell,
    start,
    start_ranks,
)

pytestmark = pytest.mark.slow

DISPLAY = {"OMP_DISPLAY_ENV": "verbose"}
"""Makes libgomp print its settings to stderr in each process that loads it."""
SLEEPS_SOON = "GOMP_SPINCOUNT = '1000'"


def test_the_same_command_finds_its_own_finished_run(tmp_path: Path) -> None:
    first = ran([*ALONE, *TINY], tmp_path, fresh=True)
    (folder,) = (tmp_path / "runs").iterdir()
    assert not set("=, ") & set(folder.name)
    assert "| 32 " in first
    assert f"tensorboard --logdir runs/{folder.name}" in first
    before = (folder / "final.json").read_bytes()
    again = ran([*ALONE, *TINY, "log_every=3"], tmp_path)
    assert "resume=never" in again
    assert "epoch 1/2" not in again
    assert (folder / "final.json").read_bytes() == before
    again = ran([*ALONE, *TINY, "resume=never"], tmp_path)
    assert "epoch 1/2" in again
    assert final(folder)["weights_sha256"] == json.loads(before)["weights_sha256"]
    assert (tmp_path / "runs" / f"{folder.name}.old1" / "final.json").read_bytes() == before


def test_a_run_from_its_config_file_equals_its_command(tmp_path: Path) -> None:
    ran([*ALONE, *TINY, "max_updates=4", "run.name=12_34", "resume=never"], tmp_path)
    folder = tmp_path / "runs" / "12_34"
    before = (folder / "final.json").read_bytes()
    again = ran([*ALONE, "--config-file", "runs/12_34/config.yaml"], tmp_path)
    assert "run directory  runs/12_34" in again
    assert (folder / "final.json").read_bytes() == before
    again = ran([*ALONE, "-m", "--config-file", "runs/12_34", "run.name=on,ce", "log_every=3"], tmp_path)
    assert "sweep: 2 of 2 jobs done" in again
    for name in ("on", "ce"):
        copy = tmp_path / "runs" / name
        assert final(copy)["weights_sha256"] == json.loads(before)["weights_sha256"]
        assert (
            json.loads((copy / "run.json").read_text())["hash"] == json.loads((folder / "run.json").read_text())["hash"]
        )


def test_a_run_resumes_with_another_world_size(tmp_path: Path) -> None:
    settings = [*TINY, "precision=fp64"]
    ran([*ALONE, *settings, "run.name=unbroken"], tmp_path)
    ran([*ALONE, *settings, "run.name=moved", "max_updates=7"], tmp_path)
    done = start([*ALONE, *settings, "run.name=moved", "launch.nproc=2"], tmp_path, fresh=True, **DISPLAY)
    assert done.returncode == 0, done.stderr
    # The launcher and its two ranks.
    assert done.stderr.count(SLEEPS_SOON) == 3
    unbroken, moved = losses(tmp_path / "runs/unbroken"), losses(tmp_path / "runs/moved")
    common = dict(moved)
    assert [common[u] for u, _ in unbroken if u != 8] == pytest.approx(
        [loss for u, loss in unbroken if u != 8], rel=1e-10
    )


def test_slurms_environment_is_adopted(tmp_path: Path) -> None:
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
    ranks = [environment(**step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)) for rank in range(2)]
    first, second = shell().run_together(["lars-train", *TINY, "run.name=slurm"], tmp_path, ranks)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "world size     2" in first.stdout
    assert (second.stdout, second.stderr) == ("", "")


REPORT = {"table.md", "table.csv", "curves.png", "curves.svg", "report.html"}


def test_a_failed_job_does_not_stop_the_sweep(tmp_path: Path) -> None:
    settings = [*DATA, "data.train_count=12800", "max_updates=4", "epochs=2"]
    done = start([*ALONE, "-m", "batch=8k,1k,32k", *settings], tmp_path)
    assert done.returncode != 0
    assert "2 of 3 jobs done" in done.stdout
    assert "job failed: batch=1k" in done.stderr
    assert "no row" in done.stderr
    (report,) = (tmp_path / "runs").glob("report-*")
    assert {path.name for path in report.iterdir()} > REPORT
    names = sorted(path.name for path in (tmp_path / "runs").iterdir() if path != report)
    assert len(names) == 2
    for name in names:
        assert final(tmp_path / "runs" / name)["updates"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def broken_images(folder: Path) -> tuple[Path, list[str]]:
    """Make a tree of images, one of them broken. Return it and the settings of a short run on it."""
    tree = folder / "images"
    make_images(tree, broken_train_class="b")
    settings = (
        f"data=folder data.root={tree} data.image_size=8 data.augment=none data.eval_crop=1.0 model=small "
        "precision=fp32 model.ghost_batch=4 batch.size=8 optimizer.lr=1 epochs=1 schedule.warmup_epochs=0"
    ).split()
    return tree, settings


def test_failures_in_a_sweep_of_two_ranks_end_only_their_jobs(tmp_path: Path) -> None:
    tree, settings = broken_images(tmp_path)
    # One job fails in a rank, two are refused before they start.
    sweep = ["-m", *(s for s in settings if s != "epochs=1"), "data.on_error=fail,skip", "epochs=1,0"]
    done = start([*TORCHRUN, *sweep], tmp_path)
    assert done.returncode != 0
    assert "1 of 4 jobs done" in done.stdout, done.stdout + done.stderr
    reason = done.stderr[done.stderr.index("job failed: ") :]
    assert f"{tree / 'train/b/05.png'}" in reason
    assert reason.count("epochs=0") >= 2
    (report,) = (tmp_path / "runs").glob("report-*")
    assert {path.name for path in report.iterdir()} > REPORT
    assert done.stdout.count(f"runs/{report.name}/report.html") == 1


def test_a_failing_rank_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    tree, settings = broken_images(tmp_path)
    done = start([*ALONE, *settings, "data.on_error=fail", "launch.nproc=2"], tmp_path)
    assert done.returncode == 1
    assert f"{tree / 'train/b/05.png'}" in done.stderr
    assert str(tree / "train/b/05.png") in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def make_images(tree: Path, broken_train_class: str) -> None:
    from PIL import Image

    for split in ("train", "val"):
        for kind, color in (("a", (200, 30, 30)), ("b", (30, 30, 200))):
            folder = tree / split / kind
            folder.mkdir(parents=True)
            for number in range(12):
                Image.new("RGB", (8, 8), color).save(folder / f"{number:02}.png")
    (tree / "train" / broken_train_class / "05.png").write_bytes(b"no image")


def test_an_undecodable_image_is_named_counted_and_limited(tmp_path: Path) -> None:
    tree = tmp_path / "images"
    make_images(tree, broken_train_class="a")
    (tree / "val" / "b" / "03.png").write_bytes(b"")
    settings = (
        f"data=folder data.root={tree} data.image_size=8 data.augment=none data.eval_crop=1.0 model=small "
        "precision=fp32 batch.size=8 optimizer.lr=1 epochs=2 schedule.warmup_epochs=0"
    ).split()
    output = ran([*ALONE, *settings, "run.name=skip"], tmp_path)
    assert output.count("WARNING: image") == 2
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


def test_evaluate_and_export_need_only_the_checkpoint(tmp_path: Path) -> None:
    import torch
    import torchvision

    ran([*ALONE, *TINY, "model=resnet18", "max_updates=1", "run.name=r"], tmp_path)
    expected = final(tmp_path / "runs/r")
    output = ran([*ALONE, "mode=evaluate", "checkpoint.path=runs/r", "evaluate.report=found"], tmp_path)
    with (tmp_path / "found" / "per_class.csv").open() as file:
        correct = sum(int(row["correct"]) for row in csv.DictReader(file))
    assert 100 * correct / 101 == pytest.approx(expected["final_top1"])
    assert f"top-1 {expected['final_top1']:.2f} %" in output
    assert "101 images" in output
    again, other = start_ranks(["mode=evaluate", "checkpoint.path=runs/r"], tmp_path)
    assert (again.returncode, other.returncode, other.stdout) == (0, 0, ""), again.stderr + other.stderr
    assert again.stdout.splitlines() == output.splitlines()[:1]
    other = start([*ALONE, "mode=evaluate", "checkpoint.path=runs/r", "data=mini"], tmp_path)
    assert other.returncode == 2
    assert "10 of the data set's 10 classes are not among the model's 4: ankle-boot" in other.stderr
    ran([*ALONE, "mode=export", "checkpoint.path=runs/r", "export.path=weights.pth"], tmp_path)
    state = torch.load(tmp_path / "weights.pth", weights_only=True)
    torchvision.models.resnet18(num_classes=4).load_state_dict(state)


def test_bad_input_ends_with_2_and_writes_nothing(tmp_path: Path) -> None:
    for arguments, message in (
        (["bach=8k"], "batch"),
        ([*TINY, "batch.size=60"], "56 and 64"),
        ([*TINY, "launch.nproc=9"], "ghost batch"),
        ([*TINY, "checkpoint.path=nowhere.pt"], "nowhere.pt"),
        ([*TINY, "model.weights=nowhere.pt"], "nowhere.pt"),
    ):
        done = start([*ALONE, *arguments], tmp_path)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
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
    output = ran([*ALONE, *TINY, *adam, "max_updates=3", "run.name=adam"], tmp_path)
    assert "LARS over AdamW" in output
    output = ran([*ALONE, *TINY, "optimizer=sgd", "optimizer.nesterov=true", "max_updates=3"], tmp_path)
    assert "optimizer      SGD" in output


def test_a_torch_optimizer_without_lars_makes_its_own_steps(tmp_path: Path) -> None:
    plain = ["optimizer.lr=0.01", "optimizer.weight_decay=0.02", "max_updates=3", "log_every=1"]
    output = ran([*ALONE, *TINY, "optimizer=adamw", *plain, "run.name=adamw"], tmp_path)
    assert "optimizer      AdamW, peak lr 0.01, weight decay 0.02" in output
    ran([*ALONE, *TINY, "optimizer=torch", "optimizer.base=AdamW", *plain, "run.name=torch"], tmp_path)
    ran([*ALONE, *TINY, "optimizer=lars", "optimizer.base=AdamW", *plain, "run.name=lars"], tmp_path)
    found = {name: final(tmp_path / "runs" / name)["weights_sha256"] for name in ("adamw", "torch", "lars")}
    assert found["adamw"] == found["torch"] != found["lars"]


def test_compile_and_layout_change_only_rounding(tmp_path: Path) -> None:
    small = [*ALONE, *TINY, "data.val_count=64", "max_updates=2"]
    output = ran([*small, "run.name=eager"], tmp_path)
    assert "channels last, not compiled" in output
    # tests/training/test_trainer.py compiles; here the network of a run would take minutes.
    code = "import torch._dynamo as d; d.config.disable = True; from lars_train.cli import main; main()"
    other = [sys.executable, "-c", code, *small[len(ALONE) :], "run.name=other", "compile=true", "channels_last=false"]
    output = ran(other, tmp_path)
    assert "compile        on: a minute or two for each micro-batch size" in output
    assert "channels first, compiled" in output
    expected, got = losses(tmp_path / "runs/eager"), losses(tmp_path / "runs/other")
    assert [loss for _, loss in got] == pytest.approx([loss for _, loss in expected], rel=1e-3)


def test_the_embedded_data_set_trains_with_a_note(tmp_path: Path) -> None:
    output = ran([*ALONE, "max_updates=3", "epochs=1"], tmp_path)
    assert "embedded" in output.splitlines()[0]
    assert "data=imagenet data.root=" in output
    assert "= 255.8, rounded to a multiple of 32: 256" in output
    (folder,) = (tmp_path / "runs").iterdir()
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "final.json", "run.json", ".hydra", "tensorboard"} <= {
        path.name for path in folder.iterdir()
    }


def test_a_row_is_scaled_to_a_folder_only_on_request(tmp_path: Path) -> None:
    _, settings = broken_images(tmp_path)
    row = [*ALONE, *(s for s in settings if not s.startswith(("batch", "optimizer"))), "batch=8k", "run.name=r"]
    refused = start(row, tmp_path)
    assert refused.returncode == 2
    assert "batch=8k: a global batch of 8,192 is larger than the training set (24 images)" in refused.stderr
    assert "batch.scaled=true, which shrinks the batch in proportion to the data set (here to 8)" in refused.stderr
    ran([*row, "batch.scaled=true", "max_updates=1"], tmp_path)
    # A run that began with a scaled batch resumes with it, also without batch.scaled=true.
    ran([*row, "max_updates=2"], tmp_path)
    assert final(tmp_path / "runs" / "r")["updates"] == 2


def test_real_photographs_train_from_a_zip(tmp_path: Path) -> None:
    data = os.environ.get("LARS_TEST_DATA")
    if not data:
        pytest.skip("LARS_TEST_DATA is not set")
    # 60 training and 20 validation images per class.
    with ZipFile(Path(data) / "cifar10_jpeg.zip") as whole, ZipFile(tmp_path / "part.zip", "w") as part:
        taken: Counter[str] = Counter()
        for name in whole.namelist():
            folder = name.rpartition("/")[0]
            if name.endswith(".jpg") and taken[folder] < (60 if "train/" in name else 20):
                taken[folder] += 1
                part.writestr(name, whole.read(name))
    output = ran(
        [
            *ALONE,
            "data=folder",
            "data.root=part.zip",
            *"model=tiny data.image_size=32 data.augment=pad_crop data.eval_crop=1.0".split(),
            *"batch.size=128 optimizer=lars optimizer.lr=8 epochs=5 schedule.warmup_epochs=1 log_every=1".split(),
        ],
        tmp_path,
    )
    assert "600 training images" in output
    (run,) = (tmp_path / "runs").iterdir()
    assert metrics(run)[-1]["val/count"] == 200
    assert losses(run)[-1][1] < losses(run)[0][1]


def test_the_wheel_works_without_the_checkout(tmp_path: Path) -> None:
    import shutil

    checkout = Path(__file__).resolve().parents[2]
    copy, target, elsewhere = tmp_path / "copy", tmp_path / "site", tmp_path / "elsewhere"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "runs", "build", "*.egg-info", ".venv"))
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    # Without build isolation and dependencies, so that no network is needed. torch comes from this environment.
    build = ["wheel", str(copy), "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(tmp_path)]
    # The tag is that of a release's wheels (pyproject.toml, cibuildwheel).
    assert start([*pip, *build, "-C", "--build-option=--py-limited-api=cp310"], tmp_path).returncode == 0
    shutil.rmtree(copy)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    if find_spec("lars_train.data.decode.jpeg"):
        ran([sys.executable, str(checkout / "scripts" / "dev" / "check_wheel.py"), str(wheel)], tmp_path, fresh=True)
    assert (
        start([*pip, "install", "--no-deps", "--no-index", "-q", "-t", str(target), str(wheel)], tmp_path).returncode
        == 0
    )
    found = "import lars_train, lars_train.config as c; print(lars_train.__file__); print(c.config_dir())"
    where = ran([sys.executable, "-c", found], elsewhere, fresh=True, PYTHONPATH=str(target))
    assert all(line.startswith(str(target)) for line in where.splitlines())
    output = ran([*ALONE, "max_updates=2", "epochs=1"], elsewhere, fresh=True, PYTHONPATH=str(target))
    assert "embedded" in output


def test_a_torchrun_restart_resumes_despite_resume_never(tmp_path: Path) -> None:
    settings = [*TINY, "run.name=r"]
    ran([*ALONE, *settings, "max_updates=4"], tmp_path)
    output = ran([*ALONE, *settings, "resume=never"], tmp_path, TORCHELASTIC_RESTART_COUNT="1")
    assert "resumed        at update 4" in output
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["r"]
