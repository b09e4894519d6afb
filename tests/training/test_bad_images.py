"""`BadImages`: images that cannot be decoded are counted once, limited, and listed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lars_train.data.loading.loader import BadSample
from lars_train.errors import DataError
from lars_train.launch import Ranks
from lars_train.training import guard
from lars_train.training.distributed import Group
from lars_train.training.guard import BadImages


@dataclass(frozen=True)
class FakeGroup(Group):
    """A fake group: this is rank 0 of three, and `others` are the values of the other ranks."""

    others: tuple[dict[str, str], ...] = ({}, {})

    def all_gather(self, value: Any) -> list[Any]:
        return [value, *self.others]


def bad(*places: str) -> Iterable[BadSample]:
    return [BadSample(number, place, f"{place} is broken") for number, place in enumerate(places)]


def test_an_image_found_repeatedly_counts_once() -> None:
    images = BadImages(2, Group(Ranks()))
    images.note(bad("a", "b", "a"))
    images.note(bad("b"))
    assert images.collect() == {"a": "a is broken", "b": "b is broken"}
    images.note(bad("a"))
    assert images.collect() == {}
    assert list(images.known) == ["a", "b"]


def test_bad_images_of_all_ranks_are_combined() -> None:
    images = BadImages(
        4, FakeGroup(Ranks(0, 3), ({"c": "no JPEG", "a": "a is broken"}, {"c": "no JPEG", "b": "empty"}))
    )
    images.note(bad("a"))
    assert images.collect() == {"a": "a is broken", "c": "no JPEG", "b": "empty"}
    assert images.collect() == {}


def test_more_bad_images_than_the_limit_fail_and_are_named() -> None:
    images = BadImages(2, FakeGroup(Ranks(0, 3), ({"c": "no JPEG"}, {})))
    images.note(bad("a"))
    images.collect()
    images.note(bad("d"))
    with pytest.raises(DataError) as error:
        images.collect()
    for part in ("3 images", "data.max_bad=2", "a (a is broken)", "c (no JPEG)", "d (d is broken)"):
        assert part in str(error.value)


def test_a_limit_of_zero_allows_none() -> None:
    images = BadImages(0, Group(Ranks()))
    assert images.collect() == {}
    images.note(bad("a"))
    with pytest.raises(DataError):
        images.collect()


def test_known_bad_images_count_and_are_not_reported_again() -> None:
    images = BadImages(1, Group(Ranks()), known={"a": "a is broken"})
    images.note(bad("a"))
    assert images.collect() == {}
    images.note(bad("b"))
    with pytest.raises(DataError, match="2 images"):
        images.collect()


def test_the_message_stays_short() -> None:
    images = BadImages(10, Group(Ranks()))
    images.note(bad(*(f"image-{i:03d}" for i in range(500))))
    with pytest.raises(DataError, match="500 images") as error:
        images.collect()
    assert str(error.value).count("image-") == 2 * 5


def test_failed_lines_are_written_before_the_next_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    images, path, printed = BadImages(5, Group(Ranks())), tmp_path / "bad_images.jsonl", list[str]()
    path.write_text('{"image": "/before.png", "reason": "torn", "update": 1}\n')
    with monkeypatch.context() as patch:
        patch.setattr(guard, "write_atomic", full)
        for update in (2, 3):
            images.note(bad(f"/{update}.png"))
            images.report(path, update, printed.append)
        with pytest.raises(OSError, match="No space"):
            images.write(path)
    assert len(printed) == 2
    images.write(path)
    images.write(path)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["image"], line["update"]) for line in found] == [("/before.png", 1), ("/2.png", 2), ("/3.png", 3)]
