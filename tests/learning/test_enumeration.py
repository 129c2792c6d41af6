"""Expected gradients, by enumerating everything a tiny policy can say.

The policy writes two tokens of a vocabulary of three: 12 logits (3 for the first token, 3 for the second after each
first), 9 completions. An expectation is a sum over all of them, weighted by their probabilities, so that identities
between gradients hold to rounding and no sampling noise hides a wrong one.
"""

import itertools

import pytest
import torch

from equipoise.functional import clipped_policy_loss, group_advantages, kl_estimate, kl_loss_term

COMPLETIONS = torch.tensor(list(itertools.product(range(3), repeat=2)))
MASK = torch.ones(9, 2, dtype=torch.bool)
NEVER_CLIP = 1e6


def logits(seed: int) -> torch.Tensor:
    """Row 0: the first token; row 1 + a: the second token after first token a."""
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def token_logprobs(parameters: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token of each completion: [9, 2]."""
    table = torch.log_softmax(parameters, dim=1)
    first, second = COMPLETIONS[:, 0], COMPLETIONS[:, 1]
    return torch.stack([table[0, first], table[1 + first, second]], dim=1)


def gradient(value: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, parameters, retain_graph=True)[0]


def policies(seeds: tuple[int, int] = (0, 1)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Parameters, the policy's token log-probs (with graph), the reference's, and the completions' probabilities."""
    parameters = logits(seeds[0]).requires_grad_()
    logprobs = token_logprobs(parameters)
    return parameters, logprobs, token_logprobs(logits(seeds[1])), logprobs.detach().sum(1).exp()


def exact_kl(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """KL between distributions over whole completions, from token log-probs."""
    left, right = left.sum(1), right.sum(1)
    return (left.exp() * (left - right)).sum()


def test_the_completions_have_total_probability_one():
    *_, probabilities = policies()
    assert probabilities.sum().item() == pytest.approx(1, rel=1e-12)


def per_token_divergences(parameters: torch.Tensor, reference: torch.Tensor, reverse: bool) -> torch.Tensor:
    """Divergence of the next token's distribution in each of the four contexts: [4]."""
    p, q = torch.log_softmax(parameters, 1), torch.log_softmax(reference, 1)
    if reverse:
        p, q = q, p
    return (p.exp() * (p - q)).sum(1)


def context_weights() -> torch.Tensor:
    """How often the policy visits each context: always the first, then its first tokens. Held fixed."""
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.softmax(logits(0)[0], 0)])


@pytest.mark.parametrize(("kind", "reverse"), [("k3_weighted", False), ("k2", False), ("k3", True)])
def test_expected_gradients_of_the_kl_losses_on_policy(kind, reverse):
    """k3_weighted and k2 follow KL(policy || reference), k3 follows KL(reference || policy), token by token.

    The terms are per token, so the divergences are those of the next token in the contexts the policy visits.
    """
    parameters, logprobs, reference, probabilities = policies()
    terms = kl_loss_term(logprobs, logprobs.detach(), reference, kind=kind)
    expected = gradient((probabilities[:, None] * terms).sum(), parameters)
    divergence = (context_weights() * per_token_divergences(parameters, logits(1), reverse)).sum()
    assert torch.allclose(expected, gradient(divergence, parameters), rtol=1e-9, atol=1e-12)
    other = (context_weights() * per_token_divergences(parameters, logits(1), not reverse)).sum()
    assert not torch.allclose(expected, gradient(other, parameters), rtol=1e-2, atol=1e-3)


def test_weighted_k3_stays_right_off_policy_where_k2_and_k3_do_not():
    """Completions sampled by another policy, one token each so that the contexts are the same."""
    parameters = logits(0)[:1].clone().requires_grad_()
    logprobs = torch.log_softmax(parameters, 1)[0]
    old, reference = torch.log_softmax(logits(2)[0], 0), torch.log_softmax(logits(1)[0], 0)
    wanted = gradient((logprobs.exp() * (logprobs - reference)).sum(), parameters)
    found = {
        kind: gradient((old.exp() * kl_loss_term(logprobs, old, reference, kind=kind)).sum(), parameters)
        for kind in ("k3_weighted", "k2", "k3")
    }
    assert torch.allclose(found["k3_weighted"], wanted, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found["k2"], wanted, rtol=1e-2, atol=1e-3)
    assert not torch.allclose(found["k3"], wanted, rtol=1e-2, atol=1e-3)


def test_k1_as_a_loss_has_no_expected_gradient():
    parameters, logprobs, reference, probabilities = policies()
    terms = kl_estimate(logprobs, reference, "k1")
    assert (probabilities[:, None] * terms).sum().item() == pytest.approx(
        exact_kl(logprobs, reference).item(), rel=1e-12
    )
    assert gradient((probabilities[:, None] * terms).sum(), parameters).abs().max().item() < 1e-12


def test_k1_in_the_reward_gives_the_gradient_of_the_kl():
    """REINFORCE with the summed k1 of a completion as its cost: the gradient of KL(policy || reference)."""
    parameters, logprobs, reference, probabilities = policies()
    cost = kl_estimate(logprobs.detach(), reference, "k1").sum(1)
    found = gradient((probabilities * cost * logprobs.sum(1)).sum(), parameters)
    assert torch.allclose(found, gradient(exact_kl(logprobs, reference), parameters), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_the_policy_loss_on_policy_is_the_gradient_of_the_expected_reward(ratio):
    """Summed over tokens, at ratio 1: minus the gradient of E[reward], baseline or no baseline (REINFORCE).

    `constant` 1 and normalizer 1 make the reduction a plain sum over tokens; the probabilities enter by the advantage.
    """
    parameters, logprobs, _, probabilities = policies()
    rewards = torch.arange(9, dtype=torch.float64).square() / 10
    wanted = -gradient((logprobs.sum(1).exp() * rewards).sum(), parameters)
    for baseline in (0.0, 3.7):
        loss, _ = clipped_policy_loss(
            logprobs,
            logprobs.detach(),
            probabilities * (rewards - baseline),
            MASK,
            ratio=ratio,
            reduction="constant",
            constant=1,
            normalizer=1,
        )
        assert torch.allclose(gradient(loss, parameters), wanted, rtol=1e-9, atol=1e-12)


def test_off_policy_the_unclipped_token_ratio_is_exact_for_one_token():
    """Sampled by another policy, E[rho A] is the expected reward itself: value and gradient."""
    parameters = logits(0)[:1].clone().requires_grad_()
    logprobs, old = torch.log_softmax(parameters, 1)[0], torch.log_softmax(logits(2)[0], 0)
    rewards = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    loss, _ = clipped_policy_loss(
        logprobs[:, None],
        old[:, None],
        old.exp() * rewards,
        torch.ones(3, 1),
        epsilon=NEVER_CLIP,
        reduction="constant",
        constant=1,
        normalizer=1,
    )
    expected = (logprobs.exp() * rewards).sum()
    assert loss.item() == pytest.approx(-expected.item(), rel=1e-12)
    assert torch.allclose(gradient(loss, parameters), -gradient(expected, parameters), rtol=1e-9, atol=1e-12)


def test_centred_group_advantages_are_reinforce_with_a_factor():
    """Over all groups of G = 2 completions, r - mean has (G - 1) / G of REINFORCE's expected gradient, no other bias.

    The group's mean holds the completion's own reward, which is where the factor comes from.
    """
    parameters, logprobs, _, probabilities = policies()
    rewards = torch.randn(9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    total = torch.zeros_like(parameters)
    for pair in itertools.product(range(9), repeat=2):
        rows = torch.tensor(pair)
        advantages = group_advantages(rewards[rows], torch.tensor([0, 0]), scale="none")
        loss, _ = clipped_policy_loss(
            logprobs[rows], logprobs[rows].detach(), advantages, MASK[rows], reduction="constant", constant=1
        )
        total += probabilities[rows].prod() * gradient(loss, parameters)
    wanted = -gradient((logprobs.sum(1).exp() * rewards).sum(), parameters) / 2
    assert torch.allclose(total, wanted, rtol=1e-9, atol=1e-12)


def test_the_kl_term_inside_the_policy_loss_pulls_towards_the_reference():
    """With no advantage, following policy loss + KL term from the policy reaches the reference exactly.

    Every step is on-policy and exact: old log-probs are the current ones, the probabilities weigh the tokens.
    """
    reference = logits(1)
    parameters = logits(0).requires_grad_()
    for _ in range(400):
        logprobs = token_logprobs(parameters)
        terms = kl_loss_term(logprobs, logprobs.detach(), token_logprobs(reference))
        weights = logprobs.detach().sum(1, keepdim=True).exp()
        loss, _ = clipped_policy_loss(
            logprobs,
            logprobs.detach(),
            torch.zeros(9, dtype=torch.float64),
            MASK,
            reduction="constant",
            constant=1,
            normalizer=1,
            kl_BT=weights * terms,
            beta=1.0,
        )
        parameters = (parameters - 2.0 * gradient(loss, parameters)).detach().requires_grad_()
    assert exact_kl(token_logprobs(parameters), token_logprobs(reference)).item() < 1e-8


def test_reward_and_kl_together_reach_the_known_optimum():
    """One token: the maximum of E[r] - beta KL(policy || reference) is reference * exp(r / beta), normalised."""
    rewards, beta = torch.tensor([1.0, -1.0, 0.3], dtype=torch.float64), 0.5
    reference = torch.log_softmax(logits(1)[0], 0)
    parameters = logits(0)[:1].clone().requires_grad_()
    for _ in range(1000):
        logprobs = torch.log_softmax(parameters, 1)[0]
        probabilities = logprobs.detach().exp()
        loss, _ = clipped_policy_loss(
            logprobs[:, None],
            logprobs.detach()[:, None],
            probabilities * rewards,
            torch.ones(3, 1),
            reduction="constant",
            constant=1,
            normalizer=1,
            kl_BT=(probabilities * kl_loss_term(logprobs, logprobs.detach(), reference))[:, None],
            beta=beta,
        )
        parameters = (parameters - 3.0 * gradient(loss, parameters)).detach().requires_grad_()
    optimum = torch.softmax(reference + rewards / beta, 0)
    assert torch.allclose(torch.softmax(parameters[0], 0), optimum, rtol=1e-4)
