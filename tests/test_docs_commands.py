"""Every command on the pages is valid, and runs with small settings unless it is marked as needing more.

The mark is in the command's comment or in the paragraph before its block ("needs ImageNet", "needs a cluster",
"needs a GPU", "takes hours", ...), or is a word of the command itself: imagenet, --nnodes, srun (tests/pages.py).
CI runs the README's two commands for installation. Of other installation commands only the extras are checked.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from pages import PAGES, ROOT, Command, blocks, inline, parts
from PIL import Image
from resolving import resolved
from tiny import composed, environment, shell, start

from lars_train.config.arguments import take_config_file
from lars_train.pack.lars_data import _parser
from lars_train.run_plan import IMAGENET_TRAIN_IMAGES, make_plan

BLOCKS = [block for page in PAGES for block in blocks(page)]
FENCED = [command for block in BLOCKS for command in block.commands]
INLINE = [command for page in PAGES for command in inline(page)]
CI = (ROOT / ".ci" / "run").read_text()
ELLIPSIS = re.compile(r"…|\.\.\.|\[?--?\w+\]?\.\.\.|[A-Z_]+\.\.\.")
# Commands for development, and third-party programs with any arguments.
CHECKERS = ("ruff check .", "ruff format --check .", "mypy", "pytest", "python3 -m venv .venv", ". .venv/bin/activate")
OTHERS = {*"ls sleep kill grep curl aws kubectl tensorboard sphinx-build cibuildwheel pyproject-build".split()}
# Added to commands that train, except for keys that the command sets. Without them a laptop would take minutes.
SMALL = {"model": "tiny", "max_updates": "1", "launch.nproc": "1", "launch.threads": "1", "data.holdout": "0.01"}
RUN = "tried"
LEAVES = {
    "lars-report runs": "runs/report/report.html",
    "plan.path=plan-${batch.name}.json": "plan-32k.json",
    "export.path=net.safetensors": "net.safetensors",
    "export.path=net.onnx": "net.onnx",
    "evaluate.report=found": "found/confusion.png",
}


def assert_composes(settings: list[str]) -> None:
    """Raise if no run can start with these settings; for ImageNet make the plan too."""
    settings = [setting for setting in settings if setting not in ("-m", "--multirun")]
    if any(setting.startswith("hydra/launcher=submitit") for setting in settings):
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    choices = next((s.partition("=")[2].split(",") for s in settings if s.startswith("batch=")), [""])
    for choice in choices:
        assert_one_composes(tuple(f"batch={choice}" if s.startswith("batch=") else s for s in settings))


@cache
def assert_one_composes(settings: tuple[str, ...]) -> None:
    """Raise if no run can start with these settings, which are not a sweep."""
    own = [setting for setting in settings if not setting.startswith("hydra")]
    if len(own) < len(settings):
        composed(*settings, hydra=True)
    config = resolved(*own)
    if config.data.name == "imagenet" and config.mode in ("train", "plan", "check"):
        make_plan(config, IMAGENET_TRAIN_IMAGES)


def check_ours(words: list[str]) -> None:
    if any(word in ("--help", "--cfg") for word in words):
        return
    assert_composes(take_config_file(words[1:])[0])


def check_store(words: list[str]) -> None:
    _parser().parse_args([word.strip("[]") for word in words[1:]])


def check_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args(words[1:])
    assert args.training_script == "lars_train"
    assert args.module
    assert_composes(args.training_script_args)


def check_script(words: list[str]) -> None:
    """Check that a script exists and has the options. The settings of a shell script are those of lars-train."""
    path = ROOT / (words[1] if words[0] == "python" else words[0])
    assert path.is_file(), path
    if path.suffix != ".py":
        assert_composes([word for word in words[1:] if "=" in word])
        return
    # Modules that the script imports may add options.
    text = path.read_text()
    imported = [f"{name}.py" for name in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)]
    files = [folder / name for folder in (path.parent, ROOT / "scripts") for name in imported]
    trees = [ast.parse(source) for source in (text, *(file.read_text() for file in files if file.exists()))]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    adds = [c.args for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "add_argument"]
    known = {name.value for args in adds for name in args if isinstance(name, ast.Constant)}
    assert {word for word in words[2:] if word.startswith("--")} <= known


def check_pip(words: list[str]) -> None:
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(re.findall(r"\[(\w+)\]", " ".join(words))) <= set(extras)


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "lars-train": check_ours,
    "lars-data": check_store,
    "lars-report": lambda words: None,
    "torchrun": check_torchrun,
    "python": check_script,
    "pip": check_pip,
}


def check(words: list[str]) -> None:
    # Replace shell variables by a number.
    words = [re.sub(r"\$(\{[A-Z_]+\}|[A-Z_]+)", "1", word) for word in words if not ELLIPSIS.fullmatch(word)]
    line = " ".join(words)
    if words[0] in ("srun", "sbatch", "bash"):
        flags = 1 + sum(1 for word in words[1:] if word.startswith("-"))
        words = words[flags:]
    program = words[0]
    if program.startswith("scripts/"):
        check_script(words)
    elif program in CHECKS:
        CHECKS[program](words)
    else:
        assert line in CHECKERS or program in OTHERS, f"{line}: no check for this program; add it to CHECKS or OTHERS"


@pytest.mark.parametrize("command", [*FENCED, *INLINE], ids=lambda command: command.where)
def test_every_command_is_valid_for_its_program(command: Command) -> None:
    calls = parts(command.text)
    assert calls
    for words in calls:
        if command in FENCED:
            check(words)
        elif words[0] == "lars-data" and "STORE" not in words:
            # In a sentence the arguments are left out.
            check([*words, "SOURCE", "STORE"])
        elif words[0] == "torchrun" and "lars_train" not in words:
            check([*words, "-m", "lars_train"])
        elif len(words) > 1:
            check(words)


def is_run_by_ci(command: Command) -> bool:
    """Return True for a command that creates an environment, installs, lints or tests."""
    calls = [" ".join(words) for words in parts(command.text)]
    return calls[0].startswith("pip install ") or all(call in CHECKERS for call in calls)


def is_in_a_session(command: Command) -> bool:
    """Return True for a command in a block with background jobs, which one shell has to run as a whole."""
    block = next(block for block in BLOCKS if command in block.commands)
    return any(line.text.endswith("&") for line in block.commands)


HERE = [c for c in FENCED if not c.needs and not is_run_by_ci(c) and not is_in_a_session(c)]


def small(words: list[str], folder: Path, store: int) -> list[str]:
    """Return the command with its placeholders replaced (STORE by the folder ``store{store}``) and small settings."""
    placeholders = {"SOURCE": folder / "images", "IMAGES": folder / "images", "STORE": folder / f"store{store}"}
    words = [word if "=[" in word else word.strip("[]") for word in words]
    words = [str(placeholders.get(word, word)).replace("runs/RUN", f"runs/{RUN}") for word in words]
    given = {word.partition("=")[0] for word in words}
    if words[0] == "lars-train" and given.isdisjoint(("--help", "checkpoint.path", "--config-file")):
        added = {"model": "tiny"} if "mode=plan" in words else SMALL
        if "mode=check" in words:
            added = {**SMALL, "check.seconds": "0.3"}
        words += [f"{key}={value}" for key, value in added.items() if key not in given]
    return words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the data set `images`, which has two classes."""
    made = tmp_path_factory.mktemp("pages")
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 4)):
        for label in ("cat", "dog"):
            (made / "images" / split / label).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(rng.integers(0, 256, (300, 280, 3), dtype=np.uint8))
                image.save(made / "images" / split / label / f"{number}.jpg")
    return made


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, tuple[int, str]]:
    """Return the exit code and output of every command in `HERE`, by its text; repeated commands run once."""
    lines = [["lars-train", f"run.name={RUN}", *(f"{key}={value}" for key, value in SMALL.items())]]
    stores = 0
    once = list({command.text: parts(command.text) for command in HERE}.items())
    for _, (words,) in once:
        # Each pack makes its own store; other commands read the first, which holds the images unchanged.
        packs = words[:2] == ["lars-data", "pack"]
        stores += packs
        lines.append(small(words, folder, stores if packs else 1))
    done = [shell().run(words, folder, environment()) for words in lines]
    found = [(one.returncode, one.stdout + one.stderr) for one in done]
    assert found[0][0] == 0, found[0][1]
    return {text: result for (text, _), result in zip(once, found[1:], strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("command", HERE, ids=lambda command: command.where)
def test_unmarked_commands_run_and_write_the_stated_files(
    command: Command, folder: Path, results: dict[str, tuple[int, str]]
) -> None:
    for word, package in (("safetensors", "safetensors"), (".onnx", "onnxruntime")):
        if word in command.text:
            pytest.importorskip(package)
    code, output = results[command.text]
    assert code == 0, output
    for part, file in LEAVES.items():
        if part in command.text:
            assert (folder / file).exists(), file


@pytest.mark.slow
def test_the_tutorials_code_predicts_a_class(folder: Path, results: dict[str, tuple[int, str]]) -> None:
    assert results
    page = (ROOT / "docs" / "train_on_your_images.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    done = shell().run(["python", "-c", code], folder, environment())
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(cat|dog) \d+%\n", done.stdout)


@pytest.mark.slow
def test_the_killed_run_on_the_page_ends_with_the_same_weights(tmp_path: Path) -> None:
    sessions = [block for block in BLOCKS if is_in_a_session(block.commands[0])]
    assert [block.page.name for block in sessions] == ["same_curve.md"]
    program = tmp_path / "bin" / "lars-train"
    program.parent.mkdir()
    # The ranks are forks, because the imports of new processes would take most of the time.
    code = "import shell, sys; sys.argv[0] = 'lars-train'; shell.lars_train()"
    program.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@" model=tiny launch.threads=1 data.holdout=0.01\n'
    )
    program.chmod(0o755)
    # As in a terminal, each job is its own process group.
    lines = ["set -m", *(command.text for command in sessions[0].commands)]
    path = f"{program.parent}:{environment()['PATH']}"
    done = start(["bash", "-c", "\n".join(lines)], tmp_path, PATH=path, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    assert done.returncode == 0, done.stdout + done.stderr
    hashes = re.findall(r"^runs/(one|two)/final.json: +(\"sha256_float32\"|.*sha256_float32.*)$", done.stdout, re.M)
    assert [name for name, _ in hashes] == ["one", "two"]
    assert hashes[0][1] == hashes[1][1]
    # On a fast machine the second run may be done before it is killed.
    assert re.search(r"resumed +at update|finished", done.stdout)


def test_marks_are_parsed_and_unknown_commands_are_refused() -> None:
    page = ROOT / "docs" / "made_up.md"
    text = """It needs ImageNet:

```
lars-train a=1  # b
```

Not this.

```
make all
lars-train x=1 \\
  y=2 # takes hours
```
"""
    first, second = blocks(page, text)
    assert [(c.line, c.text, c.needs) for c in first.commands] == [(4, "lars-train a=1", "needs ImageNet")]
    assert [(c.line, c.text, c.needs) for c in second.commands] == [
        (10, "make all", ""),
        (11, "lars-train x=1 y=2", "takes hours"),
    ]
    with pytest.raises(AssertionError, match="no check for this program"):
        check(["make", "all"])
    for words in (["python", "scripts/verify/chaos.py", "--kill"], ["python", "scripts/verify/chaso.py"]):
        with pytest.raises(AssertionError):
            check(words)
    with pytest.raises(Exception, match="bach"):
        check(["lars-train", "bach=1"])
