def norms(weight: int, grad: int, count: int, is_double: bool, /) -> tuple[float, float]: ...
def update(
    weight: int,
    grad: int,
    buffer: int,
    count: int,
    is_double: bool,
    nesterov: bool,
    maximize: bool,
    decay: float,
    scale: float,
    momentum: float,
    lr: float,
    /,
) -> None: ...
