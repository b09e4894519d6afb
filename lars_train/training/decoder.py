"""Which decoder a run's JPEGs go through: decided when it starts, kept when it goes on, and told where it matters.

On the CPU their pixels are at most 1 level apart (docs/input.md). So that nothing changes unsaid, a continuation stays
with the run's first one wherever it can.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

from lars_train.config import AUTO, Config
from lars_train.data import library, native
from lars_train.data.decode import GPU, LIBRARY, NATIVE, PILLOW
from lars_train.data.source import Source
from lars_train.errors import ConfigError
from lars_train.training.distributed import Group

FASTEST_FIRST = (NATIVE, LIBRARY)
"""What auto chooses from, before Pillow."""

NAMES = {NATIVE: "the decoder in C", LIBRARY: "nvImageCodec", PILLOW: "Pillow", GPU: "nvImageCodec on the GPU"}


def check_decoder(config: Config) -> None:
    """Raise `ConfigError` where the decoder that is wanted is not there. No device is touched."""
    wanted = config.data.decoder
    if wanted == GPU:
        from lars_train.data import gpu

        if config.device == "cpu" or not gpu.is_possible():
            raise ConfigError(f"data.decoder=gpu: no GPU can decode here. {gpu.REMEDY} Or: data.decoder=auto.")
    elif wanted in FASTEST_FIRST and not _is_here(wanted):
        raise ConfigError(f"data.decoder={wanted}: {NAMES[wanted]} is not there. {_remedy(wanted)}")


def choose_decoder(config: Config, stored: str | None, group: Group, device: torch.device) -> str:
    """One of decode.py's: as the config says, else as `stored` says, else the fastest on the CPU. Collective.

    The same on every rank, so one that is on all of them. Raises `ConfigError` where the one that the config names is
    not there on this rank or another.
    """
    check_decoder(config)
    wanted = config.data.decoder
    if wanted != AUTO:
        choices: tuple[str, ...] = (wanted,)
    else:
        choices = ((stored,) if stored in NAMES else ()) + FASTEST_FIRST
    for name in choices:
        reason = _fault(name, device)
        if group.minimum(int(reason is None), device):
            return name
        if name == wanted:
            said = reason or f"another rank has not got {NAMES[name]}."
            raise ConfigError(f"data.decoder={name}: {said} {_remedy(name)}")
    return PILLOW


def decoder_lines(wanted: str, decided: str, stored: str | None, split: Source) -> Iterator[str]:
    """What to say of it at the start of a run, a line each; nothing where `split` has no JPEGs."""
    if not native.has_jpegs(split):
        return
    here = next((name for name in FASTEST_FIRST if _is_here(name)), PILLOW)
    if stored is not None and decided != stored:
        apart = "are others" if GPU in (stored, decided) else "differ by at most 1 level"
        yield (
            f"WARNING: this run's JPEGs were decoded by {stored} so far and are by {decided} from here on: pixels "
            f"{apart}, and the weights will not be bit for bit those of a run without this change."
        )
    if wanted != AUTO or decided in (NATIVE, GPU):
        return
    if here != decided and stored == decided:
        yield (
            f"NOTE: JPEGs are decoded by {NAMES[decided]}, as this run began; data.decoder={here} is faster, and "
            "some pixels may be 1 level apart."
        )
    elif here != decided:
        yield f"NOTE: JPEGs are decoded by {NAMES[decided]}, for another rank has not got {NAMES[here]}."
    elif here == LIBRARY:
        yield f"NOTE: JPEGs are decoded by nvImageCodec; the decoder in C is faster, and not there. {native.REMEDY}"
    else:
        yield (
            "NOTE: JPEGs are decoded by Pillow, at under half the speed: neither nvImageCodec nor the decoder in C is "
            f"there. {library.REMEDY} Or: {native.REMEDY}"
        )


def _is_here(name: str) -> bool:
    return native.is_there() if name == NATIVE else library.is_there()


def _fault(name: str, device: torch.device) -> str | None:
    """Why a decoder cannot be used by this rank; None if it can."""
    if name == PILLOW:
        return None
    if name == GPU:
        return _fault_of_gpu(device)
    return None if _is_here(name) else f"{NAMES[name]} is not there."


@cache
def _fault_of_gpu(device: torch.device) -> str | None:
    from lars_train.data import gpu

    if device.type != "cuda" or not gpu.is_possible():
        return "no GPU can decode here."
    found = gpu.fault(device)
    return None if found is None else f"{device} cannot decode: {found}."


def _remedy(name: str) -> str:
    if name == GPU:
        from lars_train.data import gpu

        return f"{gpu.REMEDY} Or: data.decoder=auto."
    return f"{library.REMEDY if name == LIBRARY else native.REMEDY} Or: data.decoder=auto."
