"""Wrong input to `equipoise train` with a DPO recipe: one message, exit code 2, no traceback, nothing trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.dpo_toys import dpo_values, write_pairs
from tests.run_toys import World, metrics

Equipoise = Callable[..., tuple[int, str, str]]
USER = {"role": "user", "content": "how do i"}
OTHER = {"role": "user", "content": "help"}
GOOD, BAD = {"role": "assistant", "content": "please"}, {"role": "assistant", "content": "no"}
FINE = {"prompt": "how do i", "chosen": "please go", "rejected": "no"}
SCORER = {"function": "tests.toy:politeness", "aspects": {"politeness": {"higher_is_better": True}}}
EVALUATION = {"every": 1, "prompts": "PROMPTS", "sampling": {"max_tokens": 3}}

# The second of two rows, and what the message must hold.
WRONG_ROWS: dict[str, tuple[Any, str]] = {
    "identical": ({**FINE, "rejected": "please go"}, "d.jsonl:2: `chosen` and `rejected` are the same, 'please go'"),
    "empty": ({**FINE, "rejected": ""}, "d.jsonl:2: `rejected` is empty; a pair needs two responses"),
    "prompts-differ": ({"chosen": [USER, GOOD], "rejected": [OTHER, BAD]}, "d.jsonl:2: the conversations `chosen`"),
    "not-the-prompt": ({"prompt": "x", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "is not `prompt`"),
    "no-prefix": ({"chosen": [GOOD], "rejected": [BAD]}, "d.jsonl:2: field `prompt` is missing"),
    "texts-without-prompt": ({"chosen": "how please", "rejected": "how no"}, "not texts or lone replies; add `prompt`"),
    "text-of-messages": ({**FINE, "chosen": json.dumps([USER, GOOD])}, "`chosen` is a text that holds messages"),
    "a-text": ("how do i: please, not no", "d.jsonl:2: expected a JSON object, found 'how do i: please, not no'"),
    "one-side": ({"prompt": "p", "chosen": "a"}, "d.jsonl:2: field `rejected` is missing"),
    "messages-without-template": (
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        "d.jsonl:2: a prompt is a list of messages",
    ),
    "same-tokens": ({"prompt": "p", "chosen": "Unknown", "rejected": "Words"}, "are the same 2 tokens"),
}

WRONG_RECIPES: dict[str, tuple[dict[str, Any], str]] = {
    "does-not-fit": ({"max_length": 3}, "`chosen` has 4 tokens, and with one of the prompt 3 are allowed"),
    "smoothed-ipo": ({"kind": "ipo", "label_smoothing": 0.1}, "label_smoothing (0.1) applies to kind sigmoid only"),
    "half-smoothed": ({"label_smoothing": 0.5}, "`label_smoothing`"),
    "beta": ({"beta": 0}, "`beta`"),
    "kind": ({"kind": "hinge"}, "`kind`"),
    "negative-sft": ({"sft_coefficient": -1}, "`sft_coefficient`"),
    "evaluation-without-scorers": ({"evaluation": EVALUATION}, "evaluation needs `scorers`"),
    "scorers-without-evaluation": ({"scorers": SCORER}, "scorers and objective_weights are for `evaluation` only"),
    "weights-of-nothing": (
        {"evaluation": EVALUATION, "scorers": SCORER, "objective_weights": {"politness": 1}},
        "unknown aspect 'politness'",
    ),
    "unknown-key": ({"labels_smoothing": 0.1}, "did you mean 'label_smoothing'?"),
    "no-data": ({"data": "nope.jsonl"}, "nope.jsonl: no such file"),
    "too-few": ({"data": "one.jsonl"}, "cannot be split"),
}


def one_message(errors: str) -> str:
    assert errors.count("equipoise: ") == 1 and "Traceback" not in errors, errors
    return errors.partition("equipoise: ")[2]


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_wrong_rows(name: str, world: World, equipoise: Equipoise, tmp_path: Path) -> None:
    row, said = WRONG_ROWS[name]
    (tmp_path / "d.jsonl").write_text(json.dumps(FINE) + "\n" + json.dumps(row) + "\n")
    recipe = world.recipe("bad-dpo", dpo_values(world.model, Path("d.jsonl"), validation_fraction=0))
    code, _, errors = equipoise("train", recipe, "--out", "run")
    assert code == 2 and said in one_message(errors), errors
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("name", WRONG_RECIPES)
def test_wrong_recipes(name: str, world: World, equipoise: Equipoise, tmp_path: Path) -> None:
    changes, said = WRONG_RECIPES[name]
    changes = json.loads(json.dumps(changes).replace("PROMPTS", str(world.prompts)))
    (tmp_path / "one.jsonl").write_text(json.dumps(FINE) + "\n")
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    recipe = world.recipe("bad-dpo", dpo_values(world.model, pairs, **changes))
    code, _, errors = equipoise("train", recipe, "--out", "run")
    assert code == 2 and said in one_message(errors), errors
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_every_bad_row_is_named_at_once(world: World, equipoise: Equipoise, tmp_path: Path) -> None:
    rows = [FINE, {**FINE, "chosen": ""}, FINE, {**FINE, "chosen": "no"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = world.recipe("bad-dpo", dpo_values(world.model, Path("d.jsonl")))
    code, _, errors = equipoise("train", recipe, "--out", "run")
    assert code == 2 and "d.jsonl:2: " in errors and "d.jsonl:4: " in errors


def test_a_good_recipe_validates_evaluates_and_trains(world: World, equipoise: Equipoise, tmp_path: Path) -> None:
    evaluation = {**EVALUATION, "prompts": str(world.prompts), "every": 2}
    values = dpo_values(world.model, write_pairs(tmp_path / "pairs.jsonl"), evaluation=evaluation, scorers=SCORER)
    recipe = world.recipe("good-dpo", values)
    code, out, errors = equipoise("validate", recipe)
    assert code == 0 and "a valid dpo recipe" in out, errors
    assert "24 preference pairs" in out and "16 prompts held out, scored on politeness" in out
    code, _, errors = equipoise("train", recipe, "--out", "run", "num_epochs=1")
    assert code == 0 and (tmp_path / "run" / "model" / "config.json").is_file(), errors
    with_evaluation = ["evaluation/combined" in line for line in metrics(tmp_path / "run")]
    assert with_evaluation == [False, True, False, True, True]
    code, _, errors = equipoise("train", recipe, "--out", "run", "num_epochs=1", "--resume")
    assert code == 0 and "already complete" in errors
