"""The hand-written block against finite differences and against the model's own layers."""

from __future__ import annotations

import copy
import logging
from typing import Any

import peft
import pytest
import torch
from tests.toy import toy_config, toy_rollout
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from equipoise.models import decoder_blocks
from equipoise.models.block_parts import Norm, Rotation
from equipoise.models.decoder_blocks import BlockSpec, _Enter, _Leave, _Normed, block_specs
from equipoise.models.loading import enable_checkpointing, quiet_peft
from equipoise.models.policy_module import PolicyModule
from equipoise.models.products import NotPlain
from equipoise.rollout.logprobs import completion_logprobs, score_tokens
from equipoise.rollout.types import Rollout

pytestmark = pytest.mark.usefixtures("exact_norms")

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, one key head": ("llama", {"num_key_value_heads": 1}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": None}),
}


def make(case: str, *, lora: bool = False, dtype: torch.dtype = torch.float64, autocast: bool = False) -> PolicyModule:
    """A random model, its norms and biases too, in train mode."""
    architecture, changes = CONFIGS[case]
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_config(toy_config(architecture, initializer_range=0.15, **changes))
    if lora:
        with quiet_peft():
            model = peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=5, target_modules=r".*_proj"), model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias") or "lora_B" in name:
                parameter.normal_(std=0.2)
            parameter.requires_grad_("lora_" in name or not lora)
    return PolicyModule(model.to(dtype), autocast=autocast).train()


def rollout_of() -> Rollout:
    """Two groups that share their prompts, a prompt of its own, unequal lengths."""
    rollout = toy_rollout([4, 4, 6, 3, 3, 3], [5, 8, 2, 7, 1, 6], extra_padding=2)
    rollout.prompt_ids_BS[1], rollout.prompt_ids_BS[4:] = rollout.prompt_ids_BS[0], rollout.prompt_ids_BS[3]
    return rollout


def results(module: PolicyModule, own: bool, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities, and the gradients of a weighted sum of them."""
    module._own_blocks = own
    module.zero_grad()
    logprobs = score_tokens(module, rollout, with_entropy=True).logprobs_BT
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (logprobs * weights).sum().backward()
    return logprobs.detach(), {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("case", CONFIGS)
def test_values_and_gradients_equal_the_models_own_layers(case: str, lora: bool) -> None:
    module, rollout = make(case, lora=lora), rollout_of()
    assert module._own_blocks
    ours, our_gradients = results(module, True, rollout)
    theirs, their_gradients = results(module, False, rollout)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert our_gradients.keys() == their_gradients.keys() and our_gradients
    for name, gradient in their_gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(our_gradients[name], gradient, rtol=0, atol=1e-10 * max(scale, 1.0))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("case", ["llama with biases", "qwen3"])
def test_gradients_equal_finite_differences(case: str, lora: bool) -> None:
    module = make(case, lora=lora)
    spec = block_specs(module.causal, torch.float64)[0]
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, angles = random(3, spec.before_attention.weight.numel()), random(3, spec.head_width // 2)
    angles = torch.cat([angles, angles], dim=-1)
    rotation = Rotation.of(angles.cos(), angles.sin())
    hidden.requires_grad_()
    attended = random(3, spec.out.parts.weight_OI.shape[1]).requires_grad_()
    directions = [random(*part.shape) for part in spec.entering()]  # along one line each: there are many numbers
    steps = torch.zeros(max(len(spec.entering()), len(spec.leaving())), dtype=torch.float64, requires_grad=True)

    def enter(hidden_NH: Tensor, steps: Tensor) -> Any:
        moved = _moved(spec, spec.entering(), steps, directions)
        return _Enter.apply(hidden_NH, moved, rotation, *moved.entering())

    assert torch.autograd.gradcheck(enter, (hidden, steps), atol=1e-7, rtol=1e-6)
    directions = [random(*part.shape) for part in spec.leaving()]

    def leave(hidden_NH: Tensor, attended: Tensor, steps: Tensor) -> Any:
        moved = _moved(spec, spec.leaving(), steps, directions)
        return _Leave.apply(hidden_NH, attended, moved, *moved.leaving())

    assert torch.autograd.gradcheck(leave, (hidden, attended, steps), atol=1e-7, rtol=1e-6)


def _moved(spec: BlockSpec, tensors: list[Tensor], steps: Tensor, directions: list[Tensor]) -> BlockSpec:
    """The spec with each of these tensors moved along its direction, differentiably."""
    new = {id(t): t.detach() + step * d for t, step, d in zip(tensors, steps, directions, strict=False)}
    return _replaced(spec, new)


def _replaced(value: Any, new: dict[int, Tensor]) -> Any:
    from dataclasses import fields, is_dataclass, replace

    if isinstance(value, Tensor):
        return new.get(id(value), value.detach())
    if isinstance(value, tuple):
        return tuple(_replaced(part, new) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _replaced(getattr(value, field.name), new) for field in fields(value)})
    return value


def test_a_norm_by_hand() -> None:
    """x = (3, 4), weight (1, 2), eps 0: root mean square 5 / sqrt 2, y = (3, 8) sqrt 2 / 5.

    For the gradient (1, 0): r = sqrt 2 / 5, g = (1, 0), mean(g x) = 3/2, dx = r (g - x r^2 3/2)
    = sqrt 2 / 5 * (1 - 3 * 0.12, -4 * 0.12) = sqrt 2 / 5 * (0.64, -0.48); dw = (3, 0) sqrt 2 / 5.
    """
    inputs = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    norm = Norm(torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True), 0.0)
    found = _Normed.apply(inputs, norm, norm.weight)
    r = 2**0.5 / 5
    torch.testing.assert_close(found, torch.tensor([[3 * r, 8 * r]], dtype=torch.float64))  # type: ignore[arg-type]
    found.backward(torch.tensor([[1.0, 0.0]], dtype=torch.float64))  # type: ignore[union-attr]
    torch.testing.assert_close(inputs.grad, torch.tensor([[0.64 * r, -0.48 * r]], dtype=torch.float64))
    torch.testing.assert_close(norm.weight.grad, torch.tensor([3 * r, 0.0], dtype=torch.float64))


def test_a_rotation_by_hand() -> None:
    """A quarter turn of the pair (x0, x1) = (1, 2): (-2, 1). The gradient (1, 0) turns back to (0, -1)."""
    turn = Rotation.of(torch.zeros(1, 2), torch.ones(1, 2))
    assert turn.forward(torch.tensor([[[1.0, 2.0]]])).tolist() == [[[-2.0, 1.0]]]
    assert turn.backward(torch.tensor([[[1.0, 0.0]]])).tolist() == [[[0.0, -1.0]]]


@pytest.mark.parametrize("lora", [False, True])
def test_bfloat16_is_as_near_as_the_models_own(lora: bool) -> None:
    """Mean error against float64, of values and gradients, at most a little above that of the model's own layers."""
    exact, rollout = make("qwen3", lora=lora), rollout_of()
    low = make("qwen3", lora=lora, dtype=torch.float32, autocast=True)
    true_values, true_gradients = results(exact, False, rollout)
    errors = []
    for own in (True, False):
        values, gradients = results(low, own, rollout)
        relative = [(gradients[name] - true).abs().mean() / true.abs().mean() for name, true in true_gradients.items()]
        errors.append((float((values - true_values).abs().mean()), float(sum(relative))))
    (value, gradient), (own_value, own_gradient) = errors
    assert value < 1.3 * own_value and gradient < 1.3 * own_gradient


class _Kept:
    """Bytes of activations that a forward pass keeps for its backward pass, each storage once."""

    def __init__(self, module: nn.Module) -> None:
        self._known = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.storages: dict[int, tuple[int, Any]] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self.storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor, so that no place is used twice
        return tensor

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.storages.values())


def test_keeps_about_half() -> None:
    """Of a few thousand parameters' activations, the vocabulary projection's included; at full size it is less."""
    module, rollout = make("llama", dtype=torch.float32), rollout_of()
    sizes = []
    for own in (True, False):
        module._own_blocks = own
        kept = _Kept(module)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
            completion_logprobs(module, rollout)
        sizes.append(kept.bytes)
    assert sizes[0] < 0.65 * sizes[1]


def test_checkpointing_computes_each_block_again(monkeypatch: pytest.MonkeyPatch) -> None:
    module, rollout = make("llama"), rollout_of()
    other = copy.deepcopy(module)
    enable_checkpointing(other.model)
    _, plain = results(module, True, rollout)
    calls: list[int] = []
    attend = decoder_blocks.attend_packed
    monkeypatch.setattr(decoder_blocks, "attend_packed", lambda *inputs: calls.append(1) or attend(*inputs))
    _, checkpointed = results(other, True, rollout)
    assert len(calls) == 2 * len(other.causal.model.layers)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=0)
    calls.clear()
    with torch.no_grad():
        completion_logprobs(other, rollout)
    assert len(calls) == len(other.causal.model.layers)


def test_what_is_not_the_usual_block_goes_through_its_own_layers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        config = toy_config("llama", hidden_act="gelu")
        assert not PolicyModule(AutoModelForCausalLM.from_config(config))._own_blocks
    assert "its MLP activates by GELUActivation" in caplog.text
    assert not PolicyModule(AutoModelForCausalLM.from_config(toy_config("gpt2")))._own_blocks


def test_hooks_that_come_later_are_respected_and_said(caplog: pytest.LogCaptureFixture) -> None:
    module, rollout = make("llama"), rollout_of()
    seen: list[int] = []
    handle = module.causal.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(NotPlain, match=r"layers\.0\.mlp has hooks"):
        block_specs(module.causal, torch.float64)
    hooked, _ = results(module, True, rollout)
    results(module, True, rollout)
    assert seen and caplog.text.count("rows go through the model's own layers now: model.layers.0.mlp has hooks") == 1
    handle.remove()
    seen.clear()
    plain, _ = results(module, True, rollout)
    assert not seen
    torch.testing.assert_close(plain, hooked, rtol=0, atol=1e-12)


def test_an_adapter_that_is_off_is_not_applied() -> None:
    """The reference of a LoRA policy is the same module with its adapter off."""
    module, rollout = make("qwen3", lora=True), rollout_of()
    with torch.no_grad():
        on = completion_logprobs(module, rollout)
        for part in module.modules():
            if isinstance(part, peft.tuners.lora.LoraLayer):
                part.enable_adapters(False)
        off = completion_logprobs(module, rollout)
        module._own_blocks = False
        torch.testing.assert_close(off, completion_logprobs(module, rollout), rtol=0, atol=1e-12)
    assert float((on - off).abs().max()) > 1e-3


def test_a_weight_that_changes_before_the_backward_pass_is_noticed() -> None:
    module, rollout = make("llama"), rollout_of()
    loss = completion_logprobs(module, rollout).sum()
    with torch.no_grad():
        module.causal.model.layers[1].mlp.up_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
