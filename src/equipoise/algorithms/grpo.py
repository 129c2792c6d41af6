"""Multi-objective GRPO: sample a group per prompt, score every aspect, reinforce what beats its own group's mean.

Sources: GRPO, arXiv 2402.03300, equation 3; the multi-objective form, arXiv 2503.21819. Usage, every metric and the
details: docs/algorithms/grpo.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor

from equipoise.algorithms.batches import batch_indices, micro_batches, own_part
from equipoise.algorithms.grpo_records import Watch, completion_columns, step_metrics
from equipoise.algorithms.grpo_signal import Objectives, Signal, make_signal
from equipoise.algorithms.run import Run
from equipoise.algorithms.steps import Updater, minibatches
from equipoise.config import GRPOConfig
from equipoise.data import PromptRecord
from equipoise.errors import ConfigError, DataError
from equipoise.functional import clipped_policy_loss
from equipoise.functional.kl import kl_loss_term
from equipoise.models.flops import FlopCounter, sampling_counts, sequence_counts
from equipoise.models.policy import Policy
from equipoise.models.reference import FrozenAdapter
from equipoise.rollout.logprobs import score_in_chunks, score_tokens
from equipoise.rollout.randomness import derived_seed
from equipoise.rollout.sampler import generate
from equipoise.rollout.scorers import Scorer, score_rollout
from equipoise.rollout.types import Rollout

Evaluate = Callable[[int], dict[str, Any]]

_MINIBATCHES = 2  # stream of random numbers for the partition into minibatches
ROWS_WITHOUT_GRADIENT = 32  # completions per pass where micro_batch_size does not say


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
    _check(policy, prompts, config, run)
    run.num_steps = config.num_steps
    updater = Updater(policy.module, config.optimizer, _updates_per_step(config) * config.num_steps, run)
    policy.wrapped = updater.wrapped
    counter = FlopCounter.of(policy.module)
    if (checkpoint := run.restore()) is not None:
        updater.load(checkpoint.tensors, checkpoint.values)
        policy.version = updater.updates
    watch = Watch(**checkpoint.values["watch"]) if checkpoint else Watch()
    with run.stopping_cleanly():
        for step in range(run.first_step, config.num_steps):
            chosen = batch_indices(len(prompts), config.prompts_per_step, step, config.seed)
            with run.timed("generate"):
                rollout = _sample(policy, [prompts[i] for i in chosen], config, step, counter, run)
            with run.timed("score"):
                with run.failing_together():
                    scores_BK = _score(rollout, scorers, run)
                signal = make_signal(rollout, scores_BK, objectives, config, run)
            with run.timed("update"):
                metrics = _update(policy, rollout, signal, config, step, updater, counter, run)
            policy.version = updater.updates
            metrics |= step_metrics(rollout, scores_BK, signal, objectives, run)
            if evaluate is not None and config.evaluation is not None:
                due = (step + 1) % config.evaluation.every == 0 or step + 1 == config.num_steps
                with run.timed("evaluation"):
                    metrics |= evaluate(step + 1) if due else {}
            run.log(step + 1, metrics)
            watch.observe(metrics, objectives, run)
            if (step + 1) % config.completions_every == 0:
                run.write_completions(step + 1, completion_columns(rollout, scores_BK, signal, objectives))
            values = {**updater.values(), "watch": asdict(watch)}
            run.maybe_checkpoint(step + 1, config.num_steps, updater.tensors, values)
    run.finish(policy.saver())
    return policy


def _check(policy: Policy, prompts: Sequence[PromptRecord], config: GRPOConfig, run: Run) -> None:
    """What would otherwise be found at some step of the training."""
    messages = next((record for record in prompts if not isinstance(record.prompt, str)), None)
    if messages is not None and not policy.tokenizer.chat_template:
        raise DataError(
            f"{messages.location or 'a prompt'}: `prompt` is a list of messages, and the tokenizer of {policy.name} "
            "has no chat template; give it one (chat_template.jinja in its directory), or give prompts as texts"
        )
    if isinstance(policy.reference, FrozenAdapter) and run.accelerator.distributed_type == DistributedType.FSDP:
        raise ConfigError(
            f"{policy.name}: an adapter that training continues from cannot be its own reference when weights are "
            "sharded; launch without FSDP, set beta to 0, or merge the adapter into its base first"
        )
    if config.prompts_per_step % run.num_processes:
        raise ConfigError(
            f"prompts_per_step {config.prompts_per_step} does not divide among {run.num_processes} processes; "
            f"use a multiple of {run.num_processes}: groups never straddle processes"
        )


def _updates_per_step(config: GRPOConfig) -> int:
    return config.num_epochs * config.num_minibatches


def _sample(
    policy: Policy, batch: list[PromptRecord], config: GRPOConfig, step: int, counter: FlopCounter, run: Run
) -> Rollout:
    """This process's share of the step's prompts, G completions each."""
    own = own_part(batch, run.rank, run.num_processes)
    rollout = generate(
        policy,
        own,
        config.group_size,
        config.sampling,
        seed=config.seed,
        step=step,
        first_prompt=run.rank * len(own),
        max_prompt_tokens=config.max_prompt_tokens,
    )
    counts = sampling_counts(rollout.prompt_mask_BS, rollout.completion_mask_BT, config.group_size)
    run.count(generated_tokens=int(rollout.lengths_B.sum()), generate=counter.forward(*counts))
    return rollout


def _score(rollout: Rollout, scorers: Sequence[Scorer], run: Run) -> Tensor:
    """Native scores [B, K]; what scorers that know their FLOPs (reward models) spent is counted."""
    before = sum(getattr(scorer, "flops", 0.0) for scorer in scorers)
    scores_BK = score_rollout(rollout, scorers)
    run.count(score=sum(getattr(scorer, "flops", 0.0) for scorer in scorers) - before)
    return scores_BK


def _update(
    policy: Policy,
    rollout: Rollout,
    signal: Signal,
    config: GRPOConfig,
    step: int,
    updater: Updater,
    counter: FlopCounter,
    run: Run,
) -> dict[str, Any]:
    """Every optimizer step on one rollout; returns their mean loss and what was seen of the policy."""
    seen = PolicyObserver(rollout)
    rows_at_once = config.micro_batch_size or ROWS_WITHOUT_GRADIENT
    counts = sequence_counts(rollout.prompt_mask_BS, rollout.completion_mask_BT)
    reference = None
    if config.beta > 0:
        reference = score_in_chunks(policy.reference, rollout, rows_at_once, with_unit_logprobs=True)
        run.count(reference=counter.forward(*counts))
    old_BT = None
    if _updates_per_step(config) > 1:  # off-policy from the second update on: pin down the first policy's view
        scored = score_in_chunks(policy, rollout, rows_at_once, with_entropy=True, with_unit_logprobs=True)
        run.count(forward=counter.forward(*counts))
        seen.observe(torch.arange(len(rollout)), scored, reference)
        old_BT = scored.logprobs_BT
    losses: list[float] = []
    clipped = torch.zeros(2, dtype=torch.float64)
    result: dict[str, Any] = {}
    empty = 0
    for epoch in range(config.num_epochs):
        seed = derived_seed(config.seed, _MINIBATCHES, step, epoch)
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


class PolicyObserver:
    """Collects what the first look at a rollout tells about the policy: entropy, KL, agreement with the sampler."""

    def __init__(self, rollout: Rollout) -> None:
        self._rollout = rollout
        self._sums = {"entropy": 0.0, "tokens": 0.0, "kl": 0.0, "completions": 0.0}
        self._has_kl = False
        self._difference = 0.0

    def observe(self, rows: Tensor, scores: Any, reference: Any | None) -> None:
        """Note these rows of the rollout, each once; `reference` covers the whole rollout."""
        tokens = scores.logprobs_BT.shape[1]
        index = rows.to(scores.logprobs_BT.device)
        mask = self._rollout.completion_mask_BT[index][:, :tokens]
        self._sums["tokens"] += float(mask.sum())
        self._sums["completions"] += len(index)
        self._sums["entropy"] += float(scores.entropy_BT.sum())
        sampled = self._rollout.sampler_logprobs_BT[index][:, :tokens]
        self._difference = max(self._difference, float((scores.logprobs_BT.detach() - sampled).abs().max()))
        if reference is not None:
            self._has_kl = True
            k1 = scores.unit_logprobs_BT - reference.unit_logprobs_BT[index][:, :tokens]
            self._sums["kl"] += float(torch.where(mask, k1, 0.0).sum())

    def metrics(self, run: Run) -> dict[str, float | None]:
        """kl (nats per completion, None without a reference), entropy (nats per token), sampler difference."""
        sums = run.totals(self._sums)
        difference = float(run.gathered(torch.tensor([self._difference])).max())
        return {
            "kl": sums["kl"] / max(1.0, sums["completions"]) if self._has_kl else None,
            "entropy": sums["entropy"] / sums["tokens"] if sums["tokens"] else None,
            "sampler/logprob_difference": difference if sums["completions"] else None,
        }


class MinibatchLoss:
    """The GRPO loss of one minibatch as a sum over micro-batches; the normaliser is global."""

    def __init__(
        self,
        policy: Policy,
        rollout: Rollout,
        signal: Signal,
        old_BT: Tensor | None,
        reference: Any | None,
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
        """A loss per micro-batch of this process's rows, as many on every process, rows of like length together."""
        own = self._signal.own_rows(global_rows)
        own = own[torch.argsort(self._rollout.lengths_B.cpu()[own], stable=True)]
        parts = [own[part] for part in micro_batches(len(own), self._config.micro_batch_size)]
        parts += [own[:0]] * (self._run.largest(len(parts)) - len(parts))
        return [lambda rows=rows: self._micro_batch(rows) for rows in parts]

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
        if self._reference is not None:
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
        counts = sequence_counts(part.prompt_mask_BS, part.completion_mask_BT)
        self._run.count(
            trained_tokens=int(tokens),
            forward=self._counter.forward(*counts),
            backward=self._counter.backward(*counts),
        )
