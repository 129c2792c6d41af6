import math

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

import equipoise.functional.statistics as module
from equipoise.functional.statistics import (
    bootstrap_interval,
    bootstrap_statistic,
    holm_correction,
    paired_difference,
    pearson,
    r_squared,
    ranks,
    spearman,
)

NAN = math.nan
small = st.integers(-3, 3).map(float)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def normal(count, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_bootstrap_of_a_constant_and_of_one_value():
    assert bootstrap_interval([2, 2, 2], seed=0) == (2, 2, 2)
    assert bootstrap_interval([5.5], seed=0) == (5.5, 5.5, 5.5)


def test_bootstrap_of_two_values_has_known_percentiles():
    """Resamples of (0, 1) are 0, 1/2, 1 with chances 1/4, 1/2, 1/4: the middle 40% is 1/2, the middle 60% is all."""
    assert bootstrap_interval([0, 1], seed=1, level=0.4) == (0.5, 0.5, 0.5)
    assert bootstrap_interval([0, 1], seed=1, level=0.6) == (0.5, 0.0, 1.0)


def test_bootstrap_agrees_with_normal_theory():
    """Of 400 values the mean's interval is mean +- 1.96 s / sqrt(400), within 5% of its width; 80%: 1.2816."""
    values = normal(400)
    error = values.std(correction=0).item() / 20
    for level, width in ((0.95, 1.959964), (0.8, 1.281552)):
        mean, lower, upper = bootstrap_interval(values, seed=3, level=level)
        assert mean == pytest.approx(values.mean().item(), rel=1e-12)
        assert lower == pytest.approx(mean - width * error, abs=0.1 * error)
        assert upper == pytest.approx(mean + width * error, abs=0.1 * error)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3, level=0.95, num_resamples=10_000)


def test_bootstrap_agrees_with_scipy():
    values = normal(60, seed=5).exp()
    theirs = scipy.stats.bootstrap(
        (values.numpy(),), lambda v, axis: v.mean(axis), method="percentile", n_resamples=10_000, rng=1
    ).confidence_interval
    _, lower, upper = bootstrap_interval(values, seed=0)
    width = theirs.high - theirs.low
    assert lower == pytest.approx(theirs.low, abs=0.05 * width)
    assert upper == pytest.approx(theirs.high, abs=0.05 * width)


def test_bootstrap_is_seeded_and_leaves_the_global_generator_alone():
    values = normal(30)
    torch.manual_seed(0)
    first = bootstrap_interval(values, seed=7)
    drawn = torch.rand(1)
    assert first == bootstrap_interval(values, seed=7)
    assert first != bootstrap_interval(values, seed=8)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


def test_bootstrap_does_not_depend_on_the_size_of_its_chunks(monkeypatch):
    values = normal(30)
    drawn = []

    def mean(resamples):
        drawn.append(resamples.shape)
        return resamples.mean(1)[:, 0]

    whole = bootstrap_statistic(values[:, None], mean, seed=2, num_resamples=100)
    assert drawn == [(1, 30, 1), (100, 30, 1)]
    drawn.clear()
    monkeypatch.setattr(module, "CHUNK_NUMBERS", 30 * 40)
    assert bootstrap_statistic(values[:, None], mean, seed=2, num_resamples=100) == whole
    assert drawn == [(1, 30, 1), (40, 30, 1), (40, 30, 1), (20, 30, 1)]
    drawn.clear()
    monkeypatch.setattr(module, "CHUNK_NUMBERS", 1)
    assert bootstrap_statistic(values[:, None], mean, seed=2, num_resamples=3)[0] == whole[0]
    assert drawn == [(1, 30, 1)] * 4


def test_bootstrap_holds_four_million_numbers_at_once():
    """1,000 rows of 2 columns: 2^22 / 2000 = 2097 resamples at a time, 5 times for 10,000."""
    drawn = []

    def mean(resamples):
        drawn.append(len(resamples))
        return resamples.mean((1, 2))

    bootstrap_statistic(torch.zeros(1000, 2), mean, seed=0)
    assert drawn == [1, 2097, 2097, 2097, 2097, 1612]


def test_values_that_carry_a_graph_are_read_without_it():
    values = normal(4).requires_grad_()
    assert bootstrap_interval(values, seed=0, num_resamples=5) == bootstrap_interval(
        values.detach(), seed=0, num_resamples=5
    )
    assert bootstrap_statistic(values[:, None], lambda r: r.mean((1, 2)), seed=0, num_resamples=5)[0] == pytest.approx(
        values.detach().mean().item()
    )
    graphs = []
    bootstrap_statistic(values[:, None], lambda r: graphs.append(r.requires_grad) or r.mean((1, 2)), seed=0)
    assert not any(graphs)
    for found in (ranks(values), pearson(values, values), spearman(values, values), r_squared(values, values)):
        assert not found.requires_grad


def test_bootstrap_resamples_rows_whole():
    """Two columns that are equal stay equal in every resample, so their difference has an interval of width 0."""
    rows = normal(50)[:, None].expand(-1, 2)
    assert bootstrap_statistic(rows, lambda r: (r[..., 0] - r[..., 1]).sum(1), seed=0) == (0, 0, 0)


def test_bootstrap_of_a_correlation_leaves_out_undefined_resamples():
    """Of three rows a resample is three times one row in 3 of 27: there the correlation has no value."""
    rows = tensor([1, 1], [2, 2], [3, 3])
    estimate, lower, upper = bootstrap_statistic(rows, lambda r: spearman(r[..., 0], r[..., 1]), seed=0)
    assert (estimate, lower, upper) == pytest.approx((1, 1, 1))


def test_bootstrap_of_an_undefined_statistic_is_refused():
    constant = tensor([1, 1], [1, 2])
    for rows in (constant, tensor([1, 2])):
        with pytest.raises(ValueError, match="undefined"):
            bootstrap_statistic(rows, lambda r: pearson(r[..., 0], r[..., 1]), seed=0)
    answers = iter([tensor(1), tensor(NAN, NAN)])
    with pytest.raises(ValueError, match="undefined"):  # has a value on the data, and on no resample
        bootstrap_statistic(tensor([1]), lambda resamples: next(answers), seed=0, num_resamples=2)
    answers = iter([tensor(NAN), tensor(1, 1)])
    with pytest.raises(ValueError, match="undefined"):  # the other way round
        bootstrap_statistic(tensor([1]), lambda resamples: next(answers), seed=0, num_resamples=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "values must be one-dimensional and hold at least one number"),
        ([[1.0]], "values must be one-dimensional and hold at least one number"),
        ([1.0, NAN, NAN], r"values\[1\] is nan: leave out what was not measured"),
        ([1.0, 2.0, -math.inf], r"values\[2\] is -inf: leave out what was not measured"),
    ],
)
def test_wrong_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 0}, "level must be between 0 and 1, got 0"),
        ({"level": 1}, "level must be between 0 and 1, got 1"),
        ({"num_resamples": 0}, "num_resamples must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval([1.0], seed=0, **options)


@pytest.mark.parametrize("rows", [torch.zeros(0, 2), torch.zeros(3)])
def test_bootstrap_needs_rows(rows):
    with pytest.raises(ValueError, match="the bootstrap needs at least one row"):
        bootstrap_statistic(rows, lambda r: r.sum((1, 2)), seed=0)


def test_one_resample_is_enough():
    assert bootstrap_interval([3.0], seed=0, num_resamples=1) == (3, 3, 3)


def test_paired_difference():
    """3 - 1 and 4 - 2 are both 2. Pairing removes what the units share."""
    assert paired_difference([3, 4], [1, 2], seed=0) == (2, 2, 2)
    shared, noise = 10 * normal(100), 0.1 * normal(100, seed=1)
    _, lower, upper = paired_difference(shared + noise + 0.5, shared, seed=0)
    assert 0.4 < lower < upper < 0.6
    assert paired_difference(shared, noise, seed=4, level=0.5, num_resamples=50) == bootstrap_interval(
        shared - noise, seed=4, level=0.5, num_resamples=50
    )
    assert paired_difference(shared, noise, seed=4) == bootstrap_interval(shared - noise, seed=4)
    with pytest.raises(ValueError, match="as many values on both sides, got 2 and 1"):
        paired_difference([1, 2], [1], seed=0)
    with pytest.raises(ValueError, match=r"second\[0\] is nan"):
        paired_difference([1], [NAN], seed=0)
    with pytest.raises(ValueError, match=r"first\[0\] is nan"):
        paired_difference([NAN], [1], seed=0)


def test_correlations_by_hand():
    """Centred [-1, 0, 1] and [-7/3, -1/3, 8/3]: 5 / sqrt(2 * 38 / 3). Ranks [1, 2, 3], [1, 3, 2]: 1 - 12 / 24."""
    assert pearson(tensor(1, 2, 3), tensor(2, 4, 7)).item() == pytest.approx(5 / math.sqrt(76 / 3), rel=1e-12)
    assert spearman(tensor(1, 2, 3), tensor(1, 9, 4)).item() == pytest.approx(0.5, rel=1e-12)
    assert ranks(tensor(5, 1, 5)).tolist() == [2.5, 1, 2.5]
    assert ranks(tensor([3, 2], [0, 0])).tolist() == [[2, 1], [1.5, 1.5]]


@given(st.lists(st.tuples(small, small), min_size=2, max_size=12))
def test_correlations_against_scipy(pairs):
    first, second = tensor(*[pair[0] for pair in pairs]), tensor(*[pair[1] for pair in pairs])
    if len(set(first.tolist())) == 1 or len(set(second.tolist())) == 1:
        assert pearson(first, second).isnan()
        assert spearman(first, second).isnan()
        return
    assert pearson(first, second).item() == pytest.approx(scipy.stats.pearsonr(first, second).statistic, abs=1e-9)
    assert spearman(first, second).item() == pytest.approx(scipy.stats.spearmanr(first, second).statistic, abs=1e-9)
    assert ranks(first).tolist() == scipy.stats.rankdata(first).tolist()


def test_correlations_along_the_last_dimension():
    first, second = normal(12).view(3, 4), normal(12, seed=1).view(3, 4)
    for function in (pearson, spearman, r_squared):
        rows = [function(a, b).item() for a, b in zip(first, second, strict=True)]
        assert function(first, second).tolist() == pytest.approx(rows, rel=1e-12)


def test_correlation_with_a_constant_has_no_value_although_its_mean_rounds():
    assert pearson(tensor(*[0.1] * 3), tensor(1, 2, 4)).isnan()
    assert pearson(tensor(1, 2, 4), tensor(*[0.1] * 3)).isnan()


def test_correlations_in_float32_are_computed_in_float64():
    """A large offset would leave float32 no digits of the spread."""
    first = torch.tensor([1e4, 1e4 + 1, 1e4 + 2], dtype=torch.float32)
    assert pearson(first, first).item() == pytest.approx(1, abs=1e-12)
    assert pearson(first, first).dtype == torch.float64


def test_r_squared_by_hand():
    """Errors 0, 0, 1 against deviations -1, 0, 1: 1 - 1 / 2. The mean itself scores 0; targets without spread, -inf."""
    assert r_squared(tensor(1, 2, 4), tensor(1, 2, 3)).item() == 0.5
    assert r_squared(tensor(2, 2, 2), tensor(1, 2, 3)).item() == 0
    assert r_squared(tensor(3, 2, 1), tensor(1, 2, 3)).item() == -3
    assert r_squared(tensor(1, 2), tensor(3, 3)).item() == -math.inf
    assert r_squared(tensor(0.1, 0.1, 0.1), tensor(0.1, 0.1, 0.1)).isnan()


def test_holm_by_hand():
    """Ascending: 3 * 0.01 = 0.03, 2 * 0.03 = 0.06, then 0.04, raised to 0.06. Never above 1."""
    assert holm_correction([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm_correction([0.6, 0.7]) == [1, 1]
    assert holm_correction([0.0, 1.0]) == [0, 1]
    assert holm_correction([]) == []
    for wrong in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match="a p-value lies between 0 and 1, got"):
            holm_correction([0.5, wrong])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_by_definition(p_values):
    """Step down: reject while p <= alpha / (number not yet rejected). The adjusted value is where that turns."""
    adjusted = holm_correction(p_values)
    for alpha in (0.013, 0.051, 0.21, 0.53):
        ordered, rejected = sorted(range(len(p_values)), key=lambda i: p_values[i]), set()
        for i in ordered:
            if p_values[i] * (len(p_values) - len(rejected)) > alpha:
                break
            rejected.add(i)
        assert {i for i, value in enumerate(adjusted) if value <= alpha} == rejected
