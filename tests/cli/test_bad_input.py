"""Wrong input to `equipoise train`: one message (file, field, value, mend), the right exit code, nothing lost."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tests.run_toys import World, fingerprint, metrics
from tests.toy import toy_policy_directory, toy_tokenizer

from equipoise.algorithms import checkpoint

Equipoise = Callable[..., tuple[int, str, str]]


def function(name: str, **aspect: Any) -> dict[str, Any]:
    """`scorers` with one function of the toy world."""
    aspects = {"politeness": {"higher_is_better": True} | aspect}
    return {"scorers": [{"function": f"tests.toy:{name}", "aspects": aspects}]}


def lines(*rows: Any) -> str:
    """JSONL; a text stays as it is."""
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def said(errors: str) -> str:
    """The one message, without what was reported before it."""
    assert errors.count("equipoise: ") == 1, errors
    assert "Traceback" not in errors
    return errors.partition("equipoise: ")[2]


# Recipes that are wrong in themselves: text of the file, and what the message must hold.
BROKEN_RECIPES = {
    "not-yaml": ("algorithm: grpo\n  foo: [1,\n", ["r.yaml: not valid YAML: line 2, column 6"]),
    "a-list": ("- a\n", ["r.yaml: a recipe is a mapping of keys to values, found list"]),
    "empty": ("", ["r.yaml: a recipe is a mapping of keys to values, found NoneType"]),
    "no-algorithm": ("policy: {model: x}\n", ["r.yaml: `algorithm` is missing; give one of"]),
    "unknown-algorithm": ("algorithm: gpro\n", ["'gpro'", "did you mean 'grpo'?", "known: sft, reward, grpo"]),
    "listed-algorithm": ("algorithm: [grpo]\n", ["algorithm ['grpo'] is not available"]),
    "repeated-aspect": (
        "algorithm: grpo\nobjective_weights:\n  politeness: 1\n  politeness: 2\n",
        ["r.yaml:4: 'politeness' is given twice (first on line 3); remove one"],
    ),
    "a-number-as-key": ("algorithm: grpo\n1: 2\n", ["r.yaml:2: the key 1 is not text; put it in quotes"]),
}

# Changes of a good GRPO recipe, and what the message must hold. Exit code 2.
WRONG_GRPO: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown-key": ({"num_step": 3}, ["r.yaml:", "unknown key `num_step`", "did you mean 'num_steps'?"]),
    "unknown-nested-key": ({"sampling": {"max_token": 3}}, ["r.yaml:", "`sampling.max_token`", "'max_tokens'?"]),
    "unknown-key-in-list": (
        function("politeness", higher_is_beter=True),
        ["r.yaml:", "`scorers.0.aspects.politeness.higher_is_beter`", "did you mean 'higher_is_better'?"],
    ),
    "undeclared-direction": (
        {"scorers": [{"function": "tests.toy:politeness", "aspects": {"politeness": {"range": [0, 1]}}}]},
        ["r.yaml:", "`scorers.0.aspects.politeness.higher_is_better` is missing; add it", "no default direction"],
    ),
    "range": (function("politeness", range=[1, 0]), ["r.yaml:", "range must be [lowest, highest], got [1.0, 0.0]"]),
    "unknown-aspect": (
        {"objective_weights": {"politness": 1}},
        ["r.yaml: objective_weights: unknown aspect 'politness' (did you mean 'politeness'?)", "give politeness"],
    ),
    "missing-weight": (
        {
            "scorers": [
                {
                    "function": "tests.toy:two_aspects",
                    "aspects": {"politeness": {"higher_is_better": True}, "rudeness": {"higher_is_better": False}},
                }
            ]
        },
        ["r.yaml: objective_weights: no weight for rudeness; give one, 0 to log"],
    ),
    "two-sources": (
        {"scorers": function("politeness")["scorers"] * 2},
        ["aspect 'politeness' is given by both tests.toy:politeness and", "rename or remove one"],
    ),
    "negative-weight": ({"objective_weights": {"politeness": -1}}, ["r.yaml:", "`objective_weights.politeness`", "-1"]),
    "infinite-weight": (
        {"objective_weights": {"politeness": float("inf")}},
        ["r.yaml:", "`objective_weights.politeness`", "finite number, found inf"],
    ),
    "zero-weights": ({"objective_weights": {"politeness": 0}}, ["r.yaml: objective_weights are all 0", "above 0"]),
    "group-of-one": ({"group_size": 1}, ["r.yaml:", "`group_size`", "greater than or equal to 2, found 1"]),
    "biased-sampling": ({"sampling": {"top_k": 5}}, ["sampling.top_k (5)", "bias the ratio in training; remove them"]),
    "greedy": ({"sampling": {"temperature": 0}}, ["sampling.temperature 0", "use a value above 0"]),
    "method": ({"combine": {"method": "gpdo"}}, ["combine.method 'gpdo'", "did you mean 'gdpo'?", "weighted_sum"]),
    "method-option": ({"combine": {"options": {"foo": 1}}}, ["combine.options", "'foo'"]),
    "betas": ({"optimizer": {"learning_rate": 1, "betas": [0.9, 1.5]}}, ["`optimizer.betas.1`", "less than 1"]),
    "no-such-module": ({"scorers": function("x")["scorers"]}, ["module 'tests.toy' has no function 'x'"]),
    "no-room": ({"sampling": {"max_tokens": 128}}, ["max_tokens 128 leaves no room", "use at most 127"]),
    "no-model": ({"policy": {"model": "./nope"}}, ["./nope: no such model directory; give a directory"]),
    "no-lora-module": (
        {"policy": {"model": "BASE", "lora": {"target_modules": ["nope"]}}},
        ["policy.lora.target_modules ['nope']: LoRA matches no module", "all-linear"],
    ),
    "no-reward-model": ({"scorers": [{"reward_model": "./nope"}]}, ["nope: no such"]),
    "not-a-reward-model": ({"scorers": [{"reward_model": "BASE"}]}, ["base: not a reward model", "RUN/model"]),
    "missing-data": ({"data": "nope.jsonl"}, ["nope.jsonl: no such file or directory"]),
}

# Contents of data files for an algorithm, and what the message must hold. Exit code 2.
GOOD_SCORED = {"prompt": "how do i", "response": "please go", "scores": {"politeness": 1, "rudeness": 0}}
NO_RUDENESS = [{**GOOD_SCORED, "prompt": f"how {i}", "scores": {"politeness": i, "rudeness": None}} for i in range(20)]
WRONG_DATA: dict[str, tuple[str, str, list[str]]] = {
    "empty": ("grpo", "", ["d.jsonl: holds no rows; give a file with at least one"]),
    "blank": ("grpo", "\n\n", ["d.jsonl: holds no rows"]),
    "broken-json": ("grpo", lines({"prompt": "a"}, '{"prompt": '), ["d.jsonl:2: broken JSON"]),
    "misspelt-field": ("grpo", lines({"promt": "a"}), ["d.jsonl:1: field `prompt` is missing", "columns: {prompt:"]),
    "a-number": ("grpo", lines({"prompt": 3}), ["d.jsonl:1: `prompt` must be a text", "found 3"]),
    "unknown-kind": ("grpo", lines({"prompt": "a", "kind": "bengin"}), ["d.jsonl:1", "'bengin'", "'benign'?"]),
    "messages-without-template": (
        "grpo",
        lines(*[{"prompt": "how do i"}] * 30, {"prompt": [{"role": "user", "content": "how"}]}),
        ["d.jsonl:31: `prompt` is a list of messages", "has no chat template; give it one"],
    ),
    "string-score": (
        "reward",
        lines(GOOD_SCORED, {**GOOD_SCORED, "scores": {"politeness": "high"}}),
        ["d.jsonl:2: `scores.politeness` is a string, 'high'; write a number, or null"],
    ),
    "infinite-score": (
        "reward",
        lines(GOOD_SCORED, '{"prompt": "a", "response": "b", "scores": {"politeness": Infinity}}'),
        ["d.jsonl:2: `scores.politeness` is inf; write a finite number"],
    ),
    "all-scores-missing": ("reward", lines(*NO_RUDENESS), ["aspect 'rudeness': all scores are missing; add scores"]),
    "no-response": ("sft", lines({"prompt": "a"}), ["d.jsonl:1: field `response` is missing", "columns: {response:"]),
    "too-few-to-split": ("sft", lines({"prompt": "a", "response": "b"}), ["cannot be split", "set a share to 0"]),
}

# Reward functions that fail while training runs. Exit code 1.
FAILING = {
    "raises": ["reward function tests.toy:raises raised KeyError", "no such rubric"],
    "too_few": ["scorer tests.toy:too_few, aspect 'politeness'", "values for", "return one for each"],
    "not_a_number": ["scorer tests.toy:not_a_number, aspect 'politeness', completion 0: nan", "return None"],
    "unknown_name": ["tests.toy:unknown_name returned the unknown aspect 'politness'", "declares politeness"],
    "no_name": ["tests.toy:no_name returned no values for aspect 'politeness'", "None for not scored"],
}


@pytest.mark.parametrize("name", BROKEN_RECIPES)
def test_broken_recipe(name: str, equipoise: Equipoise, tmp_path: Path) -> None:
    text, fragments = BROKEN_RECIPES[name]
    (tmp_path / "r.yaml").write_text(text)
    code, _, errors = equipoise("train", "r.yaml", "--out", "run")
    assert code == 2
    assert all(fragment in said(errors) for fragment in fragments), errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", WRONG_GRPO)
def test_wrong_grpo_recipe(name: str, world: World, equipoise: Equipoise, tmp_path: Path) -> None:
    changes, fragments = WRONG_GRPO[name]
    changes = json.loads(json.dumps(changes).replace('"BASE"', json.dumps(str(world.model))))
    shutil.copy(world.grpo("bad", **changes), tmp_path / "r.yaml")
    code, _, errors = equipoise("train", "r.yaml", "--out", "run")
    assert code == 2, errors
    assert all(fragment in said(errors) for fragment in fragments), errors
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", WRONG_DATA)
def test_wrong_data(name: str, world: World, equipoise: Equipoise, tmp_path: Path) -> None:
    algorithm, text, fragments = WRONG_DATA[name]
    (tmp_path / "d.jsonl").write_text(text)
    code, _, errors = equipoise("train", getattr(world, algorithm)("bad", data="d.jsonl"), "--out", "run")
    assert code == 2, errors
    assert all(fragment in said(errors) for fragment in fragments), errors
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", FAILING)
def test_failing_reward_function(name: str, world: World, equipoise: Equipoise) -> None:
    code, _, errors = equipoise("train", world.grpo("bad", **function(name)), "--out", "run")
    assert code == 1
    assert all(fragment in said(errors) for fragment in FAILING[name]), errors


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("num_steps", ["override 'num_steps': expected key.sub=value"]),
        ("num_steps=0", ["override 'num_steps=0': `num_steps`", "found 0"]),
        ("num_steps=abc", ["override 'num_steps=abc': `num_steps`", "valid integer", "found 'abc'"]),
        ("num_steps=[1", ["override 'num_steps=[1': the value is not valid YAML"]),
        ("num_steps.x=1", ["override 'num_steps.x=1': num_steps is 3, it has no key 'x'"]),
        ("sampling.temprature=1", ["override 'sampling.temprature=1': unknown key", "did you mean 'temperature'?"]),
        ("scorers.3.batch_size=1", ["scorers is a list of 1; '3' is no index"]),
    ],
)
def test_wrong_override(override: str, fragments: list[str], world: World, equipoise: Equipoise) -> None:
    code, _, errors = equipoise("train", world.grpo("good"), override, "--out", "run")
    assert code == 2
    assert all(fragment in said(errors) for fragment in fragments), errors


def test_missing_recipe(equipoise: Equipoise) -> None:
    code, _, errors = equipoise("train", "nope.yaml")
    assert (code, said(errors)) == (2, "nope.yaml: no such recipe file; give the path of a YAML recipe\n")


def test_unsupported_backbones(world: World, equipoise: Equipoise, tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=64, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    toy_tokenizer().save_pretrained(tmp_path / "t5")
    code, _, errors = equipoise("train", world.reward("bad", model={"model": "./t5"}), "--out", "run")
    assert code == 2
    assert "t5: unsupported backbone for a reward model" in said(errors)
    code, _, errors = equipoise("train", world.grpo("bad", policy={"model": "./t5"}), "--out", "run")
    assert code == 2
    assert "a t5 model cannot be loaded as AutoModelForCausalLM" in said(errors)


def test_adapter_on_a_base_with_another_vocabulary(world: World, equipoise: Equipoise, tmp_path: Path) -> None:
    assert equipoise("train", world.grpo("adapter", lora=True, num_steps=1), "--out", "run")[0] == 0
    settings = tmp_path / "run" / "model" / "adapter_config.json"
    values = json.loads(settings.read_text())
    for vocabulary, width, message in ((40, 32, "vocabulary mismatch"), (64, 16, "the adapter does not fit its base")):
        base = toy_policy_directory(tmp_path / f"base{vocabulary}", vocabulary=vocabulary, hidden=width)
        settings.write_text(json.dumps(values | {"base_model_name_or_path": str(base)}))
        recipe = world.grpo("bad", policy={"model": str(tmp_path / "run" / "model")})
        code, _, errors = equipoise("train", recipe, "--out", "second")
        assert code == 2
        assert message in said(errors) and base.name in errors


def test_a_traceback_only_with_debug(world: World, equipoise: Equipoise) -> None:
    recipe = world.grpo("bad", **function("raises"))
    code, _, errors = equipoise("--debug", "train", recipe, "--out", "run")
    assert code == 1
    assert "Traceback" in errors and 'raise KeyError("no such rubric")' in errors
    code, _, errors = equipoise("--debug", "train", world.grpo("good"), "group_size=1", "--out", "run2")
    assert code == 2
    assert "Traceback" in errors


def test_a_fault_of_ours_says_so(world: World, equipoise: Equipoise, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("equipoise.cli.train.train_grpo", broken)
    code, _, errors = equipoise("train", world.grpo("good"), "--out", "run")
    assert code == 1
    assert said(errors).startswith("ZeroDivisionError: oops\nThis is a fault, not a wrong input; --debug shows where")


# -- the output directory ------------------------------------------------------------------------------------------


def test_another_run_is_not_overwritten(world: World, equipoise: Equipoise, tmp_path: Path) -> None:
    recipe = world.grpo("good")
    assert equipoise("train", recipe, "--out", "run")[0] == 0
    before = fingerprint(tmp_path / "run")
    code, _, errors = equipoise("train", recipe, "--out", "run")
    assert code == 2
    assert "run: already holds a run; continue it with --resume, or give another --out" in said(errors)
    code, _, errors = equipoise("train", recipe, "optimizer.learning_rate=0.5", "seed=3", "--out", "run", "--resume")
    assert code == 2
    message = said(errors)
    assert "changed recipe: optimizer.learning_rate (was 0.001, now 0.5), seed (was 0, now 3)" in message
    assert "undo the change" in message
    assert fingerprint(tmp_path / "run") == before


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_what_is_no_run_is_not_overwritten(
    flags: list[str], world: World, equipoise: Equipoise, tmp_path: Path
) -> None:
    """A model directory has a config.json as a run has; a file and a directory of other things have not."""
    shutil.copytree(world.model, tmp_path / "model")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    (tmp_path / "notes.txt").write_text("notes")
    for name in ("model", "photos", "notes.txt"):
        before = fingerprint(tmp_path)
        code, _, errors = equipoise("train", world.grpo("good"), "--out", name, *flags)
        assert code == 2
        assert f"{name}: exists and is not an Equipoise run directory; give another --out" in said(errors)
        assert fingerprint(tmp_path) == before


def test_a_run_that_failed_before_its_first_step_may_start_again(world: World, equipoise: Equipoise) -> None:
    assert equipoise("train", world.grpo("bad", data="nope.jsonl"), "--out", "run")[0] == 2
    assert equipoise("train", world.grpo("good"), "--out", "run")[0] == 0


def test_resume_where_nothing_was_saved(world: World, equipoise: Equipoise, tmp_path: Path) -> None:
    code, _, errors = equipoise("train", world.grpo("good"), "--out", "run", "--resume")
    assert code == 0
    assert "run: nothing was saved yet: starting from the first step" in errors
    assert len(metrics(tmp_path / "run")) == 3


def test_a_place_that_cannot_be_written(world: World, equipoise: Equipoise) -> None:
    code, _, errors = equipoise("train", world.grpo("good"), "--out", "/proc/none/run")
    assert code == 2
    assert "/proc/none/run: cannot write there" in said(errors)


# -- the disk ------------------------------------------------------------------------------------------------------


def test_disk_full_while_saving(
    world: World, equipoise: Equipoise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, the last good checkpoint stays, and the run goes on from it when there is space again."""
    recipe = world.grpo("saves", num_steps=4, checkpoint={"every": 1})
    assert equipoise("train", recipe, "--out", "unbroken")[0] == 0
    save_file, saved = checkpoint.save_file, 0

    def full_at_third(tensors: Any, path: Path) -> None:
        nonlocal saved
        saved += 1
        if saved == 3:
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full_at_third)
        code, _, errors = equipoise("train", recipe, "--out", "run")
    assert code == 1
    message = said(errors)
    assert "step_000003: could not save: [Errno 28] No space left on device" in message
    assert "the last good checkpoint is run/checkpoints/step_000002" in message
    assert "Free space and run again with --resume" in message
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_000001", "step_000002"]
    assert equipoise("train", recipe, "--out", "run", "--resume")[0] == 0
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "unbroken")


@pytest.mark.parametrize("place", ["equipoise.algorithms.run.pq.write_table", "equipoise.models.policy.Policy.save"])
def test_disk_full_elsewhere(
    place: str, world: World, equipoise: Equipoise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        code, _, errors = equipoise("train", world.grpo("good", checkpoint={"every": 1}), "--out", "run")
    assert code == 1
    assert "could not write: [Errno 28] No space left on device; free space and run again with --resume" in said(errors)
    assert equipoise("train", world.grpo("good", checkpoint={"every": 1}), "--out", "run", "--resume")[0] == 0
    assert len(metrics(tmp_path / "run")) == 3


def test_a_damaged_checkpoint_is_named(world: World, equipoise: Equipoise, tmp_path: Path) -> None:
    """Falling back silently would hide a failing disk; the message says how to fall back."""
    recipe = world.grpo("saves", num_steps=3, checkpoint={"every": 1})
    assert equipoise("train", recipe, "--out", "whole")[0] == 0
    assert equipoise("train", recipe, "--out", "run")[0] == 0
    shutil.rmtree(tmp_path / "run" / "model")
    tensors = tmp_path / "run" / "checkpoints" / "step_000003" / "state.safetensors"
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    tensors.write_bytes(content)
    code, _, errors = equipoise("train", recipe, "--out", "run", "--resume")
    assert code == 1
    message = said(errors)
    assert "run/checkpoints/step_000003/state.safetensors: does not match its checksum" in message
    assert "delete run/checkpoints/step_000003 to resume from step 2" in message
    shutil.rmtree(tensors.parent)
    assert equipoise("train", recipe, "--out", "run", "--resume")[0] == 0
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")
