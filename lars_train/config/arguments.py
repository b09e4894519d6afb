"""Prepare the command line for Hydra.

Hydra's grammar reads text such as ``12_34`` as a number and rejects text that is not ASCII. This module therefore
quotes the values of groups and of keys whose type is text, including Hydra's own keys. It raises an error for settings
that Hydra would misread or ignore.
"""

from __future__ import annotations

import contextlib
import os
import re
import typing
from collections.abc import Iterator
from pathlib import Path

from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError
from omegaconf import OmegaConf

from lars_train.config.keys import GROUPS, TEXT, is_text, probable_keys, section_keys, types_within
from lars_train.config.schema import MODES, choices_of, nominal_batch
from lars_train.errors import ConfigError

HELP = {"--help", "-h"}
SWEEP = {"--multirun", "-m"}
_INFORMATION_FLAGS = {*HELP, "--hydra-help", "--version", "--shell-completion", "-sc"}
_FLAGS = {*_INFORMATION_FLAGS, *SWEEP, "--resolve", "--run", "-r", "--info", "-i", "--"}
_WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--experimental-rerun"}
_VALUE_ATTACHED = re.compile(r"(?:--(?:cfg|info|package|experimental-rerun)=|-[cpi](?![pnd])\w)")
_INFO_TOPICS = {"all", "config", "defaults", "defaults-tree", "plugins", "searchpath"}
_CONFIG_FLAGS = {"--config", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"}
FILE_FLAG = "--config-file"

# Text that Hydra's grammar leaves unchanged, except for _RESERVED_WORDS. Interpolations count as text.
_UNQUOTED_TEXT = re.compile(r"(?:[A-Za-z_/]|\$\{[^{}]*\})(?:[A-Za-z0-9_./-]|\$\{[^{}]*\})*|[1-9]\d*k")
_RESERVED_WORDS = {"null", "true", "false", "inf", "nan"}
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
# Hydra's sweep functions. Those in _CHOICE_FUNCTIONS remove one pair of quotes from their values.
_CHOICE_FUNCTIONS = re.compile(r"(\s*(?:choice|shuffle|sort)\s*\()(.*)(\)\s*)", re.DOTALL)
_OTHER_FUNCTIONS = re.compile(r"\s*(?:range|interval|glob|tag)\s*\(.*\)\s*", re.DOTALL)


def prepare_arguments(arguments: list[str], imagenet_dir: str | None) -> list[str]:
    """Return the command line in a form that Hydra reads correctly.

    Quote text values that Hydra would read as a number, a truth value, null (for a group) or a missing value. Allow any
    key in the kwargs of optimizer, model and data. If IMAGENET_DIR is set, make ImageNet the default data set.

    Raises `ConfigError` for a word that is neither a setting nor a flag, and for a misused group.
    """
    settings, flags = _settings_and_flags(arguments)
    for setting in settings:
        _check_misread(setting)
    hydra_types = _hydra_types(settings)
    prepared = [_prepare(setting, hydra_types) for setting in settings]
    keys = {setting.partition("=")[0] for setting in settings}
    # To evaluate or export a checkpoint, take the data set from the checkpoint.
    from_checkpoint = "checkpoint.path" in keys and bool({"mode=evaluate", "mode=export"} & set(settings))
    if imagenet_dir and "data" not in keys and not from_checkpoint and _INFORMATION_FLAGS.isdisjoint(flags):
        prepared.append("data=imagenet")
    # argparse requires that settings are contiguous, so flags and their values move to the end.
    return prepared + flags


def take_config_file(arguments: list[str]) -> tuple[list[str], Path | None]:
    """Return the arguments without ``--config-file FILE``, and the path FILE (None without the flag).

    Raises `ConfigError` if FILE is missing or given twice.
    """
    rest, file, remaining = [], None, iter(arguments)
    for argument in remaining:
        flag, equals, value = argument.partition("=")
        if flag != FILE_FLAG:
            rest.append(argument)
            continue
        value = value if equals else next(remaining, "")
        if not value or file is not None:
            raise ConfigError(f"{FILE_FLAG}: name one file, such as {FILE_FLAG} runs/RUN/config.yaml.")
        file = Path(value).expanduser()
    return rest, file


def quoted(text: str) -> str:
    """Return `text` quoted and escaped so that Hydra reads it back unchanged."""
    return str(QuotedString(text, Quote.single).with_quotes())


def _settings_and_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the settings, and the flags with their values."""
    settings: list[str] = []
    flags: list[str] = []
    numbers = iter(range(len(arguments)))
    for number in numbers:
        argument, following = arguments[number], "".join(arguments[number + 1 : number + 2])
        if argument in _FLAGS or _VALUE_ATTACHED.match(argument):
            flags.append(argument)
            if argument in ("--info", "-i") and following in _INFO_TOPICS:
                flags.append(arguments[next(numbers)])
        elif argument in _WITH_VALUE:
            flags += arguments[number : number + 2]
            next(numbers, None)
        elif argument.startswith("-"):
            raise ConfigError(_explain_unknown_flag(argument, following))
        elif argument.startswith("~") or argument.find("=") > 0:
            settings.append(argument)
        else:
            raise ConfigError(_explain_stray_word(arguments, number))
    return settings, flags


def _explain_unknown_flag(argument: str, following: str) -> str:
    flag, equals, value = argument.partition("=")
    if flag in _CONFIG_FLAGS:
        return f"{flag}: the folder of configs is part of lars-train. To run from a saved file: {FILE_FLAG} FILE."
    value = value if equals else "" if following.startswith("-") or "=" in following else following
    name = flag.lstrip("-").replace("-", "_")
    probable = [name] if name in GROUPS or is_text(name) else probable_keys(name)
    if len(probable) == 1:
        return f"{argument}: a setting has no dashes; write {probable[0]}={value or '...'}"
    return f"{argument}: unknown flag. A setting is key=value; lars-train --help lists the keys."


def _explain_stray_word(arguments: list[str], number: int) -> str:
    """Return an error message for argument `number`, which is neither a setting nor a flag, with the correct form."""

    def joined(left: str, right: str) -> bool:
        return not left.startswith("-") and (left.endswith(("=", ",")) or right.startswith(("=", ",")))

    first = last = number
    while first > 0 and joined(arguments[first - 1], arguments[first]):
        first -= 1
    while last + 1 < len(arguments) and joined(arguments[last], arguments[last + 1]):
        last += 1
    words, word = arguments[first : last + 1], arguments[number]
    if len(words) > 1:
        return f"{' '.join(words)}: a setting has no spaces around = and the commas; write {''.join(words)}"
    following = arguments[number + 1] if number + 1 < len(arguments) else ""
    if following and not following.startswith("-") and "=" not in following and probable_keys(word) == [word]:
        return f"{word} {following}: a setting is key=value; write {word}={following}"
    whole = [f"{group}={word}" for group in GROUPS if word in choices_of(group)]
    whole += [f"mode={word}"] if word in MODES else []
    if len(whole) == 1:
        return f"{word}: a setting is key=value; write {whole[0]}"
    before = arguments[number - 1] if number else ""
    if before.find("=") > 0:
        key, _, value = before.partition("=")
        return (
            f"{word}: a setting is key=value. If it belongs to {key}, quote the space for the shell: "
            f"{key}='{value} {word}'"
        )
    return f"{word}: a setting is key=value; lars-train --help lists the keys."


def _check_misread(setting: str) -> None:
    """Raise `ConfigError` for a setting that Hydra would ignore or misread."""
    key, equals, value = setting.partition("=")
    name = key.lstrip("+~").partition("@")[0]
    if name in GROUPS:
        if key.startswith("~"):
            raise ConfigError(f"{setting}: a run needs a choice for every group; give {name}=... instead.")
        if key != name:
            raise ConfigError(f"{setting}: every run has one choice for the group {name}; write {name}={value}")
        if any(part.strip().startswith(("[", "{")) for part in split(value)):
            several = re.sub(r"[\[\]{}\s]", "", value)
            raise ConfigError(
                f"{setting}: a run has one choice for the group {name}. For one run per choice: -m {name}={several}"
            )
    keys = section_keys(name)
    if name not in GROUPS and keys and equals:
        raise ConfigError(f"{setting}: {name} is a section, not a key; set one of {', '.join(keys)}.")
    if is_text(name) and value.strip() == "???":
        raise ConfigError(f"{setting}: in Hydra, ??? stands for a missing value; give another value.")
    if (is_text(name) or name in GROUPS) and len(split(value)) > 1 and not all(part.strip() for part in split(value)):
        raise ConfigError(f"{setting}: a value is missing before or after a comma.")


def _hydra_types(settings: list[str]) -> dict[str, typing.Any]:
    """Return the type hints of the keys of Hydra and its chosen launcher, or nothing if `settings` use no such key."""
    if not any(setting.lstrip("+").startswith("hydra.") for setting in settings):
        return {}
    types = types_within(HydraConf, "hydra.")
    Plugins.instance()  # installed launchers register their configs
    for setting in settings:
        group, _, name = setting.partition("=")
        if group == "hydra/launcher":
            with contextlib.suppress(ConfigLoadError):  # Hydra lists the launchers that exist
                kind = OmegaConf.get_type(ConfigStore.instance().load(f"{group}/{name}.yaml").node)
                types |= types_within(typing.cast(type, kind), "hydra.launcher.")
    return types


def _prepare(setting: str, hydra_types: dict[str, typing.Any]) -> str:
    key, equals, value = setting.partition("=")
    if not equals or key.startswith("~"):
        return setting
    if key in GROUPS:
        if key == "batch":
            value = _rename_batches(value.lower())
        return f"{key}={_quoted_values(value, null=False)}"
    name = key.lstrip("+")
    if is_text(name):
        return f"{key}={_quoted_values(value, null=True)}"
    # The values of a mapping from text to text, such as hydra.job.env_set, are also text.
    in_texts = typing.get_args(hydra_types.get(name.rpartition(".")[0])) == (str, str)
    if in_texts or hydra_types.get(name) in TEXT:
        # Hydra does not sweep over its own keys, so a comma is part of the text.
        return f"{key}={_quote_text(value, null=True, in_function=False)}"
    if ".".join(key.split(".")[:2]) in ("optimizer.kwargs", "model.kwargs", "data.kwargs"):
        return f"++{setting}"
    if value.startswith("~"):
        # Shells do not expand a tilde after "=", and Hydra cannot read it.
        value = os.path.expanduser(value)  # noqa: PTH111 (keep ~name if there is no such user)
        return f"{key}={quoted(value)}" if key.startswith("hydra.") else f"{key}={value}"
    # Hydra's grammar rejects text that is not ASCII unless it is quoted, also for Hydra's own untyped keys.
    return f"{key}={quoted(value)}" if key.startswith("hydra.") and not value.isascii() else setting


def _rename_batches(value: str) -> str:
    """Replace batch sizes in `value` by the names of their choices: ``4096`` becomes ``4k``."""
    names = {str(nominal_batch(name)): name for name in choices_of("batch")}
    return re.sub(r"(?<![\w.+-])\d+(?![\w.-])", lambda found: names.get(found.group(), found.group()), value)


def split(value: str) -> list[str]:
    """Split a sweep into its values, at commas outside quotes and interpolations."""
    return list(_split(value)) if "," in value else [value]


def _split(value: str) -> Iterator[str]:
    start = position = 0
    while position < len(value):
        if not value[start:position].strip() and (found := _QUOTED.match(value, position)):
            # Skip quoted text. Text that only begins with a quotation mark is split at every comma.
            end = found.end()
            position = end if not value[end:].strip() or value[end:].lstrip().startswith(",") else position + 1
        elif value.startswith("${", position):
            position = _interpolation_end(value, position)
        elif value[position] == ",":
            yield value[start:position]
            start = position = position + 1
        else:
            position += 1
    yield value[start:]


def _interpolation_end(value: str, start: int) -> int:
    depth, position = 1, start + 2
    while position < len(value) and depth:
        depth += {"{": 1, "}": -1}.get(value[position], 0)
        position += 1
    return position if not depth else start + 2


def _quoted_values(value: str, *, null: bool) -> str:
    """Quote `value`, or each value of a sweep, as text for Hydra. With `null`, leave the word null unquoted."""
    found = _CHOICE_FUNCTIONS.fullmatch(value)
    if found and null and "choice" in found.group(1):
        # A plain list of values makes the same sweep, and Hydra then keeps the quotes.
        value, found = found.group(2), None
    if found:
        head, values, tail = found.groups()
        return f"{head}{','.join(_quote_one(part, null=null, in_function=True) for part in split(values))}{tail}"
    if _OTHER_FUNCTIONS.fullmatch(value):
        return value
    parts = split(value)
    if len(parts) == 1 and null:
        # Spaces around a single value belong to the text; spaces around the commas of a sweep do not.
        return _quote_text(value, null=null, in_function=False)
    return ",".join(_quote_one(part, null=null, in_function=False) for part in parts)


def _quote_one(part: str, *, null: bool, in_function: bool) -> str:
    core = part.strip()
    head, _, tail = part.partition(core) if core else (part, "", "")
    is_call = in_function and re.match(r"\w+\s*=|\[|\w+\s*\(", core)
    return part if is_call else f"{head}{_quote_text(core, null=null, in_function=in_function)}{tail}"


def _quote_text(text: str, *, null: bool, in_function: bool) -> str:
    if text.startswith("~"):
        # Shells do not expand a tilde after "=".
        text = os.path.expanduser(text)  # noqa: PTH111 (keep ~name if there is no such user)
    is_null = null and text.lower() == "null"
    if not text or is_null or (_UNQUOTED_TEXT.fullmatch(text) and text.lower() not in _RESERVED_WORDS):
        return text
    result = text if _QUOTED.fullmatch(text) else quoted(text)
    # A sweep function of Hydra removes one pair of quotes from a value, and puts a backslash before each of the
    # characters in the pattern below. Hydra reads a value with a backslash as text. A value without one needs a second
    # pair of quotes, because Hydra could read it as a number.
    twice = in_function and not re.search(r"[\\()\[\]{}:=, \t]", result)
    return str(QuotedString(result, Quote.double).with_quotes()) if twice else result
