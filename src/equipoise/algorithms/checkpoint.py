"""Checkpoints: whole or absent, checksummed, and never loaded in part.

A checkpoint is a directory `step_000123/` with `state.safetensors`, `state.json` and `manifest.json` (SHA-256 and size
of the other two). It is written under a temporary name, flushed to disk and renamed, so a reader sees all of it or
nothing, whatever moment the process dies at.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from equipoise.errors import CheckpointError

_STEP = re.compile(r"^step_(\d{6,})$")
_TEMPORARY = ".tmp-"
TENSORS, VALUES, MANIFEST = "state.safetensors", "state.json", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after `step` completed steps: tensors by name, and JSON values."""

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


def step_name(step: int) -> str:
    """`step_000123`: sorts as text."""
    return f"step_{step:06d}"


def saved_steps(directory: Path) -> list[int]:
    """Steps with a checkpoint in this directory, ascending; temporary ones do not count."""
    if not directory.is_dir():
        return []
    return sorted(int(match[1]) for entry in directory.iterdir() if (match := _STEP.match(entry.name)))


def save_checkpoint(directory: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint and remove all but the newest `keep`.

    Raises CheckpointError where the disk does not take it; what was saved before stays as it was.
    """
    target = directory / step_name(checkpoint.step)
    temporary = directory / f"{_TEMPORARY}{target.name}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
        save_file(tensors, temporary / TENSORS)
        values = {"step": checkpoint.step, **checkpoint.values}
        (temporary / VALUES).write_text(json.dumps(values, allow_nan=False))
        manifest = {name: _fingerprint(temporary / name) for name in (TENSORS, VALUES)}
        (temporary / MANIFEST).write_text(json.dumps(manifest))
        for name in (TENSORS, VALUES, MANIFEST):
            flush_to_disk(temporary / name)
        flush_to_disk(temporary)
        if target.exists():  # the same step again, after its directory was found unusable and training replayed
            shutil.rmtree(target)
        os.replace(temporary, target)
        flush_to_disk(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = saved_steps(directory)
        last = f"the last good checkpoint is {directory / step_name(kept[-1])}" if kept else "none was saved before"
        raise CheckpointError(
            f"{target}: could not save: {error}; {last}. Free space and run again with --resume"
        ) from error
    for step in saved_steps(directory)[:-keep]:
        shutil.rmtree(directory / step_name(step))
    return target


def load_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest checkpoint, verified; None where there is none.

    Raises CheckpointError naming the file that does not match its checksum. Falling back to an older one silently
    would hide a failing disk: the message says how to do it by hand.
    """
    steps = saved_steps(directory)
    if not steps:
        return None
    path = directory / step_name(steps[-1])
    mend = f"delete {path} to resume from " + (f"step {steps[-2]}" if len(steps) > 1 else "the start")
    try:
        manifest = _read_manifest(path / MANIFEST, mend)
        for name in (TENSORS, VALUES):
            if _fingerprint(path / name) != manifest[name]:
                raise CheckpointError(f"{path / name}: does not match its checksum; {mend}")
        values = json.loads((path / VALUES).read_text())
        return Checkpoint(step=values.pop("step"), tensors=load_file(path / TENSORS), values=values)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}); {mend}") from error


def _read_manifest(path: Path, mend: str) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
        return {name: manifest[name] for name in (TENSORS, VALUES)}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}); {mend}") from error


def remove_leftovers(directory: Path) -> None:
    """Delete what a process that died while saving left under temporary names."""
    if directory.is_dir():
        for entry in directory.iterdir():
            if entry.name.startswith(_TEMPORARY):
                shutil.rmtree(entry, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    """fsync a file or directory, so that a rename never points at data that is not there yet."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}
