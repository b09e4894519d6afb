def size(data: bytes | int, length: int, /) -> tuple[int, int] | None: ...
def decode(
    data: bytes | int,
    length: int,
    out: int,
    width: int,
    height: int,
    left: int,
    top: int,
    right: int,
    bottom: int,
    new_width: int,
    new_height: int,
    x: int,
    y: int,
    flip: bool,
    size: int,
    /,
) -> int: ...
