import math
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.functional.advantages import group_advantages
from equipoise.functional.objectives import (
    METHODS,
    combine_objectives,
    method_options,
    objective_contributions,
    variance_shares,
)
from equipoise.functional.objectives.weighted_sum import settle_ties

NAN = math.nan
cell = st.one_of(st.just(NAN), st.integers(-4, 4).map(lambda n: n / 4))
tables = st.lists(st.tuples(cell, cell, cell, st.integers(0, 2)), min_size=1, max_size=14)
weightings = st.tuples(*[st.sampled_from([0.0, 0.5, 1.0, 2.0])] * 3)
LINEAR = ["gdpo", "weighted_sum"]  # described here; the other methods have a file each in objectives/
methods = st.sampled_from(LINEAR)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def split(rows):
    return tensor(*[row[:3] for row in rows]), torch.tensor([row[3] for row in rows])


def by_hand(rows, weights, method, delta):
    """Section 4 of the design in plain Python, one completion and one objective at a time."""
    size = len(rows)
    total = [0.0] * size
    scored = [any(weights[k] > 0 and not math.isnan(rows[i][k]) for k in range(3)) for i in range(size)]
    for k in range(3):
        for group in {row[3] for row in rows}:
            members = [i for i in range(size) if rows[i][3] == group and not math.isnan(rows[i][k])]
            values = [rows[i][k] for i in members]
            if len(set(values)) < 2:
                continue
            scale = statistics.stdev(values) + delta if method == "gdpo" else 1
            for i in members:
                total[i] += weights[k] * (rows[i][k] - statistics.fmean(values)) / scale
    total = [0.0 if abs(value) < 1e-12 else value for value in total]

    def deviation(members):
        values = [total[i] for i in members if scored[i]]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    if method == "gdpo":
        stds = [deviation(range(size))] * size
    else:
        stds = [deviation([j for j in range(size) if rows[j][3] == rows[i][3]]) for i in range(size)]
    return [t / (std + delta) if t else 0.0 for t, std in zip(total, stds, strict=True)]


@given(tables, weightings, methods, st.sampled_from([0.0, 1e-4, 0.25]))
def test_against_plain_python(rows, weights, method, delta):
    rewards, ids = split(rows)
    found = combine_objectives(rewards, ids, tensor(*weights), method=method, delta=delta)
    assert found.tolist() == pytest.approx(by_hand(rows, weights, method, delta), rel=1e-6, abs=1e-9)


def test_weighted_sum_by_hand_with_a_gap():
    """Column 0: 0, 2, 4, centred -2, 0, 2. Column 1: 1, nan, 3, centred -1, 0, 1. Weights 1, 2: sums -4, 0, 4.

    The unbiased std of -4, 0, 4 is 4; delta 1 gives -0.8, 0, 0.8. Imputing 0 for the gap would give the middle
    completion a negative advantage for not having been scored.
    """
    rewards = tensor([0, 1], [2, NAN], [4, 3])
    found = combine_objectives(rewards, torch.tensor([3, 3, 3]), tensor(1, 2), delta=1)
    assert found.tolist() == pytest.approx([-0.8, 0, 0.8], rel=1e-12)


SCALES = ["std", "none", "batch", "leave_one_out"]


def scaled_by_hand(rows, weights, scale, delta):
    """The scales of `weighted_sum`, one completion and one objective at a time."""
    size = len(rows)
    total = [0.0] * size
    for k in range(3):
        for i in range(size):
            others = [j for j in range(size) if rows[j][3] == rows[i][3] and not math.isnan(rows[j][k])]
            if i not in others or len({rows[j][k] for j in others}) < 2:
                continue
            if scale == "leave_one_out":
                others.remove(i)
            total[i] += weights[k] * (rows[i][k] - statistics.fmean(rows[j][k] for j in others))
    total = [0.0 if abs(value) < 1e-12 else value for value in total]
    if scale in ("none", "leave_one_out"):
        return total
    result = []
    for i in range(size):
        members = [j for j in range(size) if scale == "batch" or rows[j][3] == rows[i][3]]
        scored = [j for j in members if any(weights[k] > 0 and not math.isnan(rows[j][k]) for k in range(3))]
        std = statistics.stdev(total[j] for j in scored) if len(scored) > 1 else 0.0
        result.append(total[i] / (std + delta) if total[i] else 0.0)
    return result


@given(tables, weightings, st.sampled_from(SCALES), st.sampled_from([0.0, 1e-4, 0.25]))
def test_scales_against_plain_python(rows, weights, scale, delta):
    rewards, ids = split(rows)
    found = combine_objectives(rewards, ids, tensor(*weights), delta=delta, scale=scale)
    assert found.tolist() == pytest.approx(scaled_by_hand(rows, weights, scale, delta), rel=1e-6, abs=1e-9)


def test_scales_by_hand():
    """Group 0: 0, 3, 6, centred -3, 0, 3. Group 1: 1, 2, centred -0.5, 0.5. Weight 2.

    Leave one out: 2 (0 - 4.5) = -9, 0, 9 and 2 (1 - 2) = -2, 2. All centred sums: -6, 0, 6, -1, 1: squares 74, std
    sqrt(74 / 4).
    """
    arguments = tensor([0], [3], [6], [1], [2]), torch.tensor([0, 0, 0, 1, 1]), tensor(2)
    found = {scale: combine_objectives(*arguments, delta=0, scale=scale).tolist() for scale in SCALES}
    assert found["none"] == [-6, 0, 6, -1, 1]
    assert found["leave_one_out"] == [-9, 0, 9, -2, 2]
    assert found["batch"] == pytest.approx([value / math.sqrt(18.5) for value in found["none"]], rel=1e-12)
    assert found["std"] == pytest.approx([-1, 0, 1, -math.sqrt(0.5), math.sqrt(0.5)], rel=1e-12)


def test_leaving_one_out_of_a_group_with_gaps_and_of_one():
    """Only what is scored is compared: 2 against 4 and 4 against 2. The one of group 7 has no other: 0."""
    rewards = tensor([2], [NAN], [4], [9])
    found = combine_objectives(rewards, torch.tensor([0, 0, 0, 7]), tensor(1), scale="leave_one_out")
    assert found.tolist() == [-2, 0, 2, 0]


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_settles_ties(scale):
    """0.1 + 0.9, 0.3 + 0.7 and 0.6 + 0.4 are equal but for rounding."""
    rewards = tensor([0.1, 0.9], [0.3, 0.7], [0.6, 0.4])
    ids = torch.zeros(3, dtype=torch.long)
    contributions = objective_contributions(rewards, ids, tensor(1, 1), delta=0, scale=scale)
    assert contributions.eq(0).all()


def test_an_unknown_scale_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown scale 'mean': choose std, none, batch or leave_one_out"):
        combine_objectives(tensor([1]), torch.tensor([0]), tensor(1), scale="mean")


def test_gdpo_by_hand():
    """Group 0, column 0: 0, 2: std sqrt 2, z = -+1 / sqrt 2. Column 1: 0, 100: the same z. Weights 1, 3: -+4 / sqrt 2.

    Group 1: column 0 equal, column 1: 5, 1: z = +-1 / sqrt 2, times 3. Sum of squares 2 * 8 + 2 * 4.5 = 25, std
    sqrt(25 / 3).
    """
    rewards = tensor([0, 0], [2, 100], [7, 5], [7, 1])
    found = combine_objectives(rewards, torch.tensor([0, 0, 1, 1]), tensor(1, 3), method="gdpo", delta=0)
    std = 5 / math.sqrt(3)
    four, three = 4 / math.sqrt(2), 3 / math.sqrt(2)
    assert found.tolist() == pytest.approx([-four / std, four / std, three / std, -three / std], rel=1e-12)


def test_the_default_method_and_delta():
    """Centred sums -1, 1; std sqrt 2; delta 1e-4."""
    found = combine_objectives(tensor([0, 0], [1, 1]), torch.tensor([0, 0]), tensor(1, 1))
    assert found[1].item() == pytest.approx(1 / (math.sqrt(2) + 1e-4), rel=1e-12)
    contributions = objective_contributions(tensor([0, 0], [2, 4]), torch.tensor([0, 0]), tensor(1, 1))
    root = math.sqrt(18) + 1e-4
    assert contributions[1].tolist() == pytest.approx([1 / root, 2 / root], rel=1e-12)


@given(tables, weightings)
def test_one_objective_is_group_advantages(rows, weights):
    rewards, ids = split(rows)
    plain = group_advantages(rewards[:, 0], ids, delta=0)
    found = combine_objectives(rewards[:, :1], ids, tensor(1), delta=0)
    assert torch.allclose(found, plain, rtol=0, atol=1e-12)
    found = combine_objectives(rewards[:, :1], ids, tensor(1), method="gdpo", delta=0)  # up to one factor, above 0
    factor = found.norm() / plain.norm() if plain.any() else 1
    assert factor > 0 and torch.allclose(found, factor * plain, rtol=0, atol=1e-12)


@given(tables, weightings)
def test_without_gaps_the_weighted_sum_is_plain_grpo(rows, weights):
    rewards, ids = split(rows)
    rewards = rewards.nan_to_num(0.5)
    found = combine_objectives(rewards, ids, tensor(*weights))
    assert torch.allclose(found, group_advantages(rewards @ tensor(*weights), ids), rtol=1e-6, atol=1e-9)


@given(tables, weightings, methods)
def test_groups_sum_to_zero_and_only_scores_count(rows, weights, method):
    rewards, ids = split(rows)
    weights_K = tensor(*weights)
    found = combine_objectives(rewards, ids, weights_K, method=method)
    for group in ids.unique():
        assert found[ids == group].sum().item() == pytest.approx(0, abs=1e-7)
    unscored = (rewards.isnan() | (weights_K == 0)).all(1)
    assert found[unscored].eq(0).all()
    for moved in (rewards + 3, torch.where(weights_K > 0, rewards, 77.0)):  # an offset, and what weighs nothing
        assert torch.allclose(combine_objectives(moved, ids, weights_K, method=method), found, atol=1e-7)


@given(tables, weightings, methods)
def test_contributions_add_up(rows, weights, method):
    rewards, ids = split(rows)
    arguments = rewards, ids, tensor(*weights)
    contributions = objective_contributions(*arguments, method=method)
    assert contributions.shape == rewards.shape
    assert torch.equal(contributions.sum(1), combine_objectives(*arguments, method=method))
    assert contributions[rewards.isnan()].eq(0).all()


@given(tables, st.integers(0, 1))
def test_gdpo_has_variance_one_and_ignores_the_scale_of_an_objective(rows, column):
    rewards, ids = split(rows)
    arguments = ids, tensor(1, 1, 1)
    found = combine_objectives(rewards, *arguments, method="gdpo", delta=0)
    scored = ~rewards.isnan().all(1)
    if found.ne(0).any():
        assert found[scored].std().item() == pytest.approx(1, rel=1e-9)
    rewards[:, column] *= 1000
    assert torch.allclose(combine_objectives(rewards, *arguments, method="gdpo", delta=0), found, atol=1e-9)


@pytest.mark.parametrize("method", LINEAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("delta", [0.0, 1e-12, 1e-4])
def test_equal_rewards_give_exactly_zero_beside_a_live_group(method, dtype, delta):
    rewards = torch.tensor([[0.7, 0.1]] * 8 + [[0.0, 0.3], [1.0, 0.3]], dtype=dtype)
    ids = torch.tensor([0] * 8 + [1, 1])
    found = combine_objectives(rewards, ids, torch.tensor([0.3, 0.7]), method=method, delta=delta)
    assert found[:8].eq(0).all()
    assert found[8:].ne(0).all()
    assert found.dtype == dtype


@pytest.mark.parametrize("method", LINEAR)
def test_objectives_that_cancel_are_a_tie_up_to_rounding(method):
    """0.1 + 0.3 + 0.2 against 0.3 + 0.2 + 0.1: the sums of centred rewards differ by rounding alone."""
    rewards = tensor([0.1, 0.3, 0.2], [0.3, 0.2, 0.1], [0.2, 0.1, 0.3])
    found = combine_objectives(rewards, torch.zeros(3, dtype=torch.long), tensor(1, 1, 1), method=method, delta=0)
    assert found.tolist() == [0, 0, 0]
    contributions = objective_contributions(
        rewards, torch.zeros(3, dtype=torch.long), tensor(1, 1, 1), method=method, delta=0
    )
    assert contributions.eq(0).all()


@pytest.mark.parametrize("method", LINEAR)
def test_a_difference_above_rounding_is_no_tie(method):
    rewards = tensor([0.1, 0.3], [0.3, 0.1 + 1e-9])
    found = combine_objectives(rewards, torch.tensor([0, 0]), tensor(1, 1), method=method, delta=0)
    if method == "weighted_sum":  # gdpo gives both objectives the same spread, so they do cancel
        assert found.tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])
    else:
        assert found.tolist() == [0, 0]


@pytest.mark.parametrize("method", LINEAR)
def test_zero_variance_is_judged_by_objective(method):
    """Eight 0.7s on one objective add exactly nothing where another objective varies."""
    varied = [0.0, 1.0] * 4
    both = tensor(*[[0.7, value] for value in varied])
    ids = torch.zeros(8, dtype=torch.long)
    contributions = objective_contributions(both, ids, tensor(1, 1), method=method, delta=0)
    assert contributions[:, 0].eq(0).all()
    alone = combine_objectives(both[:, 1:], ids, tensor(1), method=method, delta=0)
    assert torch.equal(contributions.sum(1), alone)


@pytest.mark.parametrize("method", LINEAR)
def test_an_objective_of_weight_zero_is_no_score(method):
    """The third completion is scored on an objective of weight 0 alone: it must not widen the count of the std."""
    ids = torch.tensor([0, 0, 0])
    with_it = combine_objectives(tensor([0, 1], [2, 5], [NAN, 9]), ids, tensor(1, 0), method=method, delta=0)
    without = combine_objectives(tensor([0], [2]), ids[:2], tensor(1), method=method, delta=0)
    assert with_it.tolist() == [*without.tolist(), 0]


@pytest.mark.parametrize("method", LINEAR)
def test_nothing_scored_gives_zero(method):
    ids = torch.tensor([0, 0])
    assert combine_objectives(tensor([NAN, NAN], [NAN, NAN]), ids, tensor(1, 1), method=method).tolist() == [0, 0]
    assert combine_objectives(tensor([1, 2], [3, 4]), ids, tensor(0, 0), method=method, delta=0).tolist() == [0, 0]
    empty = combine_objectives(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), tensor(1, 1), method=method)
    assert empty.tolist() == []


def test_every_method_is_a_file_of_its_name_with_a_test():
    for name, method in METHODS.items():
        assert method.__name__ == name and method.__module__ == f"equipoise.functional.objectives.{name}"
        own = Path(__file__).parent / "objectives" / f"test_{name}.py"
        assert name in LINEAR or own.is_file()


def test_values_are_tried_before_there_is_a_reward():
    names = ["safety", "actionability"]
    assert method_options("conditioned", {"gate": "actionability"}, names, tensor(1, 1)) == {"gate": 1}
    assert method_options("chebyshev", {"tau": 0.2}, names, tensor(1, 1)) == {"tau": 0.2}
    with pytest.raises(ValueError, match="tau must be above 0"):
        method_options("chebyshev", {"tau": -1}, names, tensor(1, 1))
    with pytest.raises(ValueError, match="the option gate is missing: name one of the aspects safety, actionability"):
        method_options("conditioned", {}, names, tensor(1, 1))
    with pytest.raises(ValueError, match="unknown method 'ranks' of combining objectives"):
        method_options("ranks", {"tau": 1}, names, tensor(1, 1))
    with pytest.raises(ValueError, match="gate names no aspect"):
        method_options("conditioned", {"gate": "safe"}, names, tensor(1, 1))
    with pytest.raises(ValueError, match="weights must be finite numbers"):
        method_options("rank", {}, names, -tensor(1, 1))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_takes_an_empty_batch(method):
    names = ["safety", "actionability"]
    options = {"gate": "safety"} if method == "conditioned" else {}
    assert method_options(method, options, names, tensor(1, 1)) == ({"gate": 0} if options else {})


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown method 'mean' of combining objectives: choose one of weighted_sum"):
        combine_objectives(tensor([1]), torch.tensor([0]), tensor(1), method="mean")


@pytest.mark.parametrize("weight", [-0.1, math.inf, NAN])
def test_wrong_weights_are_refused(weight):
    with pytest.raises(ValueError, match="weights must be finite numbers of at least 0, got"):
        combine_objectives(tensor([1, 2]), torch.tensor([0]), tensor(1, weight))


@pytest.mark.parametrize("rewards", [tensor([1]), tensor(1, 2)])
def test_a_weight_for_each_column_is_needed(rewards):
    with pytest.raises(ValueError, match="one column for each weight"):
        combine_objectives(rewards, torch.tensor([0]), tensor(1, 2))


def test_options_unknown_to_the_method_are_refused():
    with pytest.raises(TypeError, match="temperature"):
        combine_objectives(tensor([1]), torch.tensor([0]), tensor(1), temperature=3)


def test_an_infinite_reward_names_its_column():
    with pytest.raises(ValueError, match="objective column 1 holds -inf for completion 0"):
        combine_objectives(tensor([1, -math.inf]), torch.tensor([0]), tensor(1, 0))


def test_variance_shares_by_hand():
    """Advantages 2, -2 from 3 - 1 and -3 + 1: shares 12 / 8 = 1.5 and -4 / 8 = -0.5. Around a mean of 1: 3, -1."""
    assert variance_shares(tensor([3, -1], [-3, 1])).tolist() == [1.5, -0.5]
    assert variance_shares(tensor([4, -1], [-2, 1])).tolist() == [1.5, -0.5]
    assert variance_shares(tensor([0.25, 0], [-0.25, 0])).tolist() == [1, 0]
    assert variance_shares(tensor([0, 0], [0, 0])).tolist() == [0, 0]


def test_settle_ties_by_hand():
    """The parts add up to 1. Rounding 0.6 + 0.6 and 0.5 + 0.5 may explain that; 0.4 + 0.4 may not."""
    parts = tensor([3, -2], [-2, 1], [-2, 3])
    rounding = tensor([0.6, 0.6], [0.5, 0.5], [0.4, 0.4])
    assert settle_ties(parts, rounding).tolist() == [[0, 0], [0, 0], [-2, 3]]
