"""environment.json: plain facts, null where one cannot be had."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.algorithms import environment
from equipoise.algorithms.environment import PACKAGES, describe_environment


def test_facts_of_this_machine() -> None:
    facts = describe_environment()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["versions"]["python"] == platform.python_version()
    for name in PACKAGES:
        assert facts["versions"][name] == importlib.metadata.version(name)
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cores"] == os.cpu_count()
    total = int(next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line).split()[1])
    assert facts["memory_gib"] == round(total / 2**20, 1)
    assert facts["float32_matmul_precision"] == torch.get_float32_matmul_precision() == "highest"


def test_the_allocator_is_named_with_what_the_environment_sets_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        os, "environ", {"MALLOC_ARENA_MAX": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "HOME": "/"}
    )
    assert describe_environment()["allocator"] == {
        "c_library": " ".join(platform.libc_ver()).strip() or None,
        "settings": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "MALLOC_ARENA_MAX": "1"},
    }


@pytest.mark.parametrize(
    ("files", "membership", "expected"),
    [
        ({}, "", None),
        ({"cpu.max": "max 100000"}, "0::/", None),
        ({"cpu.max": "150000 100000"}, "0::/", 1.5),
        ({"cpu.max": "800000 100000", "a/b/cpu.max": "max 100000", "a/cpu.max": "200000 50000"}, "0::/a/b", 4.0),
        ({"a/cpu.max": "100000 100000"}, "0::/other", None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "1:cpu:/", 3.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "1:cpu:/", None),
        ({"cpu.max": "broken"}, "0::/../..", None),
    ],
)
def test_the_quota_of_a_container(
    files: dict[str, str], membership: str, expected: float | None, tmp_path: Path
) -> None:
    """The smallest limit of the process's group and those above it counts."""
    root, own = tmp_path / "cgroup", tmp_path / "self"
    own.write_text(membership)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    assert environment.core_quota(root, own) == expected


@pytest.mark.parametrize(
    ("asked", "quota", "variables", "expected"),
    [
        (3, 1.0, {}, 3),  # a recipe that says so
        (None, None, {}, 8),
        (None, 2.5, {}, 3),
        (None, 0.5, {}, 1),
        (None, 16.0, {}, 8),
        (None, 2.0, {"OMP_NUM_THREADS": "8"}, 8),
    ],
)
def test_threads_are_cut_down_to_the_quota(
    asked: int | None, quota: float | None, variables: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [8]
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(environment, "core_quota", lambda: quota)
    monkeypatch.setattr(os, "environ", variables)
    environment.choose_threads(asked)
    assert chosen[-1] == expected


def test_what_cannot_be_had_is_null(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    def no_package(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    def no_git(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("git")

    assert describe_environment()["git"] is None  # no repository here
    monkeypatch.setattr(importlib.metadata, "version", no_package)
    monkeypatch.setattr(subprocess, "run", no_git)
    facts = describe_environment()
    assert facts["git"] is None
    assert set(facts["versions"].values()) == {platform.python_version(), None}


def test_the_commit_of_the_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = (tmp_path / ".git" / (tmp_path / ".git" / "HEAD").read_text().split()[1]).read_text().strip()
    assert environment._git_commit() == head


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells it")
def test_the_peak_is_this_process_s_and_not_its_parent_s() -> None:
    """Linux starts `ru_maxrss` of a new process at what its parent held when it was forked."""
    held = bytearray(b"x") * (3 * 2**29)  # 1.5 GiB
    code = "from equipoise.algorithms.environment import peak_rss_mb; print(peak_rss_mb())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 100 < float(done.stdout) < len(held) / 2**20
