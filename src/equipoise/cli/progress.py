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
    """Listens to a run's metrics and shows step, what matters and the time left.

    The run ends with its last step or with its budget, whichever comes first at the rate so far.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        self._started = time.monotonic()
        self._first = run.first_step
        self._budget_from: tuple[float, float] | None = None  # time and share of the budget after the first step
        self._last_line: float | None = None
        self._bar: Any = None
        self._task: Any = None
        run.listener = self

    def __enter__(self) -> TrainingProgress:
        if sys.stderr.isatty() and self._run.is_main:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
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
        total, step = self._run.num_steps, line["step"]
        text = self._describe(line, total) + shown_time(self.seconds_left(step))
        if self._bar is not None:
            share = max(step / total, min(1.0, self._run.budget_share or 0.0)) if total else None
            self._bar.update(self._task, completed=share, total=None if share is None else 1.0, description=text)
            return
        now = time.monotonic()
        due = self._last_line is None or now - self._last_line >= SECONDS_BETWEEN_LINES
        if step == total or step == self._first + 1 or due:
            self._last_line = now
            print(text, file=sys.stderr, flush=True)

    def _describe(self, line: dict[str, Any], total: int | None) -> str:
        shown = [f"{name} {line[name]:.4g}" for name in SHOWN if line.get(name) is not None]
        return f"step {line['step']}/{total}  " + "  ".join(shown)

    def seconds_left(self, step: int) -> float | None:
        """Seconds to the end after `step` completed steps; None where nothing tells, or nothing is left."""
        total, now = self._run.num_steps, time.monotonic()
        if not total or step >= total or step <= self._first:
            return None
        by_steps = (now - self._started) / (step - self._first) * (total - step)
        by_budget = self._budget_seconds(now)
        return by_steps if by_budget is None else min(by_steps, by_budget)

    def _budget_seconds(self, now: float) -> float | None:
        share = self._run.budget_share
        if share is None:
            return None
        since, before = self._started, 0.0
        if self._budget_from is not None:
            since, before = self._budget_from
        else:
            self._budget_from = (now, share)
            if self._first:  # what a resumed run had spent before is not known yet
                return None
        return (now - since) / (share - before) * max(0.0, 1 - share) if share > before else None


def shown_time(seconds: float | None) -> str:
    """`  about 2.0 min left`; nothing for None."""
    if seconds is None:
        return ""
    return f"  about {seconds / 60:.1f} min left" if seconds > 90 else f"  about {seconds:.0f} s left"
