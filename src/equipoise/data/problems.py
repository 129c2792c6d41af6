"""Bad rows are collected, so that one message shows all of them before anything trains."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from equipoise.errors import DataError

SHOWN = 20


class Problems:
    """Collects what is wrong with rows; `raise_if_any` says it in one DataError.

    At most 20 are shown, the rest counted: a file with one wrong column name would otherwise print every row.
    """

    def __init__(self) -> None:
        self._shown: list[str] = []
        self._hints: list[str] = []
        self.count = 0

    def add(self, location: object, message: str) -> None:
        """Record that the row at `location` is wrong."""
        self.count += 1
        if len(self._shown) < SHOWN:
            self._shown.append(f"{location}: {message}")

    def hint(self, message: str) -> None:
        """A mend that holds for many rows, said once at the end."""
        if message not in self._hints:
            self._hints.append(message)

    def raise_if_any(self) -> None:
        """Raises DataError when any row was wrong."""
        if not self.count:
            return
        lines = list(self._shown)
        if self.count > len(lines):
            lines.append(f"and {self.count - len(lines)} more bad rows")
        raise DataError("\n".join(lines + self._hints))


def suggestion(name: object, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest known name, or nothing."""
    close = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def shown(value: object, length: int = 60) -> str:
    """A value as it goes into a message, cut to `length` characters."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."
