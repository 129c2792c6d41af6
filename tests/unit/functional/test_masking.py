import pytest
import torch

from equipoise.functional.masking import (
    at_least_float32,
    divide_by_count,
    length_mask,
    masked_fill_zero,
    masked_mean,
    masked_sum,
    sequence_lengths,
)

VALUES = torch.tensor([[1.0, 2.0, float("nan")], [4.0, float("inf"), 7.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [True, False, True]])


def test_masked_sum_by_hand():
    """1 + 2 = 3; 4 + 7 = 11; together 14. Down the columns: 1 + 4 = 5, 2, 7."""
    assert masked_sum(VALUES, MASK).item() == 14
    assert masked_sum(VALUES, MASK, dim=1).tolist() == [3, 11]
    assert masked_sum(VALUES, MASK, dim=0).tolist() == [5, 2, 7]


def test_masked_mean_by_hand():
    """(1 + 2) / 2 = 1.5; (4 + 7) / 2 = 5.5; together 14 / 4 = 3.5. Down the columns: 2.5, 2, 7."""
    assert masked_mean(VALUES, MASK).item() == 3.5
    assert masked_mean(VALUES, MASK, dim=1).tolist() == [1.5, 5.5]
    assert masked_mean(VALUES, MASK, dim=0).tolist() == [2.5, 2, 7]


def test_masks_of_numbers_work_like_booleans():
    assert masked_sum(VALUES, MASK.long()).item() == 14
    assert masked_mean(VALUES, MASK.double()).item() == 3.5
    assert sequence_lengths(MASK.double() * 3).tolist() == [2, 2]


def test_masked_garbage_leaves_gradient_exact():
    """The mean of 1, 2, 4, 7 has derivative 1/4 at each of them and 0, not NaN, elsewhere."""
    values = VALUES.clone().requires_grad_()
    masked_mean(values, MASK).backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0.25, 0.25, 0], [0.25, 0, 0.25]]


def test_an_empty_mask_gives_zero_with_gradient_zero():
    values = VALUES.clone().requires_grad_()
    nothing = torch.zeros_like(MASK)
    assert masked_sum(values, nothing).item() == 0
    mean = masked_mean(values, nothing)
    mean.backward()
    assert mean.item() == 0
    assert values.grad is not None
    assert values.grad.eq(0).all()
    assert masked_mean(VALUES, nothing, dim=1).tolist() == [0, 0]


def test_masked_fill_zero_broadcasts_and_keeps_the_dtype():
    filled = masked_fill_zero(torch.ones(2, 3, dtype=torch.float16), torch.tensor([1, 0, 1]))
    assert filled.dtype == torch.float16
    assert filled.tolist() == [[1, 0, 1], [1, 0, 1]]


def test_lengths_and_masks_are_inverses():
    """Lengths 0, 2 and 3 of three tokens."""
    lengths = torch.tensor([0, 2, 3])
    mask = length_mask(lengths, 3)
    assert mask.tolist() == [[False, False, False], [True, True, False], [True, True, True]]
    assert sequence_lengths(mask).tolist() == [0, 2, 3]


def test_divide_by_count():
    """6 / 4 = 1.5; a count of 0 leaves the (empty) sum alone; half a sequence, of two ranks, is a count."""
    total = torch.tensor(6.0, dtype=torch.float64)
    assert divide_by_count(total, 4).item() == 1.5
    assert divide_by_count(total, torch.tensor(4)).item() == 1.5
    assert divide_by_count(total, 0.5).item() == 12
    empty = torch.tensor(0.0, requires_grad=True)
    quotient = divide_by_count(empty, 0)
    quotient.backward()
    assert quotient.item() == 0
    assert empty.grad is not None
    assert empty.grad.isfinite()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int64, torch.float32),
    ],
)
def test_at_least_float32(given, wanted):
    assert at_least_float32(torch.ones(1, dtype=given)).dtype == wanted
