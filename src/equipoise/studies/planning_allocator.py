"""What the C library keeps of memory that tensors gave back: on a CPU it counts towards a process's size.

glibc returns a block at once where it was mapped by itself, which it does from a threshold on that rises with every
such block that is freed, up to 32 MiB; smaller ones stay on the heap. Sizes of activations differ, so the holes between
those still alive do not all fit what comes next.
"""

from __future__ import annotations

import os
import platform

from equipoise.models.footprint import Batch, Network, Terms, update_terms

KEPT = 0.3  # of an update's activations; measured: 0.21 to 0.39 (docs/planning.md)
ALWAYS_RETURNED = 2**25  # bytes of a block from which glibc never keeps it
KEPT_TERM = "freed, kept by the C library"


def training_terms(net: Network, batch: Batch, passes: int, *, projects: bool = True, on_gpu: bool = False) -> Terms:
    """`update_terms`, and on a CPU what the C library keeps beside them.

    Nothing where the widest activation, that of the feed-forward layer, is too large to be kept.
    """
    terms = update_terms(net, batch, passes, projects=projects, on_gpu=on_gpu)
    widest = net.product * net.feed_forward * batch.tokens
    keeps = not on_gpu and _glibc_keeps() and widest < ALWAYS_RETURNED
    return {**terms, KEPT_TERM: KEPT * terms["activations"] if keeps else 0.0}


def _glibc_keeps() -> bool:
    """Whether malloc is glibc's with the thresholds that glibc chooses."""
    fixed = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    return platform.libc_ver()[0] == "glibc" and not fixed and "malloc" not in os.environ.get("LD_PRELOAD", "")
