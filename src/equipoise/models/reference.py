"""The distribution a policy is held close to: adapter off, a frozen copy of an adapter, or a frozen model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from equipoise.models.policy_module import PolicyModule


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
    """A second copy of the weights, for full fine-tuning."""

    description = "frozen copy of the model"

    def __init__(self, module: PolicyModule) -> None:
        self._policy = module
        self._module: PolicyModule = copy.deepcopy(module)
        self._module.requires_grad_(False)
        self._module.eval()

    @contextmanager
    def active(self) -> Iterator[PolicyModule]:
        """The frozen module, where the policy is: accelerate may have moved that since."""
        self._module.to(next(self._policy.parameters()).device)
        with torch.no_grad():
            yield self._module
