"""A run: its directory, its metrics, its checkpoints, and how it stops.

One object holds what every algorithm needs besides its mathematics. What a step computes depends only on the recipe
and the checkpointed state; every random stream is derived from (seed, step), so there is no generator state to save.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
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
from accelerate.utils import broadcast, gather_object
from safetensors import SafetensorError
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
from equipoise.algorithms.environment import choose_threads, describe_environment, peak_rss_mb
from equipoise.config import RECIPES, Recipe, changed_keys, resolved
from equipoise.errors import CheckpointError, ConfigError, EquipoiseError

logger = logging.getLogger("equipoise")

FLOP_KINDS = ("generate", "score", "reference", "forward", "backward", "critic")
NOT_COMPARED = ("out",)  # where a run lies does not change what it computes
STOPPED_FILE = "stopped.json"
SAME_SIGNAL_S = 1.0  # a launcher passes on the Ctrl-C its processes already got from the terminal


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
        choose_threads(config.threads)
        self.out = Path(out)
        self.config = config
        self.accelerator = accelerator or Accelerator()
        self.first_step = 0
        self.num_steps: int | None = None  # set by the algorithm, for whoever shows progress
        self.budget_share: float | None = None  # likewise: how much of the budget is spent, 1 being all of it
        self.listener: Callable[[dict[str, Any]], None] | None = None  # called with every line of metrics
        self._checkpoint: Checkpoint | None = None
        self._warned: set[str] = set()
        self._stop_signal: int | None = None
        self._started = time.perf_counter()
        self._timers: dict[str, float] = {}
        self._processor_seconds = 0.0  # inside timers since the last line of metrics
        self._cost = _empty_cost()  # of all processes, up to the last time they were added up
        self._counted = _empty_counts()  # of this process since then
        self._open(resume)

    # -- directory ---------------------------------------------------------------------------------------------

    def _open(self, resume: bool) -> None:
        config_file = self.out / "config.json"
        values = resolved(self.config)
        before = self._recorded(config_file)
        if before is not None and self._holds_results():
            if not resume:
                raise ConfigError(f"{self.out}: already holds a run; continue it with --resume, or give another --out")
            self._refuse_changes(before, values)
            self._checkpoint = load_checkpoint(self.checkpoints)
            self.first_step = self._checkpoint.step if self._checkpoint else 0
        if resume and self._checkpoint is None and self.is_main:
            logger.warning("%s: nothing was saved yet: starting from the first step", self.out)
        self.accelerator.wait_for_everyone()
        with self.failing_together():
            if self.is_main:
                self._prepare_directory(config_file, values)
        if self._checkpoint is not None:
            self._cost = _empty_cost() | self._checkpoint.values["cost"]
            self._warned = set(self._checkpoint.values["warned"])

    def _recorded(self, config_file: Path) -> dict[str, Any] | None:
        """The recipe of the run that lies here, None for a place that is free.

        A directory of anything else is refused: a model's own config.json must not be overwritten.
        """
        foreign = ConfigError(f"{self.out}: exists and is not an Equipoise run directory; give another --out")
        if not self.out.exists():
            return None
        if not self.out.is_dir():
            raise foreign
        if not config_file.is_file():
            # What a process that died between its first writes left.
            begun = all(entry.name in ("checkpoints", ".config.json.tmp") for entry in self.out.iterdir())
            if begun and not saved_steps(self.checkpoints):
                return None
            raise foreign
        try:
            values = json.loads(config_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{config_file}: not valid JSON ({error}); give another --out") from error
        if not isinstance(values, dict) or values.get("algorithm") not in RECIPES:
            raise foreign
        return values

    def _refuse_changes(self, before: dict[str, Any], values: dict[str, Any]) -> None:
        changed = [key for key in changed_keys(before, values) if key not in NOT_COMPARED]
        if changed:
            shown = [f"{key} (was {_at(before, key)!r}, now {_at(values, key)!r})" for key in changed]
            raise ConfigError(
                f"{self.out}: --resume with a changed recipe: {', '.join(shown)}; "
                "undo the change, or start a new run in another --out"
            )

    def _holds_results(self) -> bool:
        """False for a directory whose run stopped before its first step, on a wrong input say: nothing is lost."""
        metrics = self.out / "metrics.jsonl"
        has_metrics = metrics.is_file() and metrics.stat().st_size > 0
        return has_metrics or bool(saved_steps(self.checkpoints)) or self.model_directory.exists()

    def _prepare_directory(self, config_file: Path, values: dict[str, Any]) -> None:
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.out}: cannot write there: {error}; give another --out") from error
        remove_leftovers(self.checkpoints)
        for leftover in (*self.out.glob(".*.tmp"), *self.out.glob(".model.*.old")):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink()
        self._forget_after(self.first_step)
        _write_json(config_file, values)  # first, so that a run that dies now is known for one
        _write_json(self.out / "environment.json", {**describe_environment(), "processes": self.num_processes})

    def _forget_after(self, step: int) -> None:
        """Truncate metrics.jsonl and completions/ to a step: what follows is computed again."""
        metrics = self.out / "metrics.jsonl"
        if metrics.is_file():
            lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = lines if not lines or lines[-1].endswith("\n") else lines[:-1]  # died while appending
            try:
                kept = [line for line in whole if json.loads(line)["step"] <= step]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{metrics}: a line is not what was logged ({error}); restore the file, or start in another --out"
                ) from error
            _write_text(metrics, "".join(kept))
        stopped = self.stopped
        if stopped is not None and stopped["step"] > step:
            (self.out / STOPPED_FILE).unlink()
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

    def of_main(self, value: float) -> float:
        """The main process's value, on every process: what decides must be the same everywhere."""
        if self.num_processes == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.accelerator.device)
        return float(broadcast(tensor, from_process=0)[0])  # type: ignore[index]

    def gathered(self, tensor: Tensor) -> Tensor:
        """Rows of all processes in rank order; every process holds the same number of rows."""
        if self.num_processes == 1:
            return tensor
        return self.accelerator.gather(tensor.to(self.accelerator.device)).to(tensor.device)  # type: ignore[union-attr]

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """What fails inside on one process fails on all, with the first one's message, instead of leaving them waiting.

        Inside there must be no collective operation.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.total(float(error is not None)) and self.num_processes > 1:
            reports = gather_object([None if error is None else _report(error)])
            for rank, report in enumerate(reports):
                if report is not None and error is None:
                    raise _PeerFailed(f"process {rank}: {report[0]}", report[1])
        if error is not None:
            raise error

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
        self._add_up_costs()
        with self.failing_together():
            if self.is_main:
                extra = {"cost": self._cost_now(), "warned": sorted(self._warned)}
                checkpoint = Checkpoint(step, state, {**values, **extra})
                self._flush_metrics()
                save_checkpoint(self.checkpoints, checkpoint, keep=self.config.checkpoint.keep)
                _write_json(self.out / "cost.json", self._cost)
        if stop and step < last_step:
            raise Interrupted(stop, self.out, step)

    @contextlib.contextmanager
    def stopping_cleanly(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the run after the current step, saved; a second one ends it at once."""
        asked_at = 0.0

        def request(number: int, frame: FrameType | None) -> None:
            nonlocal asked_at
            if self._stop_signal is not None:
                if self.num_processes > 1 and time.monotonic() - asked_at < SAME_SIGNAL_S:
                    return
                raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
            self._stop_signal, asked_at = number, time.monotonic()
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
        """Add the seconds inside to `time/<phase>` of this step, and to `<phase>_s` of the cost.

        The processor's seconds, of all threads, go to `cpu_s`: beside other programs they say what an idle machine
        would have taken, where the clock does not. Only of phases that the cost knows.
        """
        started, on_processor = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self._timers[phase] = self._timers.get(phase, 0.0) + time.perf_counter() - started
            if f"{phase}_s" in self._cost:
                self._processor_seconds += time.process_time() - on_processor

    def count(self, *, generated_tokens: float = 0, trained_tokens: float = 0, **flops: float) -> None:
        """Add to the cost: tokens, and FLOPs by kind (generate, score, reference, forward, backward, critic)."""
        self._counted["generated_tokens"] += int(generated_tokens)
        self._counted["trained_tokens"] += int(trained_tokens)
        for kind, amount in flops.items():
            self._counted[kind] += float(amount)

    def spent(self) -> dict[str, float]:
        """generated_tokens, flops (of every kind) and seconds of all processes since the run began; collective.

        Seconds are this process's, and those a resumed run's checkpoint had.
        """
        self._add_up_costs()
        return {
            "generated_tokens": self._cost["generated_tokens"],
            "flops": math.fsum(self._cost["flops"].values()),
            "seconds": self._cost["wall_s"] + time.perf_counter() - self._started,
        }

    def set_trainable(self, parameters: int) -> None:
        """Record how many parameters are trained."""
        self._cost["trainable_parameters"] = parameters

    def log(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """Append a line to metrics.jsonl and return it. A value that does not exist is None, never 0.

        A number that is not finite becomes None too: the optimizer has skipped and counted such a step, and JSON has
        no word for it.
        """
        line: dict[str, Any] = {"step": step}
        for name, value in metrics.items():
            line[name] = None if isinstance(value, float) and not math.isfinite(value) else value
        for phase, seconds in self._timers.items():
            line[f"time/{phase}"] = round(seconds, 6)
            if f"{phase}_s" in self._cost:
                self._cost[f"{phase}_s"] += seconds
        line["time/step"] = round(sum(self._timers.values()), 6)
        self._cost["cpu_s"] += self._processor_seconds
        self._timers, self._processor_seconds = {}, 0.0
        if self.is_main:
            path = self.out / "metrics.jsonl"
            with _disk_errors_named(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
            if self.listener is not None:
                self.listener(line)
        return line

    def _flush_metrics(self) -> None:
        """What a checkpoint says was logged must survive a power cut as the checkpoint does."""
        path = self.out / "metrics.jsonl"
        if path.is_file():
            with _disk_errors_named(path):
                flush_to_disk(path)

    def write_completions(self, step: int, columns: dict[str, list[Any]]) -> None:
        """completions/step_NNNNNN.parquet, atomically."""
        if self.num_processes > 1:
            parts = gather_object([columns])
            columns = {name: [value for part in parts for value in part[name]] for name in columns}
        if not self.is_main:
            return
        directory = self.out / "completions"
        temporary = directory / f".{step_name(step)}.tmp"
        target = directory / f"{step_name(step)}.parquet"
        with _disk_errors_named(target):
            directory.mkdir(exist_ok=True)
            pq.write_table(pa.table(columns), temporary)
            flush_to_disk(temporary)
            os.replace(temporary, target)

    def warn_once(self, key: str, message: str) -> None:
        """Say something once in a run, resumes included."""
        if key not in self._warned:
            self._warned.add(key)
            if self.is_main:
                logger.warning(message)

    def finish(self, save_model: Callable[[Path], Any]) -> None:
        """Write `model/` and the final cost.json; `save_model(directory)` is atomic and called on the main process."""
        self._add_up_costs()
        with self.failing_together():
            if self.is_main:
                with _disk_errors_named(self.model_directory):
                    save_model(self.model_directory)
                _write_json(self.out / "cost.json", self._cost_now())

    @property
    def is_complete(self) -> bool:
        """True where a resumed run has nothing left to do: its model is written."""
        return self.model_directory.is_dir() and bool(saved_steps(self.checkpoints))

    @property
    def stopped(self) -> dict[str, Any] | None:
        """Why training ended: {step, rule, value, limit, best_step}; None where nothing could end it early, or yet."""
        path = self.out / STOPPED_FILE
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return {name: values[name] for name in ("step", "rule", "value", "limit", "best_step")}
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: is not what was written ({error}); delete it and run again with --resume"
            ) from error

    def write_stopped(self, values: dict[str, Any]) -> None:
        """stopped.json, as `write_json` writes."""
        self.write_json(STOPPED_FILE, values)

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """A result beside the model, atomically; before `finish`, so that a complete run has it. Collective."""
        with self.failing_together():
            if self.is_main:
                _write_json(self.out / name, values)

    def _add_up_costs(self) -> None:
        """Add what every process counted since the last time; collective."""
        for key, amount in self.totals(self._counted).items():
            if key in FLOP_KINDS:
                self._cost["flops"][key] += amount
            else:
                self._cost[key] += int(amount)
        self._counted = _empty_counts()

    def _cost_now(self) -> dict[str, Any]:
        now = time.perf_counter()
        self._cost["wall_s"] += now - self._started
        self._started = now
        self._cost["peak_rss_mb"] = max(peak_rss_mb(), self._cost["peak_rss_mb"])
        return json.loads(json.dumps(self._cost))


def _empty_cost() -> dict[str, Any]:
    return {
        "wall_s": 0.0,
        "generate_s": 0.0,
        "score_s": 0.0,
        "update_s": 0.0,
        "cpu_s": 0.0,
        "generated_tokens": 0,
        "trained_tokens": 0,
        "flops": dict.fromkeys(FLOP_KINDS, 0.0),
        "trainable_parameters": 0,
        "peak_rss_mb": 0.0,
    }


def _empty_counts() -> dict[str, float]:
    return {"generated_tokens": 0, "trained_tokens": 0, **dict.fromkeys(FLOP_KINDS, 0.0)}


class _PeerFailed(EquipoiseError):
    """Another process of the run failed; its message and exit code are this one's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def _report(error: Exception) -> tuple[str, int]:
    if isinstance(error, EquipoiseError):
        return str(error), error.exit_code
    return f"{type(error).__name__}: {error}", 1


def _at(values: Any, dotted: str) -> Any:
    """The value under a dotted key; aspect names may hold dots themselves, then the nearest mapping is shown."""
    for key in dotted.split("."):
        if not isinstance(values, dict) or key not in values:
            break
        values = values[key]
    return values


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with _disk_errors_named(path):
            temporary.write_text(text, encoding="utf-8")
            flush_to_disk(temporary)
            os.replace(temporary, path)
    except CheckpointError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _disk_errors_named(path: Path) -> Iterator[None]:
    """A full or failing disk is a CheckpointError that names what could not be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: could not write: {error}; free space and run again with --resume") from error


def _write_json(path: Path, values: Any) -> None:
    _write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")
