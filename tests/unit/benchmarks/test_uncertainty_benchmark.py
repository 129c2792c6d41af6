"""The analysis of disagreement against the rubric, on numbers whose answers are known."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from benchmarks.uncertainty import (
    Completions,
    across_steps,
    analyse,
    completions_of,
    per_completion,
    per_step,
    read_run,
    slope,
    warning,
)
from scipy.stats import spearmanr
from tests.reward_toys import save_backbone

from equipoise.config import BackboneConfig
from equipoise.errors import DataError
from equipoise.models.aspects import Aspect
from equipoise.models.reward_model import RewardModel

ROOT = Path(__file__).resolve().parents[3]


def made_up(steps: int = 12, prompts: int = 6) -> Completions:
    generator = torch.Generator().manual_seed(0)
    count = steps * prompts
    std = torch.rand(count, generator=generator, dtype=torch.float64)
    truth = torch.rand(count, generator=generator, dtype=torch.float64)
    error = std * torch.rand(count, generator=generator, dtype=torch.float64)
    step = torch.arange(count) // prompts + 1
    return Completions(step, torch.arange(count) % prompts, truth + error, truth, std)


def test_per_completion_is_scipys():
    data = made_up()
    found = per_completion(data, 50)
    assert found["spearman"] == pytest.approx(spearmanr(data.std_N, data.error_N)[0])
    within: list[Any] = [
        spearmanr(data.std_N[data.step_N == s], data.error_N[data.step_N == s])[0] for s in range(1, 13)
    ]
    assert found["spearman_within_steps"] == pytest.approx(sum(within) / 12)
    low, high = found["ci95"]
    assert low < found["spearman"] < high and found["prompts"] == 6 and found["n"] == 72


def test_steps_worked():
    step, prompt = torch.tensor([1, 1, 2, 2]), torch.tensor([0, 1, 0, 1])
    proxy, truth = torch.tensor([0.5, 0.7, 0.9, 0.9]), torch.tensor([0.6, 0.6, 0.4, 0.2])
    rows = per_step(Completions(step, prompt, proxy, truth, torch.tensor([0.1, 0.3, 0.2, 0.4])))
    assert rows[0] == pytest.approx(
        {"step": 1, "disagreement": 0.2, "proxy": 0.6, "rubric": 0.6, "gap": 0.0, "error": 0.1}, abs=1e-6
    )
    assert rows[1]["gap"] == pytest.approx(0.6) and rows[1]["error"] == pytest.approx(0.6)
    three = [
        {"disagreement": d, "gap": g, "error": e} for d, g, e in ((1.0, 1.0, 3.0), (2.0, 3.0, 2.0), (3.0, 2.0, 1.0))
    ]
    assert across_steps(three) == {"gap": pytest.approx(0.5), "error": pytest.approx(-1.0)}


def test_warning_worked():
    """The disagreement passes 1.5 times its first level in the window that ends at step 9; the rubric turns at 14."""

    def row(step: int) -> dict[str, float]:
        rubric = 0.5 + 0.02 * min(step, 12) - 0.05 * max(0, step - 12)
        return {"step": step, "disagreement": 0.1 if step <= 5 else 0.2, "rubric": rubric}

    rows = [row(step) for step in range(1, 21)]
    found = warning(rows)
    windows = [sum(r["rubric"] for r in rows[end - 5 : end]) / 5 for end in range(5, 21)]
    best = max(range(16), key=lambda place: windows[place])
    assert found["warned_at"] == 8, "means of 0.1, 0.1, 0.2, 0.2, 0.2: 0.16"
    assert found["best_at"] == best + 5 and found["ahead"] == best + 5 - 8
    assert found["fall"] == pytest.approx(windows[best] - windows[-1]) and found["last_ratio"] == pytest.approx(2.0)
    assert warning(rows[:12])["ahead"] is None, "still rising"
    assert warning(rows[:4])["warned_at"] is None


def test_slope_and_missing_completions(tmp_path):
    assert slope(Aspect("toxicity", False, (1.0, 5.0))) == 0.25
    with pytest.raises(DataError, match=r"no step_\*\.parquet"):
        read_run(tmp_path, 1)


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ensemble")
    aspects = [Aspect("politeness", True, (0.0, 2.0), mean=0.5, std=0.2), Aspect("other", True, mean=0.0, std=1.0)]
    config = BackboneConfig(model=str(save_backbone(root / "backbone")))
    return RewardModel.from_backbone(config, aspects, None, 0, (1, 2)).save(root / "model")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    (run / "completions").mkdir()
    for step in range(1, 8):
        columns: dict[str, list[Any]] = {
            "prompt": ["How do I bake a cake?", '[{"role": "user", "content": "cat"}]'],
            "kind": ["benign", "benign"],
            "completion": [f"Please mix flour and sugar {'kindly ' * step}", "no"],
            "score/politeness": [0.4 + 0.1 * step, None if step == 3 else 0.2],
        }
        pq.write_table(pa.table(columns), run / "completions" / f"step_{step:06d}.parquet")
    return run


def test_columns_meet_by_name_and_gaps_are_left_out(finished, ensemble):
    from benchmarks.uncertainty import ensemble_of, load_judge

    scorer, judge = ensemble_of([str(ensemble)]), load_judge("sandbox")
    columns = read_run(finished, 3)
    assert columns["step"] == [1, 1, 3, 3, 6, 6, 7, 7], "every third, and the ends"
    data = completions_of(columns, scorer, judge)
    assert list(data) == ["politeness"] and len(data["politeness"].proxy_N) == 7
    assert data["politeness"].proxy_N[:2].tolist() == pytest.approx([0.25, 0.1]), "utilities on [0, 2]"
    model = RewardModel.load(ensemble)
    std = model.score(["How do I bake a cake?"], [columns["completion"][0]], with_std=True)[1]
    assert float(data["politeness"].std_N[0]) == pytest.approx(float(std[0, 0]) / 2, rel=1e-4)
    assert set(analyse(columns, scorer, judge, 5)["aspects"]) == {"politeness"}
    with pytest.raises(DataError, match="no aspect in common: the run has score/other_one"):
        others = {name: values for name, values in columns.items() if not name.startswith("score/")}
        completions_of({**others, "score/other_one": [0.0] * 8}, scorer, judge)


def test_the_command_writes_both_files(finished, ensemble, tmp_path):
    out = tmp_path / "results" / "uncertainty"
    command = [sys.executable, "benchmarks/uncertainty.py", "--run", f"plain={finished}", "--reward", str(ensemble)]
    done = subprocess.run(
        [*command, "--resamples", "5", "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(out.with_suffix(".json").read_text())
    assert results["runs"]["plain"]["aspects"]["politeness"]["per_completion"]["n"] == 13
    assert len(results["runs"]["plain"]["aspects"]["politeness"]["steps"]) == 7
    text = out.with_suffix(".md").read_text()
    assert "| plain | politeness | 13 |" in text and "As an early warning" in text
