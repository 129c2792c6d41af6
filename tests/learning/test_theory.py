"""Numerical checks of docs/theory.md, one or more for each numbered statement.

Policies are so small that an expectation is a sum over everything that can happen: all groups of completions, all
patterns of missing labels, all signs of the noise. Everything is float64, and no check samples.
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from equipoise.functional import (
    clipped_policy_loss,
    combine_objectives,
    gae,
    group_advantages,
    masked_regression_loss,
    objective_contributions,
    variance_shares,
    zero_variance_groups,
)

ROOT = Path(__file__).resolve().parents[2]
NEVER_CLIP = 1e9
SIZES = [2, 3, 4]


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def same(left: Tensor, right: Tensor, rtol: float = 1e-9, atol: float = 1e-12) -> bool:
    return torch.allclose(left, right, rtol=rtol, atol=atol)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def policy(seed: int, count: int = 4) -> Tensor:
    """Logits of a policy over `count` one-token completions of one prompt."""
    return normal(seed, count).requires_grad_()


def gradient(value: Tensor, parameters: Tensor) -> Tensor:
    return torch.autograd.grad(value, parameters, retain_graph=True)[0]


def true_gradient(logits: Tensor, rewards: Tensor) -> Tensor:
    """Of E[reward], through the completions' probabilities."""
    return gradient((torch.softmax(logits, 0) * rewards).sum(), logits)


def all_groups(count: int, size: int) -> Tensor:
    """Every ordered group of completions: [count ** size, size]."""
    return torch.tensor(list(itertools.product(range(count), repeat=size)))


def expected_update(logits: Tensor, rewards: Tensor, size: int, **options: Any) -> Tensor:
    """E over all groups of the ascent direction of the library's loss on policy, without clip and length mean.

    The loss is linear in the advantages, so each completion gets the sum of its groups' advantages, each weighted by
    its group's probability.
    """
    rewards_NK = rewards[:, None] if rewards.ndim == 1 else rewards
    groups = all_groups(len(logits), size)
    weights_K = options.pop("weights", torch.ones(rewards_NK.shape[1], dtype=torch.float64))
    ids = torch.arange(len(groups)).repeat_interleave(size)
    advantages = combine_objectives(rewards_NK[groups.flatten()], ids, weights_K, delta=0.0, **options)
    logprobs = torch.log_softmax(logits, 0)
    chance = logprobs.detach().exp()[groups].prod(1)
    totals = torch.zeros(len(logits), dtype=torch.float64)
    totals.index_add_(0, groups.flatten(), (chance[:, None] * advantages.view(-1, size) / size).flatten())
    loss, _ = clipped_policy_loss(
        logprobs[:, None],
        logprobs.detach()[:, None],
        totals,
        torch.ones(len(logits), 1),
        reduction="constant",
        constant=1,
        normalizer=1,
    )
    return -gradient(loss, logits)


def cosine(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum() / left.norm() / right.norm())


REWARDS = tensor(0.0, 0.1, 0.4, 1.0)


# Gradient


@pytest.mark.parametrize("baseline", [0.0, -3.0])
def test_t1_score_times_reward_less_any_constant(baseline: float) -> None:
    logits = policy(0)
    logprobs = torch.log_softmax(logits, 0)
    found = gradient((logprobs.detach().exp() * (REWARDS - baseline) * logprobs).sum(), logits)
    assert same(found, true_gradient(logits, REWARDS))


def test_t2_without_a_spread_the_update_is_linear_in_the_aspects() -> None:
    logits, rewards, weights = policy(0), normal(1, 4, 3), tensor(0.2, 0.5, 0.3)
    parts = [expected_update(logits, rewards[:, k], 3, scale="none") for k in range(3)]
    wanted = weights @ torch.stack(parts)
    assert same(expected_update(logits, rewards, 3, weights=weights, scale="none"), wanted)
    parts = [expected_update(logits, rewards[:, k], 3, scale="std") for k in range(3)]
    wanted = weights @ torch.stack(parts)
    assert not same(expected_update(logits, rewards, 3, weights=weights), wanted, rtol=1e-2, atol=1e-3)


# Group normalisation


@pytest.mark.parametrize("size", SIZES)
def test_t3_centring_costs_one_part_in_g(size: int) -> None:
    logits = policy(0)
    wanted = true_gradient(logits, REWARDS)
    assert same(expected_update(logits, REWARDS, size, scale="none"), (1 - 1 / size) * wanted)
    assert same(expected_update(logits, REWARDS, size, scale="leave_one_out"), wanted)


@pytest.mark.parametrize("size", SIZES)
def test_t4_shift_and_scale(size: int) -> None:
    logits = policy(0)
    for scale, factor in (("std", 1.0), ("none", 7.0), ("leave_one_out", 7.0)):
        plain = expected_update(logits, REWARDS, size, scale=scale)
        moved = expected_update(logits, 7 * REWARDS - 3, size, scale=scale)
        assert same(moved, factor * plain)


def test_t4_a_spread_of_noise_counts_as_much_as_one_of_signal() -> None:
    noise, ids = tensor(0.3, -1.0, 0.2, 0.5), torch.zeros(4, dtype=torch.long)
    for size in (1.0, 1e-3, 1e-6):
        assert float(group_advantages(0.5 + size * noise, ids, delta=0.0).std()) == pytest.approx(1, rel=1e-6)
        std = size * float(noise.std())
        found = float(group_advantages(0.5 + size * noise, ids, delta=1e-4).std())
        assert found == pytest.approx(std / (std + 1e-4), rel=1e-6)


def difficulty_weight(p: float, size: int) -> float:
    """T5's g_G(p)."""
    spreads = [math.sqrt(n * (size - n) * (size - 1) / size**3) for n in range(size + 1)]
    return float(sum(binom.pmf(n, size, p) * spread for n, spread in enumerate(spreads))) / (p * (1 - p))


@pytest.mark.parametrize("size", [2, 4, 6])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_t5_yes_or_no_rewards_keep_the_direction_and_change_the_weight(seed: int, size: int) -> None:
    logits, rewards = policy(seed, 3), tensor(0.0, 1.0, 1.0)
    success = float((torch.softmax(logits.detach(), 0) * rewards).sum())
    wanted = difficulty_weight(success, size) * true_gradient(logits, rewards)
    assert same(expected_update(logits, rewards, size, scale="std"), wanted)


def test_t5_groups_of_two_weigh_all_prompts_alike_and_large_ones_do_not() -> None:
    for p in (0.01, 0.3, 0.5):
        assert difficulty_weight(p, 2) == pytest.approx(math.sqrt(0.5), rel=1e-9)
        assert difficulty_weight(p, 4000) == pytest.approx(1 / math.sqrt(p * (1 - p)), rel=0.02)
    relative = [difficulty_weight(0.1, size) / difficulty_weight(0.5, size) for size in (2, 4, 8, 16, 64)]
    assert relative == sorted(relative) and relative[0] == pytest.approx(1) and relative[-1] > 1.5


def test_t5_the_limit_is_the_gradient_of_the_arcsine() -> None:
    p = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    slope = gradient(2 * torch.asin(p.sqrt()), p)
    assert float(slope) == pytest.approx(1 / math.sqrt(0.2 * 0.8), rel=1e-12)


def test_t5_between_prompts_the_direction_changes() -> None:
    """A hard and an even prompt with parameters of their own: their shares of the update are not those of J."""
    hard, even, rewards = tensor(0.0, -3.0).requires_grad_(), tensor(0.0, 0.0).requires_grad_(), tensor(0.0, 1.0)
    wanted = torch.cat([true_gradient(logits, rewards) for logits in (hard, even)])
    for scale, low, high in (("none", 1 - 1e-12, 1 + 1e-12), ("std", 0.5, 0.999)):
        found = torch.cat([expected_update(logits, rewards, 8, scale=scale) for logits in (hard, even)])
        assert low <= cosine(found, wanted) <= high


@pytest.mark.parametrize("size", SIZES)
def test_t6_more_than_two_levels_change_the_direction_within_a_prompt(size: int) -> None:
    logits = policy(0)
    found, wanted = expected_update(logits, REWARDS, size, scale="std"), true_gradient(logits, REWARDS)
    assert 0.5 < cosine(found, wanted) < 0.9999


def test_t6_groups_of_two_know_ranks_alone() -> None:
    logits = policy(0)
    found = expected_update(logits, REWARDS, 2, scale="std")
    assert same(found, expected_update(logits, REWARDS.exp() ** 5, 2, scale="std"))
    others = torch.softmax(logits, 0).detach()
    wins = ((REWARDS[:, None] - REWARDS).sign() * others).sum(1)
    assert same(found, math.sqrt(0.5) * true_gradient(logits, wins))


@pytest.mark.parametrize(("p", "size"), [(0.05, 8), (0.5, 4), (0.9, 3)])
def test_t7_groups_without_a_signal(p: float, size: int) -> None:
    groups = all_groups(2, size)
    chance = tensor(1 - p, p)[groups].prod(1)
    ids = torch.arange(len(groups)).repeat_interleave(size)
    silent = zero_variance_groups(group_advantages(groups.flatten().double(), ids), ids).view(-1, size)[:, 0]
    assert float((chance * silent).sum()) == pytest.approx(p**size + (1 - p) ** size, rel=1e-9)


# Several aspects


def independent(*spreads: float) -> Tensor:
    """One group that holds every combination of two-valued aspects once: [2 ** K, K], uncorrelated by construction."""
    signs = tensor(*itertools.product((-1.0, 1.0), repeat=len(spreads)))
    return signs * tensor(*spreads)


@pytest.mark.parametrize("spreads", [(1.0, 0.1), (1.0, 0.5, 0.25)])
def test_t8_influence_goes_by_the_squared_spread(spreads: tuple[float, ...]) -> None:
    rewards, ids = independent(*spreads), torch.zeros(2 ** len(spreads), dtype=torch.long)
    weights = torch.linspace(0.5, 1.0, len(spreads), dtype=torch.float64)
    squares = (weights * tensor(*spreads)).square()
    shares = variance_shares(objective_contributions(rewards, ids, weights))
    assert same(shares, squares / squares.sum())
    shares = variance_shares(objective_contributions(rewards, ids, weights, method="gdpo", delta=0.0))
    assert same(shares, weights.square() / weights.square().sum())


def test_t8_the_gradient_of_an_aspect_is_bounded_by_its_spread() -> None:
    for seed in range(5):
        logits, rewards = policy(seed), normal(seed + 10, 4)
        chances = torch.softmax(logits, 0).detach()
        spread = ((chances * rewards.square()).sum() - (chances * rewards).sum() ** 2).sqrt()
        scores = torch.eye(4, dtype=torch.float64) - chances  # d log pi(y) / d logits, a row for each y
        fisher_trace = (chances * scores.square().sum(1)).sum()
        assert float(true_gradient(logits, rewards).norm()) <= float(spread * fisher_trace.sqrt()) + 1e-12


def test_t9_gdpo_forgets_the_units_of_every_aspect() -> None:
    logits, rewards, weights = policy(0), normal(1, 4, 2), tensor(0.5, 0.5)
    other_units = rewards * tensor(100.0, 0.01) + tensor(-5.0, 2.0)
    for method, same in (("gdpo", True), ("weighted_sum", False)):
        plain = expected_update(logits, rewards, 3, weights=weights, method=method)
        changed = expected_update(logits, other_units, 3, weights=weights, method=method)
        assert (cosine(plain, changed) > 1 - 1e-9) == same


def test_t9_gdpo_is_not_the_gradient_of_the_weighted_sum() -> None:
    logits, rewards, weights = policy(0), normal(1, 4, 2) * tensor(1.0, 0.05), tensor(0.5, 0.5)
    found = expected_update(logits, rewards, 3, weights=weights, method="gdpo")
    assert cosine(found, true_gradient(logits, rewards @ weights)) < 0.99


def test_t10_two_wins_weigh_as_much_as_one_under_a_common_spread() -> None:
    """Two groups of two completions: better on one aspect of two, and better on both."""
    rewards, ids = tensor([0, 0], [0, 1], [0, 0], [1, 1]), torch.tensor([0, 0, 1, 1])
    summed = combine_objectives(rewards, ids, tensor(1, 1), delta=0.0)
    assert same(summed, math.sqrt(0.5) * tensor(-1, 1, -1, 1))
    apart = combine_objectives(rewards, ids, tensor(1, 1), method="gdpo", delta=0.0)
    centred = combine_objectives(rewards, ids, tensor(1, 1), scale="none")
    assert float(apart[3] / apart[1]) == float(centred[3] / centred[1]) == pytest.approx(2, rel=1e-12)


# Several aspects or one score


def squared_error_gradient(predictions: Tensor, targets_BK: Tensor) -> Tensor:
    """Of the library's masked loss where every row has the same prediction: [K]."""
    predictions = predictions.clone().requires_grad_()
    loss, _ = masked_regression_loss(predictions.expand_as(targets_BK), targets_BK)
    return gradient(loss, predictions)


def test_t11_masked_regression_finds_the_mean_of_what_was_seen() -> None:
    nan = math.nan
    rows = tensor([1, nan], [0, nan], [1, 0.5], [nan, 0.25], [0, nan], [nan, 0.0], [nan, nan], [1, 0.25])
    seen = tensor(3 / 5, 1 / 4)
    assert same(squared_error_gradient(seen, rows), torch.zeros(2, dtype=torch.float64), atol=1e-12)
    shrunk = rows.nan_to_num(0.0)  # every gap read as a score of 0: the mean, times the share of rows with a label
    assert same(squared_error_gradient(seen * tensor(5 / 8, 4 / 8), shrunk), tensor(0, 0), atol=1e-12)


def test_t11_a_gap_that_depends_on_the_score_is_a_bias_that_masking_does_not_mend() -> None:
    """Scores 0 and 1 in equal parts, half of the zeros not given: the mean of what is left is 2/3."""
    rows = tensor([0], [math.nan], [1], [1])
    assert float(squared_error_gradient(tensor(2 / 3), rows)) == pytest.approx(0, abs=1e-12)
    assert float(squared_error_gradient(tensor(1 / 2), rows)) < -0.1


@pytest.mark.parametrize(("q", "aspects"), [(0.5, 4), (0.9, 3)])
def test_t12_complete_rows_are_rare(q: float, aspects: int) -> None:
    patterns = tensor(*itertools.product((0.0, 1.0), repeat=aspects))
    chance = (q * patterns + (1 - q) * (1 - patterns)).prod(1)
    assert same(chance @ patterns, torch.full((aspects,), q, dtype=torch.float64))
    assert float(chance @ patterns.prod(1)) == pytest.approx(q**aspects, rel=1e-12)


@pytest.mark.parametrize(("coupling", "better"), [(0, "several"), (-1, "one")])
def test_t12_several_outputs_use_incomplete_rows(coupling: int, better: str) -> None:
    """Three rows of one response, labelled on (a, b), on a and on b; noise +-1, independent or cancelling in a row."""
    variances = {"several": 0.0, "one": 0.0}
    signs = list(itertools.product((-1.0, 1.0), repeat=4))
    for a_1, b_1, a_2, b_3 in signs:
        b_1 = b_1 if coupling == 0 else coupling * a_1
        variances["several"] += (0.5 * (a_1 + a_2) / 2 + 0.5 * (b_1 + b_3) / 2) ** 2 / len(signs)
        variances["one"] += (0.5 * a_1 + 0.5 * b_1) ** 2 / len(signs)  # only the first row has a total
    assert min(variances, key=lambda name: variances[name]) == better
    if coupling == 0:
        assert variances == {"several": pytest.approx(0.5**2 * 2 / 2), "one": pytest.approx(0.5**2 * 2)}


@pytest.mark.parametrize("correlation", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("aspects", [1, 2, 4])
def test_t13_independent_errors_average_out_and_common_ones_do_not(correlation: float, aspects: int) -> None:
    signs = tensor(*itertools.product((-1.0, 1.0), repeat=aspects + 1))
    errors = math.sqrt(correlation) * signs[:, :1] + math.sqrt(1 - correlation) * signs[:, 1:]
    found = float(errors.mean(1).square().mean())
    assert found == pytest.approx(correlation + (1 - correlation) / aspects, rel=1e-12)


def test_t14_one_score_over_sets_with_other_labels_inverts_an_order() -> None:
    """Set A rates politeness, set B safety; the first response is mostly in A, the second mostly in B."""
    truth = tensor([0.9, 0.1], [0.8, 0.6])
    assert truth.mean(1)[1] > truth.mean(1)[0]
    in_sets = tensor([3, 1], [1, 3])  # how often each set holds each response
    collapsed = (in_sets * truth).sum(1) / in_sets.sum(1)  # what regression on "the score of the row" converges to
    assert collapsed[0] > collapsed[1]
    for response in range(2):
        rows = [[truth[response, 0], math.nan]] * int(in_sets[response, 0])
        rows += [[math.nan, truth[response, 1]]] * int(in_sets[response, 1])
        assert squared_error_gradient(truth[response], tensor(*rows)).abs().max() < 1e-12


def test_t15_one_score_cannot_be_weighed_again() -> None:
    utilities, old, new = tensor([1, 0], [0, 1], [0.5, 0.5]), tensor(0.5, 0.5), tensor(0.9, 0.1)
    assert len((utilities @ old).unique()) == 1 and len((utilities @ new).unique()) == 3


def test_t16_with_every_label_a_linear_model_gains_nothing() -> None:
    features, labels, weights = normal(0, 20, 5), normal(1, 20, 4), tensor(0.1, 0.2, 0.3, 0.4)
    heads = torch.linalg.lstsq(features, labels).solution
    single = torch.linalg.lstsq(features, (labels @ weights)[:, None]).solution[:, 0]
    assert same(heads @ weights, single)


# Error of the reward, loss in the true objective


class Guess:
    """True utilities of `count` responses on K aspects, a reward model's error on each, and what comes of both."""

    def __init__(self, seed: int, size: float = 0.3, count: int = 6, aspects: int = 3) -> None:
        self.weights = torch.softmax(normal(seed, aspects), 0)
        self.errors = size * normal(seed + 100, count, aspects)
        self.true = normal(seed + 200, count, aspects) @ self.weights
        self.error = self.errors @ self.weights
        self.learned = self.true + self.error
        self.bound = float(self.weights @ self.errors.abs().amax(0))
        self.span = float(self.error.max() - self.error.min())
        self.policies = torch.softmax(2 * normal(seed + 300, 12, count), 1)

    def tilted(self, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        """Reference, optimum under the true reward and optimum under the learned one, as log-probabilities."""
        reference = torch.log_softmax(normal(9, len(self.true)), 0)
        best, chosen = (torch.log_softmax(reference + r / beta, 0) for r in (self.true, self.learned))
        return reference, best, chosen


GUESSES = [Guess(seed, size) for seed in range(8) for size in (0.03, 0.3, 2.0)]


def kl(left: Tensor, right: Tensor) -> float:
    return float((left.exp() * (left - right)).sum())


@pytest.mark.parametrize("guess", GUESSES)
def test_t17_regret_in_the_sup_norm(guess: Guess) -> None:
    """Over a class of twelve policies, for each of them: it loses at most 2 epsilon and what it lacks in J-hat."""
    true, learned = guess.policies @ guess.true, guess.policies @ guess.learned
    assert (true - learned).abs().max() <= guess.bound + 1e-12
    assert (true.max() - true <= 2 * guess.bound + (learned.max() - learned) + 1e-12).all()


def test_t17_the_factor_two_is_reached() -> None:
    true, error = tensor(0.0, 0.2), tensor(0.1, -0.1)
    chosen = true + error == (true + error).max()
    assert float(true.max() - true[chosen].min()) == pytest.approx(2 * float(error.abs().max()))


@pytest.mark.parametrize("guess", GUESSES)
def test_t18_an_error_common_to_a_prompt_s_responses_does_no_harm(guess: Guess) -> None:
    assert guess.span <= 2 * guess.bound + 1e-12
    true, learned = guess.policies @ guess.true, guess.policies @ guess.learned
    assert float(true.max() - true[learned.argmax()]) <= guess.span + 1e-12


@pytest.mark.parametrize("guess", GUESSES)
def test_t19_regret_from_the_mean_error_where_the_policies_go(guess: Guess) -> None:
    true, learned = guess.policies @ guess.true, guess.policies @ guess.learned
    best, chosen = guess.policies[true.argmax()], guess.policies[learned.argmax()]
    visited = [float(guess.weights @ (pi @ guess.errors.square()).sqrt()) for pi in (best, chosen)]
    assert float(true.max() - true[learned.argmax()]) <= sum(visited) + 1e-12
    labelled = torch.softmax(normal(4, 6), 0)
    rmse = float((labelled @ guess.error.square()).sqrt())
    for pi in guess.policies:
        chi_square = float((pi.square() / labelled).sum() - 1)
        assert float(pi @ guess.error.abs()) <= math.sqrt(1 + chi_square) * rmse + 1e-12


@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("guess", GUESSES)
def test_t20_under_a_kl_the_regret_is_a_kl_and_of_second_order(guess: Guess, beta: float) -> None:
    reference, best, chosen = guess.tilted(beta)

    def objective(pi: Tensor) -> float:
        return float((pi.exp() * guess.true).sum()) - beta * kl(pi, reference)

    regret = objective(best) - objective(chosen)
    assert regret == pytest.approx(beta * kl(chosen, best), rel=1e-6, abs=1e-9)
    assert regret <= min(guess.span, guess.span**2 / (8 * beta)) + 1e-9
    assert regret <= min(2 * guess.bound, guess.bound**2 / (2 * beta)) + 1e-9


def test_t20_half_the_error_costs_a_quarter() -> None:
    regrets = []
    for size in (0.02, 0.01):
        _, best, chosen = Guess(3, size).tilted(0.5)
        regrets.append(kl(chosen, best))
    assert regrets[0] / regrets[1] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("beta", [0.2, 1.0])
@pytest.mark.parametrize("guess", GUESSES)
def test_t21_how_far_the_kl_lets_the_policy_go(guess: Guess, beta: float) -> None:
    reference, _, chosen = guess.tilted(beta)
    span = float(guess.learned.max() - guess.learned.min())
    assert float((chosen - reference).max()) <= span / beta + 1e-12
    assert kl(chosen, reference) <= span**2 / (8 * beta**2) + 1e-12
    chi_square = float((2 * chosen - reference).exp().sum() - 1)
    assert math.sqrt(1 + chi_square) <= math.exp(span / (2 * beta)) * (1 + 1e-12)


# REINFORCE, RLOO, GRPO, PPO


@pytest.mark.parametrize("size", SIZES)
def test_t22_the_price_of_the_others_mean_as_baseline(size: int) -> None:
    chances = torch.softmax(normal(0, 4), 0)
    variance = float(chances @ REWARDS.square() - (chances @ REWARDS) ** 2)
    groups = all_groups(4, size)
    ids = torch.arange(len(groups)).repeat_interleave(size)
    for scale, factor in (("leave_one_out", size / (size - 1)), ("none", 1 - 1 / size)):
        found = combine_objectives(REWARDS[groups.flatten()][:, None], ids, tensor(1), scale=scale).view(-1, size)
        assert float(chances[groups].prod(1) @ found[:, 0].square()) == pytest.approx(factor * variance, rel=1e-9)


def test_t23_a_group_s_mean_is_a_critic_that_knows_the_prompt_alone() -> None:
    """gamma = lambda = 1, one value throughout and the score at the last token: every token gets r - b."""
    mask = torch.tensor([[True, True, True], [True, True, False]])
    rewards, values = tensor([0, 0, 0.9], [0, 0.2, 0]), 0.4 * mask.double()
    advantages, _ = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    assert same(advantages, tensor([0.5, 0.5, 0.5], [-0.2, -0.2, 0]))


# Limits


def loss_of(logprobs: Tensor, old: Tensor, advantages: Tensor, **options: Any) -> Tensor:
    mask = options.pop("mask", torch.ones_like(old, dtype=torch.bool))
    options = {"reduction": "constant", "constant": 1, "normalizer": 1} | options
    return clipped_policy_loss(logprobs, old, advantages, mask, **options)[0]


def test_t25_the_mean_over_tokens_shares_an_advantage_out_among_them() -> None:
    logprobs, mask = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True), tensor([1, 0, 0, 0], [1, 1, 1, 1])
    options = {"mask": mask.bool(), "normalizer": 1}
    mean = loss_of(logprobs, logprobs.detach(), tensor(-1, -1), reduction="sequence_mean", constant=None, **options)
    assert same(gradient(mean, logprobs), mask * tensor([1], [0.25]))
    total = loss_of(logprobs, logprobs.detach(), tensor(-1, -1), **options)
    assert same(gradient(total, logprobs), mask)


def test_t25_with_lengths_that_differ_the_mean_is_another_direction() -> None:
    """Token 0 ends a completion: seven completions of one or two tokens."""
    tokens = torch.tensor([[0, 0], *([a, b] for a in (1, 2) for b in range(3))])
    mask = torch.tensor([[True, False], *[[True, True]] * 6])
    parameters = (0.3 * normal(0, 3, 3)).requires_grad_()
    table = torch.log_softmax(parameters, 1)
    logprobs = torch.stack([table[0, tokens[:, 0]], table[tokens[:, 0], tokens[:, 1]] * mask[:, 1]], 1)
    chances, rewards = logprobs.detach().sum(1).exp(), normal(1, 7)
    wanted = -gradient((logprobs.sum(1).exp() * rewards).sum(), parameters)
    weighed = chances * (rewards - chances @ rewards)
    total = gradient(loss_of(logprobs, logprobs.detach(), weighed, mask=mask), parameters)
    assert same(total, wanted)
    options = {"mask": mask, "reduction": "sequence_mean", "constant": None}
    mean = gradient(loss_of(logprobs, logprobs.detach(), weighed, **options), parameters)
    assert cosine(mean, wanted) < 0.99


PAIRS = torch.tensor(list(itertools.product(range(3), repeat=2)))


def pair_logprobs(parameters: Tensor) -> Tensor:
    """Two tokens of a vocabulary of three, the second given the first: [9, 2] from [4, 3]."""
    table = torch.log_softmax(parameters, 1)
    return torch.stack([table[0, PAIRS[:, 0]], table[1 + PAIRS[:, 0], PAIRS[:, 1]]], 1)


def off_policy_error(step: float) -> float:
    """Distance of the unclipped token surrogate's gradient from that of E[reward], a step away from the sampler."""
    start, direction, rewards = normal(0, 4, 3), normal(1, 4, 3), normal(2, 9)
    parameters, old = (start + step * direction).requires_grad_(), pair_logprobs(start)
    logprobs = pair_logprobs(parameters)
    wanted = -gradient((logprobs.sum(1).exp() * rewards).sum(), parameters)
    loss = loss_of(logprobs, old, old.sum(1).exp() * rewards, epsilon=0.999, epsilon_high=NEVER_CLIP)
    return float((gradient(loss, parameters) - wanted).norm())


def test_t26_token_ratios_are_right_to_first_order_of_the_step() -> None:
    assert off_policy_error(0.0) < 1e-12
    assert off_policy_error(0.02) / off_policy_error(0.01) == pytest.approx(2, rel=0.1)


def test_t27_the_clip_bounds_the_surrogate_from_below_and_cuts_gradients_off() -> None:
    old = torch.log_softmax(normal(0, 4), 0)[:, None]
    parameters = normal(3, 4).requires_grad_()
    logprobs, advantages = torch.log_softmax(parameters, 0)[:, None], old.exp()[:, 0] * (REWARDS - 0.4)
    clipped = loss_of(logprobs, old, advantages, epsilon=0.2)
    free = loss_of(logprobs, old, advantages, epsilon=0.999999, epsilon_high=NEVER_CLIP)
    assert float(clipped.detach()) > float(free.detach())  # losses: the surrogate is their negative
    wanted = -true_gradient(parameters, REWARDS)
    assert same(gradient(free, parameters), wanted, rtol=1e-6, atol=1e-9)
    assert not same(gradient(clipped, parameters), wanted, rtol=1e-2, atol=1e-3)


def test_t28_an_error_where_no_label_lies_is_found_by_the_policy() -> None:
    """The last response is worst, never labelled, and rated best: no error on the labels, the whole range lost."""
    true, learned = tensor(1.0, 0.5, 0.0), tensor(1.0, 0.5, 3.0)
    labelled = tensor(0.5, 0.5, 0.0)
    assert float(labelled @ (true - learned).square()) == 0
    assert float(true.max() - true[learned.argmax()]) == 1
    for reference, worst in ((tensor(0.5, 0.5 - 1e-4, 1e-4), 0.9), (tensor(0.5, 0.5, 0.0), 0.0)):
        chosen = torch.softmax(reference.log() + learned / 0.1, 0)  # beta 0.1
        assert float(chosen[2]) == 0 if worst == 0 else float(chosen[2]) > worst
    held = torch.softmax(tensor(0.5, 0.5 - 1e-4, 1e-4).log() + learned / 1.0, 0)  # beta 1
    assert float(held[2]) < 0.001


# The page


def test_every_statement_of_the_page_names_checks_that_exist() -> None:
    page = (ROOT / "docs" / "theory.md").read_text()
    statements = re.split(r"(?m)^\*\*T(\d+)\b", page)
    assert statements[1::2] == [str(number) for number in range(1, 29)]
    for number, body in zip(statements[1::2], statements[2::2], strict=True):
        cited = re.findall(r"`(test_\w+)`(?: in\s+`(\w+\.py)`)?", body)
        assert cited, f"T{number} names no check"
        for name, file in cited:
            (path,) = (ROOT / "tests").rglob(file or "test_theory.py")
            assert f"def {name}(" in path.read_text(), f"T{number}: no {name} in {path.name}"
            assert file or name.startswith(f"test_t{number}_")
    mine = set(re.findall(r"def (test_t\d+_\w+)", Path(__file__).read_text()))
    assert mine <= set(re.findall(r"`(test_\w+)`", page))
