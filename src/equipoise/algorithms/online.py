"""What algorithms that train on their own completions share: sampling, scoring, observing, and how passes are cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor

from equipoise.algorithms.batches import batch_indices, own_part
from equipoise.algorithms.conditioning import Conditioning
from equipoise.algorithms.run import Run
from equipoise.algorithms.stopping import Ending
from equipoise.config import DPOConfig, GRPOConfig, PPOConfig
from equipoise.data import PromptRecord
from equipoise.errors import ConfigError, DataError
from equipoise.models.flops import FlopCounter, sampling_counts
from equipoise.models.policy import Policy
from equipoise.models.policy_module import TokenScores
from equipoise.models.reference import FrozenAdapter
from equipoise.rollout.passes import passes
from equipoise.rollout.sampler import generate
from equipoise.rollout.scorers import Scorer, score_rollout_with_std
from equipoise.rollout.types import Rollout

Evaluate = Callable[[int], dict[str, Any]]

MINIBATCHES = 2  # stream of random numbers for the partition into minibatches
ROWS_WITHOUT_GRADIENT = 32  # completions per pass where micro_batch_size does not say


def check_inputs(policy: Policy, prompts: Sequence[PromptRecord], config: GRPOConfig | PPOConfig, run: Run) -> None:
    """What would otherwise be found at some step of the training. Raises ConfigError or DataError."""
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


def sample_completions(
    policy: Policy,
    prompts: Sequence[PromptRecord],
    config: GRPOConfig | PPOConfig,
    step: int,
    counter: FlopCounter,
    run: Run,
    conditioning: Conditioning | None = None,
) -> Rollout:
    """This process's share of the step's prompts, `group_size` completions each; `conditioning`: each asks for its own
    weights."""
    chosen = batch_indices(len(prompts), config.prompts_per_step, step, config.seed)
    own = own_part([prompts[i] for i in chosen], run.rank, run.num_processes)
    first_prompt = run.rank * len(own)
    if conditioning is not None:
        own = conditioning.asking(own, step, first_prompt)
    rollout = generate(
        policy,
        own,
        config.group_size,
        config.sampling,
        seed=config.seed,
        step=step,
        first_prompt=first_prompt,
        max_prompt_tokens=config.max_prompt_tokens,
    )
    counts = sampling_counts(rollout.prompt_mask_BS, rollout.completion_mask_BT, config.group_size)
    run.count(generated_tokens=int(rollout.lengths_B.sum()), generate=counter.forward(*counts))
    return rollout


def score_completions(rollout: Rollout, scorers: Sequence[Scorer], run: Run) -> tuple[Tensor, Tensor | None]:
    """Native scores [B, K], and where a scorer is an ensemble its members' standard deviations; what scorers that know
    their FLOPs (reward models) spent is counted."""
    before = sum(getattr(scorer, "flops", 0.0) for scorer in scorers)
    with run.failing_together():
        scored = score_rollout_with_std(rollout, scorers)
    run.count(score=sum(getattr(scorer, "flops", 0.0) for scorer in scorers) - before)
    return scored


def evaluated(
    evaluate: Evaluate | None,
    step: int,
    config: GRPOConfig | PPOConfig | DPOConfig,
    run: Run,
    ending: Ending,
    kl: float | None = None,
    uncertainty: float | None = None,
) -> dict[str, Any]:
    """What is decided after `step` completed steps: whether to end, and the in-loop evaluation where one is due.

    The last step is always evaluated, also where KL or a budget made it the last one.
    """
    metrics: dict[str, Any] = ending.after_update(step, kl, uncertainty)
    if evaluate is None or config.evaluation is None:
        return metrics
    due = step % config.evaluation.every == 0 or step == ending.last_step
    with run.timed("evaluation"):
        measured = evaluate(step) if due else {}
    return metrics | measured | (ending.after_evaluation(step, measured) if due else {})


def own_passes(own: Tensor, rollout: Rollout, size: int | None, run: Run) -> list[Tensor]:
    """Micro-batches of this process's rows; as many on every process, so some may be empty."""
    parts = passes(rollout, own, size)
    return parts + [own[:0]] * (run.largest(len(parts)) - len(parts))


class PolicyObserver:
    """Collects what the first look at a rollout tells about the policy: entropy, KL, agreement with the sampler."""

    def __init__(self, rollout: Rollout) -> None:
        self._rollout = rollout
        self._sums = {"entropy": 0.0, "tokens": 0.0, "kl": 0.0, "completions": 0.0}
        self._has_kl = False
        self._difference = 0.0

    def observe(self, rows: Tensor, scores: TokenScores, reference: TokenScores | None) -> None:
        """Note these rows of the rollout, each once; `reference` covers the whole rollout."""
        assert scores.entropy_BT is not None
        tokens = scores.logprobs_BT.shape[1]
        index = rows.to(scores.logprobs_BT.device)
        mask = self._rollout.completion_mask_BT[index][:, :tokens]
        self._sums["tokens"] += float(mask.sum())
        self._sums["completions"] += len(index)
        self._sums["entropy"] += float(scores.entropy_BT.sum())
        sampled = self._rollout.sampler_logprobs_BT[index][:, :tokens]
        self._difference = max(self._difference, float((scores.logprobs_BT.detach() - sampled).abs().max()))
        if reference is not None:
            assert scores.unit_logprobs_BT is not None and reference.unit_logprobs_BT is not None
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
