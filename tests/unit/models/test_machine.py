"""Memory that a process may use."""

from __future__ import annotations

import math
import os
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
