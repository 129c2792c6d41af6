"""PPO: sample, score, predict the score token by token, and reinforce the tokens that did better than predicted.

Sources: PPO, arXiv 1707.06347, equation 7; GAE, arXiv 1506.02438, equation 16; the KL penalty in the reward, arXiv
1909.08593, equation 2; details, arXiv 2403.17031. Usage, every metric and the details: docs/algorithms/ppo.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from equipoise.algorithms.grpo_records import Watch
from equipoise.algorithms.grpo_signal import Objectives
from equipoise.algorithms.online import (
    MINIBATCHES,
    Evaluate,
    PolicyObserver,
    check_inputs,
    evaluated,
    sample_completions,
    score_completions,
)
from equipoise.algorithms.ppo_critic import make_critic, save_critic
from equipoise.algorithms.ppo_records import ppo_columns, ppo_metrics
from equipoise.algorithms.ppo_signal import FirstLook, KLController, TokenSignal, make_token_signal
from equipoise.algorithms.ppo_update import Learner, MinibatchLosses, Totals
from equipoise.algorithms.run import Run
from equipoise.algorithms.steering import Steering
from equipoise.algorithms.steps import minibatches
from equipoise.algorithms.stopping import Ending
from equipoise.algorithms.uncertainty import Uncertainty
from equipoise.config import PPOConfig
from equipoise.data import PromptRecord
from equipoise.models.policy import Policy
from equipoise.rollout.randomness import derived_seed
from equipoise.rollout.scorers import Scorer
from equipoise.rollout.types import Rollout


def train_ppo(
    policy: Policy,
    scorers: Sequence[Scorer],
    prompts: Sequence[PromptRecord],
    config: PPOConfig,
    run: Run,
    *,
    evaluate: Evaluate | None = None,
) -> Policy:
    """Align `policy` on prompts; writes the run directory and returns the policy.

    Suffixes: P prompts, G completions per prompt, B = P*G, T completion tokens, K objectives. B is this process's
    share; whatever is averaged over the batch is averaged over all processes.

    Args:
        policy: loaded with `trainable=True`, `with_reference=True` where config.beta > 0, and `value_head=True` where
            config.critic.kind is `shared`. A separate critic is made here.
        scorers: sources of scores; their aspects are exactly those `objective_weights` names.
        evaluate: called with the step after every config.evaluation.every steps; its numbers join the metrics.

    Raises ConfigError for weights that do not match the scorers or a critic that does not fit the policy, RewardError
    where a scorer fails, Interrupted after a signal, with everything saved.
    """
    objectives = Objectives.of(config, scorers)
    check_inputs(policy, prompts, config, run)
    steering, uncertainty = Steering(config, objectives, prompts, run), Uncertainty(config, scorers, run)
    ending = Ending(run, config.num_steps, policy.module, stop=config.stop, budget=config.budget, evaluate=evaluate)
    learner = Learner(policy, make_critic(policy, config, run), config, run)
    controller = KLController(config.beta)
    watch, observed = Watch(), steering.observing(evaluate)
    if (checkpoint := run.restore()) is not None:
        learner.load(checkpoint.tensors, checkpoint.values)
        controller, watch = KLController(**checkpoint.values["kl"]), Watch(**checkpoint.values["watch"])
    with run.stopping_cleanly():
        for step in ending.steps():
            objectives = steering.objectives(step)
            with run.timed("generate"):
                rollout = sample_completions(policy, prompts, config, step, learner.cost, run)
            with run.timed("score"):
                scores_BK, std_BK = score_completions(rollout, scorers, run)
                trained_BK = uncertainty.trained_on(scores_BK, std_BK, objectives)
            with run.timed("update"):
                seen = PolicyObserver(rollout)
                look = learner.first_look(rollout, seen)
                signal = make_token_signal(
                    rollout, trained_BK, look, objectives, controller.beta, config, run,
                    constraints=steering.constraints,
                )  # fmt: skip
                metrics = _update(learner, rollout, look, signal, step) | seen.metrics(run)
            metrics |= ppo_metrics(rollout, scores_BK, signal, objectives, controller.beta, run)
            metrics |= uncertainty.observe(scores_BK, std_BK, signal.completions, objectives)
            metrics |= steering.observe(objectives, scores_BK, signal.completions)
            metrics |= evaluated(observed, step + 1, config, run, ending, metrics["kl"], uncertainty.ratio())
            controller.observe(signal.kl, len(signal.completions.all_trained), config.adaptive_kl)
            run.log(step + 1, metrics)
            watch.observe(metrics, objectives, run)
            if (step + 1) % config.completions_every == 0:
                run.write_completions(step + 1, ppo_columns(rollout, scores_BK, signal, objectives, std_BK))
            values = {**learner.values(), "kl": asdict(controller), "watch": asdict(watch), **ending.values()}
            values |= {**steering.values(), **uncertainty.values()}
            run.maybe_checkpoint(step + 1, ending.last_step, lambda: {**learner.tensors(), **ending.tensors()}, values)
    ending.conclude()
    steering.conclude(ending.last_step)
    with run.failing_together():
        if run.is_main:
            save_critic(run.out / "critic", policy, learner.critic)
    run.finish(policy.saver())
    return policy


def _update(learner: Learner, rollout: Rollout, look: FirstLook, signal: TokenSignal, step: int) -> dict[str, Any]:
    """Every optimizer step on one rollout; returns means over them."""
    config, run = learner.config, learner.run
    totals = Totals()
    result: dict[str, Any] = {}
    updates = empty = 0
    for epoch in range(config.num_epochs):
        seed = derived_seed(config.seed, MINIBATCHES, step, epoch)
        for rows in minibatches(signal.completions.all_group_ids, config.num_minibatches, seed):
            normalizer = signal.completions.normalizer(rows, "token_mean")
            if normalizer == 0:
                run.warn_once("nothing to train on", "a minibatch had nothing to train on: it is skipped and counted")
                empty += 1
                result = learner.pass_over() | result
                continue
            minibatch = MinibatchLosses(learner, rollout, look, signal, normalizer, totals)
            result |= learner.step(minibatch, rows)
            updates += 1
    sums = run.totals(asdict(totals))

    def mean(name: str, over: float) -> float | None:
        return sums[name] / over if over else None

    total = sums["policy_loss"] + config.value_coefficient * sums["value_loss"]
    return {
        "loss": total / updates if updates else None,
        "policy/loss": mean("policy_loss", updates),
        "value/loss": mean("value_loss", updates),
        "clip_fraction": mean("clipped", sums["policy_tokens"]),
        "value/clip_fraction": mean("value_clipped", sums["value_tokens"]),
        **result,
        **({"empty_minibatches": empty} if empty else {}),
    }
