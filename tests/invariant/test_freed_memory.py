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

PROMPTS = ["please help", "thanks", "first mix the flour"]


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


def held(objects: list[Any]) -> list[Any]:
    """Shapes of tensors, and names of nodes of a graph, whose saved tensors Python does not see."""
    shapes = [tuple(part.shape) for part in objects if isinstance(part, torch.Tensor)]
    return shapes + [type(part).__name__ for part in objects if isinstance(part, torch._C._FunctionBase)]


class Kept(torch.autograd.Function):
    """A node with itself in a list of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.ring = [ctx]
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2


def test_a_ring_through_a_graph_is_found() -> None:
    with without_collector() as found:
        Kept.apply(torch.zeros(3, requires_grad=True))
    assert held(found) == ["KeptBackward"]
    found.clear()


def test_a_ring_is_found() -> None:
    with without_collector() as found:
        ring: list[Any] = [torch.zeros(3)]
        ring.append(ring)
        del ring
    assert held(found) == [(3,)]


CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "own step": ("llama", PROMPTS, {}),
    "long prompts": ("llama", ["mix " * 150, "thanks", "flour " * 140], {"max_position_embeddings": 512}),
    "own layers": ("gpt2", PROMPTS, {}),
    "plain loop": ("mamba", PROMPTS, {}),
}


@pytest.mark.parametrize(("architecture", "prompts", "sizes"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_sampling_and_scoring(
    tmp_path: Path, architecture: str, prompts: list[str], sizes: dict[str, Any], precision: str
) -> None:
    policy = load_policy(toy_policy_directory(tmp_path / "m", architecture=architecture, **sizes), trainable=True)
    policy.module.autocast = precision == "bfloat16"
    policy.reference = make_reference(policy)

    def work() -> None:
        rollout = generate(policy, prompts, 3, SamplingConfig(max_tokens=6), rows_at_once=6)
        completion_logprobs(policy.reference, rollout)
        completion_logprobs(policy, rollout).sum().backward()

    work()  # the first call of some functions leaves caches behind
    with without_collector() as found:
        work()
    assert held(found) == []


RECIPES: dict[str, Callable[[World], Path]] = {
    "grpo": lambda world: world.grpo(num_steps=4),
    "grpo, adapters": lambda world: world.grpo(num_steps=4, lora=True),
    "grpo, checkpointing": lambda world: world.grpo(
        num_steps=4, policy={"model": str(world.model), "gradient_checkpointing": True}
    ),
    "ppo": lambda world: world.grpo(algorithm="ppo", group_size=2, num_steps=4),
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
    assert seen >= 4 and held(found) == []
