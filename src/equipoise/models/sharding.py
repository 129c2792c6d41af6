"""Sharded weights (FSDP2): what needs them whole, between collective passes, opens `whole_weights` around itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(module: nn.Module) -> bool:
    """True where FSDP2 has split the parameters of a module over processes."""
    return isinstance(module, FSDPModule)


def gathered_state(module: nn.Module) -> dict[str, Tensor] | None:
    """The whole state of a sharded module on the CPU, tied tensors as one; None for any other. Collective."""
    if not is_sharded(module):
        return None
    state = module.state_dict()
    whole: dict[int, Tensor] = {}
    for tensor in state.values():
        if id(tensor) not in whole:
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            whole[id(tensor)] = full.detach().cpu()
    return {name: whole[id(tensor)] for name, tensor in state.items()}


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Every parameter is a plain, whole tensor inside; nothing happens to a module that is not sharded.

    Processes decode different numbers of tokens, so a forward pass inside must not communicate: the weights stay
    gathered until the end, which costs every process the memory of the whole model meanwhile. Collective on entry.
    """
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)
