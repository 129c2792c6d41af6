"""Batches of rows of like length: nothing lost, little padding, and scores that do not depend on them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tests.reward_toys import ASPECTS, save_backbone

from equipoise.config import BackboneConfig
from equipoise.models.reward_inputs import FEW_TOKENS, length_batches
from equipoise.models.reward_model import RewardModel

LONG = 1_000  # tokens of the longest row here


def padded_share(lengths: list[int], batches: list[list[int]]) -> float:
    """Padding's part of everything that these batches put through the network."""
    executed = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    return 1 - sum(lengths) / executed


def drawn(seed: int, count: int = 200) -> list[int]:
    """Lengths from 1 to 1,000, short ones as often as long ones."""
    draw = random.Random(seed)
    return [int(LONG ** draw.random()) for _ in range(count)]


def test_worked_example() -> None:
    """800 + 700 fit 1,600 tokens padded; 500 is under 3/4 of 800. [4, 0] hold 2 * 30 tokens, few enough to mix."""
    assert length_batches([20, 800, 700, 500, 30], 1_600) == [[1, 2], [3], [4, 0]]
    assert length_batches([], 100) == []
    assert length_batches([7], 3) == [[0]]  # a row that is too long for any batch has one of its own


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tokens", [1, 300, 4_000, 10**9])
def test_every_row_once_within_the_budget_and_under_a_quarter_of_padding(seed: int, tokens: int) -> None:
    lengths = drawn(seed)
    batches = length_batches(lengths, tokens)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        longest, shortest = max(lengths[row] for row in batch), min(lengths[row] for row in batch)
        assert lengths[batch[0]] == longest
        assert len(batch) == 1 or len(batch) * longest <= tokens
        assert len(batch) * longest <= FEW_TOKENS or shortest >= 0.75 * longest


def test_padding_beside_batches_of_a_fixed_number_of_rows() -> None:
    """The same rows, 32 at once: in the order they came in, sorted, and as they are batched here."""
    lengths = drawn(0)
    longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])

    def by_32(order: list[int]) -> list[list[int]]:
        return [order[start : start + 32] for start in range(0, len(order), 32)]

    shares = [
        padded_share(lengths, batches)
        for batches in (
            by_32(list(range(len(lengths)))),
            by_32(longest_first),
            length_batches(lengths, 32 * max(lengths)),
        )
    ]
    assert shares[0] > 0.7 and 0.2 < shares[1] < 0.5 and shares[2] < 0.15
    assert len(length_batches(lengths, 32 * max(lengths))) < 3 * len(by_32(longest_first))


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["bert", "llama"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> RewardModel:
    directory: Path = save_backbone(tmp_path / request.param, request.param)
    return RewardModel.from_backbone(BackboneConfig(model=str(directory)), ASPECTS, None, seed=1)


def texts(count: int = 24) -> tuple[list[str], list[str]]:
    draw = random.Random(3)
    words = ["cat", "dog", "eel", "fox", "good", "kind"]

    def some(most: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(0, most)))

    return [some(12) for _ in range(count)], [some(40) or "no" for _ in range(count)]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 32])
def test_scores_do_not_depend_on_order_or_batch_size(model: RewardModel, batch_size: int) -> None:
    prompts, responses = texts()
    stds = torch.tensor([aspect.std for aspect in ASPECTS])
    alone = torch.cat([model.score([p], [r]) for p, r in zip(prompts, responses, strict=True)])
    order = random.Random(5).sample(range(len(prompts)), len(prompts))
    mixed = model.score([prompts[i] for i in order], [responses[i] for i in order], batch_size=batch_size)
    assert ((mixed - alone[order]) / stds).abs().max() < 1e-5
    assert (alone.std(dim=0) / stds > 0.01).all()  # rows that differ, so that a wrong order shows


def test_flops_of_scoring_are_those_of_what_the_network_was_given(
    model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the weights for each column of each row, padding included, and the pairs of columns."""
    model.module.packs = False
    prompts, responses = texts()
    shapes: list[tuple[int, int]] = []
    inner = model.module.logits

    def watched(shared: list[int], **batch: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(batch["input_ids"].shape))  # type: ignore[arg-type]
        return inner(shared, **batch)

    monkeypatch.setattr(model.module, "logits", watched)
    before = model.scored_flops
    model.score(prompts, responses, batch_size=4)
    weights, per_pair = model._flop_counts
    expected = sum(rows * (2 * weights * width + per_pair * width * width) for rows, width in shapes)
    assert model.scored_flops - before == pytest.approx(expected)
    needed = model.forward_flops(model.inputs.rows(prompts, responses))
    assert 1.0 < expected / needed < 1.4 and len(shapes) > 1
