"""What the C library keeps of memory that tensors gave back: on a CPU it counts towards a process's size.

glibc returns a block at once where it was mapped by itself, which it does from a threshold on that rises with every
such block that is freed, up to 32 MiB; smaller ones stay on the heap. Sizes of activations differ, so the holes between
those still alive do not all fit what comes next. Under adapters there are more of them: what a frozen matrix gives is
freed when the adapter's part is added, between small inner values that stay. Shares were measured (docs/planning.md).
"""

from __future__ import annotations

import os
import platform

from equipoise.models.footprint import Batch, Network, Terms, update_terms

KEPT = 0.3  # of an update's activations: 0.2 to 0.4 in eight runs of three sizes
KEPT_ADAPTED = 0.8  # likewise under adapters: 0.82 in one run
KEPT_USUAL = 0.8  # likewise of the blocks by hand: 0.6 and 1.0 in runs of two sizes
ALWAYS_RETURNED = 2**25  # bytes of a block from which glibc never keeps it
KEPT_TERM = "freed, kept by the C library"


def training_terms(net: Network, batch: Batch, passes: int, *, projects: bool = True, on_gpu: bool = False) -> Terms:
    """`update_terms`, and on a CPU what the C library keeps beside them.

    Nothing where the widest activation, that of the feed-forward layer, is too large to be kept.
    """
    terms = update_terms(net, batch, passes, projects=projects, on_gpu=on_gpu)
    widest = net.product * net.feed_forward * batch.tokens
    keeps = not on_gpu and _glibc_keeps() and widest < ALWAYS_RETURNED
    share = KEPT_USUAL if net.usual else KEPT_ADAPTED if net.adapted else KEPT
    return {**terms, KEPT_TERM: share * terms["activations"] if keeps else 0.0}


def _glibc_keeps() -> bool:
    """Whether malloc is glibc's with the thresholds that glibc chooses."""
    fixed = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    return platform.libc_ver()[0] == "glibc" and not fixed and "malloc" not in os.environ.get("LD_PRELOAD", "")
