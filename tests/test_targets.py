"""Functions that the user names as package.module:function: where they are found, and what each mistake reports."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lars_train.errors import ConfigError
from lars_train.targets import check_named, load_target

SOURCES = {
    "good.py": "def make(x=1):\n    return x\n\n\nNUMBER = 3\n",
    "package/__init__.py": "",
    "package/inner.py": "class Network:\n    pass\n",
    "needs.py": "import os\n\nimport no_such_package_at_all\n",
    "broken.py": "def make():\n    return (\n",
    "raises.py": "VALUE = 1\n\nraise RuntimeError('two\\nlines')\n",
    "deep.py": "import json\njson.loads('{')\n",
    "ends.py": "import sys\nsys.exit(3)\n",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Change to a folder with modules that is not on ``sys.path``, as under the console script."""
    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(Path.cwd()))])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_modules_of_the_current_folder_and_packages_are_found() -> None:
    assert load_target("good:make", "model.target")(x=5) == 5
    assert load_target("package.inner:Network", "model.target").__name__ == "Network"
    assert load_target("collections:OrderedDict", "model.target").__name__ == "OrderedDict"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("good", r"good: give package\.module:function"),
        ("good:", r"give package\.module:function"),
        (":make", r"give package\.module:function"),
        ("good.py:make", r"there is no module good\.py|no module"),
        ("../good:make", r"give package\.module:function"),
        ("good:make()", r"give package\.module:function"),
        ("absent:make", r"there is no module absent in the current folder \(.*\) or among the installed packages"),
        ("package.absent:make", r"there is no module package\.absent in the current folder"),
        ("needs:make", r"the import of needs fails in .*needs\.py, line 3: ModuleNotFoundError: .*no_such_package"),
        ("broken:make", r"the import of broken fails in .*broken\.py, line 2: SyntaxError"),
        ("raises:make", r"the import of raises fails in .*raises\.py, line 3: RuntimeError: two"),
        ("deep:make", r"the import of deep fails in .*deep\.py, line 2: JSONDecodeError"),
        ("ends:make", r"the import of ends fails in .*ends\.py, line 2: SystemExit: 3"),
        ("good:mak", r"the module good has no mak\. Did you mean 'make'\?"),
        ("good:NUMBER", r"it is a int; give a function or a class"),
    ],
)
def test_each_mistake_has_its_message(target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.target=.*{message}") as caught:
        load_target(target, "model.target")
    assert str(caught.value).isprintable()


def test_a_target_from_a_file_must_be_on_the_command_line() -> None:
    check_named("model.target", None, ["seed=1"])
    check_named("model.target", "good:make", ["seed=1", "++model.target='good:make'"])
    for overrides in ([], ["seed=1"], ["model.targets=good:make"], ["data.target=good:make"]):
        with pytest.raises(ConfigError, match=r"model\.target=good:make comes from a file"):
            check_named("model.target", "good:make", overrides)
