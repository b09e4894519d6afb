"""The parts in C, which an install builds where it can: where they are found."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
from pathlib import Path
from types import ModuleType


def load_extension(name: str) -> ModuleType | None:
    """The module in C called `name`, ``lars_train.FOLDER.MODULE``; None where it was not built.

    A checkout in the current folder hides the installed package from ``python -m lars_train``, and has no built parts
    of its own. Those of the installed package serve it, if they were made from the very same source.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        # None stands there for what must not be imported.
        if sys.modules.get(name, name) is None:
            return None
    *folders, stem = name.split(".")
    own = Path(__file__).parent.joinpath(*folders[1:])
    for entry in sys.path:
        other = Path(entry or ".").joinpath(*folders)
        for path in (other / f"{stem}{suffix}" for suffix in EXTENSION_SUFFIXES):
            if path.is_file() and _alike(own / f"{stem}.c", other / f"{stem}.c"):
                return _loaded(name, path)
    return None


def _alike(one: Path, other: Path) -> bool:
    try:
        return one.read_bytes() == other.read_bytes()
    except OSError:
        return False


def _loaded(name: str, path: Path) -> ModuleType | None:
    loader = ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError:
        # A library that it wants is gone.
        return None
    sys.modules[name] = module
    return module
