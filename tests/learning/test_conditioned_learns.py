"""One policy that reads weights reaches the optimum of every weight: in closed form, and as a network that reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.conditioned_toys import TEMPLATE, ReadingWorld
from tests.learning.test_front_learns import BETA, REFERENCE_C, REWARDS_C2, closed_form
from tests.run_toys import metrics, train
from tests.toy import POLITE, RUDE

from equipoise.config import SamplingConfig
from equipoise.models.policy import Policy, load_policy
from equipoise.rollout.preference_conditioning import ask, combine_conditioned, sample_weights
from equipoise.rollout.sampler import generate

PROMPTS, STEPS, RATE = 4, 250, 0.1  # prompts of a step
UNSEEN = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.515, 0.485], [0.235, 0.765], [0.905, 0.095]], dtype=torch.float64)


def advantages(weights_P2: torch.Tensor) -> torch.Tensor:
    """GRPO's of groups that hold every completion once [P, C]; what each is divided by is multiplied back."""
    count = len(REWARDS_C2)
    ids_B = torch.arange(PROMPTS).repeat_interleave(count)
    rewards_BK, weights_BK = REWARDS_C2.repeat(PROMPTS, 1), weights_P2.repeat_interleave(count, dim=0)
    found_PC = combine_conditioned(rewards_BK, ids_B, weights_BK, delta=1e-12).reshape(PROMPTS, count)
    return found_PC * (weights_P2 @ REWARDS_C2.T).std(1, keepdim=True)


def expected_rewards(slope_C2: torch.Tensor, weights_N2: torch.Tensor) -> torch.Tensor:
    return torch.softmax(REFERENCE_C + weights_N2 @ slope_C2.T, 1) @ REWARDS_C2


@pytest.mark.parametrize("corner_share", [0.25, 1.0])
def test_a_policy_linear_in_the_weights_reaches_the_optimum_of_all_of_them(corner_share: float) -> None:
    """Logits log pi_0 + S w: the optimum log pi_0 + r w / beta of every weight is one S, which corners determine."""
    slope_C2 = torch.zeros_like(REWARDS_C2).requires_grad_()
    optimizer = torch.optim.Adam([slope_C2], lr=RATE)
    for step in range(STEPS):
        weights_P2 = sample_weights(2, range(PROMPTS), seed=0, step=step, corner_share=corner_share)
        logprobs_PC = torch.log_softmax(REFERENCE_C + weights_P2 @ slope_C2.T, 1)
        value_PC = advantages(weights_P2) - BETA * (logprobs_PC - REFERENCE_C)
        optimizer.zero_grad()
        (-(logprobs_PC.exp() * value_PC).sum(1).mean()).backward()
        optimizer.step()
    found = expected_rewards(slope_C2.detach(), UNSEEN)
    torch.testing.assert_close(found, torch.stack([closed_form(w) for w in UNSEEN]), rtol=0, atol=5e-3)


def test_advantages_of_other_prompts_weights_teach_nothing_to_read() -> None:
    """The same policy, rewarded by weights dealt to other prompts: it ends where it ignores what it reads."""
    slope_C2 = torch.zeros_like(REWARDS_C2).requires_grad_()
    optimizer = torch.optim.Adam([slope_C2], lr=RATE)
    for step in range(STEPS):
        weights_P2 = sample_weights(2, range(PROMPTS), seed=0, step=step)
        logprobs_PC = torch.log_softmax(REFERENCE_C + weights_P2 @ slope_C2.T, 1)
        dealt_P2 = sample_weights(2, range(PROMPTS), seed=1, step=step)
        value_PC = advantages(dealt_P2) - BETA * (logprobs_PC - REFERENCE_C)
        optimizer.zero_grad()
        (-(logprobs_PC.exp() * value_PC).sum(1).mean()).backward()
        optimizer.step()
    low, high = expected_rewards(slope_C2.detach(), UNSEEN[:2])
    assert (low - high).abs().max() < 0.15
    truth = torch.stack([closed_form(w) for w in UNSEEN[:2]])
    assert (truth[0] - truth[1]).abs().max() > 0.5


def two_kinds(prompts: list[str], completions: list[str]) -> dict[str, list[float]]:
    """Shares of polite and of rude words, more of either is better: they exclude each other."""
    texts = [text.split() for text in completions]
    return {
        name: [sum(word in kind for word in words) / max(1, len(words)) for words in texts]
        for name, kind in (("politeness", POLITE), ("rudeness", RUDE))
    }


def mean_shares(policy: Policy, politeness: float) -> tuple[float, float]:
    """Shares of polite and rude words where so much politeness, and rudeness for the rest, is asked for."""
    prompts = ask(policy, ["can you help", "what is it"], {"politeness": politeness, "rudeness": 1 - politeness})
    rollout = generate(policy, prompts, 64, SamplingConfig(max_tokens=2), seed=99)
    found = two_kinds([], list(rollout.completions))
    return sum(found["politeness"]) / 128, sum(found["rudeness"]) / 128


def test_a_network_learns_to_do_as_it_is_asked(tmp_path: Path) -> None:
    """Through the whole trainer; combined utility is 2 times what was asked, so 2 is all there is to get."""
    world = ReadingWorld(tmp_path, whole=True, initializer_range=0.2)
    aspects = {name: {"higher_is_better": True, "range": [0, 1]} for name in ("politeness", "rudeness")}
    recipe = world.conditioned(
        scorers=[{"function": f"{__name__}:two_kinds", "aspects": aspects}],
        objective_weights={"politeness": 1.0, "rudeness": 1.0},
        conditioned={"template": TEMPLATE, "corner_share": 1.0},
        num_steps=28, prompts_per_step=16, group_size=8, beta=0.0, sampling={"max_tokens": 2},
        optimizer={"learning_rate": 5e-3}, checkpoint={"every": 1000}, completions_every=1000,
    )  # fmt: skip
    train(recipe, tmp_path / "run")
    lines = metrics(tmp_path / "run")
    assert lines[0]["reward/combined"] < 0.2 and abs(lines[0]["asked/gain"]) < 0.1
    assert lines[-1]["reward/combined"] > 1.8
    assert sum(line["asked/gain"] for line in lines[-4:]) / 4 > 0.4
    assert lines[-1]["asked/politeness/rank_correlation"] > 0.8
    policy = load_policy(tmp_path / "run" / "model")
    polite, rude = mean_shares(policy, 1.0), mean_shares(policy, 0.0)
    assert polite[0] > 0.8 and polite[1] < 0.1
    assert rude[1] > 0.8 and rude[0] < 0.1
