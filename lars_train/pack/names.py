"""Names in the tar shards: what webdataset makes one sample of, and the picture's own path back again.

webdataset divides a name at the first dot of its last part into key and extension, and takes neighbours with the same
key for one sample (https://github.com/webdataset/webdataset, "WebDataset Format"). So each key stands for one picture,
and has no dot after its last slash. No torch, no files.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import unquote_to_bytes

LABEL = b".cls"


def key_of(member: bytes) -> tuple[bytes, bytes]:
    """webdataset's key of a member, and its extension without the first dot."""
    folder, slash, base = member.rpartition(b"/")
    stem, _, extension = base.partition(b".")
    return folder + slash + stem, extension


def member_names(names: Iterable[bytes]) -> list[bytes]:
    """The names in the tar of pictures at these paths, none of which may be hidden: each with a key of its own.

    A path stands for itself but for percent signs, and dots before that of the suffix, which become ``%25`` and
    ``%2E``. Where some differ in the suffix alone, the later ones lie in ``%2E/``, ``%2E/%2E/`` and so on.
    """
    taken: set[bytes] = set()
    members = []
    for name in names:
        folder, slash, base = name.replace(b"%", b"%25").rpartition(b"/")
        stem, _, suffix = base.rpartition(b".")
        folder, plain = folder + slash, stem.replace(b".", b"%2E")
        while (key := folder + plain) in taken:
            folder += b"%2E/"
        taken.add(key)
        members.append(key + b"." + suffix)
    return members


def image_path(member: bytes) -> bytes:
    """The path of the picture that a name of `member_names` stands for."""
    return b"/".join(part for part in unquote_to_bytes(member).split(b"/") if part != b".")


def label_name(member: bytes) -> bytes:
    """The name of the member beside it that has its label."""
    return key_of(member)[0] + LABEL
