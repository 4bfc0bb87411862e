"""Numbers and names that callers give: checked, and kept as Python's own.

Any real number type will do, NumPy's too; True and False, text and tensors will not. Errors are ValueErrors that name
the argument and the value.
"""

import math
import numbers
from collections.abc import Callable, Collection
from dataclasses import field, fields
from typing import Any, ClassVar


def require(good: bool, message: str) -> None:
    if not good:
        raise ValueError(message)


def is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def whole(name: str, value: Any, least: int = 1, bits: int | None = None) -> int:
    """``value`` as an int: at least ``least`` (0 or 1), and below 2^``bits`` where that is given."""
    wanted = "positive whole number" if least else "whole number from 0 up"
    if bits is not None:
        wanted = f"whole number from {least} to 2^{bits} - 1"
    good = is_whole(value) and value >= least and (bits is None or value < 1 << bits)
    require(good, f"{name}={value!r} is not a {wanted}")
    return int(value)


def whole_or_none(name: str, value: Any) -> int | None:
    return None if value is None else whole(name, value, 0)


def positive_or_none(name: str, value: Any) -> int | None:
    return None if value is None else whole(name, value)


def real(name: str, value: Any, wanted: str, good: Callable[[float], bool]) -> float:
    """``value`` as a float: a number that is ``good``, which NaN never is; ``wanted`` says it in words."""
    number = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # a whole number beyond floats
            number = math.nan
    require(not math.isnan(number) and good(number), f"{name}={value!r} is not {wanted}")
    return number


def finite(name: str, value: Any) -> float:
    return real(name, value, "a finite number from 0 up", lambda number: 0 <= number < math.inf)


def share(name: str, value: Any) -> float:
    return real(name, value, "a number from 0 to 1", lambda number: 0 <= number <= 1)


def above_zero(name: str, value: Any) -> float:
    return real(name, value, "a number above 0 and up to 1", lambda number: 0 < number <= 1)


def one_of(name: str, value: Any, choices: Collection[str | None]) -> Any:
    good = isinstance(value, str | None) and value in choices
    require(good, f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")
    return value


def one_kind(name: str, value: Any, kind: Any, wanted: str) -> Any:
    require(isinstance(value, kind), f"{name}={value!r} is not {wanted}")
    return value


def checked(check: Callable, *wanted, **options) -> Any:
    """A field of a `Checked` dataclass, kept as ``check(name, value, *wanted)`` returns it."""
    return field(metadata={"check": (check, wanted)}, **options)


class Checked:
    """Of a frozen dataclass: its `checked` fields are, when it is made. Errors name the class too."""

    named: ClassVar[bool] = True

    def __post_init__(self) -> None:
        prefix = f"{type(self).__name__}: " if self.named else ""
        for own in fields(self):  # type: ignore[arg-type]
            if "check" in own.metadata:
                check, wanted = own.metadata["check"]
                object.__setattr__(self, own.name, check(prefix + own.name, getattr(self, own.name), *wanted))
