"""Compiled norms, rotations and gates against torch's operations in float64, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from tests.kernel_toys import needs_kernels

from equipoise.kernels import cpu
from equipoise.kernels.cpu import by_torch, fit
from equipoise.models.block_parts import Norm, Rotation, gated, gated_backward

pytestmark = needs_kernels
ROWS = 197  # no multiple of what sums go by
UNITS = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2}  # of numbers around 1: some roundings of the type


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=UNITS[dtype] * scale)


@pytest.mark.parametrize("width", [8, 33, 256])
@pytest.mark.parametrize(("hidden", "grad"), [(torch.float32, torch.float32), (torch.float32, torch.bfloat16),
                                              (torch.bfloat16, torch.bfloat16)])  # fmt: skip
@pytest.mark.parametrize("with_plus", [False, True])
def test_gradients_of_a_norm(width: int, hidden: torch.dtype, grad: torch.dtype, with_plus: bool) -> None:
    inputs, weight = numbers(ROWS, width, dtype=hidden), numbers(width, dtype=hidden, seed=1)
    gradient = numbers(ROWS, width, dtype=grad, seed=2)
    plus = numbers(ROWS, width, dtype=hidden, seed=3) if with_plus else None
    x, w = inputs.double().requires_grad_(True), weight.double().requires_grad_(True)
    (w * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).backward(gradient.double())
    norm = Norm(weight, 1e-6)
    _, _, inverse = norm(inputs)
    found, of_weight = norm.backward(inputs, inverse, gradient, True, plus=plus)
    assert found.dtype == hidden and of_weight is not None and of_weight.dtype == hidden
    near(found, x.grad + (0 if plus is None else plus.double()), hidden)
    near(of_weight, w.grad, hidden)
    without, none = norm.backward(inputs, inverse, gradient, False, plus=plus)
    assert none is None and torch.equal(without, found)


def test_a_weights_gradient_is_the_same_for_any_number_of_threads() -> None:
    inputs, gradient, norm = numbers(1000, 64), numbers(1000, 64, seed=1), Norm(numbers(64, seed=2), 1e-6)
    _, _, inverse = norm(inputs)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(norm.backward(inputs, inverse, gradient, True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("heads", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("angles", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [2, 10, 64])
def test_rotation_turns_pairs_and_back(heads: torch.dtype, angles: torch.dtype, width: int) -> None:
    angle = numbers(ROWS, width // 2, seed=1).repeat(1, 2)
    rotation = Rotation.of(angle.cos().to(angles), angle.sin().to(angles))
    inputs = numbers(ROWS, 3, width, dtype=heads)
    first, second = inputs.double().chunk(2, dim=-1)
    cos, sin = (part.to(angles).double()[:, None, : width // 2] for part in (angle.cos(), angle.sin()))
    expected = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    found = rotation.forward(inputs)
    assert found.dtype == torch.promote_types(heads, angles)
    near(found, expected, found.dtype)
    # The transpose of a rotation is the rotation back, also where rounded angles are no longer quite on the circle.
    other = numbers(ROWS, 3, width, seed=4)
    if heads == angles == torch.float32:
        there, back = (found * other).sum(), (inputs * rotation.backward(other)).sum()
        assert math.isclose(float(there), float(back), abs_tol=1e-2)
    with by_torch():
        back = rotation.backward(inputs)
    near(rotation.backward(inputs), back, back.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 47, 704])
def test_gradients_of_a_gate(dtype: torch.dtype, width: int) -> None:
    gate, up, gradient = (4 * numbers(ROWS, width, dtype=dtype, seed=seed) for seed in range(3))
    g, u = gate.double().requires_grad_(True), up.double().requires_grad_(True)
    product = torch.nn.functional.silu(g) * u
    product.backward(gradient.double())
    near(gated(gate, up), product.detach(), dtype)
    of_gate, of_up = gated_backward(gate, up, gradient.clone())
    near(of_gate, g.grad, dtype)
    near(of_up, u.grad, dtype)


def test_halves_of_one_tensor_are_gated_without_a_copy() -> None:
    joined = numbers(ROWS, 96)
    gate, up = joined.chunk(2, dim=-1)
    assert torch.equal(gated(gate, up), gated(gate.contiguous(), up.contiguous()))
    assert torch.equal(gated(gate[:1], up[:1]), gated(gate, up)[:1])


def test_extreme_gates_vanish_or_pass() -> None:
    gate = torch.tensor([[-1e38, -200.0, -88.5, 88.5, 200.0, 1e38]])
    one = torch.ones_like(gate)
    torch.testing.assert_close(gated(gate, one), torch.nn.functional.silu(gate), rtol=1e-6, atol=1e-35)
    of_gate, _ = gated_backward(gate, one, one.clone())
    torch.testing.assert_close(of_gate, torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]), rtol=0, atol=1e-6)


def test_other_types_and_comparisons_go_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64 is not compiled for, and `by_torch` asks for torch's operations."""
    inputs = numbers(3, 8)
    assert fit(inputs) and not fit(inputs.double())
    with by_torch():
        assert not fit(inputs)
    assert fit(inputs)
    monkeypatch.setattr(cpu, "residual_norm", lambda *_, **__: pytest.fail("compiled"))
    Norm(torch.ones(8, dtype=torch.float64), 1e-6)(inputs.double())
    with by_torch():
        Norm(torch.ones(8), 1e-6)(inputs)


def test_sizes_that_disagree_are_refused() -> None:
    a, b = numbers(4, 8), numbers(5, 8)
    with pytest.raises(ValueError, match="for \\(4, 8\\)"):
        cpu.silu_gradients(a, b, a.clone())
    with pytest.raises(ValueError, match="for \\(4, 8\\)"):
        cpu.norm_gradients(a, numbers(4, 1), numbers(8), b, None, torch.float32, for_weight=False)
    with pytest.raises(ValueError, match="for \\(4, 1\\)"):
        cpu.norm_gradients(a, numbers(5, 1), numbers(8), a, None, torch.float32, for_weight=False)
    with pytest.raises(ValueError, match="for \\(4, 8\\)"):
        cpu.rotate_heads(numbers(4, 2, 8), b, b, torch.float32)
    with pytest.raises(ValueError, match="float64"):
        cpu.silu_gradients(a.double(), a.double(), a.double())
