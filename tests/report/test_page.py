from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lars_train.report.compare import make_rows
from lars_train.report.page import page
from lars_train.report.read import read_run

MakeRun = Callable[..., Path]
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """A parsed page: elements with their attributes, and text. Asserts that all elements are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def read(folder: Path, *directories: Path) -> Page:
    return Page(page(make_rows([read_run(directory) for directory in directories]), folder))


def with_ratios(directory: Path) -> Path:
    (directory / "trust_ratios.fields.json").write_text(json.dumps({"layers": ["conv1.weight", "fc.bias"]}))
    lines = [{"update": u, "trust_ratios": [0.001 * u, None]} for u in (1, 2, 3)]
    (directory / "trust_ratios.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def test_the_page_has_all_sections_under_ordered_headings(make_run: MakeRun, tmp_path: Path) -> None:
    found = read(
        tmp_path / "out", make_run("a", "8k"), with_ratios(make_run("b", seed=1)), make_run("c", seed=2, ended=None)
    )
    levels = [int(tag[1]) for tag, _ in found.elements if re.fullmatch(r"h\d", tag)]
    assert levels == [1, 2, 2, 2, 2, 2, 3, 3, 3]
    assert len(found.all("img")) == 5
    assert all(image["alt"] for image in found.all("img"))
    for part in ("Top-1 against epochs", "optimizer.lr", "12.8", "conv1.weight", "0.002", "unfinished at update 12"):
        assert part in found.text
    # Tables are wider than a phone: each scrolls within its box, also by keyboard.
    boxes = [e for e in found.all("div") if e.get("class") == "scroll"]
    assert len(boxes) == len(found.all("table")) == 3
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)


def test_result_and_state_follow_the_batch(make_run: MakeRun, tmp_path: Path) -> None:
    text = page(
        make_rows([read_run(make_run("a", "8k")), read_run(make_run("b", ended="failed", reason="x"))]), tmp_path
    )
    table = text[text.index("<table>") : text.index("</table>")]
    assert re.findall("<th scope=.col.[^>]*>([^<]*)", table)[:3] == ["batch", "best top-1 %", "state"]
    rows = re.findall(
        r'<tr([^>]*)><th scope="row">([^<]*)</th><td [^>]*>[^<]*</td><td class="state">([^<]*)</td>', table
    )
    assert rows == [("", "8k", "finished"), (' class="open"', "32k", "failed at update 12: x")]


def test_the_page_is_self_contained_and_runs_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    text = page(make_rows([read_run(with_ratios(make_run("a")))]), tmp_path)
    found = Page(text)
    assert not {"script", "link", "iframe", "object", "form", "base"} & {tag for tag, _ in found.elements}
    (policy,) = [m["content"] for m in found.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    images = [image["src"] for image in found.all("img")]
    assert all(src.startswith("data:image/svg+xml;base64,") for src in images)
    svgs = [base64.b64decode(src.partition(",")[2]).decode() for src in images]
    addresses = re.findall(r"""(?:href|src|url\()\s*=?\s*["']?([^"')\s>]{1,60})""", "\n".join([text, *svgs]))
    assert addresses
    for address in addresses:
        assert not urlsplit(address).netloc
        assert urlsplit(address).scheme in ("", "data")
    assert "prefers-color-scheme: dark" in text
    assert all("prefers-color-scheme:dark" in svg for svg in svgs)
    assert 'name="viewport"' in text


def test_every_link_leads_to_a_file_of_a_run(make_run: MakeRun, tmp_path: Path) -> None:
    names = ["plain", "javascript:alert(1)", 'a"b<c>&d e#f?g%41', "ü\u202e"]
    found = read(tmp_path / "x" / "out", *(make_run(name, seed=n) for n, name in enumerate(names)))
    links = [a["href"] for a in found.all("a")]
    own = {"table.md", "table.csv", "curves.png", "curves.svg"}
    assert own < set(links)
    targets = [Path(tmp_path / "x" / "out" / unquote(link)).resolve() for link in links if link not in own]
    assert all(urlsplit(link).scheme == "" for link in links)
    assert {t.relative_to(tmp_path.resolve() / "runs") for t in targets} == {
        Path(name) / file for name in names for file in ("run.json", "final.json", "metrics.jsonl")
    }


def test_contents_of_runs_cannot_inject_html(make_run: MakeRun, tmp_path: Path) -> None:
    evil = "\"><script>alert(1)</script><img src=x onerror=y>&lt;\x00\x1b[2J\u202e'`"
    directory = make_run(
        "a<b>",
        batch__size=evil,
        seed=evil,
        model__name=evil,
        global_batch=8,
        optimizer__base=evil,
        **{evil: evil},
    )
    other = make_run("b", ended="failed", reason=evil, **{evil: 3})
    (other / "metrics.jsonl").write_text(f'{evil}\n{{"update": 1, "epoch": 1, "train/loss": 2}}\n')
    record = json.loads((other / "run.json").read_text())
    record["started"][0]["versions"]["torch"] = evil
    record["started"][0]["git"] = {"commit": evil}
    (other / "run.json").write_text(json.dumps(record))
    (directory / "trust_ratios.fields.json").write_text(json.dumps({"layers": [evil]}))
    (directory / "trust_ratios.jsonl").write_text('{"update": 1, "trust_ratios": [1]}\n')
    plain = read(
        tmp_path, with_ratios(make_run("plain")), make_run("more", optimizer__lr=1.0, ended="failed", reason="x")
    )
    found = read(tmp_path, directory, other)
    assert {tag for tag, _ in found.elements} <= {tag for tag, _ in plain.elements}
    assert {k for _, a in found.elements for k in a} == {k for _, a in plain.elements for k in a}
    assert "<script>alert(1)</script>" in found.text
    assert not set("\x00\x1b\u202e") & set(found.text)
