"""evaluation.json from scores given by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
from tests.evaluation_toys import NAN, POLITE, TOXIC, hand_rollout, row

from equipoise.errors import ConfigError, DataError
from equipoise.evaluation.metrics import evaluate_rollout, evaluate_rows, interval, kl_per_completion
from equipoise.evaluation.rows import (
    combined_scores,
    completion_rows,
    prompt_table,
    read_rows,
    resolve_weights,
    write_json,
    write_rows,
)
from equipoise.models.aspects import Aspect

ASPECTS = [POLITE, TOXIC]
NAMES = {"policy_name": "p", "judge_name": "j", "seed": 0}


def _one_prompt_per_score(scores: list[float], kind: str = "benign") -> list[dict]:
    return [row(group, score, kind=kind) for group, score in enumerate(scores)]


def test_worked_example() -> None:
    """Two prompts of two completions.

    Politeness 0.2, 0.4 | 0.8, missing: prompt means 0.3 and 0.8, mean 0.55.
    Toxicity (1 to 5, lower is better) 1, 3 | 5, 2: prompt means 2 and 3.5, mean 2.75.
    Utilities of toxicity 1, 0.5 | 0, 0.75. Combined with weights 1/2: (0.2+1)/2 = 0.6, (0.4+0.5)/2 = 0.45 | 0.4,
    not scored: prompt means 0.525 and 0.4, mean 0.4625.
    """
    rollout = hand_rollout([["a b", "c"], ["I can't help with that.", "d e f"]], kinds=["benign", "adversarial"])
    scores = torch.tensor([[0.2, 1.0], [0.4, 3.0], [0.8, 5.0], [NAN, 2.0]], dtype=torch.float64)
    kl = torch.tensor([0.5, -0.1, 1.0, 0.2], dtype=torch.float64)
    result = evaluate_rollout(rollout, scores, ASPECTS, None, kl_B=kl, **NAMES)
    assert (result["policy"], result["judge"], result["num_prompts"], result["num_completions"]) == ("p", "j", 2, 4)
    assert result["aspects"]["politeness"]["mean"] == pytest.approx(0.55)
    assert result["aspects"]["toxicity"]["mean"] == pytest.approx(2.75)
    assert result["aspects"]["toxicity"]["by_kind"]["adversarial"]["mean"] == pytest.approx(3.5)
    assert result["aspects"]["toxicity"]["by_kind"]["benign"]["n"] == 1
    assert result["combined"]["mean"] == pytest.approx(0.4625)
    assert result["combined"]["by_kind"]["benign"]["mean"] == pytest.approx(0.525)
    assert result["num_unscored"] == 0
    assert result["refusal_rate"] == {"adversarial": 0.5, "benign": 0.0}
    assert result["kl_to_reference"] == pytest.approx(0.4)  # (0.5 - 0.1)/2 = 0.2 and (1.0 + 0.2)/2 = 0.6
    assert result["completion_length"] == pytest.approx((1.5 + 4.0) / 2)
    assert result["weights"] == {"politeness": 0.5, "toxicity": 0.5}
    json.dumps(result, allow_nan=False)


def test_the_interval_of_two_prompts_is_known() -> None:
    """Prompts 0 and 1: a resample's mean is 0 (1/4), 1/2 (1/2) or 1 (1/4), so the 2.5% and 97.5% points are 0, 1."""
    result = interval(torch.tensor([0.0, 1.0], dtype=torch.float64), seed=3)
    assert result == {"mean": 0.5, "ci95": [0.0, 1.0], "n": 2}


def test_interval_matches_the_normal_one_on_many_prompts() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = interval(values, seed=0)
    half = 1.959964 * float(values.std(correction=0)) / math.sqrt(400)
    assert result["ci95"][0] == pytest.approx(result["mean"] - half, abs=0.01)
    assert result["ci95"][1] == pytest.approx(result["mean"] + half, abs=0.01)


def test_the_prompt_is_the_unit_so_copies_of_completions_change_nothing() -> None:
    scores = [0.1, 0.9, 0.4, 0.6, 0.2]
    once = _one_prompt_per_score(scores)
    eight = [{**r, "index": i} for r in once for i in range(8)]
    a = evaluate_rows(once, [POLITE], None, **NAMES)
    b = evaluate_rows(eight, [POLITE], None, **NAMES)
    assert a["combined"]["mean"] == pytest.approx(b["combined"]["mean"], rel=1e-12)
    assert a["combined"]["ci95"] == pytest.approx(b["combined"]["ci95"], rel=1e-12)
    assert b["num_completions"] == 40 and b["combined"]["n"] == 5


def test_prompts_weigh_the_same_however_many_completions_were_scored() -> None:
    rows = [row(0, 1.0), row(0, 1.0), row(0, 1.0), row(1, 0.0)]
    assert evaluate_rows(rows, [POLITE], None, **NAMES)["aspects"]["politeness"]["mean"] == 0.5


def test_the_order_of_rows_and_the_seed() -> None:
    rows = _one_prompt_per_score([0.1, 0.9, 0.4, 0.6, 0.2])
    first = evaluate_rows(rows, [POLITE], None, **NAMES)
    assert evaluate_rows(rows[::-1], [POLITE], None, **NAMES) == first


def test_the_seed_decides_the_resamples() -> None:
    rows = _one_prompt_per_score([math.sin(i) for i in range(30)])
    first, again, other = (
        evaluate_rows(rows, [POLITE], None, policy_name="p", judge_name="j", seed=seed)["combined"]
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first["ci95"] != other["ci95"]
    assert first["ci95"] == pytest.approx(other["ci95"], abs=0.03)


def test_prompts_without_every_weighted_aspect_are_left_out_of_combined_and_counted() -> None:
    rollout = hand_rollout([["a"], ["b"], ["c"]])
    scores = torch.tensor([[0.2, 1.0], [NAN, 1.0], [0.4, NAN]], dtype=torch.float64)
    result = evaluate_rollout(rollout, scores, ASPECTS, None, **NAMES)
    assert result["num_unscored"] == 2
    assert result["combined"]["n"] == 1
    assert result["combined"]["mean"] == pytest.approx(0.6)
    assert result["aspects"]["politeness"]["mean"] == pytest.approx(0.3)
    assert result["aspects"]["politeness"]["n"] == 2
    without_toxicity = evaluate_rollout(rollout, scores, ASPECTS, {"politeness": 1.0, "toxicity": 0.0}, **NAMES)
    assert without_toxicity["num_unscored"] == 1
    assert without_toxicity["combined"]["mean"] == pytest.approx(0.3)


def test_nothing_scored_gives_null_not_nan() -> None:
    result = evaluate_rows([row(0, None), row(1, None)], [POLITE], None, **NAMES)
    assert result["combined"]["mean"] is None and result["combined"]["ci95"] == [None, None]
    assert result["kl_to_reference"] is None and result["kl_ci95"] is None
    assert result["num_unscored"] == 2
    json.dumps(result, allow_nan=False)


def test_combined_uses_the_weights_as_given() -> None:
    """Utilities 0.5 and 0.75 with weights 2 and 1: 1.75."""
    scores = torch.tensor([[0.5, 2.0]], dtype=torch.float64)
    assert combined_scores(scores, ASPECTS, {"politeness": 2.0, "toxicity": 1.0}).tolist() == [1.75]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"politeness": 1.0, "toxicity": 1.0, "wit": 1.0}, "unknown aspect 'wit'"),
        ({"politeness": 1.0}, "no weight for aspect 'toxicity'"),
        ({"politeness": -1.0, "toxicity": 1.0}, "politeness=-1.0"),
        ({"politeness": math.nan, "toxicity": 1.0}, "politeness=nan"),
        ({"politeness": 0.0, "toxicity": 0.0}, "all are 0"),
    ],
)
def test_wrong_weights(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_weights(weights, ASPECTS)


def test_an_aspect_called_combined_is_refused() -> None:
    with pytest.raises(ConfigError, match="taken"):
        resolve_weights(None, [Aspect("combined", True)])
    with pytest.raises(ConfigError, match="scores no aspect"):
        resolve_weights(None, [])


def test_kl_is_summed_over_the_tokens_of_the_mask() -> None:
    """(-1 + 1.5) + (-2 + 2.25) = 0.75; the masked third token, however wild, adds nothing."""
    logprobs = torch.tensor([[-1.0, -2.0, 100.0], [-1.0, -1.0, -1.0]])
    reference = torch.tensor([[-1.5, -2.25, float("-inf")], [-1.0, -0.5, -1.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert kl_per_completion(logprobs, reference, mask).tolist() == [0.75, -0.5]
    with pytest.raises(ConfigError, match="differ"):
        kl_per_completion(logprobs, reference[:, :2], mask)


def test_kl_averages_to_the_exact_divergence() -> None:
    """One token of three words, drawn many times: the mean of k1 is sum p log(p/q)."""
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    drawn = torch.multinomial(p, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    kl = kl_per_completion(p.log()[drawn][:, None], q.log()[drawn][:, None], torch.ones(200_000, 1, dtype=torch.bool))
    assert float(kl.mean()) == pytest.approx(float((p * (p / q).log()).sum()), abs=5e-3)


def test_scores_of_another_shape_are_refused() -> None:
    rollout = hand_rollout([["a"], ["b"]])
    with pytest.raises(ConfigError, match=r"\(2, 2\)"):
        completion_rows(rollout, torch.zeros(2, 1), ASPECTS, resolve_weights(None, ASPECTS))


def test_groups_not_texts_make_a_prompt() -> None:
    table = prompt_table([row(0, 0.0, prompt="same"), row(1, 1.0, prompt="same")], ["politeness"])
    assert table.aspects["politeness"].tolist() == [0.0, 1.0]
    with pytest.raises(DataError, match="two different prompts"):
        prompt_table([row(0, 0.0, prompt="one"), row(0, 1.0, prompt="two")], ["politeness"])
    with pytest.raises(DataError, match="no completions"):
        prompt_table([], ["politeness"])


def test_truncated_fraction() -> None:
    rollout = hand_rollout([["a", "b"], ["c", "d"]], truncated=frozenset({0, 2, 3}))
    result = evaluate_rollout(rollout, torch.zeros(4, 2), ASPECTS, None, **NAMES)
    assert result["truncated_fraction"] == 0.75


def test_rows_survive_the_file(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    rows = [row(0, 0.5, response="two\nlines   and “quotes”", prompt=messages), row(1, None, prompt="")]
    write_rows(tmp_path / "a" / "completions.jsonl", rows)
    assert read_rows(tmp_path / "a" / "completions.jsonl") == rows
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["completions.jsonl"]


def test_text_that_is_not_unicode_does_not_stop_the_write(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [row(0, 0.5, response="bad \ud800 half")])
    assert read_rows(tmp_path / "rows.jsonl")[0]["response"] == "bad ? half"


def test_a_failed_write_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "evaluation.json"
    write_json(path, {"good": 1})

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"good": 2})
    assert json.loads(path.read_text()) == {"good": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]


def test_broken_rows_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "completions.jsonl"
    with pytest.raises(DataError, match="no such file"):
        read_rows(path)
    path.write_text(json.dumps(row(0, 1.0)) + "\n{broken\n")
    with pytest.raises(DataError, match=r"completions\.jsonl:2: not JSON"):
        read_rows(path)
    path.write_text(json.dumps({"prompt": "x"}) + "\n")
    with pytest.raises(DataError, match=r":1: field 'kind' is missing"):
        read_rows(path)
