"""What watches a process of benchmarks/grpo_step.py: seconds by phase, resident memory, tokens."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.grpo_step_world import PHASES

WARMUP = 1  # steps that do not count: first allocations, kernels chosen


class Stopwatch:
    """Seconds by phase and step. A phase inside another one counts for the inner one alone."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._stack: list[str] = []
        self._sums: dict[str, float] = {}
        self._since = self._lap_began = clock()
        self.steps: list[dict[str, float]] = []

    def start(self) -> None:
        """The first step begins."""
        self._sums = {}
        self._lap_began = self._clock()

    @property
    def phase(self) -> str | None:
        """What time counts for now; None between phases."""
        stack = self._stack[:]  # a thread that looks on may ask while a phase ends
        return stack[-1] if stack else None

    def enter(self, phase: str) -> None:
        """From now on time counts for `phase`."""
        self._turn()
        self._stack.append(phase)

    def leave(self) -> None:
        """Back to the phase before."""
        self._turn()
        self._stack.pop()

    def _turn(self) -> None:
        now = self._clock()
        if self._stack:
            self._sums[self._stack[-1]] = self._sums.get(self._stack[-1], 0.0) + now - self._since
        self._since = now

    def lap(self) -> None:
        """A step ends and the next begins."""
        now = self._clock()
        self.steps.append({**{phase: self._sums.get(phase, 0.0) for phase in PHASES}, "total": now - self._lap_began})
        self._sums, self._lap_began = {}, now

    def wrap(self, owner: Any, name: str, phase: str, when: Callable[[], bool] = lambda: True) -> None:
        """Time every call of `owner.name`; raises AttributeError where the tool no longer has it."""
        inner = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            if not when():
                return inner(*arguments, **options)
            self.enter(phase)
            try:
                return inner(*arguments, **options)
            finally:
                self.leave()

        setattr(owner, name, timed)

    def wrap_torch(self) -> None:
        """Backward passes, and clipping with the optimizer's step: both tools call the same functions of torch."""
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        self.wrap(torch.Tensor, "backward", "backward")
        self.wrap(torch.nn.utils, "clip_grad_norm_", "optimiser")
        register_optimizer_step_pre_hook(lambda *_: self.enter("optimiser"))
        register_optimizer_step_post_hook(lambda *_: self.leave())


class Memory:
    """Resident memory in MiB: when training begins, and the peak of the steps that count."""

    def __init__(self) -> None:
        self.loaded = _status("VmRSS")
        self.peak = 0.0

    def forget_peak(self) -> None:
        """The peak so far does not count: loading a model may need more than a step."""
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError as error:
            print(f"the peak includes loading and warm-up: {error}", file=sys.stderr)

    def values(self) -> dict[str, float]:
        """Plain JSON types; read when the last step has ended."""
        peak = _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        return {"loaded": self.loaded, "peak": peak, "step": peak - self.loaded}


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 2**10
    return 0.0


class Observer:
    """Stopwatch, memory and token counts of one process."""

    def __init__(self) -> None:
        self.watch = Stopwatch()
        self.memory = Memory()
        self._memory_values: dict[str, float] = {}
        self.sampled = 0
        self.trained = 0

    def step_ended(self) -> None:
        """Called by the tool after every step."""
        self.watch.lap()
        if len(self.watch.steps) == WARMUP:
            self.memory.forget_peak()
        self._memory_values = self.memory.values()

    def values(self) -> dict[str, Any]:
        """What the driver reads; token counts are of all steps, warm-up included."""
        count = len(self.watch.steps)
        return {
            "steps": self.watch.steps[WARMUP:],
            "memory_mib": self._memory_values,
            "tokens_per_step": {"sampled": self.sampled / count, "trained": self.trained / count},
        }
