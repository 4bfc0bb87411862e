"""Tables in environment variables: numbers by dtype, such as ``bfloat16:128:1024,float32:64:never``."""

import os
from collections.abc import Iterable, Mapping

import torch

from dllm_fast.kernels.checks import dtype_name

NEVER = 1 << 62  # more rows or queries than there ever are


def read(variable: str, form: str, dtypes: Iterable[torch.dtype]) -> dict[tuple, int]:
    """The table in ``variable``: the last number of each entry, by its dtype and the numbers between. Empty if unset.

    Raises:
        ValueError: an entry does not have the ``form`` DTYPE:NUMBER:..., which the message shows.
    """
    text = os.environ.get(variable, "")
    named = {dtype_name(dtype): dtype for dtype in dtypes}
    table: dict[tuple, int] = {}
    for entry in text.split(",") if text else ():
        name, *between, last = entry.strip().split(":") if ":" in entry else (entry, "")
        numbers = [*between, str(NEVER) if last == "never" else last]
        whole = all(number.isascii() and number.isdigit() and int(number) > 0 for number in numbers)
        if name not in named or not whole or len(numbers) != form.count(":"):
            raise ValueError(
                f"{variable}={text!r} in the environment; expected {form},..., DTYPE one of {', '.join(named)} and the "
                "others numbers above 0, the last of them or 'never'"
            )
        *keys, value = map(int, numbers)
        table[(named[name], *keys)] = value
    return table


def spell(table: Mapping[tuple, int]) -> str:
    """The table as text for `read`."""
    return ",".join(
        ":".join((dtype_name(dtype), *map(str, keys), "never" if last == NEVER else str(last)))
        for (dtype, *keys), last in table.items()
    )
