"""Members of a reward model: several linear heads on one backbone, and the file that keeps them.

Suffixes: B responses, M members, K aspects, H width of the features under the heads. The head is the layer the outputs
are proportional to (`find_head`), so the mean of the members' outputs is the output of the members' mean weights:
that mean is the head a saved model carries, and what plain `transformers` computes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from equipoise.errors import CheckpointError

ENSEMBLE_FILE = "ensemble.safetensors"
FORMAT_VERSION = 1
METADATA = "equipoise"  # one key: safetensors writes several in any order, and equal runs leave equal files
TOLERANCE = 1e-5  # of the largest weight; averages of the same float32 numbers agree to 1e-7

Members = dict[str, Tensor]  # `weight` [M, K, H] and, where the head has one, `bias` [M, K]


def fresh_members(head: nn.Linear, seeds: Sequence[int], std: float) -> Members:
    """A head of K outputs for each seed: weights ~ N(0, std), bias 0; each a function of its own seed alone."""
    drawn = [
        torch.empty(head.weight.shape).normal_(std=std, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    ]
    members = {"weight": torch.stack(drawn)}
    if head.bias is not None:
        members["bias"] = torch.zeros(len(seeds), head.out_features)
    return members


def wide_head(members: Members) -> nn.Linear:
    """One linear layer of M*K outputs, a member's K after another's: all members for the price of a wider product."""
    num_members, num_aspects, width = members["weight"].shape
    layer = nn.Linear(width, num_members * num_aspects, bias="bias" in members)
    with torch.no_grad():
        layer.weight.copy_(members["weight"].flatten(0, 1))
        if layer.bias is not None:
            layer.bias.copy_(members["bias"].flatten())
    return layer


def split_heads(tensors: dict[str, Tensor], num_members: int) -> Members:
    """The inverse of `wide_head`, from the layer's tensors by their last name (`weight`, `bias`)."""
    return {
        name.rpartition(".")[2]: tensor.unflatten(0, (num_members, -1)).contiguous() for name, tensor in tensors.items()
    }


def mean_head(members: Members) -> dict[str, Tensor]:
    """The members' mean, in float64 before it is rounded: `weight` [K, H] and `bias` [K].

    Example: members of weight 1 and 3 give 2; on the feature 5 the members' outputs are 5 and 15, mean 10 = 2 * 5.
    """
    return {name: tensor.double().mean(dim=0).float() for name, tensor in members.items()}


def mean_and_std(values_BMK: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased (M - 1) standard deviation over the members, each [B, K] in the dtype given; computed in
    float64, so that a large level does not hide a small disagreement.

    Unbiased, so that the level does not depend on the number of members: kappa and thresholds keep their meaning.

    Example: members 1, 2, 3: mean 2, std sqrt((1 + 0 + 1) / 2) = 1.
    """
    wide_BMK = values_BMK.double()
    mean_B1K = wide_BMK.mean(dim=1, keepdim=True)
    variance_BK = (wide_BMK - mean_B1K).square().sum(dim=1) / (values_BMK.shape[1] - 1)
    return mean_B1K.squeeze(1).to(values_BMK.dtype), variance_BK.sqrt().to(values_BMK.dtype)


def write_members(directory: Path, members: Members, aspects: Sequence[str]) -> None:
    """ensemble.safetensors: float32 members in native units, and the names of the aspects."""
    metadata = {METADATA: json.dumps({"format_version": FORMAT_VERSION, "aspects": list(aspects)})}
    save_file({name: tensor.contiguous() for name, tensor in members.items()}, directory / ENSEMBLE_FILE, metadata)


def read_members(directory: Path, aspects: Sequence[str], num_members: int, head: nn.Linear) -> Members:
    """Members that `write_members` wrote beside this head.

    Raises CheckpointError naming the file where it is missing or broken, has another number of members, other aspects,
    another shape, a number that is not finite, or a mean that is not the head: then the two were not saved together.
    """
    path = directory / ENSEMBLE_FILE
    mend = "save the reward model again, or train it again"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, and the model has {num_members} members; copy it too, or {mend}")
    try:
        with safe_open(path, framework="pt") as file:
            stored = json.loads((file.metadata() or {}).get(METADATA, "{}")).get("aspects")
            members = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; {mend}") from error
    if stored != list(aspects):
        raise CheckpointError(f"{path}: its aspects are {stored} and the model's {list(aspects)}; {mend}")
    _check_tensors(path, members, num_members, head, mend)
    return members


def _check_tensors(path: Path, members: Members, num_members: int, head: nn.Linear, mend: str) -> None:
    own = {"weight": head.weight} | ({"bias": head.bias} if head.bias is not None else {})
    expected = {name: (num_members, *tensor.shape) for name, tensor in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in members.items()}
    if found != expected:
        raise CheckpointError(f"{path}: holds {found}; expected {expected}; {mend}")
    averaged = mean_head(members)
    for name, tensor in members.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} holds numbers that are not finite; {mend}")
        difference = float((averaged[name] - own[name].detach().cpu()).abs().max())
        if difference > TOLERANCE * float(tensor.abs().max()):
            raise CheckpointError(
                f"{path}: the mean of the members' {name} differs from the model's head by {difference:.3g}; "
                f"the two were not saved together: {mend}"
            )
