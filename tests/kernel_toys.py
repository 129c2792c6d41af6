"""What tests of the compiled kernels share: numbers around a tensor that must not be touched, threads, no compiler."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from equipoise.kernels.build import COMPILERS, SWITCH

HAS_COMPILER = platform.system() == "Linux" and any(shutil.which(name) for name in COMPILERS)
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason=f"no C compiler ({' or '.join(COMPILERS)}) on the PATH")
needs_kernels = pytest.mark.skipif(
    not HAS_COMPILER or os.environ.get(SWITCH) == "off", reason="no C compiler on the PATH, or kernels switched off"
)
GUARD = 64  # numbers on either side


def guarded(values: Tensor) -> Tensor:
    """A contiguous copy with NaN before and behind it, or integers that no index survives."""
    wall = float("nan") if values.is_floating_point() else 2**30
    buffer = values.new_full((values.numel() + 2 * GUARD,), wall)
    inner = buffer[GUARD : GUARD + values.numel()].view(values.shape)
    return inner.copy_(values)


def untouched(inner: Tensor) -> bool:
    """Whether what `guarded` put around is still there."""
    whole = inner.as_strided((inner.numel() + 2 * GUARD,), (1,), inner.storage_offset() - GUARD)
    walls = torch.cat([whole[:GUARD], whole[-GUARD:]])
    return bool((walls.isnan() if walls.is_floating_point() else walls == 2**30).all())


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Bit for bit, NaN and signs of zero too."""
    kind = torch.int16 if found.element_size() == 2 else torch.int32
    return found.dtype == expected.dtype and torch.equal(found.view(kind), expected.view(kind))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for torch, and for kernels with it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
