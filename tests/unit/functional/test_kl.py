import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.functional.kl import kl_estimate, kl_loss_term

HALF, QUARTER = math.log(0.5), math.log(0.25)


def tensor(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("k1", math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", 0.5 - 1 + math.log(2))],
)
def test_estimates_by_hand(kind, wanted):
    """d = ln 0.25 - ln 0.5 = -ln 2, so k1 = ln 2, k2 = (ln 2)^2 / 2, k3 = 1/2 - 1 + ln 2."""
    assert kl_estimate(tensor(HALF), tensor(QUARTER), kind).item() == pytest.approx(wanted, rel=1e-12)


def test_the_default_estimate_is_k1():
    assert kl_estimate(tensor(HALF), tensor(QUARTER)).item() == pytest.approx(math.log(2), rel=1e-12)


@given(
    st.lists(st.floats(0.01, 1), min_size=4, max_size=4),
    st.lists(st.floats(0.01, 1), min_size=4, max_size=4),
)
def test_k1_and_k3_are_unbiased(policy, reference):
    """Weighted by the policy's probabilities, both sum to KL(policy || reference)."""
    p, q = tensor(*policy) / sum(policy), tensor(*reference) / sum(reference)
    exact = torch.nn.functional.kl_div(q.log(), p, reduction="sum").item()
    for kind in ("k1", "k3"):
        assert (p * kl_estimate(p.log(), q.log(), kind)).sum().item() == pytest.approx(exact, rel=1e-9, abs=1e-12)
    assert (kl_estimate(p.log(), q.log(), "k3") >= 0).all()


def test_k3_keeps_its_precision_near_zero():
    """At d = 1e-4, k3 = d^2 / 2 + d^3 / 6 + ...; exp(d) - 1 - d in float32 would have no correct digit."""
    found = kl_estimate(torch.tensor([0.0]), torch.tensor([1e-4]), "k3").item()
    assert found == pytest.approx(1e-8 / 2, rel=1e-2)


def test_loss_terms_by_hand():
    """logp = ln 1/2, old = ref = ln 1/4: rho = 2; k3 = 1/2 - 1 + ln 2; rho k3 = 2 k3; k2 = (ln 2)^2 / 2."""
    arguments = tensor(HALF), tensor(QUARTER), tensor(QUARTER)
    k3 = 0.5 - 1 + math.log(2)
    assert kl_loss_term(*arguments).item() == pytest.approx(2 * k3, rel=1e-12)
    assert kl_loss_term(*arguments, kind="k3_weighted").item() == pytest.approx(2 * k3, rel=1e-12)
    assert kl_loss_term(*arguments, kind="k3").item() == pytest.approx(k3, rel=1e-12)
    assert kl_loss_term(*arguments, kind="k2").item() == pytest.approx(math.log(2) ** 2 / 2, rel=1e-12)


@given(st.floats(-4, 0), st.floats(-4, 0), st.floats(-8, 0))
def test_weighted_k3_is_rho_times_k3_with_gradient_rho_times_minus_d(logp, old, ref):
    """d/dlogp [rho (exp(d) - 1 - d)] = rho (exp(d) - 1 - d) + rho (1 - exp(d)) = -rho d, on either side of d = 1."""
    logprobs = tensor(logp).requires_grad_()
    term = kl_loss_term(logprobs, tensor(old), tensor(ref))
    term.sum().backward()
    rho, d = math.exp(logp - old), ref - logp
    assert logprobs.grad is not None
    assert term.item() == pytest.approx(rho * (math.exp(d) - 1 - d), rel=1e-9, abs=1e-13)
    assert logprobs.grad.item() == pytest.approx(-rho * d, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("gap", [0.5, 2.0, 6.0])
def test_weighted_k3_far_from_the_reference(gap):
    """rho = exp(-gap / 2), d = gap: rho (exp(d) - 1 - d), written out."""
    term = kl_loss_term(tensor(-gap - 1), tensor(-gap / 2 - 1), tensor(-1.0))
    assert term.item() == pytest.approx(math.exp(-gap / 2) * (math.exp(gap) - 1 - gap), rel=1e-12)


def test_weighted_k3_of_a_token_the_policy_gave_up_stays_finite():
    """logp = -300, old = ref = -1: rho k3 -> exp(ref - old) = 1 and the gradient -rho d -> 0, in float32."""
    logprobs = torch.tensor([-300.0], requires_grad=True)
    term = kl_loss_term(logprobs, torch.tensor([-1.0]), torch.tensor([-1.0]))
    term.sum().backward()
    assert term.item() == pytest.approx(1.0, rel=1e-6)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(0.0, abs=1e-30)


def test_weighted_k3_keeps_its_precision_near_zero():
    """At d = 1e-4 and rho = 1, the term is d^2 / 2 = 5e-9 in float32 as well."""
    term = kl_loss_term(torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([1e-4]))
    assert term.item() == pytest.approx(5e-9, rel=1e-2)


@pytest.mark.parametrize("kind", ["k3_weighted", "k3", "k2"])
def test_masked_positions_are_zero_with_gradient_zero(kind):
    logprobs = torch.tensor([HALF, math.nan, -math.inf], dtype=torch.float64).requires_grad_()
    mask = torch.tensor([True, False, False])
    term = kl_loss_term(logprobs, tensor(QUARTER, math.inf, 0), tensor(QUARTER, 1, math.nan), kind=kind, mask=mask)
    alone = kl_loss_term(tensor(HALF), tensor(QUARTER), tensor(QUARTER), kind=kind)
    term.sum().backward()
    assert term.tolist() == [alone.item(), 0, 0]
    assert logprobs.grad is not None
    assert logprobs.grad[1:].tolist() == [0, 0]
    assert logprobs.grad[0].item() != 0


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="unknown KL estimator 'k4': choose k1, k2 or k3"):
        kl_estimate(tensor(0), tensor(0), "k4")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="unknown KL loss 'k1': choose k3_weighted, k3 or k2"):
        kl_loss_term(tensor(0), tensor(0), tensor(0), kind="k1")  # pyright: ignore[reportArgumentType]
