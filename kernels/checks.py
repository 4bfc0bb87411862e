"""The launchers' checks of their arguments. A ValueError names the argument and its value, before any work."""

import functools
from collections.abc import Callable, Sequence

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)
CONFIDENCES = ("probability", "margin", "entropy", "random")


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def check_tensors(
    device: torch.device,
    /,
    contiguous: bool = True,  # False: only the last dimension must be
    **expected: tuple[torch.Tensor | None, Sequence[int | None], tuple[torch.dtype, ...]],
) -> None:
    """Raise ValueError unless each tensor is contiguous, on ``device``, and has the given shape and one of the dtypes.

    A tensor may be None; a length of None in a shape allows any.
    """
    for name, (x, shape, kinds) in expected.items():
        if x is None:
            continue
        fits = x.dim() == len(shape) and all(length is None or length == n for length, n in zip(shape, x.shape))
        dense = x.is_contiguous() if contiguous else x.stride(-1) == 1 or x.shape[-1] <= 1
        if not fits or not dense or x.dtype not in kinds or x.device != device:
            lengths = ", ".join("any" if length is None else str(length) for length in shape)
            raise ValueError(
                f"{name} is {x.dtype} {list(x.shape)} with strides {x.stride()} on {x.device}; expected "
                f"{' or '.join(map(str, kinds))} [{lengths}] on {device}, "
                f"{'' if contiguous else 'its last dimension '}contiguous"
            )


def one_device(fake: Callable) -> Callable:
    """A custom op's fake that raises RuntimeError, as PyTorch does, if its tensors are on several devices.

    The dispatcher runs the fake if any tensor is on the meta device: an offloaded weight would then give uninitialised
    memory on the device of the others.
    """

    @functools.wraps(fake)
    def checked(*args, **options):
        devices = list(dict.fromkeys(x.device for x in (*args, *options.values()) if isinstance(x, torch.Tensor)))
        if len(devices) > 1:
            raise RuntimeError(f"a tensor on device {devices[1]} is not on the expected device {devices[0]}")
        return fake(*args, **options)

    return checked


def as_numbers(name: str, value: int | torch.Tensor, rows: int, device: torch.device) -> torch.Tensor:
    """``value``, a number for each row or one for all of them, as an int64 tensor [rows] on ``device``.

    A tensor is read on the device, so that a CUDA graph sees its current values at each replay. An int is written by a
    fill there: a CUDA graph cannot capture a copy from the host.
    """
    if not isinstance(value, torch.Tensor):
        if not -(1 << 63) <= value < 1 << 64:
            raise ValueError(f"{name}={value} does not fit in 64 bits")
        return torch.full((rows,), value - (1 << 64) if value >= 1 << 63 else value, dtype=torch.int64, device=device)
    if value.numel() == rows != 1:
        check_tensors(device, contiguous=True, **{name: (value, [rows], (torch.int64,))})
        return value
    if value.dtype != torch.int64 or value.numel() != 1 or value.device != device:
        raise ValueError(
            f"{name} is {value.dtype} {list(value.shape)} on {value.device}; expected one int64, or one for each of "
            f"{rows} rows, on {device}"
        )
    return value.reshape(1).expand(rows).contiguous()


def check_choice(
    mask_id: int,
    banned: tuple[int, ...],
    deferred: tuple[int, ...],
    vocabulary: int,
    confidence: str,
    temperature: float,
    row,
    position,
) -> tuple[list[int], list[int], bool]:
    """Check `predict`'s options; the banned and deferred ids as ranges [low, high), and whether it needs noise.

    Raises ValueError for an option that does not fit. ``row`` and ``position`` are only checked for being None.
    """
    if confidence not in CONFIDENCES:
        raise ValueError(f"confidence={confidence!r} is not one of {', '.join(map(repr, CONFIDENCES))}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} is not a finite number >= 0")
    ids = {mask_id, *banned}
    if min(ids) < 0 or max(ids) >= vocabulary or len(ids) == vocabulary:
        raise ValueError(f"mask_id={mask_id}, banned={banned}: outside, or all of, the vocabulary of {vocabulary}")
    if deferred and (min(deferred) < 0 or max(deferred) >= vocabulary):
        raise ValueError(f"deferred={deferred}: outside the vocabulary of {vocabulary}")
    noisy = temperature > 0 or confidence == "random"
    if noisy and (row is None or position is None):
        raise ValueError(f"row and position are needed for temperature={temperature}, confidence={confidence!r}")
    return ranges_of(banned), ranges_of(deferred), noisy


def as_keys(noisy: bool, seed, step, row, position, rows: int, device: torch.device) -> tuple:
    """`predict`'s (seed, step, row, position) as kernels take them, or four None if nothing is ``noisy``. Raises as
    `check_tensors` and `as_numbers` do."""
    if not noisy:
        return None, None, None, None
    check_tensors(device, row=(row, [rows], INTEGERS), position=(position, [rows], INTEGERS))
    seed, step = (as_numbers(name, x, rows, device) for name, x in (("seed", seed), ("step", step)))
    return seed, step, row, position


def as_softcap(softcap: float | None) -> float:
    """``softcap`` as kernels take it, 0 for none. Raises ValueError unless it is None, or positive and finite."""
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap={softcap} is neither None nor a positive finite number")
    return 0.0 if softcap is None else float(softcap)


def ranges_of(ids: tuple[int, ...]) -> list[int]:
    """``ids`` as ascending ranges: [low, high, low, high, ...]."""
    ranges: list[int] = []
    for i in sorted(set(ids)):
        if ranges and ranges[-1] == i:
            ranges[-1] = i + 1
        else:
            ranges += [i, i + 1]
    return ranges


def check_block(block: int | None, hole: torch.Tensor | None, origin: torch.Tensor | None) -> None:
    """Raise ValueError for a block that attention does not take, or for an ``origin`` without one; ``hole`` is given
    with states."""
    if block is not None and block < 1:
        raise ValueError(f"block={block} is not a positive number of slots")
    if block is not None and hole is not None:
        raise ValueError(f"block={block}: the queries of states have none")
    if block is None and origin is not None:
        raise ValueError("origin: given with block=None; it is where blocks are counted from")
