"""Tensors are freed when their last user lets go: none waits in a ring of references for Python's collector.

A ring around a batch's cache once kept 37 MiB of every step of a small model for several steps; memory grew and fell
again, and no test saw it. Here the collector is off, and whatever it would have found is looked at.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.run_toys import World, train
from tests.toy import toy_policy_directory

from equipoise.algorithms.steps import Updater
from equipoise.config import SamplingConfig
from equipoise.models.policy import load_policy, make_reference
from equipoise.rollout.logprobs import completion_logprobs
from equipoise.rollout.sampler import generate


@contextmanager
def without_collector() -> Iterator[list[Any]]:
    """The collector off; afterwards the list holds what only rings of references kept alive."""
    found: list[Any] = []
    gc.collect()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found += gc.garbage
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def tensors(objects: list[Any]) -> list[tuple[int, ...]]:
    return [tuple(part.shape) for part in objects if isinstance(part, torch.Tensor)]


def test_a_ring_is_found() -> None:
    with without_collector() as found:
        ring: list[Any] = [torch.zeros(3)]
        ring.append(ring)
        del ring
    assert tensors(found) == [(3,)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mamba"], ids=["own step", "own layers", "plain loop"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_sampling_and_scoring(tmp_path: Path, architecture: str, precision: str) -> None:
    policy = load_policy(toy_policy_directory(tmp_path / "m", architecture=architecture), trainable=True)
    policy.module.autocast = precision == "bfloat16"
    policy.reference = make_reference(policy)
    prompts = ["please help", "thanks", "first mix the flour"]

    def work() -> None:
        rollout = generate(policy, prompts, 3, SamplingConfig(max_tokens=6), rows_at_once=6)
        completion_logprobs(policy.reference, rollout)
        completion_logprobs(policy, rollout).sum().backward()

    work()  # the first call of some functions leaves caches behind
    with without_collector() as found:
        work()
    assert tensors(found) == []


RECIPES: dict[str, Callable[[World], Path]] = {
    "grpo": lambda world: world.grpo(num_steps=4),
    "grpo, adapters": lambda world: world.grpo(num_steps=4, lora=True),
    "sft": lambda world: world.sft(),
    "dpo": lambda world: world.dpo(),
    "reward": lambda world: world.reward(),
}


@pytest.mark.parametrize("make", RECIPES.values(), ids=RECIPES)
def test_steps(tmp_path: Path, make: Callable[[World], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the end of the second update to the end of the fourth."""
    inner, seen, context = Updater.step, 0, without_collector()
    found: list[Any] = []

    def step(self: Updater, losses: Any) -> Any:
        nonlocal found, seen
        result = inner(self, losses)
        seen += 1
        if seen == 2:
            found = context.__enter__()
        elif seen == 4:
            context.__exit__(None, None, None)
        return result

    monkeypatch.setattr(Updater, "step", step)
    train(make(World(tmp_path)), tmp_path / "run")
    assert seen >= 4 and tensors(found) == []
