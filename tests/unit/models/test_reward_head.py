"""The last linear layer: found by what it does, scaled exactly, and models without one refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from equipoise.errors import ConfigError
from equipoise.models.reward_head import check_padding, find_head, folded_head, usable_positions

PROBE = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}


class Classifier(nn.Module):
    """Mean of masked embeddings, then `classifier`; `squash` and `last_column` break what a reward model needs."""

    base_model_prefix = "base"

    def __init__(self, *, squash: bool = False, last_column: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Embedding(8, 4)
        self.dense = nn.Linear(4, 2)  # as many outputs as labels, and not the last
        self.widen = nn.Linear(2, 4)
        self.classifier = nn.Linear(4, 2)
        self.dropout = nn.Dropout(0.5)
        self.config = SimpleNamespace(num_labels=2)
        self.device = torch.device("cpu")
        self.squash, self.last_column = squash, last_column

    def forward(self, input_ids, attention_mask):
        hidden = self.base(input_ids)
        weights = attention_mask[..., None].float()
        pooled = hidden[:, -1] if self.last_column else (hidden * weights).sum(1) / weights.sum(1)
        logits = self.classifier(self.dropout(torch.tanh(self.widen(self.dense(pooled)))))
        return SimpleNamespace(logits=torch.tanh(logits) if self.squash else logits)


def test_head_is_the_layer_the_outputs_are_proportional_to():
    model = Classifier()
    before = model.classifier.weight.clone()
    name, head = find_head(model, PROBE, "here")
    assert (name, head) == ("classifier", model.classifier)
    assert torch.equal(head.weight, before)
    assert model.training


def test_model_that_squashes_its_outputs_is_refused():
    with pytest.raises(ConfigError, match="here: unsupported backbone for a reward model: Classifier has no last"):
        find_head(Classifier(squash=True), PROBE, "here")


def test_model_that_pools_at_the_last_column_is_refused():
    check_padding(Classifier(), PROBE, 0, "here")
    with pytest.raises(ConfigError, match=r"here: unsupported backbone .* change with right padding"):
        check_padding(Classifier(last_column=True), PROBE, 0, "here")


def test_folding_with_a_bias_worked():
    """W = 2, b = 1, s = 3, m = 10: weight 6, bias 3 * 1 + 10 = 13, nothing left over; x = 1 gives 19 = 3 * 3 + 10."""
    head = nn.Linear(1, 1)
    nn.init.constant_(head.weight, 2.0)
    nn.init.constant_(head.bias, 1.0)
    tensors, offset = folded_head("head", head, [3.0], [10.0])
    assert {name: tensor.flatten().tolist() for name, tensor in tensors.items()} == {
        "head.weight": [6.0],
        "head.bias": [13.0],
    }
    assert offset == [0.0]


def test_folding_without_a_bias_leaves_the_offset():
    head = nn.Linear(1, 2, bias=False)
    nn.init.constant_(head.weight, 2.0)
    tensors, offset = folded_head("head", head, [3.0, 0.5], [10.0, -1.0])
    assert list(tensors) == ["head.weight"]
    assert tensors["head.weight"].flatten().tolist() == [6.0, 1.0]
    assert offset == [10.0, -1.0]


@pytest.mark.parametrize("bias", [True, False])
def test_folded_outputs_equal_scaled_outputs(bias: bool):
    torch.manual_seed(0)
    head = nn.Linear(5, 3, bias=bias)
    scale, offset = [0.1, 7.0, 300.0], [3.0, -40.0, 0.5]
    tensors, rest = folded_head("h", head, scale, offset)
    folded = nn.Linear(5, 3, bias=bias)
    folded.load_state_dict({name.removeprefix("h."): tensor for name, tensor in tensors.items()})
    inputs = torch.randn(10, 5)
    expected = head(inputs) * torch.tensor(scale) + torch.tensor(offset)
    difference = folded(inputs) + torch.tensor(rest) - expected
    assert (difference / torch.tensor(scale)).abs().max() < 1e-5


def test_positions_are_limited_by_config_and_by_the_table():
    table = nn.ModuleDict({"position_embeddings": nn.Embedding(20, 2, padding_idx=1)})

    def config(limit):
        return SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=limit))

    assert usable_positions(table, config(20)) == 18  # RoBERTa's table: 0 and 1 are not for tokens
    assert usable_positions(table, config(10)) == 10
    assert usable_positions(nn.Linear(1, 1), config(None)) is None
