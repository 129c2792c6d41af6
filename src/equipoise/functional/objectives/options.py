"""Checks of a method's options, and from the options of a recipe to those of a method."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

GIVEN = ("rewards_BK", "group_ids_B", "weights_K", "delta")  # arguments of every method, and no options
COLUMN_OPTIONS = ("gate",)  # options that choose an objective: an aspect's name in a recipe, a column in a method


def check_number(option: str, value: Any, *, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise ValueError unless `value` is a finite number (no bool) with low <= value <= high."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        bounds = [f"at least {low:g}"] * math.isfinite(low) + [f"at most {high:g}"] * math.isfinite(high)
        raise ValueError(f"{option} must be a finite number {' and '.join(bounds)}".rstrip() + f", got {value!r}")


def check_above_zero(option: str, value: Any) -> None:
    """Raise ValueError unless `value` is a finite number above 0."""
    check_number(option, value)
    if value <= 0:
        raise ValueError(f"{option} must be above 0, got {value!r}")


def check_choice(option: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of the choices, and of the same type."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"unknown {option} {value!r}: choose one of {', '.join(map(str, choices))}")


def with_columns(method: Callable[..., Any], options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Options as the method takes them: where a recipe names an aspect, its column among `names`.

    Raises ValueError for an option that the method does not have, for one that has to choose an aspect and is missing,
    and for an aspect that is not among `names`.

    Example: names a, b; the option gate of `conditioned` is "b": {"gate": 1}.
    """
    known = [name for name in inspect.signature(method).parameters if name not in GIVEN]
    columns = {}
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"there is no option {option!r}: choose from {', '.join(known) or 'none'}")
        if option in COLUMN_OPTIONS and isinstance(value, str):
            if value not in names:
                raise ValueError(f"{option} names no aspect of the reward, {value!r}: choose one of {', '.join(names)}")
            value = list(names).index(value)
        columns[option] = value
    for option in COLUMN_OPTIONS:
        if option in known and options.get(option) is None:
            raise ValueError(f"the option {option} is missing: name one of the aspects {', '.join(names)}")
    return columns
