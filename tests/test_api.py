"""`train`, `evaluate` and `plan` of a Python program do what the command line does, also with the program's objects."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from objects import CLASSES, OWN, VAL, Images, flat, sets
from tiny import ALONE, TINY, environment, final, ran, shell, start
from torch import nn

from lars_train import ConfigError, Stopped, evaluate, plan, train
from lars_train.models.weights import weights_sha256
from lars_train.signals import TERMINATION_SIGNALS
from lars_train.training import checkpoint

SMALL = [*OWN, "model=small"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMAGENET_DIR", raising=False)


def seeded(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return flat()


def broken() -> nn.Module:
    network = flat()
    with torch.no_grad():
        next(network.parameters()).fill_(torch.nan)
    return network


def weights(directory: str | Path) -> dict[str, torch.Tensor]:
    found = checkpoint.latest(Path(directory) / "checkpoints")
    assert found is not None
    model: dict[str, torch.Tensor] = found[1]["model"]
    return model


@pytest.mark.slow
def test_python_and_the_command_line_make_the_same_run(tmp_path: Path) -> None:
    settings = [*TINY, "device=cpu", "epochs=1", "schedule.warmup_epochs=0.5"]
    result = train(*settings)
    (tmp_path / "other").mkdir()
    ran([*ALONE, *settings], tmp_path / "other")
    (theirs,) = (tmp_path / "other" / "runs").iterdir()
    assert Path(result["directory"]) == Path("runs") / theirs.name
    assert result == final(tmp_path / result["directory"])
    assert result["weights_sha256"] == final(theirs)["weights_sha256"]
    for name in ("config.yaml", ".hydra/config.yaml", ".hydra/overrides.yaml"):
        assert (theirs / name).read_text() == (tmp_path / result["directory"] / name).read_text(), name
    # The command line finds the run of the program, and the program that of the command line.
    assert "This run has finished" in ran([*ALONE, *settings], tmp_path)
    assert evaluate(f"checkpoint.path={theirs}", "device=cpu")["val/top1"] == result["final_top1"]
    assert plan(*settings)["updates"] == result["updates"]


def test_a_module_holds_the_last_weights_also_of_a_finished_run(capsys: pytest.CaptureFixture[str]) -> None:
    network, data = seeded(), sets()
    result = train(*OWN, model=network, data=data)
    assert weights_sha256(network) == result["weights_sha256_float32"] != weights_sha256(seeded())
    assert [type(layer) for layer in network][:2] == [nn.Conv2d, nn.BatchNorm2d]
    assert (result["updates"], result["val_count"]) == (9, VAL)
    other = seeded(1)
    assert train(*OWN, model=other, data=data) == result
    assert "This run has finished" in capsys.readouterr().out
    assert weights_sha256(other) == weights_sha256(network)
    found = evaluate("data.image_size=8", "data.eval_crop=1", "precision=fp64", "device=cpu", model=network, data=data)
    assert found["val/top1"] == result["final_top1"]
    by_path = evaluate(f"checkpoint.path={result['directory']}", "device=cpu", model=flat, data=data)
    # The module has the weights in float32.
    assert found["val/loss"] == pytest.approx(by_path["val/loss"], rel=1e-5)
    assert by_path["val/top1"] == result["final_top1"]
    # Another network and other data are other runs.
    wider = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, CLASSES))
    assert train(*OWN, model=wider, data=data)["directory"] != result["directory"]
    assert plan(*OWN, model=network, data=data)["updates"] == 9


@pytest.mark.parametrize("make", [flat, lambda n: flat(n), lambda: flat(CLASSES), nn.Module])
def test_a_callable_gets_the_number_of_classes_if_it_takes_one(make: Callable[..., nn.Module]) -> None:
    if make is nn.Module:
        with pytest.raises(ConfigError):
            train(*OWN, model=make, data=sets())
        return
    assert train(*OWN, "max_updates=1", model=make, data=sets())["updates"] == 1


SCRIPT = """
import os, signal, sys
import torch
from lars_train import train
from objects import OWN, Images, VAL, flat, sets
torch.manual_seed(int(os.environ.get("RANK", "0")))
kill = {int(word): signal.SIGKILL for word in sys.argv[1:2]}
data = (Images(signals=kill), Images(VAL, 1))
model = flat()
result = train(*OWN, *sys.argv[2:], model=model, data=data)
print(result["weights_sha256"], model[5].bias.tolist())
"""


@pytest.mark.slow
def test_a_finished_run_without_its_last_checkpoint_is_refused() -> None:
    directory = train(*OWN, model=seeded(), data=sets())["directory"]
    shutil.rmtree(Path(directory) / "checkpoints")
    with pytest.raises(ConfigError, match="its last checkpoint, with the weights for the module, is missing"):
        train(*OWN, model=seeded(), data=sets())


def test_a_call_within_a_process_group_is_refused() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ConfigError, match="a process group, but a run opens its own; destroy it before the call"):
            plan(*SMALL, data=sets())
    finally:
        torch.distributed.destroy_process_group()


def test_a_killed_call_resumes_bit_for_bit(tmp_path: Path) -> None:
    # The reads that check the data happen in another process. The 120th sample is in the 8th update, in mid-epoch.
    killed = start([sys.executable, "-c", SCRIPT, "120"], tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert max(int(path.stem[-9:]) for path in (run / "checkpoints").glob("update-*.pt")) in range(2, 8)
    resumed = ran([sys.executable, "-c", SCRIPT, "10000"], tmp_path)
    (tmp_path / "other").mkdir()
    assert ran([sys.executable, "-c", SCRIPT, "10000"], tmp_path / "other").splitlines()[-1] == resumed.splitlines()[-1]
    assert ran([sys.executable, "-c", SCRIPT, "10000"], tmp_path).splitlines()[-1] == resumed.splitlines()[-1]


@pytest.mark.slow
def test_two_ranks_of_a_script_train_like_one(tmp_path: Path) -> None:
    ran([sys.executable, "-c", SCRIPT, "10000", "run.name=one"], tmp_path)
    # The ranks have different initial weights; those of rank 0 count.
    done = start_script_ranks(tmp_path, SCRIPT, "10000", "run.name=two")
    assert [rank.returncode for rank in done] == [0, 0], [rank.stderr for rank in done]
    assert done[0].stdout.splitlines()[-1] == done[1].stdout.splitlines()[-1]
    one, two = weights(tmp_path / "runs" / "one"), weights(tmp_path / "runs" / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_ranks_with_different_data_are_refused(tmp_path: Path) -> None:
    code = "import os; from lars_train import train; from objects import OWN, sets\n"
    code += "train(*OWN, 'model=small', 'run.name=x', data=sets(int(os.environ['RANK'])))"
    for rank in start_script_ranks(tmp_path, code):
        assert rank.returncode == 1
        assert "rank 1 has another data set than rank 0" in rank.stderr


def start_script_ranks(folder: Path, code: str, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """Run a script in two processes with torchrun's variables."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"} for rank in range(2)]
    envs = [environment(**meeting, **variables) for variables in own]
    return shell().run_together(["python", "-c", code, *arguments], folder, envs)


def test_ctrl_c_stops_with_a_checkpoint_and_the_call_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    # Update 4 of 9 reads samples 49 to 64. In a shell's background job, SIGINT is ignored.
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.default_int_handler)
    interrupted = Images(signals={50: signal.SIGINT}), Images(VAL, 1)
    with pytest.raises(Stopped, match=r"SIGINT: stopped after update 4, with a checkpoint"):
        train(*SMALL, "run.name=a", data=interrupted)
    resumed = train(*SMALL, "run.name=a", data=sets())
    assert resumed["weights_sha256"] == train(*SMALL, "run.name=b", data=sets())["weights_sha256"]


@pytest.mark.parametrize(
    ("settings", "arguments", "words"),
    [
        (["optimizer.lrr=1"], {}, "Did you mean 'optimizer.lr'?"),
        (["epochs=0"], {}, "epochs=0"),
        (["batch=33k"], {}, "its rows are 256, 8k"),
        (["batch=8k,16k"], {}, "batch=8k,16k: several values are a sweep. Call once for each of them."),
        (["epochs=1,2"], {}, "several values are a sweep: call once for each."),
        (["epochs"], {}, "epochs: a setting is key=value"),
        (["-m"], {}, "-m: this flag belongs to the command line"),
        ([["epochs=1"]], {}, "['epochs=1']: a setting is text"),
        (["mode=plan"], {}, "mode=plan: lars_train.train sets the mode itself"),
        (["data=mini"], {"data": sets()}, "data=mini: the argument data is set, too"),
        (["model=small"], {"model": flat}, "model=small: the argument model is set, too"),
        (["launch.nproc=2"], {"data": sets()}, "launch.nproc=2: the objects model and data exist in this process only"),
        ([], {"data": Images()}, "data: pass a pair, data=(train_set, val_set), not a Images"),
        ([], {"data": (Images(), [])}, "data: val (list) is empty"),
        ([], {"model": 3}, "model: pass a module"),
        ([], {"model": lambda: 3}, "the callable returned a int"),
        ([], {"model": nn.Sequential(nn.LazyLinear(4))}, "model: this module cannot be copied"),
        ([], {"model": nn.Linear(4, 4, device="meta")}, "model: the module is on the meta device"),
        ([], {"model": lambda: 1 / 0}, "model: the call of <lambda> fails in "),
        ([], {"model": broken(), "data": sets()}, "1 tensor with non-finite values: "),
        (
            [],
            {"data": ([(Images().images[0].transpose(1, 2, 0), 10**12)] * 8, Images(VAL))},
            "data: train[0] of list: the label is 1000000000000",
        ),
        ([], {"data": "no_such:sets"}, "data.target=no_such:sets: there is no module no_such"),
        (["data.holdout=0.1"], {"data": sets()}, "data.holdout=0.1 has no effect with data=custom"),
        (["data=custom"], {}, "data=custom needs data.target=package.module:function"),
        (
            [],
            {"data": "builtins:dict"},
            "data.target=builtins:dict: it returned a dict, not a training and a valid",
        ),
    ],
)
def test_bad_input_raises_one_clear_line(settings: Any, arguments: Any, words: str) -> None:
    own = [word for word in SMALL if not (arguments.get("model") and word.startswith("model="))]
    with pytest.raises(ConfigError) as caught:
        train(*own, *settings, **arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("runs").exists()


def test_a_program_that_uses_hydra_finds_its_state_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("mine: 1\n")
    monkeypatch.setattr(ConfigStore.instance(), "repo", dict(ConfigStore.instance().repo))
    ConfigStore.instance().store(name="schema", node={"theirs": 2})
    repo = ConfigStore.instance().repo["schema.yaml"]
    with hydra.initialize_config_dir(str(tmp_path / "conf"), version_base="1.2"):
        before = dict(Singleton._instances)
        train(*SMALL, "max_updates=1", data=sets())
        assert dict(Singleton._instances) == before
        assert GlobalHydra.instance().is_initialized()
        assert ConfigStore.instance().repo["schema.yaml"] is repo
        assert hydra.compose("config", ["mine=3"]).mine == 3
        assert HydraConfig not in Singleton._instances or before[HydraConfig] is HydraConfig.instance()


def test_a_run_leaves_the_process_as_it_was() -> None:
    torch.manual_seed(5)
    torch.use_deterministic_algorithms(True, warn_only=True)
    gc.set_threshold(12345, 11, 12)

    def state() -> list[Any]:
        return [
            torch.get_rng_state().tolist(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            gc.get_threshold(),
            [signal.getsignal(number) for number in TERMINATION_SIGNALS],
            dict(os.environ),
            list(sys.argv),
            Path.cwd(),
            threading.active_count(),
            threading.excepthook,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        ]

    try:
        with torch.inference_mode():
            before = state()
            train(*SMALL, "max_updates=1", "launch.threads=2", data=sets())
            assert state() == before
    finally:
        torch.use_deterministic_algorithms(False)
        gc.set_threshold(100_000)


def test_another_thread_can_train_but_not_two_at_once() -> None:
    results: list[Any] = []

    class Second(Images):
        def __getitem__(self, index: int) -> Any:
            if not results:
                results.append("")
                with pytest.raises(ConfigError, match="another run uses this process"):
                    plan(*SMALL)
            return super().__getitem__(index)

    thread = threading.Thread(
        target=lambda: results.append(train(*SMALL, "max_updates=1", data=(Second(), Images(VAL))))
    )
    thread.start()
    thread.join()
    assert results[1]["updates"] == 1


def test_objects_use_one_of_several_devices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lars_train.api.cuda_devices", lambda config: 3)
    train(*SMALL, "max_updates=1", data=sets())
    assert (
        "NOTE: this run uses one of 3 CUDA devices, because the objects model and data exist" in capsys.readouterr().out
    )


MODULE = """
print("imported")
from objects import Images, flat
def sets(count): return Images(count), Images(13, 1)
"""


@pytest.mark.slow
def test_each_rank_imports_the_named_functions(tmp_path: Path) -> None:
    (tmp_path / "my_code.py").write_text(MODULE)
    named = ["data=custom", "data.target=my_code:sets", "data.kwargs.count=48"]
    ran([*ALONE, *SMALL, *named, "launch.nproc=2", "run.name=two"], tmp_path)
    ran([*ALONE, *SMALL, *named, "run.name=one"], tmp_path)
    for name, value in weights(tmp_path / "runs" / "one").items():
        torch.testing.assert_close(weights(tmp_path / "runs" / "two")[name], value, rtol=1e-10, atol=1e-12)
    # A checkpoint's functions are imported only if the command line names them.
    for words, code in (([], 2), (named[1:2], 0)):
        done = start([*ALONE, "mode=evaluate", "checkpoint.path=runs/one", "device=cpu", *words], tmp_path)
        assert done.returncode == code, done.stderr
        assert ("imported" in done.stdout) == (code == 0)
    assert "data.target=my_code:sets comes from a file" in start([*ALONE, "--config-file", "runs/one"], tmp_path).stderr
    done = start([*ALONE, *SMALL, *named[:2], "data.kwargs.depth=1"], tmp_path)
    assert done.returncode == 2
    assert "data.target=my_code:sets: the call with (depth=1) fails: TypeError: " in done.stderr


def test_the_command_line_refuses_the_name_of_an_object(tmp_path: Path) -> None:
    result = train(*SMALL, "max_updates=1", data=sets())
    done = start([*ALONE, "mode=evaluate", f"checkpoint.path={result['directory']}", "device=cpu"], tmp_path)
    assert done.returncode == 2
    assert "names an object of a Python program. Call lars_train.train, evaluate or plan" in done.stderr
