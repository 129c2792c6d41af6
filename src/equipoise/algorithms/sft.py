"""Supervised fine-tuning: maximise the log-likelihood of given responses.

Loss: minus the mean log-probability of the response tokens, EOS included, over all tokens of the batch (equation 1 of
InstructGPT's supervised stage, arXiv 2203.02155). Usage, metrics and details: docs/algorithms/sft.md.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.algorithms.batches import batch_indices, own_micro_batches
from equipoise.algorithms.run import Run
from equipoise.algorithms.steps import Updater
from equipoise.algorithms.stopping import Ending
from equipoise.config import SFTConfig
from equipoise.data import (
    DemonstrationRecord,
    TruncationCounter,
    completion_end_ids,
    encode_demonstration,
    pad_left,
    pad_right,
    split_records,
)
from equipoise.models.flops import FlopCounter
from equipoise.models.policy import Policy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedDemonstration:
    """Token ids of one demonstration; the completion ends with EOS unless it was cut."""

    prompt_ids: list[int]
    completion_ids: list[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


def encode_demonstrations(
    policy: Policy, records: Sequence[DemonstrationRecord], max_length: int
) -> tuple[list[EncodedDemonstration], int]:
    """Encoded demonstrations, and how many were cut to `max_length` (prompts from the left, then responses)."""
    counter = TruncationCounter()
    is_chat = policy.prompt_format == "chat"
    end_ids = completion_end_ids(policy.tokenizer, chat=is_chat, eos_token_ids=policy.eos_ids)
    encoded = [
        EncodedDemonstration(
            *encode_demonstration(
                policy.tokenizer,
                record.prompt,
                record.response,
                prompt_format=policy.prompt_format,
                max_length=min(max_length, policy.context_length or max_length),
                counter=counter,
                end_ids=end_ids,
            )
        )
        for record in records
    ]
    return encoded, counter.truncated


def train_sft(policy: Policy, demonstrations: Sequence[DemonstrationRecord], config: SFTConfig, run: Run) -> Policy:
    """Train `policy` on demonstrations; writes the run directory and returns the policy.

    Suffixes: B demonstrations of a batch, S prompt tokens, T response tokens.
    """
    splits = split_records(demonstrations, validation=config.validation_fraction, test=0.0, seed=config.seed)
    training, cut = encode_demonstrations(policy, splits["train"], config.max_length)
    validation = (
        encode_demonstrations(policy, splits["validation"], config.max_length)[0] if splits["validation"] else []
    )
    if cut:
        logger.warning("sft: %d of %d demonstrations were cut to %d tokens", cut, len(training), config.max_length)
    steps = math.ceil(len(training) / config.batch_size) * config.num_epochs
    ending = Ending(run, steps, policy.module, budget=config.budget)
    updater = Updater(policy.module, config.optimizer, steps, run)
    policy.wrapped = updater.wrapped
    counter = FlopCounter.of(policy.module)
    if (checkpoint := run.restore()) is not None:
        updater.load(checkpoint.tensors, checkpoint.values)
    with run.stopping_cleanly():
        for step in ending.steps():
            rows = [training[i] for i in batch_indices(len(training), config.batch_size, step, config.seed)]
            with run.timed("update"):
                metrics = _update(policy, rows, config, updater, counter, run)
            ending.after_update(step + 1)
            if validation and ((step + 1) % config.evaluate_every == 0 or step + 1 == ending.last_step):
                with run.timed("validation"):
                    metrics["validation/loss"] = _validation_loss(policy, validation, config, run)
            policy.version = updater.updates
            run.log(step + 1, metrics)
            values = {**updater.values(), **ending.values()}
            run.maybe_checkpoint(step + 1, ending.last_step, updater.tensors, values)
    ending.conclude()
    run.finish(policy.saver())
    return policy


def _update(
    policy: Policy,
    rows: list[EncodedDemonstration],
    config: SFTConfig,
    updater: Updater,
    counter: FlopCounter,
    run: Run,
) -> dict[str, float | None]:
    """One optimizer step on the batch's mean token loss; micro-batches hold rows of like length."""
    total_tokens = sum(len(row.completion_ids) for row in rows)
    parts = own_micro_batches(rows, config.micro_batch_size, run)
    summed = 0.0

    def loss_of(part: list[EncodedDemonstration]) -> Tensor:
        nonlocal summed
        # A process without rows left still takes part in the collective passes, with nothing to learn.
        ids, mask, completion_mask = collate(policy, part or parts[0][:1] or rows[:1])
        if not part:
            completion_mask = torch.zeros_like(completion_mask)
        logprobs_BT = policy.wrapped(ids, mask, completion_mask).logprobs_BT  # type: ignore[misc]
        loss = -logprobs_BT.sum() / total_tokens
        summed += float(loss.detach())
        tokens = completion_mask.shape[1]
        counts = counter.counts(ids[:, :-tokens], mask[:, :-tokens], completion_mask)
        run.count(trained_tokens=counts[2], forward=counter.forward(*counts), backward=counter.backward(*counts))
        return loss

    result = updater.step([lambda part=part: loss_of(part) for part in parts])
    return {"loss": run.total(summed), **result}


def _validation_loss(policy: Policy, rows: list[EncodedDemonstration], config: SFTConfig, run: Run) -> float:
    """Mean token loss in nats over all validation demonstrations."""
    summed, tokens = 0.0, 0.0
    with torch.no_grad():
        for part in own_micro_batches(rows, config.micro_batch_size, run):
            ids, mask, completion_mask = collate(policy, part or rows[:1])
            if not part:  # a sharded model needs every process in every pass
                completion_mask = torch.zeros_like(completion_mask)
            summed -= float(policy.module(ids, mask, completion_mask).logprobs_BT.sum())
            tokens += float(completion_mask.sum())
    totals = run.totals({"summed": summed, "tokens": tokens})
    return totals["summed"] / totals["tokens"]


def collate(policy: Policy, rows: list[EncodedDemonstration]) -> tuple[Tensor, Tensor, Tensor]:
    """ids_BL, mask_BL and completion_mask_BT: prompts padded on the left, responses on the right."""
    prompt_ids, prompt_mask = pad_left([row.prompt_ids for row in rows], policy.pad_id)
    completion_ids, completion_mask = pad_right([row.completion_ids for row in rows], policy.pad_id)
    ids = torch.cat([prompt_ids, completion_ids], dim=1).to(policy.device)
    mask = torch.cat([prompt_mask, completion_mask], dim=1).to(policy.device)
    return ids, mask, completion_mask.to(policy.device)
