"""Conditioned GRPO wired up: what prompts ask, what scorers see, advantages and metrics, against a slow twin."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tests.conditioned_toys import ASPECTS, TEMPLATE, ReadingWorld
from tests.grpo_twin import TableScorer
from tests.run_toys import differences, metrics, train, train_until_crash
from tests.toy import two_aspects

import equipoise.algorithms.online as online
from equipoise.algorithms.conditioning import Conditioning
from equipoise.algorithms.grpo_signal import Objectives
from equipoise.cli.validate import validate_target
from equipoise.config import GRPOConfig, load_recipe
from equipoise.data import PromptRecord
from equipoise.errors import ConfigError
from equipoise.models.policy import load_policy
from equipoise.rollout.preference_conditioning import ask, check_place, sample_weights

SEEN: list[tuple[str, str]] = []  # prompts and completions that the scorer was given


def watching(prompts: list[Any], completions: list[str]) -> dict[str, list[float | None]]:
    """The toy's two aspects, the second missing where the completion is short; notes what it was given."""
    SEEN.extend(zip(prompts, completions, strict=True))
    scores = two_aspects(prompts, completions)
    rude = [None if len(text.split()) < 3 else v for text, v in zip(completions, scores["rudeness"], strict=True)]
    return {**scores, "rudeness": rude}


WATCHING = [{"function": f"{__name__}:watching", "aspects": ASPECTS}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> ReadingWorld:
    torch.set_num_threads(1)
    return ReadingWorld(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def recipe(world: ReadingWorld) -> Path:
    evaluation = {"every": 2, "prompts": str(world.prompts)}
    return world.conditioned(scorers=WATCHING, group_size=6, evaluation=evaluation, num_minibatches=2)


@pytest.fixture(scope="module")
def whole(recipe: Path, world: ReadingWorld) -> Path:
    """Three steps of a conditioned run."""
    out = world.directory / "whole"
    train(recipe, out)
    return out


def rows_of(out: Path, step: int) -> list[dict[str, Any]]:
    return pq.read_table(out / "completions" / f"step_{step:06}.parquet").to_pylist()


def utility(row: dict[str, Any], name: str) -> float | None:
    score = row[f"score/{name}"]
    return score if score is None or name == "politeness" else 1 - score


def test_every_group_asks_for_its_draw_and_is_rewarded_by_it(whole: Path) -> None:
    """Section 4 of the design, group by group, with Python numbers; weights are 3 times the shares of the draw."""
    for step in range(3):
        draws = sample_weights(2, range(4), seed=0, step=step).tolist()
        assert len({tuple(draw) for draw in draws}) > 1
        rows = rows_of(whole, step + 1)
        combined = []
        for group, draw in enumerate(draws):
            members = [row for row in rows if row["group"] == group]
            assert len(members) == 6
            sums = [0.0] * 6
            for name, share in zip(ASPECTS, draw, strict=True):
                assert all(row[f"asked/{name}"] == share for row in members)
                values = [utility(row, name) for row in members]
                scored = [value for value in values if value is not None]
                for i, value in enumerate(values):
                    if value is not None and max(scored) > min(scored):
                        sums[i] += 3 * share * (value - sum(scored) / len(scored))
            used = [name for name, share in zip(ASPECTS, draw, strict=True) if share > 0]
            rewarded = [any(utility(row, name) is not None for name in used) for row in members]
            spread = statistics.stdev(s for s, r in zip(sums, rewarded, strict=True) if r) if sum(rewarded) > 1 else 0
            for row, total in zip(members, sums, strict=True):
                assert row["advantage"] == pytest.approx(total / (spread + 1e-4), abs=1e-9)
                values = [utility(row, name) for name in used]
                if None not in values:
                    weights = [share for share in draw if share > 0]
                    combined.append(3 * sum(w * v for w, v in zip(weights, values, strict=True)))  # type: ignore[operator]
        assert metrics(whole)[step]["reward/combined"] == pytest.approx(sum(combined) / len(combined))


def test_what_a_step_says_of_following(whole: Path) -> None:
    line, rows = metrics(whole)[1], rows_of(whole, 2)
    gain = 0.0
    for name in ASPECTS:
        asked, got = [], []
        for group in range(4):
            members = [row for row in rows if row["group"] == group]
            values = [v for row in members if (v := utility(row, name)) is not None]
            asked.append(members[0][f"asked/{name}"])
            got.append(round(sum(values) / len(values), 9))
        assert line[f"asked/{name}/mean"] == pytest.approx(sum(asked) / 4)
        ranks = [[sum(b < a for b in column) + (column.count(a) + 1) / 2 for a in column] for column in (asked, got)]
        expected = statistics.correlation(*ranks) if min(map(max, ranks)) > max(map(min, ranks)) else None
        assert line[f"asked/{name}/rank_correlation"] == pytest.approx(expected)
        gain += statistics.covariance(asked, got)
    assert line["asked/gain"] == pytest.approx(gain)


def test_shares_add_up_and_diagnostics_stay_shares(whole: Path) -> None:
    for line, step in zip(metrics(whole), range(1, 4), strict=True):
        for kind in ("raw_share", "weighted_share", "normalised_share"):
            assert sum(line[f"objective/{name}/{kind}"] for name in ASPECTS) == pytest.approx(1)
        assert line["reward_vectors"] >= line["collapsed_vectors"] >= 0
        for row in rows_of(whole, step):
            assert sum(row[f"share/{name}"] for name in ASPECTS) == pytest.approx(row["advantage"], abs=1e-12)
    assert "evaluation/combined" in metrics(whole)[1]


def test_the_policy_reads_the_weights_and_scorers_do_not(
    recipe: Path, world: ReadingWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, str, str]] = []
    generate = online.generate

    def spying(policy: Any, prompts: Any, *rest: Any, **named: Any) -> Any:
        rollout = generate(policy, prompts, *rest, **named)
        for row in range(len(rollout)):
            ids = rollout.prompt_ids_BS[row][rollout.prompt_mask_BS[row]]
            read.append((int(rollout.group_ids_B[row]), policy.tokenizer.decode(ids), rollout.prompts[row]))
        return rollout

    monkeypatch.setattr(online, "generate", spying)
    SEEN.clear()
    train(recipe, tmp_path / "run", "num_steps=1", "evaluation=null")
    draws = sample_weights(2, range(4), seed=0, step=0).tolist()
    assert len(read) == 24
    for group, text, prompt in read:
        polite, rude = draws[group]
        expected = f"make politeness {polite:.2f}, rudeness {rude:.2f}."
        assert text.replace(" ", "") == (expected + prompt).replace(" ", "")
    assert SEEN and {prompt for prompt, _ in SEEN} == {prompt for _, _, prompt in read}
    assert not any("0" in prompt for prompt, _ in SEEN)


def test_a_run_that_dies_after_any_step_ends_the_same(
    recipe: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        out = tmp_path / f"after-{step}"
        train_until_crash(recipe, out, step, monkeypatch)
        train(recipe, out, resume=True)
        assert differences(whole, out) == []


def conditioning_of(recipe: Path, *overrides: str) -> Conditioning:
    config = load_recipe(recipe, list(overrides))
    assert isinstance(config, GRPOConfig)
    found = Conditioning.of(config, Objectives.of(config, [TableScorer([[0.0, 0.0]], tuple(ASPECTS))]))
    assert found is not None
    return found


def test_a_rank_asks_for_its_part_of_the_same_draw(recipe: Path) -> None:
    conditioning = conditioning_of(recipe)
    prompts = [PromptRecord(prompt=f"p{i}") for i in range(6)]
    parts = [conditioning.asking(prompts[start : start + 2], 3, start) for start in (0, 2, 4)]
    assert [record for part in parts for record in part] == conditioning.asking(prompts, 3, 0)
    ids = torch.tensor([4, 4, 5, 5])
    assert torch.equal(conditioning.weights(3, ids), conditioning.weights(3, torch.arange(6))[ids])


def test_an_objective_of_weight_zero_is_logged_and_not_asked_for(recipe: Path) -> None:
    config = load_recipe(recipe, ["objective_weights={c: 0, rudeness: 1, politeness: 2}"])
    assert isinstance(config, GRPOConfig)
    scorer = TableScorer([[0.0, 0.0, 0.0]], ("politeness", "c", "rudeness"))
    conditioning = Conditioning.of(config, Objectives.of(config, [scorer]))
    assert conditioning is not None
    assert conditioning.preference.aspects == ("rudeness", "politeness"), "in the order of the recipe"
    shares = conditioning.shares(0, [0, 1])
    assert conditioning.weights(0, torch.tensor([0, 1])).tolist() == [
        pytest.approx([3 * polite, 0.0, 3 * rude]) for rude, polite in shares.tolist()
    ]
    assert conditioning.usual == {"rudeness": 0.33, "politeness": 0.67}


def test_following_is_measured_without_what_was_not_scored(recipe: Path) -> None:
    conditioning = conditioning_of(recipe)
    utilities = torch.full((4, 2), math.nan, dtype=torch.float64)
    found = conditioning.metrics(utilities, 0, torch.arange(4))
    assert found["asked/gain"] == 0.0 and found["asked/politeness/rank_correlation"] is None


def test_the_saved_model_tells_how_it_is_asked(whole: Path, world: ReadingWorld) -> None:
    values = json.loads((whole / "model" / "equipoise.json").read_text())
    assert values == {
        "prompt_format": "text",
        "conditioned": {"aspects": ["politeness", "rudeness"], "template": TEMPLATE},
    }
    policy = load_policy(whole / "model")
    (record,) = ask(policy, ["how do i walk"], {"politeness": 1, "rudeness": 3})
    assert record.preamble == "make politeness 0.25, rudeness 0.75." and record.prompt == "how do i walk"
    with pytest.raises(ConfigError, match=r"ask: unknown aspect 'safety'"):
        ask(policy, ["how"], {"safety": 1, "politeness": 1})
    with pytest.raises(ConfigError, match="was not trained to read weights"):
        ask(load_policy(world.model), ["how"], {"politeness": 1, "rudeness": 1})


def test_the_usual_weights_are_what_the_in_loop_evaluation_asks_for(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import equipoise.evaluation as evaluation

    given: list[PromptRecord] = []

    def spying(policy: Any, records: Any, *rest: Any, **named: Any) -> Any:
        given.extend(records)
        return make(policy, records, *rest, **named)

    make = evaluation.make_evaluation_callback
    monkeypatch.setattr(evaluation, "make_evaluation_callback", spying)
    train(recipe, tmp_path / "run", "num_steps=1")
    assert len(given) == 16 and {record.preamble for record in given} == {"make politeness 0.67, rudeness 0.33."}


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditioned": {"template": "no place"}}, r"needs \{weights\} once"),
        ({"conditioned": {"corner_share": 1.5}}, "corner_share"),
        ({"objective_weights": {"politeness": 1.0, "rudeness": 0.0}}, "conditioned: weighs at least 2 objectives"),
        (
            {"weights_schedule": {"piecewise": [{"step": 1, "weights": {"politeness": 1.0, "rudeness": 1.0}}]}},
            "remove weights_schedule",
        ),
        ({"constraints": {"rudeness": {"max": 0.1}}}, "remove constraints"),
        ({"scale": "batch"}, "scale 'batch' looks across groups"),
        ({"combine": {"method": "gdpo"}}, "conditioned: combine.method gdpo with its defaults looks across groups"),
        ({"combine": {"method": "chebyshev"}}, "chebyshev with its defaults looks across groups"),
        ({"combine": {"method": "mo_grpo"}}, "'mo_grpo' does not use the weights"),
    ],
)
def test_recipes_that_cannot_be_conditioned(changes: dict[str, Any], message: str, world: ReadingWorld) -> None:
    path = world.conditioned("bad", **changes)
    with pytest.raises(ConfigError, match=message):
        validate_target(str(path), [])


def test_a_recipe_that_can_be(recipe: Path, world: ReadingWorld, capsys: pytest.CaptureFixture[str]) -> None:
    validate_target(str(recipe), [])
    assert "a policy that reads: make politeness 0.67, rudeness 0.33." in capsys.readouterr().out
    combine = {"method": "mo_grpo", "options": {"weighted": True}}
    validate_target(str(world.conditioned("weighted", combine=combine)), [])


def test_a_policy_that_would_not_read_the_weights(recipe: Path, world: ReadingWorld, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reads the same tokens whatever the weights are"):
        train(recipe, tmp_path / "run", f"policy.model={world.directory / 'base'}")  # every number is <unk> to it
    policy = load_policy(world.model)
    preference = conditioning_of(recipe).preference
    check_place(policy, preference)
    policy.prompt_format = "chat"
    policy.tokenizer.chat_template = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ConfigError, match="its chat template leaves the system message out"):
        check_place(policy, preference)
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    policy.tokenizer.chat_template = refusing
    with pytest.raises(ConfigError, match=r"has no place for a system message \(.*no system role"):
        check_place(policy, preference)


def test_a_penalty_in_the_reward_joins_every_prompts_weights(world: ReadingWorld, tmp_path: Path) -> None:
    path = world.conditioned(
        "penalised",
        kl_in="reward",
        beta=0.5,
        num_steps=2,
        num_epochs=2,
        scale="leave_one_out",
        reduction="constant",
        constant=1,
    )
    train(path, tmp_path / "run")
    for step in (1, 2):
        for row in rows_of(tmp_path / "run", step):
            shares = [row[f"share/{name}"] for name in (*ASPECTS, "kl")]
            assert sum(shares) == pytest.approx(row["advantage"], abs=1e-9)
