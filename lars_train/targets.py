"""Import a function that the user names as ``package.module:function``.

A file from a stranger must not run code, so a name from a checkpoint, a run's record or a saved config is imported only
if the command line gives the same name (`check_named`).
"""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lars_train.errors import ConfigError, did_you_mean
from lars_train.messages import first_line

OBJECT = "object:"
"""The start of a name for an object that exists only in a Python program. A hash of the object follows."""

# Matches the files of the code that calls the user's code: the import system, this package, and torch's modules.
_FOLDERS = "|".join(re.escape(f"{Path(file).parent}/") for file in (importlib.__file__, __file__))
_CALLERS = re.compile(rf"<frozen |{_FOLDERS}|.*torch/nn/modules/module\.py")


def load_target(target: str, key: str) -> Callable[..., Any]:
    """Return the function or class at `target`, from the current folder or the installed packages.

    The current folder stays on ``sys.path``, where ``python -m`` also puts it. `key`: the config key, for messages.

    Raises `ConfigError` if `target` is not ``package.module:function``, if the module is missing or raises an error, or
    if its attribute is missing or cannot be called.
    """
    where = f"{key}={target}"
    if target.startswith(OBJECT):
        raise ConfigError(
            f"{where}: this names an object of a Python program. Call lars_train.train, evaluate or plan there, "
            f"with the argument {key.partition('.')[0]}."
        )
    module_name, _, name = target.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise ConfigError(f"{where}: give package.module:function, such as my_code:make.")
    here = str(Path.cwd())
    if not {"", here}.intersection(sys.path):
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module_name}.".startswith(f"{missing}."):
            raise ConfigError(
                f"{where}: there is no module {missing} in the current folder ({here}) or among the installed "
                "packages; start in the folder that contains it, or install its package."
            ) from None
        raise ConfigError(f"{where}: the import of {module_name} fails{describe_failure(error)}") from error
    if not hasattr(module, name):
        raise ConfigError(f"{where}: the module {module_name} has no {name}.{did_you_mean(name, vars(module))}")
    found = getattr(module, name)
    if not callable(found):
        raise ConfigError(f"{where}: it is a {type(found).__name__}; give a function or a class.")
    return found  # type: ignore[no-any-return]


def check_named(key: str, target: str | None, overrides: Iterable[str]) -> None:
    """Raise `ConfigError` if `target`, the value of `key`, comes from a file and not from the command line.

    The name of an object refers to no code, so it is accepted.
    `overrides`: the settings of the command line.
    """
    if target is None or target.startswith(OBJECT):
        return
    if key not in {override.lstrip("+").partition("=")[0] for override in overrides}:
        raise ConfigError(
            f"{key}={target} comes from a file. Its code runs only if the command line names it: add {key}={target}"
        )


def describe_failure(error: BaseException) -> str:
    """Return `` in FILE, line N: KIND: TEXT`` for an exception that the user's code raised."""
    file, line = None, None
    if isinstance(error, SyntaxError):
        file, line = error.filename, error.lineno
    for frame in traceback.extract_tb(error.__traceback__):
        # Take the outermost file that is not one of the callers, and the innermost line in it.
        if file in (None, frame.filename) and not _CALLERS.match(frame.filename):
            file, line = frame.filename, frame.lineno
    place = "" if file is None else f" in {file}, line {line}"
    return f"{place}: {type(error).__name__}: {first_line(str(error))}"
