"""Code, configs, scripts and tests avoid words that have a plainer alternative."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEVER = {
    r"tell|tells|told|telling": "print, report, log, say",
    r"mend|mends|mended|mending": "fix",
    r"anew|once more": "again",
    r"(?:go|goes|going|gone|went) on": "resume, continue",
    r"pictures?": "image; figure or plot for a drawing",
    r"is there|are there|isn't there|is not there": "exists, is available, is missing",
    r"awaits?|in the course of|of (?:its|their) own": "waits for, during, its own",
    r"whoever|wherever|such an? one": "the caller, where, one",
    r"first (?:process|rank)": "rank 0",
    r"passed over": "skipped",
    r"taken literally|kept as (?:it is|they are)": "used as given, unchanged",
    r"let alone|for want of|has a use for": "unchanged, because ... is missing, uses",
    r"is told|are told|is had|are had|is seen to|what one wants": "name the actor",
    r"\w*(?:colour|behaviour|neighbour|normalis|optimis|initialis|synchronis)\w*": "American spelling",
}
PATTERN = re.compile("|".join(rf"(?P<w{i}>(?<![\w.-])(?:{p})(?![\w-]))" for i, p in enumerate(NEVER)), re.IGNORECASE)
# Exceptions: names that users rely on, or that belong to other programs.
NAMES = re.compile(r"plan\.picture|\bpicture: Optional|def tell\(|\.tell\(|.pictures\"|'optimiser'|optimiser=")
FIRST_WORDS = re.compile(r"(?:Whether|What|How|Of)\b")
SUFFIXES = {".py", ".yaml", ".c", ".sh", ".sbatch"}
FILES = sorted(
    path
    for folder in ("lars_train", "configs", "scripts", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in SUFFIXES and path != Path(__file__)
)


def found(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        for match in PATTERN.finditer(NAMES.sub("", line)):
            better = list(NEVER.values())[int(str(match.lastgroup)[1:])]
            yield number, f"{match.group()!r}: {better}"


def docstrings(text: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (words := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), words


def test_forbidden_words_are_found_but_not_parts_of_words() -> None:
    assert [line for line, _ in found("told\nretold, storyteller\nplan.picture\nThe picture goes on\n")] == [1, 4, 4]


@pytest.mark.parametrize("folder", ["lars_train", "configs", "scripts", "tests"])
def test_no_forbidden_word_is_used(folder: str) -> None:
    files = [path for path in FILES if path.is_relative_to(ROOT / folder)]
    assert files
    hits = [f"{path.relative_to(ROOT)}:{line}: {hit}" for path in files for line, hit in found(path.read_text())]
    assert not hits, "\n".join(hits)


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    hits = [
        f"{path.relative_to(ROOT)}:{line}: {words.splitlines()[0]}"
        for path in FILES
        if path.suffix == ".py"
        for line, words in docstrings(path.read_text())
        if FIRST_WORDS.match(words)
    ]
    assert not hits, "\n".join(hits)
