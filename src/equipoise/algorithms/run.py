"""A run: its directory, its metrics, its checkpoints, and how it stops.

One object holds what every algorithm needs besides its mathematics. What a step computes depends only on the recipe
and the checkpointed state; every random stream is derived from (seed, step), so there is no generator state to save.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from equipoise.algorithms.checkpoint import (
    Checkpoint,
    flush_to_disk,
    load_checkpoint,
    remove_leftovers,
    save_checkpoint,
    saved_steps,
    step_name,
)
from equipoise.algorithms.environment import describe_environment
from equipoise.config import Recipe, changed_keys, resolved
from equipoise.errors import CheckpointError, ConfigError, EquipoiseError

logger = logging.getLogger("equipoise")

FLOP_KINDS = ("generate", "score", "reference", "forward", "backward", "critic")
NOT_COMPARED = ("out",)  # where a run lies does not change what it computes


class Interrupted(EquipoiseError):
    """A signal asked the run to stop; its state is saved. Exit code 130 (Ctrl-C) or 143 (SIGTERM)."""

    def __init__(self, signal_number: int, out: Path, step: int) -> None:
        self.exit_code = 128 + signal_number
        name = signal.Signals(signal_number).name
        super().__init__(f"stopped by {name} after step {step}; everything is saved. Resume with --resume --out {out}")


class Run:
    """The run directory of one training run, on every rank; only the main process writes."""

    def __init__(
        self, out: str | Path, config: Recipe, *, resume: bool = False, accelerator: Accelerator | None = None
    ):
        """Open or create the directory.

        Raises ConfigError where it holds another run, or, with `resume`, a run of another recipe (naming the keys);
        CheckpointError where the newest checkpoint cannot be trusted.
        """
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.out = Path(out)
        self.config = config
        self.accelerator = accelerator or Accelerator()
        self.first_step = 0
        self.num_steps: int | None = None  # set by the algorithm, for whoever shows progress
        self.listener: Callable[[dict[str, Any]], None] | None = None  # called with every line of metrics
        self._checkpoint: Checkpoint | None = None
        self._warned: set[str] = set()
        self._stop_signal: int | None = None
        self._started = time.perf_counter()
        self._timers: dict[str, float] = {}
        self._cost = _empty_cost()
        self._open(resume)

    # -- directory ---------------------------------------------------------------------------------------------

    def _open(self, resume: bool) -> None:
        config_file = self.out / "config.json"
        values = resolved(self.config)
        if config_file.is_file() and self._holds_results():
            if not resume:
                raise ConfigError(f"{self.out}: already holds a run; continue it with --resume, or give another --out")
            before = json.loads(config_file.read_text(encoding="utf-8"))
            changed = [key for key in changed_keys(before, values) if key not in NOT_COMPARED]
            if changed:
                raise ConfigError(
                    f"{self.out}: --resume with a changed recipe: {', '.join(changed)}; "
                    "undo the change, or start a new run in another --out"
                )
            self._checkpoint = load_checkpoint(self.checkpoints)
            self.first_step = self._checkpoint.step if self._checkpoint else 0
        elif not config_file.is_file() and self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ConfigError(f"{self.out}: exists and is not an Equipoise run directory; give another --out")
        self.accelerator.wait_for_everyone()
        if self.is_main:
            self._prepare_directory(config_file, values)
        if self._checkpoint is not None:
            self._cost = self._checkpoint.values["cost"]
            self._warned = set(self._checkpoint.values["warned"])
        self.accelerator.wait_for_everyone()

    def _holds_results(self) -> bool:
        """False for a directory whose run stopped before its first step, on a wrong input say: nothing is lost."""
        metrics = self.out / "metrics.jsonl"
        has_metrics = metrics.is_file() and metrics.stat().st_size > 0
        return has_metrics or bool(saved_steps(self.checkpoints)) or self.model_directory.exists()

    def _prepare_directory(self, config_file: Path, values: dict[str, Any]) -> None:
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.checkpoints)
        for leftover in self.out.glob(".model.*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._forget_after(self.first_step)
        _write_json(self.out / "environment.json", {**describe_environment(), "processes": self.num_processes})
        _write_json(config_file, values)

    def _forget_after(self, step: int) -> None:
        """Truncate metrics.jsonl and completions/ to a step: what follows is computed again."""
        metrics = self.out / "metrics.jsonl"
        if metrics.is_file():
            lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            _write_text(metrics, "".join(kept))
        for file in (self.out / "completions").glob("*"):
            if file.suffix != ".parquet" or int(file.stem.removeprefix("step_")) > step:
                file.unlink()

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.out / "checkpoints"

    @property
    def model_directory(self) -> Path:
        """Where the result is written at the end."""
        return self.out / "model"

    # -- processes ---------------------------------------------------------------------------------------------

    @property
    def is_main(self) -> bool:
        """True on the one process that writes."""
        return self.accelerator.is_main_process

    @property
    def rank(self) -> int:
        """Index of this process."""
        return self.accelerator.process_index

    @property
    def num_processes(self) -> int:
        """Processes that share the work."""
        return self.accelerator.num_processes

    def totals(self, values: dict[str, float]) -> dict[str, float]:
        """Sums over processes, key by key; every process brings the same keys in the same order."""
        if self.num_processes == 1:
            return dict(values)
        tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=self.accelerator.device)
        summed = self.accelerator.reduce(tensor, reduction="sum")
        return dict(zip(values, summed.tolist(), strict=True))  # type: ignore[union-attr]

    def total(self, value: float) -> float:
        """Sum over processes."""
        return self.totals({"value": value})["value"]

    def largest(self, value: int) -> int:
        """Maximum over processes."""
        if self.num_processes == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64, device=self.accelerator.device)
        return int(self.accelerator.gather(tensor).max())  # type: ignore[union-attr]

    def gathered(self, tensor: Tensor) -> Tensor:
        """Rows of all processes in rank order; every process holds the same number of rows."""
        if self.num_processes == 1:
            return tensor
        return self.accelerator.gather(tensor.to(self.accelerator.device)).to(tensor.device)  # type: ignore[union-attr]

    # -- state -------------------------------------------------------------------------------------------------

    def restore(self) -> Checkpoint | None:
        """The checkpoint to continue from, None for a fresh start. The caller loads it into its own objects."""
        return self._checkpoint

    def maybe_checkpoint(self, step: int, last_step: int, tensors: Any, values: dict[str, Any]) -> None:
        """Save after `step` completed steps where one is due, at the end, and when a signal asked to stop.

        `tensors` is called for {name: tensor} only when something is saved (on every process: gathering shards is
        collective). Raises Interrupted after saving where a signal arrived.
        """
        stop = self.largest(self._stop_signal or 0)
        due = step % self.config.checkpoint.every == 0 or step == last_step
        if not (due or stop):
            return
        state = tensors()
        if self.is_main:
            extra = {"cost": self._cost_now(), "warned": sorted(self._warned)}
            checkpoint = Checkpoint(step, state, {**values, **extra})
            save_checkpoint(self.checkpoints, checkpoint, keep=self.config.checkpoint.keep)
            _write_json(self.out / "cost.json", self._cost_now())
        self.accelerator.wait_for_everyone()
        if stop and step < last_step:
            raise Interrupted(stop, self.out, step)

    @contextlib.contextmanager
    def stopping_cleanly(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the run after the current step, saved; a second one ends it at once."""

        def request(number: int, frame: FrameType | None) -> None:
            if self._stop_signal is not None:
                raise KeyboardInterrupt
            self._stop_signal = number
            logger.warning("%s: finishing this step, then saving", signal.Signals(number).name)

        try:
            before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: a notebook or server owns the signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # -- metrics and costs ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds inside to `time/<phase>` of this step, and to `<phase>_s` of the cost."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._timers[phase] = self._timers.get(phase, 0.0) + time.perf_counter() - started

    def count(self, *, generated_tokens: float = 0, trained_tokens: float = 0, **flops: float) -> None:
        """Add to the cost: tokens, and FLOPs by kind (generate, score, reference, forward, backward, critic)."""
        self._cost["generated_tokens"] += int(generated_tokens)
        self._cost["trained_tokens"] += int(trained_tokens)
        for kind, amount in flops.items():
            self._cost["flops"][kind] += float(amount)

    def set_trainable(self, parameters: int) -> None:
        """Record how many parameters are trained."""
        self._cost["trainable_parameters"] = parameters

    def log(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """Append a line to metrics.jsonl and return it. A value that does not exist is None, never 0."""
        line = {"step": step, **metrics}
        for phase, seconds in self._timers.items():
            line[f"time/{phase}"] = round(seconds, 6)
            if f"{phase}_s" in self._cost:
                self._cost[f"{phase}_s"] += seconds
        line["time/step"] = round(sum(self._timers.values()), 6)
        self._timers = {}
        if self.is_main:
            with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
            if self.listener is not None:
                self.listener(line)
        return line

    def write_completions(self, step: int, columns: dict[str, list[Any]]) -> None:
        """completions/step_NNNNNN.parquet, atomically."""
        if self.num_processes > 1:
            parts = gather_object([columns])
            columns = {name: [value for part in parts for value in part[name]] for name in columns}
        if not self.is_main:
            return
        directory = self.out / "completions"
        directory.mkdir(exist_ok=True)
        temporary = directory / f".{step_name(step)}.tmp"
        pq.write_table(pa.table(columns), temporary)
        os.replace(temporary, directory / f"{step_name(step)}.parquet")

    def warn_once(self, key: str, message: str) -> None:
        """Say something once in a run, resumes included."""
        if key not in self._warned:
            self._warned.add(key)
            if self.is_main:
                logger.warning(message)

    def finish(self, save_model: Callable[[Path], Any]) -> None:
        """Write `model/` and the final cost.json; `save_model(directory)` is atomic and called on the main process."""
        if self.is_main:
            save_model(self.model_directory)
            _write_json(self.out / "cost.json", self._cost_now())
        self.accelerator.wait_for_everyone()

    @property
    def is_complete(self) -> bool:
        """True where a resumed run has nothing left to do: its model is written."""
        return self.model_directory.is_dir() and bool(saved_steps(self.checkpoints))

    def _cost_now(self) -> dict[str, Any]:
        now = time.perf_counter()
        self._cost["wall_s"] += now - self._started
        self._started = now
        # ru_maxrss is in KiB on Linux and in bytes on macOS.
        unit = 2**20 if os.uname().sysname == "Darwin" else 2**10
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        self._cost["peak_rss_mb"] = round(max(peak, self._cost["peak_rss_mb"]), 1)
        return json.loads(json.dumps(self._cost))


def _empty_cost() -> dict[str, Any]:
    return {
        "wall_s": 0.0,
        "generate_s": 0.0,
        "score_s": 0.0,
        "update_s": 0.0,
        "generated_tokens": 0,
        "trained_tokens": 0,
        "flops": dict.fromkeys(FLOP_KINDS, 0.0),
        "trainable_parameters": 0,
        "peak_rss_mb": 0.0,
    }


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        flush_to_disk(temporary)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: could not write: {error}; free space and run again with --resume") from error


def _write_json(path: Path, values: Any) -> None:
    _write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")
