"""What tests of training runs share: recipes on disk, training in this process, comparison of run directories."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from equipoise.algorithms.run import Interrupted, Run
from tests.dpo_toys import dpo_values, write_pairs
from tests.toy import (
    grpo_values,
    reward_values,
    sft_values,
    toy_policy_directory,
    write_demonstrations,
    write_prompts,
    write_scored,
)

OF_THE_CLOCK = ("wall_s", "generate_s", "score_s", "update_s", "cpu_s", "peak_rss_mb")
LORA = {"r": 2, "alpha": 4}


class World:
    """A model and data of every kind in one directory, and recipes over them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model = toy_policy_directory(directory / "base")
        self.prompts = write_prompts(directory / "prompts.jsonl")
        self.demonstrations = write_demonstrations(directory / "demonstrations.jsonl")
        self.scored = write_scored(directory / "scored.jsonl")
        self.pairs = write_pairs(directory / "pairs.jsonl")

    def recipe(self, name: str, values: dict[str, Any]) -> Path:
        """Write a recipe file."""
        path = self.directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return path

    def grpo(self, name: str = "grpo", *, lora: bool = False, **changes: Any) -> Path:
        """A GRPO recipe file of one thread."""
        policy = {"model": str(self.model)} | ({"lora": LORA} if lora else {})
        return self.recipe(name, grpo_values(self.model, self.prompts, threads=1, **{"policy": policy} | changes))

    def sft(self, name: str = "sft", *, lora: bool = False, **changes: Any) -> Path:
        """An SFT recipe file of one thread."""
        policy = {"model": str(self.model)} | ({"lora": LORA} if lora else {})
        return self.recipe(name, sft_values(self.model, self.demonstrations, threads=1, **{"policy": policy} | changes))

    def dpo(self, name: str = "dpo", *, lora: bool = False, **changes: Any) -> Path:
        """A DPO recipe file of one thread."""
        policy = {"model": str(self.model)} | ({"lora": LORA} if lora else {})
        return self.recipe(name, dpo_values(self.model, self.pairs, threads=1, **{"policy": policy} | changes))

    def reward(self, name: str = "reward", **changes: Any) -> Path:
        """A reward recipe file of one thread."""
        return self.recipe(name, reward_values(self.model, self.scored, threads=1, **changes))


def train(recipe: Path, out: Path, *overrides: str, resume: bool = False) -> None:
    """`equipoise train`, in this process."""
    from equipoise.cli.train import train_recipe

    train_recipe(recipe, list(overrides), out, resume)


class Crash(Exception):
    """The process is gone, as far as the run directory can tell."""


def train_until_crash(recipe: Path, out: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies after it has logged `step`."""
    log = Run.log

    def dies(run: Run, at: int, values: dict[str, Any]) -> dict[str, Any]:
        line = log(run, at, values)
        if at == step:
            raise Crash
        return line

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", dies)
        with pytest.raises(Crash):
            train(recipe, out)


def train_until_signal(
    recipe: Path, out: Path, step: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch, match: str | None
) -> Interrupted:
    """A run that gets a signal while it logs `step`; what it ended with, whose message matches."""
    log = Run.log

    def signals(run: Run, at: int, values: dict[str, Any]) -> dict[str, Any]:
        if at == step:
            os.kill(os.getpid(), number)
        return log(run, at, values)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", signals)
        with pytest.raises(Interrupted, match=match) as caught:
            train(recipe, out)
    return caught.value


def metrics(out: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; one that is just being written does not count."""
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def fingerprint(out: Path) -> dict[str, str]:
    """Every file of a run directory with a digest of its content; what the clock alone decides is left out."""
    result = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.suffix != ".png":  # a plot carries no more than the report beside it
            name = str(path.relative_to(out))
            if name != "environment.json" and path.name != "manifest.json":
                result[name] = hashlib.sha256(_content(path)).hexdigest()
    return result


def _content(path: Path) -> bytes:
    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]
        return json.dumps(kept).encode()
    if path.name == "cost.json":
        return json.dumps(_without_clock(json.loads(path.read_text()))).encode()
    if path.name == "state.json":
        values = json.loads(path.read_text())
        return json.dumps({**values, "cost": _without_clock(values["cost"])}).encode()
    return path.read_bytes()


def _without_clock(cost: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in cost.items() if key not in OF_THE_CLOCK}


def differences(out: Path, other: Path) -> list[str]:
    """Names of files that one has and the other has not, or that differ; empty where the runs are equal."""
    mine, theirs = fingerprint(out), fingerprint(other)
    return sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
