"""One token per row: the distribution, its ends, top-k and top-p, against exact probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from equipoise.config import SamplingConfig
from equipoise.rollout.randomness import uniforms
from equipoise.rollout.sampler import sample_tokens

DRAWS = 20_000


def logits_of(probabilities: list[float]) -> torch.Tensor:
    return torch.tensor(probabilities).log()[None]


def sample(logits_1V: torch.Tensor, draws: torch.Tensor, **options: float) -> tuple[torch.Tensor, torch.Tensor]:
    sampling = SamplingConfig.model_validate({"max_tokens": 1, **options})
    return sample_tokens(logits_1V.expand(len(draws), -1), draws, sampling)


def fixed_draws(count: int = DRAWS) -> torch.Tensor:
    return torch.from_numpy(uniforms(0, 0, np.arange(count), np.zeros(count, dtype=int), 1)[:, 0])


def test_inverts_the_cumulative_distribution() -> None:
    """p = (0.5, 0.25, 0.25), cumulative (0.5, 0.75, 1): 0 and 0.49 give token 0, 0.5 and 0.74 token 1, 0.76 token 2."""
    tokens, logprobs = sample(logits_of([0.5, 0.25, 0.25]), torch.tensor([0.0, 0.49, 0.5, 0.74, 0.76]))
    assert tokens.tolist() == [0, 0, 1, 1, 2]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.5, 0.5, 0.25, 0.25, 0.25]))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = sample(logits, fixed_draws(), temperature=temperature)
    exact = np.exp(logits[0].double().numpy() / temperature)
    exact /= exact.sum()
    counts = np.bincount(tokens.numpy(), minlength=12)
    assert stats.chisquare(counts, exact * DRAWS).pvalue > 0.001
    np.testing.assert_allclose(logprobs.numpy(), np.log(exact)[tokens.numpy()], rtol=1e-5, atol=1e-6)


def test_a_token_of_probability_zero_is_never_picked() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, -torch.inf, 0.0, -torch.inf]])
    ends = torch.tensor([0.0, 2.0**-23, 1 - 2.0**-23])
    first = float(torch.softmax(logits, -1)[0, 1])
    boundary = torch.tensor([first - 2.0**-20, first, first + 2.0**-20])
    tokens, logprobs = sample(logits, torch.cat([ends, boundary, fixed_draws()]))
    assert set(tokens.tolist()) == {1, 4}
    assert bool(logprobs.isfinite().all())
    assert tokens[0] == 1 and tokens[2] == 4


def test_the_largest_draw_stays_in_a_large_vocabulary() -> None:
    logits = torch.randn(64, 50_000, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = sample_tokens(logits, torch.full((64,), 1 - 2.0**-23), SamplingConfig())
    assert int(tokens.max()) < 50_000 and bool(logprobs.isfinite().all())


def test_temperature_zero_takes_the_best_and_reports_its_probability_at_one() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 0.0]])
    tokens, logprobs = sample_tokens(logits, torch.tensor([0.99, 0.99]), SamplingConfig(temperature=0))
    assert tokens.tolist() == [1, 0]
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1)[[0, 1], [1, 0]])


def test_top_k_keeps_the_k_most_probable() -> None:
    """p = (0.4, 0.1, 0.3, 0.2), k = 2: tokens 0 and 2 with 4/7 and 3/7."""
    tokens, logprobs = sample(logits_of([0.4, 0.1, 0.3, 0.2]), fixed_draws(), top_k=2)
    counts = np.bincount(tokens.numpy(), minlength=4)
    assert counts[1] == counts[3] == 0
    assert stats.chisquare(counts[[0, 2]], DRAWS * np.array([4 / 7, 3 / 7])).pvalue > 0.001
    assert sorted({round(float(v), 5) for v in logprobs.exp()}) == [0.42857, 0.57143]
    alone, _ = sample(logits_of([0.4, 0.1, 0.3, 0.2]), fixed_draws(50), top_k=1)
    assert set(alone.tolist()) == {0}
    everything, _ = sample(logits_of([0.4, 0.1, 0.3, 0.2]), fixed_draws(200), top_k=99)
    assert set(everything.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, {0}), (0.45, {0, 2}), (0.75, {0, 2, 3}), (0.95, {0, 1, 2, 3})])
def test_top_p_keeps_the_smallest_set_of_that_mass(top_p: float, kept: set[int]) -> None:
    """p = (0.4, 0.1, 0.3, 0.2): in order 0.4, 0.7, 0.9, 1.0; the token that crosses top_p is kept."""
    tokens, _ = sample(logits_of([0.4, 0.1, 0.3, 0.2]), fixed_draws(2000), top_p=top_p)
    assert set(tokens.tolist()) == kept


def test_top_k_and_top_p_together_measure_the_mass_of_the_k() -> None:
    """k = 2 leaves (4/7, 3/7); top_p 0.5 then keeps token 0 alone, since 4/7 > 0.5."""
    tokens, _ = sample(logits_of([0.4, 0.1, 0.3, 0.2]), fixed_draws(500), top_k=2, top_p=0.5)
    assert set(tokens.tolist()) == {0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 5, 63, 64, 65, 130, 1000])
def test_blocks_find_what_one_running_sum_finds(width: int, dtype: torch.dtype) -> None:
    """Against a running sum over the whole row in float64; entries of probability 0 all over, whole blocks of them."""
    generator = torch.Generator().manual_seed(width)
    logits = 3 * torch.randn(200, width, generator=generator, dtype=dtype)
    logits[:, 1 : width // 2] = -torch.inf
    logits[torch.rand(200, width, generator=generator) < 0.3] = -torch.inf
    logits[:, 0] = torch.where(logits.isneginf().all(dim=1), 0.0, logits[:, 0])
    draws = torch.randint(0, 2**23, (200,), generator=generator).float() * 2.0**-23
    draws[:2] = torch.tensor([0.0, 1 - 2.0**-23])
    tokens, logprobs = sample_tokens(logits, draws, SamplingConfig())
    exact = torch.log_softmax(logits.double(), dim=-1)
    cumulative = exact.exp().cumsum(dim=-1)
    rows = torch.arange(200)
    assert bool((logits[rows, tokens] > -torch.inf).all())
    slack = 1e-6 if dtype == torch.float32 else 1e-12
    below = torch.where(tokens > 0, cumulative[rows, tokens - 1], 0.0)
    assert bool((below <= draws.double() + slack).all())
    assert bool((cumulative[rows, tokens] >= draws.double() - slack).all())
    torch.testing.assert_close(logprobs.double(), exact[rows, tokens], rtol=1e-5, atol=1e-6)
    if dtype == torch.float64:
        torch.testing.assert_close(tokens, torch.searchsorted(cumulative, draws.double()[:, None], right=True)[:, 0])


def test_rounding_at_the_end_of_a_block_stays_in_it() -> None:
    """A target that rounds to a block's sum takes the block's last entry that has any weight, not the next block's."""
    weights = torch.zeros(1, 128)
    weights[0, :40] = torch.linspace(0.1, 1.7, 40)
    weights[0, 70] = 1e-3
    total = float(weights.sum())
    at = torch.tensor([float(weights[0, :40].sum()) / total])
    for draw in (at.nextafter(torch.tensor(0.0)), at, at.nextafter(torch.tensor(1.0))):
        tokens, _ = sample_tokens(weights.log(), draw, SamplingConfig())
        assert tokens.item() in (39, 70)
