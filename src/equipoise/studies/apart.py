"""A quickstart's methods side by side: each is trained and sampled in a process of its own.

Two processes of one thread get more out of two cores than one process of two threads: the operations of a small model
are too short to be shared between cores.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch

from equipoise.errors import EquipoiseError
from equipoise.models.machine import give_back_memory, memory_bytes
from equipoise.studies.jobs import JobFailed, JobStopped, Processes, stopping_on_signals
from equipoise.studies.side_by_side import run_side_by_side

ENOUGH_MEMORY = 4 * 2**30  # for two processes of under 1 GiB each, the one that waits for them, and the rest
SECONDS_BETWEEN_LOOKS = 1.0


def default_workers() -> int:
    """Methods at once where nobody says: two, where the machine has two cores and enough memory."""
    return 2 if torch.get_num_threads() >= 2 and memory_bytes() >= ENOUGH_MEMORY else 1


def run_apart(
    out: Path,
    names: Sequence[str],
    command: Callable[[str], list[str]],
    *,
    workers: int,
    lock: IO[str],
    say: Callable[[str], None],
    ended: Callable[[str, bool, float], None],
) -> None:
    """Run a command per name, `workers` at a time, on equal shares of this process's threads.

    Args:
        out: the study's directory; output goes to `logs/NAME.log` in it and, line by line, to `say`.
        lock: of the study; the processes hold it too.
        ended: called when one has ended: whether well, and the seconds it took.

    Raises EquipoiseError naming those that failed, when all have ended; Stopped after a signal.
    """
    failed: dict[str, str] = {}
    workers = min(workers, len(names))
    threads = max(1, torch.get_num_threads() // workers)

    def log_of(name: str) -> Path:
        return out / "logs" / f"{name}.log"

    def note(name: str, error: JobFailed | JobStopped | None, seconds: float) -> None:
        if isinstance(error, JobFailed):
            failed[name] = str(error)
        ended(name, error is None, seconds)

    give_back_memory()
    processes = Processes(lock)
    with stopping_on_signals(processes), _following({name: log_of(name) for name in names}, say):
        run_side_by_side(
            names,
            lambda name: processes.run(command(name), log_of(name), threads),
            workers=workers,
            launcher=processes,
            started=lambda name: None,
            ended=note,
        )
    if failed:
        raise EquipoiseError("\n".join(f"{name} failed: {reason}" for name, reason in failed.items()))


@contextmanager
def _following(logs: dict[str, Path], say: Callable[[str], None]) -> Iterator[None]:
    """Say what is written to the logs meanwhile, whole lines after the name of their log."""
    places = {name: path.stat().st_size if path.is_file() else 0 for name, path in logs.items()}
    over = threading.Event()

    def look() -> None:
        for name, path in logs.items():
            if not path.is_file():
                continue
            with path.open("rb") as file:
                file.seek(places[name])
                new, end, _ = file.read().rpartition(b"\n")
            places[name] += len(new) + len(end)
            for line in new.decode("utf-8", errors="replace").splitlines():
                if line.strip():
                    say(f"{name}: {line}")

    def follow() -> None:
        while not over.wait(SECONDS_BETWEEN_LOOKS):
            look()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        look()
