import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from equipoise.functional.logprobs import chunked_logprobs, entropy, selected_logprobs


def world(num_tokens=7, width=3, vocabulary=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(vocabulary, (num_tokens,), generator=generator)
    return hidden, weight, targets


def test_selected_logprobs_by_hand():
    """softmax(0, ln 3) = (1/4, 3/4); at temperature 2 the odds are 1 : sqrt 3."""
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]], dtype=torch.float64)
    targets = torch.tensor([1, 0])
    assert selected_logprobs(logits, targets).tolist() == pytest.approx([math.log(3 / 4), math.log(1 / 4)], rel=1e-12)
    root = math.sqrt(3)
    assert selected_logprobs(logits, targets, temperature=2).tolist() == pytest.approx(
        [math.log(root / (1 + root)), math.log(1 / (1 + root))], rel=1e-12
    )


def test_selected_logprobs_of_any_leading_shape_match_log_softmax():
    logits = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([[0, 1, 2], [3, 0, 1]])
    dense = torch.log_softmax(logits / 0.7, dim=-1)
    wanted = torch.stack([dense[i, j, targets[i, j]] for i in range(2) for j in range(3)]).view(2, 3)
    assert torch.allclose(selected_logprobs(logits, targets, temperature=0.7), wanted, rtol=1e-12)


def test_half_precision_logits_are_normalised_in_float32():
    logits = torch.tensor([[3.0, 1.0, 0.5]], dtype=torch.bfloat16)
    found = selected_logprobs(logits, torch.tensor([2]))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(torch.log_softmax(logits.double(), -1)[0, 2].item(), rel=1e-6)


def test_entropy_by_hand():
    """Two even options: ln 2. Odds 1 : 3: ln 4 - 3/4 ln 3. At temperature 2, odds 1 : sqrt 3. A certain one: 0."""
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)], [0.0, -math.inf]], dtype=torch.float64)
    assert entropy(logits).tolist() == pytest.approx([math.log(2), math.log(4) - 0.75 * math.log(3), 0], rel=1e-12)
    p = 1 / (1 + math.sqrt(3))
    wanted = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert entropy(logits[1:2], temperature=2).item() == pytest.approx(wanted, rel=1e-12)
    assert torch.equal(entropy(logits.view(1, 3, 2)), entropy(logits)[None])


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 100])
def test_chunks_equal_the_whole_with_gradient(chunk_size):
    hidden, weight, targets = world()
    whole = torch.log_softmax(hidden @ weight.T / 1.3, -1).gather(1, targets[:, None])[:, 0]
    wanted = torch.autograd.grad(whole.square().sum(), (hidden, weight))
    found, entropies = chunked_logprobs(
        hidden, lambda h: h @ weight.T, targets, temperature=1.3, chunk_size=chunk_size, with_entropy=True
    )
    assert torch.allclose(found, whole, rtol=1e-10)
    for have, want in zip(torch.autograd.grad(found.square().sum(), (hidden, weight)), wanted, strict=True):
        assert torch.allclose(have, want, rtol=1e-9)
    assert entropies is not None
    assert not entropies.requires_grad
    distribution = torch.distributions.Categorical(logits=(hidden @ weight.T / 1.3).detach())
    assert torch.allclose(entropies, distribution.entropy(), rtol=1e-9)


def test_without_gradient_and_without_entropy():
    hidden, weight, targets = world()
    with torch.no_grad():
        found, entropies = chunked_logprobs(hidden, lambda h: h @ weight.T, targets, chunk_size=3)
    assert entropies is None
    assert not found.requires_grad
    assert torch.allclose(found, torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0].detach())


def test_transform_comes_before_the_temperature():
    """A soft cap 2 tanh(x / 2) belongs to the model; the temperature divides what it returns."""
    hidden, weight, targets = world()

    def cap(logits):
        return 2 * torch.tanh(logits / 2)

    found, _ = chunked_logprobs(hidden, lambda h: h @ weight.T, targets, temperature=0.5, transform=cap)
    wanted = torch.log_softmax(cap(hidden @ weight.T) / 0.5, -1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(found, wanted, rtol=1e-12)


def test_no_tokens_give_an_empty_result_on_the_graph():
    hidden, weight, targets = world(num_tokens=0)
    found, entropies = chunked_logprobs(hidden, lambda h: h @ weight.T, targets, with_entropy=True)
    assert found.shape == (0,)
    assert entropies is not None
    assert entropies.shape == (0,)
    found.sum().backward()
    assert weight.grad is not None
    assert weight.grad.eq(0).all()


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(item, torch.Tensor):
                self.largest = max(self.largest, item.numel())
        return out


def test_no_more_than_a_chunk_of_logits_exists_forward_or_backward():
    hidden, weight, targets = world(num_tokens=40, width=3, vocabulary=50)
    with LargestTensor() as mode:
        found, _ = chunked_logprobs(hidden, lambda h: h @ weight.T, targets, chunk_size=4, with_entropy=True)
        found.sum().backward()
    assert mode.largest == 4 * 50


def test_logits_are_not_kept_for_the_backward_pass():
    hidden, weight, targets = world(num_tokens=40, width=3, vocabulary=50)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        chunked_logprobs(hidden, lambda h: h @ weight.T, targets, chunk_size=4)
    assert max(kept, default=0) < 4 * 50


def test_the_default_chunk_is_512_rows():
    hidden, weight, targets = world(num_tokens=600)
    sizes = []

    def head(rows):
        sizes.append(len(rows))
        return rows @ weight.T

    with torch.no_grad():
        chunked_logprobs(hidden, head, targets)
        chunked_logprobs(hidden[:1], head, targets[:1], chunk_size=1)
    assert sizes == [512, 88, 1]


def test_bfloat16_hidden_states_give_float32():
    hidden, weight, targets = world(dtype=torch.float32)
    found, _ = chunked_logprobs(hidden.bfloat16(), lambda h: h @ weight.bfloat16().T, targets)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    hidden, weight, targets = world()
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        chunked_logprobs(hidden, lambda h: h @ weight.T, targets, temperature=temperature)
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        entropy(hidden, temperature=temperature)


def test_a_chunk_size_of_zero_is_refused():
    hidden, weight, targets = world()
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        chunked_logprobs(hidden, lambda h: h @ weight.T, targets, chunk_size=0)
