"""Two gloo ranks of a conditioned run ask for what one process asks for, and end with its weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import torch
from tests.conditioned_toys import ReadingWorld
from tests.invariant.test_two_processes import TOLERANCE, ending, launch, weights
from tests.run_toys import metrics, train


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    world = ReadingWorld(tmp_path)
    evaluation = {"every": 2, "prompts": str(world.prompts)}
    optimizer = {"learning_rate": 1e-3, "eps": 1e-6}  # why: EPS of test_two_processes
    recipe = world.conditioned(num_minibatches=2, evaluation=evaluation, micro_batch_size=3, optimizer=optimizer)
    one, two = tmp_path / "one", tmp_path / "two"
    (tmp_path / "jobs.json").write_text(json.dumps([{"recipe": str(recipe), "out": str(two)}]))
    process = launch(["-m", "tests.two_ranks", str(tmp_path / "jobs.json")], tmp_path)
    output = process.communicate()
    assert process.returncode == 0, output[1][-3000:]
    assert [ending(two, rank)["error"] for rank in (0, 1)] == [None, None], ending(two, 0)["traceback"]
    train(recipe, one)
    for ours, theirs in zip(metrics(one), metrics(two), strict=True):
        assert "asked/gain" in ours
        for key, value in ours.items():
            if not key.startswith(("time/", "sampler/")):
                same = value == theirs[key] or math.isclose(value, theirs[key], rel_tol=1e-5, abs_tol=TOLERANCE)
                assert same, (ours["step"], key, value, theirs[key])
    ours, theirs = weights(one), weights(two)
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) <= TOLERANCE
    for step in (1, 2, 3):
        first, second = (pq.read_table(out / "completions" / f"step_{step:06}.parquet") for out in (one, two))
        for name in ("prompt", "completion", "asked/politeness", "asked/rudeness"):
            assert first[name].to_pylist() == second[name].to_pylist()
