"""What a GRPO step holds at its fullest, by phase: memory in use and memory resident, and whether it grows over steps.

    python benchmarks/step_memory.py --shape small --dtype bfloat16 --steps 6

One process of `train_grpo`, as `grpo_step.py` runs it, looked at every half millisecond. `in use` is what malloc has
given out (glibc's mallinfo2: tensors and libraries, not Python's small objects); `resident` is the whole process. What
one step has more in use than the step before is memory that nobody let go. To compare with other code, run it with
`PYTHONPATH=<other checkout>/src`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from benchmarks import grpo_step_worker
from benchmarks.grpo_step_watch import WARMUP, Observer, _status
from benchmarks.grpo_step_world import SHAPES, write_model

EVERY_S = 0.0005
MIB = 2**20
OUTSIDE = "other"  # of every phase


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _before = ("arena", "ordblks", "smblks", "hblks")
    _after = ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in (*_before, "hblkhd", *_after)]


@cache
def _mallinfo2() -> Callable[[], Any]:
    function = ctypes.CDLL(None).mallinfo2
    function.restype = _MallInfo
    return function


def malloc_in_use() -> float:
    """MiB given out by malloc and not freed. Raises AttributeError where the C library is not glibc 2.33 or newer."""
    found = _mallinfo2()()
    return (found.uordblks + found.hblkhd) / MIB


class Watcher:
    """A thread that keeps the fullest moment of every step and phase."""

    def __init__(self) -> None:
        self.observer: Observer | None = None
        self.fullest: dict[tuple[int, str], tuple[float, float]] = {}  # in use, resident
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def observed(self) -> Observer:
        """In place of `Observer`: the one whose steps and phases count."""
        self.observer = Observer()
        return self.observer

    def _look(self) -> None:
        while not self._done.wait(EVERY_S):
            if self.observer is None:
                continue
            watch = self.observer.watch
            key = len(watch.steps), watch.phase or OUTSIDE
            before = self.fullest.get(key, (0.0, 0.0))
            self.fullest[key] = max(before[0], malloc_in_use()), max(before[1], _status("VmRSS"))

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def measure(shape_name: str, dtype: str, steps: int, threads: int) -> dict[str, Any]:
    """MiB in use and resident at the fullest moment of every counted step, and of every phase over all of them."""
    shape = SHAPES[shape_name]
    with tempfile.TemporaryDirectory() as scratch, Watcher() as watcher:
        job = {
            "shape": shape.values(), "dtype": dtype, "threads": threads, "steps": steps, "scratch": scratch,
            "model": str(write_model(shape, Path(scratch) / "model")),
        }  # fmt: skip
        grpo_step_worker.Observer = watcher.observed  # type: ignore[misc, assignment]
        started = time.perf_counter()
        grpo_step_worker.equipoise_steps(job)
        seconds = time.perf_counter() - started
    counted = {key: value for key, value in watcher.fullest.items() if WARMUP <= key[0] < WARMUP + steps}

    def most(chosen: list[tuple[float, float]]) -> dict[str, float]:
        return {"in_use_mib": max(one for one, _ in chosen), "resident_mib": max(other for _, other in chosen)}

    return {
        "shape": shape_name,
        "dtype": dtype,
        "seconds": seconds,
        "steps": [most([v for (s, _), v in counted.items() if s == WARMUP + step]) for step in range(steps)],
        "phases": {
            name: most([v for (_, phase), v in counted.items() if phase == name])
            for name in dict.fromkeys(phase for _, phase in counted)
        },
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: phases, then steps."""
    rows = [*result["phases"].items(), *((f"step {i + 1}", values) for i, values in enumerate(result["steps"]))]
    lines = [f"| {result['shape']}, {result['dtype']} | in use, MiB | resident, MiB |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {values['in_use_mib']:.0f} | {values['resident_mib']:.0f} |" for name, values in rows]
    return "\n".join(lines)


def main() -> None:
    """Run, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    result = measure(given.shape, given.dtype, given.steps, given.threads)
    print(table(result))
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
