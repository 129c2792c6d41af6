"""A small version of benchmarks/kill_test.py: runs killed with SIGKILL, resumed, and compared bit by bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_killed_runs_end_bitwise_equal() -> None:
    """Three random moments, and one inside every phase of saving. In its own process: it forks, so it must have no
    threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "benchmarks/kill_test.py", "--kills", "3", "--quick"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("0 differ from the unbroken run")
    assert done.stdout.count(": equal\n") >= 3 + 30
