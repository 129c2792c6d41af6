"""`PolicyModule` against the plain model on one whole unpadded row at a time."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import peft
import pytest
import torch
from tests.toy import naive_logits, naive_logprobs, toy_config, toy_model, toy_rollout
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from equipoise.models import policy_module
from equipoise.models.loading import enable_checkpointing, without_dropout
from equipoise.models.policy_module import PolicyModule, logit_transform
from equipoise.rollout.logprobs import completion_logprobs, score_tokens

pytestmark = pytest.mark.usefixtures("exact_norms")

PROMPTS, COMPLETIONS = [5, 1, 9, 3], [4, 7, 1, 6]
CASES = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "gpt2": ("gpt2", {}),
    "gemma2": ("gemma2", {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0}),
    "gemma2 window": ("gemma2", {"sliding_window": 4, "final_logit_softcapping": 1.5}),
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "cohere": ("cohere", {}),
    "granite": ("granite", {}),
    "mamba": ("mamba", {"num_hidden_layers": 1}),
}
# Eager attention of transformers turns padded rows to NaN in float64, and grouped products do not exist there.
SINGLE = {"gemma2", "gemma2 window", "mixtral", "qwen3_moe"}
WITH_GRADIENTS = [case for case in CASES if case != "mamba"]  # its loop over time is too slow to differentiate here


def make(case: str, *, lora: list[str] | None = None, double: bool = True) -> tuple[PolicyModule, Any]:
    """A policy module and the very model inside it; weights far from uniform, dropout off as `load_policy` does."""
    architecture, changes = CASES[case]
    config = toy_config(architecture, initializer_range=0.3, **changes)
    without_dropout(config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if double and case not in SINGLE:
        model = model.double()
    if lora is not None:
        torch.manual_seed(1)
        settings = peft.LoraConfig(r=2, target_modules=lora, task_type="CAUSAL_LM", init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            model = peft.get_peft_model(model, settings)
    module = PolicyModule(model)
    module.train()
    return module, model


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(module: PolicyModule, model: Any, temperature: float = 1.0) -> None:
    """Values and gradients of a weighted sum of log-probabilities, both ways."""
    rollout = toy_rollout(PROMPTS, COMPLETIONS, temperature=temperature, extra_padding=2)
    weights = torch.randn(rollout.completion_mask_BT.shape, generator=torch.Generator().manual_seed(3)).double()
    model.zero_grad()
    logprobs = completion_logprobs(module, rollout)
    (logprobs * weights).sum().backward()
    ours = gradients(model)
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for row, length in enumerate(COMPLETIONS):
        expected = naive_logprobs(model, rollout, row, temperature)
        torch.testing.assert_close(logprobs[row, :length], expected, rtol=0, atol=1e-5, check_dtype=False)
        assert bool((logprobs[row, length:] == 0).all())
        total = total + (expected * weights[row, :length]).sum()
    total.backward()
    theirs = gradients(model)
    assert ours.keys() == theirs.keys() and len(ours) > 0
    tolerance = 1e-7 if logprobs.dtype == torch.float64 else 1e-5
    scale = max(float(g.abs().max()) for g in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(
            ours[name], gradient, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", WITH_GRADIENTS)
def test_values_and_gradients_equal_the_naive_model(case: str) -> None:
    module, model = make(case)
    assert module._projects, "the projection of a known architecture falls back to full logits"
    compare(module, model)


@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma2", "cohere"])
def test_temperature_divides_the_logits(case: str) -> None:
    compare(*make(case), temperature=0.7)


@pytest.mark.parametrize("case", ["llama", "qwen3", "gpt2", "mistral", "mixtral", "mamba"])
def test_float32_agrees_with_the_naive_model(case: str) -> None:
    module, model = make(case, double=False)
    rollout = toy_rollout(PROMPTS, COMPLETIONS)
    with torch.no_grad():
        ours = completion_logprobs(module, rollout)
        for row, length in enumerate(COMPLETIONS):
            torch.testing.assert_close(ours[row, :length], naive_logprobs(model, rollout, row), rtol=0, atol=1e-5)
    assert ours.dtype == torch.float32


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]], ids=["attention", "head"])
def test_lora_adapts_layers_and_head(targets: list[str]) -> None:
    module, model = make("llama", lora=targets)
    compare(module, model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert any("lm_head" in name for name in trained) == ("lm_head" in targets)


def test_entropy_and_unit_logprobs_come_from_the_same_pass() -> None:
    module, model = make("cohere")
    rollout = toy_rollout(PROMPTS, COMPLETIONS, temperature=0.5)
    scores = score_tokens(module, rollout, with_entropy=True, with_unit_logprobs=True)
    assert scores.entropy_BT is not None and scores.unit_logprobs_BT is not None and scores.values_BT is None
    assert not scores.entropy_BT.requires_grad and not scores.unit_logprobs_BT.requires_grad
    for row, length in enumerate(COMPLETIONS):
        probabilities = torch.softmax(naive_logits(model, rollout, row) / 0.5, dim=-1)
        entropy = -(probabilities * probabilities.log()).sum(dim=-1)
        torch.testing.assert_close(scores.entropy_BT[row, :length], entropy.detach(), rtol=0, atol=1e-6)
        unit = naive_logprobs(model, rollout, row).detach()
        torch.testing.assert_close(scores.unit_logprobs_BT[row, :length], unit, rtol=0, atol=1e-6)
        assert not scores.entropy_BT[row, length:].any() and not scores.unit_logprobs_BT[row, length:].any()


@pytest.mark.parametrize("case", ["llama", "gpt2", "mistral"])
def test_padding_changes_nothing_even_where_pad_is_eos(case: str) -> None:
    module, _ = make(case)
    with torch.no_grad():
        tight = completion_logprobs(module, toy_rollout(PROMPTS, COMPLETIONS))
        loose = completion_logprobs(module, toy_rollout(PROMPTS, COMPLETIONS, extra_padding=5))
        as_eos = completion_logprobs(module, toy_rollout(PROMPTS, COMPLETIONS, extra_padding=5, pad_id=1))
        alone = [completion_logprobs(module, toy_rollout(PROMPTS, COMPLETIONS)[[row]].trimmed())[0] for row in range(4)]
    torch.testing.assert_close(loose[:, : tight.shape[1]], tight, rtol=0, atol=1e-10)
    torch.testing.assert_close(as_eos, loose, rtol=0, atol=1e-10)
    for row, length in enumerate(COMPLETIONS):
        torch.testing.assert_close(alone[row], tight[row, :length], rtol=0, atol=1e-10)


def test_the_value_head_starts_at_zero_and_sees_the_state_before_each_token() -> None:
    _, model = make("llama")
    module = PolicyModule(model, value_head=True).double()
    rollout = toy_rollout(PROMPTS, COMPLETIONS)
    values = score_tokens(module, rollout, with_values=True).values_BT
    assert values is not None and not values.any()
    assert module.value_head is not None
    torch.nn.init.normal_(module.value_head.linear.weight, generator=torch.Generator().manual_seed(0))
    values = score_tokens(module, rollout, with_values=True).values_BT
    assert values is not None
    ids = torch.cat([rollout.prompt_ids_BS[0][-5:], rollout.completion_ids_BT[0][:4]])[None]
    states = model.model(input_ids=ids).last_hidden_state[0, 4:8]
    torch.testing.assert_close(values[0, :4].double(), states @ module.value_head.linear.weight[0], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="no value head"):
        score_tokens(PolicyModule(model), rollout, with_values=True)


class _OddHead(LlamaForCausalLM):
    """An architecture that does to its logits what nobody knows."""

    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        output.logits = 3.0 * output.logits.tanh()
        return output


def test_an_unknown_logit_transform_falls_back_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = _OddHead(toy_config("llama", initializer_range=0.3)).double()
    with caplog.at_level(logging.WARNING):
        module = PolicyModule(model)
        compare(module, model)
        compare(module, model, temperature=0.5)
    assert [record.message for record in caplog.records if "transforms its logits" in record.message] == [
        "_OddHead transforms its logits in a way Equipoise does not know: using the model's own logits, "
        "which needs memory for a row's length times the vocabulary"
    ]


class _LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("tied", [False, True])
def test_rows_times_tokens_times_vocabulary_is_never_built(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk, vocabulary, hidden = 16, 2000, 8
    monkeypatch.setattr(policy_module, "PROJECTION_CHUNK", chunk)
    model = toy_model("llama", hidden=hidden, layers=1, vocabulary=vocabulary, tie_word_embeddings=tied)
    module = PolicyModule(model)
    rollout = toy_rollout([4] * 8, [20] * 8, vocabulary=vocabulary, temperature=0.9)
    whole = 8 * 20 * vocabulary
    with _LargestTensor() as largest:
        scores = score_tokens(module, rollout, with_entropy=True, with_unit_logprobs=True)
        scores.logprobs_BT.sum().backward()
    assert chunk * vocabulary <= largest.numel <= max(chunk * vocabulary, hidden * vocabulary) + 1000
    assert largest.numel < whole / 5
    with _LargestTensor() as largest:
        completion_logprobs(_plain(model), rollout)
    assert largest.numel >= whole, "the measurement sees no large tensor even where there is one"


def _plain(model: Any) -> PolicyModule:
    module = PolicyModule(model)
    module._projects = False
    return module


def test_gradient_checkpointing_changes_no_gradient() -> None:
    module, model = make("llama")
    other = copy.deepcopy(model)
    enable_checkpointing(other)
    checkpointed = PolicyModule(other)
    checkpointed.train()
    rollout = toy_rollout(PROMPTS, COMPLETIONS)
    for each in (module, checkpointed):
        completion_logprobs(each, rollout).sum().backward()
    for (name, ours), theirs in zip(gradients(model).items(), gradients(other).values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda m, n=name: f"{n}: {m}")


def test_dropout_and_router_noise_are_off_in_train_mode() -> None:
    for case in ("gpt2", "mixtral"):
        module, _ = make(case)
        assert module.training
        rollout = toy_rollout(PROMPTS, COMPLETIONS)
        with torch.no_grad():
            first, second = completion_logprobs(module, rollout), completion_logprobs(module, rollout)
        assert torch.equal(first, second)


def test_a_masked_position_gets_no_gradient_and_an_empty_mask_is_not_nan() -> None:
    module, model = make("llama")
    rollout = toy_rollout([3, 4], [2, 2])
    empty = torch.zeros_like(rollout.completion_mask_BT)
    ids = torch.cat([rollout.prompt_ids_BS, rollout.completion_ids_BT], dim=1)
    mask = torch.cat([rollout.prompt_mask_BS, rollout.completion_mask_BT], dim=1)
    scores = module(ids, mask, empty)
    scores.logprobs_BT.sum().backward()
    assert not scores.logprobs_BT.any()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_logit_transform_of_known_families() -> None:
    """Cohere multiplies (0.25 * 8 = 2), Granite divides (9 / 3 = 3), Gemma caps: 2 tanh(2 / 2) = 1.5231883."""
    cohere, granite = logit_transform(toy_config("cohere")), logit_transform(toy_config("granite"))
    gemma = logit_transform(toy_config("gemma2", final_logit_softcapping=2.0))
    assert cohere is not None and granite is not None and gemma is not None
    assert float(cohere(torch.tensor(8.0))) == 2.0
    assert float(granite(torch.tensor(9.0))) == pytest.approx(3.0)
    assert float(gemma(torch.tensor(2.0))) == pytest.approx(1.5231883)
    assert logit_transform(toy_config("llama")) is None
