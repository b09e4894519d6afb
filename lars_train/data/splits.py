"""The names that training and validation sets have, in folders, tar shards and parquet alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import NamedTuple

from lars_train.errors import ConfigError
from lars_train.messages import listed, printable

TRAIN, VAL, TEST = "train", "val", "test"

SPLITS = (TRAIN, VAL)
"""The names that splits have in a store, and in the data sets that come with this package."""

VALIDATION = (VAL, "valid", "validation", "dev", TEST)
"""The names of a validation set, in order of preference. A test set comes last, and the run says so."""

# Names that are no classes either, and that no reader takes for a split.
_OTHERS = ("training", "testing", "eval", "evaluation", "trainval", "unlabeled", "unlabelled", "holdout")
_WORDS = frozenset((TRAIN, *VALIDATION, *_OTHERS, "trainset", "valset", "testset"))
_TRAINING, _UNLABELLED = frozenset((TRAIN, "training", "trainval", "trainset")), frozenset(("unlabeled", "unlabelled"))
# Beside these, they make no class of a part.
_FILLERS = frozenset(("set", "split", "images", "data"))


class Choice(NamedTuple):
    """The names chosen for each split as their owner spells them, and the other names of splits that exist."""

    train: str | None
    val: str | None
    unused: tuple[str, ...]


def choose(names: Iterable[str], usable: Callable[[str], bool] = lambda name: True) -> Choice:
    """Choose the training and the validation set among `names`, in any case of letters.

    `usable`: decides whether a name can serve as the validation set.
    """
    # Where two names differ in case alone, the one in lower case wins.
    splits = sorted((name for name in names if is_split(name)), key=lambda name: (name != name.lower(), name))
    train = next((name for name in splits if name.lower() == TRAIN), None)
    ranked = sorted((name for name in splits if name.lower() != TRAIN), key=lambda name: VALIDATION.index(name.lower()))
    val = next((name for name in ranked if usable(name)), None)
    return Choice(train, val, tuple(name for name in splits if name not in (train, val)))


def is_split(name: str) -> bool:
    """Return True for a name of a split, in any case of letters."""
    return name.lower() in (TRAIN, *VALIDATION)


def is_like_split(name: str) -> bool:
    """Return True for a name that stands for a part of a data set alone: ``test``, ``train2017``, ``Test Set``."""
    words = set(_words(name))
    return not words.isdisjoint(_WORDS) and words <= _WORDS | _FILLERS


def is_like_training(name: str) -> bool:
    """Return True for a name that stands for a training set alone: ``train``, ``training``, ``Train Set``."""
    return is_like_split(name) and not _TRAINING.isdisjoint(_words(name))


def is_like_validation(name: str) -> bool:
    """Return True for a name that stands for a labelled part for no training alone: ``val``, ``eval``, ``Test Set``."""
    return is_like_split(name) and (_TRAINING | _UNLABELLED).isdisjoint(_words(name))


def with_splits(folders: Mapping[str, Set[str]], count: int) -> str:
    """The first of `count` would-be classes that is a data set, for it holds splits; empty where they can be classes.

    `folders`: the names of the folders in each that has some. A training and a validation set in one class are enough,
    and so they are spread over several where more than half of the classes hold either.
    """
    training = [name for name, inside in folders.items() if any(map(is_like_training, inside))]
    validation = [name for name, inside in folders.items() if any(map(is_like_validation, inside))]
    both = [name for name in training if name in validation]
    if not both and training and validation and 2 * len({*training, *validation}) > count:
        both = training
    return min(both, default="")


def refuse_twins(where: str, choice: Choice) -> None:
    """Raise `ConfigError` where a folder's name differs from that of a chosen split in the case of letters alone."""
    for name in (choice.train, choice.val):
        for other in choice.unused:
            if name is not None and name.lower() == other.lower():
                raise ConfigError(
                    f"{where}: the names {printable(name)}/ and {printable(other)}/ differ in the case of letters "
                    "alone; move the content of both into one, or rename the one that is not to be read."
                )


def has_split_word(name: str) -> bool:
    """Return True for a name with the name of a part of a data set as a word: ``train2017``, ``Test Set``."""
    return not _WORDS.isdisjoint(_words(name))


def no_classes(names: Sequence[str], *, split: bool = False) -> list[str]:
    """The names among those of folders that are parts of a data set, where the folders cannot all be classes.

    Empty where they can. One name of a part alone is enough, and so are such words in half of the names.
    `split`: the folders lie in a split, where a class may be called ``train``; more than half are called so there.
    """
    alike = [name for name in names if is_like_split(name)]
    if split:
        return alike if 2 * len(alike) > len(names) else []
    worded = [name for name in names if has_split_word(name)]
    return worded if 2 * len(worded) >= len(names) else alike


def split_word(name: str) -> str:
    """Return the first of all names of splits that is a word in the name of a file; empty without one."""
    words = _words(name)
    return next((split for split in (TRAIN, *VALIDATION) if split in words), "")


def refuse_other_words(where: str, names: Iterable[str]) -> None:
    """Raise `ConfigError` where files of no split have a name of a part of a data set that is not read as a split."""
    wrong = [name for name in names if has_split_word(name)]
    if wrong:
        raise ConfigError(
            f"{where}: the names look like those of splits ({listed(wrong)}); name the splits train and val."
        )


def other_word(name: str) -> str:
    """Return the first word in the name of a file that is of a part of a data set but no split; empty without one."""
    return next((word for word in _words(name) if word in _WORDS), "")


def _words(name: str) -> list[str]:
    return "".join(c if c.isalpha() else " " for c in name.lower()).split()
