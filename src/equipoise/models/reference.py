"""The distribution a policy is held close to: adapter off, a frozen copy of an adapter, or a frozen model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from equipoise.models.policy_module import UNFIT, PolicyModule


class Reference(Protocol):
    """Something that makes a module compute the reference's distribution while its context is open."""

    description: str

    def active(self) -> Any:
        """A context manager; yields the PolicyModule to call, without gradients."""
        ...


class AdapterOff:
    """The base model under a fresh LoRA adapter: costs no memory."""

    description = "adapter switched off"

    def __init__(self, module: PolicyModule) -> None:
        self._module = module

    @contextmanager
    def active(self) -> Iterator[PolicyModule]:
        """The policy's module with its adapter disabled."""
        with self._module.model.disable_adapter(), torch.no_grad():  # type: ignore[operator]
            yield self._module


class FrozenAdapter:
    """A copy of the adapter that training continues from; switching it off would be another policy."""

    description = "frozen copy of the adapter"

    def __init__(self, module: PolicyModule) -> None:
        self._module = module
        self._parameters = [p for p in module.model.parameters() if p.requires_grad]
        self._frozen = [p.detach().clone() for p in self._parameters]

    @contextmanager
    def active(self) -> Iterator[PolicyModule]:
        """The policy's module with the copied adapter in place; the trained one is back on exit."""
        trained: list[Tensor] = [parameter.data for parameter in self._parameters]
        try:
            for index, parameter in enumerate(self._parameters):
                self._frozen[index] = self._frozen[index].to(parameter.device)  # accelerate may have moved the policy
                parameter.data = self._frozen[index]
            with torch.no_grad():
                yield self._module
        finally:
            for parameter, data in zip(self._parameters, trained, strict=True):
                parameter.data = data


class FrozenModel:
    """A second copy of the weights, for full fine-tuning.

    Under autocast a linear layer's weights are rounded to bfloat16 whenever it is called. The copy keeps them rounded:
    half of the memory, the same numbers; where a probe's logits are not the same to the bit, it keeps them as they are.
    """

    description = "frozen copy of the model"

    def __init__(self, module: PolicyModule) -> None:
        self._policy = module
        self._module = _frozen(module, _rounded_products(module))
        if module.autocast and not _same_logits(module, self._module):
            del self._module  # not both at once
            self._module = _frozen(module, {})

    @contextmanager
    def active(self) -> Iterator[PolicyModule]:
        """The frozen module, where the policy is: accelerate may have moved that since."""
        self._module.to(next(self._policy.parameters()).device)
        with torch.no_grad():
            yield self._module


def _frozen(module: PolicyModule, instead: dict[int, nn.Parameter]) -> PolicyModule:
    """A copy of the module, its parameters replaced by those of `instead` (by their id)."""
    found = copy.deepcopy(module, dict(instead))
    found.requires_grad_(False)
    return found.eval()


def _rounded_products(module: PolicyModule) -> dict[int, nn.Parameter]:
    """By their id, the weights that autocast rounds at every call, rounded."""
    weights = linear_weights(module.causal) if module.autocast else []
    return {
        id(weight): nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)
        for weight in weights
        if weight.dtype == torch.float32
    }


def linear_weights(causal: Any) -> list[nn.Parameter]:
    """Weights that nothing but a linear layer reads. A tied embedding is looked up as it is; a bias is small, and some
    layers read it themselves."""
    linear: dict[nn.Parameter, None] = {}
    others: set[nn.Parameter] = set()
    for part in causal.modules():
        if type(part) is nn.Linear:
            linear[cast(nn.Parameter, part.weight)] = None
        else:
            others |= set(part.parameters(recurse=False))
    return [weight for weight in linear if weight not in others]


def _same_logits(module: PolicyModule, frozen: PolicyModule) -> bool:
    """Whether both give the same logits on a probe, bit by bit. A layer may read its weights in a way of its own."""
    table = module.causal.get_input_embeddings().weight
    if table.device.type == "meta":
        return True
    ids = torch.arange(3, 9, device=table.device).remainder(len(table))[None]
    found = []
    try:
        for part in (module, frozen):
            with part.inference():
                found.append(part.causal(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits)
        return torch.equal(*found)
    except UNFIT:  # of logits that differ in their type too
        return False
