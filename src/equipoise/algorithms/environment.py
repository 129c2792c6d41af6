"""What a run ran on: versions, hardware, threads, precision, allocator, git; and how many threads it should use."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import platform
import resource
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

from equipoise.kernels.build import described

PACKAGES = (
    "equipoise",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "numpy",
)
ALLOCATOR_SETTINGS = (
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "THP_MEM_ALLOC_ENABLE",
)


def describe_environment() -> dict[str, Any]:
    """Plain JSON types; a fact that cannot be had is null, never guessed."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "core_quota": core_quota(),
        "kernels": "not used on a GPU" if torch.cuda.is_available() else described(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "thread_waits": {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")},
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "allocator": _allocator(),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "git": _git_commit(),
    }


def choose_threads(threads: int | None) -> None:
    """Set the threads of one process: those asked for, else torch's own number, cut down to the quota of the container.

    Torch counts the cores it may run on, not the time it may use on them: more threads than that wait for each other.
    A number in OMP_NUM_THREADS is taken as asked for.
    """
    quota = core_quota()
    if threads is not None:
        torch.set_num_threads(threads)
    elif quota is not None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), max(1, math.ceil(quota))))


def core_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of time that this process's control groups allow; None without a limit, and where there are none.

    Version 2: `cpu.max` of the process's group and of every group above it, "quota period" in microseconds or "max";
    version 1: the two files of a container's own group. Example: "150000 100000" is 1.5 cores.
    """
    found = [_quota(root / "cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    group = root / own.strip("/")
    while True:
        found.append(_quota(group, "cpu.max"))
        if group == root or root not in group.parents:
            break
        group = group.parent
    limits = [quota for quota in found if quota is not None]
    return min(limits) if limits else None


def _quota(group: Path, *files: str) -> float | None:
    try:
        quota, period = " ".join((group / file).read_text(encoding="ascii") for file in files).split()
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except (OSError, ValueError):  # no such group, or no limit: "max"
        return None


def _allocator() -> dict[str, Any]:
    """The C library, whose malloc it is unless another one is preloaded, and what the environment sets of it.

    Nothing is set by Equipoise: docs/planning.md says why.
    """
    names = sorted(name for name in os.environ if name.startswith("MALLOC_") or name in ALLOCATOR_SETTINGS)
    return {
        "c_library": " ".join(platform.libc_ver()).strip() or None,
        "settings": {name: os.environ[name] for name in names},
    }


def peak_rss_mb() -> float:
    """The most memory this process has held, in MiB.

    Not by `getrusage` where Linux says it otherwise: there a process starts with the peak of the one that started it.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 2**10, 1)
    unit = 2**20 if os.uname().sysname == "Darwin" else 2**10  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str | None:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or None


def _git_commit() -> str | None:
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None
