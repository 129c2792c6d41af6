"""The usual decoder block: which models consist of it.

RMS norm, attention with rotary positions, gated MLP: Llama, Mistral, Qwen2, Qwen3.

What is computed without the model's own layers relies on this, and is compared with them once on a probe.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from equipoise.models.products import NotPlain

HEAD_NORMS = ("q_norm", "k_norm")  # of attention, where an architecture has them
CALLED = ("embed_tokens", "rotary_emb")
BLOCKS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


def check_usual(causal: Any) -> None:
    """Raise NotPlain, with the reason, for a causal LM that does more than embed tokens and run such blocks.

    Adapters are allowed here: `LinearParts` looks at each layer. Hooks are allowed where the part itself is called,
    `CALLED`; elsewhere they would be passed by.
    """
    backbone = causal.base_model
    layers = getattr(backbone, "layers", None)
    if not layers or not all(hasattr(backbone, name) for name in ("embed_tokens", "rotary_emb", "norm")):
        raise NotPlain("it is not a stack of decoder layers")
    unknown = {type(layer).__name__ for layer in layers} - set(BLOCKS)
    unknown |= {
        type(layer).__name__ for layer in layers if not type(layer).__module__.startswith("transformers.models.")
    }
    if unknown:
        raise NotPlain(f"it has layers of the kind {', '.join(sorted(unknown))}")
    if len(layers) != causal.config.get_text_config().num_hidden_layers:
        raise NotPlain("it does not use all of its layers")
    if type(backbone.embed_tokens) is not nn.Embedding:
        raise NotPlain(f"its tokens are embedded by a {type(backbone.embed_tokens).__name__}")
    for layer in layers:
        _check_parts(layer)
    if type(backbone.norm).__module__ != type(backbone).__module__:
        raise NotPlain(f"its last norm is a {type(backbone.norm).__name__} of {type(backbone.norm).__module__}")
    called = [getattr(backbone, name) for name in CALLED]
    for name, part in causal.named_modules():
        if part not in called and _does_more(part):
            raise NotPlain(f"{name or type(causal).__name__} has hooks, or a forward of its own")


def _check_parts(layer: Any) -> None:
    """Attention, MLP and norms are those that transformers has for this layer, and drop nothing."""
    parts = [layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm]
    parts += [getattr(layer.self_attn, name) for name in HEAD_NORMS if hasattr(layer.self_attn, name)]
    for part in parts:
        if type(part).__module__ != type(layer).__module__:
            raise NotPlain(f"its layers have a {type(part).__name__} of {type(part).__module__}")
    if getattr(layer.self_attn, "attention_dropout", 0.0):
        raise NotPlain("its attention has dropout")


def is_silu(activation: Any) -> bool:
    """Whether an MLP's gate is activated by `x sigmoid(x)`."""
    return type(activation) is nn.SiLU or type(activation).__name__ == "SiLUActivation"


def _does_more(part: nn.Module) -> bool:
    hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
    return any(hooks) or "forward" in vars(part)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """How far a probe is off: root mean square of the difference over that of the expected numbers.

    Among many rounded numbers the largest difference grows with their number; this does not.
    """
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-12))
