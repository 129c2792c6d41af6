"""The memory benchmark sees what malloc gives out, and steps that hold no more than the one before."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.grpo_step_world import PHASES
from benchmarks.step_memory import malloc_in_use

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "step_memory.py"
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallinfo2 is glibc's")


def test_in_use_follows_a_tensor() -> None:
    before = malloc_in_use()
    held = torch.zeros(4 * 2**20)
    assert malloc_in_use() - before == pytest.approx(16, abs=1)
    del held
    assert malloc_in_use() - before == pytest.approx(0, abs=1)


def test_phases_and_steps_of_a_tiny_model(tmp_path: Path) -> None:
    """In a process of its own: the stopwatch wraps functions of torch for good."""
    out = tmp_path / "out.json"
    command = [sys.executable, str(SCRIPT), "--shape", "tiny", "--steps", "3", "--threads", "1", "--out", str(out)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result = json.loads(out.read_text())
    assert len(result["steps"]) == 3 and set(result["phases"]) <= {*PHASES, "other"}
    in_use = [step["in_use_mib"] for step in result["steps"]]
    assert max(in_use) - min(in_use) < 2 and all(s["resident_mib"] > s["in_use_mib"] for s in result["steps"])
    assert printed.count("\n") == 2 + len(result["phases"]) + 3
