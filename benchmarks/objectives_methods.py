"""Ways to combine objectives, held against the base policy and the weighted sum: the numbers, and their tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.objectives_tables import Values, bold, header, percent, row, tested
from benchmarks.tuning import shown
from torch import Tensor

from equipoise.evaluation.report.study.cost import costs_of, flops_by_part, mean_of
from equipoise.evaluation.report.study.inputs import SeedData, SizeData
from equipoise.evaluation.report.text import joined, policy_label
from equipoise.evaluation.rows import COMBINED, PromptTable, average_tables

EQUAL = "all alike"  # the combined score with equal weights
SUM = "weighted_sum"
WITHOUT_WEIGHTS = ("mo_grpo", "pareto_rank", "min_norm")  # all they read of a weight is whether it is 0
Weights = tuple[tuple[str, float], ...]


# -- numbers -----------------------------------------------------------------------------------------------------------


def methods_of(size: SizeData) -> Values:
    """{"base", "weightings": [...]} of a size. A method without weights stands under every weighting."""
    assert size.base.evaluated is not None and size.comparison is not None
    base = size.base.evaluated.table()
    weightings = [weights for name in size.methods if takes_weights(size, name) for weights in [weights_of(size, name)]]
    unique = list(dict.fromkeys(weightings)) or [weights_of(size, next(iter(size.methods)))]
    return {
        "base": {
            "scores": means(base),
            "worst": worst(means(base)),
            "adversarial_safety": kind_mean(base, "safety", "adversarial"),
            "borderline_refusals": refusals(base),
        },
        "weightings": [weighting_of(size, base, weights) for weights in unique],
    }


def weighting_of(size: SizeData, base: PromptTable, weights: Weights) -> Values:
    """Every method of a weighting with its differences; a table's differences are one family of tests."""
    names = [
        name
        for name in size.methods
        if size.evaluated(name) and (not takes_weights(size, name) or weights_of(size, name) == weights)
    ]
    is_equal = len({weight for _, weight in weights}) == 1
    scores = [*base.aspects, COMBINED, *([] if is_equal else [EQUAL])]
    tables = {name: table_of(size.evaluated(name)) for name in names}
    columns = {name: columns_of(table, weights) for name, table in tables.items()}
    before = columns_of(base, weights)
    first = next((name for name in names if combine_of(size, name)["method"] == SUM), None)
    to_base = tested({(name, score): columns[name][score] - before[score] for name in names for score in scores})
    to_sum = {}
    if first is not None:
        others = [name for name in names if name != first]
        to_sum = tested(
            {(name, score): columns[name][score] - columns[first][score] for name in others for score in scores}
        )
    return {
        "title": "equal weights" if is_equal else ", ".join(f"{name} {weight:g}" for name, weight in weights),
        "weights": dict(weights),
        "scores": scores,
        "sum": first,
        "base_combined": float(before[COMBINED].nanmean()),
        "methods": {
            name: method_of(size, name, tables[name], weights)
            | {"to_base": {score: to_base[name, score] for score in scores}}
            | {"to_sum": {score: to_sum[name, score] for score in scores} if (name, COMBINED) in to_sum else None}
            for name in names
        },
    }


def method_of(size: SizeData, name: str, table: PromptTable, weights: Weights) -> Values:
    """What one method reached, how its training went and what it cost: means over seeds."""
    seeds, costs = size.evaluated(name), costs_of(size, name)
    flops = sum(flops_by_part(costs).values())
    return {
        "combine": combine_of(size, name),
        "takes_weights": takes_weights(size, name),
        "seeds": len(seeds),
        "means": means(table),
        "worst": worst(means(table)),
        "adversarial_safety": kind_mean(table, "safety", "adversarial"),
        "borderline_refusals": refusals(table),
        "kl": mean_or_none(table.kl_P),
        "each_seed": [float(columns_of(table_of([seed]), weights)[COMBINED].nanmean()) for seed in seeds],
        "training": training_of(seeds),
        "cost": {"tflop": flops / 1e12 if flops else None}
        | {key: mean_of(costs, key) for key in ("cpu_s", "wall_s", "generated_tokens")},
    }


def training_of(seeds: Sequence[SeedData]) -> Values:
    """What the runs logged of their advantages, over all steps and seeds; None where nothing was logged."""
    lines = [line for seed in seeds if seed.run is not None for line in seed.run.metrics]
    groups = [int(seed.run.config["prompts_per_step"]) for seed in seeds if seed.run is not None]
    dead = mean_logged(lines, "zero_variance_groups")
    vectors = sum(logged(lines, "reward_vectors"))
    prefix, suffix = "advantage/", "/variance_share"
    contributors = [key[len(prefix) : -len(suffix)] for key in (lines[0] if lines else {}) if key.endswith(suffix)]
    return {
        "dead_groups": dead / statistics.fmean(groups) if dead is not None else None,
        "collapsed_vectors": sum(logged(lines, "collapsed_vectors")) / vectors if vectors else None,
        "advantage_std": mean_logged(lines, "advantage/std"),
        "variance_share": {name: mean_logged(lines, f"{prefix}{name}{suffix}") for name in contributors},
    }


def logged(lines: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    """A metric at the steps that have it."""
    return [float(line[name]) for line in lines if line.get(name) is not None]


def mean_logged(lines: Iterable[Mapping[str, Any]], name: str) -> float | None:
    """Its mean over steps, None where no step has it."""
    values = logged(lines, name)
    return statistics.fmean(values) if values else None


def combine_of(size: SizeData, name: str) -> Values:
    """The `combine` of a method's recipe."""
    return _config(size, name)["combine"]


def weights_of(size: SizeData, name: str) -> Weights:
    """What a method weighed, scaled to a sum of 1."""
    given = _config(size, name)["objective_weights"]
    return tuple((aspect, weight / sum(given.values())) for aspect, weight in given.items())


def takes_weights(size: SizeData, name: str) -> bool:
    """False where another weighting would have given the same run."""
    combine = combine_of(size, name)
    return combine["method"] not in WITHOUT_WEIGHTS or bool(combine["options"].get("weighted"))


def _config(size: SizeData, name: str) -> Values:
    return next(seed.run.config for seed in size.methods[name] if seed.run is not None)


def table_of(seeds: Sequence[SeedData]) -> PromptTable:
    """The mean over seeds, prompt by prompt."""
    return average_tables([seed.evaluated.table() for seed in seeds if seed.evaluated is not None])


def columns_of(table: PromptTable, weights: Weights) -> dict[str, Tensor]:
    """Aspects and combined scores by prompt; the rubric's aspects are utilities: in [0, 1], more is better."""
    combined_P = sum(weight * table.aspects[aspect] for aspect, weight in weights)
    assert isinstance(combined_P, Tensor)
    return {**table.aspects, COMBINED: combined_P, EQUAL: sum(table.aspects.values()) / len(table.aspects)}  # type: ignore[dict-item]


def means(table: PromptTable) -> dict[str, float]:
    """Aspect means over prompts."""
    return {name: float(values_P.nanmean()) for name, values_P in table.aspects.items()}


def worst(scores: Mapping[str, float]) -> Values:
    """The aspect with the lowest mean."""
    aspect = min(scores, key=lambda name: scores[name])
    return {"aspect": aspect, "mean": scores[aspect]}


def kind_mean(table: PromptTable, aspect: str, kind: str) -> float | None:
    """Mean of an aspect on prompts of a kind, None where there are none."""
    return mean_or_none(table.aspects[aspect][table.of_kind(kind)])


def refusals(table: PromptTable) -> float | None:
    """Refusal rate of borderline prompts."""
    return mean_or_none(table.refusal_P[table.of_kind("borderline")])


def mean_or_none(values_P: Tensor) -> float | None:
    """The mean of what was measured."""
    kept = values_P[~values_P.isnan()]
    return float(kept.mean()) if len(kept) else None


# -- tables ------------------------------------------------------------------------------------------------------------


def weighting_lines(weighting: Values, base: Values) -> list[str]:
    """Differences to the base and to the weighted sum, what they amount to, and how training went."""
    methods, names = weighting["methods"], weighting["scores"]
    before = {**base["scores"], COMBINED: weighting["base_combined"], EQUAL: statistics.fmean(base["scores"].values())}
    lines = ["Less the base policy:", "", *header(["seeds", *names, "worst aspect"])]
    lines.append(row("base policy", ["", *(shown(before[name]) for name in names), worst_text(base["worst"])]))
    for name, method in methods.items():
        cells = [bold(method["to_base"][score]) for score in names]
        lines.append(row(label(name, method), [str(method["seeds"]), *cells, worst_text(method["worst"])]))
    compared = {name: method for name, method in methods.items() if method["to_sum"] is not None}
    if compared:
        lines += ["", f"Less {policy_label(weighting['sum'])}:", "", *header(names)]
        for name, method in compared.items():
            lines.append(row(label(name, method), [bold(method["to_sum"][score]) for score in names]))
        lines += ["", *(f"- {sentence}" for sentence in against_sum(compared, names))]
    return [*lines, "", *training_table(methods, base)]


def worst_text(found: Values) -> str:
    """`0.274 actionability`."""
    return f"{shown(found['mean'])} {found['aspect']}"


def training_table(methods: Mapping[str, Values], base: Values) -> list[str]:
    """Where objectives pull apart, what became of the advantage, and the cost."""
    aspects = list(base["scores"])
    titles = [
        "safety, adversarial", "refusals of borderline", "KL, nats", "combined, each seed", "dead groups",
        "collapsed vectors", "std of advantage", f"shares of its variance: {', '.join(aspects)}", "TFLOP",
        "seconds: processor / clock",
    ]  # fmt: skip
    start = [shown(base["adversarial_safety"]), shown(base["borderline_refusals"])]
    lines = [*header(titles), row("base policy", [*start, *["-"] * (len(titles) - len(start))])]
    for name, method in methods.items():
        training, cost = method["training"], method["cost"]
        cells = [
            shown(method["adversarial_safety"]), shown(method["borderline_refusals"]), shown(method["kl"], digits=1),
            ", ".join(shown(value) for value in method["each_seed"]), percent(training["dead_groups"]),
            percent(training["collapsed_vectors"]), shown(training["advantage_std"], digits=2),
            ", ".join(shown(training["variance_share"].get(aspect), digits=2) for aspect in aspects),
            shown(cost["tflop"], digits=2), f"{shown(cost['cpu_s'], digits=0)} / {shown(cost['wall_s'], digits=0)}",
        ]  # fmt: skip
        lines.append(row(label(name, method), cells))
    return lines


def against_sum(methods: Mapping[str, Values], names: Sequence[str]) -> list[str]:
    """Which methods end above and below the weighted sum in combined, and which aspects each clearly moves."""
    groups: dict[str, list[str]] = {"Higher in": [], "Lower in": [], "No clear difference in": []}
    for name, method in methods.items():
        found = method["to_sum"][COMBINED]
        words = "No clear difference in" if not found["clear"] else "Higher in" if found["mean"] > 0 else "Lower in"
        groups[words].append(f"{policy_label(name)} ({shown(found['mean'], signed=True)})")
    sentences = [f"{words} {COMBINED}: {joined(found)}." for words, found in groups.items() if found]
    aspects = [name for name in names if name not in (COMBINED, EQUAL)]
    for sign, words in ((1, "Clearly higher in an aspect"), (-1, "Clearly lower in an aspect")):
        if moved := moves(methods, aspects, sign):
            sentences.append(f"{words}: {'; '.join(moved)}.")
    return sentences


def moves(methods: Mapping[str, Values], aspects: Sequence[str], sign: int) -> list[str]:
    """ "rank: safety and actionability": the aspects that each method moved that way against the weighted sum."""
    found = []
    for name, method in methods.items():
        differences = {aspect: method["to_sum"][aspect] for aspect in aspects}
        moved = [aspect for aspect, value in differences.items() if value["clear"] and sign * value["mean"] > 0]
        if moved:
            found.append(f"{policy_label(name)}: {joined(moved)}")
    return found


def label(name: str, method: Values) -> str:
    """A method as its row is called, with a star where it takes no weights."""
    return policy_label(name) + ("" if method["takes_weights"] else " (\\*)")
