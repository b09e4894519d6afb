"""Names take little memory, and the fingerprint covers classes, names and labels."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lars_train.data.dataset import Names, NamesBuilder, fingerprint, numbered_name, numbered_name_chunks
from lars_train.messages import printable

PATHS = st.lists(st.binary(max_size=20).map(lambda raw: raw.replace(b"\0", b"")), max_size=30)


def build(names: list[bytes]) -> Names:
    builder = NamesBuilder()
    builder.extend(names)
    return builder.build()


@given(PATHS)
def test_names_are_returned_unchanged(names: list[bytes]) -> None:
    held = build(names)
    assert [held[i] for i in range(len(held))] == names
    assert b"".join(held.chunks()) == b"".join(name + b"\0" for name in names)
    again = pickle.loads(pickle.dumps(held))
    assert [again[i] for i in range(len(again))] == names


@pytest.mark.parametrize("index", [-1, 2])
def test_a_sample_id_outside_the_split_is_an_error(index: int) -> None:
    with pytest.raises(IndexError, match=r"\[0, 2\)"):
        build([b"a", b"b"])[index]


def test_the_names_of_imagenet_take_less_than_60_mb() -> None:
    count = 1_281_167
    held = build([b"n01440764/n01440764_%08d.JPEG" % i for i in range(count)])
    assert len(held) == count
    assert held[count - 1] == b"n01440764/n01440764_01281166.JPEG"
    arrays = vars(held).values()
    # Only arrays: a Python object per name would have its reference count changed by a forked worker.
    assert all(isinstance(array, np.ndarray) for array in arrays)
    assert sum(array.nbytes for array in arrays) < 60e6


def test_numbered_names_are_in_bytewise_order_also_in_chunks() -> None:
    names = [numbered_name("train", i).encode() for i in range(70_000)]
    assert names == sorted(names)
    assert b"".join(numbered_name_chunks("train", 70_000)) == b"".join(name + b"\0" for name in names)


def test_the_fingerprint_is_the_sha256_of_its_definition() -> None:
    labels = np.array([0, 1], np.int32)
    stream = b"cat\0dog\0"
    stream += b"\0" + (2).to_bytes(8, "little") + b"cat/1\0dog/1\0" + b"\0\0\0\0\1\0\0\0"
    stream += b"\0" + (0).to_bytes(8, "little")
    value = fingerprint(
        ["cat", "dog"],
        (build([b"cat/1", b"dog/1"]).chunks(), labels),
        (build([]).chunks(), np.zeros(0, np.int32)),
    )
    assert value == hashlib.sha256(stream).hexdigest()[:16]


def test_the_fingerprint_depends_on_everything_it_covers() -> None:
    def print_of(classes: list[str], train: list[bytes], val: list[bytes], labels: list[int]) -> str:
        both = np.array(labels, np.int64)
        return fingerprint(
            classes, (build(train).chunks(), both[: len(train)]), (build(val).chunks(), both[len(train) :])
        )

    values = [
        print_of(["a", "b"], [b"x", b"y"], [b"z"], [0, 1, 0]),
        print_of(["a", "c"], [b"x", b"y"], [b"z"], [0, 1, 0]),
        print_of(["a", "b"], [b"x", b"w"], [b"z"], [0, 1, 0]),
        print_of(["a", "b"], [b"x", b"y"], [b"z"], [0, 1, 1]),
        print_of(["a", "b"], [b"x"], [b"y", b"z"], [0, 1, 0]),
        print_of(["a"], [b"b", b"x"], [b"y"], [0, 1, 0]),
    ]
    assert len(set(values)) == len(values)
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in values)


def test_a_path_that_is_not_utf8_can_be_printed() -> None:
    assert printable(b"caf\xe9/1.jpg") == printable("caf\udce9/1.jpg") == r"caf\xe9/1.jpg"
