"""Checkpoints: whole or absent, verified, the newest kept."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.algorithms import checkpoint as module
from equipoise.algorithms.checkpoint import (
    Checkpoint,
    load_checkpoint,
    remove_leftovers,
    save_checkpoint,
    saved_steps,
)
from equipoise.errors import CheckpointError


def state(step: int) -> Checkpoint:
    """Something of every kind that is saved."""
    tensors = {
        "matrix": torch.randn(3, 4, generator=torch.Generator().manual_seed(step)),
        "scalar": torch.tensor(float(step)),
        "view": torch.arange(12.0).view(3, 4).t(),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "count": torch.tensor([step], dtype=torch.int64),
        "empty": torch.zeros(0, 3),
    }
    return Checkpoint(step, tensors, {"loss": 0.1 + 0.2, "names": ["a", "ü"], "none": None})


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    saved = state(3)
    assert save_checkpoint(tmp_path / "c", saved, keep=2) == tmp_path / "c" / "step_000003"
    loaded = load_checkpoint(tmp_path / "c")
    assert loaded is not None
    assert (loaded.step, loaded.values) == (3, saved.values)
    assert loaded.tensors.keys() == saved.tensors.keys()
    for name, tensor in saved.tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)


def test_nothing_there(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "none") is None
    assert saved_steps(tmp_path / "none") == []
    assert load_checkpoint(tmp_path) is None


def test_the_newest_are_kept_and_loaded(tmp_path: Path) -> None:
    for step in (1, 2, 10, 1_000_000):
        save_checkpoint(tmp_path, state(step), keep=2)
    assert saved_steps(tmp_path) == [10, 1_000_000]
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded.step == 1_000_000
    save_checkpoint(tmp_path, state(1_000_001), keep=1)
    assert saved_steps(tmp_path) == [1_000_001]


def test_other_entries_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / ".tmp-step_000005").mkdir()
    (tmp_path / "step_5").mkdir()
    save_checkpoint(tmp_path, state(1), keep=1)
    assert saved_steps(tmp_path) == [1]
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step_000001", "step_5"]


def test_a_step_saved_again_replaces(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1), keep=2)
    other = Checkpoint(1, {"x": torch.ones(1)}, {"again": True})
    save_checkpoint(tmp_path, other, keep=2)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded.values == {"again": True}


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "empty"])
def test_damage_is_found_and_the_file_named(name: str, damage: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1), keep=3)
    save_checkpoint(tmp_path, state(2), keep=3)
    file = tmp_path / "step_000002" / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
    elif damage == "cut":
        content = content[:-7]
    elif damage == "empty":
        content.clear()
    file.write_bytes(content)
    if damage == "remove":
        file.unlink()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path)
    message = str(caught.value)
    # A bit of the manifest itself may turn up as a checksum that does not match.
    assert str(file) in message or (name == "manifest.json" and damage == "flip")
    assert f"delete {tmp_path / 'step_000002'} to resume from step 1" in message
    shutil.rmtree(tmp_path / "step_000002")
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded.step == 1


@pytest.mark.parametrize("content", ["[]", "3", '{"state.json": 1}', "{}"])
def test_a_manifest_of_something_else(content: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1), keep=1)
    (tmp_path / "step_000001" / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be read .*to resume from the start"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("call", ["save_file", "flush_to_disk", "_fingerprint"])
def test_a_failing_disk_keeps_the_last_good_one(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, state(1), keep=1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, call, full)
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(tmp_path, state(2), keep=1)
    assert "No space left on device; the last good checkpoint is" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded.step == 1


def test_nothing_saved_before_is_said_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "save_file", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(CheckpointError, match="none was saved before"):
        save_checkpoint(tmp_path, state(1), keep=1)


def test_a_write_that_really_fails(tmp_path: Path) -> None:
    """A limit on the size of files stops a write in its middle, as a full disk does."""
    save_checkpoint(tmp_path, state(1), keep=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(CheckpointError, match=r"step_000002: could not save: .*last good checkpoint is"):
            save_checkpoint(tmp_path, Checkpoint(2, {"x": torch.zeros(200_000)}, {}), keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded.step == 1


def test_values_that_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    """NaN would be written as something no JSON reader takes."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_checkpoint(tmp_path, Checkpoint(1, {}, {"x": float("nan")}), keep=1)
    assert saved_steps(tmp_path) == []


def test_the_manifest_names_size_and_digest(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, Checkpoint(7, {}, {"a": 1}), keep=1)
    assert (path / "state.json").read_text() == '{"step": 7, "a": 1}'
    manifest = json.loads((path / "manifest.json").read_text())
    # sha256 of those 19 bytes, from sha256sum
    assert manifest["state.json"] == {
        "sha256": "913f98c07a31aba15fb4f5d32f9cf50a9e53b1e97b32aac9b1080af881f1491f",
        "bytes": 19,
    }
