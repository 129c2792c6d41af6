import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.functional.advantages import gae, group_advantages, zero_variance_groups

NAN = math.nan
numbers = st.floats(-10, 10).map(lambda x: round(x, 3))
rewards_with_gaps = st.lists(st.tuples(st.one_of(st.just(NAN), numbers), st.integers(-2, 2)), min_size=1, max_size=16)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def by_hand(rewards, group_ids, scale, delta):
    """Plain Python: a loop over groups with the standard library's mean and stdev."""
    centred = [0.0] * len(rewards)
    stds = [0.0] * len(rewards)
    scored = [i for i, reward in enumerate(rewards) if not math.isnan(reward)]
    for group in set(group_ids):
        members = [i for i in scored if group_ids[i] == group]
        values = [rewards[i] for i in members]
        if len(set(values)) < 2:
            continue
        for i in members:
            centred[i] = rewards[i] - statistics.fmean(values)
            stds[i] = statistics.stdev(values)
    if scale == "none":
        return centred
    if scale == "batch":
        std = statistics.stdev([centred[i] for i in scored]) if len(scored) > 1 else 0.0
        stds = [std] * len(rewards)
    return [c / (std + delta) if c else 0.0 for c, std in zip(centred, stds, strict=True)]


def test_by_hand_for_each_scale():
    """Groups 5: 1, 3 and 2: 0, 4, 8. Centred -1, 1, -4, 0, 4. Stds sqrt 2 and 4; of all five, sqrt(34 / 4).

    The default delta is 1e-4 and the default scale is std.
    """
    rewards, ids = tensor(1, 0, 3, 4, 8), torch.tensor([5, 2, 5, 2, 2])
    root = math.sqrt(2) + 1e-4
    by_std = [-1 / root, -4 / 4.0001, 1 / root, 0, 4 / 4.0001]
    assert group_advantages(rewards, ids).tolist() == pytest.approx(by_std, rel=1e-12)
    assert group_advantages(rewards, ids, scale="std").tolist() == pytest.approx(by_std, rel=1e-12)
    assert group_advantages(rewards, ids, scale="none").tolist() == [-1, -4, 1, 0, 4]
    all_std = math.sqrt(34 / 4) + 0.5
    assert group_advantages(rewards, ids, scale="batch", delta=0.5).tolist() == pytest.approx(
        [-1 / all_std, -4 / all_std, 1 / all_std, 0, 4 / all_std], rel=1e-12
    )


@given(rewards_with_gaps, st.sampled_from(["std", "none", "batch"]), st.sampled_from([0.0, 1e-4, 0.3]))
def test_against_plain_python(rows, scale, delta):
    rewards, ids = [row[0] for row in rows], [row[1] for row in rows]
    found = group_advantages(tensor(*rewards), torch.tensor(ids), scale=scale, delta=delta)
    assert found.tolist() == pytest.approx(by_hand(rewards, ids, scale, delta), rel=1e-6, abs=1e-9)


@given(rewards_with_gaps, st.sampled_from(["std", "none", "batch"]))
def test_each_group_sums_to_zero_and_order_does_not_matter(rows, scale):
    rewards, ids = tensor(*[row[0] for row in rows]), torch.tensor([row[1] for row in rows])
    found = group_advantages(rewards, ids, scale=scale)
    for group in ids.unique():
        assert found[ids == group].sum().item() == pytest.approx(0, abs=1e-6)
    order = torch.arange(len(rows)).flip(0)
    assert torch.allclose(group_advantages(rewards[order], ids[order], scale=scale), found[order], atol=1e-9)


@pytest.mark.parametrize("scale", ["std", "none", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero_whatever_delta(scale, dtype):
    """Eight 0.7s beside a group that varies: the batch's scale must not bring rounding back."""
    rewards = torch.tensor([0.7] * 8 + [0.0, 1.0], dtype=dtype)
    ids = torch.tensor([0] * 8 + [1, 1])
    for delta in (0.0, 1e-12, 1e-4):
        found = group_advantages(rewards, ids, scale=scale, delta=delta)
        assert found[:8].eq(0).all()
        assert found[8:].ne(0).all()


@pytest.mark.parametrize("scale", ["std", "none", "batch"])
def test_a_group_of_one_and_a_missing_score_give_zero(scale):
    found = group_advantages(tensor(5, NAN, 1, 2), torch.tensor([0, 1, 1, 1]), scale=scale)
    assert found[:2].tolist() == [0, 0]
    assert found[2:].ne(0).all()
    assert group_advantages(tensor(5), torch.tensor([0]), scale=scale, delta=0).tolist() == [0]
    assert group_advantages(tensor(NAN, NAN), torch.tensor([0, 0]), scale=scale, delta=0).tolist() == [0, 0]
    assert group_advantages(tensor(), torch.tensor([], dtype=torch.long), scale=scale).tolist() == []


@pytest.mark.parametrize(
    ("given_dtype", "wanted"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.int64, torch.float32)],
)
def test_the_dtype_of_the_rewards_is_kept(given_dtype, wanted):
    found = group_advantages(torch.tensor([1, 3]).to(given_dtype), torch.tensor([0, 0]))
    assert found.dtype == wanted


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="unknown scale 'mad': choose std, none or batch"):
        group_advantages(tensor(1), torch.tensor([0]), scale="mad")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"one number for each completion, got shape \(1, 1\)"):
        group_advantages(tensor([1]), torch.tensor([0]))
    with pytest.raises(ValueError, match="holds inf"):
        group_advantages(tensor(1, math.inf), torch.tensor([0, 0]))


def test_zero_variance_groups():
    """Group 4 cancels in the sum but varies; group 1 is all zeros; group 2 is a lone zero."""
    found = zero_variance_groups(tensor(1, 0, -1, 0, 0), torch.tensor([4, 1, 4, 1, 2]))
    assert found.tolist() == [False, True, False, True, True]


def test_gae_by_hand():
    """The docstring's example, and beside it a row of one token and a row of none.

    Row 0: A_2 = 1 - 0.25 = 0.75; A_1 = (0 + 0.25 - 0.5) + 0.5 * 0.75 = 0.125; returns 0.625 and 1.
    Row 1: A_1 = 2 - 0.5 = 1.5, return 2.
    """
    rewards = tensor([0, 1], [2, NAN], [NAN, NAN])
    values = tensor([0.5, 0.25], [0.5, NAN], [math.inf, 3])
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    advantages, returns = gae(rewards, values, mask, gamma=1, lam=0.5)
    assert advantages.tolist() == [[0.125, 0.75], [1.5, 0], [0, 0]]
    assert returns.tolist() == [[0.625, 1], [2, 0], [0, 0]]


def test_gae_bootstraps_after_the_last_unmasked_token():
    """gamma = 0.5, lam = 1, last values 4 and 8. Row 0: A_2 = 1 + 0.5 * 4 - 0.25 = 2.75,
    A_1 = 0 + 0.5 * 0.25 - 0.5 + 0.5 * 2.75 = 1. Row 1: A_1 = 2 + 0.5 * 8 - 0.5 = 5.5. Row 2 is empty.
    """
    advantages, returns = gae(
        tensor([0, 1], [2, 9], [9, 9]),
        tensor([0.5, 0.25], [0.5, 9], [9, 9]),
        tensor([1, 1], [1, 0], [0, 0]),
        gamma=0.5,
        lam=1,
        last_values_B=tensor(4, 8, 16),
    )
    assert advantages.tolist() == [[1, 2.75], [5.5, 0], [0, 0]]
    assert returns.tolist() == [[1.5, 3], [6, 0], [0, 0]]


@given(
    st.lists(numbers, min_size=6, max_size=6),
    st.lists(numbers, min_size=6, max_size=6),
    st.floats(0.1, 1),
    st.integers(0, 6),
    numbers,
)
def test_gae_closed_forms(rewards, values, gamma, length, last):
    """lam = 1: the discounted return less the value. lam = 0: the one-step error. Written as explicit sums."""
    mask = (torch.arange(6) < length)[None]
    arguments = tensor(rewards), tensor(values), mask
    following = [*values[1:length], last]
    errors = [rewards[t] + gamma * following[t] - values[t] for t in range(length)]
    for lam in (0.0, 0.6, 1.0):
        advantages, returns = gae(*arguments, gamma=gamma, lam=lam, last_values_B=tensor(last))
        wanted = [sum((gamma * lam) ** (s - t) * errors[s] for s in range(t, length)) for t in range(length)]
        assert advantages[0, :length].tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-9)
        assert advantages[0, length:].eq(0).all()
        assert returns[0].tolist() == pytest.approx(
            [w + v for w, v in zip(wanted, values, strict=False)] + [0] * (6 - length), rel=1e-9, abs=1e-9
        )
    discounted = [
        sum(gamma ** (s - t) * rewards[s] for s in range(t, length)) + gamma ** (length - t) * last
        for t in range(length)
    ]
    _, returns = gae(*arguments, gamma=gamma, lam=1, last_values_B=tensor(last))
    assert returns[0, :length].tolist() == pytest.approx(discounted, rel=1e-9, abs=1e-9)


def test_gae_has_no_graph_and_leaves_its_arguments_alone():
    rewards, values = tensor([1, 2]), tensor([3, 4]).requires_grad_()
    advantages, returns = gae(rewards, values, torch.ones(1, 2), gamma=1, lam=1)
    assert not advantages.requires_grad
    assert not returns.requires_grad
    assert rewards.tolist() == [[1, 2]]
    assert values.tolist() == [[3, 4]]


def test_gae_refuses_left_padding():
    numbers = torch.ones(2, 3)
    for row in ([0, 1, 1], [1, 0, 1], [0, 0, 1]):
        with pytest.raises(ValueError, match="right-padded"):
            gae(numbers, numbers, tensor([1, 1, 1], row), gamma=1, lam=1)
