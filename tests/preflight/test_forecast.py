"""A forecast agrees with torch's record of allocations, with hours computed by hand, and with real runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from copy import deepcopy
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from resolving import resolved
from tiny import environment
from torch.profiler import ProfilerActivity, profile

from lars_train import commands
from lars_train.config import Config, with_row
from lars_train.errors import ConfigError
from lars_train.launch import Ranks, check_nodes
from lars_train.models.factory import build_model
from lars_train.preflight import disk_volume
from lars_train.preflight.devices import DEVICES
from lars_train.preflight.forecast import describe_forecast
from lars_train.preflight.plan_figure import draw
from lars_train.preflight.rehearsal import text_plot
from lars_train.run_plan import Plan, checkpoint_is_due, evaluation_is_due, log_is_due
from lars_train.training import session
from lars_train.training.assemble import build_optimizer
from lars_train.training.device import activation_bytes
from lars_train.training.metrics import flops_per_image
from lars_train.training.prepare import prepare
from lars_train.training.run_directory import Invocation

ROOT = Path(__file__).parents[2]
SMALL = (
    "data=synthetic model=small data.image_size=16 data.num_classes=10 data.train_count=1024 data.val_count=64 "
    "batch.size=32 batch.scaled=false model.ghost_batch=16 optimizer.lr=1 precision=fp32 device=cpu launch.threads=1 "
    "epochs=2 schedule.warmup_epochs=0 log_every=1 verbosity=0"
)


def planned(settings: str) -> dict[str, Any]:
    return commands.run(resolved("mode=plan", *settings.split()), Invocation())


@pytest.mark.parametrize("samples", [16, 64])
def test_activations_match_the_allocator_after_a_forward_pass(samples: int) -> None:
    network = build_model("small", num_classes=10, ghost_batch=16, zero_gamma=False).train()
    images = torch.zeros(samples, 3, 32, 32)
    network(images)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        output = network(images)
    held = sum(event.self_cpu_memory_usage for event in recorded.events())
    del output
    # The images are kept for the backward pass too, and were allocated before.
    held += images.numel() * images.element_size()
    assert activation_bytes(network, samples, 32) == pytest.approx(held, rel=0.15)


@pytest.fixture(scope="module")
def disk_and_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Return a plan's disk usage, and the directory of the same run."""
    directory = tmp_path_factory.mktemp("planned") / "run"
    config = resolved(*f"{SMALL} micro_batch=16 checkpoint.every_updates=20 run.dir={directory}".split())
    threads = torch.get_num_threads()
    session.train(prepare(config), Ranks(), Invocation())
    torch.set_num_threads(threads)
    return planned(f"{SMALL} micro_batch=16 checkpoint.every_updates=20 plan.world=1")["forecast"]["disk"], directory


@pytest.mark.parametrize("name", ["metrics.jsonl", "trust_ratios.jsonl", "tensorboard"])
def test_logs_have_the_planned_size(disk_and_run: tuple[dict[str, Any], Path], name: str) -> None:
    disk, directory = disk_and_run
    path = directory / name
    files = path.iterdir() if path.is_dir() else [path]
    assert disk["log_bytes"][name] == pytest.approx(sum(file.stat().st_size for file in files), rel=0.2)


def test_checkpoints_have_the_planned_size(disk_and_run: tuple[dict[str, Any], Path]) -> None:
    disk, directory = disk_and_run
    # 64 updates: a checkpoint every 20 and at the end of each epoch of 32; the last three are kept.
    sizes = [path.stat().st_size for path in (directory / "checkpoints").glob("update-*.pt")]
    assert len(sizes) == 3
    assert disk["checkpoint_bytes"] == pytest.approx(sizes[-1], rel=0.2)
    assert disk["checkpoints_written_bytes"] == 5 * disk["checkpoint_bytes"]
    files = {path.stat().st_ino: path.stat().st_size for path in (directory / "checkpoints").glob("*.pt")}
    least, most = disk["checkpoints_kept_bytes"]
    assert 0.8 * least <= sum(files.values()) <= 1.2 * most


def test_memory_at_a_micro_batch_matches_the_allocator() -> None:
    config = resolved(*f"{SMALL} micro_batch=32".split())
    (memory,) = (
        m for m in planned(f"{SMALL} micro_batch=32")["forecast"]["memory_per_device"] if m["micro_batch"] == 32
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        network = build_model("small", num_classes=10, ghost_batch=16, zero_gamma=False).train()
        optimizer = build_optimizer(config.optimizer, network)
        images = torch.zeros(32, 3, 16, 16)
        for _ in range(2):
            optimizer.zero_grad(set_to_none=False)
            network(images).sum().backward()
            optimizer.step()
        output = network(images)
    held = sum(event.self_cpu_memory_usage for event in recorded.events())
    del output
    assert memory["bytes"] == pytest.approx(held, rel=0.15)


@pytest.mark.parametrize(
    ("rule", "copies"), [("ratio_of=gradient", 0), ("ratio_of=step", 1), ("ratio_placement=outside", 0)]
)
def test_a_copy_of_the_weights_in_the_step_is_planned(rule: str, copies: int) -> None:
    # With weight decay, SGD's own step needs a further tensor.
    settings = f"{SMALL} batch.size=8 model.ghost_batch=4 micro_batch=4 data.image_size=8 optimizer.{rule}"
    settings += " optimizer.weight_decay=0"
    found = planned(settings)["forecast"]
    network = build_model("small", num_classes=10, ghost_batch=4, zero_gamma=False)
    optimizer = build_optimizer(resolved(*settings.split()).optimizer, network)
    for update in range(2):
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=update == 1) as recorded:
            optimizer.step()
    kineto: Any = recorded.profiler
    events = sorted(kineto.kineto_results.events(), key=lambda event: event.start_ns())
    most = max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"), default=0)
    assert found["step_bytes"] == copies * found["weight_bytes"]
    assert found["step_bytes"] == pytest.approx(most, abs=0.02 * found["weight_bytes"])
    memory = found["memory_per_device"][0]
    # The activations of four small images take less than the weights.
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in network.buffers())
    held = 3 * found["weight_bytes"] + buffers
    assert memory["bytes"] == held + (found["weight_bytes"] if copies else memory["activation_bytes"])


@pytest.mark.slow
@pytest.mark.parametrize(("model", "size", "micro_batch"), [("small", 32, 128), ("resnet18", 128, 8)])
def test_a_cpu_process_takes_at_most_the_planned_memory(
    model: str, size: int, micro_batch: int, tmp_path: Path
) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc/self/status for the peak memory of a process")
    settings = (
        f"data=synthetic model={model} data.image_size={size} data.num_classes=1000 model.ghost_batch=8 "
        f"data.train_count={4 * micro_batch} data.val_count={micro_batch} micro_batch={micro_batch} "
        f"batch.size={2 * micro_batch} batch.scaled=false optimizer.lr=1 precision=fp32 device=cpu launch.threads=1 "
        "epochs=1 schedule.warmup_epochs=0 max_updates=2 log_every=1 verbosity=0"
    )
    memory = planned(f"{settings} plan.world=1")["forecast"]["memory_per_device"]
    (process,) = (m["process_bytes"] for m in memory if m["micro_batch"] == micro_batch)
    # Not getrusage, whose peak includes that of the parent process.
    program = (
        "from lars_train.cli import main\n"
        "try: main()\n"
        "finally: print('most', *(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *settings.split(), "launch.nproc=1", f"run.dir={tmp_path}"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    most = 1024 * int(done.stdout.split("most ")[1])
    assert most <= process <= 1.5 * most  # torch built for CPUs only takes less than torch for CUDA


def test_memory_of_a_process_is_printed_for_cpus_only() -> None:
    def forecast_of(settings: str) -> tuple[bool, str]:
        found = planned(f"{SMALL} plan.world=1 {settings}")["forecast"]
        return "process_bytes" in found["memory_per_device"][0], "\n".join(describe_forecast(found))

    for settings in ("", "plan.device=cpu", "device=auto plan.device=cpu"):
        has_process, words = forecast_of(settings)
        assert has_process
        assert re.search(r"micro-batch  accumulation  per device  per process\n +16 +2 +[\d.]+ MB +\d{3} MB\n", words)
        assert "request this from Slurm per rank" in words
    has_process, words = forecast_of("device=auto plan.device=a100")
    assert not has_process
    assert "process" not in words


def test_each_row_has_the_hours_computed_by_hand() -> None:
    found = planned("data=imagenet precision=bf16 plan.images_per_second=1000 plan.world=1")["forecast"]
    per_epoch = {"256": 5004, "8k": 156, "16k": 78, "32k": 39}
    assert [row["row"] for row in found["rows"]] == list(per_epoch)
    for row in found["rows"]:
        size = row["global_batch"]
        seconds = 90 * (per_epoch[row["row"]] * size / 1000 + 50_000 / 3000)
        assert row["expected"]["hours"] == pytest.approx(seconds / 3600)
        assert (row["expected"]["limit"], row["most_devices"]) == ("compute", size // 32)
    assert found["expected"]["hours"] == found["rows"][-1]["expected"]["hours"]
    found["rows"][0]["most_devices"] = 1
    words = "\n".join(describe_forecast(found))
    assert "256             1* 32 h 27 min" in words
    assert "* one device per ghost batch" in words
    # 115.2 million images and 90 evaluations: 32.4 hours.
    for part in (
        "time           32 h 22 min, at 100 % scaling efficiency",
        "32k             1  32 h 22 min  compute",
        "5 d 10 h",
    ):
        assert part in words


def test_an_average_and_flips_are_in_the_plan() -> None:
    settings = f"{SMALL} micro_batch=16 plan.world=1 plan.images_per_second=1000"
    plain, more = (planned(f"{settings} {own}")["forecast"] for own in ("", "model.ema=0.9 evaluate.flip=true"))
    network = build_model("small", num_classes=10, ghost_batch=16, zero_gamma=False)
    size = sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
    assert more["memory_per_device"][0]["bytes"] - plain["memory_per_device"][0]["bytes"] == size
    saved = sum(t.nbytes + 300 for t in network.state_dict().values())
    assert more["disk"]["checkpoint_bytes"] - plain["disk"]["checkpoint_bytes"] == saved
    # Two evaluations of 64 images, with four forward passes instead of one.
    seconds = 3600 * (more["expected"]["hours"] - plain["expected"]["hours"])
    assert seconds == pytest.approx(2 * 3 * 64 / 3000)


def test_without_a_rate_every_cited_device_has_hours() -> None:
    found = planned("data=imagenet plan.world=8")["forecast"]
    assert [entry["device"] for entry in found["by_device"]] == list(DEVICES)
    for entry in found["by_device"]:
        alone = planned(f"data=imagenet plan.world=8 plan.device={entry['device']}")["forecast"]
        assert entry == {"device": entry["device"], **alone["expected"]}
        assert "by_device" not in alone
    words = "\n".join(describe_forecast(found))
    assert re.search(r"time +on 8 devices; .*\n +a100 +1 h \d+ min  limited by compute\n +h100 .*\n +h200 ", words)
    assert "rows           batch       disk\n" in words
    found = planned("data=imagenet plan.world=8 precision=bf16")["forecast"]
    assert [entry["device"] for entry in found["by_device"]] == ["a100", "h100", "h200"]
    assert "time           unknown: no device" in "\n".join(
        describe_forecast(planned("data=imagenet precision=fp64 plan.world=8")["forecast"])
    )


def test_many_devices_are_less_efficient_than_one() -> None:
    def efficiency(device: str, world: int) -> float:
        found = planned(f"data=imagenet batch=32k plan.device={device} plan.world={world}")["forecast"]["expected"]
        return float(found["efficiency"])

    assert 0.95 < efficiency("h100", 8) < 1
    # With 64 images each, the host launches more slowly than the device computes.
    assert efficiency("h100", 512) < 0.5
    assert efficiency("a100", 1024) < efficiency("a100", 512) < 0.95


def test_another_row_keeps_the_users_settings() -> None:
    moved = with_row(resolved(*"batch=32k data=imagenet epochs=10 schedule.scale_warmup=true".split()), "256")
    assert (moved.epochs, moved.optimizer.name, moved.schedule.warmup_epochs) == (10, "sgd", 0)
    assert (moved.batch.nominal, moved.model.ghost_batch) == (256, 32)


RESIZING = f"{SMALL} data.image_size=96 data.size_schedule=[32,64,0,2] epochs=3 plan.world=1 micro_batch=16"


def test_hours_follow_all_sizes_and_memory_the_largest() -> None:
    network = build_model("small", num_classes=10, ghost_batch=16, zero_gamma=False)
    cost = {size: flops_per_image(network, size) for size in (32, 64, 96)}
    # Epoch 1 is at 48 pixels, which is rounded to 64.
    sizes = [32, 64, 64]
    found = planned(f"{RESIZING} plan.images_per_second=100")
    assert [epoch["train_size"] for epoch in found["lr_per_epoch"]] == sizes
    # 1,024 images an epoch, at 100 images/s in the first; an evaluation takes a third of a training step.
    training = sum(1024 / 100 * cost[size] / cost[32] for size in sizes)
    evaluation = 3 * 64 / 100 * cost[96] / cost[32] / 3
    assert 3600 * found["forecast"]["expected"]["hours"] == pytest.approx(training + evaluation)
    mean = sum(cost[size] for size in sizes) / 3
    on_h100 = planned(f"{RESIZING} plan.device=h100 precision=fp16")["forecast"]["rate"]["images_per_second"]
    at_64 = planned(f"{SMALL} data.image_size=64 plan.world=1 plan.device=h100 precision=fp16")
    assert on_h100 == pytest.approx(at_64["forecast"]["rate"]["images_per_second"] * cost[64] / mean)
    memory, most = (
        planned(f"{settings} plan.images_per_second=1")["forecast"]["memory_per_device"]
        for settings in (RESIZING, f"{SMALL} data.image_size=64 epochs=3 plan.world=1 micro_batch=16")
    )
    assert memory == most


def test_a_wrong_number_of_nodes_is_refused() -> None:
    config = resolved(*f"{SMALL} launch.nodes=2".split())
    check_nodes(config, Ranks(3, 8, 3, 4))
    check_nodes(resolved(*SMALL.split()), Ranks(0, 12, 0, 4))
    for ranks in (None, Ranks(0, 12, 0, 4)):
        with pytest.raises(ConfigError, match=r"launch\.nodes=2"):
            check_nodes(config, ranks)


def test_a_plan_is_for_nodes_times_processes() -> None:
    assert planned(f"{SMALL} batch.size=128 launch.nodes=2 launch.nproc=4")["world"] == 8


def test_a_missing_imagenet_names_the_plan_without_images() -> None:
    with pytest.raises(ConfigError, match=r"/nowhere cannot be opened .* omit data\.root"):
        planned("data=imagenet data.root=/nowhere batch=32k")


def test_too_few_embedded_images_name_the_plan_for_imagenet() -> None:
    with pytest.raises(ConfigError, match=r"Start at most \d+ in total .* data=imagenet plans for ImageNet"):
        planned("batch=32k launch.nodes=4 launch.nproc=8")
    assert planned("batch=32k launch.nodes=4 launch.nproc=8 data=imagenet model=small")["world"] == 32


def test_memory_and_rate_have_the_same_precision() -> None:
    whole, half = (planned(f"{SMALL} precision={name}")["forecast"] for name in ("fp32", "bf16"))
    with pytest.raises(ConfigError, match=r"plan\.device=v100: there is no cited figure for precision=bf16"):
        planned(f"{SMALL} precision=bf16 plan.device=v100")
    assert planned(f"{SMALL} precision=auto plan.device=v100")["forecast"]["precision"] == "fp16"
    for device, expected in (("h100", half), ("cpu", whole)):
        found = planned(f"{SMALL} precision=auto plan.device={device}")["forecast"]
        actual, planned_bytes = ([m["bytes"] for m in one["memory_per_device"]] for one in (found, expected))
        assert actual == planned_bytes
        assert found["precision"] == expected["precision"]


@given(st.integers(1, 500), st.integers(1, 40), st.integers(1, 5), st.none() | st.integers(1, 60), st.integers(1, 60))
def test_counts_in_closed_form_match_counting_each_update(
    stop: int, per_epoch: int, every_epochs: int, every_updates: int | None, log_every: int
) -> None:
    config = Config(log_every=log_every)
    config.evaluate.every_epochs, config.checkpoint.every_updates = every_epochs, every_updates
    plan = Plan(640, 64, 64, 8, False, False, 1, per_epoch, stop, stop, 0)
    updates = range(1, stop + 1)
    evaluated = {u for u in updates if evaluation_is_due(config, plan, u)}
    assert disk_volume.evaluations(config, plan) == len(evaluated)
    assert disk_volume.log_lines(config, plan) == sum(log_is_due(config, plan, u) for u in updates)
    saved = evaluated | {u for u in updates if checkpoint_is_due(config, plan, u)}
    assert disk_volume.checkpoints(config, plan) == len(saved)


def test_a_text_plot_shows_every_point() -> None:
    lines = list(text_plot([(0, 0.0), (1, 4.0), (2, 8.0), (3, 0.0)], ("first", "last")))
    curve = [line.partition("|")[2] for line in lines if "|" in line]
    assert [line.partition("|")[0].strip() for line in lines if "|" in line and line[7] != " "] == ["8", "3.43", "0"]
    assert (curve[0], curve[-1]) == (" " * 39 + "*", "*" + " " * 58 + "*")
    assert sum(line.count("*") for line in curve) == 4
    assert lines[-1].split() == ["first", "last"]


def test_every_field_of_the_json_is_documented(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    planned(f"{SMALL} plan.images_per_second=100 plan.decode_rate=100 plan.path={path}")
    page = (ROOT / "docs" / "plan.md").read_text()
    files = {"metrics.jsonl", "trust_ratios.jsonl", "tensorboard"}

    def undocumented(values: Any) -> set[str]:
        if isinstance(values, list):
            return set().union(*map(undocumented, values))
        if not isinstance(values, dict):
            return set()
        return {k for k in values if k not in files and f"`{k}`" not in page}.union(*map(undocumented, values.values()))

    assert undocumented(json.loads(path.read_text())) == set()


def test_the_figure_is_a_png(tmp_path: Path) -> None:
    part = {"compute": 1.0, "input": 0.0, "reduction": 0.5, "seconds": 1.0}
    points = [
        {"devices": n, "hours": 8 / n, "efficiency": 1.0, "limit": limit, **part}
        for n, limit in ((1, "compute"), (2, "network"), (4, "input"))
    ]
    rows = [{"row": "32k", "scaling": points}, {"row": "64k", "problem": "larger than the set"}]
    found = {"scaling": points, "expected": deepcopy(points[0]), "rows": rows}
    draw(found, [[1, 0.1], [9, 1.0]], tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("row", ["256", "8k"])
def test_the_imagenet_page_has_the_planned_memory_and_disk(row: str) -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    found = planned(f"batch={row} data=synthetic batch.scaled=false plan.world=8")
    lines, disk = found["log_lines"], found["forecast"]["disk"]
    cells = next(line for line in page.splitlines() if re.match(rf"\| {row} \| {lines:,} \|", line)).split(" | ")
    kilobytes, logs, kept = (float(cell.split()[0].strip("|")) for cell in cells[2:5])
    assert kilobytes == pytest.approx(sum(disk["log_line_bytes"].values()) / 1e3, rel=0.01)
    assert logs == pytest.approx(sum(disk["log_bytes"].values()) / 1e6, rel=0.01)
    assert kept * (1e9 if "GB" in cells[4] else 1e6) == pytest.approx(disk["bytes"], rel=0.01)
    for memory in found["forecast"]["memory_per_device"]:
        if memory["micro_batch"] in (32, 256):
            each = memory["activation_bytes"] / memory["micro_batch"] / 1e6
            cell = f"{memory['micro_batch']} \u00d7 {each:.1f} MB + 307 MB = {memory['bytes'] / 1e9:.2f} GB"
            assert cell in page.replace("\n", " ")
