"""Load the C extensions, which an install builds if a compiler is available."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
from pathlib import Path
from types import ModuleType


def load_extension(name: str) -> ModuleType | None:
    """Return the C extension `name`, ``lars_train.FOLDER.MODULE``; None if it was not built.

    In a checkout without built extensions, ``python -m lars_train`` imports the checkout instead of the installed
    package. Then the extension of the installed package is used, if it was built from identical source.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        # An entry of None blocks the import.
        if sys.modules.get(name, name) is None:
            return None
    *folders, stem = name.split(".")
    folder = Path(__file__).parent.joinpath(*folders[1:])
    for entry in sys.path:
        other = Path(entry or ".").joinpath(*folders)
        for path in (other / f"{stem}{suffix}" for suffix in EXTENSION_SUFFIXES):
            if path.is_file() and _same_content(folder / f"{stem}.c", other / f"{stem}.c"):
                return _load_file(name, path)
    return None


def _same_content(one: Path, other: Path) -> bool:
    try:
        return one.read_bytes() == other.read_bytes()
    except OSError:
        return False


def _load_file(name: str, path: Path) -> ModuleType | None:
    loader = ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError:
        # A library that the extension needs is missing.
        return None
    sys.modules[name] = module
    return module
