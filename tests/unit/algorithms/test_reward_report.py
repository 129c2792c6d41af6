"""Metrics of the reward report, checked by hand and against scipy."""

from __future__ import annotations

import json
import math

import pytest
import scipy.stats
import torch

from equipoise.algorithms.reward_report import (
    aspect_metrics,
    no_better_than_mean,
    plot_aspect,
    plot_names,
    reliability,
    split_metrics,
    write_report,
)
from equipoise.models.aspects import Aspect

NAN = math.nan


def test_metrics_worked():
    """Predictions [1, 2, 4], labels [1, 3, nan], training mean 1.

    errors 0 and -1: mse 1/2, mae 1/2, bias -1/2; labels' mean 2, deviations 1 and 1: r2 = 1 - 1/2; two points in the
    same order: correlations 1; from the training mean 0 and -2: baseline_mse 4/2, baseline_mae 2/2.
    """
    found = aspect_metrics(
        torch.tensor([1.0, 2.0, 4.0]).double(), torch.tensor([1.0, 3.0, NAN]).double(), training_mean=1.0
    )
    assert found == pytest.approx(
        {
            "n": 2,
            "mse": 0.5,
            "mae": 0.5,
            "bias": -0.5,
            "r2": 0.5,
            "pearson": 1.0,
            "spearman": 1.0,
            "baseline_mse": 2.0,
            "baseline_mae": 1.0,
        },
        rel=1e-12,
    )


def test_correlations_agree_with_scipy():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (80,), generator=generator).double()  # with ties
    predictions = labels + 2 * torch.randn(80, generator=generator).double()
    found = aspect_metrics(predictions, labels, 0.0)
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(predictions, labels).statistic, rel=1e-9)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(predictions, labels).statistic, rel=1e-9)


def test_undefined_values_are_none():
    empty = aspect_metrics(torch.tensor([1.0]), torch.tensor([NAN]), 0.0)
    assert empty["n"] == 0
    assert {value for name, value in empty.items() if name != "n"} == {None}
    constant = aspect_metrics(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 3.0]), 0.0)
    assert constant["spearman"] is None and constant["pearson"] is None and constant["r2"] is None
    assert constant["mse"] == pytest.approx(2.5)


def test_reliability_worked():
    """Sorted by prediction, halves {1, 2} and {3, 4}: means 1.5 and 3.5 predicted, 1 and 4 true."""
    predicted, true, count = reliability(torch.tensor([3.0, 1.0, 4.0, 2.0]), torch.tensor([4.0, 1.0, 4.0, 1.0]), 2)
    assert (predicted.tolist(), true.tolist(), count.tolist()) == ([1.5, 3.5], [1.0, 4.0], [2, 2])
    few = reliability(torch.tensor([1.0]), torch.tensor([2.0]), 10)
    assert [part.tolist() for part in few] == [[1.0], [2.0], [1]]


def test_no_better_than_the_mean_is_judged_on_test_first():
    good, bad, none = ({"n": 5, "mse": mse, "baseline_mse": 1.0} for mse in (0.9, 1.0, 0.0))
    none["n"] = 0
    assert no_better_than_mean({"test": {"a": good}, "validation": {"a": bad}}, "a") is None
    assert no_better_than_mean({"test": {"a": bad}, "validation": {"a": good}}, "a") == "test"
    assert no_better_than_mean({"test": {"a": none}, "validation": {"a": bad}}, "a") == "validation"
    assert no_better_than_mean({"test": {"a": none}, "validation": {"a": none}}, "a") is None


def test_columns_are_matched_with_aspects():
    aspects = [Aspect("x", True, mean=1.0), Aspect("y", False, mean=2.0)]
    found = split_metrics(torch.tensor([[1.0, 5.0]]), torch.tensor([[1.0, 7.0]]), aspects)
    assert found["x"]["mse"] == 0.0 and found["y"]["mse"] == 4.0 and found["y"]["baseline_mse"] == 25.0


def test_plot_names_are_file_names_and_stay_apart():
    names = ["toxigen/toxicity", "toxigen_toxicity", "a b", "..", "Élan", "A", "a"]
    found = plot_names([Aspect(name, True) for name in names])
    assert found["toxigen/toxicity"] == "toxigen_toxicity.png"
    assert found["toxigen_toxicity"] == "toxigen_toxicity_2.png"
    assert len({name.lower() for name in found.values()}) == len(names)
    assert all("/" not in name and not name.startswith(".") for name in found.values())


def test_plot_is_written(tmp_path):
    path = tmp_path / "plots" / "a.png"
    aspect = Aspect("cost $ \\frac & <b> $", False)
    plot_aspect(path, aspect, torch.randn(50), torch.where(torch.rand(50) < 0.2, NAN, torch.randn(50)), "test")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_report_is_plain_json(tmp_path):
    write_report(tmp_path / "reward_report.json", {"a": 1.5})
    assert json.loads((tmp_path / "reward_report.json").read_text()) == {"a": 1.5}
    with pytest.raises(ValueError, match="JSON"):
        write_report(tmp_path / "other.json", {"a": NAN})
