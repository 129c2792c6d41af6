"""Direct preference optimisation: make the preferred of two responses more likely, measured against the reference.

Loss: DPO, arXiv 2305.18290, equation 7; with label smoothing, E. Mitchell's conservative DPO; IPO, arXiv 2310.12036,
equation 17. Usage, every metric and the details: docs/algorithms/dpo.md.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equipoise.algorithms.batches import batch_indices, own_micro_batches
from equipoise.algorithms.dpo_reference import PAIR_TOKENS, EncodedPair, reference_logprobs
from equipoise.algorithms.online import Evaluate, evaluated
from equipoise.algorithms.run import Run
from equipoise.algorithms.sft import collate
from equipoise.algorithms.steps import Updater
from equipoise.algorithms.stopping import Ending
from equipoise.config import DPOConfig
from equipoise.data import PairRecord, TruncationCounter, completion_end_ids, encode_pair, split_records
from equipoise.data.problems import Problems
from equipoise.errors import DataError
from equipoise.functional import dpo_loss
from equipoise.models.flops import FlopCounter
from equipoise.models.policy import Policy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReferencedPair:
    """A pair with the reference's summed log-probabilities of its two responses, in nats."""

    pair: EncodedPair
    ref_chosen: float
    ref_rejected: float

    def __len__(self) -> int:
        return len(self.pair)


def encode_pairs(policy: Policy, records: Sequence[PairRecord], max_length: int) -> tuple[list[EncodedPair], int]:
    """Encoded pairs, and how many were cut to `max_length` or the model's context.

    Raises DataError naming every pair whose chosen response does not fit, whose two responses are the same tokens, or
    whose prompt cannot be encoded.
    """
    counter, problems = TruncationCounter(), Problems()
    is_chat = policy.prompt_format == "chat"
    end_ids = completion_end_ids(policy.tokenizer, chat=is_chat, eos_token_ids=policy.eos_ids)
    encoded: list[EncodedPair] = []
    for index, record in enumerate(records):
        try:
            ids = encode_pair(
                policy.tokenizer,
                record,
                prompt_format=policy.prompt_format,
                max_length=min(max_length, policy.context_length or max_length),
                counter=counter,
                end_ids=end_ids,
            )
        except DataError as error:
            problems.add(record.location or f"pair {index}", str(error))
        else:
            encoded.append(EncodedPair(*ids))
    problems.raise_if_any()
    return encoded, counter.truncated


def train_dpo(
    policy: Policy,
    pairs: Sequence[PairRecord],
    config: DPOConfig,
    run: Run,
    *,
    evaluate: Evaluate | None = None,
) -> Policy:
    """Align `policy` on preference pairs; writes the run directory and returns the policy.

    Suffixes: N pairs, B = 2N responses, the chosen ones first, T response tokens.

    Args:
        policy: loaded with `trainable=True`; what it is now is the reference, unless it carries another.
        evaluate: called with the step after every config.evaluation.every steps; its numbers join the metrics.

    Raises DataError for pairs that cannot be trained on or that are not those a resumed run began with, Interrupted
    after a signal, with everything saved.
    """
    splits = _encoded_splits(policy, pairs, config)
    counter = FlopCounter.of(policy.module)
    with run.timed("reference"):
        reference = reference_logprobs(policy, splits, config, counter, run)
    training, validation = (_referenced(splits[name], reference[name]) for name in ("train", "validation"))
    steps = math.ceil(len(training) / config.batch_size) * config.num_epochs
    ending = Ending(run, steps, policy.module, stop=config.stop, budget=config.budget, evaluate=evaluate)
    updater = Updater(policy.module, config.optimizer, steps, run)
    policy.wrapped = updater.wrapped
    if (checkpoint := run.restore()) is not None:
        updater.load(checkpoint.tensors, checkpoint.values)
        policy.version = updater.updates
    with run.stopping_cleanly():
        for step in ending.steps():
            rows = [training[i] for i in batch_indices(len(training), config.batch_size, step, config.seed)]
            with run.timed("update"):
                metrics = _update(policy, rows, config, updater, counter, run)
            policy.version = updater.updates
            metrics |= evaluated(evaluate, step + 1, config, run, ending)
            if validation and ((step + 1) % config.evaluate_every == 0 or step + 1 == ending.last_step):
                with run.timed("validation"):
                    metrics |= _validate(policy, validation, config, run)
            run.log(step + 1, metrics)
            values = {**updater.values(), **ending.values()}
            run.maybe_checkpoint(step + 1, ending.last_step, lambda: {**updater.tensors(), **ending.tensors()}, values)
    ending.conclude()
    run.finish(policy.saver())
    return policy


def _encoded_splits(policy: Policy, pairs: Sequence[PairRecord], config: DPOConfig) -> dict[str, list[EncodedPair]]:
    """`train` and `validation`, encoded; what was cut is said."""
    records = split_records(pairs, validation=config.validation_fraction, test=0.0, seed=config.seed)
    if not records["train"]:
        raise DataError("data: no pairs to train on; give at least one, or lower validation_fraction")
    encoded, cut = encode_pairs(policy, [*records["train"], *records["validation"]], config.max_length)
    if cut:
        logger.warning("dpo: %d of %d pairs were cut to %d tokens", cut, len(encoded), config.max_length)
    count = len(records["train"])
    return {"train": encoded[:count], "validation": encoded[count:]}


def _referenced(pairs: list[EncodedPair], reference_N2: Tensor) -> list[ReferencedPair]:
    return [ReferencedPair(pair, *values) for pair, values in zip(pairs, reference_N2.tolist(), strict=True)]


def _update(
    policy: Policy, rows: list[ReferencedPair], config: DPOConfig, updater: Updater, counter: FlopCounter, run: Run
) -> dict[str, Any]:
    """One optimizer step on the batch's mean loss."""
    sums: Counter[str] = Counter()

    def loss_of(part: list[ReferencedPair], filler: ReferencedPair) -> Tensor:
        if not part:
            return _nothing(policy, filler, policy.wrapped)
        losses = PairLosses(policy, part, config, policy.wrapped)
        counts = counter.counts(*losses.masked_ids)
        sums.update(losses.sums)
        run.count(
            trained_tokens=counts[2],
            forward=counter.forward(*counts),
            backward=counter.backward(*counts),
        )
        return losses.loss / len(rows)

    parts = own_micro_batches(rows, config.micro_batch_size, run, tokens=PAIR_TOKENS)
    result = updater.step([lambda part=part: loss_of(part, rows[0]) for part in parts])
    means = _means(sums, config, run)
    return {"loss": means.pop("loss"), **result, **{f"dpo/{name}": value for name, value in means.items()}}


def _validate(policy: Policy, rows: list[ReferencedPair], config: DPOConfig, run: Run) -> dict[str, float]:
    """The same quantities over the held-out pairs; nothing is trained."""
    sums: Counter[str] = Counter()
    with torch.no_grad():
        for part in own_micro_batches(rows, config.micro_batch_size, run, tokens=PAIR_TOKENS):
            if part:
                sums.update(PairLosses(policy, part, config, policy.module).sums)
            else:  # a sharded model needs every process in every pass
                _nothing(policy, rows[0], policy.module)
    return {f"validation/{name}": value for name, value in _means(sums, config, run).items()}


def _nothing(policy: Policy, filler: ReferencedPair, module: Any) -> Tensor:
    """A pass of a process without rows of its own: it takes part, and learns nothing."""
    ids, mask, completion_mask = collate(policy, [filler.pair.sides[0]])
    return module(ids, mask, torch.zeros_like(completion_mask)).logprobs_BT.sum()


class PairLosses:
    """The summed loss of some pairs, and the sums that metrics are means of.

    `sigmoid` compares summed log-probabilities, `ipo` their means over tokens. With `sft_coefficient` the chosen
    response's mean token loss joins, as in equation 1 of arXiv 2404.19733.
    """

    def __init__(self, policy: Policy, rows: list[ReferencedPair], config: DPOConfig, module: Any) -> None:
        sides = [row.pair.sides for row in rows]
        ids, mask, completion_mask = collate(policy, [chosen for chosen, _ in sides] + [bad for _, bad in sides])
        logprobs_BT = module(ids, mask, completion_mask).logprobs_BT
        summed_B, lengths_B = logprobs_BT.sum(dim=1), completion_mask.sum(dim=1)
        ref_B = summed_B.new_tensor([row.ref_chosen for row in rows] + [row.ref_rejected for row in rows])
        divisor_B = lengths_B if config.kind == "ipo" else torch.ones_like(lengths_B)
        first = ids.shape[1] - completion_mask.shape[1]
        self.masked_ids = ids[:, :first], mask[:, :first], completion_mask
        preference, metrics = dpo_loss(
            *(summed_B / divisor_B).chunk(2),
            *(ref_B / divisor_B).chunk(2),
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            kind=config.kind,
            normalizer=1,
        )
        sft = -(summed_B / lengths_B)[: len(rows)].sum()
        self.loss = preference + config.sft_coefficient * sft if config.sft_coefficient else preference
        chosen_N, rejected_N = summed_B.detach().chunk(2)
        ref_chosen_N, ref_rejected_N = ref_B.chunk(2)
        totals = {
            "loss": self.loss,
            "preference_loss": preference,
            "sft_loss": sft,
            "chosen_logprob": chosen_N.sum(),
            "rejected_logprob": rejected_N.sum(),
            "chosen_logratio": (chosen_N - ref_chosen_N).sum(),
            "rejected_logratio": (rejected_N - ref_rejected_N).sum(),
        } | {
            name: metrics[key] * len(rows)
            for name, key in {
                "accuracy": "accuracy",
                "margin": "margin",
                "chosen_reward": "reward_chosen",
                "rejected_reward": "reward_rejected",
            }.items()
        }
        self.sums = {"pairs": float(len(rows))} | {name: float(value.detach()) for name, value in totals.items()}


def _means(sums: Counter[str], config: DPOConfig, run: Run) -> dict[str, float]:
    """Means over the pairs of all processes."""
    totals = run.totals({name: float(sums[name]) for name in _NAMES})
    pairs = totals.pop("pairs")
    if not config.sft_coefficient:
        del totals["preference_loss"], totals["sft_loss"]
    return {name: value / pairs for name, value in totals.items()}


_NAMES = (
    "pairs", "loss", "preference_loss", "sft_loss", "accuracy", "margin", "chosen_reward", "rejected_reward",
    "chosen_logprob", "rejected_logprob", "chosen_logratio", "rejected_logratio",
)  # fmt: skip
