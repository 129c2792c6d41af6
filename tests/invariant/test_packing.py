"""Rows packed without padding, with their prompts shared, score as the padded rows do: values and gradients."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from tests.toy import toy_config, toy_rollout
from torch import Tensor
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaForCausalLM, Qwen2MoeConfig
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig

from equipoise.models import packed_attention, packing
from equipoise.models.loading import enable_checkpointing, quiet_peft, without_dropout
from equipoise.models.packing import filled_up, pack
from equipoise.models.policy_module import PolicyModule
from equipoise.models.shared_attention import attend_shared
from equipoise.rollout.logprobs import score_in_chunks, score_tokens
from equipoise.rollout.types import Rollout

pytestmark = pytest.mark.usefixtures("exact_norms")

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
CONFIGS = {
    "llama": lambda: toy_config("llama"),
    "llama tied": lambda: toy_config("llama", tie_word_embeddings=True),
    "qwen2": lambda: toy_config("qwen2", tie_word_embeddings=True),
    "qwen3": lambda: toy_config("qwen3"),
    "gpt2": lambda: toy_config("gpt2"),
    "gemma": lambda: GemmaConfig(head_dim=8, **SIZES),
    "gemma3": lambda: Gemma3TextConfig(head_dim=8, sliding_window=64, query_pre_attn_scalar=8, **SIZES),
    "mistral": lambda: toy_config("mistral", sliding_window=64),
    "cohere": lambda: toy_config("cohere"),
    "granite": lambda: toy_config("granite"),
    "mixtral": lambda: toy_config("mixtral"),
    "qwen2_moe": lambda: Qwen2MoeConfig(**EXPERTS, **SIZES),
    "qwen3_moe": lambda: toy_config("qwen3_moe"),
}
SINGLE = {"mixtral", "qwen2_moe", "qwen3_moe"}  # grouped products of experts do not exist in float64
PADDED = {
    "gemma2": lambda: toy_config("gemma2", attn_logit_softcapping=2.0),  # has no attention but the eager one
    "mamba": lambda: toy_config("mamba", num_hidden_layers=1),
}


def make(config: Any, *, double: bool = True, lora: bool = False, value_head: bool = False, **options: Any) -> Any:
    config.initializer_range = 0.3  # distributions far from uniform
    without_dropout(config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, **options)
    model = model.double() if double else model
    if lora:
        settings = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        with quiet_peft():
            model = peft.get_peft_model(model, settings)
    module = PolicyModule(model, value_head=value_head)
    if module.value_head is not None:
        torch.nn.init.normal_(module.value_head.linear.weight)
        module.value_head.to(torch.float64 if double else torch.float32)
    module.train()
    return module


def grouped_rollout(temperature: float = 0.7) -> Rollout:
    """Groups of 3, 1, 2 and 2 rows in mixed order; a prompt that two groups share, one completion without a token."""
    rollout = toy_rollout([5, 1, 5, 9, 5, 3, 9, 3], [4, 7, 1, 6, 9, 0, 20, 3], temperature=temperature, extra_padding=2)
    ids, mask = rollout.prompt_ids_BS.clone(), rollout.prompt_mask_BS
    for row, first in ((2, 0), (4, 0), (6, 3), (7, 5)):
        ids[row] = ids[first]
    assert torch.equal(mask[6], mask[3]) and torch.equal(mask[7], mask[5])
    return replace(rollout, prompt_ids_BS=ids, group_ids_B=torch.tensor([0, 1, 0, 2, 0, 3, 2, 3]))


def results(module: PolicyModule, packed: bool, rollout: Rollout, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """Scores and the gradients of a weighted sum of everything that carries one."""
    module.packed = packed
    module.zero_grad()
    scores = score_tokens(module, rollout, with_entropy=True, with_unit_logprobs=True, **options)
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(scores.logprobs_BT.shape, generator=generator, dtype=torch.float64)
    total = (scores.logprobs_BT * weights).sum()
    if scores.values_BT is not None:
        total = total + (scores.values_BT.square() * weights).sum()
    total.backward()
    return scores, {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


class Widths:
    """The shapes of the ids that a backbone was given."""

    def __init__(self, module: PolicyModule) -> None:
        self.seen: list[tuple[int, ...]] = []
        module._backbone.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _: Any, __: Any, kwargs: dict[str, Any]) -> None:
        self.seen.append(tuple(kwargs["input_ids"].shape))


def compare(module: PolicyModule, rollout: Rollout, tolerance: float, **options: Any) -> None:
    widths = Widths(module)
    ours, our_gradients = results(module, True, rollout, **options)
    theirs, their_gradients = results(module, False, rollout, **options)
    assert widths.seen[0][0] == 1 and widths.seen[1][0] == len(rollout), widths.seen
    for name, found, expected in zip(ours._fields, ours, theirs, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    assert our_gradients.keys() == their_gradients.keys() and our_gradients
    scale = max(float(gradient.abs().max()) for gradient in their_gradients.values())
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(
            our_gradients[name], gradient, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("case", CONFIGS)
def test_packed_equals_padded_in_float32(case: str, lora: bool) -> None:
    if lora and case in SINGLE:
        pytest.skip("adapters on experts are another matter")
    module = make(CONFIGS[case](), double=False, lora=lora)
    compare(module, grouped_rollout(), 1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("case", [case for case in CONFIGS if case not in SINGLE])
def test_packed_equals_padded_in_float64(case: str, lora: bool) -> None:
    module = make(CONFIGS[case](), lora=lora, value_head=True)
    # Their norms and rotations round to float32 whatever the model's dtype; GPT-2 has neither.
    compare(module, grouped_rollout(), 1e-10 if case == "gpt2" else 1e-6, with_values=True)


@pytest.mark.parametrize("case", PADDED)
def test_an_architecture_that_cannot_be_packed_is_scored_padded(case: str) -> None:
    module, rollout = make(PADDED[case](), double=False), grouped_rollout()
    widths = Widths(module)
    with torch.no_grad():
        score_tokens(module, rollout)
    assert widths.seen == [(8, 11 + 22)] and module._longest_packed == 0


def test_eager_attention_and_attention_chosen_later_are_left_alone() -> None:
    eager = make(toy_config("llama"), attn_implementation="eager")
    assert eager.causal.config._attn_implementation == "eager" and eager._longest_packed == 0
    module, rollout = make(toy_config("llama")), grouped_rollout()
    with torch.no_grad():
        ours = score_tokens(module, rollout).logprobs_BT
        module.causal.set_attn_implementation("sdpa")
        widths = Widths(module)
        theirs = score_tokens(module, rollout).logprobs_BT
    assert widths.seen[0][0] == 8
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_rows_longer_than_a_window_stay_padded() -> None:
    """A window of 10 lets 5 + 4 tokens be packed, not 5 + 9."""
    module, rollout = make(toy_config("mistral", sliding_window=10)), grouped_rollout()
    widths = Widths(module)
    with torch.no_grad():
        short, long = score_tokens(module, rollout[[0, 2]]), score_tokens(module, rollout[[0, 4]])
        module.packed = False
        torch.testing.assert_close(short, score_tokens(module, rollout[[0, 2]]), rtol=0, atol=1e-6)
        torch.testing.assert_close(long, score_tokens(module, rollout[[0, 4]]), rtol=0, atol=0)
    assert [shape[0] for shape in widths.seen] == [1, 2, 2, 2]


class _LooksBack(LlamaForCausalLM):
    """A model in which a token sees its neighbour in the row, whatever attention says."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.norm.register_forward_hook(lambda _, __, states: states + 0.1 * states.roll(1, dims=1))


def test_a_model_whose_tokens_meet_outside_attention_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING):
        module = PolicyModule(_LooksBack(toy_config("llama", initializer_range=0.3)))
    assert module._longest_packed == 0 and module.causal.config._attn_implementation == "sdpa"
    assert ["not packed" in record.message for record in caplog.records] == [True]


def test_gradient_checkpointing_recomputes_packed_attention() -> None:
    """Through the model's own layers; test_decoder_blocks.py has the hand-written ones."""
    module, rollout = make(toy_config("llama")), grouped_rollout()
    module._own_blocks = False
    other = copy.deepcopy(module)
    enable_checkpointing(other.model)
    calls: list[bool] = []
    other.causal.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _, __, kwargs: calls.append(kwargs["packing"] is not None), with_kwargs=True
    )
    _, plain = results(module, True, rollout)
    _, checkpointed = results(other, True, rollout)
    assert calls == [True, True], "the layer was not computed again"
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_an_empty_prompt_is_scored_as_before() -> None:
    """What stands before its first token is padding: no packed state predicts it."""
    module = make(toy_config("llama"))
    rollout = grouped_rollout()
    empty = replace(rollout, prompt_mask_BS=torch.zeros_like(rollout.prompt_mask_BS))
    with torch.no_grad():
        ours = score_tokens(module, empty).logprobs_BT
        module.packed = False
        assert torch.equal(ours, score_tokens(module, empty).logprobs_BT)


def test_hidden_states_of_real_tokens_are_those_of_padded_rows() -> None:
    module, rollout = make(toy_config("llama")), grouped_rollout()
    ids = torch.cat([rollout.prompt_ids_BS, rollout.completion_ids_BT], dim=1)
    mask = torch.cat([rollout.prompt_mask_BS, rollout.completion_mask_BT], dim=1)
    widths = Widths(module)
    with torch.no_grad():
        ours = module.hidden_states(ids, mask, first=rollout.prompt_ids_BS.shape[1])
        torch.testing.assert_close(ours[mask], module.hidden_states(ids, mask)[mask], rtol=0, atol=1e-6)
    assert [shape[0] for shape in widths.seen] == [1, 8]


def test_the_example_of_the_module() -> None:
    """The docstring's three rows: tokens, positions, slots, and who sees whom."""
    ids = torch.tensor([[10, 11, 12, 13], [10, 11, 14, 0], [0, 15, 16, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 0]], dtype=torch.bool)
    packed = pack(ids, mask, 2)
    assert packed.ids_1N.tolist() == [[10, 11, 12, 13, 14, 15, 16]]
    assert packed.position_ids_1N.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert packed.ids_1N[0][packed.token_BL][mask].tolist() == ids[mask].tolist()
    assert packed.source_M.tolist() == [5, 6, 0, 1, 2, 3, 4, 0]
    assert packed.filled_M1.flatten().tolist() == [1, 1, 1, 1, 1, 1, 1, 0]
    assert packed.slot_N.tolist() == [2, 3, 4, 5, 6, 0, 1]
    (branches,) = packed.branches
    assert branches.trunk_R.tolist() == [0, 0]
    assert torch.isfinite(branches.bias_R1TK[0, 0]).tolist() == [[True, True, True, False], [True] * 4]


def test_like_lengths_share_a_rectangle() -> None:
    packed = pack(torch.ones(3, 1000, dtype=torch.long), torch.arange(1000) < torch.tensor([[1000], [10], [900]]), 0)
    assert [(part.rows, part.width) for part in packed.alone] == [(2, 1000), (1, 10)]


def test_chunks_go_by_tokens_and_results_come_back_in_order() -> None:
    module, rollout = make(toy_config("llama")), grouped_rollout()
    with torch.no_grad():
        whole = score_tokens(module, rollout, with_entropy=True)
    widths = Widths(module)
    for rows in (1, 2, 3, 8, 100):
        parts = score_in_chunks(module, rollout, rows, with_entropy=True)
        torch.testing.assert_close(parts.logprobs_BT, whole.logprobs_BT, rtol=0, atol=1e-6)
        torch.testing.assert_close(parts.entropy_BT, whole.entropy_BT, rtol=0, atol=1e-6)
        assert parts.unit_logprobs_BT is None
    assert max(tokens for _, tokens in widths.seen[:-2]) <= 3 * (11 + 22)
    # Four padded rows of 33 columns would hold 132 tokens; all 8 rows have 18 of prompts and 50 of completions.
    assert widths.seen[-2:] == [(1, 68), (1, 68)]


@pytest.mark.parametrize("full", [False, True], ids=["with empty slots", "without"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_filler_changes_no_value_and_no_gradient(monkeypatch: pytest.MonkeyPatch, name: str, full: bool) -> None:
    """The same rows with and without filler, by hand-written blocks (llama) and by the model's own layers."""
    module, rollout = make(toy_config(name)), grouped_rollout()
    assert module._own_blocks is (name == "llama")
    if full:  # two completions of one prompt, equally long: no rectangle has an empty slot
        rollout = toy_rollout([5, 5], [6, 6])
        rollout.prompt_ids_BS[1] = rollout.prompt_ids_BS[0]
    lengths, before = [], results(module, True, rollout)
    monkeypatch.setattr(packing, "filled_up", lambda count: lengths.append(count + 7) or count + 7)
    after = results(module, True, rollout)
    assert lengths
    for ours, theirs in zip(after[0], before[0], strict=True):
        assert ours is None or torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    assert after[1].keys() == before[1].keys()
    for key, gradient in before[1].items():
        torch.testing.assert_close(after[1][key], gradient, rtol=0, atol=1e-11, msg=key)


def test_lengths_with_filler() -> None:
    examples = {1: 1, 255: 255, 256: 256, 257: 272, 272: 272, 1000: 1024, 1024: 1024, 1025: 1088, 2049: 2176}
    assert {count: filled_up(count) for count in examples} == examples
    lengths = {filled_up(count) for count in range(512, 4096)}
    assert len(lengths) == 49 and all(filled_up(count) <= count * 17 / 16 for count in range(1, 5000))


@pytest.mark.parametrize("filler", [0, 7])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2"])
def test_long_prompts_attended_to_apart_change_no_value_and_no_gradient(
    monkeypatch: pytest.MonkeyPatch, name: str, filler: int
) -> None:
    """Every prompt counts as long: the numbers of padded rows, and of one attention over prompt and completion."""
    module, rollout = make(toy_config(name)), grouped_rollout()
    together = results(module, True, rollout)
    monkeypatch.setattr(packed_attention, "LONG_PROMPT", 1)
    calls: list[int] = []
    right = packed_attention.attend_shared
    monkeypatch.setattr(packed_attention, "attend_shared", lambda *rest: calls.append(1) or right(*rest))
    if filler:
        monkeypatch.setattr(packing, "filled_up", lambda count: count + filler)
    apart, padded = results(module, True, rollout), results(module, False, rollout)
    assert len(calls) == 2  # layers of one pass
    for other in (together, padded):
        for ours, theirs in zip(apart[0], other[0], strict=True):
            assert ours is None or torch.allclose(ours, theirs, rtol=0, atol=1e-11)
        for key, gradient in other[1].items():
            torch.testing.assert_close(apart[1][key], gradient, rtol=0, atol=1e-10, msg=key)


def test_scores_far_apart_do_not_overflow_when_parts_are_put_together() -> None:
    """Logits of thousands: the part with the larger ones is the whole, and no gradient is NaN."""
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 0]])
    packed = pack(ids, torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool), 2)
    for scale in (1.0, 3e3):
        generator = torch.Generator().manual_seed(3)
        parts = [torch.randn(5, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
        parts = [(part * (scale if number < 2 else 1.0)).requires_grad_() for number, part in enumerate(parts)]
        query, key, value = parts
        found = attend_shared(query, key, value, packed, 0.5)
        for token, seen in {0: [0], 1: [0, 1], 2: [0, 1, 2], 3: [0, 1, 2, 3], 4: [0, 1, 4]}.items():
            weights = torch.softmax(torch.einsum("hd,shd->hs", query[token], key[seen]) * 0.5, -1)
            torch.testing.assert_close(found[token], torch.einsum("hs,shd->hd", weights, value[seen]))
        found.square().sum().backward()
        assert all(part.grad is not None and torch.isfinite(part.grad).all() for part in parts)
