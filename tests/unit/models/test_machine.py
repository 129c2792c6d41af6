"""Memory that a process may use."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

import pytest

from equipoise.models import machine


def test_the_containers_limit_counts_where_it_is_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "LIMITS", (limit, tmp_path / "absent"))
    whole = machine.memory_bytes()
    assert 2**20 < whole < math.inf
    limit.write_text("max\n")
    assert machine.memory_bytes() == whole
    limit.write_text(f"{2**40 * 2**20}\n")
    assert machine.memory_bytes() == whole
    limit.write_text("1048576\n")
    assert machine.memory_bytes() == 2**20


def test_nothing_known_is_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LIMITS", (tmp_path / "absent",))
    monkeypatch.delattr(os, "sysconf")
    assert machine.memory_bytes() == math.inf


def test_freed_memory_goes_back_to_the_system() -> None:
    """Blocks too small to be mapped apart, of which the last one is kept: glibc would hold on to those below it."""

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").is_file() or platform.libc_ver()[0] != "glibc":
        pytest.skip("not Linux with glibc")
    blocks = [bytes(60_000) + bytes([n % 256]) for n in range(4000)]  # 240 MB
    kept = blocks[-1]
    before = resident()
    blocks.clear()
    machine.give_back_memory()
    assert before - resident() > 100e6 and kept


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(machine.ctypes, "CDLL", missing)
    machine.give_back_memory()
