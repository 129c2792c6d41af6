"""A constrained method beside the same without its constraint: is the level kept on held-out prompts, at what price?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.objectives_methods import columns_of, table_of
from benchmarks.objectives_tables import Values, bold, header, row, tested
from benchmarks.tuning import estimate, shown
from torch import Tensor

from equipoise.errors import ConfigError
from equipoise.evaluation.report.study.inputs import SeedData, SizeData
from equipoise.evaluation.report.text import policy_label
from equipoise.evaluation.rows import COMBINED, PromptTable

ALLOWED = 0.02  # by which the rubric's mean may miss the level and still count as keeping it
EVERY_KIND = "all"
REFUSALS = "refusals"
CONSTRAINTS_FILE = "constraints.json"


# -- numbers -----------------------------------------------------------------------------------------------------------


def constraints_of(directory: Path, size: SizeData) -> list[Values]:
    """One entry for every constraint of every constrained method. Raises ConfigError without an unconstrained one."""
    bounds = {name: constraints_in(seeds) for name, seeds in size.methods.items() if size.evaluated(name)}
    plain = next((name for name, constraints in bounds.items() if not constraints), None)
    if plain is None:
        raise ConfigError(f"{directory}: every method is constrained; the study needs one without for comparison")
    return [
        constraint_of(directory, size, plain, method, name, bound)
        for method, constraints in bounds.items()
        for name, bound in constraints.items()
    ]


def constraints_in(seeds: Sequence[SeedData]) -> Values:
    """`constraints` of a method's recipe, by name."""
    return next((seed.run.config.get("constraints") or {} for seed in seeds if seed.run is not None), {})


def constraint_of(directory: Path, size: SizeData, plain: str, method: str, name: str, bound: Values) -> Values:
    """How the level was kept with and without the constraint, seed by seed, and what else changed."""
    return {
        "constraint": {"aspect": name, **{key: bound.get(key) for key in ("min", "max", "margin", "on")}},
        "allowed": ALLOWED,
        "plain": plain,
        "method": method,
        "seeds": {
            arm: [kept(directory / size.name / "runs" / arm, seed, name, bound) for seed in size.evaluated(arm)]
            for arm in (method, plain)
        },
        "price": price(table_of(size.evaluated(method)), table_of(size.evaluated(plain))),
        "kl": {arm: float(table_of(size.evaluated(arm)).kl_P.nanmean()) for arm in (method, plain)},
    }


def kept(runs: Path, seed: SeedData, name: str, bound: Values) -> Values:
    """One seed: the mean on held-out prompts by rubric and by reward model, and what the run said of itself."""
    assert seed.evaluated is not None
    rubric = mean_of(seed.evaluated.evaluation, name, bound.get("on"))
    reward = mean_of(seed.proxy.model_dump(), name, bound.get("on")) if seed.proxy is not None else None
    sign, level = (1, bound["min"]) if bound.get("min") is not None else (-1, bound["max"])
    said = runs / f"seed_{seed.seed}" / CONSTRAINTS_FILE
    statement = json.loads(said.read_text(encoding="utf-8"))["constraints"].get(name) if said.is_file() else None
    return {
        "seed": seed.seed,
        "rubric": rubric["mean"],
        "rubric_ci95": list(rubric["ci95"]),
        "n": rubric["n"],
        "reward": None if reward is None else reward["mean"],
        "kept": sign * (rubric["mean"] - level) >= -ALLOWED,
        "kept_by_reward": None if reward is None else sign * (reward["mean"] - level) >= -ALLOWED,
        "multiplier": None if statement is None else statement["multiplier"],
        "verdict": None if statement is None else statement["verdict"],
        "judge": None if statement is None or statement["judge"] is None else statement["judge"]["verdict"],
    }


def mean_of(evaluation: Any, aspect: str, kind: str | None) -> Values:
    """{"mean", "ci95", "n"} of an aspect on prompts of a kind, or on all."""
    found = evaluation["aspects"][aspect]
    return found if kind is None else found["by_kind"][kind]


def price(constrained: PromptTable, plain: PromptTable) -> dict[str, dict[str, Values]]:
    """{kind or "all": {aspect, combined (all alike), refusals: constrained less plain}}; one family of tests."""
    equal = tuple((name, 1 / len(plain.aspects)) for name in plain.aspects)
    after, before = columns_of(constrained, equal), columns_of(plain, equal)
    names = [*plain.aspects, COMBINED]
    differences_P: dict[str, Tensor] = {name: after[name] - before[name] for name in names}
    differences_P[REFUSALS] = constrained.refusal_P - plain.refusal_P
    rows = {EVERY_KIND: slice(None), **{kind: plain.of_kind(kind) for kind in sorted(set(plain.kinds))}}
    found = tested({(kind, name): values_P[rows[kind]] for kind in rows for name, values_P in differences_P.items()})
    return {kind: {name: found[kind, name] for name in differences_P} for kind in rows}


# -- tables ------------------------------------------------------------------------------------------------------------


def title(values: Values) -> str:
    """`constrained: safety on adversarial prompts at least 0.8, margin 0.1`."""
    bound = values["constraint"]
    on = f" on {bound['on']} prompts" if bound["on"] else ""
    side, level = ("at least", bound["min"]) if bound["min"] is not None else ("at most", bound["max"])
    return f"{policy_label(values['method'])}: {bound['aspect']}{on} {side} {level:g}, margin {bound['margin']:g}"


def constraint_lines(values: Values) -> list[str]:
    """How often the level was kept, every seed, and the price."""
    lines = [f"- {sentence}" for sentence in counts(values)]
    titles = [
        "seed",
        "rubric",
        "reward model",
        "kept by the rubric",
        "multiplier",
        "said in training: reward model, rubric",
    ]
    lines += ["", *header(titles)]
    for arm, seeds in values["seeds"].items():
        for seed in seeds:
            said = ", ".join(word for word in (seed["verdict"], seed["judge"]) if word) or "-"
            rubric = estimate({"mean": seed["rubric"], "ci95": seed["rubric_ci95"]})
            cells = [str(seed["seed"]), rubric, shown(seed["reward"]), "yes" if seed["kept"] else "no"]
            lines.append(row(policy_label(arm), [*cells, shown(seed["multiplier"], digits=2), said]))
    names = list(next(iter(values["price"].values())))
    lines += ["", f"{policy_label(values['method'])} less {policy_label(values['plain'])}, by kind of prompt:", ""]
    lines += header(names)
    for kind, found in values["price"].items():
        lines.append(row(kind, [bold(found[name]) for name in names]))
    kl = ", ".join(f"{policy_label(arm)} {shown(value, digits=1)}" for arm, value in values["kl"].items())
    return [*lines, "", f"KL to the base, nats: {kl}."]


def counts(values: Values) -> list[str]:
    """ "constrained: 9 of 10 seeds keep the level, less 0.02, by the rubric (means 0.74 to 0.88), 10 by the reward
    model", for both sides."""
    sentences = []
    for arm, seeds in values["seeds"].items():
        rubric = [seed["rubric"] for seed in seeds]
        by_reward = [seed["kept_by_reward"] for seed in seeds if seed["kept_by_reward"] is not None]
        sentences.append(
            f"{policy_label(arm)}: {sum(seed['kept'] for seed in seeds)} of {len(seeds)} seeds keep the level, less "
            f"{values['allowed']:g}, by the rubric (means {shown(min(rubric))} to {shown(max(rubric))}), "
            f"{sum(by_reward)} by the reward model."
        )
    return sentences
