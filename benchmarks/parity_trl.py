"""Compare our losses with those of TRL's own trainers: the same weights, tokens, rewards and reference.

    make bench-install && .venv/bin/python benchmarks/parity_trl.py --report docs/results/parity_trl.md

Every row runs TRL's trainer class (its forward pass, log-probabilities, advantages and loss) on one side, and ours on
the other; loss and gradient of all parameters must agree to 1e-5. Exit code 0 if all do, 1 otherwise. Models are tiny,
random and built here; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
import torch
from datasets import Dataset
from tests.toy import WORDS, toy_policy_directory
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from equipoise.algorithms.dpo import EncodedPair, PairLosses, ReferencedPair
from equipoise.algorithms.environment import describe_environment
from equipoise.config import DPOConfig
from equipoise.functional import clipped_policy_loss, group_advantages
from equipoise.functional.kl import kl_loss_term
from equipoise.models.policy import load_policy

TOLERANCE = 1e-5
PAIRS, GROUPS, GROUP_SIZE, TOKENS = 6, 5, 4, 10


@dataclass(frozen=True)
class Row:
    """One comparison; gradients are compared by the largest difference over the largest gradient."""

    name: str
    theirs: float
    ours: float
    gradient_difference: float | None

    @property
    def difference(self) -> float:
        """Relative where the value is above 1, absolute below."""
        return abs(self.ours - self.theirs) / max(1.0, abs(self.theirs))

    @property
    def agrees(self) -> bool:
        """Within the tolerance."""
        return self.difference <= TOLERANCE and (self.gradient_difference or 0.0) <= TOLERANCE


class World:
    """Two random models, the policy and its reference, and random token ids of several lengths."""

    def __init__(self, directory: Path) -> None:
        self.policy = toy_policy_directory(directory / "policy", initializer_range=0.2, seed=0)
        self.reference = toy_policy_directory(directory / "reference", initializer_range=0.2, seed=1)
        self.out = str(directory / "trl")
        self.tokenizer = AutoTokenizer.from_pretrained(self.policy)
        self.generator = torch.Generator().manual_seed(0)
        self.pairs = [EncodedPair(self._ids(2, 6), self._ids(1, 9), self._ids(1, 9)) for _ in range(PAIRS)]

    def model(self, name: str) -> Any:
        """A fresh copy as transformers loads it."""
        return AutoModelForCausalLM.from_pretrained(getattr(self, name))

    def _ids(self, least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most + 1, (1,), generator=self.generator))
        return torch.randint(4, 4 + len(WORDS), (length,), generator=self.generator).tolist()


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    """Gradient of every parameter; a parameter that is tied to another counts once."""
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """max |a - b| / max |b| over all parameters."""
    assert [g.shape for g in ours] == [g.shape for g in theirs]
    scale = max(float(g.abs().max()) for g in theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / scale


# -- DPO -------------------------------------------------------------------------------------------------------------

# Our options; TRL's; whether TRL gets one pair at a time. Its `sigmoid` ignores label_smoothing; `aot` is conservative
# DPO where sorting changes nothing, on one pair.
DPO_KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "DPO sigmoid": ({}, {"loss_type": "sigmoid"}, False),
    "DPO conservative (0.2)": ({"label_smoothing": 0.2}, {"loss_type": "aot", "label_smoothing": 0.2}, True),
    "DPO IPO": ({"kind": "ipo"}, {"loss_type": "ipo"}, False),
}


def compare_dpo(world: World, name: str, beta: float) -> Row:
    """The loss of one batch of pairs."""
    from trl import DPOConfig as TheirConfig
    from trl import DPOTrainer

    options, their_options, one_at_a_time = DPO_KINDS[name]
    arguments = TheirConfig(
        output_dir=world.out, beta=beta, report_to="none", use_cpu=True, bf16=False, **their_options
    )
    trainer = DPOTrainer(
        model=world.model("policy"),
        ref_model=world.model("reference"),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "how", "chosen": " do", "rejected": " no"}] * 2),
        processing_class=world.tokenizer,
    )
    batches = [[pair] for pair in world.pairs] if one_at_a_time else [world.pairs]
    losses = [trainer._compute_loss(trainer.model, _their_pairs(batch), return_outputs=False) for batch in batches]
    their_loss = torch.stack(losses).mean()

    policy, reference = (load_policy(path, trainable=True) for path in (world.policy, world.reference))
    config = DPOConfig.model_validate({"policy": {"model": "x"}, "data": "x", "beta": beta, **options})
    nothing = [ReferencedPair(pair, 0.0, 0.0) for pair in world.pairs]
    with torch.no_grad():
        alone = [PairLosses(reference, [row], config, reference.module).sums for row in nothing]
    rows = [
        ReferencedPair(pair, sums["chosen_logprob"], sums["rejected_logprob"])
        for pair, sums in zip(world.pairs, alone, strict=True)
    ]
    loss = PairLosses(policy, rows, config, policy.module).loss / len(rows)
    difference = largest_difference(
        gradients(policy.module.causal, loss), gradients(trainer.accelerator.unwrap_model(trainer.model), their_loss)
    )
    return Row(f"{name}, beta {beta:g}", their_loss.item(), loss.item(), difference)


def _their_pairs(pairs: list[EncodedPair]) -> dict[str, Tensor]:
    """TRL's batch: chosen rows, then rejected ones, padded on the right."""
    sides = [pair.sides[side] for side in (0, 1) for pair in pairs]
    width = max(len(side) for side in sides)
    ids, mask, completion = (torch.zeros(len(sides), width, dtype=torch.long) for _ in range(3))
    for row, side in enumerate(sides):
        ids[row, : len(side)] = torch.tensor(side.prompt_ids + side.completion_ids)
        mask[row, : len(side)] = 1
        completion[row, len(side.prompt_ids) : len(side)] = 1
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}


# -- GRPO ------------------------------------------------------------------------------------------------------------


def compare_grpo(world: World, *, off_policy: bool) -> list[Row]:
    """Advantages (std scaling) of groups that TRL sampled, and the loss with plain k3, token ratio and clipping."""
    from trl import GRPOConfig as TheirConfig
    from trl import GRPOTrainer

    recorded: list[float] = []
    draw = torch.Generator().manual_seed(3)

    def reward(completions: list[str], **_: Any) -> list[float]:
        recorded.extend(torch.randn(len(completions), generator=draw).tolist())
        return recorded[-len(completions) :]

    prompts = [{"prompt": " ".join(WORDS[i : i + 2 + i % 3])} for i in range(GROUPS)]
    arguments = TheirConfig(
        output_dir=world.out, report_to="none", use_cpu=True, bf16=False, loss_type="grpo", beta=0.04, epsilon=0.2,
        scale_rewards="group", num_generations=GROUP_SIZE, max_completion_length=TOKENS, temperature=1.0, top_p=1.0,
        top_k=0, per_device_train_batch_size=GROUPS * GROUP_SIZE, gradient_accumulation_steps=1, seed=5,
        use_bias_correction_kl=False, mask_truncated_completions=False,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=world.model("policy"),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list(prompts),
        processing_class=world.tokenizer,
    )
    trainer.ref_model = world.model("reference").eval()
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(trainer.ref_model, temperature=1.0)
    torch.manual_seed(0)
    batch = trainer._generate_and_score_completions([row for row in prompts for _ in range(GROUP_SIZE)])
    groups = torch.arange(GROUPS).repeat_interleave(GROUP_SIZE)
    advantages = group_advantages(torch.tensor(recorded), groups)
    worst = int((advantages - batch["advantages"]).abs().argmax())
    rows = [Row("GRPO advantages, std (the worst)", float(batch["advantages"][worst]), float(advantages[worst]), None)]

    policy, reference = (load_policy(path, trainable=True) for path in (world.policy, world.reference))
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1).bool()
    completion_mask = batch["completion_mask"].bool()
    logprobs = policy.module(ids, mask, completion_mask).logprobs_BT
    with torch.no_grad():
        ref_logprobs = reference.module(ids, mask, completion_mask).logprobs_BT
    old = logprobs.detach()
    if off_policy:
        old = torch.where(completion_mask, old + 0.3 * torch.randn(old.shape, generator=draw), 0.0)
        batch["old_per_token_logps"] = old
    trainer.current_gradient_accumulation_steps = 1
    their_loss = trainer._compute_loss(trainer.model, batch)
    loss, metrics = clipped_policy_loss(
        logprobs, old, advantages, completion_mask, epsilon=0.2, ratio="token", reduction="sequence_mean",
        kl_BT=kl_loss_term(logprobs, old, ref_logprobs, kind="k3", mask=completion_mask), beta=0.04,
    )  # fmt: skip
    assert (float(metrics["clip_fraction"]) > 0) == off_policy
    difference = largest_difference(
        gradients(policy.module.causal, loss), gradients(trainer.accelerator.unwrap_model(trainer.model), their_loss)
    )
    where = "off-policy, clipped" if off_policy else "on-policy"
    return [*rows, Row(f"GRPO, token ratio, plain k3, {where}", their_loss.item(), loss.item(), difference)]


# -- report ----------------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| comparison | TRL | Equipoise | difference | gradient difference |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        gradient = "" if row.gradient_difference is None else f"{row.gradient_difference:.1e}"
        lines.append(f"| {row.name} | {row.theirs:.7f} | {row.ours:.7f} | {row.difference:.1e} | {gradient} |")
    return "\n".join(lines)


def report(rows: list[Row]) -> str:
    """The results page."""
    import trl

    environment = describe_environment()
    versions = {"trl": trl.__version__, **environment["versions"]}
    shown = ", ".join(f"{name} {versions[name]}" for name in ("trl", "torch", "transformers", "equipoise", "python"))
    verdict = "All rows agree." if all(row.agrees for row in rows) else "NOT all rows agree."
    return f"""# Losses against TRL's

Printed by

```
make bench-install
.venv/bin/python benchmarks/parity_trl.py --report docs/results/parity_trl.md
```

Each row runs TRL's own trainer class on one side and ours on the other, on the same weights (a random 2-layer Llama and
another one as the reference), tokens and rewards, in float32. Differences are of the losses (relative above 1), and of
the gradients of all parameters (largest difference over largest gradient); the tolerance is {TOLERANCE:g}. {verdict}

{table(rows)}

TRL's `sigmoid` loss does not read `label_smoothing`; conservative DPO is its `aot` loss on one pair at a time, where
sorting changes nothing. GRPO: `scale_rewards="group"`, `beta=0.04`, `epsilon=0.2`, `use_bias_correction_kl=False`
against `scale: std`, `kl_loss: k3`; no reward is missing, because TRL and we treat missing ones differently by design.

Versions: {shown}. Machine: {environment["processor"]}, {environment["cores"]} cores, one thread.
"""


def main() -> int:
    """Run every comparison and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="also write this Markdown file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        world = World(Path(directory))
        rows = [compare_dpo(world, name, beta) for name in DPO_KINDS for beta in (0.1, 0.5)]
        rows += compare_grpo(world, off_policy=False) + compare_grpo(world, off_policy=True)[1:]
    print(table(rows))
    if options.report:
        options.report.write_text(report(rows), encoding="utf-8")
    return 0 if all(row.agrees for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
