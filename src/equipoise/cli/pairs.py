"""`equipoise pairs`: preference pairs for DPO from a policy's samples, or from responses in a file."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.algorithms.environment import peak_rss_mb
from equipoise.algorithms.stopping import explained, spent_budget
from equipoise.cli.evaluate import parse_weights
from equipoise.cli.inference import PROMPTS_AT_ONCE, SCORED_AT_ONCE, jsonl_writer, write_row
from equipoise.cli.progress import counting
from equipoise.config import BudgetConfig, SamplingConfig
from equipoise.data import DemonstrationRecord, PromptRecord, load_prompts, prompt_text, read_rows
from equipoise.data.checks import demonstration_record
from equipoise.data.loading import records_from_rows
from equipoise.data.problems import Problems
from equipoise.errors import ConfigError, DataError
from equipoise.evaluation import load_judge, write_json
from equipoise.evaluation.rows import combined_scores, number_or_none, resolve_weights
from equipoise.models.flops import FlopCounter, sampling_counts
from equipoise.models.policy import Policy, load_policy
from equipoise.rollout.preferences import (
    Candidate,
    Group,
    PreferencePair,
    pair_statistics,
    select_pairs,
)
from equipoise.rollout.sampler import generate_in_parts
from equipoise.rollout.scorers import Scorer, score_rollout
from equipoise.rollout.texts import rollout_of_texts
from equipoise.rollout.types import TRUNCATED, Rollout

logger = logging.getLogger("equipoise")


@dataclass(frozen=True)
class PairOptions:
    """What the command takes; None: the default, or not given."""

    reward: str
    weights: str | None = None
    prompts: str | None = None
    group_size: int | None = None
    per_prompt: int = 1
    min_margin: float = 0.0
    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    budget: BudgetConfig | None = None

    @property
    def of_sampling(self) -> dict[str, Any]:
        """The options for sampling that were given, by the name they have on the command line."""
        given = {
            "--group-size": self.group_size,
            "--temperature": self.temperature,
            "--max-tokens": self.max_tokens,
            "--seed": self.seed,
            "--budget": self.budget,
        }
        return {name: value for name, value in given.items() if value is not None}


def pairs_command(source: str, out: Path, options: PairOptions) -> None:
    """Write pairs to `out` and statistics beside it, and print them."""
    _check(source, out, options)
    judge = _Judge(options)
    started, on_processor = time.perf_counter(), time.process_time()
    sampled: dict[str, Any] | None = None
    cost = {"generated_tokens": 0, "flops": {"generate": 0.0, "score": 0.0}}
    if options.prompts is not None:
        groups, sampled = _sampled_groups(source, options.prompts, options, judge, cost, started)
    else:
        groups = _given_groups(source, judge)
        cost["flops"]["score"] = judge.flops
    pairs, dropped = select_pairs(groups, per_prompt=options.per_prompt, min_margin=options.min_margin)
    if not pairs:
        reasons = ", ".join(f"{name} {count}" for name, count in dropped.items() if count)
        raise DataError(
            f"{source}: no pair is left of {len(groups)} groups ({reasons}); sample more responses per prompt, "
            "lower --min-margin, or check that --reward tells the responses apart"
        )
    seconds = {"wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - on_processor}
    cost = {**{name: round(value, 3) for name, value in seconds.items()}, **cost, "peak_rss_mb": peak_rss_mb()}
    statistics = {
        "source": source,
        "reward": options.reward,
        "weights": judge.weights,
        "prompts": len({prompt_text(group.prompt) for group in groups}),
        "sampling": sampled,
        "per_prompt": options.per_prompt,
        "min_margin": options.min_margin,
        **pair_statistics(groups, pairs, dropped),
        "cost": cost,
    }
    _write(out, pairs, statistics)
    print(_described(statistics))
    print(f"written: {out}, {statistics_file(out)}")


def statistics_file(out: Path) -> Path:
    """`pairs.stats.json` for `pairs.jsonl` or `pairs.jsonl.gz`."""
    return out.with_name(out.name.removesuffix(".gz").removesuffix(".jsonl") + ".stats.json")


def _check(source: str, out: Path, options: PairOptions) -> None:
    path = Path(source)
    is_model = any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
    if options.prompts is None and is_model:
        raise ConfigError(f"{source}: is a policy; give --prompts with the prompts to sample responses to")
    if options.prompts is not None and path.is_file():
        raise ConfigError(
            f"{source}: is a file, and with --prompts a policy's directory is expected; leave --prompts out"
        )
    if options.prompts is not None and options.temperature == 0:
        raise ConfigError("--temperature 0 draws the same response every time; use a value above 0")
    if not math.isfinite(options.min_margin):
        raise ConfigError(f"--min-margin {options.min_margin}: use a finite number of at least 0")
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a directory; give a file name")
    if options.prompts is None and options.of_sampling:
        logger.warning("%s holds the responses: %s not used", source, ", ".join(options.of_sampling))


def parse_budget(text: str | None) -> BudgetConfig | None:
    """`generated_tokens=200000`, `flops=1e15` or `seconds=60`. Raises ConfigError for anything else."""
    if text is None:
        return None
    name, _, number = text.partition("=")
    try:
        if name not in BudgetConfig.model_fields:
            raise ValueError
        return BudgetConfig.model_validate({name: int(number) if name == "generated_tokens" else float(number)})
    except ValueError:
        raise ConfigError(f"--budget {text!r}: expected generated_tokens=N, flops=N or seconds=N, N above 0") from None


class _Judge:
    """Scores responses and combines the scores."""

    def __init__(self, options: PairOptions) -> None:
        weights = parse_weights(options.weights)
        self._scorer: Scorer = load_judge(options.reward)
        self.weights = resolve_weights(weights, self._scorer.aspects)

    @property
    def flops(self) -> float:
        """FLOPs of scoring so far, 0 for a scorer that does not count them."""
        return float(getattr(self._scorer, "flops", 0.0))

    def candidates(self, rollout: Rollout) -> list[Candidate]:
        """Every response with its scores and its combined utility."""
        scores_BK = score_rollout(rollout, [self._scorer])
        combined_B = combined_scores(scores_BK, self._scorer.aspects, self.weights)
        return [
            Candidate(
                response=rollout.completions[row],
                utility=number_or_none(combined_B[row]),
                scores={a.name: number_or_none(scores_BK[row, k]) for k, a in enumerate(self._scorer.aspects)},
                truncated=rollout.finish_reasons[row] == TRUNCATED,
            )
            for row in range(len(rollout))
        ]


def _sampled_groups(
    policy_name: str, prompts: str, options: PairOptions, judge: _Judge, cost: dict[str, Any], started: float
) -> tuple[list[Group], dict[str, Any]]:
    """A scored group of samples for every prompt, or as many as the budget allows, and how they were drawn; `cost`
    gains tokens and FLOPs."""
    records = load_prompts(prompts)
    policy = load_policy(policy_name)
    counter = FlopCounter.of(policy.module)
    size, seed = options.group_size or 8, options.seed or 0
    sampling = SamplingConfig(
        temperature=1.0 if options.temperature is None else options.temperature, max_tokens=options.max_tokens or 128
    )
    groups: list[Group] = []
    truncated, reached = 0, None
    with counting("sampling and scoring", len(records) * size) as advance:
        for rollout in _rollouts(policy, records, size, sampling, seed, endless=options.budget is not None):
            counts = sampling_counts(rollout.prompt_mask_BS, rollout.completion_mask_BT, size)
            cost["generated_tokens"] += int(rollout.lengths_B.sum())
            cost["flops"]["generate"] += counter.forward(*counts)
            truncated += int(rollout.truncated_B.sum())
            candidates = judge.candidates(rollout)
            cost["flops"]["score"] = judge.flops
            groups += [
                Group(rollout.prompts[first], rollout.kinds[first], candidates[first : first + size])
                for first in range(0, len(rollout), size)
            ]
            advance(len(rollout))
            if options.budget is not None and (reached := spent_budget(_spent(cost, started), options.budget)):
                break
    sampled = len(groups) * size
    if truncated * 2 > sampled:
        logger.warning(
            "%d of %d responses were cut at --max-tokens %d; allow more, or pairs compare halves of responses",
            truncated, sampled, sampling.max_tokens,
        )  # fmt: skip
    how = {"prompts": prompts, "group_size": size, "seed": seed, "truncated_responses": truncated}
    how |= {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens}
    if reached is not None:
        rule, value, limit = reached
        how["ended_by"] = explained({"rule": f"budget.{rule}", "value": value, "limit": limit})
    return groups, how


def _rollouts(
    policy: Policy, records: Sequence[PromptRecord], size: int, sampling: SamplingConfig, seed: int, *, endless: bool
) -> Iterator[Rollout]:
    """Groups of samples for every prompt once, in order; or in a random order for ever, until a budget is spent."""
    step = 0
    if endless:
        records = random.Random(f"prompts of pairs {seed}").sample(records, len(records))
    while step == 0 or endless:
        yield from generate_in_parts(
            policy, records, size, sampling, prompts_at_once=PROMPTS_AT_ONCE, seed=seed, step=step
        )
        step += 1


def _spent(cost: dict[str, Any], started: float) -> dict[str, float]:
    return {
        "generated_tokens": cost["generated_tokens"],
        "flops": sum(cost["flops"].values()),
        "seconds": time.perf_counter() - started,
    }


def _given_groups(data: str, judge: _Judge) -> list[Group]:
    """Responses of a file, grouped by prompt, and by `group` where rows carry one, as from `equipoise generate`."""
    problems = Problems()
    rows = list(read_rows(data, problems=problems))
    records = list(records_from_rows(rows, demonstration_record, problems))
    problems.raise_if_any()
    fields = [row.fields for row in rows]
    candidates: list[Candidate] = []
    cut = [row.get("finish_reason") == TRUNCATED for row in fields]
    with counting("scoring", len(records)) as advance:
        for start in range(0, len(records), SCORED_AT_ONCE):
            part = slice(start, start + SCORED_AT_ONCE)
            candidates += judge.candidates(_texts(records[part], cut[part]))
            advance(len(records[part]))
    members: dict[tuple[str, str], list[int]] = {}
    for index, (row, record) in enumerate(zip(fields, records, strict=True)):
        members.setdefault((repr(row.get("group")), prompt_text(record.prompt)), []).append(index)
    if all(len(places) < 2 for places in members.values()):
        raise DataError(
            f"{data}: every prompt has one response only, which leaves nothing to compare; give several responses per "
            "prompt (equipoise generate --group-size 8), or a policy with --prompts"
        )
    return [
        Group(records[places[0]].prompt, records[places[0]].kind, [candidates[place] for place in places])
        for places in members.values()
    ]


def _texts(records: Sequence[DemonstrationRecord], truncated: Sequence[bool]) -> Rollout:
    prompts, responses, kinds = zip(*((r.prompt, r.response, r.kind) for r in records), strict=True)
    return rollout_of_texts(prompts, responses, kinds, truncated=truncated)


def _write(out: Path, pairs: Sequence[PreferencePair], statistics: dict[str, Any]) -> None:
    with jsonl_writer(out) as file:
        for pair in pairs:
            write_row(file, pair.row())
    write_json(statistics_file(out), statistics)


def _described(found: dict[str, Any]) -> str:
    """The statistics for people."""
    margin, sides = found["margin"], found["characters"]
    lines = [
        f"pairs: {found['pairs']} from {found['groups_with_pairs']} of {found['groups']} groups "
        f"({found['prompts']} prompts, {found['responses']} responses)",
        "left out: " + (", ".join(f"{name} {count}" for name, count in found["dropped"].items() if count) or "nothing"),
        "margin: " + ", ".join(f"{name} {value:.4g}" for name, value in margin.items()),
    ]
    for name, aspect in found["aspects"].items():
        shown = "".join(character if character.isprintable() else "?" for character in name)
        if aspect["n"]:
            lines.append(
                f"aspect {shown}: chosen {aspect['chosen']:.4g}, rejected {aspect['rejected']:.4g}, "
                f"difference {aspect['difference']:+.4g} (n {aspect['n']})"
            )
        else:
            lines.append(f"aspect {shown}: in no pair scored on both sides")
    lines.append(f"characters: chosen {sides['chosen']:.1f}, rejected {sides['rejected']:.1f}")
    if any(found["truncated"].values()):
        lines.append("cut at max_tokens: " + ", ".join(f"{side} {n}" for side, n in found["truncated"].items()))
    return "\n".join(lines)
