"""Reward models over packed rows: the outputs and gradients of padded ones, prompts once, and no silent mistake."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.reward_toys import ASPECTS, save_backbone
from tests.toy import toy_config
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from equipoise.config import BackboneConfig
from equipoise.models import packed_rewards
from equipoise.models.decoder_blocks import specs_here
from equipoise.models.packed_rewards import packed_logits, packing_fault
from equipoise.models.packing import pack
from equipoise.models.products import NotPlain
from equipoise.models.reward_inputs import EncodedRow, prompt_batches
from equipoise.models.reward_model import RewardModel, RewardModule

PAD = 0
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": None}),
}
LENGTHS = (9, 4, 7, 7, 2, 1)
SHARED = (3, 3, 3, 2, 2, 0)  # rows 0 to 2 start alike, and so do 3 and 4, which ends with its prompt


def classifier(case: str, outputs: int = 3) -> Any:
    """A random sequence classifier in float64, norms and biases too."""
    architecture, changes = CONFIGS[case]
    torch.manual_seed(2)
    config = toy_config(architecture, initializer_range=0.15, **changes)
    config.num_labels, config.pad_token_id = outputs, PAD
    model: Any = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model.double()


def rows_of() -> tuple[Tensor, Tensor]:
    """Padded ids and mask of rows with the lengths and shared beginnings above."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(1, 20, (len(LENGTHS), max(LENGTHS)), generator=generator)
    ids[1:3, :3], ids[4, :2] = ids[0, :3], ids[3, :2]
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    return ids.masked_fill(~mask, PAD), mask.long()


def with_gradients(model: Any, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and the gradients of a weighted sum of them."""
    model.zero_grad()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("shared", [0, SHARED], ids=["rows alone", "prompts shared"])
@pytest.mark.parametrize("case", CONFIGS)
def test_outputs_and_gradients_are_those_of_padded_rows(case: str, shared: int | tuple[int, ...]) -> None:
    model = classifier(case).train()
    ids, mask = rows_of()
    ours, our_gradients = with_gradients(model, packed_logits(model, specs_here(model), ids, mask, shared))
    theirs, their_gradients = with_gradients(model, model(input_ids=ids, attention_mask=mask).logits)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=0, atol=1e-11, msg=name)


def test_shared_tokens_are_computed_once() -> None:
    """30 tokens in all, of which rows 1, 2 and 4 repeat 3, 3 and 2."""
    ids, mask = rows_of()
    assert pack(ids, mask.bool(), 0).num_tokens == sum(LENGTHS) == 30
    assert pack(ids, mask.bool(), SHARED).num_tokens == 30 - 8


@pytest.mark.parametrize("case", CONFIGS)
def test_a_probe_finds_usual_decoders_fit(case: str) -> None:
    model = classifier(case).float().train()
    assert packing_fault(model) is None
    assert model.training


def test_a_probe_finds_what_packing_would_get_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier("llama").float()
    right = packed_rewards.packed_logits
    monkeypatch.setattr(packed_rewards, "packed_logits", lambda *rest: right(*rest) * 1.001)
    assert "differ by 1.0e-03" in str(packing_fault(model))
    monkeypatch.undo()
    model.score.register_forward_hook(lambda *_: None)
    assert "hooks" in str(packing_fault(model))
    assert "no layer `score`" in str(packing_fault(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("architecture", "dropout", "packs"),
    [("llama", None, True), ("qwen2", None, True), ("llama", 0.1, False), ("gpt2", None, False), ("bert", None, False)],
)
def test_who_is_packed(tmp_path: Path, architecture: str, dropout: float | None, packs: bool) -> None:
    directory = save_backbone(tmp_path / architecture, architecture)
    model = RewardModel.from_backbone(BackboneConfig(model=str(directory), dropout=dropout), ASPECTS, seed=1)
    assert model.module.packs is packs


def texts() -> tuple[list[str], list[str]]:
    """Five prompts, some with several responses, in a mixed order; a response of no tokens among them."""
    draw = random.Random(3)
    prompts = [f"{'cat ' * n}dog" for n in (1, 4, 9, 2, 6)] * 4
    responses = [
        " ".join(draw.choice(["eel", "fox", "good", "kind"]) for _ in range(draw.randint(0, 30))) for _ in prompts
    ]
    order = draw.sample(range(len(prompts)), len(prompts))
    return [prompts[i] for i in order], [responses[i] for i in order]


@pytest.mark.parametrize("member_seeds", [(), (1, 2, 3)], ids=["one head", "members"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_are_those_of_padded_rows_in_the_order_given(
    tmp_path: Path, batch_size: int, member_seeds: tuple[int, ...]
) -> None:
    directory = save_backbone(tmp_path / "llama", "llama")
    model = RewardModel.from_backbone(BackboneConfig(model=str(directory)), ASPECTS, seed=1, member_seeds=member_seeds)
    stds = torch.tensor([aspect.std for aspect in ASPECTS])
    packed = model.score(*texts(), batch_size=batch_size)
    before = model.scored_flops
    model.module.packs = False
    padded = model.score(*texts(), batch_size=batch_size)
    assert ((packed - padded) / stds).abs().max() < 1e-5
    assert (packed.std(dim=0) / stds > 0.01).all()
    assert batch_size == 1 or before < 0.8 * (model.scored_flops - before)


def test_flops_of_packed_rows_worked(tmp_path: Path) -> None:
    """Rows of 8 and 10 tokens whose first 6 are the same, and one of 9: 27 - 6 tokens are multiplied with the weights;
    pairs of tokens: 64 + 100 - 36 + 81."""
    directory = save_backbone(tmp_path / "llama", "llama")
    model = RewardModel.from_backbone(BackboneConfig(model=str(directory)), ASPECTS, seed=1)
    rows = [row_of(6, 8, 1), row_of(0, 9, 40), row_of(6, 10, 1)]
    model.score_rows(rows)
    weights, per_pair = model._flop_counts
    assert model.scored_flops == 2 * weights * 21 + per_pair * 209


def row_of(shared: int, length: int, first: int) -> EncodedRow:
    """Consecutive ids from `first` on, those after the shared ones from `length` on."""
    ids = [*range(first, first + shared), *range(50 + length, 50 + 2 * length - shared)]
    return EncodedRow(ids, [0] * length, shared)


def test_prompt_batches_worked() -> None:
    rows = [row_of(6, 8, 1), row_of(6, 9, 30), row_of(6, 10, 1)]
    assert prompt_batches(rows, 20) == [[0, 2], [1]]
    assert prompt_batches(rows, 21) == [[0, 2, 1]]
    assert prompt_batches(rows, 1) == [[0], [2], [1]]
    assert prompt_batches([], 10) == []


@pytest.mark.parametrize("tokens", [1, 30, 90, 10**6])
def test_every_row_is_in_one_batch_within_the_budget(tokens: int) -> None:
    draw = random.Random(7)
    rows = [
        row_of(shared, shared + draw.randint(1, 20), draw.choice([1, 25])) for shared in draw.choices([0, 3, 7], k=60)
    ]
    batches = prompt_batches(rows, tokens)
    assert sorted(row for batch in batches for row in batch) == list(range(len(rows)))
    for batch in batches:
        prompts = {tuple(rows[i].ids[: rows[i].shared]) for i in batch}
        held = sum(len(rows[i].ids) - rows[i].shared for i in batch) + sum(len(prompt) for prompt in prompts)
        assert len(batch) == 1 or held <= tokens


def test_a_model_that_changed_is_padded_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = save_backbone(tmp_path / "llama", "llama")
    model = RewardModel.from_backbone(BackboneConfig(model=str(directory)), ASPECTS, seed=1)
    expected = model.score(*texts())
    model.module.model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(NotPlain):
        specs_here(model.module.model)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(model.score(*texts()), expected, rtol=1e-4, atol=1e-4)
    assert [record for record in caplog.records if "padded from now on" in record.message]
    assert model.module.packs is False


@pytest.mark.parametrize("window", [4, 9])
def test_rows_beyond_a_window_are_padded(tmp_path: Path, window: int) -> None:
    """Rows of up to 9 tokens: packed where they fit into the window, else through the model's own masks."""
    ids, mask = rows_of()
    config = toy_config("mistral", initializer_range=0.3, sliding_window=window)
    config.num_labels, config.pad_token_id = len(ASPECTS), PAD
    torch.manual_seed(0)
    model: Any = AutoModelForSequenceClassification.from_config(config).eval()
    module = RewardModule(model, "float32")
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(module.logits(SHARED, input_ids=ids, attention_mask=mask), expected)
    assert (module.blocks_for(max(LENGTHS)) is None) == (window < max(LENGTHS))


def test_a_row_that_ends_with_the_pad_token_is_read_where_transformers_reads_it() -> None:
    model = classifier("llama").eval()
    ids, mask = rows_of()
    ids[2, 5:7] = PAD  # the response's own words
    with torch.no_grad():
        ours = packed_logits(model, specs_here(model), ids, mask, SHARED)
        torch.testing.assert_close(ours.float(), model(input_ids=ids, attention_mask=mask).logits.float())
