import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.functional.losses import (
    clipped_policy_loss,
    dpo_loss,
    masked_regression_loss,
    merge_metrics,
    value_loss,
)

NAN = math.nan
REDUCTIONS = [
    {"reduction": "sequence_mean"},
    {"reduction": "token_mean"},
    {"reduction": "constant", "constant": 7.0},
]


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def logs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def random_batch(seed, rows=5, tokens=6, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, tokens, generator=generator, dtype=torch.float64) * 3
    logprobs = old + scale * torch.randn(rows, tokens, generator=generator, dtype=torch.float64)
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, tokens, generator=generator) < 0.6
    mask[0], mask[1] = True, False  # a full row and an empty one
    return logprobs, old, advantages, mask


def textbook_terms(logprobs, old, advantages, mask, low, high, ratio):
    """-min(rho A, clip(rho) A), token by token in plain Python; 0 where masked."""
    terms = []
    for i in range(len(mask)):
        gaps = [(logprobs[i, t] - old[i, t]).item() for t in range(mask.shape[1])]
        kept = [gap for gap, keep in zip(gaps, mask[i], strict=True) if keep]
        row = []
        for gap, keep in zip(gaps, mask[i], strict=True):
            if ratio == "sequence" and kept:
                gap = sum(kept) / len(kept)
            rho, a = math.exp(gap), advantages[i].item()
            row.append(-min(rho * a, min(max(rho, 1 - low), 1 + high) * a) if keep else 0.0)
        terms.append(row)
    return terms


def textbook_reduce(terms, mask, reduction, constant=None):
    lengths = [int(n) for n in mask.sum(1)]
    if reduction == "sequence_mean":
        rows = [sum(row) / n for row, n in zip(terms, lengths, strict=True) if n]
        return sum(rows) / len(rows)
    total = sum(map(sum, terms))
    return total / sum(lengths) if reduction == "token_mean" else total / (len(terms) * constant)


def test_policy_loss_by_hand():
    """epsilon 0.2. Row 0, A = 2: rho 1.5, 0.9: min(3, 2.4) = 2.4, min(1.8, 1.8) = 1.8. Row 1, A = -1, one token:
    rho 0.5: min(-0.5, -0.8) = -0.8.

    sequence_mean: -((2.4 + 1.8) / 2 - 0.8) / 2 = -0.65. token_mean: -(2.4 + 1.8 - 0.8) / 3 = -3.4 / 3. constant 10:
    -3.4 / (2 * 10) = -0.17.
    """
    arguments = logs([1.5, 0.9], [0.5, 1.0]), torch.zeros(2, 2), tensor(2, -1), torch.tensor([[1, 1], [1, 0]])
    assert clipped_policy_loss(*arguments)[0].item() == pytest.approx(-0.65, rel=1e-12)
    assert clipped_policy_loss(*arguments, reduction="token_mean")[0].item() == pytest.approx(-3.4 / 3, rel=1e-12)
    loss, metrics = clipped_policy_loss(*arguments, reduction="constant", constant=10)
    assert loss.item() == pytest.approx(-0.17, rel=1e-12)
    found = {name: value.item() for name, value in metrics.items()}
    assert found == pytest.approx(
        {
            "ratio": (1.5 + 0.9 + 0.5) / 3,
            "clip_fraction": 2 / 3,
            "clip_fraction_low": 1 / 3,
            "clip_fraction_high": 1 / 3,
            "approx_kl": sum(rho - 1 - math.log(rho) for rho in (1.5, 0.9, 0.5)) / 3,
            "count": 3,
        },
        rel=1e-12,
    )


def test_sequence_ratio_by_hand():
    """Gaps ln 4 and 0 average to ln 2: rho = 2 for the completion, clipped to 1.2 at A = 1, at both tokens."""
    arguments = logs([4.0, 1.0]), torch.zeros(1, 2), tensor(1), torch.ones(1, 2)
    loss, metrics = clipped_policy_loss(*arguments, ratio="sequence")
    assert loss.item() == pytest.approx(-1.2, rel=1e-12)
    assert metrics["ratio"].item() == pytest.approx(2, rel=1e-12)
    assert metrics["clip_fraction"].item() == 1
    wide, _ = clipped_policy_loss(*arguments, ratio="sequence", epsilon=9, reduction="constant", constant=1)
    assert wide.item() == pytest.approx(-4, rel=1e-12)


def test_clip_higher_is_separate_from_the_lower_clip():
    """rho = 1.5 and 0.5 with epsilon 0.1, epsilon_high 0.4: A = 1 gives 1.4 and 0.5; A = -1 gives -1.5 and -0.9."""
    arguments = logs([1.5], [0.5]), torch.zeros(2, 1)
    mask = torch.ones(2, 1)
    up, metrics_up = clipped_policy_loss(*arguments, tensor(1, 1), mask, epsilon=0.1, epsilon_high=0.4)
    down, metrics_down = clipped_policy_loss(*arguments, tensor(-1, -1), mask, epsilon=0.1, epsilon_high=0.4)
    assert up.item() == pytest.approx(-(1.4 + 0.5) / 2, rel=1e-12)
    assert down.item() == pytest.approx((1.5 + 0.9) / 2, rel=1e-12)
    assert [metrics_up[f"clip_fraction_{side}"].item() for side in ("low", "high")] == [0, 0.5]
    assert [metrics_down[f"clip_fraction_{side}"].item() for side in ("low", "high")] == [0.5, 0]


def test_the_defaults():
    """epsilon 0.2 on both sides, token ratio, sequence mean, no KL."""
    logprobs, old, advantages, mask = random_batch(0)
    default, _ = clipped_policy_loss(logprobs, old, advantages, mask)
    spelled, _ = clipped_policy_loss(
        logprobs, old, advantages, mask, epsilon=0.2, epsilon_high=0.2, ratio="token", reduction="sequence_mean"
    )
    assert default.item() == spelled.item()
    with_unweighted_kl, _ = clipped_policy_loss(logprobs, old, advantages, mask, kl_BT=torch.ones_like(old))
    assert with_unweighted_kl.item() == default.item()


@given(
    st.integers(0, 10_000),
    st.sampled_from(REDUCTIONS),
    st.sampled_from(["token", "sequence"]),
    st.sampled_from([(0.2, 0.2), (0.1, 0.5), (0.0, 0.0), (1.0, 2.0), (3.0, 0.3)]),
)
def test_policy_loss_against_the_textbook(seed, reduction, ratio, clip):
    logprobs, old, advantages, mask = random_batch(seed)
    options = {"epsilon": clip[0], "epsilon_high": clip[1], "ratio": ratio, **reduction}
    loss, metrics = clipped_policy_loss(logprobs, old, advantages, mask, **options)
    terms = textbook_terms(logprobs, old, advantages, mask, *clip, ratio)
    assert loss.item() == pytest.approx(textbook_reduce(terms, mask, **reduction), rel=1e-9)
    parts = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
    assert metrics["clip_fraction"].item() == pytest.approx(parts.item())
    assert metrics["count"].item() == mask.sum().item()


@given(st.integers(0, 10_000), st.sampled_from(REDUCTIONS), st.sampled_from(["token", "sequence"]))
def test_policy_gradient_against_differences(seed, reduction, ratio):
    """Central differences of the loss; float64, step 1e-6."""
    logprobs, old, advantages, mask = random_batch(seed, rows=3, tokens=3)
    logprobs.requires_grad_()
    clipped_policy_loss(logprobs, old, advantages, mask, ratio=ratio, **reduction)[0].backward()
    assert logprobs.grad is not None
    step = 1e-6
    for i, t in [(0, 0), (0, 2), (1, 1), (2, 0), (2, 2)]:
        ends = []
        for sign in (1, -1):
            moved = logprobs.detach().clone()
            moved[i, t] += sign * step
            ends.append(clipped_policy_loss(moved, old, advantages, mask, ratio=ratio, **reduction)[0].item())
        assert logprobs.grad[i, t].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-7)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_at_ratio_one_the_gradient_is_that_of_reinforce(ratio, reduction):
    """REINFORCE: the gradient of -A logp, reduced the same way."""
    _, old, advantages, mask = random_batch(3)
    logprobs = old.clone().requires_grad_()
    loss, metrics = clipped_policy_loss(logprobs, old, advantages, mask, ratio=ratio, **reduction)
    loss.backward()
    lengths = mask.sum(1, keepdim=True).clamp(min=1).double()
    weights = {
        "sequence_mean": 1 / (lengths * (mask.sum(1) > 0).sum()),
        "token_mean": 1 / mask.sum().double(),
        "constant": 1 / (7.0 * len(mask)),
    }[reduction["reduction"]]
    wanted = -advantages[:, None] * mask * weights
    assert logprobs.grad is not None
    assert torch.allclose(logprobs.grad, wanted.expand_as(old), rtol=1e-12, atol=0)
    assert metrics["ratio"].item() == 1
    assert metrics["clip_fraction"].item() == 0
    assert metrics["approx_kl"].item() == 0


@given(st.integers(0, 10_000), st.sampled_from(REDUCTIONS), st.sampled_from(["token", "sequence"]))
def test_policy_loss_of_parts_adds_up_to_the_whole(seed, reduction, ratio):
    logprobs, old, advantages, mask = random_batch(seed)
    kl = (logprobs - old).square()
    normalizer = {"sequence_mean": (mask.sum(1) > 0).sum(), "token_mean": mask.sum(), "constant": len(mask)}
    options = {"ratio": ratio, "beta": 0.3, **reduction}
    whole, metrics = clipped_policy_loss(logprobs, old, advantages, mask, kl_BT=kl, **options)
    parts = [
        clipped_policy_loss(
            logprobs[rows],
            old[rows],
            advantages[rows],
            mask[rows],
            kl_BT=kl[rows],
            normalizer=normalizer[reduction["reduction"]],
            **options,
        )
        for rows in (slice(0, 2), slice(2, 3), slice(3, 5))
    ]
    assert sum(part[0] for part in parts).item() == pytest.approx(whole.item(), rel=1e-9)  # pyright: ignore
    merged = merge_metrics([part[1] for part in parts])
    assert merged.keys() == metrics.keys()
    for name in metrics:
        assert merged[name].item() == pytest.approx(metrics[name].item(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_masked_tokens_change_nothing(ratio, reduction):
    def run(garbage):
        logprobs, old, advantages, mask = random_batch(4)
        kl = torch.ones_like(old)
        for values in (logprobs, old, kl):
            values[~mask] = garbage
        logprobs.requires_grad_()
        loss, metrics = clipped_policy_loss(
            logprobs, old, advantages, mask, ratio=ratio, kl_BT=kl, beta=0.1, **reduction
        )
        loss.backward()
        return loss.detach(), logprobs.grad, *metrics.values()

    plain = run(0.0)
    for garbage in (NAN, math.inf, -math.inf, 1e30):
        for have, want in zip(run(garbage), plain, strict=True):
            assert torch.equal(have, want)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_train_on_gives_zero_with_gradient_zero(ratio, reduction):
    logprobs = torch.full((2, 3), NAN, requires_grad=True)
    loss, metrics = clipped_policy_loss(
        logprobs, torch.zeros(2, 3), torch.ones(2), torch.zeros(2, 3), ratio=ratio, **reduction
    )
    loss.backward()
    assert loss.item() == 0
    assert logprobs.grad is not None
    assert logprobs.grad.eq(0).all()
    assert all(value.item() == 0 for value in metrics.values())


def test_a_row_without_tokens_leaves_the_denominator_of_the_sequence_mean():
    """One live row of loss -2; the truncated one beside it must not halve it. With normalizer 4: -0.5."""
    arguments = torch.zeros(2, 2), torch.zeros(2, 2), tensor(2, 5), torch.tensor([[1, 1], [0, 0]])
    assert clipped_policy_loss(*arguments)[0].item() == -2
    assert clipped_policy_loss(*arguments, normalizer=4)[0].item() == -0.5


def test_a_row_without_tokens_stays_in_the_constant_denominator():
    """-2 * 2 tokens / (2 rows * 8) = -0.25; with normalizer 4: -4 / 32."""
    arguments = torch.zeros(2, 2), torch.zeros(2, 2), tensor(2, 5), torch.tensor([[1, 1], [0, 0]])
    assert clipped_policy_loss(*arguments, reduction="constant", constant=8)[0].item() == -0.25
    assert clipped_policy_loss(*arguments, reduction="constant", constant=8, normalizer=4)[0].item() == -0.125


def test_the_kl_term_enters_the_same_mean():
    """Ratio 1, A = 0: only beta * kl is left. Rows of 2 and 1 tokens, kl 1, 3 and 5: 0.5 * (2 + 5) / 2 = 1.75."""
    zeros = torch.zeros(2, 2)
    loss, metrics = clipped_policy_loss(
        zeros, zeros, torch.zeros(2), torch.tensor([[1, 1], [1, 0]]), kl_BT=tensor([1, 3], [5, 9]), beta=0.5
    )
    assert loss.item() == 1.75
    assert metrics["kl_term"].item() == 3
    assert "kl_term" not in clipped_policy_loss(zeros, zeros, torch.zeros(2), torch.ones(2, 2))[1]


def test_the_kl_term_has_a_gradient_and_its_metric_has_none():
    logprobs = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    loss, metrics = clipped_policy_loss(
        logprobs.detach(), logprobs.detach(), tensor(0), torch.ones(1, 2), kl_BT=3 * logprobs, beta=0.5
    )
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[0.75, 0.75]]
    assert not any(value.requires_grad for value in metrics.values())


def test_advantages_per_token():
    """Ratio 1: -(1 + 2 + 6) / 3 = -3. The advantage under the mask is not read."""
    zeros = torch.zeros(2, 2, requires_grad=True)
    loss, _ = clipped_policy_loss(
        zeros, zeros, torch.tensor([[1.0, 2.0], [6.0, NAN]]), torch.tensor([[1, 1], [1, 0]]), reduction="token_mean"
    )
    loss.backward()
    assert loss.item() == -3
    assert zeros.grad is not None
    assert zeros.grad.isfinite().all()


def test_a_ratio_that_overflows_behind_the_clip_leaves_the_gradient_finite():
    """exp(200) overflows float32. A = 1: clipped to 1.2, gradient 0; A = 0: 0."""
    logprobs = torch.tensor([[200.0], [200.0]], requires_grad=True)
    loss, metrics = clipped_policy_loss(logprobs, torch.zeros(2, 1), torch.tensor([1.0, 0.0]), torch.ones(2, 1))
    loss.backward()
    assert loss.item() == pytest.approx(-0.6)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[0], [0]]
    assert metrics["clip_fraction"].item() == 0.5


def test_on_the_border_and_without_advantage_nothing_is_clipped():
    """Ratios of exactly 1.2 and 0.8 still have their gradient; at A = 0 there is no gradient to cut off."""
    gaps = tensor(math.log1p(0.2), math.log1p(-0.2), -3.0, 3.0)[:, None].requires_grad_()
    loss, metrics = clipped_policy_loss(gaps, torch.zeros(4, 1), tensor(1, -1, 0, 0), torch.ones(4, 1))
    loss.backward()
    assert metrics["clip_fraction"].item() == 0
    assert gaps.grad is not None
    assert gaps.grad.flatten().tolist() == pytest.approx([-0.3, 0.2, 0, 0])


def test_no_gradient_flows_into_old_logprobs_and_advantages():
    old, advantages = torch.zeros(1, 1, requires_grad=True), torch.ones(1, requires_grad=True)
    loss, _ = clipped_policy_loss(torch.zeros(1, 1, requires_grad=True), old, advantages, torch.ones(1, 1))
    assert torch.autograd.grad(loss, (old, advantages), allow_unused=True) == (None, None)


def test_half_precision_is_computed_in_float32():
    logprobs = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    loss, metrics = clipped_policy_loss(logprobs, logprobs.detach(), tensor(1), torch.ones(1, 1))
    assert loss.dtype == torch.float32
    assert {value.dtype for value in metrics.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": "row"}, "unknown ratio 'row': choose token or sequence"),
        ({"reduction": "sum"}, "unknown reduction 'sum': choose sequence_mean, token_mean or constant"),
        ({"epsilon": -0.1}, "epsilon and epsilon_high must be at least 0, got -0.1 and -0.1"),
        ({"epsilon": -0.1, "epsilon_high": 0.2}, "epsilon and epsilon_high must be at least 0, got -0.1 and 0.2"),
        ({"epsilon_high": -0.1}, "epsilon and epsilon_high must be at least 0, got 0.2 and -0.1"),
        ({"epsilon": NAN}, "epsilon and epsilon_high must be at least 0"),
        ({"reduction": "constant"}, "constant goes with reduction='constant'"),
        ({"constant": 3.0}, "constant goes with reduction='constant'"),
        ({"reduction": "constant", "constant": 0.0}, "constant must be greater than 0, got 0.0"),
    ],
)
def test_wrong_policy_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        clipped_policy_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), torch.ones(1, 1), **options)


def test_sequence_ratio_refuses_advantages_per_token():
    zeros = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="one advantage for each completion"):
        clipped_policy_loss(zeros, zeros, zeros, zeros, ratio="sequence")


def test_value_loss_by_hand():
    """V 1, 3; old 0, 3; R 2, 1; epsilon 0.5. Squares 1 and 4; clipped values 0.5 and 3, squares 2.25 and 4.

    Half the larger: 1.125 and 2, mean 1.5625. The third token is masked.
    """
    loss, metrics = value_loss(
        tensor([1, 3, NAN]), tensor([0, 3, 1]), tensor([2, 1, NAN]), torch.tensor([[1, 1, 0]]), epsilon=0.5
    )
    assert loss.item() == 1.5625
    found = {name: value.item() for name, value in metrics.items()}
    assert found == {"squared_error": 2.5, "clip_fraction": 0.5, "value": 2, "return": 1.5, "count": 2}


def test_value_loss_without_clip_is_half_the_squared_error():
    """(1 - 2)^2 / 2 = 0.5; with normalizer 4, 0.125."""
    arguments = tensor([1.0]), tensor([-9.0]), tensor([2.0]), torch.ones(1, 1)
    assert value_loss(*arguments, epsilon=math.inf)[0].item() == 0.5
    assert value_loss(*arguments, epsilon=math.inf, normalizer=4)[0].item() == 0.125


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.2, 5.0]))
def test_value_loss_against_plain_python_and_its_parts(seed, epsilon):
    values, old, _, mask = random_batch(seed)
    returns = random_batch(seed + 1)[0]
    values.requires_grad_()
    terms, cut = [], []
    for v, o, r, keep in zip(values.flatten(), old.flatten(), returns.flatten(), mask.flatten(), strict=True):
        if keep:
            clipped = min(max(v.item(), o.item() - epsilon), o.item() + epsilon)
            cut.append((clipped - r.item()) ** 2 > (v.item() - r.item()) ** 2)
            terms.append(0.5 * max((v.item() - r.item()) ** 2, (clipped - r.item()) ** 2))
    loss, metrics = value_loss(values, old, returns, mask, epsilon=epsilon)
    assert metrics["clip_fraction"].item() == pytest.approx(sum(cut) / len(cut))
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-9)
    parts = [
        value_loss(values[rows], old[rows], returns[rows], mask[rows], epsilon=epsilon, normalizer=mask.sum())
        for rows in (slice(0, 2), slice(2, 5))
    ]
    assert (parts[0][0] + parts[1][0]).item() == pytest.approx(loss.item(), rel=1e-9)
    merged = merge_metrics([part[1] for part in parts])
    assert {n: v.item() for n, v in merged.items()} == pytest.approx({n: v.item() for n, v in metrics.items()})


def test_value_loss_gradient_and_mask():
    """Unclipped and inside the range the gradient is V - R; masked garbage gives 0, an empty mask 0 throughout."""
    values = tensor([1.0, NAN]).requires_grad_()
    old = tensor([1.0, NAN]).requires_grad_()
    returns = tensor([3.0, math.inf]).requires_grad_()
    arguments = values, old, returns
    value_loss(*arguments, torch.tensor([[1, 0]]), epsilon=1)[0].backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[-2, 0]]
    assert old.grad is None
    assert returns.grad is None
    values.grad = None
    loss, metrics = value_loss(*arguments, torch.zeros(1, 2), epsilon=1)
    loss.backward()
    assert loss.item() == 0
    assert values.grad.tolist() == [[0, 0]]
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("epsilon", [-1.0, NAN])
def test_value_loss_refuses_a_negative_epsilon(epsilon):
    with pytest.raises(ValueError, match="epsilon must be at least 0, got"):
        value_loss(tensor([1]), tensor([1]), tensor([1]), torch.ones(1, 1), epsilon=epsilon)


def test_dpo_by_hand():
    """h = (ln 6 - ln 2) - (ln 2 - ln 2) = ln 3, and 0. beta 1: -ln(3/4) and ln 2.

    Smoothing 0.1: the first is -0.9 ln(3/4) - 0.1 ln(1/4).
    """
    arguments = logs(6, 5), logs(2, 5), logs(2, 1), logs(2, 1)
    loss, metrics = dpo_loss(*arguments, beta=1)
    assert loss.item() == pytest.approx((-math.log(3 / 4) + math.log(2)) / 2, rel=1e-12)
    found = {name: value.item() for name, value in metrics.items()}
    wanted = {
        "accuracy": 0.5,
        "margin": math.log(3) / 2,
        "reward_chosen": (math.log(3) + math.log(5)) / 2,
        "reward_rejected": math.log(5) / 2,
        "count": 2,
    }
    assert found == pytest.approx(wanted, rel=1e-12)
    assert not any(value.requires_grad for value in metrics.values())
    one = tuple(values[:1] for values in arguments)
    smooth, _ = dpo_loss(*one, beta=1, label_smoothing=0.1)
    assert smooth.item() == pytest.approx(-0.9 * math.log(3 / 4) - 0.1 * math.log(1 / 4), rel=1e-12)
    ipo, metrics = dpo_loss(*one, beta=2, kind="ipo")
    assert ipo.item() == pytest.approx((math.log(3) - 0.25) ** 2, rel=1e-12)
    assert metrics["margin"].item() == pytest.approx(2 * math.log(3), rel=1e-12)
    assert metrics["reward_chosen"].item() == pytest.approx(2 * math.log(3), rel=1e-12)
    assert dpo_loss(*one, beta=1, normalizer=4)[0].item() == pytest.approx(-math.log(3 / 4) / 4, rel=1e-12)


def test_dpo_rewards_of_rejected_scale_with_beta():
    """beta 0.5, rejected ln 8 against ln 2: 0.5 * ln 4 = ln 2."""
    _, metrics = dpo_loss(logs(1), logs(8), logs(1), logs(2), beta=0.5)
    assert metrics["reward_rejected"].item() == pytest.approx(math.log(2), rel=1e-12)
    assert metrics["accuracy"].item() == 0
    assert dpo_loss(logs(2), logs(1), logs(1), logs(1), beta=0.5)[1]["accuracy"].item() == 1


@given(st.floats(-5, 5), st.floats(0.05, 3), st.sampled_from([0.0, 0.2]))
def test_dpo_gradient_closed_form(h, beta, smoothing):
    """d/dh = -beta (sigmoid(-beta h) - smoothing); the chosen gains what the rejected loses."""
    chosen, rejected = tensor(h).requires_grad_(), tensor(0.0).requires_grad_()
    dpo_loss(chosen, rejected, tensor(0.0), tensor(0.0), beta=beta, label_smoothing=smoothing)[0].backward()
    wanted = -beta * (1 / (1 + math.exp(beta * h)) - smoothing)
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert rejected.grad.item() == pytest.approx(-wanted, rel=1e-9, abs=1e-12)


def test_dpo_extremes_stay_finite_and_empty_is_zero():
    chosen = tensor(-2000.0).requires_grad_()
    loss, _ = dpo_loss(chosen, tensor(0.0), tensor(0.0), tensor(0.0), beta=1)
    loss.backward()
    assert loss.item() == 2000
    assert chosen.grad is not None
    assert chosen.grad.item() == -1
    empty = torch.zeros(0, requires_grad=True)
    loss, metrics = dpo_loss(empty, empty, empty, empty, beta=1)
    assert loss.item() == 0
    assert metrics["count"].item() == 0


def test_dpo_reference_has_no_gradient_and_half_precision_is_widened():
    reference = torch.zeros(1, requires_grad=True)
    policy = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    loss, _ = dpo_loss(policy, policy, reference, reference, beta=1)
    loss.backward()
    assert reference.grad is None
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "beta must be greater than 0, got 0"),
        ({"beta": NAN}, "beta must be greater than 0, got nan"),
        ({"beta": 1, "label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), and 0 for ipo; got 0.5"),
        ({"beta": 1, "label_smoothing": -0.1}, "label_smoothing must be"),
        ({"beta": 1, "label_smoothing": 0.1, "kind": "ipo"}, "label_smoothing must be"),
        ({"beta": 1, "kind": "hinge"}, "unknown kind of DPO loss 'hinge': choose sigmoid or ipo"),
    ],
)
def test_wrong_dpo_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(tensor(1), tensor(1), tensor(1), tensor(1), **options)


def test_regression_by_hand():
    """Errors 1, missing, 0, -2, 0.5: squares 1 + 0 + 4 + 0.25 over 4 = 1.3125; huber 0.5 + 0 + 1.5 + 0.125 over 4."""
    predictions, targets = tensor([1, 2], [3, 4], [NAN, 2.5]), tensor([0, NAN], [3, 6], [NAN, 2])
    loss, metrics = masked_regression_loss(predictions, targets)
    assert loss.item() == pytest.approx(1.3125)
    assert metrics["mse"].item() == pytest.approx(1.3125)
    assert metrics["mae"].item() == pytest.approx(3.5 / 4)
    assert metrics["count"].item() == 4
    huber, metrics = masked_regression_loss(predictions, targets, kind="huber")
    assert huber.item() == pytest.approx(2.125 / 4)
    assert metrics["mse"].item() == pytest.approx(1.3125)
    assert masked_regression_loss(predictions, targets, kind="mse", normalizer=10)[0].item() == pytest.approx(0.525)


def test_regression_weights_of_aspects():
    """Squares 1 and 0 on column 0, 4 on column 1, weights 2 and 3: (2 + 12) / 3 observed; the metrics stay plain."""
    loss, metrics = masked_regression_loss(tensor([1, 2], [3, 4]), tensor([0, NAN], [3, 6]), weights_K=tensor(2, 3))
    assert loss.item() == pytest.approx(14 / 3)
    assert metrics["mse"].item() == pytest.approx(5 / 3)


@pytest.mark.parametrize("kind", ["mse", "huber"])
def test_regression_gradient_is_zero_where_missing(kind):
    predictions = tensor([1, NAN], [math.inf, 4]).requires_grad_()
    masked_regression_loss(predictions, tensor([0.5, NAN], [NAN, NAN]), kind=kind)[0].backward()
    assert predictions.grad is not None
    assert predictions.grad.tolist() == [[1 if kind == "mse" else 0.5, 0], [0, 0]]
    predictions.grad = None
    loss, metrics = masked_regression_loss(predictions, torch.full((2, 2), NAN), kind=kind)
    loss.backward()
    assert loss.item() == 0
    assert predictions.grad.eq(0).all()
    assert metrics["count"].item() == 0
    assert not any(value.requires_grad for value in metrics.values())


@given(st.integers(0, 10_000), st.sampled_from(["mse", "huber"]))
def test_regression_of_parts_adds_up_to_the_whole(seed, kind):
    predictions, targets, _, mask = random_batch(seed, scale=2.0)
    targets[~mask] = NAN
    whole, _ = masked_regression_loss(predictions, targets, kind=kind)
    parts = [
        masked_regression_loss(predictions[rows], targets[rows], kind=kind, normalizer=mask.sum())[0]
        for rows in (slice(0, 2), slice(2, 5))
    ]
    assert (parts[0] + parts[1]).item() == pytest.approx(whole.item(), rel=1e-9)


def test_regression_in_half_precision_is_computed_in_float32():
    loss, _ = masked_regression_loss(torch.ones(1, 1, dtype=torch.bfloat16), torch.zeros(1, 1))
    assert loss.dtype == torch.float32


def test_wrong_regression_arguments_are_refused():
    with pytest.raises(ValueError, match="unknown kind of regression loss 'l1': choose mse or huber"):
        masked_regression_loss(tensor([1]), tensor([1]), kind="l1")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"the same shape; got \(1, 1\) and \(1, 2\)"):
        masked_regression_loss(tensor([1]), tensor([1, 2]))


def test_merge_metrics_by_hand():
    """(1 * 1 + 4 * 2) / 3 = 3. Parts without a single term give 0, not NaN."""
    parts = [{"ratio": tensor(1)[0], "count": tensor(1)[0]}, {"ratio": tensor(4)[0], "count": tensor(2)[0]}]
    assert {name: value.item() for name, value in merge_metrics(parts).items()} == {"ratio": 3, "count": 3}
    empty = [{"ratio": tensor(0)[0], "count": tensor(0)[0]}]
    assert merge_metrics(empty)["ratio"].item() == 0
    with pytest.raises(ValueError, match="at least one micro-batch"):
        merge_metrics([])
