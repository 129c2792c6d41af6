"""DPO's known optimum, by enumerating every response a tiny policy can give, in float64.

Where labels follow Bradley and Terry with reward r, the policy that minimises the expected loss over all pairs is
reference * exp(r / beta), normalised (arXiv 2305.18290, equations 4 to 7). For one pair the minimum is known too, with
wrong labels and for IPO.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from equipoise.functional import dpo_loss

RESPONSES = torch.tensor(list(itertools.product(range(2), repeat=2)))  # two tokens of a vocabulary of two
PAIRS = torch.tensor([(i, j) for i in range(4) for j in range(4) if i != j])  # (chosen, rejected), both ways


def sequence_logprobs(parameters: Tensor) -> Tensor:
    """[4] from logits [3, 2]: the first token, then the second after each first one."""
    table = torch.log_softmax(parameters, dim=1)
    first, second = RESPONSES.T
    return table[0, first] + table[1 + first, second]


def minimise(loss_of: object, parameters: Tensor) -> Tensor:
    """L-BFGS to rounding."""
    parameters = parameters.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(parameters)  # type: ignore[operator]
        loss.backward()
        return loss

    optimizer.step(closure)
    return parameters.detach()


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_the_optimum_is_the_reference_tilted_by_the_reward(beta: float) -> None:
    reference, rewards = sequence_logprobs(drawn(0, 3, 2)), torch.tensor([1.0, -0.7, 0.2, -0.1], dtype=torch.float64)
    chosen, rejected = PAIRS.T
    preferred = torch.sigmoid(rewards[chosen] - rewards[rejected])  # Bradley and Terry

    def expected_loss(parameters: Tensor) -> Tensor:
        logprobs = sequence_logprobs(parameters)
        sides = (logprobs[chosen], logprobs[rejected], reference[chosen], reference[rejected])
        parts = [
            weight * dpo_loss(*(side[k : k + 1] for side in sides), beta=beta)[0] for k, weight in enumerate(preferred)
        ]
        return torch.stack(parts).sum()

    found = sequence_logprobs(minimise(expected_loss, drawn(2, 3, 2))).exp()
    optimum = torch.softmax(reference + rewards / beta, dim=0)
    torch.testing.assert_close(found, optimum, rtol=0, atol=1e-6)
    assert (optimum - reference.exp()).abs().max() > 0.05, "the optimum is not where it started"


def margin_at_the_minimum(**options: object) -> float:
    """(policy - reference) margin of one pair, response 0 preferred to response 3."""
    reference = sequence_logprobs(drawn(0, 3, 2))

    def loss_of(parameters: Tensor) -> Tensor:
        logprobs = sequence_logprobs(parameters)
        sides = (logprobs[:1], logprobs[3:], reference[:1], reference[3:])
        return dpo_loss(*sides, **options)[0]  # type: ignore[arg-type]

    logprobs = sequence_logprobs(minimise(loss_of, drawn(2, 3, 2)))
    return float((logprobs[0] - logprobs[3]) - (reference[0] - reference[3]))


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_conservative_dpo_stops_at_the_odds_of_its_labels(smoothing: float) -> None:
    """beta h = ln((1 - e) / e): for e = 0.1, ln 9 = 2.1972."""
    found = 0.5 * margin_at_the_minimum(beta=0.5, label_smoothing=smoothing)
    assert found == pytest.approx(math.log((1 - smoothing) / smoothing), abs=1e-6)


@pytest.mark.parametrize("beta", [0.25, 2.0])
def test_ipo_stops_at_its_margin(beta: float) -> None:
    """h = 1 / (2 beta): for beta 0.25, 2."""
    assert margin_at_the_minimum(beta=beta, kind="ipo") == pytest.approx(1 / (2 * beta), abs=1e-6)
