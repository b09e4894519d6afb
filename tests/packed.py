"""Requests to pack a data set, and the contents of data sets and folders for comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lars_train.data.dataset import Dataset
from lars_train.pack.encode import Encoding
from lars_train.pack.packing import Request


def request(root: str, store: Path, **changes: Any) -> Request:
    settings: dict[str, Any] = {"encoding": Encoding(), "shards": 3, **changes}
    return Request(source=root, store=str(store), **settings)


def everything(data: Dataset) -> list[tuple[str, int, bytes]]:
    return [(s.name(i), int(s.labels[i]), bytes(s.read(i))) for s in (data.train, data.val) for i in range(len(s))]


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
