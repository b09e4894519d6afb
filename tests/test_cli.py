"""The command line: what it makes of its arguments, how it answers bad ones, and what it needs for ``--help``.

The commands themselves are tested where their work is done, and every form of starting them in test_launch_forms.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from program import TINY, environment

from lars_train.cli import explain, main, prepare_arguments
from lars_train.config import config_dir, register
from lars_train.errors import ConfigError


def prepared(*arguments: str) -> list[str]:
    return prepare_arguments(list(arguments), None)


def composed(*arguments: str) -> DictConfig:
    register()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", overrides=prepared(*arguments))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("batch=256", "batch='256'"),
        ("batch=256,8k,16k", "batch='256',8k,16k"),
        ("batch=8k,256,512", "batch=8k,'256','512'"),
        ("batch=4096", "batch=4k"),
        ("batch=49152,4096,512", "batch=48k,4k,'512'"),
        ("batch=choice(4096, 8192)", "batch=choice(4k, 8k)"),
        ("batch=1632", "batch='1632'"),
        # The functions of Hydra's grammar take one pair of quotes off.
        ("batch=choice(256,8k)", """batch=choice("'256'",8k)"""),
        ("batch=choice(8k, 512 ,256)", """batch=choice(8k, "'512'" ,"'256'")"""),
        ("batch=0256", "batch='0256'"),
        ("batch=null", "batch='null'"),
        ("model=1", "model='1'"),
        ("recipe=2", "recipe='2'"),
        ("precision=16", "precision='16'"),
    ],
)
def test_a_choice_that_hydra_would_take_for_a_number_is_quoted(given: str, expected: str) -> None:
    assert prepared(given) == [expected]


@pytest.mark.parametrize(
    "argument",
    [
        "batch=8k",
        "batch=8k,32k",
        "batch='256'",
        'batch="256"',
        "batch=choice('256',8k)",
        "batch.size=256",
        "batch.nominal=256,512",
        "model=resnet50",
        "model=resnext50_32x4d,resnet18",
        "model.ghost_batch=16",
        "seed=1,2,3",
        "epochs=90",
        "data.root=/data/256",
        "data.image_size=32",
        "recipe.name=256",
        "run.name=batch=256",
        "hydra.sweep.dir=1",
        "+optimizer.kwargs.dampening=0.1",
        "-m",
        "--multirun",
    ],
)
def test_everything_else_is_left_as_it_is(argument: str) -> None:
    assert prepared(argument) == [argument]


def test_a_batch_may_be_written_in_capitals() -> None:
    assert prepared("batch=32K") == ["batch=32k"]
    assert prepared("batch=256,8K") == ["batch='256',8k"]
    assert prepared("data.root=/Data/8K", "run.name=Run") == ["data.root=/Data/8K", "run.name=Run"]


@pytest.mark.parametrize(
    "argument",
    ["batch=256,8k,16K", "batch=choice(256,8K,16k)", "batch=sort(256,8k,16k)", "batch=choice( 256, 8k, 16k )"],
)
def test_hydras_own_parser_sweeps_over_the_prepared_names(argument: str) -> None:
    # A swept value comes back as it has to stand in a job's own override, quotes and all.
    parsed = OverridesParser.create().parse_overrides(prepared(argument))[0]
    assert parsed.is_sweep_override()
    assert sorted(parsed.sweep_string_iterator()) == ["'256'", "16k", "8k"]


def test_a_batch_of_digits_composes() -> None:
    assert composed("batch=256").batch.nominal == 256
    assert composed("batch=512").batch.name == "512"


def test_keywords_of_the_base_optimizer_may_be_new_keys() -> None:
    config = composed("optimizer.base=AdamW", "optimizer.kwargs.betas=[0.9,0.99]", "optimizer.kwargs.amsgrad=true")
    assert OmegaConf.to_container(config.optimizer.kwargs) == {"betas": [0.9, 0.99], "amsgrad": True}


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["batch=32k"],
        ["batch=8k,32k", "-m"],
        ["mode=evaluate", "model.weights=w.pth"],
        ["mode=train"],
        ["data.root=/elsewhere"],
        ["epochs=3", "seed=1"],
    ],
)
def test_imagenet_is_the_default_when_imagenet_dir_is_set(arguments: list[str]) -> None:
    settings = [argument for argument in arguments if argument != "-m"]
    flags = arguments[len(settings) :]
    assert prepare_arguments(arguments, "/data/imagenet") == [*settings, "data=imagenet", *flags]
    assert prepare_arguments(arguments, None) == arguments
    assert prepare_arguments(arguments, "") == arguments


@pytest.mark.parametrize(
    "arguments",
    [
        ["data=mini"],
        ["data=mini,cifar10", "-m"],
        ["mode=evaluate", "checkpoint.path=runs/x"],
        ["mode=export", "checkpoint.path=runs/x"],
        ["--help"],
        ["-h"],
        ["--hydra-help"],
        ["--version"],
    ],
)
def test_imagenet_dir_does_not_speak_where_the_data_is_named_or_comes_with_the_checkpoint(
    arguments: list[str],
) -> None:
    assert prepare_arguments(arguments, "/data/imagenet") == arguments


def test_a_tilde_is_the_home_directory_which_shells_leave_behind_an_equals_sign(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert prepared("data=folder", "data.root=~/pictures") == ["data=folder", "data.root=/home/ada/pictures"]


def test_the_first_rank_speaks_for_a_sweep(
    in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Its launcher would end the first one, perhaps in the middle of a good job, if another failed before it.
    for rank, code in (("0", 2), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert run_main(monkeypatch, "-m", "epochs=0,-1") == code
        assert ("job failed" in capsys.readouterr().err) == (rank == "0")


def test_flags_may_stand_anywhere() -> None:
    assert prepared("-m", "batch=256,8k") == ["batch='256',8k", "-m"]
    assert prepared("seed=1", "-m", "batch=8k,32k", "epochs=3") == ["seed=1", "batch=8k,32k", "epochs=3", "-m"]
    assert prepared("seed=1", "--cfg", "job", "epochs=3") == ["seed=1", "epochs=3", "--cfg", "job"]


def explained(*arguments: str) -> str:
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
        ("batch=32kk", ["batch=32kk", "no such choice; there are 256, 8k, 16k, 32k.", "Did you mean '32k'?"]),
        ("batch=-8", ["batch=-8", "there are 256"]),
        ("batch=1.5", ["batch=1.5", "there are 256"]),
        ("batch=", ["batch=:", "there are 256"]),
        ("batch=None", ["batch=none", "there are 256"]),
        ("data=null", ["data=null", "there are cifar10", "synthetic"]),
        ("data=imagnet", ["data=imagnet", "Did you mean 'imagenet'?"]),
        ("model=resnet51", ["model=resnet51", "resnet50", "wide_resnet50_2", "Did you mean"]),
        ("model=small/x", ["model=small/x", "resnet50"]),
        ("optimizer=adam", ["optimizer=adam", "there are lars, recipe, sgd"]),
        ("precision=true", ["precision=true", "bf16"]),
        ("batch=8k,32k", ["batch=8k,32k", "add -m"]),
        ("epochs=many", ["epochs=many: this value does not fit the key", "Integer"]),
        ("seed=1.5", ["seed=1.5", "Integer"]),
        ("optimizer.lr=high", ["optimizer.lr=high", "Float"]),
        ("deterministic=perhaps", ["deterministic=perhaps", "bool"]),
        ("launch.nproc=1.5", ["launch.nproc=1.5"]),
        ("data.mean=[a,b,c]", ["data.mean=[a,b,c]", "Float"]),
        ("lr=0.1", ["'lr'", "Did you mean 'optimizer.lr'?"]),
        ("nproc=2", ["'nproc'", "Did you mean 'launch.nproc'?"]),
        ("32k", ["32k", "key=value"]),
        ("data.root=/a=b", ["data.root=/a=b", "quotes"]),
        ("data.mean=[1", ["data.mean=[1", "quotes"]),
    ],
)
def test_a_bad_argument_is_explained_in_one_line(argument: str, words: list[str]) -> None:
    told = explained(argument)
    assert [word for word in words if word not in told] == []
    assert "\n" not in told
    for jargon in ("full_key", "object_type", "reference_type", "hydra.cc", "Search path"):
        assert jargon not in told


def test_the_remedy_for_a_path_with_an_equals_sign_works() -> None:
    assert composed('data.root="/a=b"').data.root == "/a=b"


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and an environment that `main` may write to."""
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
    ("argument", "told"),
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
        ("run.dir=", "a run wants a folder of its own"),
        ("run.dir=.", "a run wants a folder of its own"),
    ],
)
def test_bad_input_ends_with_code_2_and_one_message_and_writes_nothing(
    argument: str,
    told: str,
    in_empty_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_main(monkeypatch, argument) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert "Traceback" not in err
    assert list(in_empty_folder.iterdir()) == []


@pytest.mark.parametrize("flags", [("-m", "batch=256,12k"), ("-m", "batch=12k,256", "seed=1,2", "recipe=nus,mlperf")])
def test_a_sweep_with_a_batch_between_two_rows_is_refused_as_a_run_is_before_its_first_job(
    flags: tuple[str, ...],
    in_empty_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Of several recipes it is the first that is told of, for its job is the first to miss the batch.
    recipe = "nus" if "recipe=nus,mlperf" in flags else "torchlars"
    assert run_main(monkeypatch, f"recipe={recipe}", "batch=12k") == 2
    alone = capsys.readouterr().err
    assert run_main(monkeypatch, *flags) == 2
    assert capsys.readouterr().err == alone
    assert f"recipe {recipe} has no row" in alone
    assert "by hand" in alone
    assert list(in_empty_folder.iterdir()) == []


def test_a_sweep_tries_every_job_and_reports_the_failed_ones_at_the_end(
    in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "-m", "epochs=0,-1", "seed=7") == 2
    out, err = capsys.readouterr()
    assert "sweep: 0 of 2 jobs done" in out
    summary = [line for line in err.splitlines() if "job failed" in line]
    assert len(summary) == 2
    assert "epochs=0 seed=7" in summary[0]
    assert "epochs=-1 seed=7" in summary[1]
    assert list(in_empty_folder.iterdir()) == []


def test_help_lists_groups_and_keys_and_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['lars-train', '--help']\n"
        "from lars_train.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print('ENDED', end.code, 'torch' in sys.modules)\n"
    )
    with_folder = {**os.environ, "IMAGENET_DIR": "/data/imagenet"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=with_folder, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1] == "ENDED 0 False", done.stderr
    for word in ("batch: 256, 512, 1k", "precision: auto", "trust_coef", "launch:", "torchrun", "mode=evaluate"):
        assert word in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_on_the_cpu_does_not_wait_for_torchs_compiler_to_be_imported(tmp_path: Path) -> None:
    # It takes as long as all else that a short run does.
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


def test_a_group_cannot_be_taken_away() -> None:
    with pytest.raises(ConfigError, match="~data"):
        prepared("~data")
