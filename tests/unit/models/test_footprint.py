"""The footprint's arithmetic against what autograd really keeps, and against models that are really built."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen2Config

from equipoise.config import LoraConfig, ModelConfig
from equipoise.errors import ConfigError
from equipoise.models import footprint
from equipoise.models.footprint import Batch, critic_network, policy_network, reward_network
from equipoise.models.policy_module import PolicyModule

LORA = LoraConfig(r=4, alpha=8)


def qwen(layers: int = 2, tied: bool = True) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=300,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=160,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
    )


def network(low: bool = False, lora: bool = False, layers: int = 2, **options: object) -> footprint.Network:
    precision = "bfloat16" if low else "float32"
    config = ModelConfig(model="toy", precision=precision, lora=LORA if lora else None, **options)  # type: ignore[arg-type]
    return policy_network(config, qwen(layers))


def real(low: bool, lora: bool, layers: int) -> PolicyModule:
    """The same network with weights, in the dtypes that `load_policy` gives it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(qwen(layers)).to(torch.bfloat16 if low and lora else torch.float32)
    if lora:
        import peft

        from equipoise.models.loading import quiet_peft

        with quiet_peft():
            settings = peft.LoraConfig(r=LORA.r, target_modules="all-linear", task_type="CAUSAL_LM")
            model = peft.get_peft_model(model, settings)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return PolicyModule(model, autocast=low).train()


def kept_bytes(module: PolicyModule, batch: Batch) -> int:
    """Bytes of the distinct memories, parameters left out, that autograd holds on to in a forward pass."""
    per_prompt = batch.rows // batch.prompts
    prompts = torch.randint(5, 300, (batch.prompts, batch.prompt_tokens)).repeat_interleave(per_prompt, 0)
    completions = torch.randint(5, 300, (batch.rows, batch.completion_tokens))
    ids = torch.cat([prompts, completions], dim=1)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(ids, torch.ones_like(ids).bool(), torch.ones_like(completions).bool())
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("usual", [True, False], ids=["by hand", "own layers"])
@pytest.mark.parametrize(
    "batch",
    [Batch(3, 12, 20, 16), Batch(3, 12, 130, 16), Batch(12, 12, 20, 16)],
    ids=["groups", "long prompts", "alone"],
)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_activations_of_a_layer_are_what_autograd_keeps(low: bool, lora: bool, batch: Batch, usual: bool) -> None:
    """Two layers more keep twice what the formula says of one; numbers per token (norms' factors) are not counted."""
    modules = [real(low, lora, layers) for layers in (2, 4)]
    for module in modules:
        assert module._own_blocks
        module._own_blocks = usual
    few, more = (kept_bytes(module, batch) for module in modules)
    measured = (more - few) / 2
    net = replace(network(low, lora), usual=usual)
    if low and not lora:  # autocast's copies of the weights are a term of their own
        weights = network(layers=2).trained - network(layers=1).trained
        assert net.kept_casts == (0 if usual else net.casts)
        measured -= 0 if usual else 2 * weights
    assert footprint.layer_activations(net, batch) == pytest.approx(measured, rel=0.02)


def test_parameters_are_those_of_the_real_model() -> None:
    """bfloat16 LoRA: frozen weights of 2 bytes, adapters of 4, two moments of 4 each."""
    module = real(True, True, 2)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in module.parameters() if not p.requires_grad)
    net = network(True, True)
    assert (net.trained, net.frozen) == (trained, frozen)
    assert net.weights == sum(p.numel() * p.element_size() for p in module.parameters())
    assert (net.moments, net.gradients) == (8 * trained, 4 * trained)
    assert net.casts == 2 * trained
    assert network(False, False).casts == 0


def test_table_is_trained_once_where_it_is_tied() -> None:
    tied = policy_network(ModelConfig(model="toy"), qwen())
    untied = policy_network(ModelConfig(model="toy"), qwen(tied=False))
    assert untied.trained - tied.trained == 300 * 64
    assert tied.tied and not untied.tied and tied.head_trained
    critic = critic_network(untied)
    assert (critic.trained, critic.frozen, critic.head_trained) == (tied.trained, 300 * 64, False)


def test_cache_holds_a_prompt_once_for_its_group() -> None:
    """2 layers x 16 wide keys and values x 4 bytes x (1 prompt of 2 + 12 rows of 40 tokens); three tables of logits."""
    net = network()
    terms = footprint.sampling_terms(net, Batch(1, 12, 2, 40))
    assert terms["cache"] == 2 * 2 * 16 * 4 * (2 + 12 * 40)
    assert terms["logits"] == 3 * 4 * 12 * 300
    assert terms["weights laid out"] == 4 * net.trained
    assert "weights laid out" not in footprint.sampling_terms(replace(net, usual=False), Batch(1, 12, 2, 40))


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer() -> None:
    batch = Batch(3, 12, 20, 16)
    plain, again = network(layers=4), network(layers=4, gradient_checkpointing=True)
    saved = footprint.activations(plain, batch) - footprint.activations(again, batch)
    assert saved == 3 * footprint.layer_activations(plain, batch) - 4 * 4 * 64 * batch.tokens


def test_attention_without_a_fused_kernel_keeps_its_weights() -> None:
    """4 bytes x 12 rows x 36 columns x (8 heads x 16 tokens + keys and values of 64 each); nothing without groups."""
    net, batch = replace(network(), usual=False), Batch(3, 12, 20, 16)
    more = footprint.layer_activations(net, batch, on_gpu=True) - footprint.layer_activations(net, batch)
    assert more == 4 * 12 * 36 * (8 * 16 + 2 * 64)
    alone = Batch(12, 12, 20, 16)
    assert footprint.layer_activations(net, alone, on_gpu=True) == footprint.layer_activations(net, alone)


def test_gradients_of_a_second_pass_meet_all_activations() -> None:
    net, batch = network(), Batch(3, 12, 20, 16)
    once, twice = (footprint.update_terms(net, batch, passes) for passes in (1, 2))
    assert twice["gradients"] == net.gradients
    assert sum(twice.values()) - sum(once.values()) == net.gradients
    assert once["activations"] >= footprint.activations(net, batch)


def test_reward_model_trains_everything_in_float32() -> None:
    llama = LlamaConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=8, intermediate_size=160
    )
    net = reward_network(llama, 3, precision="bfloat16")
    assert net.frozen == 0 and net.weights == 4 * net.trained and net.low and not net.head_trained


def test_mixture_of_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="toy: a mixture of experts; `plan` knows dense transformers only"):
        policy_network(ModelConfig(model="toy"), MixtralConfig(num_local_experts=4))
