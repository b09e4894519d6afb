"""Text on the command line reaches the config unchanged, and the error for a mistyped line shows the correct one."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tiny import composed, prepared

from lars_train.config.arguments import prepare_arguments, quoted, split, take_config_file
from lars_train.config.keys import is_text, key_types, leaf_keys
from lars_train.errors import ConfigError

# Names that a user may choose, but that Hydra's grammar misreads or refuses.
NAMES = [
    "12_34",
    "2012_10",
    "007",
    "1e5",
    "1.50",
    ".5",
    "-3",
    "+3",
    "true",
    "False",
    "yes",
    "None",
    "nan",
    "INF",
    "2012-10-31",
    "12:30",
    "a=b",
    "a b",
    "it's",
    'say "no"',
    "'half",
    "dr/café",
    "dr/数据",
    "dr/a(1)",
    "int(3)",
    "[x]",
    "{x: 1}",
    r"C:\x",
    "C:\\x\\",
    r"back\'slash",
    "100%",
    "a&b;c|d",
    "#1",
    "$HOME",
    "😀",
    "a\tb",
    "line\n",
    " padded ",
    "x" * 1000,
    "plain",
    "/data/256",
    "../up",
    "s3://bucket/key",
]


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        prepared(*arguments)
    return str(caught.value)


def parsed(argument: str) -> list[object]:
    """Return the value in each job of a sweep, as Hydra parses it from the override that it makes for the job."""
    parser = OverridesParser.create()
    override = parser.parse_overrides([argument])[0]
    if not override.is_sweep_override():
        return [override.value()]
    return [parser.parse_overrides([f"k={job}"])[0].value() for job in override.sweep_string_iterator()]


@pytest.mark.parametrize("key", ["run.name", "+run.name", "++data.root"])
def test_text_reaches_hydra_unchanged_in_runs_and_sweeps(key: str) -> None:
    for name in NAMES:
        assert parsed(*prepared(f"{key}={name}")) == [name]
    words = [name.strip() for name in NAMES]
    for sweep in (",".join(words), " , ".join(words)):
        assert parsed(*prepared(f"{key}={sweep}")) == words
    assert parsed(*prepared(f"{key}=choice({','.join(words)})")) == words
    few = ["12_34", "007", "a b", "dr/a(1)", "dr/é", "true"]
    assert sorted(map(str, parsed(*prepared(f"{key}=shuffle({','.join(few)})")))) == sorted(few)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
@example("\\")
@example("\\'")
@example("'\\\\'x")
@example("${a}'")
def test_quoted_text_is_read_back_unchanged(text: str) -> None:
    assert parsed(f"run.name={quoted(text)}") == [text]
    # Quoted text, null and commas have a special meaning.
    if not set(text) & set("'\",~$") and text.strip().lower() not in ("null", "", "???") and "(" not in text:
        assert parsed(*prepared(f"run.name={text}")) == [text]


def test_text_in_a_composed_config_is_unchanged() -> None:
    given = dict(zip((key for key in leaf_keys() if is_text(key)), NAMES, strict=False))
    assert len(given) > 30
    config = composed(*(f"{key}={value}" for key, value in given.items()))
    for key, value in given.items():
        node: typing.Any = config
        for part in key.split("."):
            node = node[part]
        assert node == value, key


def test_text_of_hydras_own_keys_is_unchanged() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    keys = "partition qos comment constraint exclude gres mem_per_gpu mem_per_cpu account name submitit_folder".split()
    texts = ["12_34", "007", "1e5", "-3", "true", "café", "2012-10-31", "gpu:8", "n[1-3],n7", "a b"]
    given = dict(zip((f"hydra.launcher.{key}" for key in keys), texts, strict=False))
    given |= {"hydra.sweep.dir": "2012_10", "hydra.job.env_set.JOB": "1_0"}
    # Other values keep the types of Hydra's grammar.
    types = {"timeout_min": "1_0", "qos": "null", "additional_parameters.a": "1_0", "setup": "[a, b]"}
    settings = [f"{key}={value}" for key, value in given.items()]
    settings += [f"hydra.launcher.{key}={value}" for key, value in types.items()]
    settings = [f"+{setting}" if "env_set" in setting or "parameters" in setting else setting for setting in settings]
    config = composed("hydra/launcher=submitit_slurm", *settings, hydra=True)
    launcher = config.hydra.launcher
    assert (launcher.timeout_min, launcher.qos, launcher.setup) == (10, None, ["a", "b"])
    assert launcher.additional_parameters == {"a": 10}
    del given["hydra.launcher.qos"]
    assert {key: OmegaConf.select(config, key) for key in given} == given
    # A launcher that does not exist has no known types. Hydra reports the error.
    assert prepared("hydra/launcher=none", "hydra.launcher.name=1_0")[1] == "hydra.launcher.name=1_0"
    # Parameters of the sweeper use Hydra's grammar.
    assert prepared("+hydra.sweeper.params.seed=range(3)") == ["+hydra.sweeper.params.seed=range(3)"]


def test_no_list_or_mapping_key_holds_typed_text() -> None:
    # If there were such a key, arguments.py would have to quote text within its values.
    holders = {key: key_types()[key] for key in leaf_keys() if "str" in repr(key_types()[key]) and not is_text(key)}
    # Patterns of parameter names need no quotes.
    assert holders.pop("model.freeze") == list[str]
    patterns = ["0.weight", "layer?.0.*", "*.bias", "1", "12.norm_1.*", "head"]
    assert list(composed(f"model.freeze=[{','.join(patterns)}]").model.freeze) == patterns
    assert set(holders.values()) == {int | str, bool | str, dict[str, typing.Any]}


@pytest.mark.parametrize(
    "argument",
    [
        "run.name=null",
        "run.name='12_34'",
        'run.name="a,b"',
        "run.name=${seed}",
        "plan.path=plan-${batch.name}.json",
        "run.name=${oc.env:JOB,none}_${oc.env:TASK,none}",
        "run.name=",
        "micro_batch=64",
        "micro_batch=auto",
        "channels_last=true",
        "launch.nproc=2,4",
        "seed=range(3)",
        "run.name=range(3)",
        "optimizer.clip=[0,50]",
        "+optimizer.kwargs.dampening=0.1",
        "batch=8k,32k",
        "batch='256'",
        'batch="256"',
        "batch.nominal=256,512",
        "model=resnext50_32x4d,resnet18",
        "recipe.rows.32k.lr=3",
        "hydra/launcher=submitit_slurm",
    ],
)
def test_settings_that_hydra_reads_correctly_are_unchanged(argument: str) -> None:
    assert prepared(argument) == [argument]


def test_optimizer_kwargs_keep_hydras_types() -> None:
    values = {"alpha": "1e-3", "amsgrad": "true", "n": "1_0", "betas": "[0.9,0.99]"}
    config = composed(*(f"optimizer.kwargs.{key}={value}" for key, value in values.items()))
    assert config.optimizer.kwargs == {"alpha": 1e-3, "amsgrad": True, "n": 10, "betas": [0.9, 0.99]}
    assert composed("optimizer.kwargs={foreach:false}").optimizer.kwargs == {"foreach": False}


def test_interpolations_resolve_within_quoted_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB", "12")
    assert composed("run.name=${oc.env:JOB}_34").run.name == "12_34"
    assert composed("run.name=é ${oc.env:NONE,${oc.env:JOB}_34}").run.name == "é 12_34"


def test_a_tilde_expands_in_every_value_of_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/José 1")
    assert parsed(*prepared("data.root=~/a")) == ["/home/José 1/a"]
    assert parsed(*prepared("data.root=~/a,~/b")) == ["/home/José 1/a", "/home/José 1/b"]
    assert parsed(*prepared("hydra.sweep.dir=~/a")) == ["/home/José 1/a"]
    assert parsed(*prepared("hydra.sweep.dir=dr/é")) == ["dr/é"]


def test_split_ignores_commas_in_quotes_and_interpolations() -> None:
    assert split("a,b , c") == ["a", "b ", " c"]
    assert split("'a,b',\"c,d\" ,${oc.env:X,e}") == ["'a,b'", '"c,d" ', "${oc.env:X,e}"]
    assert split("'a,b") == ["'a", "b"]
    assert split("'a'b,c") == ["'a'b", "c"]
    assert split("${a,b") == ["${a", "b"]


@pytest.mark.parametrize("value", ["café", "12_34", "1e5", "a b", "a(1)", "x=y"])
def test_any_text_is_read_as_the_name_of_a_choice(value: str) -> None:
    assert parsed(*prepared(f"model={value}")) == [value]
    assert parsed(*prepared(f"model=small,{value}")) == ["small", value]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["batch=[256,8k]"], ["one choice for the group batch", "-m batch=256,8k"]),
        (["-m", "batch=32k,[256, 8k]"], ["-m batch=32k,256,8k"]),
        (["data=[mini,cifar10]"], ["-m data=mini,cifar10"]),
        (["model={name: small}"], ["one choice for the group model"]),
        (["~data"], ["~data", "a choice for every group"]),
        (["+batch=8k"], ["write batch=8k"]),
        (["++batch=8k"], ["write batch=8k"]),
        (["batch@x=8k"], ["write batch=8k"]),
        (["run={name: 12_34}"], ["run is a section, not a key", "run.dir, run.name"]),
        (["checkpoint=runs/x"], ["checkpoint is a section, not a key", "checkpoint.path"]),
        (["run.name=???"], ["???", "missing value"]),
        (["-m", "run.name=a,,b"], ["missing before or after a comma"]),
        (["-m", "batch=256,"], ["missing before or after a comma"]),
        (["--batch", "8k"], ["no dashes", "write batch=8k"]),
        (["--batch=8k"], ["write batch=8k"]),
        (["--batch", "seed=1"], ["write batch=..."]),
        (["--lr", "0.1"], ["write optimizer.lr=0.1"]),
        (["--gpus", "4"], ["write launch.nproc=4"]),
        (["--max-updates", "4"], ["write max_updates=4"]),
        (["--data.root", "/x"], ["write data.root=/x"]),
        (["--mode", "plan"], ["write mode=plan"]),
        (["-x"], ["-x", "unknown flag", "lars-train --help"]),
        (["--multi"], ["--multi", "unknown flag"]),
        (["--config", "F"], ["--config-file FILE"]),
        (["--config-name", "x"], ["--config-file FILE"]),
        (["--config-path=x"], ["--config-file FILE"]),
        (["-cd", "x"], ["--config-file FILE"]),
        (["-m", "batch=256,", "8k"], ["batch=256, 8k", "write batch=256,8k"]),
        (["-m", "batch=256", ",", "8k", ",", "16k"], ["write batch=256,8k,16k"]),
        (["batch", "=", "8k"], ["batch = 8k", "write batch=8k"]),
        (["batch=", "8k"], ["write batch=8k"]),
        (["seed=1", "batch", "=8k"], ["batch =8k", "write batch=8k"]),
        (["batch", "8k"], ["batch 8k", "write batch=8k"]),
        (["seed", "1", "batch=8k"], ["write seed=1"]),
        (["32k"], ["32k", "key=value", "write batch=32k"]),
        (["imagenet"], ["write data=imagenet"]),
        (["plan"], ["write mode=plan"]),
        (["run.name=my", "run"], ["run", "run.name='my run'"]),
        (["runs/x"], ["runs/x", "key=value"]),
        ([""], ["key=value"]),
        (["=8k"], ["=8k", "key=value"]),
    ],
    ids=" ".join,
)
def test_the_error_for_a_mistyped_line_shows_the_correct_one(line: list[str], words: list[str]) -> None:
    message = refusal(*line)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message


@pytest.mark.parametrize(
    "line",
    [
        ["seed=1", "--cfg", "job", "--package", "data", "--resolve"],
        ["seed=1", "-c", "job"],
        ["seed=1", "--cfg=job"],
        ["-cjob"],
        ["--info", "defaults"],
        ["--info"],
        ["-m"],
        ["--hydra-help"],
        ["install=bash", "--shell-completion"],
    ],
    ids=" ".join,
)
def test_hydras_own_flags_and_their_values_are_unchanged(line: list[str]) -> None:
    assert prepared(*line) == line


def test_config_file_is_split_off_the_command_line() -> None:
    assert take_config_file(["seed=1"]) == (["seed=1"], None)
    for line in (["--config-file", "a=b.yaml", "-m"], ["-m", "--config-file=a=b.yaml"]):
        assert take_config_file(line) == (["-m"], Path("a=b.yaml"))
    for line in (["--config-file"], ["--config-file="], ["--config-file", "a", "--config-file", "b"]):
        with pytest.raises(ConfigError, match="--config-file"):
            take_config_file(line)


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
        # The functions of Hydra's grammar remove one pair of quotes.
        ("batch=choice(256,8k)", """batch=choice("'256'",8k)"""),
        ("batch=choice(8k, 512 ,256)", """batch=choice(8k, "'512'" ,"'256'")"""),
        ("batch=choice('256',8k)", """batch=choice("'256'",8k)"""),
        ("batch=0256", "batch='0256'"),
        ("batch=null", "batch='null'"),
        ("model=1", "model='1'"),
        ("recipe=2", "recipe='2'"),
        ("precision=16", "precision='16'"),
    ],
)
def test_a_choice_that_looks_like_a_number_is_quoted(given: str, expected: str) -> None:
    assert prepared(given) == [expected]


def test_a_batch_name_may_be_uppercase() -> None:
    assert prepared("batch=32K") == ["batch=32k"]
    assert prepared("batch=256,8K") == ["batch='256',8k"]
    assert prepared("data.root=/Data/8K", "run.name=Run") == ["data.root=/Data/8K", "run.name=Run"]


@pytest.mark.parametrize(
    "argument",
    ["batch=256,8k,16K", "batch=choice(256,8K,16k)", "batch=sort(256,8k,16k)", "batch=choice( 256, 8k, 16k )"],
)
def test_hydras_own_parser_sweeps_over_the_prepared_names(argument: str) -> None:
    # Hydra returns a swept value as an override of a job, quotes included.
    parsed = OverridesParser.create().parse_overrides(prepared(argument))[0]
    assert parsed.is_sweep_override()
    assert sorted(parsed.sweep_string_iterator()) == ["'256'", "16k", "8k"]


def test_a_numeric_batch_composes() -> None:
    assert composed("batch=256").batch.nominal == 256
    assert composed("batch=512").batch.name == "512"


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
def test_imagenet_dir_does_not_override_data_or_a_checkpoint(
    arguments: list[str],
) -> None:
    assert prepare_arguments(arguments, "/data/imagenet") == arguments


def test_flags_may_be_anywhere_on_the_line() -> None:
    assert prepared("-m", "batch=256,8k") == ["batch='256',8k", "-m"]
    assert prepared("seed=1", "-m", "batch=8k,32k", "epochs=3") == ["seed=1", "batch=8k,32k", "epochs=3", "-m"]
    assert prepared("seed=1", "--cfg", "job", "epochs=3") == ["seed=1", "epochs=3", "--cfg", "job"]
