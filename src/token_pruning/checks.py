"""Checks of settings; each names the key, the value and what is allowed."""

import math
from collections.abc import Iterable
from typing import Any

from token_pruning.errors import ConfigError


def number(name: str, value: Any, *, low: float = -math.inf, high: float = math.inf, above: float = -math.inf) -> float:
    """A finite number with ``low <= value <= high`` and ``value > above``.

    Raises:
        ConfigError: otherwise, bools and strings included.
    """
    limits = [
        f"> {above:g}" if above > -math.inf else "",
        f">= {low:g}" if low > -math.inf else "",
        f"<= {high:g}" if high < math.inf else "",
    ]
    allowed = " and ".join(filter(None, limits))
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not low <= value <= high
        or value <= above
    ):
        raise ConfigError(f"{name} is {value!r}; it must be a finite number{' ' + allowed if allowed else ''}")
    return float(value)


def whole_number(name: str, value: Any, *, low: int, high: int) -> int:
    """An integer with ``low <= value <= high``.

    Raises:
        ConfigError: otherwise, bools included.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number >= {low} and <= {high}")
    return value


def positive_integer(name: str, value: Any) -> int:
    """A whole number of at least 1, that fits into 32 bits.

    Raises:
        ConfigError: otherwise.
    """
    return whole_number(name, value, low=1, high=2**31 - 1)


def choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """One of the allowed strings.

    Raises:
        ConfigError: otherwise.
    """
    allowed = list(allowed)
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    return value


def one_line(error: object) -> str:
    """A message without line breaks, cut where it gets long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else f"{text[:400]}…"
