"""Products of few rows against a float64 product, and their use by `Multiplier`."""

from __future__ import annotations

import pytest
import torch
from tests.kernel_toys import guarded, needs_kernels, same_bits, threads, untouched

from equipoise.kernels import cpu
from equipoise.kernels.cpu import FewRows
from equipoise.models.products import Multiplier

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(not FewRows.supported(), reason="this processor has no AVX512-BF16, or there is no compiler"),
]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 11, 12, 13, 16, 17, 33, 64])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 2), (15, 6), (16, 64), (50, 34), (96, 130)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_plus", [False, True])
def test_equals_a_product_in_float64(rows: int, outputs: int, inputs: int, with_bias: bool, with_plus: bool) -> None:
    weight, given = guarded(numbers(outputs, inputs)), guarded(numbers(rows, inputs, seed=1))
    bias = numbers(outputs, seed=2) if with_bias else None
    plus = guarded(numbers(rows, outputs, seed=3)) if with_plus else None
    expected = given.double() @ weight.double().t()
    expected += (0 if bias is None else bias.double()) + (0 if plus is None else plus.double())
    found = FewRows(weight, bias)(given, plus)
    assert found.shape == (rows, outputs) and found.dtype == torch.bfloat16
    # Half a unit of bfloat16, and some of float32 for terms that cancel.
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-5 * inputs)
    assert untouched(weight) and untouched(given) and (plus is None or untouched(plus))


def test_a_row_is_the_same_in_any_company_and_on_any_threads() -> None:
    multiply, given = FewRows(numbers(70, 48), None), numbers(37, 48, seed=1)
    with threads(1):
        alone = torch.cat([multiply(given[i : i + 1]) for i in range(len(given))])
    with threads(2):
        together = multiply(given)
    assert same_bits(alone, together)


def test_more_rows_than_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply, given, plus = FewRows(numbers(20, 16), None), numbers(70, 16, seed=1), numbers(70, 20, seed=2)
    whole = multiply(given, plus)
    monkeypatch.setattr(cpu, "TOGETHER", 32)
    assert same_bits(multiply(given, plus), whole)


def test_what_is_not_a_number_spreads_along_its_row_only() -> None:
    given = numbers(5, 16, seed=1)
    given[2, 7] = float("nan")
    found = FewRows(numbers(20, 16), None)(given)
    assert found[2].isnan().all() and not found[[0, 1, 3, 4]].isnan().any()


def test_refuses_what_it_cannot_multiply() -> None:
    assert not FewRows.takes(numbers(4, 3)) and not FewRows.takes(torch.ones(4, 4))
    with pytest.raises(ValueError, match="no products of few rows for \\(4, 3\\)"):
        FewRows(numbers(4, 3), None)
    with pytest.raises(ValueError, match="float32"):
        FewRows(torch.ones(4, 4), None)
    multiply = FewRows(numbers(4, 6), None)
    with pytest.raises(ValueError, match="for \\(2, 6\\)"):
        multiply(numbers(2, 4))
    with pytest.raises(ValueError, match="strides"):
        multiply(numbers(6, 2).t())
    with pytest.raises(ValueError, match="for \\(2, 4\\)"):
        multiply(numbers(2, 6), numbers(2, 3))


@pytest.mark.parametrize("inputs", [32, 33])
def test_multiplier_takes_it_where_it_can(inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to the exact product as without it."""
    weight, given, other = numbers(24, inputs), numbers(6, inputs, seed=1), numbers(6, 24, seed=2)
    exact = given.double() @ weight.double().t()
    found = [Multiplier(weight)(given), Multiplier(weight).plus(given, other)]
    monkeypatch.setattr(FewRows, "takes", lambda _: False)
    for one, two, expected in zip(
        found, [Multiplier(weight)(given), Multiplier(weight).plus(given, other)], [exact, exact + other], strict=True
    ):
        torch.testing.assert_close(one.double(), expected, rtol=2**-7, atol=1e-3)
        torch.testing.assert_close(two.double(), expected, rtol=2**-6, atol=2e-2)  # rounds the product, then the sum
