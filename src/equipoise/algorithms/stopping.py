"""When training ends before its last step: a KL grown too large, a held-out score that no longer rises, a spent budget.

A policy trained against a learned reward goes on to gain on it after what the reward stands for has begun to fall
(arXiv 2210.10760); KL and a judge that training never uses are what shows it. The decisions are pure functions of what
was measured; `Ending` collects the measurements, keeps them in the checkpoint and acts on them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.algorithms.run import Run
from equipoise.algorithms.steps import placed_like, whole
from equipoise.config import BudgetConfig, StopConfig
from equipoise.config.loading import suggest
from equipoise.errors import ConfigError

logger = logging.getLogger("equipoise")

KL_WINDOW = 5  # steps
LAST_STEP = "num_steps"  # the rule of a run that nothing ended early
BEST = "best/"  # before the names of the best evaluation's parameters in a checkpoint
RULES = {"max_kl": "stop.max_kl", "max_uncertainty": "stop.max_uncertainty", "on": "stop.on"}

Score = float | None


def kl_average(kl: Sequence[float]) -> float | None:
    """Mean of the last 5 steps' KL (nats per completion), of fewer where there were fewer; None for no step.

    >>> kl_average([100.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    3.0
    >>> kl_average([1.0, 2.0])
    1.5
    """
    recent = kl[-KL_WINDOW:]
    return math.fsum(recent) / len(recent) if recent else None


def kl_too_large(kl: Sequence[float], limit: float) -> bool:
    """Whether the average over 5 whole steps exceeds `limit`; a shorter history decides nothing.

    >>> kl_too_large([9.0, 9.0, 9.0, 9.0], 2.0)
    False
    >>> kl_too_large([1.0, 1.0, 9.0, 1.0, 1.0], 2.0), kl_too_large([1.0, 1.0, 9.0, 1.0, 1.0], 2.6)
    (True, False)
    """
    average = kl_average(kl)
    return len(kl) >= KL_WINDOW and average is not None and average > limit


def evaluations_without_improvement(scores: Sequence[Score], min_delta: float) -> int:
    """How many evaluations have passed since the last one that was better by at least `min_delta`; larger is better.

    Compared with the last improvement, so that small gains add up. The first score is an improvement; an evaluation
    without a score (None) is none.

    >>> evaluations_without_improvement([0.5, 0.6, 0.6, 0.55], 0.0)
    2
    >>> evaluations_without_improvement([0.5, 0.75, 1.0], 0.5)  # two gains of 0.25 are one of 0.5
    0
    >>> evaluations_without_improvement([0.5, 0.75, 0.9, None], 0.5)
    3
    """
    reference: float | None = None
    since = 0
    for score in scores:
        improved = score is not None and (reference is None or (score > reference and score - reference >= min_delta))
        reference, since = (score, 0) if improved else (reference, since + 1)
    return since


def best_index(scores: Sequence[Score]) -> int | None:
    """Index of the largest score, the first of equal ones; None where nothing was scored.

    >>> best_index([0.5, None, 0.7, 0.7, 0.6])
    2
    """
    known = [(score, -index) for index, score in enumerate(scores) if score is not None]
    return -max(known)[1] if known else None


def spent_budget(spent: Mapping[str, float], budget: BudgetConfig) -> tuple[str, float, float] | None:
    """(name, spent, limit) of the first limit that is reached, None while all hold.

    >>> spent_budget({"generated_tokens": 90, "flops": 5e9, "seconds": 1.0}, BudgetConfig(generated_tokens=80))
    ('generated_tokens', 90, 80.0)
    >>> spent_budget({"generated_tokens": 90, "flops": 5e9, "seconds": 1.0}, BudgetConfig(flops=6e9)) is None
    True
    """
    for name, limit in budget.model_dump().items():
        if limit is not None and spent[name] >= limit:
            return name, spent[name], float(limit)
    return None


def budget_share(spent: Mapping[str, float], budget: BudgetConfig) -> float:
    """How much of the limit that is nearest is spent; 1 is all of it.

    >>> budget_share({"generated_tokens": 90, "flops": 5e9, "seconds": 1.0}, BudgetConfig(flops=6e9, seconds=4))
    0.8333333333333334
    """
    return max(spent[name] / limit for name, limit in budget.model_dump().items() if limit is not None)


class Ending:
    """Which step is the last one, on every process the same.

    What it decides from is what the main process measured. Its state is plain data in the checkpoint: KL of the last
    steps, every evaluation, why training ended, and with `keep: best` the trained parameters of the best evaluation.
    """

    def __init__(
        self,
        run: Run,
        num_steps: int,
        module: nn.Module,
        *,
        stop: StopConfig | None = None,
        budget: BudgetConfig | None = None,
        evaluate: Callable[[int], dict[str, Any]] | None = None,
    ) -> None:
        """State comes from the run's checkpoint where it has one.

        Raises ConfigError for a rule on a metric that `evaluate` does not give (see its `metric_names`), or without
        an `evaluate` to give any.
        """
        self._run, self._num_steps, self._module = run, num_steps, module
        self._stop, self._budget = stop, budget
        _check_metric(stop, evaluate)
        self._kl: list[float] = []
        self._evaluations: list[tuple[int, Score]] = []
        self._reason: dict[str, Any] | None = None
        self._best: dict[str, Tensor] = {}
        checkpoint = run.restore() if self._acts else None
        if checkpoint is not None:
            state = checkpoint.values["stop"]
            self._kl = list(state["kl"])
            self._evaluations = [(step, score) for step, score in state["evaluations"]]
            self._reason = state["reason"]
            self._best = {
                name.removeprefix(BEST): tensor for name, tensor in checkpoint.tensors.items() if name.startswith(BEST)
            }
        run.num_steps = self.last_step

    @property
    def _acts(self) -> bool:
        return self._stop is not None or self._budget is not None

    @property
    def last_step(self) -> int:
        """Completed steps at the end, as far as is known now."""
        return self._num_steps if self._reason is None else self._reason["step"]

    def steps(self) -> Iterator[int]:
        """Indices of the steps that remain; what is decided during one ends them after it."""
        step = self._run.first_step
        while step < self.last_step:
            yield step
            step += 1

    # -- measurements ----------------------------------------------------------------------------------------------

    def after_update(self, step: int, kl: float | None = None, uncertainty: float | None = None) -> dict[str, float]:
        """Note what `step` completed steps cost and how far the policy is; before the evaluation, which the last step
        always gets. `kl`, and `uncertainty`, the reward ensemble's disagreement over its first level, are None where
        there is none. Returns metrics."""
        metrics = self._note_kl(step, kl)
        limit = self._stop.max_uncertainty if self._stop is not None else None
        if limit is not None and uncertainty is not None:
            uncertainty = self._run.of_main(uncertainty)
            if uncertainty > limit:
                self._end(step, RULES["max_uncertainty"], uncertainty, limit)
        if self._budget is not None:
            spent = {name: self._run.of_main(value) for name, value in self._run.spent().items()}
            self._run.budget_share = budget_share(spent, self._budget)
            reached = spent_budget(spent, self._budget)
            if reached is not None:
                self._end(step, f"budget.{reached[0]}", reached[1], reached[2])
        return metrics

    def _note_kl(self, step: int, kl: float | None) -> dict[str, float]:
        if self._stop is None or self._stop.max_kl is None or kl is None:
            return {}
        kl = self._run.of_main(kl)
        if math.isfinite(kl):  # such a step's update is skipped and counted; it says nothing of the distance
            self._kl = [*self._kl, kl][-KL_WINDOW:]
        average = kl_average(self._kl)
        if average is None:
            return {}
        if kl_too_large(self._kl, self._stop.max_kl):
            self._end(step, RULES["max_kl"], average, self._stop.max_kl)
        return {"stop/kl_average": average}

    def after_evaluation(self, step: int, measured: Mapping[str, Any]) -> dict[str, float]:
        """Note what an evaluation gave; collective. Returns metrics."""
        if self._stop is None or self._stop.on is None:
            return {}
        value = measured.get(self._stop.on)
        native = self._run.of_main(math.nan if value is None else float(value))
        if not math.isfinite(native):
            self._run.warn_once(
                "stop.on", f"{self._stop.on}: an evaluation gave no such number; it counts as one without improvement"
            )
        self._evaluations.append((step, native if math.isfinite(native) else None))
        scores = self._scores()
        if self._stop.keep == "best" and best_index(scores) == len(scores) - 1:
            self._best = {
                name: whole(parameter).detach().cpu()
                for name, parameter in self._module.named_parameters()
                if parameter.requires_grad
            }
        waited = evaluations_without_improvement(scores, self._stop.min_delta)
        if waited >= self._stop.patience:
            self._end(step, RULES["on"], self._evaluations[-1][1], float(self._stop.patience))
        return {"stop/evaluations_without_improvement": waited}

    def _scores(self) -> list[Score]:
        """Evaluations such that larger is better."""
        assert self._stop is not None
        sign = -1.0 if self._stop.higher_is_better is False else 1.0
        return [None if value is None else sign * value for _, value in self._evaluations]

    def _end(self, step: int, rule: str, value: float | None, limit: float) -> None:
        """The first rule that is met ends training; a run at its last step has nothing left to end."""
        if self._reason is not None or step >= self._num_steps:
            return
        self._reason = {"step": step, "rule": rule, "value": value, "limit": limit}
        self._run.num_steps = step
        if self._run.is_main:
            logger.warning("step %d of %d is the last one: %s", step, self._num_steps, explained(self._reason))

    # -- checkpoint and result ---------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The best evaluation's trained parameters by name, where they are kept."""
        return {f"{BEST}{name}": tensor for name, tensor in self._best.items()}

    def values(self) -> dict[str, Any]:
        """What goes into the checkpoint's JSON; nothing where nothing can end the run early."""
        if not self._acts:
            return {}
        evaluations = [list(evaluation) for evaluation in self._evaluations]
        return {"stop": {"kl": self._kl, "evaluations": evaluations, "reason": self._reason}}

    def conclude(self) -> None:
        """After the last step: put the best parameters back where they are to be kept, and write stopped.json.

        Before the model is written, so that a run with a model says why it ended.
        """
        if not self._acts:
            return
        best = best_index(self._scores()) if self._stop is not None else None
        best_step = self._evaluations[best][0] if best is not None else None
        if self._stop is not None and self._stop.keep == "best":
            self._restore_best(best_step)
        reason = self._reason or {"step": self._num_steps, "rule": LAST_STEP, "value": None, "limit": None}
        self._run.write_stopped({**reason, "best_step": best_step})

    def _restore_best(self, best_step: int | None) -> None:
        if best_step is None:
            logger.warning("keep best: no evaluation gave the metric of stop.on; the last step's parameters are saved")
            return
        with torch.no_grad():
            for name, parameter in self._module.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(placed_like(parameter, self._best[name]))
        if self._run.is_main:
            logger.info("the parameters saved are those of step %d, the best evaluation", best_step)


def explained(reason: Mapping[str, Any]) -> str:
    """Why a run ended, for people.

    >>> explained({"rule": "budget.generated_tokens", "value": 120, "limit": 100.0})
    'budget.generated_tokens 100 is spent: 120, 20% more than allowed'
    """
    rule, value, limit = reason["rule"], reason["value"], reason["limit"]
    if rule == RULES["max_kl"]:
        return f"{rule} {limit:g} is exceeded: KL was {value:.4g} nats per completion over {KL_WINDOW} steps"
    if rule == RULES["max_uncertainty"]:
        return f"{rule} {limit:g} is exceeded: the reward ensemble disagrees {value:.4g} times as much as at first"
    if rule == RULES["on"]:
        last = "nothing" if value is None else f"{value:.4g}"
        return f"{rule} did not improve in {limit:g} evaluations, the last one gave {last}"
    over = f", {100 * (value / limit - 1):.3g}% more than allowed" if value > limit else ""
    return f"{rule} {limit:.12g} is spent: {value:.12g}{over}"


def _check_metric(stop: StopConfig | None, evaluate: Callable[[int], dict[str, Any]] | None) -> None:
    if stop is None or stop.on is None:
        return
    if evaluate is None:
        raise ConfigError(f"stop.on {stop.on!r} needs an in-loop evaluation: give `evaluation`, or remove stop.on")
    names = getattr(evaluate, "metric_names", None)  # a plain function does not say
    if names is not None and stop.on not in names:
        raise ConfigError(
            f"stop.on {stop.on!r} is not measured by the in-loop evaluation{suggest(stop.on, sorted(names))}; "
            f"it gives {', '.join(sorted(names))}"
        )
