"""environment.json: plain facts, null where one cannot be had."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
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
