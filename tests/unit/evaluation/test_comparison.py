"""comparison.json: paired by prompt, seeds averaged, everything else equal or refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.evaluation_toys import POLITE, row

from equipoise.errors import ConfigError, DataError
from equipoise.evaluation.comparison import Evaluated, compare, load_cost, load_evaluated, mean_cost
from equipoise.evaluation.evaluate import save_evaluation
from equipoise.evaluation.metrics import evaluate_rows


def evaluated(scores: Sequence[float | None], *, name: str = "base", **changes: Any) -> Evaluated:
    rows = [row(group, score, kind="benign" if group % 2 else "adversarial") for group, score in enumerate(scores)]
    rows = [{**r, **changes.pop("row", {})} for r in rows]
    evaluation = evaluate_rows(rows, [POLITE], None, policy_name=name, judge_name="j", seed=0)
    return Evaluated({**evaluation, **changes}, rows)


def test_worked_example() -> None:
    """Base (1, 2); seeds (2, 2) and (4, 3): differences (1, 0) and (3, 1), by prompt 2 and 0.5, mean 1.25."""
    result = compare(evaluated([1.0, 2.0]), {"m": [evaluated([2.0, 2.0]), evaluated([4.0, 3.0])]})
    method = result["methods"]["m"]
    assert method["paired_difference"]["politeness"] == {"mean": 1.25, "ci95": [0.5, 2.0], "n": 2}
    assert method["paired_difference"]["combined"]["mean"] == 1.25
    assert [point["combined"] for point in method["seeds"]] == [2.0, 3.5]
    assert method["evaluation"]["combined"]["mean"] == 2.75
    assert method["evaluation"]["num_completions"] == 4
    assert result["base"]["combined"]["mean"] == 1.5
    json.dumps(result, allow_nan=False)


def test_pairing_removes_what_prompts_share() -> None:
    """Prompts differ a lot, the method adds 0.1 everywhere: the difference has no spread at all."""
    base = [0.0, 5.0, -3.0, 2.0, 9.0]
    difference = compare(evaluated(base), {"m": [evaluated([b + 0.125 for b in base])]})["methods"]["m"][
        "paired_difference"
    ]["combined"]
    assert difference["mean"] == pytest.approx(0.125, rel=1e-12)
    assert difference["ci95"] == pytest.approx([0.125, 0.125], rel=1e-12)


def test_a_policy_against_itself_differs_by_exactly_nothing() -> None:
    base = evaluated([0.3, 0.1, 0.7])
    difference = compare(base, {"same": [base]})["methods"]["same"]["paired_difference"]
    assert set(difference) == {"politeness", "combined"}
    for values in difference.values():
        assert values["mean"] == 0.0 and values["ci95"] == [0.0, 0.0]


def test_one_seed_keeps_its_own_evaluation() -> None:
    method = evaluated([0.3, 0.1], name="grpo")
    assert compare(evaluated([0.1, 0.1]), {"m": [method]})["methods"]["m"]["evaluation"] == method.evaluation


def test_prompts_without_a_score_on_either_side_are_left_out_and_counted() -> None:
    result = compare(evaluated([1.0, None, 3.0, 4.0]), {"m": [evaluated([2.0, 2.0, None, 6.0])]})
    assert result["methods"]["m"]["paired_difference"]["combined"] == {"mean": 1.5, "ci95": [1.0, 2.0], "n": 2}


def test_refusals_are_compared_by_kind() -> None:
    base = evaluated([1.0, 1.0, 1.0, 1.0])
    refusing = evaluated([1.0, 1.0, 1.0, 1.0])
    refusing.rows[0]["refusal"] = True  # prompts 0 and 2 are adversarial
    difference = compare(base, {"m": [refusing]})["methods"]["m"]["refusal_difference"]
    assert difference["adversarial"]["mean"] == 0.5
    assert difference["benign"]["mean"] == 0.0


def test_differences_by_kind_worked_example() -> None:
    """Adversarial prompts 0 and 2: +1 and +3, mean 2; benign prompts 1 and 3: -1, and one without a score."""
    result = compare(evaluated([1.0, 2.0, 1.0, None]), {"m": [evaluated([2.0, 1.0, 4.0, 5.0])]})
    by_kind = result["methods"]["m"]["paired_by_kind"]
    assert list(by_kind) == ["adversarial", "benign"]
    assert by_kind["adversarial"]["politeness"] == {"mean": 2.0, "ci95": [1.0, 3.0], "n": 2}
    assert by_kind["benign"]["politeness"] == {"mean": -1.0, "ci95": [-1.0, -1.0], "n": 1}
    assert by_kind["benign"]["combined"] == by_kind["benign"]["politeness"]


def test_other_prompts_are_refused_naming_the_first() -> None:
    base = evaluated([1.0, 1.0])
    with pytest.raises(ConfigError, match="prompt 2 of m is 'other', of the base 'prompt 1'"):
        other = evaluated([1.0, 1.0])
        other.rows[1]["prompt"] = "other"
        compare(base, {"m": [other]})
    with pytest.raises(ConfigError, match="m has 3 prompts, the base 2"):
        compare(base, {"m": [evaluated([1.0, 1.0, 1.0])]})
    with pytest.raises(ConfigError, match="prompt 1 is borderline in m, adversarial in the base"):
        other = evaluated([1.0, 1.0])
        other.rows[0]["kind"] = "borderline"
        compare(base, {"m": [other]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": "another"}, "judge 'another'"),
        ({"weights": {"politeness": 2.0}}, "weights"),
        ({"aspects": {"wit": {}}}, "aspects wit"),
        ({"settings": {"temperature": 0.5}}, "temperature 0.5"),
    ],
)
def test_what_was_measured_otherwise_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(evaluated([1.0]), {"m": [evaluated([1.0], **changes)]})


def test_no_methods_or_no_seeds() -> None:
    with pytest.raises(ConfigError, match="no methods"):
        compare(evaluated([1.0]), {})
    with pytest.raises(ConfigError, match="'m' has no evaluation"):
        compare(evaluated([1.0]), {"m": []})


def test_cost_is_the_mean_over_seeds(tmp_path: Path) -> None:
    costs = [{"wall_s": 10, "flops": {"generate": 2.0}, "device": "cpu"}, {"wall_s": 20, "flops": {"generate": 4.0}}]
    assert mean_cost(costs) == {"wall_s": 15.0, "flops": {"generate": 3.0}}
    assert mean_cost(costs[:1]) == costs[0]
    one = evaluated([1.0])
    result = compare(one, {"m": [Evaluated(one.evaluation, one.rows, cost) for cost in costs], "none": [one]})
    assert result["methods"]["m"]["cost"]["wall_s"] == 15.0
    assert result["methods"]["m"]["cost_per_seed"] == costs
    assert result["methods"]["none"]["cost"] is None
    assert load_cost(tmp_path) is None
    (tmp_path / "cost.json").write_text('{"wall_s": 1}')
    assert load_cost(tmp_path) == {"wall_s": 1}


def test_saved_evaluations_compare_as_the_ones_in_memory(tmp_path: Path) -> None:
    base, method = evaluated([1.0, 0.1]), evaluated([0.3, 0.7], name="m")
    save_evaluation(tmp_path / "base", base.evaluation, base.rows)
    save_evaluation(tmp_path / "m", method.evaluation, method.rows)
    loaded = compare(load_evaluated(tmp_path / "base"), {"m": [load_evaluated(tmp_path / "m")]})
    assert loaded == compare(base, {"m": [method]})


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"evaluation\.json: no such file"):
        load_evaluated(tmp_path)
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(DataError, match=r"evaluation\.json:1: not JSON"):
        load_evaluated(tmp_path)
    (tmp_path / "evaluation.json").write_text("[]")
    with pytest.raises(DataError, match="holds a list"):
        load_evaluated(tmp_path)
    (tmp_path / "evaluation.json").write_text('{"policy": "p"}')
    with pytest.raises(DataError, match="field 'judge' is missing"):
        load_evaluated(tmp_path)
