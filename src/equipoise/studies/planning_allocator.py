"""What the C library keeps of memory that tensors gave back: on a CPU it counts towards a process's size.

glibc returns a block at once where it was mapped by itself, which it does from a threshold on that rises with every
such block that is freed, up to 32 MiB; smaller ones stay on the heap. Sizes differ, so the holes between those still
alive do not all fit what comes next. Constants were fitted to eleven runs (docs/planning.md).
"""

from __future__ import annotations

import os
import platform

from equipoise.models.footprint import Batch, Network, Terms, update_terms

SCRATCH = 40.0 * 2**20  # bytes in every phase: what loading left, and libraries' own buffers
KEPT = 0.2  # of an update's activations
KEPT_SAMPLED = 0.6  # of what sampling held before
SAMPLED = ("cache", "weights laid out")
ALWAYS_RETURNED = 2**25  # bytes of a block from which glibc never keeps it
KEPT_TERM = "freed, kept by the C library"


def scratch_terms(*, on_gpu: bool) -> Terms:
    """What is there in every phase beside weights."""
    return {"left by loading, scratch": SCRATCH} if not on_gpu and _glibc_keeps() else {}


def training_terms(
    net: Network,
    batch: Batch,
    passes: int,
    *,
    projects: bool = True,
    on_gpu: bool = False,
    sampled: Terms | None = None,
) -> Terms:
    """`update_terms`, and on a CPU what the C library keeps beside them; `sampled` are the terms of a sampling before.

    None of activations the widest of which, that of the feed-forward layer, is too large to be kept.
    """
    terms = update_terms(net, batch, passes, projects=projects, on_gpu=on_gpu)
    if on_gpu or not _glibc_keeps():
        return terms
    widest = net.product * net.feed_forward * batch.tokens
    kept = KEPT * terms["activations"] if widest < ALWAYS_RETURNED else 0.0
    kept += KEPT_SAMPLED * sum((sampled or {}).get(name, 0.0) for name in SAMPLED)
    return {**terms, KEPT_TERM: kept}


def _glibc_keeps() -> bool:
    """Whether malloc is glibc's with the thresholds that glibc chooses."""
    fixed = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    return platform.libc_ver()[0] == "glibc" and not fixed and "malloc" not in os.environ.get("LD_PRELOAD", "")
