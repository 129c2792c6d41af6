"""A run that a rule or a budget ends: where it ends, what it saves, and that a resumed one does exactly the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.run_toys import LORA, World, differences, metrics, train
from tests.toy import grpo_values, politeness

from equipoise.algorithms.run import Run
from equipoise.errors import ConfigError


def judge(prompts: list[Any], completions: list[str]) -> dict[str, list[float | None]]:
    """A second opinion that declares what its scores mean."""
    return politeness(prompts, completions)


judge.aspects = {"politeness": {"higher_is_better": True, "range": [0, 1]}}  # type: ignore[attr-defined]

# The first evaluation is an improvement, and none after it can be: the run ends after 1 + patience evaluations.
NEVER_AGAIN = {"patience": 3, "min_delta": 1000.0, "keep": "best"}
ONLINE: dict[str, Any] = {
    "num_steps": 9,
    "beta": 0.1,
    "optimizer": {"learning_rate": 5e-3},
    "checkpoint": {"every": 2},
    "evaluation": {"every": 1, "prompts": "PROMPTS", "samples": 2, "judge": f"{__name__}:judge"},
}
LENGTH = {"on": "evaluation/completion_length/mean", "higher_is_better": False}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo-best": ("grpo", ONLINE | {"stop": NEVER_AGAIN | {"on": "evaluation/combined"}}),
    "grpo-lora-judge": ("grpo", ONLINE | {"lora": True, "stop": NEVER_AGAIN | LENGTH}),
    "grpo-kl": ("grpo", ONLINE | {"stop": {"max_kl": 1e-9}}),
    "ppo-shared-best": ("ppo", ONLINE | {"critic": {"kind": "shared"}, "stop": NEVER_AGAIN | LENGTH}),
    "ppo-tokens": ("ppo", ONLINE | {"budget": {"generated_tokens": 150}}),
    "dpo-best": (
        "dpo",
        {
            "num_epochs": 3,
            "checkpoint": {"every": 2},
            "evaluation": {"every": 2, "prompts": "PROMPTS", "sampling": {"max_tokens": 4}},
            "scorers": grpo_values(Path(), Path())["scorers"],
            "stop": {"on": "evaluation/combined", "patience": 2, "min_delta": 1000.0, "keep": "best"},
        },
    ),
    "sft-flops": ("sft", {"budget": {"flops": 1e7}, "num_epochs": 3, "checkpoint": {"every": 2}}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    return World(tmp_path_factory.mktemp("world"))


def write(world: World, name: str, kind: str, changes: dict[str, Any]) -> Path:
    """A recipe file of one thread."""
    if "evaluation" in changes:
        changes = changes | {"evaluation": changes["evaluation"] | {"prompts": str(world.prompts)}}
    if kind != "ppo":
        return getattr(world, kind)(name, **changes)
    policy = {"model": str(world.model)} | ({"lora": LORA} if changes.get("lora") else {})
    values = grpo_values(world.model, world.prompts, threads=1, policy=policy, group_size=2) | {"algorithm": "ppo"}
    return world.recipe(name, values | {key: value for key, value in changes.items() if key != "lora"})


@pytest.fixture(scope="module")
def ended(world: World) -> dict[str, tuple[Path, Path]]:
    """Recipe and finished run of every case."""
    runs = {}
    for name, (kind, changes) in CASES.items():
        runs[name] = write(world, name, kind, changes), world.directory / f"{name}-whole"
        train(*runs[name])
    return runs


def stopped(out: Path) -> dict[str, Any]:
    """stopped.json."""
    return json.loads((out / "stopped.json").read_text())


def weights(out: Path) -> dict[str, torch.Tensor]:
    """The saved model's trained weights."""
    return load_file(next((out / "model").glob("*model.safetensors")))


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


RULES = {
    "grpo-best": ("stop.on", 4),
    "grpo-lora-judge": ("stop.on", 4),
    "grpo-kl": ("stop.max_kl", 5),
    "ppo-shared-best": ("stop.on", 4),
    "ppo-tokens": ("budget.generated_tokens", None),
    "dpo-best": ("stop.on", 6),
    "sft-flops": ("budget.flops", None),
}


@pytest.mark.parametrize("name", CASES)
def test_it_ends_where_the_rule_says(name: str, ended: dict[str, tuple[Path, Path]]) -> None:
    out = ended[name][1]
    lines, reason = metrics(out), stopped(out)
    rule, step = RULES[name]
    assert reason["rule"] == rule
    assert reason["step"] == lines[-1]["step"] == int(max((out / "checkpoints").iterdir()).name[5:])
    assert step is None or reason["step"] == step
    if rule == "stop.on":
        last = lines[-1]["stop/evaluations_without_improvement"]
        assert last == reason["limit"] == CASES[name][1]["stop"]["patience"]
    elif rule == "stop.max_kl":
        assert lines[-1]["stop/kl_average"] == reason["value"] == pytest.approx(sum(x["kl"] for x in lines) / 5)
    else:
        cost = json.loads((out / "cost.json").read_text())
        spent = {"budget.flops": sum(cost["flops"].values()), "budget.generated_tokens": cost["generated_tokens"]}
        assert spent[rule] == reason["value"] >= reason["limit"]
        assert reason["step"] > 1
    assert "evaluation/combined" in lines[-1] or name == "sft-flops", "the last step is always evaluated"


def crashing(at: str, monkeypatch: pytest.MonkeyPatch, end: int | None = None) -> None:
    """The process dies in this method of the run (after a line of metrics, where `end` is its step)."""
    original: Callable[..., Any] = getattr(Run, at)

    def dies(run: Run, *arguments: Any) -> Any:
        if end is not None:
            result = original(run, *arguments)
            if arguments[0] != end:
                return result
        raise Crash

    monkeypatch.setattr(Run, at, dies)


class Crash(Exception):
    """The process is gone, as far as the run directory can tell."""


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_dies_ends_the_same(
    name: str, ended: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After any step; after the last checkpoint, before stopped.json; and after that, before the model."""
    recipe, whole = ended[name]
    places: list[tuple[str, int | None]] = [("log", line["step"]) for line in metrics(whole)]
    for number, (at, end) in enumerate([*places[1::2], ("write_stopped", None), ("finish", None)]):
        out = tmp_path / str(number)
        with monkeypatch.context() as patch:
            crashing(at, patch, end)
            with pytest.raises(Crash):
                train(recipe, out)
        train(recipe, out, resume=True)
        assert differences(whole, out) == [], (at, end)


@pytest.mark.parametrize("name", ["grpo-best", "grpo-lora-judge", "ppo-shared-best", "dpo-best"])
def test_the_best_is_what_a_run_of_so_many_steps_had_saved(
    name: str, world: World, ended: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, changes = CASES[name]
    whole = ended[name][1]
    rule = changes["stop"]
    sign = -1 if rule.get("higher_is_better") is False else 1
    scores = {line["step"]: sign * line[rule["on"]] for line in metrics(whole) if rule["on"] in line}
    best = max(scores, key=lambda step: scores[step])
    assert stopped(whole)["best_step"] == best
    plain = {key: value for key, value in changes.items() if key != "stop"}
    recipe = write(world, f"{name}-plain", kind, plain | {"checkpoint": {"every": 1, "keep": 99}})
    with monkeypatch.context() as patch:
        crashing("log", patch, max(scores) + 1)  # so that the last of them was saved
        with pytest.raises(Crash):
            train(recipe, tmp_path / "plain")
    at = "plain/checkpoints/step_{:06d}/state.safetensors"
    saved = load_file(whole / f"checkpoints/step_{max(scores):06d}/state.safetensors")
    kept = {key.removeprefix("best/"): value for key, value in saved.items() if key.startswith("best/")}
    tensors = load_file(tmp_path / at.format(best))
    trained = {key.removeprefix("parameters/"): v for key, v in tensors.items() if key.startswith("parameters/")}
    assert equal(kept, trained)
    model = weights(whole)
    ours = {key.removeprefix("model."): value for key, value in kept.items()}
    same = [name for name in model if name in ours or name.replace(".weight", ".default.weight") in ours]
    assert same, "the comparison says something"
    for key in same:
        assert torch.equal(model[key], ours.get(key, ours.get(key.replace(".weight", ".default.weight"))))  # type: ignore[arg-type]


def test_in_one_case_at_least_the_best_is_not_the_last(ended: dict[str, tuple[Path, Path]]) -> None:
    runs = [stopped(out) for name, (_, out) in ended.items() if name.endswith(("best", "judge"))]
    assert any(run["best_step"] != run["step"] for run in runs)


def test_a_stopped_run_is_complete_and_says_so(
    ended: dict[str, tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = ended["grpo-kl"]
    train(recipe, out, resume=True)
    said = capsys.readouterr().err
    assert "already complete (it ended after step 5: stop.max_kl 1e-09 is exceeded: KL was " in said
    assert metrics(out)[-1]["step"] == 5


def test_a_metric_nobody_measures_is_refused_before_training(world: World, tmp_path: Path) -> None:
    changes = ONLINE | {"stop": {"on": "evaluation/judge/rudeness/mean", "higher_is_better": True}}
    with pytest.raises(ConfigError, match=r"is not measured by.*evaluation/judge/politeness/mean"):
        train(write(world, "wrong", "grpo", changes), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
