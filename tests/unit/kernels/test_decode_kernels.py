"""Norm, gate and sampling of a decode step against float64 that says the same slowly; rounding, bounds, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from tests.kernel_toys import guarded, needs_kernels, same_bits, threads, untouched
from torch import Tensor

from equipoise.config import SamplingConfig
from equipoise.kernels import build, cpu
from equipoise.rollout import sampler

pytestmark = needs_kernels
F32, BF16 = torch.float32, torch.bfloat16
HALF_UNIT = {F32: 2.0**-24, BF16: 2.0**-8}  # most that rounding to the nearest changes a number, relatively
BELOW_ONE = 1 - 2.0**-24  # the largest float32 below 1


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, dtype: torch.dtype = F32, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=seeded(seed))).to(dtype)


def twin_of_norm(hidden: Tensor, weight: Tensor, epsilon: float, *, rounds: bool) -> Tensor:
    """RMS norm row by row in float64; `rounds`: to the hidden states' type before the weight, to both's after it."""
    rows = []
    for row in hidden.double():
        normed = row / (row.square().sum() / len(row) + epsilon).sqrt()
        normed = (normed.to(hidden.dtype).double() if rounds else normed) * weight.double()
        rows.append(normed.to(torch.promote_types(hidden.dtype, weight.dtype)).double() if rounds else normed)
    return torch.stack(rows)


TYPES = {  # of hidden, added, weight, normed
    "float32": (F32, F32, F32, F32),
    "bfloat16": (BF16, BF16, BF16, BF16),
    "float32 weight": (BF16, BF16, F32, F32),
    "float32 weight, bfloat16 products": (BF16, BF16, F32, BF16),
    "bfloat16 products": (F32, BF16, F32, BF16),
    "bfloat16 weight": (F32, F32, BF16, F32),
    "bfloat16, float32 products": (BF16, BF16, BF16, F32),
    "nothing added": (F32, None, F32, F32),
    "nothing added, bfloat16": (BF16, None, BF16, BF16),
}


@pytest.mark.parametrize("width", [1, 7, 64, 300])
@pytest.mark.parametrize("types", TYPES)
def test_residual_norm(types: str, width: int) -> None:
    of_hidden, of_added, of_weight, of_normed = TYPES[types]
    hidden = guarded(normal(9, width, dtype=of_hidden, scale=3.0))
    added = None if of_added is None else guarded(normal(9, width, dtype=of_added, seed=1))
    weight, expected_sum = guarded(1 + normal(width, dtype=of_weight, seed=2, scale=0.2)), hidden.clone()
    if added is not None:
        expected_sum = (hidden + added).to(of_hidden)
    before = hidden.clone()
    found_sum, found, _ = cpu.residual_norm(hidden, added, weight, 1e-5, of_normed)
    assert same_bits(found_sum, expected_sum) and same_bits(hidden, before)
    assert untouched(hidden) and untouched(weight) and found.dtype == of_normed
    # Roundings: of the normed row, of its product with the weight, of the result; 1e-6 for float32 sums of squares.
    wide_product = torch.promote_types(of_hidden, of_weight)
    allowed = sum(HALF_UNIT[kind] for kind in (of_hidden, wide_product)) + 1e-6
    allowed += 0 if of_normed == wide_product else HALF_UNIT[of_normed]
    exact = twin_of_norm(expected_sum, weight, 1e-5, rounds=False)
    torch.testing.assert_close(found.double(), exact, rtol=allowed, atol=1e-30)
    rounded = twin_of_norm(expected_sum, weight, 1e-5, rounds=True).to(of_normed)
    if of_normed == BF16 or of_hidden == BF16:  # float32 and float64 fall on two sides of a tie once in some thousands
        assert float((found == rounded).float().mean()) >= 0.99
    assert torch.allclose(found.float(), rounded.float(), rtol=2 * HALF_UNIT[of_normed] + 2 * HALF_UNIT[of_hidden])


def test_inverse_root_mean_squares() -> None:
    """Three dimensions are as good as two."""
    hidden, added, weight = normal(2, 5, 24), normal(2, 5, 24, seed=1), normal(24, seed=2)
    total, normed, inverse = cpu.residual_norm(hidden, added, weight, 1e-6, F32)
    assert inverse.shape == (2, 5, 1) and same_bits(total, hidden + added)
    exact = (total.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(inverse.double(), exact, rtol=1e-6, atol=0)
    flat = cpu.residual_norm(hidden.view(10, 24), added.view(10, 24), weight, 1e-6, F32)
    assert same_bits(flat[1], normed.view(10, 24)) and same_bits(flat[2], inverse.view(10, 1))


def test_epsilon_is_added_to_the_mean_square() -> None:
    """Mean square 25/2 + epsilon 12.5 is 25: (3, 4) / 5 = (0.6, 0.8); a row of zeros stays one."""
    _, normed, _ = cpu.residual_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), None, torch.ones(2), 12.5, F32)
    torch.testing.assert_close(normed, torch.tensor([[0.6, 0.8], [0.0, 0.0]]), rtol=1e-6, atol=0)


def test_bfloat16_rounds_as_torch_does() -> None:
    """Every bfloat16 plus another: ties to even, overflow to infinity, denormal numbers, NaN stays NaN."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BF16)
    shuffled = every[torch.randperm(2**16, generator=seeded())]
    near = (every.float() * (1 + 2.0**-7)).to(BF16) * 2.0**-8  # half a unit away: many ties
    for added in (shuffled, near, torch.full_like(every, float("nan"))):
        expected = every + added
        found, _, _ = cpu.residual_norm(every.view(64, -1).clone(), added.view(64, -1), torch.ones(1024), 1e-6, F32)
        found, number = found.flatten(), ~expected.isnan()
        assert torch.equal(found.isnan(), expected.isnan()) and same_bits(found[number], expected[number])
    tie = torch.tensor([[1.0, 1 + 2.0**-7, 1.0, -1.0]], dtype=BF16)
    half = torch.tensor([[2.0**-8, 2.0**-8, 2.0**-8 + 2.0**-14, -(2.0**-8)]], dtype=BF16)
    found, _, _ = cpu.residual_norm(tie, half, torch.ones(4), 1e-6, F32)
    assert found.tolist() == [[1.0, 1 + 2.0**-6, 1 + 2.0**-7, -1.0]], "down to even, up to even, above the tie, down"


@pytest.mark.parametrize("halves", [False, True], ids=["apart", "halves of one"])
@pytest.mark.parametrize("width", [1, 5, 33, 260])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_silu_times(dtype: torch.dtype, width: int, halves: bool) -> None:
    ends = torch.tensor([100.0, -100.0, 88.0, -87.5, 0.0, -0.0, 1e-30, -20.0])
    gate = torch.cat([normal(6, width, scale=4.0), ends[:, None].expand(-1, width)]).to(dtype)
    joined = guarded(torch.cat([gate, normal(14, width, dtype=dtype, seed=1)], dim=1))
    gate, up = joined.chunk(2, dim=1)
    found = cpu.silu_times(gate, up) if halves else cpu.silu_times(gate.contiguous(), up.contiguous())
    wide = gate.double()
    activated = wide / (1 + (-wide).exp())
    # Roundings of the gate and of the product, and 1e-6 for exponential and quotient; e^-87 is the smallest weight.
    exact = activated * up.double()
    torch.testing.assert_close(found.double(), exact, rtol=2 * HALF_UNIT[dtype] + 1e-6, atol=1e-35)
    rounded = (activated.to(dtype).double() * up.double()).to(dtype)
    assert dtype == F32 or float((found == rounded)[exact.abs() > 1e-35].float().mean()) >= 0.99, "but for ties"
    assert found.is_contiguous() and untouched(joined)


def test_the_exponential() -> None:
    """silu(x) / x = 1 / (1 + e^-x), which for x << 0 is e^x: two units for that, half of one each for sum and
    quotient."""
    gate = torch.cat([torch.linspace(-86.9, 20, 200_001), normal(50_000, scale=1e-3)])[None]
    found = cpu.silu_times(gate, torch.ones_like(gate)).double()
    wide = gate.double()
    torch.testing.assert_close(found, wide / (1 + (-wide).exp()), rtol=2.0**-22, atol=0)
    # By the sampler: log(1 + e^-d) of two tokens in two blocks, so that no float32 sum swallows e^-d.
    apart = torch.linspace(0, 20, 5001)
    logits = torch.full((5001, 65), -torch.inf)
    logits[:, 0], logits[:, 64] = 0.0, -apart
    tokens, logprobs = cpu.sample_tokens(logits, torch.zeros(5001), 1.0)
    assert int(tokens.max()) == 0
    torch.testing.assert_close(logprobs.double(), -(-apart.double()).exp().log1p(), rtol=1e-6, atol=0)


def logits_of(rows: int, vocabulary: int, *, seed: int = 0) -> Tensor:
    """With -inf all over and in whole blocks, but never everywhere."""
    logits = normal(rows, vocabulary, seed=seed, scale=3.0)
    logits[torch.rand(rows, vocabulary, generator=seeded(seed + 1)) < 0.2] = -torch.inf
    logits[: rows // 2, : vocabulary // 2] = -torch.inf
    logits[torch.arange(rows), torch.arange(rows) % (vocabulary - vocabulary // 2) + vocabulary // 2] = 1.0
    return logits


def draws_of(rows: int, *, seed: int = 0) -> Tensor:
    draws = torch.randint(0, 2**24, (rows,), generator=seeded(seed)).float() * 2.0**-24
    ends = torch.tensor([0.0, BELOW_ONE])
    draws[: rows // 4] = ends.repeat(rows)[: rows // 4]
    draws[-4:] = torch.tensor([0.0, BELOW_ONE, 0.0, BELOW_ONE])
    return draws


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("vocabulary", [1, 5, 63, 64, 65, 200, 1000])
def test_sampling_inverts_the_cumulative_sum(vocabulary: int, temperature: float) -> None:
    logits, draws = guarded(logits_of(400, vocabulary)), guarded(draws_of(400))
    tokens, logprobs = cpu.sample_tokens(logits, draws, temperature)
    exact = torch.log_softmax(logits.double() / temperature, dim=-1)
    cumulative, rows, wide = exact.exp().cumsum(dim=-1), torch.arange(400), draws.double()
    inverse = torch.searchsorted(cumulative / cumulative[:, -1:], wide[:, None], right=True)[:, 0]
    assert bool((logits[rows, tokens] > -torch.inf).all()), "what has no weight is never sampled"
    inside = (wide > 0) & (wide < BELOW_ONE)  # at the ends, float64 sees weights that float32 does not
    assert float((tokens == inverse)[inside].float().mean()) >= 0.995, "but where a sum and a draw are one in float32"
    below = torch.where(tokens > 0, cumulative[rows, tokens - 1], 0.0)
    assert bool((below <= wide + 1e-6).all()) and bool((cumulative[rows, tokens] >= wide - 1e-6).all())
    torch.testing.assert_close(logprobs.double(), exact[rows, tokens], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [4, 64, 256])
def test_a_draw_on_a_boundary_takes_the_entry_behind_it(vocabulary: int) -> None:
    """Equal weights, V a power of 2, so nothing rounds: u = k/V is not below the sum of k entries, so token k; a hair
    less is token k - 1."""
    numbers = torch.arange(vocabulary)
    at = numbers / vocabulary
    tokens, logprobs = cpu.sample_tokens(torch.zeros(vocabulary, vocabulary), at, 1.0)
    assert torch.equal(tokens, numbers)
    torch.testing.assert_close(logprobs, torch.full((vocabulary,), 1 / vocabulary).log())
    less, _ = cpu.sample_tokens(torch.zeros(vocabulary, vocabulary), at.nextafter(torch.tensor(-1.0)).clamp(min=0), 1.0)
    assert torch.equal(less, (numbers - 1).clamp(min=0))


@pytest.mark.parametrize("vocabulary", [3, 96, 1000])
def test_a_draw_beside_a_boundary_is_not_rounded_onto_it(vocabulary: int) -> None:
    """V equal weights: token floor(u V), exact in float64, where float32 would round u V to the next number."""
    near = torch.arange(1, vocabulary) / vocabulary
    draws = torch.cat([near.nextafter(torch.tensor(0.0)), near, near.nextafter(torch.tensor(1.0))])
    tokens, _ = cpu.sample_tokens(torch.zeros(len(draws), vocabulary), draws, 1.0)
    assert torch.equal(tokens, (draws.double() * vocabulary).long())


@pytest.mark.parametrize("draw", [0.0, 0.5, BELOW_ONE, 1.0])
@pytest.mark.parametrize("place", [0, 63, 64, 70, 129])
def test_one_token_with_all_the_mass(place: int, draw: float) -> None:
    """Also for a draw of 1, which no generator gives; also where the others are far away and not -inf."""
    for others in (-torch.inf, -500.0):
        logits = torch.full((3, 130), others)
        logits[:, place] = 300.0
        tokens, logprobs = cpu.sample_tokens(logits, torch.full((3,), draw), 2.0)
        assert tokens.tolist() == [place] * 3 and logprobs.tolist() == [0.0] * 3


def test_the_largest_draw_gets_the_last_entry_of_any_weight() -> None:
    """Where a block's float32 sum lies above its entries' float64 sum, the draw falls between; the tail is -inf."""
    logits = normal(4000, 64)
    logits[:, 50:] = -torch.inf
    for draw in (BELOW_ONE, 1.0):
        tokens, logprobs = cpu.sample_tokens(logits, torch.full((4000,), draw), 1.0)
        assert tokens.unique().tolist() == [49] and bool(logprobs.isfinite().all())


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_sampled_frequencies(temperature: float) -> None:
    """Chi-square at 1 in 1000, for one fixed seed."""
    count, logits = 50_000, normal(1, 90, seed=3)
    draws = torch.rand(count, generator=seeded(4))
    tokens, _ = cpu.sample_tokens(logits.expand(count, -1).contiguous(), draws, temperature)
    expected = torch.softmax(logits[0].double() / temperature, -1) * count
    assert stats.chisquare(torch.bincount(tokens, minlength=90).numpy(), expected.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_equals_torchs_operations(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those round other sums: one draw in a thousand may fall on the other side of one."""
    logits, draws = normal(4000, 500, scale=2.0), torch.rand(4000, generator=seeded(5))
    sampling, calls, kernel = SamplingConfig(temperature=temperature), [], cpu.sample_tokens
    monkeypatch.setattr(cpu, "sample_tokens", lambda *inputs: calls.append(1) or kernel(*inputs))
    found, logprobs = sampler.sample_tokens(logits, draws, sampling)
    assert calls == [1]
    monkeypatch.setattr(cpu, "library", lambda: None)
    expected, expected_logprobs = sampler.sample_tokens(logits, draws, sampling)
    same = found == expected
    assert calls == [1] and float(same.float().mean()) >= 0.999
    torch.testing.assert_close(logprobs[same], expected_logprobs[same], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", [0, 64, 99])
def test_nan_is_passed_on(place: int) -> None:
    logits = normal(3, 100)
    logits[1, place] = torch.nan
    logits[2] = torch.nan
    for draw in (0.0, 0.5, BELOW_ONE):
        tokens, logprobs = cpu.sample_tokens(logits, torch.full((3,), draw), 1.0)
        assert logprobs.isnan().tolist() == [False, True, True] and 0 <= int(tokens.min()) <= int(tokens.max()) < 100
    hidden = normal(2, 16)
    hidden.view(torch.int32)[0, 3] = 2**31 - 1  # the NaN that rounding up would turn into -0
    _, normed, _ = cpu.residual_norm(hidden, None, torch.ones(16), 1e-6, BF16)
    assert normed.isnan().all(dim=1).tolist() == [True, False]
    assert cpu.silu_times(hidden, hidden).isnan().sum(dim=1).tolist() == [1, 0]


KERNELS: dict[str, Callable[[Tensor], Tensor]] = {  # of rows [B, 300], each row's result on its own
    "residual_norm": lambda rows: cpu.residual_norm(rows, rows.flip(1), torch.ones(300), 1e-6, F32)[1],
    "bfloat16": lambda rows: cpu.residual_norm(rows.to(BF16), rows, torch.ones(300, dtype=BF16), 1e-6, BF16)[1].float(),
    "silu_times": lambda rows: cpu.silu_times(*rows.chunk(2, dim=1)),
    "sample_tokens": lambda rows: cpu.sample_tokens(rows, rows[:, 0].sigmoid(), 1.0)[1][:, None],
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_does_not_depend_on_company_or_threads(kernel: str) -> None:
    """120 rows are shared among threads, one row is not."""
    rows, call = normal(120, 300), KERNELS[kernel]
    with threads(2):
        assert build.library().omp_get_max_threads() == 2, "kernels and torch have one set of threads"  # type: ignore
        both = call(rows)
    with threads(1):
        assert same_bits(call(rows), both)
        assert same_bits(call(rows.flip(0).contiguous()).flip(0), both)
        assert all(same_bits(call(rows[b : b + 1]), both[b : b + 1]) for b in range(0, 120, 17))


def norm(hidden: Tensor, added: Tensor | None, weight: Tensor, dtype: torch.dtype = F32) -> Any:
    return cpu.residual_norm(hidden, added, weight, 1e-6, dtype)


ROWS, ONES, WIDE = torch.zeros(4, 16), torch.ones(16), torch.zeros(4, 32)
REFUSED: dict[str, Callable[[], Any]] = {
    "added of another shape": lambda: norm(ROWS, torch.zeros(4, 15), ONES),
    "added of fewer rows": lambda: norm(ROWS, torch.zeros(1, 16), ONES),
    "short weight": lambda: norm(ROWS, None, torch.ones(15)),
    "hidden by columns": lambda: norm(torch.zeros(16, 4).T, None, ONES),
    "every second": lambda: norm(WIDE[:, ::2], None, ONES),
    "float64 hidden": lambda: norm(ROWS.double(), None, ONES),
    "float16 added": lambda: norm(ROWS, ROWS.half(), ONES),
    "integer weight": lambda: norm(ROWS, None, ONES.long()),
    "gate and up apart": lambda: cpu.silu_times(ROWS, torch.zeros(4, 15)),
    "gate and up of two types": lambda: cpu.silu_times(ROWS, ROWS.to(BF16)),
    "gate by columns": lambda: cpu.silu_times(torch.zeros(16, 4).T, torch.zeros(16, 4).T),
    "two strides": lambda: cpu.silu_times(ROWS, WIDE[:, :16]),
    "draws of fewer rows": lambda: cpu.sample_tokens(ROWS, torch.zeros(3), 1.0),
    "draws of more rows": lambda: cpu.sample_tokens(ROWS, torch.zeros(5), 1.0),
    "float64 draws": lambda: cpu.sample_tokens(ROWS, torch.zeros(4).double(), 1.0),
    "bfloat16 logits": lambda: cpu.sample_tokens(ROWS.to(BF16), torch.zeros(4), 1.0),
    "expanded logits": lambda: cpu.sample_tokens(ROWS[:1].expand(4, -1), torch.zeros(4), 1.0),
    "draws every second": lambda: cpu.sample_tokens(ROWS, torch.zeros(8)[::2], 1.0),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    with pytest.raises(ValueError, match="a kernel got"):
        REFUSED[case]()


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        norm(ROWS, None, ONES, torch.float64)
    with pytest.raises(ValueError, match="float64"):
        cpu.silu_times(ROWS.double(), ROWS.double())


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int) -> None:
    hidden = torch.ones(rows, 16)
    assert cpu.residual_norm(hidden, hidden.clone(), ONES, 0.0, F32)[1].tolist() == [[1.0] * 16] * rows
    assert cpu.silu_times(hidden, hidden).shape == (rows, 16)
    assert cpu.sample_tokens(hidden, torch.full((rows,), 0.5), 1.0)[0].tolist() == [8] * rows


def test_fit() -> None:
    assert cpu.fit(ROWS, ROWS.to(BF16)) and not cpu.fit(ROWS, ROWS.double()) and not cpu.fit(ROWS.half())
    assert not cpu.fit(torch.zeros(1, device="meta"))
