"""How long threads that wait for each other keep their cores, chosen before torch's OpenMP is loaded.

GNU's OpenMP has a waiting thread spin for milliseconds. Alone on the machine that is the fastest way; beside another
process the thread that all wait for may be the one without a core, and every one of some hundred loops in a step then
takes as long as the scheduler's turn. `benchmarks/thread_waits.py` measures both.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path

SPINS = "GOMP_SPINCOUNT"
FEW = "2000"  # some microseconds, then sleep
OTHERS = "OMP_WAIT_POLICY"
LOOKS, EVERY_S = 5, 0.004


def choose_waits(
    environment: MutableMapping[str, str] = os.environ,
    *,
    cores: int | None = None,
    running: Callable[[], int | None] | None = None,
) -> None:
    """Have waiting threads sleep where others are at work now and cores are too few for all; else leave them as they
    are. What the user set stays; what a parent process chose is chosen anew."""
    if OTHERS in environment or environment.get(SPINS, FEW) != FEW:
        return
    environment.pop(SPINS, None)
    cores = os.cpu_count() or 1 if cores is None else cores
    wanted = environment.get("OMP_NUM_THREADS", "").partition(",")[0]
    threads = int(wanted) if wanted.isdigit() else cores
    if threads == 1:
        return
    others = (running or _running_besides)()
    if others is not None and others + threads > cores:
        environment[SPINS] = FEW


def _running_besides(file: Path = Path("/proc/loadavg")) -> int | None:
    """Threads of other processes that run or want to, by Linux's count; None where there is none."""
    looks = []
    for look in range(LOOKS):
        if look:
            time.sleep(EVERY_S)
        try:
            looks.append(int(file.read_text(encoding="ascii").split()[3].partition("/")[0]) - 1)  # one is this thread
        except (OSError, ValueError, IndexError):
            return None
    return int(statistics.median(looks))
