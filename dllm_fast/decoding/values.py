"""The numbers that a schedule, a refresh or a remask is made with: checked then, and kept as Python's own.

Any real number type will do, NumPy's too; True and False, text and tensors will not.
"""

import math
import numbers
from collections.abc import Callable


def is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def keep_whole(policy: object, name: str, least: int) -> None:
    """Keep the field ``name`` of a frozen ``policy`` as an int. Raises ValueError below ``least`` (0 or 1)."""
    value = getattr(policy, name)
    if not is_whole(value) or value < least:
        wanted = "positive whole number" if least else "whole number from 0 up"
        raise ValueError(f"{type(policy).__name__}: {name}={value!r} is not a {wanted}")
    object.__setattr__(policy, name, int(value))


def keep_number(policy: object, name: str, wanted: str, good: Callable[[float], bool]) -> None:
    """Keep the field ``name`` of a frozen ``policy`` as a float. Raises ValueError unless it is a number and ``good``;
    ``wanted`` says what that is. NaN is never good."""
    value = getattr(policy, name)
    number = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # a whole number beyond floats
            number = math.nan
    if math.isnan(number) or not good(number):
        raise ValueError(f"{type(policy).__name__}: {name}={value!r} is not {wanted}")
    object.__setattr__(policy, name, number)


def keep_share(policy: object, name: str) -> None:
    """As `keep_number`, for a number from 0 to 1."""
    keep_number(policy, name, "a number from 0 to 1", lambda number: 0 <= number <= 1)
