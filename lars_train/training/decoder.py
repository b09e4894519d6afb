"""Which decoder a run's JPEGs go through: decided when it starts, kept when it goes on, and told where it matters.

The two make pixels at most 1 level apart (docs/input.md). So that nothing changes unsaid, a continuation stays with the
run's first one wherever it can.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lars_train.config import AUTO, Config
from lars_train.data import native
from lars_train.data.source import Source
from lars_train.errors import ConfigError
from lars_train.training.distributed import Group

NATIVE, PILLOW = "native", "pillow"


def check_decoder(config: Config) -> None:
    """Raise `ConfigError` where data.decoder=native is wanted and not there."""
    if config.data.decoder == NATIVE and not native.is_there():
        raise ConfigError(f"data.decoder=native: the decoder in C is not there. {native.REMEDY} Or: data.decoder=auto.")


def choose_decoder(config: Config, stored: str | None, group: Group, device: torch.device) -> str:
    """``native`` or ``pillow``: as the config says, else as `stored` says, else native. Collective.

    The same on every rank: Pillow if the native one is not on all of them. Raises `ConfigError` for
    data.decoder=native where this rank or another has none.
    """
    check_decoder(config)
    everywhere = bool(group.minimum(int(native.is_there()), device))
    wanted = config.data.decoder
    if wanted == NATIVE and not everywhere:
        raise ConfigError(
            f"data.decoder=native: another rank has no decoder in C. {native.REMEDY} Or: data.decoder=auto."
        )
    if wanted == AUTO:
        wanted = stored if stored in (NATIVE, PILLOW) else NATIVE
    return wanted if everywhere else PILLOW


def decoder_lines(wanted: str, decided: str, stored: str | None, split: Source) -> Iterator[str]:
    """What to say of it at the start of a run, a line each; nothing where `split` has no JPEGs."""
    if not native.has_jpegs(split):
        return
    missing = wanted != PILLOW and not native.is_there()
    if stored is not None and decided != stored:
        yield (
            f"WARNING: this run's JPEGs were decoded by {stored} so far and are by {decided} from here on: pixels "
            "differ by at most 1 level, and the weights will not be bit for bit those of a run without this change."
        )
    elif wanted == AUTO and stored == PILLOW and native.is_there():
        yield "NOTE: JPEGs are decoded by Pillow, as this run began; data.decoder=native is faster, 1 level apart."
    elif wanted == AUTO and decided == PILLOW and native.is_there():
        yield "NOTE: JPEGs are decoded by Pillow, for another rank has no decoder in C."
    if missing:
        yield f"NOTE: JPEGs are decoded by Pillow, at under half the speed: none in C is there. {native.REMEDY}"
