"""Frameworks drive LARS and its schedulers as a plain loop does, also from a checkpoint. The examples run.

Each test skips without its framework: scripts/dev/test_with.sh integrations installs all of them.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lars_train import LARS, WarmupCosine, parameter_groups

ROOT = Path(__file__).parents[2]
BATCH, BATCHES, EPOCHS = 4, 5, 3
UPDATES = BATCHES * EPOCHS
STOP = 2 * BATCHES  # the update, at the end of an epoch, where a run is interrupted


class Samples(Dataset[dict[str, Tensor]]):
    """Random images with labels, always in this order."""

    def __init__(self) -> None:
        drawn = torch.Generator().manual_seed(1)
        self.images = torch.randn(BATCH * BATCHES, 6, generator=drawn)
        self.labels = torch.randint(3, (BATCH * BATCHES,), generator=drawn)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"images": self.images[index], "labels": self.labels[index]}


class Net(nn.Module):
    """A network that returns its loss, as in Hugging Face's Trainer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.layers(images), labels)}


def loader() -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Samples(), BATCH)


def optimizers(model: nn.Module, updates: int = UPDATES, base: str = "SGD") -> tuple[LARS, WarmupCosine]:
    groups = parameter_groups(model, weight_decay=0.01, lr=2.0, norm_bias_lr_factor=0.1)
    optimizer = LARS(getattr(torch.optim, base)(groups), trust_coef=0.1)
    if base == "SGD":
        for group in optimizer.param_groups:
            group["momentum"] = 0.9
    return optimizer, WarmupCosine(optimizer, warmup=2, total=updates)


def plain_loop(accumulate: int = 1, base: str = "SGD") -> list[Tensor]:
    """Return the weights of a plain loop, which averages the losses of `accumulate` batches."""
    model = Net()
    optimizer, scheduler = optimizers(model, UPDATES // accumulate, base)
    start = [p.detach().clone() for p in model.parameters()]
    for epoch in range(EPOCHS):
        for number, batch in enumerate(loader(), epoch * BATCHES + 1):
            (model(**batch)["loss"] / accumulate).backward()
            if number % accumulate == 0:
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    found = [p.detach() for p in model.parameters()]
    assert not any(torch.allclose(one, other, rtol=0.01) for one, other in zip(found, start, strict=True))
    return found


def assert_equal(model: nn.Module, expected: Iterable[Tensor]) -> None:
    for weight, other in zip(model.parameters(), expected, strict=True):
        assert torch.equal(weight, other)


@pytest.fixture
def accelerate() -> Iterator[Any]:
    module = pytest.importorskip("accelerate")
    yield module
    # The settings of the first Accelerator hold for all of a process.
    module.state.AcceleratorState._reset_state(reset_partial_state=True)
    module.state.GradientState._reset_state()


def accelerated_epochs(accelerator: Any, model: Any, optimizer: Any, scheduler: Any, batches: Any, epochs: int) -> None:
    for _ in range(epochs):
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_accelerate_trains_like_a_plain_loop(accelerate: Any, base: str) -> None:
    accelerator, net = accelerate.Accelerator(cpu=True), Net()
    prepared = accelerator.prepare(net, *optimizers(net, base=base), loader())
    accelerated_epochs(accelerator, *prepared, EPOCHS)
    assert_equal(net, plain_loop(base=base))


@pytest.mark.parametrize("accumulate", [1, 5])
def test_accelerate_resumes_and_accumulates(accelerate: Any, accumulate: int, tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    net = Net()
    prepared = accelerator.prepare(net, *optimizers(net, UPDATES // accumulate), loader())
    accelerated_epochs(accelerator, *prepared, STOP // BATCHES)
    accelerator.save_state(str(tmp_path))
    accelerator.free_memory()
    net = Net()
    prepared = accelerator.prepare(net, *optimizers(net, UPDATES // accumulate), loader())
    accelerator.load_state(str(tmp_path))
    accelerated_epochs(accelerator, *prepared, EPOCHS - STOP // BATCHES)
    assert_equal(net, plain_loop(accumulate))


def lightning_module(manual: bool = False, updates: int = UPDATES) -> Any:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.automatic_optimization = not manual

        def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
            loss: Tensor = self.net(**batch)["loss"]
            if manual:
                self.manual_backward(loss)
                self.optimizers().step()
                self.lr_schedulers().step()
                self.optimizers().zero_grad()
            return loss

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer, scheduler = optimizers(self.net, updates)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return Module()


def lightning_fit(module: Any, epochs: int, folder: Path, ckpt_path: Path | None = None, **settings: Any) -> Any:
    import lightning

    shown = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, default_root_dir=folder, **shown, **settings
    )
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_lightning_trains_like_a_plain_loop(manual: bool, tmp_path: Path) -> None:
    module = lightning_module(manual)
    lightning_fit(module, EPOCHS, tmp_path)
    assert_equal(module.net, plain_loop())


@pytest.mark.parametrize("accumulate", [1, 5])
def test_lightning_resumes_and_accumulates(accumulate: int, tmp_path: Path) -> None:
    module = lightning_module(updates=UPDATES // accumulate)
    trainer = lightning_fit(module, STOP // BATCHES, tmp_path, accumulate_grad_batches=accumulate)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    module = lightning_module(updates=UPDATES // accumulate)
    lightning_fit(module, EPOCHS, tmp_path, tmp_path / "part.ckpt", accumulate_grad_batches=accumulate)
    assert_equal(module.net, plain_loop(accumulate))


@pytest.fixture
def hugging_face(tmp_path: Path, accelerate: Any) -> Callable[..., Any]:
    transformers = pytest.importorskip("transformers")

    def trainer(net: nn.Module, accumulate: int) -> Any:
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=accumulate,
            train_sampling_strategy="sequential",
            max_grad_norm=0,
            save_steps=STOP // accumulate,
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to="none",
            use_cpu=True,
        )
        both = optimizers(net, UPDATES // accumulate)
        return transformers.Trainer(net, arguments, train_dataset=Samples(), optimizers=both)

    return trainer


@pytest.mark.parametrize("accumulate", [1, 5])
def test_hugging_face_trains_and_resumes(hugging_face: Any, accumulate: int, tmp_path: Path) -> None:
    expected = plain_loop(accumulate)
    whole, resumed = Net(), Net()
    hugging_face(whole, accumulate).train()
    assert_equal(whole, expected)
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.zero_()
    hugging_face(resumed, accumulate).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP // accumulate}"))
    assert_equal(resumed, expected)


def test_a_state_dict_of_lightlys_lars_continues_its_updates() -> None:
    kind = pytest.importorskip("lightly.utils.lars").LARS

    def train(optimizer: Any, weight: Tensor, updates: range) -> None:
        for update in updates:
            weight.grad = 0.3 * weight.detach() + 0.1 * (update + 1)
            optimizer.step()

    theirs, ours = (nn.Parameter(torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(4, 3)) for _ in range(2))
    lightly = kind([theirs], lr=0.5, momentum=0.9, weight_decay=0.1, trust_coefficient=0.02)
    train(lightly, theirs, range(3))
    ours.data.copy_(theirs.data)
    lars = LARS.preset("bolts", torch.optim.SGD([ours], lr=0.1), trust_coef=0.02)
    lars.load_state_dict(copy.deepcopy(lightly.state_dict()))
    train(lightly, theirs, range(3, 6))
    train(lars, ours, range(3, 6))
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)


# The packages that an example needs, and its output's number of losses.
EXAMPLES = {
    "fsdp": ((), 3),
    "hf_trainer": (("transformers", "accelerate"), 4),
    "lightning_module": (("lightning",), 1),
    "plain_loop": ((), 4),
    "simclr_lightly": (("lightly",), 3),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_by_its_command(name: str, tmp_path: Path) -> None:
    packages, losses = EXAMPLES[name]
    try:
        version("torch-lars")  # other tests import it from packaging/, which the example's process does not see
    except PackageNotFoundError:
        pytest.skip("torch-lars is not installed")
    for package in packages:
        pytest.importorskip(package)
    path = ROOT / "examples" / f"{name}.py"
    words = path.read_text().splitlines()[2].split()
    program = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[words[0]]
    done = subprocess.run(
        [sys.executable, *program, *words[1:-1], str(path)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [float(value) for value in re.findall(r"\bloss'?:? '?([\d.]+)", done.stdout)]
    assert len(found) >= losses
    assert found[-1] < found[0] or losses == 1
    assert list(tmp_path.iterdir()) == []


def test_every_example_has_a_test() -> None:
    # test_examples.py and runs/test_own_networks.py run those of lars-train.
    found = [path.stem for path in (ROOT / "examples").glob("*.py") if "torch_lars" in path.read_text()]
    assert sorted(EXAMPLES) == sorted(found)
