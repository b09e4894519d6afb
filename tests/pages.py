"""Extract the commands on the documentation pages, with their place and the resource that each needs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The tests run the commands in this order of pages. Later commands use the runs of the first page.
PAGES = [ROOT / "docs" / "getting_started.md", ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted(path for path in ROOT.glob("docs/*.md") if path not in PAGES)
# Marks of a command that the tests do not run. They are in its comment or in the paragraph before its block.
_MARK = re.compile(
    r"\b(needs (?:ImageNet|a cluster|a GPU|object storage|the network|your photographs)|takes (?:hours|minutes))\b"
)
# A command with one of these words needs no mark; docs/index.md lists them.
_MARKED_BY_WORD = re.compile(r"imagenet\b|--nnodes|\bsrun\b|\bsbatch\b|\bkubectl\b|submitit_slurm")
_FORMULA = re.compile(r"\S+\s+[=≈] ")
_KEYWORDS = {"until", "do", "done", "while", "if", "then", "fi"}
_REDIRECTED = re.compile(r"\d?[<>]+&?\S+")


@dataclass(frozen=True)
class Command:
    """A command. `line`: the number of its first line. `text`: its lines joined, without the comment."""

    page: Path
    line: int
    text: str
    comment: str = ""
    needs: str = ""

    @property
    def where(self) -> str:
        """Return page and line, as the id of a test."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Block:
    """A code block with its commands."""

    page: Path
    commands: tuple[Command, ...]


def blocks(page: Path, text: str | None = None) -> Iterator[Block]:
    """Yield the blocks in `page` that are unmarked or marked as shell commands, except those with only formulas."""
    lines = (page.read_text() if text is None else text).splitlines()
    number = 0
    while number < len(lines):
        if not lines[number].startswith("```"):
            number += 1
            continue
        language, first = lines[number][3:].strip(), number + 1
        last = next(end for end in range(first, len(lines)) if lines[end].startswith("```"))
        body = lines[first:last]
        if language in ("", "sh", "bash", "console") and not all(map(_FORMULA.match, body)):
            yield Block(page, tuple(_commands(page, body, first + 1, _paragraph(lines[:number]))))
        number = last + 1


def inline(page: Path) -> Iterator[Command]:
    """Yield the commands in code spans of a page: a program of this package, torchrun, srun, or a Python script."""
    text = re.sub(r"^```.*?^```", lambda block: "\n" * block.group().count("\n"), page.read_text(), flags=re.S | re.M)
    for found in re.finditer(r"`((?:python scripts/|lars-train |lars-report |lars-data |torchrun |srun )[^`]+)`", text):
        yield Command(page, text[: found.start()].count("\n") + 1, " ".join(found.group(1).split()))


def parts(command: str) -> list[list[str]]:
    """Return the words of each program call in a shell line, without redirections, variables and keywords."""
    lexer = shlex.shlex(_REDIRECTED.sub("", command), posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    lexer.commenters = ""
    calls: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(";&|"):
            calls.append([])
        elif calls[-1] or not (word in _KEYWORDS or re.fullmatch(r"[A-Z_]+=\S*", word)):
            calls[-1].append(word)
    return [call for call in calls if call]


def _commands(page: Path, body: list[str], first: int, before: str) -> Iterator[Command]:
    at_top = _MARK.search(before)
    number = 0
    while number < len(body):
        start, text, comment = number, "", ""
        while True:
            code, _, remark = re.sub(r"\s+#\s", "\0", body[number]).partition("\0")
            number += 1
            comment += remark
            if not code.endswith("\\") or number == len(body):
                text += code
                break
            text += code[:-1].rstrip() + " "
        if not text.strip() or text.lstrip().startswith("#"):
            continue
        text = " ".join(text.split()) if "'" not in text else text.strip()
        mark = _MARK.search(comment) or at_top or _MARKED_BY_WORD.search(text)
        yield Command(page, first + start, text, comment.strip(), mark.group() if mark else "")


def _paragraph(lines: list[str]) -> str:
    """Return the last paragraph of `lines`."""
    return "\n".join(lines).rstrip().rpartition("\n\n")[2]
