"""Multi-objective GRPO: sample a group per prompt, score every aspect, reinforce what beats its own group's mean.

Sources: GRPO, arXiv 2402.03300, equation 3; the multi-objective form, arXiv 2503.21819. Usage, every metric and the
details: docs/algorithms/grpo.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from equipoise.algorithms.conditioning import Conditioning
from equipoise.algorithms.conflict import check_conflict, conflict_metrics
from equipoise.algorithms.grpo_records import Watch, completion_columns, step_metrics
from equipoise.algorithms.grpo_signal import Objectives, Signal, make_signal
from equipoise.algorithms.online import (
    MINIBATCHES,
    ROWS_WITHOUT_GRADIENT,
    Evaluate,
    PolicyObserver,
    check_inputs,
    evaluated,
    own_passes,
    sample_completions,
    score_completions,
)
from equipoise.algorithms.run import Run
from equipoise.algorithms.steering import Steering
from equipoise.algorithms.steps import Updater, minibatches
from equipoise.algorithms.stopping import Ending
from equipoise.algorithms.uncertainty import Uncertainty
from equipoise.config import GRPOConfig
from equipoise.data import PromptRecord
from equipoise.functional import clipped_policy_loss, kl_estimate
from equipoise.functional.kl import kl_loss_term
from equipoise.functional.masking import masked_sum
from equipoise.models.aspects import utilities
from equipoise.models.flops import FlopCounter
from equipoise.models.policy import Policy
from equipoise.models.policy_module import TokenScores
from equipoise.models.sharding import is_sharded
from equipoise.rollout.logprobs import score_in_chunks, score_tokens
from equipoise.rollout.randomness import derived_seed
from equipoise.rollout.scorers import Scorer
from equipoise.rollout.types import Rollout


def train_grpo(
    policy: Policy,
    scorers: Sequence[Scorer],
    prompts: Sequence[PromptRecord],
    config: GRPOConfig,
    run: Run,
    *,
    evaluate: Evaluate | None = None,
) -> Policy:
    """Align `policy` on prompts; writes the run directory and returns the policy.

    Suffixes: P prompts, G completions per prompt, B = P*G, T completion tokens, K objectives. B is this process's
    share; what looks across groups is gathered first, and groups never straddle processes.

    Args:
        policy: loaded with `trainable=True`, and `with_reference=True` where config.beta > 0.
        scorers: sources of scores; their aspects are exactly those `objective_weights` names.
        evaluate: called with the step after every config.evaluation.every steps; its numbers join the metrics.

    Raises ConfigError for weights that do not match the scorers, RewardError where a scorer fails, Interrupted after
    a signal, with everything saved.
    """
    objectives = Objectives.of(config, scorers)
    conditioning = Conditioning.of(config, objectives)
    check_inputs(policy, prompts, config, run)
    if conditioning is not None:
        conditioning.prepare(policy)
    check_conflict(config, run)
    steering, uncertainty = Steering(config, objectives, prompts, run), Uncertainty(config, scorers, run)
    ending = Ending(run, config.num_steps, policy.module, stop=config.stop, budget=config.budget, evaluate=evaluate)
    updater = Updater(policy.module, config.optimizer, _updates_per_step(config) * config.num_steps, run)
    policy.wrapped = updater.wrapped
    counter = FlopCounter.of(policy.module)
    if (checkpoint := run.restore()) is not None:
        updater.load(checkpoint.tensors, checkpoint.values)
        policy.version = updater.updates
    watch = Watch(**checkpoint.values["watch"]) if checkpoint else Watch()
    observed = steering.observing(evaluate)
    with run.stopping_cleanly():
        for step in ending.steps():
            objectives = steering.objectives(step)
            with run.timed("generate"):
                rollout = sample_completions(policy, prompts, config, step, counter, run, conditioning)
            with run.timed("score"):
                scores_BK, std_BK = score_completions(rollout, scorers, run)
                trained_BK = uncertainty.trained_on(scores_BK, std_BK, objectives)
            with run.timed("update"):
                seen = PolicyObserver(rollout)
                old_BT, reference = _first_look(policy, rollout, config, seen, counter, run)
                kl_B = _penalised_kl(rollout, old_BT, reference, config)
                signal = make_signal(
                    rollout, trained_BK, objectives, config, run,
                    kl_B=kl_B, constraints=steering.constraints, weights_BK=_own_weights(conditioning, step, rollout),
                )  # fmt: skip
            conflict = conflict_metrics(policy, rollout, signal, config, step, counter, run)
            with run.timed("update"):
                metrics = _update(policy, rollout, signal, old_BT, reference, seen, config, step, updater, counter, run)
            policy.version = updater.updates
            metrics |= step_metrics(rollout, scores_BK, signal, objectives, run, trained_BK) | conflict
            metrics |= uncertainty.observe(scores_BK, std_BK, signal, objectives)
            metrics |= steering.observe(objectives, scores_BK, signal)
            metrics |= _followed(conditioning, step, scores_BK, signal, objectives, run)
            metrics |= evaluated(observed, step + 1, config, run, ending, metrics["kl"], uncertainty.ratio())
            run.log(step + 1, metrics)
            watch.observe(metrics, objectives, run)
            if (step + 1) % config.completions_every == 0:
                asked = {} if conditioning is None else conditioning.asked_columns(step, rollout.group_ids_B)
                columns = completion_columns(rollout, scores_BK, signal, objectives, std_BK)
                run.write_completions(step + 1, columns | asked)
            values = {**updater.values(), "watch": asdict(watch), **ending.values(), **steering.values()}
            values |= uncertainty.values()
            run.maybe_checkpoint(step + 1, ending.last_step, lambda: {**updater.tensors(), **ending.tensors()}, values)
    ending.conclude()
    steering.conclude(ending.last_step)
    run.finish(policy.saver())
    return policy


def _own_weights(conditioning: Conditioning | None, step: int, rollout: Rollout) -> Tensor | None:
    """The weights of each completion's own prompt [B, K]; None where all prompts have the same."""
    return None if conditioning is None else conditioning.weights(step, rollout.group_ids_B)


def _followed(
    conditioning: Conditioning | None, step: int, scores_BK: Tensor, signal: Signal, objectives: Objectives, run: Run
) -> dict[str, Any]:
    """Of a conditioned run, how far the step's answers follow the weights that were asked for. Collective."""
    if conditioning is None:
        return {}
    utilities_NK = run.gathered(utilities(scores_BK, objectives.aspects))
    return conditioning.metrics(utilities_NK, step, signal.all_group_ids)


def _updates_per_step(config: GRPOConfig) -> int:
    return config.num_epochs * config.num_minibatches


def _first_look(
    policy: Policy, rollout: Rollout, config: GRPOConfig, seen: PolicyObserver, counter: FlopCounter, run: Run
) -> tuple[Tensor | None, TokenScores | None]:
    """Log-probabilities of the policy that sampled, and of the reference; None where the step needs none."""
    rows_at_once = config.micro_batch_size or ROWS_WITHOUT_GRADIENT
    counts = counter.counts(rollout.prompt_ids_BS, rollout.prompt_mask_BS, rollout.completion_mask_BT)
    reference = None
    if config.beta > 0:
        reference = score_in_chunks(policy.reference, rollout, rows_at_once, with_unit_logprobs=True)
        run.count(reference=counter.forward(*counts))
    # Off-policy from the second update on: pin down the first policy's view. A KL in the reward comes before any loss.
    if _updates_per_step(config) == 1 and config.kl_in == "loss":
        return None, reference
    scored = score_in_chunks(policy, rollout, rows_at_once, with_entropy=True, with_unit_logprobs=True)
    run.count(forward=counter.forward(*counts))
    seen.observe(torch.arange(len(rollout)), scored, reference)
    return scored.logprobs_BT, reference


def _penalised_kl(
    rollout: Rollout, old_BT: Tensor | None, reference: TokenScores | None, config: GRPOConfig
) -> Tensor | None:
    """The summed k1 of each completion, nats, float64 [B]; None where the KL is in the loss."""
    if config.kl_in == "loss":
        return None
    assert old_BT is not None and reference is not None
    k1_BT = kl_estimate(old_BT, reference.logprobs_BT, "k1")
    return masked_sum(k1_BT.double(), rollout.completion_mask_BT, dim=1).cpu()


def _update(
    policy: Policy,
    rollout: Rollout,
    signal: Signal,
    old_BT: Tensor | None,
    reference: TokenScores | None,
    seen: PolicyObserver,
    config: GRPOConfig,
    step: int,
    updater: Updater,
    counter: FlopCounter,
    run: Run,
) -> dict[str, Any]:
    """Every optimizer step on one rollout; returns their mean loss and what was seen of the policy."""
    losses: list[float] = []
    clipped = torch.zeros(2, dtype=torch.float64)
    result: dict[str, Any] = {}
    empty = 0
    for epoch in range(config.num_epochs):
        seed = derived_seed(config.seed, MINIBATCHES, step, epoch)
        for rows in minibatches(signal.all_group_ids, config.num_minibatches, seed):
            normalizer = signal.normalizer(rows, config.reduction)
            if normalizer == 0:
                run.warn_once("nothing to train on", "a minibatch had nothing to train on: it is skipped and counted")
                empty += 1
                result = updater.pass_over() | result
                continue
            minibatch = MinibatchLoss(
                policy, rollout, signal, old_BT, reference, seen, config, normalizer, counter, run
            )
            result |= updater.step(minibatch.micro_batches(rows))
            losses.append(minibatch.loss)
            clipped += minibatch.clipped
    summed = run.totals({"loss": sum(losses), "clipped": float(clipped[0]), "tokens": float(clipped[1])})
    return {
        "loss": summed["loss"] / len(losses) if losses else None,
        "clip_fraction": summed["clipped"] / summed["tokens"] if summed["tokens"] else None,
        **result,
        **({"empty_minibatches": empty} if empty else {}),
        **seen.metrics(run),
    }


class MinibatchLoss:
    """The GRPO loss of one minibatch as a sum over micro-batches; the normaliser is global."""

    def __init__(
        self,
        policy: Policy,
        rollout: Rollout,
        signal: Signal,
        old_BT: Tensor | None,
        reference: TokenScores | None,
        seen: PolicyObserver,
        config: GRPOConfig,
        normalizer: float,
        counter: FlopCounter,
        run: Run,
    ) -> None:
        self._policy, self._rollout, self._signal = policy, rollout, signal
        self._old_BT, self._reference, self._seen = old_BT, reference, seen
        self._config, self._normalizer, self._counter, self._run = config, normalizer, counter, run
        self.loss = 0.0
        self.clipped = torch.zeros(2, dtype=torch.float64)  # clipped tokens, tokens

    def micro_batches(self, global_rows: Tensor) -> list[Callable[[], Tensor]]:
        """A loss per micro-batch of this process's rows, as many on every process.

        Rows whose part of the loss is 0 whatever the policy does get no gradient: they keep their place in the
        normaliser and go through no backward pass. Call it right before the update.
        """
        own = self._signal.own_rows(global_rows)
        moving = self._moving(own)
        self._pass_by(own[~moving])
        parts = own_passes(own[moving], self._rollout, self._config.micro_batch_size, self._run)
        return [lambda rows=rows: self._micro_batch(rows) for rows in parts]

    def _moving(self, rows: Tensor) -> Tensor:
        """Which of these rows can have a gradient: in the loss, with an advantage or with a KL term of their own."""
        if is_sharded(self._policy.module):  # every process takes part in every pass
            return torch.ones_like(rows, dtype=torch.bool)
        trained = self._signal.trained_B[rows]
        if self._reference is not None and self._config.kl_in == "loss":
            return trained
        return trained & (self._signal.advantages_B[rows] != 0)

    def _pass_by(self, rows: Tensor) -> None:
        """Look at rows without a gradient, where nothing has looked at the rollout yet, and count their tokens."""
        if not len(rows):
            return
        part = self._rollout[rows.to(self._policy.device)]
        tokens = int(self._rollout.lengths_B.cpu()[rows][self._signal.trained_B[rows]].sum())
        self.clipped += torch.tensor([0.0, tokens], dtype=torch.float64)
        self._run.count(trained_tokens=tokens)
        if self._old_BT is not None:
            return
        with_kl = self._reference is not None
        scores = score_in_chunks(
            self._policy, part, self._config.micro_batch_size or ROWS_WITHOUT_GRADIENT,
            with_entropy=True, with_unit_logprobs=with_kl,
        )  # fmt: skip
        self._seen.observe(rows, scores, self._reference)
        counts = self._counter.counts(part.prompt_ids_BS, part.prompt_mask_BS, part.completion_mask_BT)
        self._run.count(forward=self._counter.forward(*counts))

    def _micro_batch(self, rows: Tensor) -> Tensor:
        config, device = self._config, self._policy.device
        # A process without rows left still takes part in the collective passes, with an empty mask.
        index = (rows if len(rows) else torch.zeros(1, dtype=torch.long)).to(device)
        part = self._rollout[index].trimmed()
        tokens = part.completion_ids_BT.shape[1]
        scores = score_tokens(self._policy, part, with_entropy=True, with_unit_logprobs=self._reference is not None)
        if len(rows) and self._old_BT is None:
            self._seen.observe(rows, scores, self._reference)
        logprobs_BT = scores.logprobs_BT
        old_BT = logprobs_BT.detach() if self._old_BT is None else self._old_BT[index][:, :tokens]
        mask_BT = part.completion_mask_BT & self._signal.trained_B[index.cpu()].to(device)[:, None]
        if not len(rows):
            mask_BT = torch.zeros_like(mask_BT)
        kl_BT = None
        if self._reference is not None and config.kl_in == "loss":
            ref_BT = self._reference.logprobs_BT[index][:, :tokens]
            kl_BT = kl_loss_term(logprobs_BT, old_BT, ref_BT, kind=config.kl_loss, mask=mask_BT)
        loss, metrics = clipped_policy_loss(
            logprobs_BT,
            old_BT,
            self._signal.advantages_B[index.cpu()].to(device=device, dtype=logprobs_BT.dtype),
            mask_BT,
            epsilon=config.epsilon,
            epsilon_high=config.epsilon_high,
            ratio=config.ratio,
            reduction=config.reduction,
            constant=(config.constant or config.sampling.max_tokens) if config.reduction == "constant" else None,
            normalizer=self._normalizer,
            kl_BT=kl_BT,
            beta=config.beta,
        )
        self._account(loss, metrics, part, mask_BT)
        return loss

    def _account(self, loss: Tensor, metrics: dict[str, Any], part: Rollout, mask_BT: Tensor) -> None:
        self.loss += float(loss.detach())
        tokens = float(mask_BT.sum())
        self.clipped += torch.tensor([float(metrics["clip_fraction"]) * tokens, tokens], dtype=torch.float64)
        counts = self._counter.counts(part.prompt_ids_BS, part.prompt_mask_BS, part.completion_mask_BT)
        self._run.count(
            trained_tokens=int(tokens),
            forward=self._counter.forward(*counts),
            backward=self._counter.backward(*counts),
        )
