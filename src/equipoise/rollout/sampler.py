"""`generate`: sample a group of completions for every prompt.

One of the two seams that carry all the speed. This decode loop prefills each prompt once, shares its cache with the
group, lets finished rows leave and waiting groups join; what it returns does not depend on how rows were batched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from equipoise.config import SamplingConfig
from equipoise.data import PromptRecord, TruncationCounter, encode_prompt, pad_left
from equipoise.errors import ConfigError
from equipoise.kernels import cpu
from equipoise.models.policy import Policy
from equipoise.models.sharding import whole_weights
from equipoise.rollout.decoding import Batch, make_batch
from equipoise.rollout.randomness import uniforms
from equipoise.rollout.stop_strings import StopStrings
from equipoise.rollout.types import FINISHED, TRUNCATED, Rollout

# Shares at which a copy of the cache is worth it: finished rows leave below the one, others join above the other.
COMPACT_BELOW = 0.5  # live rows of those in the batch
JOIN_ABOVE = 0.25  # free groups of those that fit

BLOCK = 64  # entries of the vocabulary that are summed before running sums are taken


def generate(
    policy: Policy,
    prompts: Sequence[PromptRecord | str],
    group_size: int,
    sampling: SamplingConfig,
    *,
    seed: int = 0,
    step: int = 0,
    first_prompt: int = 0,
    max_prompt_tokens: int | None = None,
    rows_at_once: int = 256,
    progress: Callable[[int], None] | None = None,
) -> Rollout:
    """Sample `group_size` completions for each prompt.

    Suffixes: P prompts, G completions per prompt, B = P*G rows in prompt order, S prompt tokens, T completion tokens.

    Args:
        policy: what is sampled; its mode (train or eval) is restored.
        prompts: records, or plain texts.
        sampling: temperature (0 is greedy), max_tokens, top_k, top_p, stop.
        seed, step, first_prompt: coordinates of the random numbers; `first_prompt` is the index of prompts[0] within
            the step over all processes, and with its successors becomes `group_ids_B`.
        max_prompt_tokens: longer prompts are cut from the left; always cut to what the context leaves.
        rows_at_once: most rows decoded together; the result does not depend on it.
        progress: called with the number of completions finished since the last call.

    Raises ConfigError where max_tokens leaves no room for any prompt, DataError for message prompts without a
    chat template.
    """
    records = [PromptRecord(prompt=p) if isinstance(p, str) else p for p in prompts]
    if not records:
        raise ConfigError("generate: no prompts; give at least one")
    encoded, truncated = encode_prompts(policy, records, sampling, max_prompt_tokens)
    rows = np.arange(first_prompt, first_prompt + len(records)).repeat(group_size)
    within = np.tile(np.arange(group_size), len(records))
    draws = torch.from_numpy(uniforms(seed, step, rows, within, sampling.max_tokens)).to(policy.device)
    with _inference(policy):
        stops = StopStrings(policy.tokenizer, sampling.stop)
        decoded = _decode(policy, encoded, group_size, sampling, stops, draws, rows_at_once, progress)
    return _assemble(policy, records, encoded, decoded, group_size, sampling, stops, first_prompt, truncated)


def generate_in_parts(
    policy: Policy,
    prompts: Sequence[PromptRecord],
    group_size: int,
    sampling: SamplingConfig,
    *,
    prompts_at_once: int,
    seed: int = 0,
    step: int = 0,
    max_prompt_tokens: int | None = None,
) -> Iterator[Rollout]:
    """`generate` for many prompts, some at a time: the same completions and group ids, in rollouts that fit memory."""
    for start in range(0, len(prompts), prompts_at_once):
        part = prompts[start : start + prompts_at_once]
        yield generate(
            policy,
            part,
            group_size,
            sampling,
            seed=seed,
            step=step,
            first_prompt=start,
            max_prompt_tokens=max_prompt_tokens,
        )


@contextmanager
def _inference(policy: Policy) -> Iterator[None]:
    """No gradients, eval mode (train mode with gradient checkpointing would turn the cache off), mode restored."""
    # One autocast context around all steps: it casts each weight once and not once a token.
    with torch.no_grad(), whole_weights(policy.module), policy.module.inference():
        yield


def _prompt_limit(policy: Policy, max_tokens: int, max_prompt_tokens: int | None) -> int | None:
    context = policy.context_length
    if context is None:
        return max_prompt_tokens
    room = context - max_tokens
    if room < 1:
        raise ConfigError(
            f"sampling.max_tokens {max_tokens} leaves no room for a prompt in the {context} positions "
            f"of {policy.name}; use at most {context - 1}"
        )
    return room if max_prompt_tokens is None else min(room, max_prompt_tokens)


def encode_prompts(
    policy: Policy, records: Sequence[PromptRecord], sampling: SamplingConfig, max_prompt_tokens: int | None
) -> tuple[list[list[int]], int]:
    """Ids of every prompt, cut to what fits, and how many were cut. Raises what `generate` raises for its prompts."""
    limit = _prompt_limit(policy, sampling.max_tokens, max_prompt_tokens)
    counter = TruncationCounter()
    encoded = [
        encode_prompt(
            policy.tokenizer,
            record.prompt,
            prompt_format=policy.prompt_format,
            max_length=limit,
            counter=counter,
            preamble=record.preamble,
        )
        for record in records
    ]
    return encoded, counter.truncated


@dataclass
class _Decoded:
    """What the rows have sampled so far, padded on the right."""

    ids_BT: Tensor
    mask_BT: Tensor
    logprobs_BT: Tensor
    stopped_B: Tensor  # by an EOS or a stop string
    lengths_B: Tensor

    @classmethod
    def empty(cls, rows: int, steps: int, policy: Policy) -> _Decoded:
        """Nothing sampled yet."""
        device = policy.device
        return cls(
            torch.full((rows, steps), policy.pad_id, dtype=torch.long, device=device),
            torch.zeros(rows, steps, dtype=torch.bool, device=device),
            torch.zeros(rows, steps, device=device),
            torch.zeros(rows, dtype=torch.bool, device=device),
            torch.zeros(rows, dtype=torch.long, device=device),
        )

    def append(
        self,
        rows: Tensor,
        live: Tensor,
        logits: Tensor,
        draws_BT: Tensor,
        sampling: SamplingConfig,
        eos: Tensor,
        stops: StopStrings,
    ) -> Tensor:
        """Sample a token for every row of the batch and note those of live rows; returns all of them."""
        at = self.lengths_B[rows].clamp(max=draws_BT.shape[1] - 1)
        tokens, logprobs = sample_tokens(logits, draws_BT[rows, at], sampling)
        rows, at, own = rows[live], at[live], tokens[live]
        self.ids_BT[rows, at], self.mask_BT[rows, at], self.logprobs_BT[rows, at] = own, True, logprobs[live]
        self.lengths_B[rows] = at + 1
        self.stopped_B[rows] = torch.isin(own, eos) | stops.ended(self.ids_BT, self.lengths_B, rows)
        return tokens

    def finished(self, rows: Tensor) -> Tensor:
        """Which of these rows have ended, by an EOS, a stop string or at the limit."""
        return self.stopped_B[rows] | (self.lengths_B[rows] >= self.ids_BT.shape[1])

    def trimmed(self) -> _Decoded:
        """As many columns as the longest row has."""
        longest = int(self.lengths_B.max())
        return _Decoded(
            self.ids_BT[:, :longest], self.mask_BT[:, :longest], self.logprobs_BT[:, :longest],
            self.stopped_B, self.lengths_B,
        )  # fmt: skip


def _decode(
    policy: Policy,
    encoded: list[list[int]],
    group_size: int,
    sampling: SamplingConfig,
    stops: StopStrings,
    draws_BT: Tensor,
    rows_at_once: int,
    progress: Callable[[int], None] | None,
) -> _Decoded:
    """The decode loop: rows that finish leave the batch, and waiting groups join it."""
    longest_prompt = max(len(ids) for ids in encoded)
    batch = make_batch(policy, group_size, sampling.max_tokens, longest_prompt)
    result = _Decoded.empty(len(encoded) * group_size, sampling.max_tokens, policy)
    eos = torch.tensor(policy.eos_ids, device=policy.device)
    capacity = max(1, rows_at_once // group_size)  # groups
    waiting = 0  # the next group to join
    rows = torch.empty(0, dtype=torch.long, device=policy.device)  # of the batch: index in the whole
    live = torch.empty(0, dtype=torch.bool, device=policy.device)
    while True:
        num_live = int(live.sum())
        free = capacity - -(-num_live // group_size)
        joining = min(free, len(encoded) - waiting)
        if joining and (num_live == 0 or (batch.joins and free >= JOIN_ABOVE * capacity)):
            if num_live < len(rows):
                rows, live = _compacted(batch, rows, live)
            batch.join(encoded[waiting : waiting + joining])
            first, waiting = waiting * group_size, waiting + joining
            rows = torch.cat([rows, torch.arange(first, waiting * group_size, device=rows.device)])
            live = torch.ones_like(rows, dtype=torch.bool)
        elif num_live == 0:
            return result.trimmed()
        tokens = result.append(rows, live, batch.logits, draws_BT, sampling, eos, stops)
        finished = result.finished(rows) & live
        live = live & ~finished
        if progress is not None and bool(finished.any()):
            progress(int(finished.sum()))
        num_live = int(live.sum())
        if num_live == 0:
            continue
        if num_live < COMPACT_BELOW * len(live):
            tokens = tokens[live]
            rows, live = _compacted(batch, rows, live)
        batch.advance(tokens)


def _compacted(batch: Batch, rows: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Finished rows leave the batch."""
    index = live.nonzero(as_tuple=True)[0]
    batch.keep(index)
    return rows[index], live[index]


def sample_tokens(logits_BV: Tensor, uniforms_B: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """One token per row by inverting the cumulative distribution at `uniforms_B`, and its log-probability.

    A cumulative sum and one uniform, rather than V exponentials. Greedy (temperature 0) takes the argmax and reports
    log-probabilities at temperature 1. top_k and top_p zero the tail of the distribution (evaluation only).
    Arithmetic: p = (0.5, 0.25, 0.25), u = 0.6: cumulative (0.5, 0.75, 1), the first entry above 0.6 is token 1.
    """
    if sampling.temperature == 0:
        logprobs = torch.log_softmax(logits_BV, dim=-1)
        tokens = logits_BV.argmax(dim=-1)
        return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)
    cuts = sampling.top_k is not None or (sampling.top_p is not None and sampling.top_p < 1)
    if not cuts and {logits_BV.dtype, uniforms_B.dtype} == {torch.float32} and cpu.fit(logits_BV, uniforms_B):
        return cpu.sample_tokens(logits_BV.contiguous(), uniforms_B.contiguous(), sampling.temperature)
    logits = logits_BV if sampling.temperature == 1 else logits_BV / sampling.temperature
    if cuts:
        logits = _cut_tail(logits, sampling.top_k, sampling.top_p)
    highest_B1 = logits.amax(dim=-1, keepdim=True)
    weights_BV = (logits - highest_B1).exp_()
    tokens_B1, total_B1 = _inverted(weights_BV, uniforms_B[:, None])
    return tokens_B1.squeeze(1), (logits.gather(1, tokens_B1) - highest_B1 - total_B1.log()).squeeze(1)


def _inverted(weights_BV: Tensor, uniforms_B1: Tensor) -> tuple[Tensor, Tensor]:
    """The first entry of each row whose cumulative weight is above the uniform number's share of the row's total.

    Returns the entries and the totals, both [B, 1]. Running sums are taken over blocks of the vocabulary first and
    then within one block: a sum over a block is several times as fast as a running sum over its entries.
    """
    rows, width = weights_BV.shape
    if short := -width % BLOCK:
        weights_BV = torch.nn.functional.pad(weights_BV, (0, short))
    blocks_BNC = weights_BV.view(rows, -1, BLOCK)
    sums_BN = blocks_BNC.sum(dim=-1).cumsum(dim=-1)
    total_B1 = sums_BN[:, -1:]
    targets_B1 = uniforms_B1.to(weights_BV.dtype) * total_B1
    # right=True: the first sum strictly above the target, which one that adds nothing never is.
    block_B1 = torch.searchsorted(sums_BN, targets_B1, right=True)
    before_B1 = torch.where(block_B1 > 0, sums_BN.gather(1, (block_B1 - 1).clamp(min=0)), 0.0)
    within_BC = blocks_BNC[torch.arange(rows, device=block_B1.device), block_B1.squeeze(1)].cumsum(dim=-1)
    found_B1 = torch.searchsorted(within_BC, targets_B1 - before_B1, right=True)
    # Where rounding leaves the target at or above the block's own sum: the block's last entry of any weight.
    last_B1 = torch.searchsorted(within_BC, within_BC[:, -1:].contiguous())
    return block_B1 * BLOCK + torch.minimum(found_B1, last_B1), total_B1


def _cut_tail(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Set logits outside the k most probable tokens, and outside the smallest set of mass p, to -inf."""
    ordered, order = logits.sort(dim=-1, descending=True)
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k is not None:
        drop[:, top_k:] = True
    if top_p is not None:
        probabilities = ordered.masked_fill(drop, -torch.inf).softmax(dim=-1)
        drop |= probabilities.cumsum(dim=-1) - probabilities >= top_p
    return logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -torch.inf)


def _assemble(
    policy: Policy,
    records: list[PromptRecord],
    encoded: list[list[int]],
    decoded: _Decoded,
    group_size: int,
    sampling: SamplingConfig,
    stops: StopStrings,
    first_prompt: int,
    truncated: int,
) -> Rollout:
    prompt_ids, prompt_mask = pad_left(encoded, policy.pad_id)
    device, count = policy.device, len(records)
    texts = [
        stops.cut(policy.tokenizer.decode(row[keep].tolist(), skip_special_tokens=True))
        for row, keep in zip(decoded.ids_BT.cpu(), decoded.mask_BT.cpu(), strict=True)
    ]
    repeated = [record for record in records for _ in range(group_size)]
    return Rollout(
        prompt_ids_BS=prompt_ids.to(device).repeat_interleave(group_size, dim=0),
        prompt_mask_BS=prompt_mask.to(device).repeat_interleave(group_size, dim=0),
        completion_ids_BT=decoded.ids_BT,
        completion_mask_BT=decoded.mask_BT,
        sampler_logprobs_BT=decoded.logprobs_BT,
        group_ids_B=torch.arange(first_prompt, first_prompt + count).repeat_interleave(group_size),
        index_in_group_B=torch.arange(group_size).repeat(count),
        finish_reasons=tuple(FINISHED if stop else TRUNCATED for stop in decoded.stopped_B.tolist()),
        prompts=tuple(record.prompt for record in repeated),
        kinds=tuple(record.kind for record in repeated),
        completions=tuple(texts),
        temperature=sampling.temperature,
        policy_version=policy.version,
        prompts_truncated=truncated,
    )
