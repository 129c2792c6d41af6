"""What the machine has."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
from pathlib import Path

LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def give_back_memory() -> None:
    """Hand what was freed back to the system, which the C library keeps for later; nothing where it is not glibc.

    Worth its time where a process waits for others that need the memory, not between two steps.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # no such library, or no such function in it
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def memory_bytes() -> float:
    """Memory that this process may use, at most: the machine's or the container's; infinite where nothing says."""
    found = [math.inf]
    if hasattr(os, "sysconf"):
        found.append(float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE"))
    for file in LIMITS:
        try:
            text = file.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():  # "max" where there is no limit
            found.append(float(text))
    return min(found)
