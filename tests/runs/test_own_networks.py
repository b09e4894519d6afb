"""Networks of timm and of the user train from the command line, resume bit for bit, evaluate, export and plan.

A stored network's code runs only if the command line names it.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ALONE, begin, composed, final, losses, metrics, ran, start, start_ranks

import lars_train
from lars_train import commands
from lars_train.config import resolve
from lars_train.errors import ConfigError
from lars_train.training import checkpoint
from lars_train.training.run_directory import Invocation

pytestmark = pytest.mark.slow

# resnet10t with few channels.
TIMM = "model=timm model.name=resnet10t model.kwargs.channels=[8,8,8,8] model.kwargs.stem_width=8".split()
DROP = "model.kwargs.drop_rate=0.2 model.kwargs.drop_path_rate=0.2".split()
SHORT = (
    "batch.size=32 model.ghost_batch=8 optimizer.lr=2 max_updates=6 log_every=1 precision=fp32 launch.threads=1 "
    "schedule.warmup_epochs=0.01 device=cpu"
).split()
SYNTHETIC = (
    "data=synthetic data.train_count=70 data.val_count=21 data.num_classes=4 data.image_size=16 data.augment=pad_crop "
    "data.workers=0"
).split()
CUSTOM = """from torch import nn


def make(num_classes, width=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(width, num_classes),
    )
"""


def saved(run: Path) -> int:
    """Return the update of the run's newest checkpoint, 0 without one."""
    return max((int(path.stem.partition("-")[2]) for path in (run / "checkpoints").glob("update-*.pt")), default=0)


def run(*settings: str) -> dict[str, Any]:
    """Run a command line in this process."""
    threads = torch.get_num_threads()
    try:
        return commands.run(resolve(composed(*settings)), Invocation(overrides=settings))
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a network of timm with dropout and stochastic depth on the embedded images; return the run directory."""
    folder = tmp_path_factory.mktemp("timm")
    assert run(*TIMM, *DROP, *SHORT, f"run.dir={folder / 'run'}")["model"] == "timm/resnet10t"
    return folder / "run"


def test_a_killed_run_with_dropout_resumes_bit_for_bit(trained: Path, tmp_path: Path) -> None:
    command = [*ALONE, *TIMM, *DROP, *SHORT, "run.name=killed", "checkpoint.every_updates=1"]
    program, directory = begin(command, tmp_path), tmp_path / "runs/killed"
    while saved(directory) < 2:
        assert program.poll() is None, program.communicate()
        time.sleep(0.005)
    program.kill()
    program.wait()
    assert saved(directory) < 6
    output = ran(command, tmp_path)
    assert "resumed        at update" in output
    assert "NOTE: the network draws random numbers in training" in output
    assert final(directory)["weights_sha256"] == final(trained)["weights_sha256"]
    assert losses(directory) == losses(trained)


def test_a_run_of_timm_is_evaluated_and_exported(trained: Path, tmp_path: Path) -> None:
    found = run("mode=evaluate", f"checkpoint.path={trained}", "device=cpu", "launch.threads=1")
    assert found["val/top1"] == final(trained)["final_top1"]
    run("mode=export", f"checkpoint.path={trained}", f"export.path={tmp_path / 'net.pth'}")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "MODEL.md").read_text(), re.DOTALL)
    assert "timm.create_model('resnet10t', num_classes=10, channels=[8, 8, 8, 8]" in code
    scope: dict[str, Any] = {}
    exec(code.replace("'net.pth'", repr(str(tmp_path / "net.pth"))), scope)
    assert not any("Ghost" in type(layer).__name__ for layer in scope["model"].modules())
    stored = checkpoint.find(str(trained))[1]["model"]
    assert all(torch.equal(value, stored[key]) for key, value in scope["model"].state_dict().items())
    own = [f"model.weights={tmp_path / 'net.pth'}", "data=mini", "precision=fp32", "device=cpu", "launch.threads=1"]
    again = run("mode=evaluate", *TIMM, *own)
    assert again["val/top1"] == final(trained)["final_top1"]


def test_the_plan_counts_a_timm_network(tmp_path: Path) -> None:
    frozen = ["model.freeze=[layer1.*]", *SHORT]
    whole, part = (run("mode=plan", *TIMM, *settings)["forecast"] for settings in (SHORT, frozen))
    import timm

    network = timm.create_model("resnet10t", num_classes=10, channels=[8, 8, 8, 8], stem_width=8)
    assert whole["weight_bytes"] == part["weight_bytes"] == 4 * sum(p.numel() for p in network.parameters())
    saved = 4 * sum(p.numel() for p in network.layer1.parameters())
    assert part["gradient_bytes"] == part["optimizer_bytes"] == whole["gradient_bytes"] - saved


def test_clipped_timm_runs_agree_on_1_2_and_3_ranks(tmp_path: Path) -> None:
    own = ["precision=fp64", "optimizer.clip_grad_norm=0.5", "batch.size=28", "model.ghost_batch=4"]
    same = [*TIMM, *SYNTHETIC, *SHORT, *own]
    run(*same, f"run.dir={tmp_path / 'world1'}")
    expected = metrics(tmp_path / "world1")
    assert any(line["train/grad_norm"] > 0.5 for line in expected if "train/grad_norm" in line)
    for world in (2, 3):
        done = start_ranks([*same, f"run.dir=world{world}"], tmp_path, world)
        assert [rank.returncode for rank in done] == [0] * world, [rank.stderr for rank in done]
        for one, other in zip(expected, metrics(tmp_path / f"world{world}"), strict=True):
            for key in ("train/loss", "train/grad_norm", "train/weight_norm", "val/loss"):
                assert one.get(key, 0.0) == pytest.approx(other.get(key, 0.0), rel=1e-10), (world, key)


def test_a_custom_network_trains_on_two_ranks(tmp_path: Path) -> None:
    (tmp_path / "own_networks.py").write_text(CUSTOM)
    settings = [*SYNTHETIC, *SHORT, "batch.size=16", "model=custom", "model.target=own_networks:make"]
    ran([*ALONE, *settings, "launch.nproc=2", "run.name=two", "model.kwargs.width=6"], tmp_path)
    directory = tmp_path / "runs/two"
    assert final(directory)["model"] == "own_networks:make"
    # The command line must name the code again.
    again = [*ALONE, "mode=evaluate", f"checkpoint.path={directory}", "device=cpu"]
    refused = start(again, tmp_path)
    assert refused.returncode == 2
    assert "model.target=own_networks:make comes from a file. Its code runs only if" in refused.stderr
    output = ran([*again, "model=custom", "model.target=own_networks:make"], tmp_path)
    assert f"own_networks:make on synthetic: top-1 {final(directory)['final_top1']:.2f} %" in output
    ran([*ALONE, "mode=export", f"checkpoint.path={directory}", "model.target=own_networks:make"], tmp_path)
    (card,) = directory.glob("checkpoints/MODEL.md")
    assert "from own_networks import make\n\nmodel = make(num_classes=4, width=6)" in card.read_text()


EVIL = "import pathlib\npathlib.Path('ran').touch()\n" + CUSTOM


def test_a_target_in_a_strangers_file_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil_networks.py").write_text(CUSTOM)
    settings = [*SYNTHETIC, *SHORT, "batch.size=16"]
    named = ["model=custom", "model.target=evil_networks:make"]
    run(*settings, *named, "run.dir=run")
    (tmp_path / "evil_networks.py").write_text(EVIL)
    monkeypatch.delitem(sys.modules, "evil_networks")
    path = "checkpoint.path=run"
    for command in (
        ["mode=evaluate", path],
        ["mode=evaluate", path, "model.kwargs.width=4"],
        ["mode=export", path],
        ["mode=train", path, *settings, "model=tiny", "run.dir=other"],
        ["mode=plan", path, *settings, "model=tiny"],
    ):
        with pytest.raises(ConfigError, match=r"names it: add model\.target=evil_networks:make|choose model=custom"):
            run(*command)
    for file, mode in (("run", "train"), ("run", "plan"), ("run/config.yaml", "evaluate"), ("run", "export")):
        done = start([*ALONE, "--config-file", file, f"mode={mode}", path], tmp_path)
        assert done.returncode == 2, done.stdout
        assert "names it: add model.target=evil_networks:make" in done.stderr
    assert not (tmp_path / "ran").exists()
    # If the command line names the target, the file runs: so it would have done harm.
    run("mode=evaluate", path, "model.target=evil_networks:make", "device=cpu")
    assert (tmp_path / "ran").exists()


def test_a_module_trains_and_evaluates_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(CUSTOM, scope)
    network, settings = scope["make"](num_classes=4), [*SYNTHETIC, *SHORT, "batch.size=16"]
    result = lars_train.train(*settings, "run.dir=run", model=network)
    assert not any("Ghost" in type(layer).__name__ for layer in network.modules())
    found = lars_train.evaluate(*SYNTHETIC, "precision=fp32", "device=cpu", "launch.threads=1", model=network)
    assert found["val/top1"] == result["final_top1"]
    stored = lars_train.evaluate("checkpoint.path=run", "device=cpu", "launch.threads=1", model=network)
    assert stored["val/loss"] == found["val/loss"]


def test_the_example_of_fine_tuning_runs(tmp_path: Path) -> None:
    source = (Path(__file__).parents[2] / "examples" / "finetune.py").read_text()
    output = ran([sys.executable, "-c", source], tmp_path)
    assert re.search(r"10 classes: top-1 \d+ %\n(.*\n)* 4 classes: top-1 \d+ %\n", output), output


def test_fine_tuning_trains_the_rest_of_the_network(trained: Path, tmp_path: Path) -> None:
    weights = tmp_path / "net.pth"
    run("mode=export", f"checkpoint.path={trained}", f"export.path={weights}")
    start_from = torch.load(weights, weights_only=True)
    tuned = ["model.new_head=true", "model.head_lr=10", "model.freeze=[conv1.*,bn1.*,layer1.*]"]
    run(*TIMM, *SYNTHETIC, *SHORT, f"model.weights={weights}", *tuned, "batch.size=16", f"run.dir={tmp_path / 'run'}")
    state = checkpoint.find(str(tmp_path / "run"))[1]["model"]
    assert state["fc.weight"].shape[0] == 4
    frozen = ("conv1.", "bn1.", "layer1.")
    same = {key for key, value in state.items() if not key.startswith("fc.") and torch.equal(value, start_from[key])}
    assert same == {key for key in state if key.startswith(frozen)}
    names = json.loads((tmp_path / "run" / "trust_ratios.fields.json").read_text())["layers"]
    assert not any(name.startswith(frozen) for name in names)
