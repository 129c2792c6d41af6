"""The decode step against the model's own layers: architectures, adapters, precision, and what it leaves alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.toy import toy_model, toy_policy_directory

from equipoise.config import ModelConfig, SamplingConfig
from equipoise.models import decode_step
from equipoise.models.decode_step import DecodeStep
from equipoise.models.policy import Policy, load_policy
from equipoise.models.policy_module import PolicyModule
from equipoise.models.products import NotPlain
from equipoise.rollout import decoding
from equipoise.rollout.decoding import GroupedBatch, PlainBatch
from equipoise.rollout.sampler import generate

PROMPTS = [[5, 9, 3, 12, 40], [7, 8], [11]]
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "llama, rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}},
    "llama, yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0, "original_max_position_embeddings": 32,
        }
    },
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, gelu": {"hidden_act": "gelu"},
}  # fmt: skip


def toy(directory: Path, architecture: str = "llama", *, lora: bool = False, **options: Any) -> Policy:
    name, sizes = architecture.partition(",")[0], ARCHITECTURES.get(architecture, {})
    # AutoTokenizer opens a directory of Qwen2 with a tokenizer of its own: that one gets another model's.
    saved = "llama" if name == "qwen2" else name
    toy_policy_directory(directory, architecture=saved, initializer_range=0.15, **({} if saved != name else sizes))
    settings = {"model": str(directory), **options} | ({"lora": {"r": 3, "alpha": 5}} if lora else {})
    policy = load_policy(ModelConfig.model_validate(settings), trainable=lora)
    if saved != name:
        model = toy_model(name, initializer_range=0.15)
        config = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")
        policy.module = PolicyModule(get_peft_model(model, config) if lora else model)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter_name, parameter in policy.module.named_parameters():
            if "lora_B" in parameter_name or parameter_name.endswith("bias"):
                parameter.normal_(std=0.2)
    policy.module.eval()
    return policy


def norm_in_its_own_type(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)


def logits_of(batch: decoding.Batch) -> torch.Tensor:
    """Several steps, with rows that leave; all logits."""
    with torch.no_grad():
        batch.join(PROMPTS)
        found = []
        for step in range(5):
            batch.advance(torch.arange(len(batch.logits)).mul(5).add(step).remainder(40) + 2)
            found.append(batch.logits)
            if step == 2:
                batch.keep(torch.tensor([0, 2, 5]))
    return torch.cat(found)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_models_own_layers(
    architecture: str, lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = toy(tmp_path / "model", architecture, lora=lora)
    policy.module.double()
    with monkeypatch.context() as patched:
        # transformers takes norms in float32 in a float64 model too, which is all that would be seen of a difference.
        patched.setattr(type(policy.module.causal.base_model.norm), "forward", norm_in_its_own_type)
        expected = logits_of(PlainBatch(policy, 2, 6))
    found = logits_of(GroupedBatch(policy, 2, 6, DecodeStep(policy.module)))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-7)  # logits are handed on in float32
    policy.module.float()
    single = logits_of(GroupedBatch(policy, 2, 6, DecodeStep(policy.module)))
    torch.testing.assert_close(single, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_bfloat16_is_as_near_as_the_models_own(lora: bool, tmp_path: Path) -> None:
    policy = toy(tmp_path / "model", lora=lora, precision="bfloat16")
    policy.module.autocast = True
    low = logits_of(GroupedBatch(policy, 2, 6, DecodeStep(policy.module)))
    own = logits_of(PlainBatch(policy, 2, 6))
    policy.module.double()
    exact = logits_of(PlainBatch(policy, 2, 6))
    assert float((low - exact).abs().mean()) < 1.5 * float((own - exact).abs().mean()) + 1e-3


def test_a_changed_weight_changes_the_next_generation(tmp_path: Path) -> None:
    """Every call copies the weights as they are then, adapters too."""
    policy = toy(tmp_path / "model", lora=True)
    sampling = SamplingConfig(max_tokens=8)
    first = generate(policy, ["help me", "a cat"], 3, sampling)
    again = generate(policy, ["help me", "a cat"], 3, sampling)
    assert torch.equal(first.sampler_logprobs_BT, again.sampler_logprobs_BT)
    with torch.no_grad():
        for name, parameter in policy.module.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    assert not torch.equal(generate(policy, ["help me", "a cat"], 3, sampling).sampler_logprobs_BT,
                           first.sampler_logprobs_BT)  # fmt: skip


def test_generate_goes_through_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens with and without it, in float64."""
    policy = toy(tmp_path / "model")
    policy.module.double()
    calls: list[int] = []
    call = DecodeStep.__call__
    monkeypatch.setattr(DecodeStep, "__call__", lambda self, *inputs: calls.append(1) or call(self, *inputs))
    sampling = SamplingConfig(max_tokens=12)
    found = generate(policy, ["help me", "a cat", "x"], 4, sampling, rows_at_once=8)
    assert len(calls) > 12
    monkeypatch.setattr(decoding, "_own_step", lambda policy: None)
    calls.clear()
    own = generate(policy, ["help me", "a cat", "x"], 4, sampling, rows_at_once=8)
    assert not calls and torch.equal(found.completion_ids_BT, own.completion_ids_BT)
    torch.testing.assert_close(found.sampler_logprobs_BT, own.sampler_logprobs_BT, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [("gpt2", "not a stack of decoder layers"), ("gemma2", "Gemma2DecoderLayer"), ("mixtral", "MixtralDecoderLayer")],
)
def test_other_architectures_go_through_their_own_layers(
    architecture: str, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = toy(tmp_path / "model", architecture)
    with pytest.raises(NotPlain, match=reason):
        DecodeStep(policy.module)
    with caplog.at_level(logging.INFO):
        assert decoding._own_step(policy) is None
    assert reason in caplog.text


def test_hooks_and_changed_layers_are_respected(tmp_path: Path) -> None:
    policy = toy(tmp_path / "model")
    layer = policy.module.causal.base_model.layers[1]
    handle = layer.mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(NotPlain, match=r"layers\.1\.mlp has hooks"):
        DecodeStep(policy.module)
    handle.remove()
    layer.mlp.forward = lambda hidden: hidden
    with pytest.raises(NotPlain, match=r"layers\.1\.mlp has hooks, or a forward of its own"):
        DecodeStep(policy.module)
    del layer.mlp.forward
    DecodeStep(policy.module)


def test_a_layer_that_looks_usual_and_is_not_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = toy(tmp_path / "model")
    rotation = decode_step.Rotation.of
    monkeypatch.setattr(decode_step.Rotation, "of", staticmethod(lambda cos, sin: rotation(cos, -sin)))
    assert decoding._own_step(policy) is None
    monkeypatch.undo()
    assert decoding._own_step(policy) is None, "tried once"


def test_parts_that_are_not_the_architectures_own_are_respected(tmp_path: Path) -> None:
    policy = toy(tmp_path / "model")
    backbone = policy.module.causal.base_model
    norm, backbone.norm = backbone.norm, torch.nn.RMSNorm(32)
    with pytest.raises(NotPlain, match="its last norm is a RMSNorm of torch"):
        DecodeStep(policy.module)
    assert decoding._own_step(policy) is None, "said, not raised"
    backbone.norm = norm
    layer = backbone.layers[0]
    mlp, layer.mlp = layer.mlp, torch.nn.Identity()
    with pytest.raises(NotPlain, match="its layers have a Identity of torch"):
        DecodeStep(policy.module)
    layer.mlp = mlp
    layer.self_attn.attention_dropout = 0.1
    with pytest.raises(NotPlain, match="its attention has dropout"):
        DecodeStep(policy.module)
    layer.self_attn.attention_dropout = 0.0
    handle = layer.mlp.register_full_backward_hook(lambda *_: None)
    with pytest.raises(NotPlain, match="has hooks"):
        DecodeStep(policy.module)
    handle.remove()
    assert decoding._own_step(policy) is not None


def test_a_step_that_cannot_be_built_is_left_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy = toy(tmp_path / "model")

    def broken(*_: Any) -> None:
        raise AttributeError("no such operation")

    monkeypatch.setattr(decode_step, "Product", broken)
    with caplog.at_level(logging.INFO):
        assert decoding._own_step(policy) is None
    assert "AttributeError: no such operation" in caplog.text
    generate(policy, ["help me"], 2, SamplingConfig(max_tokens=4))


def test_a_copy_that_does_not_fit_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = toy(tmp_path / "model")
    monkeypatch.setattr(decode_step, "MEMORY_SHARE", 1e-9)
    with pytest.raises(NotPlain, match="too much for this machine's memory"):
        DecodeStep(policy.module)
