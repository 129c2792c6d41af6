"""What waiting threads of OpenMP cost, alone on the machine and beside one busy process, by how long they spin.

    python benchmarks/thread_waits.py --rounds 4 [--out FILE]

Updates of the sandbox's smallest model (16 rows of 24 + 60 tokens, forward, backward and AdamW) on all cores. Settings
take turns, each run a process of its own; milliseconds are the median update of each run, then medians (range) of the
runs. Equipoise's command line leaves OpenMP's own setting unless others are at work when it starts
(`equipoise/cli/thread_waits.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from equipoise.cli.thread_waits import FEW, OTHERS, SPINS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SETTINGS: dict[str, dict[str, str]] = {"OpenMP's own": {}, f"{int(FEW):,} spins": {SPINS: FEW}, "none": {SPINS: "0"}}
UNCOUNTED = 5
BUSY = "while True: pass"


def updates(seconds: float) -> float:
    """Median milliseconds of an update in this process."""
    import torch
    from tests.toy import toy_rollout

    from equipoise.config import ModelConfig
    from equipoise.models.policy import load_policy
    from equipoise.rollout.logprobs import completion_logprobs

    policy = load_policy(ModelConfig(model="sandbox/1m"), trainable=True)
    optimizer = torch.optim.AdamW(policy.module.parameters(), fused=True)
    rollout = toy_rollout([24] * 16, [60] * 16, vocabulary=200)
    times: list[float] = []
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(times) <= UNCOUNTED:
        began = time.perf_counter()
        completion_logprobs(policy, rollout).sum().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times[UNCOUNTED:])


def run(setting: dict[str, str], seconds: float) -> float:
    """`updates` in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in (OTHERS, SPINS)}
    command = [sys.executable, __file__, "--worker", "--seconds", str(seconds)]
    done = subprocess.run(command, env={**environment, **setting}, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def measure(rounds: int, seconds: float) -> dict[str, dict[str, list[float]]]:
    """By company and setting, every round's milliseconds."""
    found: dict[str, dict[str, list[float]]] = {}
    for company in ("alone", "beside a busy process"):
        busy = subprocess.Popen([sys.executable, "-c", BUSY]) if company != "alone" else None
        try:
            runs: dict[str, list[float]] = {name: [] for name in SETTINGS}
            for _ in range(rounds):
                for name, setting in SETTINGS.items():
                    runs[name].append(run(setting, seconds))
            found[company] = runs
        finally:
            if busy is not None:
                busy.kill()
                busy.wait()
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [f"| ms an update | {' | '.join(found)} |", f"| --- |{' ---: |' * len(found)}"]
    for name in SETTINGS:
        cells = [
            f"{statistics.median(runs[name]):.0f} ({min(runs[name]):.0f} to {max(runs[name]):.0f})"
            for runs in found.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=4.0, help="of every run")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(updates(given.seconds))
        return
    found = measure(given.rounds, given.seconds)
    print(table(found))
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
