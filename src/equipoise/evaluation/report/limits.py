"""What the page does and does not show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from equipoise.evaluation.report.inputs import ReportData
from equipoise.evaluation.report.section import Section
from equipoise.evaluation.report.text import counted, joined, plain, policy_label


def content(data: ReportData) -> dict[str, Any] | None:
    """Sentences that hold for this directory; what is absent from it is added by the page."""
    return {"sentences": [text for text in _sentences(data) if text]}


def _sentences(data: ReportData) -> list[str]:
    return [*_world(data), *_statistics(data), *_judging(data)]


def _world(data: ReportData) -> list[str]:
    if data.quickstart is None:
        return []
    held_out = data.quickstart.data.get("held_out")
    return [
        "This is a run in an embedded, synthetic world with a small model. It shows that the machinery works: that "
        "training moves what it is meant to move, and that the measurement would notice if it did not. It does not "
        "show that any real model is safe.",
        f"Test prompts hold out of training: {plain(held_out)}. They come from the same world as the training prompts, "
        "so the results say little about prompts of another kind."
        if held_out
        else "",
    ]


def _statistics(data: ReportData) -> list[str]:
    if not data.evaluations:
        return ["Nothing here was evaluated on held-out prompts with intervals: training curves alone show no effect."]
    first = next(iter(data.evaluations.values()))
    result = [
        f"Intervals are 95% percentile bootstraps over {counted(first.num_prompts, 'prompt')}: they say how much the "
        "result might differ on other prompts of the same kind, not with another training seed. They are not corrected "
        "for looking at several aspects, kinds and policies."
    ]
    if data.comparison is None:
        return [*result, "No policy was compared with a base prompt by prompt, so no difference is claimed."]
    by_count: dict[int, list[str]] = {}
    for name, method in data.comparison.methods.items():
        by_count.setdefault(len(method.seeds) or 1, []).append(policy_label(name))
    for count, names in sorted(by_count.items()):
        result.append(_seeds(count, names))
    return result


def _seeds(count: int, names: Sequence[str]) -> str:
    if count == 1:
        return f"{joined(names)}: one training seed. Another seed would train another policy, with other scores."
    return f"{joined(names)}: {count} training seeds, averaged prompt by prompt; their own means are the small points."


def _judging(data: ReportData) -> list[str]:
    result = []
    if data.quickstart is not None:
        result.append(
            "The rubric is a program that reads text by fixed rules. It is tested on cases labelled by hand, and it "
            "can still be wrong or be gamed: read the transcripts."
        )
        result.append(
            "The reward model is trained on rubric scores with rater noise and missing labels. Training sees only the "
            "reward model; where its scores and the rubric's part ways, training has begun to exploit its errors."
        )
    cut = {
        policy_label(name): evaluation.truncated_fraction
        for name, evaluation in data.evaluations.items()
        if evaluation.truncated_fraction
    }
    if cut:
        shares = ", ".join(f"{share:.0%} of {name}" for name, share in cut.items())
        result.append(f"Completions that reached the token limit and were judged as cut: {shares}.")
    if any(rates for rates in (evaluation.refusal_rate for evaluation in data.evaluations.values())):
        result.append("Refusals are recognised by wording: an unusual one is missed, and a quoted one may be counted.")
    if data.controls is not None and data.controls.earlier():
        titles = ", ".join(data.controls.earlier())
        result.append(f"Controls of an earlier run ({data.controls.made}), not of this one: {titles}.")
    return result


SECTION = Section("limits", "What this shows, and what it does not", content, short="Limits")
