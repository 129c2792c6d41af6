"""The last linear layer of a sequence classifier: finding it, scaling it, and what a backbone must satisfy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.errors import ConfigError

TOLERANCE = 1e-4  # relative; float32 leaves about 1e-6


def find_head(model: Any, probe: Mapping[str, Tensor], source: str) -> tuple[str, nn.Linear]:
    """Name and module of the linear layer whose outputs are the model's logits.

    The name differs (`score`, `classifier`, `classifier.out_proj`, ...), so candidates are tried: scaling the layer
    by two must scale the logits by two. `probe` is one encoded batch. Raises ConfigError where none passes: label
    scaling could not be folded into such a model.
    """
    base = model.base_model_prefix + "."
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == model.config.num_labels
        and not name.startswith(base)
    ]
    before = _logits(model, probe)
    for name, module in reversed(candidates):
        with torch.no_grad():
            parameters = [module.weight] if module.bias is None else [module.weight, module.bias]
            kept = [parameter.clone() for parameter in parameters]
            for parameter in parameters:
                parameter.mul_(2)
            after = _logits(model, probe)
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
        if _close(after, 2 * before) and before.abs().max() > 0:
            return name, module
    raise ConfigError(
        f"{source}: unsupported backbone for a reward model: {type(model).__name__} has no last linear layer that its "
        "outputs are proportional to; take an encoder like BERT or a decoder like Llama"
    )


def check_padding(model: Any, probe: Mapping[str, Tensor], pad_token_id: int, source: str) -> None:
    """Raise ConfigError where right padding changes a model's outputs, as it does if it pools at the last column."""
    longest = int(probe["attention_mask"].sum(dim=1).argmax())  # the row without padding
    single = {name: tensor[longest : longest + 1] for name, tensor in probe.items()}
    fill = {"input_ids": pad_token_id}
    padded = {
        name: torch.cat([tensor, torch.full_like(tensor[:, :1], fill.get(name, 0)).repeat(1, 3)], dim=1)
        for name, tensor in single.items()
    }
    if not _close(_logits(model, padded), _logits(model, single)):
        raise ConfigError(
            f"{source}: unsupported backbone for a reward model: the outputs of {type(model).__name__} change with "
            "right padding, so a score would depend on the batch it is in; take an encoder like BERT or a decoder "
            "like Llama"
        )


def folded_head(
    name: str, head: nn.Linear, scale_K: Sequence[float], offset_K: Sequence[float]
) -> tuple[dict[str, Tensor], list[float]]:
    """Head weights whose outputs are `scale * output + offset`, and what of the offset they cannot carry.

    With W x + b and scale s, offset m: s W x + (s b + m), remaining offset 0; without a bias s W x, remaining m.
    Example: W = 2, b = 1, s = 3, m = 10 maps x = 1 (output 3) to 6 + 13 = 19 = 3 * 3 + 10. Computed in float64.
    """
    scale = torch.tensor(scale_K, dtype=torch.float64)
    offset = torch.tensor(offset_K, dtype=torch.float64)
    weight = head.weight.detach().cpu().double() * scale[:, None]
    tensors = {f"{name}.weight": weight.float().contiguous()}
    if head.bias is None:
        return tensors, offset.tolist()
    tensors[f"{name}.bias"] = (head.bias.detach().cpu().double() * scale + offset).float().contiguous()
    return tensors, [0.0] * len(offset_K)


def usable_positions(model: nn.Module, config: Any) -> int | None:
    """Longest input in tokens that the position embeddings allow; None where nothing limits it.

    RoBERTa and its kin count positions from `padding_idx + 1`, so their table holds that many tokens fewer.
    """
    limits = []
    stated = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(stated, int) and stated > 0:
        limits.append(stated)
    for name, module in model.named_modules():
        is_position_table = name.rpartition(".")[2] in ("position_embeddings", "embed_positions", "wpe")
        if is_position_table and isinstance(module, nn.Embedding):
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - reserved)
    return min(limits) if limits else None


def _logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits.double().cpu()
    finally:
        model.train(was_training)


def _close(values: Tensor, expected: Tensor) -> bool:
    scale = float(expected.abs().max())
    return bool((values - expected).abs().max() <= TOLERANCE * scale + 1e-12)
