"""The optimizer step: schedule, accumulation, clipping, skipped steps, exact state."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from equipoise.algorithms.run import Run
from equipoise.algorithms.steps import Updater, learning_rate, minibatches
from equipoise.config import OptimizerConfig, recipe_from_mapping
from equipoise.errors import EquipoiseError


def options(**changes: Any) -> OptimizerConfig:
    """An optimizer block."""
    return OptimizerConfig(**({"learning_rate": 0.1, "max_grad_norm": 1e9} | changes))


def run_at(directory: Path) -> Run:
    """A run that nothing is trained in."""
    recipe = {"algorithm": "sft", "policy": {"model": "m"}, "data": "d"}
    return Run(directory / "run", recipe_from_mapping(recipe))


class Toy(nn.Module):
    """A matrix, a vector, a scalar and a frozen vector."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[1.0, -2.0]]))
        self.vector = nn.Parameter(torch.tensor([0.5]))
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.Parameter(torch.tensor([3.0]), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((self.matrix @ x) * self.scalar + self.vector + self.frozen).sum()


# -- schedule --------------------------------------------------------------------------------------------------------


def test_schedules_by_hand() -> None:
    """Warm-up 2 of 6 at rate 1. Linear: 1/2, 2/2, then 1 - 0/4, 1/4, 2/4, 3/4 gone; cosine: (1 + cos(pi k/4))/2."""
    linear = options(learning_rate=1, warmup_steps=2, schedule="linear")
    assert [learning_rate(linear, k, 6) for k in range(6)] == [0.5, 1, 1, 0.75, 0.5, 0.25]
    cosine = options(learning_rate=1, warmup_steps=2, schedule="cosine")
    expected = [0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    assert [learning_rate(cosine, k, 6) for k in range(6)] == pytest.approx(expected, rel=1e-12)
    constant = options(learning_rate=3, warmup_steps=3)
    assert [learning_rate(constant, k, 6) for k in range(5)] == [1, 2, 3, 3, 3]


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 9), st.integers(1, 30), st.floats(1e-9, 1.0))
def test_rates_stay_within_the_peak(schedule: str, warmup: int, total: int, peak: float) -> None:
    """Above 0 at every step that is taken, at most the peak, rising in the warm-up and never after it."""
    config = options(learning_rate=peak, warmup_steps=warmup, schedule=schedule)
    rates = [learning_rate(config, k, total) for k in range(total)]
    rounding = 1e-12 * peak
    assert all(0 < rate <= peak + rounding for rate in rates)
    assert all(later >= earlier - rounding for earlier, later in pairwise(rates[:warmup]))
    assert all(later <= earlier + rounding for earlier, later in pairwise(rates[warmup:]))


# -- the step --------------------------------------------------------------------------------------------------------


def test_first_step_by_hand(tmp_path: Path) -> None:
    """Adam's first step is the rate times g / (|g| + eps), whatever the betas; decay takes rate * decay * w first.

    Loss (m1 x1 + m2 x2) s + v + f at x = (3, 4), m = (1, -2), s = 2: gradients m: (6, 8), v: 1, s: 3 - 8 = -5.
    Norm sqrt(36 + 64 + 1 + 25) = sqrt(126). Rate 0.1, decay 0.5 on the matrix only: m1 = 1 - 0.05 - 0.1 = 0.85,
    m2 = -2 + 0.1 - 0.1 = -2, v = 0.5 - 0.1 = 0.4, s = 2 + 0.1 = 2.1; f is frozen.
    """
    toy = Toy()
    updater = Updater(toy, options(weight_decay=0.5), 10, run_at(tmp_path))
    result = updater.step([lambda: updater.wrapped(torch.tensor([[3.0], [4.0]]))])
    assert result["grad_norm"] == pytest.approx(math.sqrt(126), rel=1e-6)
    assert (result["learning_rate"], result["skipped"], updater.updates) == (0.1, 0, 1)
    assert all(group["fused"] for group in updater._optimizer.param_groups), "five times faster, the same numbers"
    assert toy.matrix.tolist()[0] == pytest.approx([0.85, -2.0], rel=1e-6)
    assert float(toy.vector.detach()) == pytest.approx(0.4, rel=1e-6)
    assert float(toy.scalar.detach()) == pytest.approx(2.1, rel=1e-6)
    assert float(toy.frozen) == 3.0


def test_clipping_scales_the_gradient_to_the_norm(tmp_path: Path) -> None:
    """With an eps that dwarfs the gradients, Adam's first step is rate * g / eps: it shows the gradient it got.

    The gradient (6, 8, 1, -5) of the test above, clipped from sqrt(126) to 0.5: matrix step 0.1 * 6 * c / 1000.
    """
    toy = Toy()
    updater = Updater(toy, options(learning_rate=1e5, eps=1e6, max_grad_norm=0.5), 10, run_at(tmp_path))
    before = toy.matrix.detach().clone()
    updater.step([lambda: updater.wrapped(torch.tensor([[3.0], [4.0]]))])
    factor = 0.5 / math.sqrt(126)
    assert (before - toy.matrix.detach()).tolist()[0] == pytest.approx([0.6 * factor, 0.8 * factor], rel=1e-4)


def test_losses_are_summed_over_micro_batches(tmp_path: Path) -> None:
    inputs = [torch.tensor([[1.0], [2.0]]), torch.tensor([[-3.0], [0.5]]), torch.tensor([[0.1], [7.0]])]
    together, apart = Toy(), Toy()
    one = Updater(together, options(), 10, run_at(tmp_path / "a"))
    many = Updater(apart, options(), 10, run_at(tmp_path / "b"))
    for _ in range(3):
        norm = one.step([lambda: sum((one.wrapped(x) for x in inputs), torch.zeros(()))])["grad_norm"]
        parts = many.step([lambda x=x: many.wrapped(x) for x in inputs])["grad_norm"]
        assert parts == pytest.approx(norm, rel=1e-6)
    for mine, other in zip(together.parameters(), apart.parameters(), strict=True):
        assert torch.allclose(mine, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_step(
    bad: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy = Toy()
    updater = Updater(toy, options(), 10, run_at(tmp_path))
    good, broken = torch.ones(2, 1), torch.full((2, 1), bad)
    updater.step([lambda: updater.wrapped(good)])
    before, state = [p.clone() for p in toy.parameters()], updater.tensors()
    for _ in range(2):
        result = updater.step([lambda: updater.wrapped(broken)])
        assert result["grad_norm"] is None
    assert (updater.skipped, updater.updates) == (2, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, toy.parameters(), strict=True))
    assert all(torch.equal(state[name], tensor) for name, tensor in updater.tensors().items())
    updater.step([lambda: updater.wrapped(good)])  # a good one in between starts the count again
    for _ in range(2):
        updater.step([lambda: updater.wrapped(broken)])
    with pytest.raises(EquipoiseError, match=r"3 gradients in a row were not finite.*Lower optimizer.learning_rate"):
        updater.step([lambda: updater.wrapped(broken)])
    assert updater.skipped == 5
    assert sum("not finite" in record.message for record in caplog.records) <= 1


def test_schedule_counts_skipped_steps(tmp_path: Path) -> None:
    """The rate belongs to the step of the plan, not to how many succeeded."""
    updater = Updater(Toy(), options(learning_rate=1, schedule="linear"), 4, run_at(tmp_path))
    inputs = [torch.ones(2, 1), torch.full((2, 1), math.nan), torch.ones(2, 1)]
    rates = [updater.step([lambda x=x: updater.wrapped(x)])["learning_rate"] for x in inputs]
    assert rates == [1, 0.75, 0.5]


# -- state -----------------------------------------------------------------------------------------------------------


def test_restored_state_continues_bitwise(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 1, generator=generator) for _ in range(6)]
    config = options(weight_decay=0.01, schedule="cosine")
    first, second = Toy(), Toy()
    unbroken = Updater(first, config, 6, run_at(tmp_path / "a"))
    for x in inputs[:3]:
        unbroken.step([lambda x=x: unbroken.wrapped(x)])
    tensors, values = unbroken.tensors(), unbroken.values()
    resumed = Updater(second, config, 6, run_at(tmp_path / "b"))
    resumed.load(tensors, values)
    for x in inputs[3:]:
        mine = unbroken.step([lambda x=x: unbroken.wrapped(x)])
        assert resumed.step([lambda x=x: resumed.wrapped(x)]) == mine
    ours, theirs = unbroken.tensors(), resumed.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert unbroken.values() == resumed.values()


def test_saved_tensors_are_copies(tmp_path: Path) -> None:
    updater = Updater(Toy(), options(), 3, run_at(tmp_path))
    updater.step([lambda: updater.wrapped(torch.ones(2, 1))])
    saved = updater.tensors()
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    updater.step([lambda: updater.wrapped(torch.ones(2, 1))])
    assert all(torch.equal(saved[name], kept[name]) for name in kept)


def test_parameters_of_another_model_are_refused(tmp_path: Path) -> None:
    updater = Updater(Toy(), options(), 3, run_at(tmp_path))
    tensors = updater.tensors()
    del tensors["parameters/vector"]
    with pytest.raises(EquipoiseError, match=r"do not match the model's: .*vector.*model directory changed"):
        updater.load(tensors, updater.values())


# -- minibatches -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(1, 8), st.integers(0, 99))
def test_minibatches_cover_every_row_once_and_keep_groups(groups: list[int], count: int, seed: int) -> None:
    group_ids = torch.tensor(groups)
    parts = minibatches(group_ids, count, seed)
    assert len(parts) == count
    assert sorted(torch.cat(parts).tolist()) == list(range(len(groups)))
    seen = [set(group_ids[part].tolist()) for part in parts]
    assert sum(len(part) for part in seen) == len(set(groups))  # no group in two of them
    sizes = [len(part) for part in seen]
    assert max(sizes) - min(sizes) <= 1
    again = minibatches(group_ids, count, seed)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_minibatches_are_shuffled_by_the_seed() -> None:
    group_ids = torch.arange(8).repeat_interleave(2)
    assert {tuple(minibatches(group_ids, 2, seed)[0].tolist()) for seed in range(10)}.__len__() > 3
