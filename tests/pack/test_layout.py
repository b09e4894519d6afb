"""The names of members in a store: webdataset reads each image as a sample, and the path can be recovered."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lars_train.pack.layout import image_path, key_of, label_name, member_names

PART = st.binary(min_size=1, max_size=6).filter(lambda raw: b"/" not in raw and b"\0" not in raw and raw[:1] != b".")
SUFFIX = st.sampled_from([b".jpg", b".JPG", b".jpeg", b".png"])
STEM = st.sampled_from([b"ab", b"a.b", b"a%b", b"%2E", b"a%2Eb"]) | PART
NAME = st.tuples(st.lists(PART, min_size=1, max_size=2).map(b"/".join), STEM, SUFFIX)
NAMES = st.lists(NAME.map(lambda parts: parts[0] + b"/" + parts[1] + parts[2]), max_size=12, unique=True)


@given(NAMES)
def test_each_image_has_a_distinct_key_and_its_path_is_recovered(names: list[bytes]) -> None:
    members = member_names(names)
    assert [image_path(member) for member in members] == names
    keys = [member.rpartition(b"/")[2].partition(b".")[0] for member in members]
    assert len({(member.rpartition(b"/")[0], key) for member, key in zip(members, keys, strict=True)}) == len(names)
    for member, name in zip(members, names, strict=True):
        assert key_of(member)[1] == name.rpartition(b".")[2]
        assert key_of(label_name(member)) == (key_of(member)[0], b"cls")


def test_only_dots_and_percent_signs_change_a_name() -> None:
    names = [b"n01440764/n01440764_10026.JPEG", b"a.b/c d.jpg", b"\xff\xe9/1.png"]
    assert member_names(names) == names
    assert member_names([b"a/x.y.jpg", b"a/x.z.jpg", b"a/x.jpg", b"a/x.png"]) == [
        b"a/x%2Ey.jpg",
        b"a/x%2Ez.jpg",
        b"a/x.jpg",
        b"a/%2E/x.png",
    ]
    assert member_names([b"1.jpeg", b"1.jpg", b"1.png"]) == [b"1.jpeg", b"%2E/1.jpg", b"%2E/%2E/1.png"]
