"""Padding by length, and batches of similar length."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.data import length_buckets, pad_left, pad_right


def test_pad_right():
    ids, mask = pad_right([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)


def test_pad_left():
    ids, mask = pad_left([[5, 6, 7], [8]], 9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]


def test_the_mask_does_not_look_at_the_pad_id():
    _, mask = pad_right([[5, 0], [0, 0, 0]], 0)
    assert mask.tolist() == [[True, True, False], [True, True, True]]


@pytest.mark.parametrize("pad", [pad_left, pad_right])
def test_empty_rows(pad):
    assert [tuple(one.shape) for one in pad([], 0)] == [(0, 0), (0, 0)]
    ids, mask = pad([[], [3]], 1)
    assert ids.tolist() == [[1], [3]]
    assert mask.tolist() == [[False], [True]]


def test_length_buckets_by_rows_and_by_tokens():
    assert length_buckets([5, 1, 3, 1], batch_size=2) == [[1, 3], [2, 0]]
    # sorted 1, 1, 3, 5: two rows of 1 take 2 tokens; with the 3 they would take 9 of 6
    assert length_buckets([5, 1, 3, 1], max_tokens=6) == [[1, 3], [2], [0]]
    assert length_buckets([5, 1, 3, 1], max_tokens=10, batch_size=3) == [[1, 3, 2], [0]]
    assert length_buckets([9, 9], max_tokens=3) == [[0], [1]]
    assert length_buckets([], batch_size=2) == []


@given(
    lengths=st.lists(st.integers(0, 50), max_size=60),
    batch_size=st.none() | st.integers(1, 9),
    max_tokens=st.integers(1, 200),
)
def test_every_row_once_within_the_limits(lengths, batch_size, max_tokens):
    batches = length_buckets(lengths, batch_size=batch_size, max_tokens=max_tokens)
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths)
    for batch in batches:
        assert batch_size is None or len(batch) <= batch_size
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= max_tokens


def test_limits_must_be_given_and_positive():
    with pytest.raises(ValueError, match="needs batch_size or max_tokens"):
        length_buckets([1])
    with pytest.raises(ValueError, match="must be positive"):
        length_buckets([1], batch_size=0)
