"""The command line explains bad arguments, reports a sweep's failures, and prints ``--help`` without torch.

The tests of each command are beside those of its modules; runs/test_launch_forms.py tests every way to start a run.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tiny import TINY, composed, environment, prepared

from lars_train import cli, commands
from lars_train.cli import main
from lars_train.config import OptimizerConfig
from lars_train.config.compose import explain
from lars_train.errors import ConfigError, DataError, Stopped
from lars_train.training import run_directory


def test_rank_0_reports_and_fails_for_a_sweep(
    in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # If another rank failed first, the launcher would end rank 0, perhaps in the middle of a job that works.
    for rank, code in (("0", 2), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert run_main(monkeypatch, "-m", "epochs=0,-1") == code
        assert ("job failed" in capsys.readouterr().err) == (rank == "0")


def explanation_of(*arguments: str) -> str:
    with pytest.raises((HydraException, OmegaConfBaseException)) as caught:
        composed(*arguments)
    return explain(caught.value, prepared(*arguments))


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("batc=32k", ["'batc'", "Did you mean 'batch'?", "--help"]),
        ("optimiser=sgd", ["'optimiser'", "Did you mean 'optimizer'?"]),
        ("optimizer.lrr=3", ["'optimizer.lrr'", "Did you mean 'optimizer.lr'?"]),
        ("max_update=3", ["'max_update'", "Did you mean 'max_updates'?"]),
        ("data.rooot=/x", ["'data.rooot'", "Did you mean 'data.root'?"]),
        ("batch=33k", ["batch=33k", "its rows are 256, 8k, 16k, 32k.", "nearest is batch=32k", "batch.size=33792"]),
        ("batch=257", ["batch=257", "nearest are batch=256", "and batch=8k"]),
        ("batch=32kk", ["batch=32kk", "no such choice. Choose from 256, 8k, 16k, 32k.", "Did you mean '32k'?"]),
        ("batch=-8", ["batch=-8", "Choose from 256"]),
        ("batch=1.5", ["batch=1.5", "Choose from 256"]),
        ("batch=", ["batch=:", "Choose from 256"]),
        ("batch=None", ["batch=none", "Choose from 256"]),
        ("data=null", ["data=null", "Choose from cifar10", "synthetic"]),
        ("data=imagnet", ["data=imagnet", "Did you mean 'imagenet'?"]),
        ("model=resnet51", ["model=resnet51", "resnet50", "wide_resnet50_2"]),
        ("model=small/x", ["model=small/x", "resnet50"]),
        ("optimizer=adam", ["optimizer=adam", "Choose from adamw, lars, recipe, sgd, torch"]),
        ("precision=true", ["precision=true", "bf16"]),
        ("batch=8k,32k", ["batch=8k,32k: several values are a sweep. To run each of them: -m batch=8k,32k"]),
        ("epochs=many", ["epochs=many: this value does not fit the key", "Integer"]),
        ("compile=auto", ["compile=auto: choose true or false."]),
        ("seed=1.5", ["seed=1.5", "Integer"]),
        ("optimizer.lr=high", ["optimizer.lr=high", "Float"]),
        ("deterministic=perhaps", ["deterministic=perhaps", "true or false"]),
        ("launch.nproc=1.5", ["launch.nproc=1.5"]),
        ("data.mean=[a,b,c]", ["data.mean=[a,b,c]", "Float"]),
        ("lr=0.1", ["'lr'", "Did you mean 'optimizer.lr'?"]),
        ("nproc=2", ["'nproc'", "Did you mean 'launch.nproc'?"]),
        ("data.mean=[1", ["data.mean=[1", "quotes"]),
        ("data.root=/a,b", ["data.root=/a", "add -m", 'data.root="/a,b"']),
        ("run.name=${x", ["run.name='${x'", "${ begins an interpolation", "${oc.env:HOME}"]),
    ],
)
def test_a_bad_argument_is_explained_in_one_line(argument: str, words: list[str]) -> None:
    explanation = explanation_of(argument)
    assert [word for word in words if word not in explanation] == []
    assert "\n" not in explanation
    for jargon in ("full_key", "object_type", "reference_type", "hydra.cc", "Search path"):
        assert jargon not in explanation


def test_the_suggested_quotes_around_an_equals_sign_work() -> None:
    assert composed('data.root="/a=b"').data.root == "/a=b"


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give `main` an empty working folder and an environment to change."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    return tmp_path


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["lars-train", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("epochs=0", "epochs=0"),
        ("optimizer.lr=-1", "optimizer.lr=-1.0"),
        ("schedule.warmup_epochs=10", "schedule.warmup_epochs=10"),
        ("batch=64k", "its rows are 256, 8k, 16k, 32k"),
        ("batch=12288", "batch=16k batch.size=12288 optimizer.lr=18.9"),
        ("batch=null", "batch=null"),
        ("bathc=32k", "Did you mean 'batch'?"),
        ("+sead=3", "Did you mean 'seed'?"),
        ("mode=export", "checkpoint.path"),
        ("run.dir=", "a run needs its own folder"),
        ("run.dir=.", "a run needs its own folder"),
        ("run.name=${oc.env:NOT_SET}", "lars-train: run.name: KeyError"),
    ],
)
def test_bad_input_ends_with_code_2_one_message_and_no_files(
    argument: str,
    message: str,
    in_empty_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_main(monkeypatch, argument) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert list(in_empty_folder.iterdir()) == []


@pytest.mark.parametrize("flags", [("-m", "batch=256,12k"), ("-m", "batch=12k,256", "seed=1,2", "recipe=nus,mlperf")])
def test_a_sweep_with_a_batch_between_rows_is_refused_at_once(
    flags: tuple[str, ...],
    in_empty_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # With several recipes, the message names the first one that has no row for the batch.
    recipe = "nus" if "recipe=nus,mlperf" in flags else "torchlars"
    assert run_main(monkeypatch, f"recipe={recipe}", "batch=12k") == 2
    alone = capsys.readouterr().err
    assert run_main(monkeypatch, *flags) == 2
    assert capsys.readouterr().err == alone
    assert f"recipe {recipe} has no row" in alone
    assert "by hand" in alone
    assert list(in_empty_folder.iterdir()) == []


def test_a_sweep_tries_every_job_and_reports_failures_at_the_end(
    in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "-m", "batch=256", "epochs=0,-1", "seed=7") == 2
    out, err = capsys.readouterr()
    assert "=== job 1: batch=256 epochs=0 seed=7\n" in out
    assert "sweep: 0 of 2 jobs done" in out
    summary = [line for line in err.splitlines() if "job failed" in line]
    assert len(summary) == 2
    assert "batch=256 epochs=0 seed=7" in summary[0]
    assert "batch=256 epochs=-1 seed=7" in summary[1]
    assert list(in_empty_folder.iterdir()) == []


def test_the_jobs_of_a_sweep_have_the_given_names(in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The folder's name is one that Hydra's grammar cannot parse without quotes.
    names: list[str] = []
    monkeypatch.setattr("lars_train.cli._run_job", lambda raw, *rest: names.append(raw.run.name))
    (in_empty_folder / "té (1)").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(in_empty_folder / "té (1)"))
    assert run_main(monkeypatch, "-m", "run.name=12_34,56_78,café,a b") == 0
    assert names == ["12_34", "56_78", "café", "a b"]
    assert run_main(monkeypatch, "run.name=12_34") == 0
    assert names[4:] == ["12_34"]


def test_help_is_one_screen_and_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['lars-train', 'batch=8k', '--help']\n"
        "from lars_train.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print('ENDED', end.code, 'torch' in sys.modules)\n"
    )
    with_folder = {**os.environ, "IMAGENET_DIR": "/data/imagenet"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=with_folder, capture_output=True, text=True, check=False
    )
    *lines, end = done.stdout.splitlines()
    assert end == "ENDED 0 False", done.stderr
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 80
    for group, choice in (("batch", "32k*"), ("data", "mini*"), ("optimizer", "recipe*"), ("precision", "auto*")):
        assert any(line.split()[:1] == [group] and choice in line.split() for line in lines), group
    for word in ("optimizer.lr", "checkpoint.path", "launch,", "torchrun", "mode=evaluate"):
        assert word in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_on_a_group_lists_its_keys_with_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    cli.show_help(["optimizer", "general"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(OptimizerConfig):
        assert f"\noptimizer.{field.name}=" in text
    for line in ("optimizer.name=recipe   (text)", "log_every=10   (whole number)", "compile=false   (true or false)"):
        assert f"\n{line}\n" in text
    assert "\n    The trust coefficient.\n" in text
    assert "\ndata.root" not in text
    cli.show_help(["data.on_error"])
    assert capsys.readouterr().out.startswith("data.on_error=skip   (text)\n    Response to an image")


@pytest.mark.parametrize(("name", "meant"), [("optimizr", "optimizer"), ("num_workers", "data.workers")])
def test_help_on_an_unknown_group_names_the_closest(name: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"--help {name}: .*Did you mean '{meant}'"):
        cli.show_help([name])
    assert run_main(monkeypatch, "--help", name) == 2


@pytest.mark.slow
def test_a_run_on_the_cpu_does_not_import_torchs_compiler(tmp_path: Path) -> None:
    # The import takes as long as the rest of a short run.
    code = (
        "import sys\n"
        "from lars_train.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('COMPILER', 'torch._dynamo' in sys.modules, 'sympy' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, *TINY, "launch.nproc=1", "run.name=one"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "COMPILER False False", done.stdout + done.stderr


@pytest.mark.parametrize(("name", "queued"), [("SIGUSR2", True), ("SIGTERM", False)])
def test_a_submitit_job_is_requeued_after_its_checkpoint(
    name: str, queued: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def raise_stopped(*arguments: Any) -> None:
        raise Stopped(f"{name}: stopped after update 7, with a checkpoint")

    def requeue(number: int, frame: Any) -> None:
        seen.append(number)
        sys.exit(-1)

    seen: list[int] = []
    monkeypatch.setattr(cli.HydraConfig, "get", lambda: OmegaConf.create({"overrides": {"task": []}}))
    monkeypatch.setattr(commands, "run", raise_stopped)
    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        with pytest.raises(SystemExit) as ended:
            cli._run_job(composed(f"run.dir={tmp_path}"), ("lars-train",), cli._Jobs(), sweeping=False, saved=None)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert (ended.value.code, seen) == ((-1, [signal.SIGUSR2]) if queued else (75, []))


def test_a_refused_job_has_no_row_in_the_sweep_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The job's directory may hold the same run with another length (max_updates).
    outcomes = iter([ConfigError("it has ended at update 4"), DataError("damaged"), None])

    def runs(*arguments: Any) -> None:
        if (outcome := next(outcomes)) is not None:
            raise outcome

    monkeypatch.setattr(cli.HydraConfig, "get", lambda: OmegaConf.create({"overrides": {"task": [next(names)]}}))
    monkeypatch.setattr(commands, "run", runs)
    monkeypatch.setattr(run_directory, "holds_run_of", lambda directory, config: True)
    jobs = cli._Jobs()
    for name in ("refused", "failed", "done"):
        names = iter([name, name])
        cli._run_job(composed(f"run.dir={tmp_path / name}"), ("lars-train",), jobs, sweeping=True, saved=None)
    assert jobs.directories == {tmp_path / "failed": "failed", tmp_path / "done": "done"}
