"""What a run makes of a reward ensemble's disagreement: cautious utilities, metrics, and an early warning.

A policy that is trained against a learned reward comes to where the reward model was never trained; there its members
part (Coste et al., arXiv 2310.02743; Eisenstein et al., arXiv 2312.09244). Suffixes as in grpo.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from equipoise.algorithms.grpo_records import mean_known
from equipoise.algorithms.grpo_signal import Objectives, Signal, weighted_utilities
from equipoise.algorithms.pessimism import kappa_of, pessimistic_scores
from equipoise.algorithms.run import Run
from equipoise.config import GRPOConfig, PPOConfig
from equipoise.errors import ConfigError
from equipoise.models.aspects import utilities
from equipoise.rollout.scorers import Scorer, has_std

STATE = "uncertainty"  # its key in the checkpoint's values
WINDOW = 5  # steps: of the first level, and of the one compared with it
WARNING = 1.5  # times the first level


class Uncertainty:
    """Pessimism of a run, the level of its ensemble's disagreement, and the warning. Without an ensemble: nothing.

    A warning is due where the mean standard deviation of an aspect over the last 5 steps is above 1.5 times that of
    the first 5: the policy then writes what the reward model knows less about than at the start.
    """

    def __init__(self, config: GRPOConfig | PPOConfig, scorers: Sequence[Scorer], run: Run) -> None:
        """State comes from the run's checkpoint where it has one.

        Raises ConfigError as `kappa_of` does, or for a rule of `stop` on the disagreement of no ensemble.
        """
        self._kappa_K = kappa_of(config.pessimism, scorers)
        self._run = run
        self._names = [aspect.name for scorer in scorers if has_std(scorer) for aspect in scorer.aspects]
        if config.stop is not None and config.stop.max_uncertainty is not None and not self._names:
            raise ConfigError(
                f"stop.max_uncertainty {config.stop.max_uncertainty:g}: no scorer is an ensemble; train the reward "
                "model with `ensemble: {members: 4}`, list several in `reward_models`, or remove it"
            )
        self._first: dict[str, list[float]] = {name: [] for name in self._names}
        self._last: dict[str, list[float]] = {name: [] for name in self._names}
        checkpoint = run.restore()
        if checkpoint is not None and self._names:
            self._first, self._last = (checkpoint.values[STATE][part] for part in ("first", "last"))

    @property
    def is_pessimistic(self) -> bool:
        """Whether training sees other scores than the means."""
        return any(kappa > 0 for kappa in self._kappa_K)

    def trained_on(self, scores_BK: Tensor, std_BK: Tensor | None, objectives: Objectives) -> Tensor:
        """The scores that become utilities: the means where there is no pessimism, the same tensor then."""
        if not self.is_pessimistic:
            return scores_BK
        assert std_BK is not None  # kappa_of saw to it
        return pessimistic_scores(scores_BK, std_BK, objectives.aspects, self._kappa_K)

    def observe(
        self, scores_BK: Tensor, std_BK: Tensor | None, signal: Signal, objectives: Objectives
    ) -> dict[str, float | None]:
        """Note a step's disagreement, warn where it has grown; returns the step's metrics. Collective.

        `signal` was made of pessimistic scores: its combination is `pessimism/combined`, and `reward/combined` is
        given here too, of the means as in any other run, so that runs compare.
        """
        metrics: dict[str, float | None] = {}
        if self.is_pessimistic:
            metrics["pessimism/combined"] = mean_known(self._run.gathered(signal.combined_B))
            weights = objectives.weights_K if signal.weights_NK is None else signal.weights_NK
            utilities_NK = utilities(self._run.gathered(scores_BK), objectives.aspects)
            metrics["reward/combined"] = mean_known(weighted_utilities(utilities_NK, weights))
        if std_BK is None:
            return metrics
        std_NK = self._run.gathered(std_BK)
        for name in self._names:
            level = mean_known(std_NK[:, objectives.names.index(name)])
            metrics[f"uncertainty/{name}"] = level
            metrics[f"uncertainty/{name}/ratio"] = ratio = self._note(name, level)
            if ratio is not None and ratio > WARNING:
                self._run.warn_once(
                    f"uncertainty/{name}",
                    f"the reward ensemble disagrees on {name!r} {ratio:.2g} times as much as in the first {WINDOW} "
                    "steps: the policy may have left what the reward model knows. Judge its completions by something "
                    "else, stop earlier, raise beta, or give `pessimism`",
                )
        return metrics

    def ratio(self) -> float | None:
        """The largest `uncertainty/<aspect>/ratio` so far noted, None before there is one."""
        ratios = [level_ratio(self._first[name], self._last[name]) for name in self._names]
        return max((ratio for ratio in ratios if ratio is not None), default=None)

    def _note(self, name: str, level: float | None) -> float | None:
        """Take a step's level into account; the last 5 over the first 5, None before there are 5 of each."""
        if level is not None:
            if len(self._first[name]) < WINDOW:
                self._first[name].append(level)
            self._last[name] = [*self._last[name], level][-WINDOW:]
        return level_ratio(self._first[name], self._last[name])

    def values(self) -> dict[str, Any]:
        """What goes into the checkpoint's JSON; nothing without an ensemble."""
        return {STATE: {"first": self._first, "last": self._last}} if self._names else {}


def level_ratio(first: Sequence[float], last: Sequence[float]) -> float | None:
    """Mean of the last 5 steps over the mean of the first 5; None before 5 steps, or where the first level is 0.

    >>> level_ratio([1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 2.0, 2.0, 3.0])
    2.0
    >>> level_ratio([1.0, 1.0], [1.0, 1.0]) is None
    True
    """
    if len(first) < WINDOW:
        return None
    start = math.fsum(first) / len(first)
    return math.fsum(last) / len(last) / start if start > 0 else None
