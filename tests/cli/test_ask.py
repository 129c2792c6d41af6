"""`--ask` of evaluate and generate: a conditioned policy reads the weights, files name them, wrong ones are said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conditioned_toys import ReadingWorld
from tests.run_toys import train

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> tuple[ReadingWorld, Path]:
    """A world and the model of a conditioned run over it."""
    torch.set_num_threads(1)
    world = ReadingWorld(tmp_path_factory.mktemp("reading"), initializer_range=0.3)
    out = world.directory / "run"
    train(world.conditioned(num_steps=1), out)
    return world, out / "model"


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_generate_asks(equipoise: Call, reader: tuple[ReadingWorld, Path], tmp_path: Path) -> None:
    world, model = reader
    command = ("generate", model, "--prompts", world.prompts, "--max-tokens", 5)
    for name, asked in (("a", ("--ask", "politeness=1,rudeness=3")), ("b", ("--ask", "rudeness=1,politeness=0"))):
        assert equipoise(*command, *asked, "--out", f"{name}.jsonl")[0] == 0
    assert equipoise(*command, "--out", "none.jsonl")[0] == 0
    a, b, none = (rows(tmp_path / f"{name}.jsonl") for name in ("a", "b", "none"))
    assert {json.dumps(row["asked"]) for row in a} == {'{"politeness": 0.25, "rudeness": 0.75}'}
    assert "asked" not in none[0]
    texts = [[row["response"] for row in found] for found in (a, b, none)]
    assert texts[0] != texts[1] and texts[1] != texts[2], "what is asked is read"
    assert [row["prompt"] for row in a] == [row["prompt"] for row in none], "and stands in no prompt"


def test_evaluate_asks(equipoise: Call, reader: tuple[ReadingWorld, Path], tmp_path: Path) -> None:
    world, model = reader
    command = ("evaluate", model, "--prompts", world.prompts, "--judge", "tests.front_toys:three_aspects")
    code, _, errors = equipoise(*command, "--ask", "politeness=0.2,rudeness=0.8", "--out", "asked", "--max-tokens", 4)
    assert code == 0 and "asked for none" not in errors
    found = json.loads((tmp_path / "asked" / "evaluation.json").read_text())
    assert found["settings"]["asked"] == {"politeness": 0.2, "rudeness": 0.8}
    assert found["weights"] == pytest.approx(dict.fromkeys(("politeness", "rudeness", "garden"), 1 / 3))
    code, _, errors = equipoise(*command, "--out", "plain", "--max-tokens", 4)
    assert code == 0 and "reads weights in its prompt, and is asked for none" in errors
    assert "asked" not in json.loads((tmp_path / "plain" / "evaluation.json").read_text())["settings"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("politeness=1", "ask: no weight for 'rudeness'; add rudeness=0"),
        ("politeness=1,rudenes=1", "ask: unknown aspect 'rudenes' (did you mean 'rudeness'?)"),
        ("politeness=1,politeness=2", "--ask: aspect 'politeness' is given twice"),
        ("politeness", "--ask 'politeness': expected aspect=number"),
        ("politeness=0,rudeness=0", "all weights are 0"),
        ("politeness=nan,rudeness=1", "politeness=nan; use a finite number"),
    ],
)
def test_what_cannot_be_asked(asked: str, message: str, equipoise: Call, reader: tuple[ReadingWorld, Path]) -> None:
    world, model = reader
    judge = ("--judge", "tests.front_toys:three_aspects")
    for command in (("evaluate", *judge, "--out", "e"), ("generate", "--out", "o.jsonl")):
        command = (*command, model, "--prompts", world.prompts)
        code, _, errors = equipoise(*command, "--ask", asked)
        assert code == 2 and message in errors and "Traceback" not in errors


def test_a_policy_that_reads_no_weights(equipoise: Call, reader: tuple[ReadingWorld, Path]) -> None:
    world, _ = reader
    asked = ("--ask", "politeness=1,rudeness=1")
    code, _, errors = equipoise("generate", world.model, "--prompts", world.prompts, "--out", "o.jsonl", *asked)
    assert code == 2 and "was not trained to read weights" in errors and "conditioned: {}" in errors
