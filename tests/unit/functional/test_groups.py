import math

import pytest
import torch

from equipoise.functional.groups import centre_rewards, group_index, group_sum, inverse_scale, spread

NAN = math.nan


def tensor(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_group_index_and_sum():
    """Ids 9, -3, 9 become 1, 0, 1; the sums are 2 for -3 and 1 + 4 = 5 for 9."""
    index, num_groups = group_index(torch.tensor([9, -3, 9]))
    assert index.tolist() == [1, 0, 1]
    assert num_groups == 2
    assert group_sum(tensor(1, 2, 4), index, 2).tolist() == [2, 5]
    assert group_sum(tensor([1, 0], [2, 1], [4, 5]), index, 2).tolist() == [[2, 1], [5, 5]]


def test_centring_by_hand():
    """Group 7: the mean of 1 and 3 is 2. Group 2 has one member. Column 1: group 7's mean is (2 + 6 + 1) / 3 = 3."""
    rewards = tensor([1, 2], [3, 6], [NAN, 1], [5, NAN])
    found = centre_rewards(rewards, torch.tensor([7, 7, 7, 2]))
    assert found.centred_BK.tolist() == [[-1, -1], [1, 3], [0, -2], [0, 0]]
    assert found.scored_BK.tolist() == [[True, True], [True, True], [False, True], [True, False]]
    assert found.index_B.tolist() == [1, 1, 1, 0]
    assert found.num_groups == 2


def test_equal_rewards_are_exactly_zero_although_their_mean_is_not():
    rewards = tensor(*[[0.7]] * 8, [NAN])
    assert rewards[:8].mean().item() != 0.7 or rewards[:6].mean().item() != 0.7  # the trap exists
    found = centre_rewards(rewards, torch.zeros(9, dtype=torch.long))
    assert found.centred_BK.eq(0).all()
    assert found.rounding_BK.eq(0).all()


def test_rounding_is_that_of_the_largest_magnitude_in_the_group():
    """16 units of 2^-52 at magnitude 8, of either sign; none in a group without variance or where missing."""
    unit = 16 * 2.0**-52
    rewards = tensor([8, 1], [2, -8], [4, 4], [4, 4], [NAN, 5])
    found = centre_rewards(rewards, torch.tensor([0, 0, 1, 1, 0]))
    assert found.rounding_BK.tolist() == [[8 * unit, 8 * unit]] * 2 + [[0, 0]] * 2 + [[0, 8 * unit]]


def test_rewards_carry_no_graph():
    rewards = tensor([1], [2]).requires_grad_()
    assert not centre_rewards(rewards, torch.zeros(2, dtype=torch.long)).centred_BK.requires_grad


def test_spread_by_hand():
    """Group 0: -1, 0, 1 gives sqrt(2 / 2) = 1. Group 1: -3, 3 beside one not scored, sqrt(18 / 1). Group 2: one."""
    centred = tensor(-1, 0, 1, -3, 3, 0, 0)
    scored = torch.tensor([True, True, True, True, True, False, True])
    index = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    assert spread(centred, scored, index, 3).tolist() == pytest.approx([1, math.sqrt(18), 0])
    columns = spread(centred[:, None].expand(-1, 2), scored[:, None].expand(-1, 2), index, 3)
    assert columns.tolist() == [[1, 1], [math.sqrt(18)] * 2, [0, 0]]


def test_inverse_scale():
    assert inverse_scale(tensor(3, 0), 1.0).tolist() == [0.25, 1]
    assert inverse_scale(tensor(4, 0), 0).tolist() == [0.25, 0]
    for delta in (-1e-9, math.inf, NAN):
        with pytest.raises(ValueError, match="delta must be a finite number of at least 0"):
            inverse_scale(tensor(1), delta)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_reward_is_refused_by_column_and_row(value):
    rewards = tensor([1, 2], [NAN, value], [3, -value])
    with pytest.raises(ValueError, match=f"objective column 1 holds {value} for completion 1"):
        centre_rewards(rewards, torch.tensor([0, 0, 0]))


@pytest.mark.parametrize("group_ids", [torch.tensor([0]), torch.tensor([[0], [0]])])
def test_shapes_that_do_not_fit_are_refused(group_ids):
    with pytest.raises(ValueError, match="one integer, for each completion; got shapes"):
        centre_rewards(tensor([1], [2]), group_ids)


def test_rewards_that_are_no_table_are_refused():
    with pytest.raises(ValueError, match="one integer, for each completion; got shapes"):
        centre_rewards(tensor(1, 2), torch.tensor([0, 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.bool])
def test_group_ids_that_are_no_integers_are_refused(dtype):
    with pytest.raises(ValueError, match="group ids must be integers, got torch"):
        centre_rewards(tensor([1], [2]), torch.zeros(2, dtype=dtype))
