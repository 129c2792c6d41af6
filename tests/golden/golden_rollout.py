"""What the golden test computes from the stored rollout, and how the stored numbers are written.

`python -m tests.golden.golden_rollout` rewrites losses.json. That is a change of what training computes: say why in the
CHANGELOG.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from tests.toy import toy_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from equipoise.functional import clipped_policy_loss, combine_objectives, group_advantages
from equipoise.functional.kl import kl_loss_term
from equipoise.models.policy_module import PolicyModule
from equipoise.rollout.logprobs import score_tokens
from equipoise.rollout.types import Rollout

FILE = Path(__file__).with_name("losses.json")


def golden_module() -> PolicyModule:
    """A Llama of two layers whose weights are sines, so that no generator of random numbers has a say."""
    model = AutoModelForCausalLM.from_config(toy_config("llama", hidden=16)).double()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            counter = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
            parameter.copy_(torch.sin(1.0 + index + 0.7 * counter) * (0.8 if parameter.ndim > 1 else 1.0))
    return PolicyModule(model)


def stored_rollout(inputs: dict[str, Any]) -> Rollout:
    """Ragged lists of ids as a rollout padded on both sides."""
    prompts, completions = inputs["prompt_ids"], inputs["completion_ids"]
    count, width, longest = len(prompts), max(map(len, prompts)), max(map(len, completions))
    prompt_ids, completion_ids = (
        torch.zeros(count, width, dtype=torch.long),
        torch.zeros(count, longest, dtype=torch.long),
    )
    for row in range(count):
        prompt_ids[row, width - len(prompts[row]) :] = torch.tensor(prompts[row])
        completion_ids[row, : len(completions[row])] = torch.tensor(completions[row])
    return Rollout(
        prompt_ids_BS=prompt_ids,
        prompt_mask_BS=torch.arange(width)[None] >= width - torch.tensor([len(p) for p in prompts])[:, None],
        completion_ids_BT=completion_ids,
        completion_mask_BT=torch.arange(longest)[None] < torch.tensor([len(c) for c in completions])[:, None],
        sampler_logprobs_BT=torch.zeros(count, longest),
        group_ids_B=torch.tensor(inputs["group_ids"]),
        index_in_group_B=torch.arange(count) % 3,
        finish_reasons=("stop",) * count,
        prompts=("",) * count,
        kinds=("unlabelled",) * count,
        completions=("",) * count,
        temperature=inputs["temperature"],
    )


def computed(inputs: dict[str, Any]) -> dict[str, Any]:
    """Every number that is kept: log-probabilities, entropies, advantages, and a loss for each set of options."""
    rollout, module = stored_rollout(inputs), golden_module()
    scores = score_tokens(module, rollout, with_entropy=True, with_unit_logprobs=True)
    assert scores.entropy_BT is not None and scores.unit_logprobs_BT is not None
    mask, logprobs = rollout.completion_mask_BT, scores.logprobs_BT.detach()
    rewards = torch.tensor(
        [[float("nan") if value is None else value for value in row] for row in inputs["scores"]], dtype=torch.float64
    )
    weights = torch.tensor(inputs["weights"], dtype=torch.float64)
    advantages = {
        method: combine_objectives(rewards, rollout.group_ids_B, weights, method=method)
        for method in ("weighted_sum", "gdpo")
    }
    for scale in ("std", "none", "batch"):
        advantages[f"first aspect, {scale}"] = group_advantages(rewards[:, 0], rollout.group_ids_B, scale=scale)  # type: ignore[arg-type]
    wave = torch.sin(0.3 * torch.arange(mask.numel(), dtype=torch.float64)).reshape(mask.shape)
    old, ref = logprobs + 0.3 * wave, logprobs - 0.2 * wave
    losses = {}
    for kl, ratio, reduction in itertools.product(
        ("k3_weighted", "k3", "k2"), ("token", "sequence"), ("sequence_mean", "token_mean", "constant")
    ):
        loss, metrics = clipped_policy_loss(
            logprobs,
            old,
            advantages["weighted_sum"],
            mask,
            epsilon=0.1,
            epsilon_high=0.2,
            ratio=ratio,  # type: ignore[arg-type]
            reduction=reduction,  # type: ignore[arg-type]
            constant=8.0 if reduction == "constant" else None,
            kl_BT=kl_loss_term(logprobs, old, ref, kind=kl, mask=mask),  # type: ignore[arg-type]
            beta=0.5,
        )
        losses[f"{kl}, {ratio}, {reduction}"] = [float(loss), float(metrics["clip_fraction"])]
    return {
        "logprobs": _rows(logprobs, mask),
        "entropy": _rows(scores.entropy_BT, mask),
        "unit_logprobs": _rows(scores.unit_logprobs_BT, mask),
        "advantages": {name: values.tolist() for name, values in advantages.items()},
        "losses and clip fractions": losses,
        "sft loss": float(-scores.unit_logprobs_BT.sum() / mask.sum()),
    }


def _rows(values_BT: Tensor, mask_BT: Tensor) -> list[list[float]]:
    return [row[keep].tolist() for row, keep in zip(values_BT.detach(), mask_BT, strict=True)]


if __name__ == "__main__":
    stored = json.loads(FILE.read_text(encoding="utf-8"))
    stored["expected"] = computed(stored["inputs"])
    FILE.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
