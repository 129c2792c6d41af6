"""What a GRPO step leaves behind: metrics, the completions file, and warnings."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from equipoise.algorithms.grpo_signal import Objectives, Signal
from equipoise.algorithms.run import Run
from equipoise.functional.objectives import variance_shares
from equipoise.functional.objectives.diagnostics import collapsed_vectors, dead_groups, objective_shares
from equipoise.models.aspects import utilities
from equipoise.rollout.types import Rollout

HIGH_KL = 10.0  # nats per completion
DOMINANT = 0.8  # share of the advantage's variance
DOMINANT_STEPS = 3  # in a row


def step_metrics(
    rollout: Rollout,
    scores_BK: Tensor,
    signal: Signal,
    objectives: Objectives,
    run: Run,
    trained_BK: Tensor | None = None,
) -> dict[str, Any]:
    """Reward, advantage and length statistics over all processes; docs/algorithms/grpo.md defines each.

    `trained_BK`: the scores the signal was made of, where they are others (`pessimism`).
    """
    metrics = completion_metrics(rollout, scores_BK, signal, objectives, run)
    advantages = run.gathered(signal.advantages_B)
    shares = variance_shares(run.gathered(signal.contributions_BK))
    for name, share in zip(signal.contributors, shares.tolist(), strict=True):
        metrics[f"advantage/{name}/variance_share"] = share
    if signal.kl_penalty is not None:
        metrics["reward/kl_penalty"] = signal.kl_penalty
    metrics |= _objective_diagnostics(scores_BK if trained_BK is None else trained_BK, signal, objectives, run)
    return metrics | {"advantage/std": float(advantages.std()) if len(advantages) > 1 else 0.0}


def _objective_diagnostics(
    scores_BK: Tensor, signal: Signal, objectives: Objectives, run: Run
) -> dict[str, float | int]:
    """What each objective had to say before they were combined, and how much of it the combination lost."""
    rewards_NK = run.gathered(utilities(scores_BK, objectives.aspects))
    weights = objectives.weights_K if signal.weights_NK is None else signal.weights_NK
    shares = objective_shares(rewards_NK, signal.all_group_ids, weights)
    dead_K = dead_groups(rewards_NK, signal.all_group_ids)
    metrics: dict[str, float | int] = {}
    for k, name in enumerate(objectives.names):
        metrics[f"objective/{name}/raw_share"] = float(shares.raw_K[k])
        metrics[f"objective/{name}/normalised_share"] = float(shares.normalised_K[k])
        metrics[f"objective/{name}/weighted_share"] = float(shares.weighted_K[k])
        metrics[f"objective/{name}/dead_groups"] = int(dead_K[k])
    # The part of the advantages that is the aspects' own: a KL or a constraint tells equal scores apart.
    advantages_N = run.gathered(signal.contributions_BK)[:, : len(objectives.names)].sum(dim=1)
    vectors, collapsed = _collapsed(rewards_NK, signal, objectives.weights_K, advantages_N)
    return metrics | {"reward_vectors": vectors, "collapsed_vectors": collapsed}


def _collapsed(rewards_NK: Tensor, signal: Signal, weights_K: Tensor, advantages_N: Tensor) -> tuple[int, int]:
    """`collapsed_vectors`, group by group where each has weights of its own."""
    if signal.weights_NK is None:
        whole = collapsed_vectors(rewards_NK, signal.all_group_ids, weights_K, advantages_N)
        return whole.vectors, whole.collapsed
    vectors = collapsed = 0
    for group in signal.all_group_ids.unique():
        rows = signal.all_group_ids == group
        found = collapsed_vectors(
            rewards_NK[rows], signal.all_group_ids[rows], signal.weights_NK[rows][0], advantages_N[rows]
        )
        vectors, collapsed = vectors + found.vectors, collapsed + found.collapsed
    return vectors, collapsed


def completion_metrics(
    rollout: Rollout, scores_BK: Tensor, signal: Signal, objectives: Objectives, run: Run
) -> dict[str, Any]:
    """What is said of completions and their scores whatever is made of them, over all processes."""
    scores = run.gathered(scores_BK)
    combined = run.gathered(signal.combined_B)
    truncated = run.gathered(rollout.truncated_B.double())
    lengths = signal.all_lengths.double()
    metrics: dict[str, Any] = {}
    for k, name in enumerate(objectives.names):
        column = scores[:, k]
        scored = column[~column.isnan()]
        metrics[f"reward/{name}/mean"] = mean_known(column)
        metrics[f"reward/{name}/std"] = float(scored.std()) if len(scored) > 1 else None
        metrics[f"reward/{name}/missing"] = float(column.isnan().double().mean())
    return metrics | {
        "reward/combined": mean_known(combined),
        "reward/unscored": int(scores.isnan().all(dim=1).sum()),
        "completion_length/mean": float(lengths.mean()),
        "completion_length/max": float(lengths.max()),
        "truncated_fraction": float(truncated.mean()),
        "zero_variance_groups": signal.zero_variance_groups,
        "trained_completions": int(signal.all_trained.sum()),
        "prompts_truncated": int(run.total(rollout.prompts_truncated)),
    }


def mean_known(values: Tensor) -> float | None:
    """The mean of what is not NaN, None where all is."""
    known = values[~values.isnan()]
    return float(known.mean()) if len(known) else None


def completion_columns(
    rollout: Rollout, scores_BK: Tensor, signal: Signal, objectives: Objectives, std_BK: Tensor | None = None
) -> dict[str, list[Any]]:
    """Columns of completions/step_*.parquet; share/<aspect> is what the aspect added to the advantage, std/<aspect> how
    far an ensemble's members disagree."""
    columns: dict[str, list[Any]] = {
        "prompt": [prompt if isinstance(prompt, str) else json.dumps(prompt) for prompt in rollout.prompts],
        "kind": list(rollout.kinds),
        "completion": list(rollout.completions),
        "group": rollout.group_ids_B.tolist(),
        "index": rollout.index_in_group_B.tolist(),
    }
    for k, name in enumerate(objectives.names):
        columns[f"score/{name}"] = [None if math.isnan(value) else value for value in scores_BK[:, k].tolist()]
        if std_BK is not None:
            columns[f"std/{name}"] = [None if math.isnan(value) else value for value in std_BK[:, k].tolist()]
    for k, name in enumerate(signal.contributors):
        columns[f"share/{name}"] = signal.contributions_BK[:, k].tolist()
    columns["advantage"] = signal.advantages_B.tolist()
    columns["finish_reason"] = list(rollout.finish_reasons)
    columns["num_tokens"] = rollout.lengths_B.tolist()
    return columns


@dataclass
class Watch:
    """Says once in a run what usually means that it goes wrong; its counts travel with the checkpoint."""

    first_length: float | None = None
    dominant_steps: int = 0  # in a row, with the same verdict

    def observe(self, metrics: dict[str, Any], objectives: Objectives, run: Run) -> None:
        """Look at the metrics of one step."""
        kl = metrics.get("kl")
        if kl is not None and kl > HIGH_KL:
            message = f"KL to the reference is {kl:.1f} nats a completion: raise beta or lower the learning rate"
            run.warn_once("kl", message)
        if metrics["truncated_fraction"] > 0.5:
            run.warn_once("truncated", "more than half of the completions were cut at sampling.max_tokens: raise it")
        self.first_length = self.first_length or metrics["completion_length/mean"]
        if metrics["completion_length/mean"] > 2 * (self.first_length or 0.0):
            run.warn_once("length", "completions are twice as long as at the start: the reward may favour length")
        self._dominance(metrics, objectives, run)

    def _dominance(self, metrics: dict[str, Any], objectives: Objectives, run: Run) -> None:
        """One step of a few groups may lean to one aspect by chance: several in a row do not."""
        if int((objectives.weights_K > 0).sum()) < 2:
            return
        # GRPO's advantage is a sum over aspects; PPO's is not, there it is the score that has shares.
        of, mend = "advantage", " or use gdpo"
        if f"advantage/{objectives.names[0]}/variance_share" not in metrics:
            of, mend = "reward", ""
        shares = {name: metrics[f"{of}/{name}/variance_share"] for name in objectives.names}
        largest = max(shares, key=lambda name: shares[name])
        self.dominant_steps = self.dominant_steps + 1 if shares[largest] > DOMINANT else 0
        if self.dominant_steps >= DOMINANT_STEPS:
            run.warn_once(
                "dominant",
                f"aspect {largest!r} makes over 80% of the {of}'s variance: lower its weight{mend}",
            )
