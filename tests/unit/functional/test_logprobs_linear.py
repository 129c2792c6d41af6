"""The projection with a hand-written backward pass, against autograd through dense logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from equipoise.functional import projection
from equipoise.functional.logprobs import linear_logprobs


def world(count: int = 7, width: int = 3, vocabulary: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator, dtype=dtype).requires_grad_()
    bias = torch.randn(vocabulary, generator=generator, dtype=dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(vocabulary, (count,), generator=generator)


def dense(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float = 1.0, cap: float | None = None) -> Tensor:
    """Logits of every position and word, one number at a time as the model's definition has them."""
    logits = scale * (torch.einsum("nh,vh->nv", hidden, weight) + (0 if bias is None else bias))
    return logits if cap is None else cap * torch.tanh(logits / cap)


def test_by_hand() -> None:
    """h = 1, W = (0, ln 3): probabilities 1/4 and 3/4; d logp / dh = ln 3 / 4, d logp / dW = (-1/4, 1/4)."""
    hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64, requires_grad=True)
    scores = linear_logprobs(hidden, weight, None, torch.tensor([1]), with_entropy=True, with_unit_logprobs=True)
    assert scores.logprobs_N.item() == pytest.approx(math.log(0.75), rel=1e-12)
    assert scores.entropy_N is not None and scores.unit_logprobs_N is not None
    assert scores.entropy_N.item() == pytest.approx(math.log(4) - 0.75 * math.log(3), rel=1e-12)
    assert scores.unit_logprobs_N.item() == scores.logprobs_N.item()
    scores.logprobs_N.sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.item() == pytest.approx(math.log(3) / 4, rel=1e-12)
    assert weight.grad.flatten().tolist() == pytest.approx([-0.25, 0.25], rel=1e-12)


@pytest.mark.parametrize(("chunk_size", "block"), [(1, 9), (3, 9), (7, 1), (7, 3), (100, 2), (100, 9)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("scale", "cap", "temperature"), [(1.0, None, 1.0), (0.5, None, 0.7), (2.0, 1.5, 1.3)])
@pytest.mark.parametrize("frozen", [False, True])
def test_values_and_gradients_equal_dense_logits(
    monkeypatch: pytest.MonkeyPatch,
    chunk_size: int,
    block: int,
    biased: bool,
    scale: float,
    cap: float | None,
    temperature: float,
    frozen: bool,
) -> None:
    """`block`: rows of a chunk that the softmax is taken of at once."""
    monkeypatch.setattr(projection, "CACHED_NUMBERS", 5 * block)
    hidden, weight, bias, targets = world()
    bias = bias if biased else None
    leaves = [part for part in (hidden, weight, bias) if part is not None]
    for part in leaves[1:]:
        part.requires_grad_(not frozen)
    wanted = [part for part in leaves if part.requires_grad]
    logits = dense(hidden, weight, bias, scale, cap)
    table = torch.log_softmax(logits / temperature, dim=-1)
    chosen = torch.stack([table[n, target] for n, target in enumerate(targets.tolist())])
    upstream = torch.tensor([0.5, -2.0, 0.0, 1.0, 3.0, -1.0, 0.25], dtype=torch.float64)
    expected = torch.autograd.grad(chosen @ upstream, wanted)
    scores = linear_logprobs(
        hidden,
        weight,
        bias,
        targets,
        temperature=temperature,
        chunk_size=chunk_size,
        scale=scale,
        cap=cap,
        with_entropy=True,
        with_unit_logprobs=True,
    )
    torch.testing.assert_close(scores.logprobs_N, chosen, rtol=1e-12, atol=1e-12)
    entropies = torch.distributions.Categorical(logits=logits.detach() / temperature).entropy()
    torch.testing.assert_close(scores.entropy_N, entropies, rtol=1e-10, atol=1e-12)
    unit = torch.stack([torch.log_softmax(logits, -1)[n, target] for n, target in enumerate(targets.tolist())])
    torch.testing.assert_close(scores.unit_logprobs_N, unit.detach(), rtol=1e-12, atol=1e-12)
    assert scores.entropy_N is not None and not scores.entropy_N.requires_grad
    assert scores.unit_logprobs_N is not None and not scores.unit_logprobs_N.requires_grad
    for found, want in zip(torch.autograd.grad(scores.logprobs_N @ upstream, wanted), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_gradcheck(trained: tuple[int, ...]) -> None:
    *parts, targets = world()
    for index, part in enumerate(parts):
        part.requires_grad_(index in trained)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprobs(h, w, b, targets, temperature=0.8, scale=0.9, cap=2.0, chunk_size=3).logprobs_N,
        tuple(parts),
    )


def test_nothing_but_what_was_asked_for_and_no_gradient_where_none_is_recorded() -> None:
    hidden, weight, _, targets = world()
    with torch.no_grad():
        scores = linear_logprobs(hidden, weight, None, targets)
    assert scores.entropy_N is None and scores.unit_logprobs_N is None and not scores.logprobs_N.requires_grad


def test_a_word_that_a_bias_rules_out_adds_nothing_to_the_entropy() -> None:
    """Two words of equal logits and one of -inf: ln 2."""
    bias = torch.tensor([0.0, 0.0, -math.inf], dtype=torch.float64)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    scores = linear_logprobs(zero, torch.zeros(3, 1, dtype=torch.float64), bias, torch.tensor([0]), with_entropy=True)
    assert scores.entropy_N is not None and scores.entropy_N.item() == pytest.approx(math.log(2), rel=1e-12)


def test_no_positions_give_gradients_of_zero() -> None:
    hidden, weight, bias, targets = world(count=0)
    scores = linear_logprobs(hidden, weight, bias, targets, with_entropy=True)
    assert scores.logprobs_N.shape == (0,) and scores.entropy_N is not None and scores.entropy_N.shape == (0,)
    scores.logprobs_N.sum().backward()
    assert weight.grad is not None and not weight.grad.any() and bias.grad is not None and not bias.grad.any()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("chunk_size", "block"), [(1, 1), (64, 3), (64, 64)])
def test_bfloat16_products_keep_float32_sums(
    monkeypatch: pytest.MonkeyPatch, chunk_size: int, block: int, frozen: bool
) -> None:
    """256 positions of one token: a sum kept in bfloat16 (8 bits) would stop growing long before its end."""
    monkeypatch.setattr(projection, "CACHED_NUMBERS", 2 * block)
    hidden = torch.ones(256, 1, requires_grad=True)
    weight = torch.zeros(2, 1).requires_grad_(not frozen)
    scores = linear_logprobs(
        hidden, weight, None, torch.zeros(256, dtype=torch.long), chunk_size=chunk_size, product_dtype=torch.bfloat16
    )
    assert scores.logprobs_N.dtype == torch.float32
    torch.testing.assert_close(scores.logprobs_N, torch.full((256,), -math.log(2)))
    (scores.logprobs_N * 1.0625).sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32
    if not frozen:  # 256 times 1.0625 / 2
        assert weight.grad is not None and weight.grad.flatten().tolist() == [136.0, -136.0]


class _Tensors(TorchDispatchMode):
    """The largest number of elements an operation returned, and how many different memories that large there were."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.largest, self._size, self.memories = 0, size, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
                if value.numel() >= self._size:
                    self.memories.add(value.untyped_storage().data_ptr())
        return result


@pytest.mark.parametrize("frozen", [False, True])
def test_two_chunks_of_logits_exist_and_are_written_in_place(frozen: bool) -> None:
    hidden, weight, _, targets = world(count=40, width=3, vocabulary=50)
    weight.requires_grad_(not frozen)
    with _Tensors(4 * 50) as seen:
        scores = linear_logprobs(
            hidden, weight, None, targets, temperature=0.7, chunk_size=4, with_entropy=True, with_unit_logprobs=True
        )
        assert len(seen.memories) == 2
        scores.logprobs_N.sum().backward()
    assert seen.largest == 4 * 50
    assert len(seen.memories) <= 3


def test_logits_are_not_kept_and_a_frozen_head_computes_them_once() -> None:
    hidden, weight, _, targets = world(count=40, width=3, vocabulary=50)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    for frozen in (False, True):
        weight.requires_grad_(not frozen)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scores = linear_logprobs(hidden, weight, None, targets, chunk_size=4)
        assert max(kept) <= 50 * 3
        with _Tensors(4 * 50) as seen:
            scores.logprobs_N.sum().backward()
        assert (seen.largest < 4 * 50) == frozen


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    hidden, weight, _, targets = world()
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        linear_logprobs(hidden, weight, None, targets, temperature=temperature)


def test_a_chunk_size_of_zero_is_refused() -> None:
    hidden, weight, _, targets = world()
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        linear_logprobs(hidden, weight, None, targets, chunk_size=0)
