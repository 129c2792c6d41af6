"""Progress: a bar on a terminal, plain lines when piped."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SECONDS_BETWEEN_LINES = 10.0
SHOWN = ("loss", "reward/combined", "kl", "dpo/accuracy", "validation/loss", "evaluation/combined")


@contextmanager
def counting(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`: n more of `total` items are done."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=False) as bar:
            task = bar.add_task(description, total=total)
            yield lambda count: bar.advance(task, count)
        return
    done, last = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        if done >= total or time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"{description}: {done}/{total}", file=sys.stderr, flush=True)

    yield advance


class TrainingProgress:
    """Listens to a run's metrics and shows step, what matters and the time left."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self._started = time.monotonic()
        self._first = run.first_step
        self._last_line = 0.0
        self._bar: Any = None
        self._task: Any = None
        run.listener = self

    def __enter__(self) -> TrainingProgress:
        if sys.stderr.isatty() and self._run.is_main:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("starting", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._run.listener = None

    def __call__(self, line: dict[str, Any]) -> None:
        """One line of metrics has been logged."""
        total = self._run.num_steps
        text = self._describe(line, total)
        if self._bar is not None:
            self._bar.update(self._task, completed=line["step"], total=total, description=text)
            return
        now = time.monotonic()
        if line["step"] == total or line["step"] == self._first + 1 or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(text + self._time_left(line["step"], total), file=sys.stderr, flush=True)

    def _describe(self, line: dict[str, Any], total: int | None) -> str:
        shown = [f"{name} {line[name]:.4g}" for name in SHOWN if line.get(name) is not None]
        return f"step {line['step']}/{total}  " + "  ".join(shown)

    def _time_left(self, step: int, total: int | None) -> str:
        done = step - self._first
        if not total or done <= 0 or step >= total:
            return ""
        seconds = (time.monotonic() - self._started) / done * (total - step)
        return f"  about {seconds / 60:.1f} min left" if seconds > 90 else f"  about {seconds:.0f} s left"
