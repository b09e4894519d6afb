"""Recognize training and validation sets by name, in folders, tar shards and parquet files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import NamedTuple

from lars_train.errors import ConfigError
from lars_train.messages import listed, printable

TRAIN, VAL, TEST = "train", "val", "test"

SPLITS = (TRAIN, VAL)
"""The names of the splits in a store, and in the data sets that come with this package."""

VALIDATION = (VAL, "valid", "validation", "dev", TEST)
"""The names of a validation set, in order of preference. A test set comes last, and the log says that it is used."""

# Other names for parts of a data set. Readers accept them neither as splits nor as classes.
_OTHERS = ("training", "testing", "eval", "evaluation", "trainval", "unlabeled", "unlabelled", "holdout")
_WORDS = frozenset((TRAIN, *VALIDATION, *_OTHERS, "trainset", "valset", "testset"))
_TRAINING, _UNLABELLED = frozenset((TRAIN, "training", "trainval", "trainset")), frozenset(("unlabeled", "unlabelled"))
# Words that may accompany a split word: a name such as "Test Set" still denotes a split, not a class.
_FILLERS = frozenset(("set", "split", "images", "data"))


class Choice(NamedTuple):
    """The chosen name of each split in its original case, and the other split names found."""

    train: str | None
    val: str | None
    unused: tuple[str, ...]


def choose_splits(names: Iterable[str], usable: Callable[[str], bool] = lambda name: True) -> Choice:
    """Choose the training and the validation set among `names`, ignoring case.

    `usable`: return True if a name can serve as the validation set.
    """
    # Of two names that differ only in case, the lower-case one wins.
    splits = sorted((name for name in names if is_split_name(name)), key=lambda name: (name != name.lower(), name))
    train = next((name for name in splits if name.lower() == TRAIN), None)
    ranked = sorted((name for name in splits if name.lower() != TRAIN), key=lambda name: VALIDATION.index(name.lower()))
    val = next((name for name in ranked if usable(name)), None)
    return Choice(train, val, tuple(name for name in splits if name not in (train, val)))


def is_split_name(name: str) -> bool:
    """Return True if `name` is the name of a split, ignoring case."""
    return name.lower() in (TRAIN, *VALIDATION)


def looks_like_split(name: str) -> bool:
    """Return True if `name` consists of split words and fillers only: ``test``, ``train2017``, ``Test Set``."""
    words = set(_words(name))
    return not words.isdisjoint(_WORDS) and words <= _WORDS | _FILLERS


def looks_like_training(name: str) -> bool:
    """Return True if `name` looks like that of a training set: ``train``, ``training``, ``Train Set``."""
    return looks_like_split(name) and not _TRAINING.isdisjoint(_words(name))


def looks_like_validation(name: str) -> bool:
    """Return True if `name` looks like that of a labeled validation or test set: ``val``, ``eval``, ``Test Set``."""
    return looks_like_split(name) and (_TRAINING | _UNLABELLED).isdisjoint(_words(name))


def find_nested_splits(folders: Mapping[str, Set[str]], count: int) -> str:
    """Return the first supposed class folder that is in fact a data set, with splits in it; empty if there is none.

    `folders`: the names of the subfolders of each supposed class that has any. `count`: the number of all supposed
    classes. A class with a training set and a validation set is a data set. If no class has both, the first class with
    a training set is returned, provided that some class has a validation set and that more than half of all classes
    have one of the two.
    """
    training = [name for name, inside in folders.items() if any(map(looks_like_training, inside))]
    validation = [name for name, inside in folders.items() if any(map(looks_like_validation, inside))]
    both = [name for name in training if name in validation]
    if not both and training and validation and 2 * len({*training, *validation}) > count:
        both = training
    return min(both, default="")


def reject_case_duplicates(where: str, choice: Choice) -> None:
    """Raise `ConfigError` if the name of an unread folder differs from that of a chosen split only in case."""
    for name in (choice.train, choice.val):
        for other in choice.unused:
            if name is not None and name.lower() == other.lower():
                raise ConfigError(
                    f"{where}: the names {printable(name)}/ and {printable(other)}/ differ only in case; move the "
                    "content of both into one folder, or rename the one that should not be read."
                )


def has_split_word(name: str) -> bool:
    """Return True if `name` contains a split word: ``train2017``, ``cats of the test set``."""
    return not _WORDS.isdisjoint(_words(name))


def find_non_classes(names: Sequence[str], *, split: bool = False) -> list[str]:
    """Return the folder names that denote parts of a data set, not classes; empty if all can be classes.

    If at least half of the names contain a split word, returns these names. Otherwise, returns the names that satisfy
    `looks_like_split`. `split`: the folders lie in a split, where a class may be called ``train``; then the result is
    empty unless more than half of the names look like splits.
    """
    split_like = [name for name in names if looks_like_split(name)]
    if split:
        return split_like if 2 * len(split_like) > len(names) else []
    with_word = [name for name in names if has_split_word(name)]
    return with_word if 2 * len(with_word) >= len(names) else split_like


def split_word(name: str) -> str:
    """Return the first split name that is a word of the file name `name`; empty if there is none."""
    words = _words(name)
    return next((split for split in (TRAIN, *VALIDATION) if split in words), "")


def reject_unread_splits(where: str, names: Iterable[str]) -> None:
    """Raise `ConfigError` if a file outside any split has an unsupported split word in its name: ``eval-0.tar``."""
    wrong = [name for name in names if has_split_word(name)]
    if wrong:
        raise ConfigError(
            f"{where}: the names look like those of splits ({listed(wrong)}); name the splits train and val."
        )


def any_split_word(name: str) -> str:
    """Return the first split word in `name`, supported or not (``eval`` is not); empty if there is none."""
    return next((word for word in _words(name) if word in _WORDS), "")


def _words(name: str) -> list[str]:
    return "".join(c if c.isalpha() else " " for c in name.lower()).split()
