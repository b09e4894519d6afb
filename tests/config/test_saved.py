"""A run from a saved config file has the same config and hash, and its directory only for the same experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lars_train.config import Config, config_dir, register, resolve, run_hash
from lars_train.config.arguments import prepare_arguments
from lars_train.config.saved import NAME, SavedConfig, register_saved
from lars_train.errors import ConfigError


def composed(name: str, *settings: str) -> Config:
    register()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return resolve(compose(name, prepare_arguments(list(settings), None)))


def from_file(path: Path, *settings: str) -> tuple[Config, SavedConfig]:
    saved = register_saved(path, prepare_arguments(list(settings), None))
    return saved.place(composed(NAME, *settings)), saved


def written(folder: Path, config: Config, **changed: Any) -> Path:
    """Write the config as a run does."""
    plain = OmegaConf.structured(config)
    for key, value in changed.items():
        OmegaConf.update(plain, key.replace("__", "."), value, force_add=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(plain))
    return folder / "config.yaml"


@pytest.mark.parametrize(
    "settings",
    [
        "",
        "batch=256",
        "data=cifar10 batch=8k recipe=goyal model=resnet20",
        "recipe=mlperf batch=4k data=imagenet data.root=/data/café",
        "recipe=nus batch=32k data=imagenet data.root=007 data.order=shards",
        "batch.size=640 optimizer.lr=2 optimizer.base=AdamW optimizer.kwargs.betas=[0.9,0.99]",
        "optimizer.preset=larc optimizer.clip=none schedule.warmup_start=0.1 precision=fp64 micro_batch=32",
        "run.name=12_34",
        "run.name=1e5",
        "run.name=true",
        "run.name=2012-10-31",
        "run.dir=/x/0x1f",
        "run.name='null'",
    ],
)
def test_a_saved_config_composes_to_itself(settings: str, tmp_path: Path) -> None:
    config = composed("config", *settings.split())
    again, saved = from_file(written(tmp_path, config))
    assert again == config
    assert saved.hash == run_hash(config)
    assert from_file(tmp_path)[0] == config


def test_the_files_run_directory_is_kept_only_for_its_experiment(tmp_path: Path) -> None:
    path = written(tmp_path, composed("config", "run.name=mine", "resume=never", "max_updates=3"))
    for settings, run in (
        ((), (None, "mine")),
        (("log_every=3", "launch.nproc=2", "max_updates=null"), (None, "mine")),
        (("seed=1",), (None, None)),
        (("seed=1", "run.name=other"), (None, "other")),
        (("run.dir=else/where",), ("else/where", None)),
    ):
        config, _ = from_file(path, *settings)
        assert (config.run.dir, config.run.name) == run, settings
        # resume=never applies to one start only.
        assert config.resume == "auto"
    assert from_file(path, "resume=never")[0].resume == "never"


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    config, _ = from_file(
        written(tmp_path, composed("config")), "optimizer.lr=3", "data.root=12_34", "data.name=folder"
    )
    assert (config.optimizer.lr, config.data.root) == (3, "12_34")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("batch=8k", "batch"),
        ("data=cifar10", "data"),
        ("precision=fp64", "precision.name="),
        ("model=tiny", "model.name="),
    ],
)
def test_a_group_is_refused_with_a_config_file(setting: str, words: str, tmp_path: Path) -> None:
    path = written(tmp_path, composed("config"))
    with pytest.raises(ConfigError) as caught:
        from_file(path, setting)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("seed: 1\n", "missing keys: mode, epochs"),
        ("- a\n", "a config must be a mapping"),
        ("a: [\n", "it is not valid YAML"),
        ("\xff", "it is not valid YAML"),
        ("run: x\n", "run must be a mapping"),
        ("sede: 1\n", "sede: unknown key. Did you mean 'seed'?"),
        ("run: {nam: x}\n", "run.nam: unknown key. Did you mean 'run.name'?"),
    ],
)
def test_a_file_that_is_not_a_complete_config_is_refused(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError) as caught:
        from_file(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_errors_in_a_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing: it cannot be read"):
        from_file(tmp_path / "missing")
    text = written(tmp_path, composed("config")).read_text()
    (tmp_path / "config.yaml").write_text(text.replace("seed: 0", "seed: many"))
    with pytest.raises(ConfigError, match=r"config\.yaml: seed: .*many"):
        from_file(tmp_path)
    # Keys of a later version can be given on the command line.
    (tmp_path / "config.yaml").write_text(text.replace("seed: 0\n", ""))
    with pytest.raises(ConfigError, match="missing keys: seed"):
        from_file(tmp_path)
    assert from_file(tmp_path, "seed=4")[0].seed == 4


def test_a_file_from_before_the_key_was_added_is_complete(tmp_path: Path) -> None:
    config = composed("config", "batch=256")
    plain = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(plain, dict)
    del plain["log"], plain["model"]["freeze"]
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(plain))
    again, saved = from_file(tmp_path / "config.yaml")
    assert again == config
    assert saved.hash == run_hash(config)
