"""Recipes from YAML and overrides: what is accepted, and what each refusal says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.config import (
    RECIPES,
    DataConfig,
    GRPOConfig,
    SFTConfig,
    apply_override,
    changed_keys,
    load_recipe,
    recipe_from_mapping,
    resolved,
)
from equipoise.errors import ConfigError

SFT = "algorithm: sft\npolicy: {model: some/model}\ndata: d.jsonl\n"
GRPO: dict[str, Any] = {
    "algorithm": "grpo",
    "policy": {"model": "some/model"},
    "data": "p.jsonl",
    "scorers": {"function": "a.b:c", "aspects": {"x": {"higher_is_better": True}}},
    "objective_weights": {"x": 1},
    "num_steps": 3,
}


def load(tmp_path: Path, text: str, *overrides: str) -> Any:
    """A recipe from text."""
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    """The message of a refused recipe, without the directory."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_defaults_and_short_forms(tmp_path: Path) -> None:
    recipe = load(tmp_path, SFT)
    assert isinstance(recipe, SFTConfig)
    assert recipe.data == [DataConfig(path="d.jsonl")]
    assert (recipe.seed, recipe.checkpoint.every, recipe.policy.lora) == (0, 50, None)
    several = load(tmp_path, "algorithm: sft\npolicy: {model: m}\ndata: [a.jsonl, {path: b.csv, limit: 3}]\n")
    assert [(d.path, d.limit) for d in several.data] == [("a.jsonl", None), ("b.csv", 3)]
    grpo = recipe_from_mapping(GRPO)
    assert isinstance(grpo, GRPOConfig) and grpo.scorers[0].aspects["x"].higher_is_better


def test_recipes_are_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path, SFT).seed = 3


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-4 as a text."""
    recipe = load(tmp_path, SFT + "optimizer: {learning_rate: 1e-4, eps: 2.5E-07, weight_decay: 1.e2}\n")
    assert (recipe.optimizer.learning_rate, recipe.optimizer.eps, recipe.optimizer.weight_decay) == (1e-4, 2.5e-7, 100)


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    text = (
        "algorithm: sft\npolicy: &p {model: m, lora: {r: 2}}\ndata: d\noptimizer: {<<: &o {learning_rate: 1}, eps: 1}\n"
    )
    recipe = load(tmp_path, text)
    assert (recipe.optimizer.learning_rate, recipe.optimizer.eps, recipe.policy.lora.r) == (1, 1, 2)


def test_every_problem_is_listed_with_its_line(tmp_path: Path) -> None:
    text = "algorithm: sft\npolicy:\n  model: m\n  precission: auto\ndata: d\nbatch_size: 0\noptimizer: {}\n"
    assert refusal(tmp_path, text).splitlines() == [
        "r.yaml:4: unknown key `policy.precission` (did you mean 'precision'?); known here: model, revision, "
        "trust_remote_code, initialise, lora, precision, gradient_checkpointing, prompt_format",
        "r.yaml:6: `batch_size`: Input should be greater than or equal to 1, found 0",
        "r.yaml:7: `optimizer.learning_rate` is missing; add it",
    ]


def test_a_key_far_from_all_others_gets_no_suggestion(tmp_path: Path) -> None:
    message = refusal(tmp_path, SFT + "zzzzzz: 1\n")
    assert "unknown key `zzzzzz`; known here: seed, out" in message


def test_keys_inside_lists_and_mappings_of_blocks(tmp_path: Path) -> None:
    text = "algorithm: sft\npolicy: {model: m}\ndata:\n- path: a\n- path: b\n  limits: 3\n"
    assert "r.yaml:6: unknown key `data.1.limits` (did you mean 'limit'?)" in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "r.yaml:2: 'a' is given twice (first on line 1); remove one"),
        ("a: {b: 1, c: {d: 1, d: 2}}\n", "'d' is given twice (first on line 1)"),
        ("? [x]\n: 1\n", "r.yaml:1: the key ['x'] is not text; put it in quotes"),
        ("true: 1\n", "r.yaml:1: the key True is not text; put it in quotes"),
        ("a: *nowhere\n", "not valid YAML: line 1, column 4: found undefined alias 'nowhere'"),
        ("a: !!python/object:os.system x\n", "not valid YAML"),
        ("text\n", "a recipe is a mapping of keys to values, found str"),
        ("seed: 1\n", "`algorithm` is missing; give one of sft, reward, grpo"),
        ("algorithm: dop\n", "algorithm 'dop' is not available"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(tmp_path, text)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"r\.yaml: not UTF-8 text .*; save the recipe as UTF-8"):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(ConfigError, match="no such recipe file"):
        load_recipe(tmp_path)


def test_overrides(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        SFT,
        "seed=7",
        "policy.lora.r=4",
        "data=[a, b]",
        "data.1=c.jsonl",
        "optimizer.learning_rate=2e-5",
        "optimizer.schedule=linear",
        "out=a=b",
    )
    assert (recipe.seed, recipe.policy.lora.r, recipe.out) == (7, 4, "a=b")
    assert [d.path for d in recipe.data] == ["a", "c.jsonl"]
    assert (recipe.optimizer.learning_rate, recipe.optimizer.schedule) == (2e-5, "linear")
    assert load(tmp_path, SFT + "validation_fraction: 0.5\n", "validation_fraction=0").validation_fraction == 0
    assert load(tmp_path, SFT, "policy.lora=null").policy.lora is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "expected key.sub=value"),
        ("=3", "expected key.sub=value"),
        ("seed.x=1", "seed is 5, it has no key 'x'"),
        ("data.path=x", "data is 'd.jsonl', it has no key 'path'"),
        ("seed=[1", "the value is not valid YAML"),
        ("seed={a: 1, a: 2}", "'a' is given twice"),
        ("seeed=1", "override 'seeed=1': unknown key `seeed` (did you mean 'seed'?)"),
        ("policy.lora.r=x", "override 'policy.lora.r=x': `policy.lora.r`"),
        ("policy.lora.r=.nan", "`policy.lora.r`"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, message: str) -> None:
    assert message in refusal(tmp_path, SFT + "seed: 5\n", override)


def test_a_list_index_must_exist() -> None:
    values: dict[str, Any] = {"data": [{"path": "a"}]}
    with pytest.raises(ConfigError, match="data is a list of 1; '1' is no index"):
        apply_override(values, "data.1.path=b")
    apply_override(values, "data.0.path=b")
    assert values == {"data": [{"path": "b"}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": {"top_p": 0.9}}, "sampling.top_p (0.9) bias the ratio in training"),
        ({"sampling": {"temperature": 0}}, "use a value above 0"),
        ({"num_minibatches": 9}, "num_minibatches (9) exceeds prompts_per_step (8)"),
        ({"scale": "batch", "combine": {"method": "gdpo"}}, "scale 'batch' applies to combine.method weighted_sum"),
        ({"objective_weights": {"x": 0}}, "objective_weights are all 0"),
        ({"objective_weights": {}}, "`objective_weights`"),
        ({"scorers": []}, "`scorers`"),
        ({"scorers": [{"function": "a:b", "reward_model": "m"}]}, "give exactly one of"),
        ({"scorers": [{}]}, "give exactly one of"),
        ({"scorers": [{"function": "a:b"}]}, "declares its `aspects`"),
        ({"scorers": [{"reward_model": "m", "aspects": {"x": {"higher_is_better": True}}}]}, "carries its own"),
        ({"scorers": [{"function": "ab", "aspects": {"x": {"higher_is_better": True}}}]}, "package.module:function"),
        ({"epsilon": 1}, "`epsilon`"),
        ({"beta": -0.1}, "`beta`"),
        ({"seed": 2**31}, "`seed`"),
        ({"optimizer": {"learning_rate": 0}}, "`optimizer.learning_rate`"),
        ({"optimizer": {"learning_rate": 1, "betas": [0.9]}}, "`optimizer.betas"),
    ],
)
def test_values_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_from_mapping(GRPO | changes)
    assert message in str(caught.value)


def test_top_p_of_one_cuts_nothing() -> None:
    assert recipe_from_mapping(GRPO | {"sampling": {"top_p": 1.0}})


def test_changed_keys() -> None:
    before = {"a": 1, "b": {"c": 2, "d": [1]}, "e": None}
    assert changed_keys(before, before) == []
    assert changed_keys(before, {"a": 1, "b": {"c": 3, "d": [1, 2]}, "f": 0}) == ["b.c", "b.d", "f"]
    assert changed_keys({"lora": None}, {"lora": {"r": 2}}) == ["lora"]


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 2**31 - 1),
            "beta": st.floats(0, 1e3),
            "group_size": st.integers(2, 64),
            "mask_truncated": st.booleans(),
            "reduction": st.sampled_from(["sequence_mean", "token_mean", "constant"]),
            "epsilon_high": st.none() | st.floats(1e-3, 10),
        },
    )
)
def test_the_resolved_recipe_is_the_recipe(changes: dict[str, Any]) -> None:
    """What is written to config.json reads back as the same recipe, so that a resume finds no difference."""
    recipe = recipe_from_mapping(GRPO | changes)
    again = recipe_from_mapping(resolved(recipe))
    assert again == recipe
    assert changed_keys(resolved(recipe), resolved(again)) == []


def test_config_imports_no_torch() -> None:
    code = "import sys, equipoise.config; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_recipes_are_known_by_their_algorithm() -> None:
    for name, schema in RECIPES.items():
        assert schema.model_fields["algorithm"].default == name
