"""Expected gradients of RLOO and PPO, by enumerating everything a tiny policy can say.

The policy writes at most two tokens of a vocabulary of three, of which token 0 ends the completion: 7 completions, one
of them a single token long. The objective is E[score] - beta KL(policy || reference); its exact gradient comes from
autograd through the completions' probabilities.
"""

import itertools

import pytest
import torch

from equipoise.algorithms.ppo_signal import token_rewards
from equipoise.functional import clipped_policy_loss, combine_objectives, gae, kl_estimate, masked_sum

TOKENS = torch.tensor([[0, 0], *([a, b] for a in (1, 2) for b in range(3))])
MASK = torch.tensor([[True, False], *[[True, True]] * 6])
BETA = 0.3
SCORES = torch.tensor([0.2, 1.0, -0.7, 0.4, 2.0, 0.1, -1.3], dtype=torch.float64)
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def logits(seed: int) -> torch.Tensor:
    """Row 0: the first token; rows 1 and 2: the second token after first token 1 or 2."""
    return torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def token_logprobs(parameters: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token of each completion: [7, 2], 0 where there is none."""
    table = torch.log_softmax(parameters, dim=1)
    first, second = TOKENS[:, 0], TOKENS[:, 1]
    return torch.stack([table[0, first], table[first, second] * MASK[:, 1]], dim=1)


class World:
    """Policy and reference, what is sampled how often, and the exact gradient of the objective."""

    def __init__(self) -> None:
        self.parameters = logits(0).requires_grad_()
        self.logprobs = token_logprobs(self.parameters)
        self.old = self.logprobs.detach()
        self.k1 = kl_estimate(self.old, token_logprobs(logits(1)), "k1")
        self.probabilities = self.old.sum(1).exp()

    def gradient(self, value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, self.parameters, retain_graph=True)[0]

    def wanted(self, beta: float) -> torch.Tensor:
        """Of minus the objective."""
        log_total = self.logprobs.sum(1)
        kl = (log_total.exp() * (log_total - token_logprobs(logits(1)).sum(1))).sum()
        return self.gradient(beta * kl - (log_total.exp() * SCORES).sum())


@pytest.fixture
def world() -> World:
    made = World()
    assert made.probabilities.sum().item() == pytest.approx(1, rel=1e-12)
    return made


def true_values(world: World, beta: float) -> torch.Tensor:
    """The expected rest of the reward before each token: [7, 2], from the enumeration."""
    rest = SCORES[:, None] - beta * world.k1.flip(1).cumsum(1).flip(1)
    weights = world.probabilities
    values = torch.zeros(7, 2, dtype=torch.float64)
    values[:, 0] = (weights * rest[:, 0]).sum()
    for first in (1, 2):
        rows = TOKENS[:, 0] == first
        values[rows, 1] = (weights * rest[:, 1])[rows].sum() / weights[rows].sum()
    return values


def ppo_gradient(world: World, values: torch.Tensor, lam: float, beta: float) -> torch.Tensor:
    """Expected gradient of PPO's loss at the first update, a sum over tokens."""
    rewards = token_rewards(SCORES, world.k1, MASK, beta)
    advantages, _ = gae(rewards, values, MASK, gamma=1.0, lam=lam)
    loss, _ = clipped_policy_loss(
        world.logprobs,
        world.old,
        world.probabilities[:, None] * advantages,
        MASK,
        reduction="constant",
        constant=1,
        normalizer=1,
    )
    return world.gradient(loss)


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_ppo_with_the_true_values_follows_the_exact_gradient(world: World, lam: float, beta: float) -> None:
    found = ppo_gradient(world, true_values(world, beta), lam, beta)
    assert torch.allclose(found, world.wanted(beta), **CLOSE)


def test_with_lambda_1_any_value_of_a_state_will_do_and_with_less_it_will_not(world: World) -> None:
    wrong = true_values(world, BETA) + torch.tensor([[0.7, 0.0]] + [[0.7, 0.3]] * 3 + [[0.7, -0.9]] * 3)
    assert torch.allclose(ppo_gradient(world, wrong, 1.0, BETA), world.wanted(BETA), **CLOSE)
    assert not torch.allclose(ppo_gradient(world, wrong, 0.0, BETA), world.wanted(BETA), rtol=1e-2, atol=1e-3)


def test_a_value_that_has_seen_its_token_is_biased(world: World) -> None:
    """Values taken one position too late: a baseline that depends on the action is none."""
    values = true_values(world, BETA)
    late = torch.stack([values[:, 1], torch.zeros(7, dtype=torch.float64)], dim=1)
    assert not torch.allclose(ppo_gradient(world, late, 1.0, BETA), world.wanted(BETA), rtol=1e-2, atol=1e-3)


def group_gradient(world: World, size: int, scale: str, beta: float) -> torch.Tensor:
    """Expected gradient of GRPO's loss over all groups of completions, the KL in the reward, a sum over tokens."""
    rewards = SCORES - beta * masked_sum(world.k1, MASK, dim=1)
    total = torch.zeros_like(world.parameters)
    for group in itertools.product(range(7), repeat=size):
        rows = torch.tensor(group)
        advantages = combine_objectives(
            rewards[rows, None],
            torch.zeros(size, dtype=torch.long),
            torch.ones(1, dtype=torch.float64),
            scale=scale,
        )
        loss, _ = clipped_policy_loss(
            world.logprobs[rows], world.old[rows], advantages, MASK[rows], reduction="constant", constant=1
        )
        total += world.probabilities[rows].prod() * world.gradient(loss)
    return total


@pytest.mark.parametrize(("size", "beta"), [(2, 0.0), (2, BETA), (3, BETA)])
def test_rloo_follows_the_exact_gradient_and_grpo_a_part_of_it(world: World, size: int, beta: float) -> None:
    wanted = world.wanted(beta)
    assert torch.allclose(group_gradient(world, size, "leave_one_out", beta), wanted, **CLOSE)
    assert torch.allclose(group_gradient(world, size, "none", beta), (1 - 1 / size) * wanted, **CLOSE)


def test_dividing_by_the_group_s_spread_is_another_direction(world: World) -> None:
    found, wanted = group_gradient(world, 2, "std", 0.0), world.wanted(0.0)
    cosine = (found * wanted).sum() / found.norm() / wanted.norm()
    assert 0.5 < float(cosine) < 0.999
