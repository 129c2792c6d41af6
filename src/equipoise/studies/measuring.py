"""What a study measures of a policy: completions for the study's prompts, judged twice; best-of-n; comparison.json."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from equipoise.algorithms.environment import peak_rss_mb
from equipoise.algorithms.run import FLOP_KINDS
from equipoise.config import SamplingConfig
from equipoise.config.comparison import BASE
from equipoise.data import load_prompts
from equipoise.evaluation import (
    Evaluated,
    compare,
    evaluate_policy,
    load_cost,
    load_evaluated,
    load_judge,
    save_evaluation,
    write_json,
)
from equipoise.evaluation.comparison import COST_FILE
from equipoise.evaluation.rows import Row, completion_rows, read_rows, resolve_weights, write_rows
from equipoise.models.flops import FlopCounter, sampling_counts
from equipoise.models.policy import load_policy
from equipoise.models.reward_model import RewardModel
from equipoise.rollout.sampler import generate_in_parts
from equipoise.rollout.scorers import RewardModelScorer, Scorer, score_rollout
from equipoise.studies.controls import BEST_OF_STEP
from equipoise.studies.judging import best_rows, evaluation_of, judge_rows
from equipoise.studies.plan import BEST_OF, PROXY_FILE, PROXY_ROWS, RATINGS, Job, Plan
from equipoise.studies.quickstart import Counting, annotate, transcripts

PROMPTS_AT_ONCE = 32
BEST_OF_PROMPTS_AT_ONCE = 8
TRANSCRIPTS = "transcripts.jsonl"
COMPARISON = "comparison.json"


def do_own_job(plan: Plan, job: Job, counting: Counting) -> None:
    """The part of a job that is ours rather than a command's: ratings, or judging what a policy writes."""
    if job.method == RATINGS and job.seed is None:
        annotate(plan.base_model(job.size), plan.annotations(job.size), seed=plan.config.base_seed, counting=counting)
        return
    if job.seed is not None:
        add_pairs_to_cost(plan, job)
    judge = load_judge(plan.config.evaluation.judge)
    if job.seed is not None and plan.algorithms[job.method] == BEST_OF:
        rows = best_of_rows(plan, job, judge, counting)
    else:
        rows = sampled_rows(plan, job, judge, counting)
    _save(plan, job, judge, rows)


def evaluation_sampling(plan: Plan) -> SamplingConfig:
    """How completions are drawn for judging."""
    return plan.config.evaluation.sampling or plan.config.sampling


def reward_scorer(plan: Plan, size: str) -> RewardModelScorer:
    """The reward model of a size."""
    return RewardModelScorer(RewardModel.load(plan.reward_model(size)), "reward model", 64)


def sampled_rows(plan: Plan, job: Job, judge: Scorer, counting: Counting) -> list[Row]:
    """Completions of a trained policy, or of the base."""
    settings = plan.config.evaluation
    records = load_prompts(settings.prompts)
    base = plan.base_model(job.size)
    policy = load_policy(str(base if job.seed is None else plan.run(job) / "model"))
    reference = None if job.seed is None else load_policy(str(base))
    with counting(f"evaluating {job.title}", len(records) * settings.samples) as advance, torch.no_grad():
        _, rows = evaluate_policy(
            policy,
            records,
            [judge],
            samples=settings.samples,
            sampling=evaluation_sampling(plan),
            seed=settings.seed,
            reference=reference,
            batch_prompts=PROMPTS_AT_ONCE,
            progress=advance,
        )
    return rows


def best_of_rows(plan: Plan, job: Job, judge: Scorer, counting: Counting) -> list[Row]:
    """Per answer the best of n samples of the base policy by the reward that the other methods train on; writes what
    sampling and scoring them cost."""
    started, on_processor = time.perf_counter(), time.process_time()
    settings, n = plan.config.evaluation, plan.config.methods[job.method].best_of
    assert n is not None and job.seed is not None
    records = load_prompts(settings.prompts)
    policy, reward = load_policy(str(plan.base_model(job.size))), reward_scorer(plan, job.size)
    weights = resolve_weights(plan.weights(job.method), reward.aspects)
    equal = resolve_weights(None, judge.aspects)
    counter = FlopCounter.of(policy.module)
    rows: list[Row] = []
    tokens, flops, seconds = 0, 0.0, {"generate": 0.0, "score": 0.0}
    with counting(job.title, len(records) * settings.samples) as advance:
        parts = generate_in_parts(
            policy,
            records,
            n * settings.samples,
            evaluation_sampling(plan),
            prompts_at_once=BEST_OF_PROMPTS_AT_ONCE,
            seed=job.seed,
            step=BEST_OF_STEP,
        )
        clock = time.perf_counter()
        for rollout in parts:
            seconds["generate"] += time.perf_counter() - clock
            tokens += int(rollout.lengths_B.sum())
            counts = sampling_counts(rollout.prompt_mask_BS, rollout.completion_mask_BT, n * settings.samples)
            flops += counter.forward(*counts)
            clock = time.perf_counter()
            scores_BK = score_rollout(rollout, [reward])
            seconds["score"] += time.perf_counter() - clock
            chosen = rollout[best_rows(scores_BK, reward.aspects, weights, torch.arange(len(rollout)) // n)]
            rows += completion_rows(chosen, score_rollout(chosen, [judge]), judge.aspects, equal)
            advance(len(chosen))
            clock = time.perf_counter()
    for index, row in enumerate(rows):
        row["index"] = index % settings.samples
    cost = {
        "wall_s": time.perf_counter() - started,
        **{f"{name}_s": value for name, value in seconds.items()},
        "update_s": 0.0,
        "cpu_s": time.process_time() - on_processor,
        "generated_tokens": tokens,
        "trained_tokens": 0,
        "flops": dict.fromkeys(FLOP_KINDS, 0.0) | {"generate": flops, "score": reward.flops},
        "trainable_parameters": 0,
        "peak_rss_mb": peak_rss_mb(),
        "per_answer": {"generated_tokens": tokens / len(rows), "flops": (flops + reward.flops) / len(rows)},
    }
    write_json(plan.run(job) / COST_FILE, cost)
    return rows


def add_pairs_to_cost(plan: Plan, job: Job) -> None:
    """Add to a DPO run's cost what its pairs cost, once: sampling them is part of the method as much as the updates."""
    statistics = plan.pair_statistics(job)
    cost = load_cost(plan.run(job))
    if cost is None or "pairs" in cost or not statistics.is_file():
        return
    pairs = json.loads(statistics.read_text(encoding="utf-8"))["cost"]
    write_json(plan.run(job) / COST_FILE, with_pairs(cost, pairs))


def with_pairs(cost: Mapping[str, Any], pairs: Mapping[str, Any]) -> dict[str, Any]:
    """cost.json of training with the cost of its pairs added; two processes, so the larger memory counts.

    >>> with_pairs({"wall_s": 2.0, "generated_tokens": 0, "flops": {"score": 0.0, "forward": 5.0}, "peak_rss_mb": 9.0},
    ...     {"wall_s": 1.0, "generated_tokens": 7, "flops": {"score": 3.0}, "peak_rss_mb": 4.0})["flops"]
    {'score': 3.0, 'forward': 5.0}
    """
    return {
        **cost,
        **{name: cost[name] + pairs[name] for name in ("wall_s", "cpu_s") if name in cost and name in pairs},
        "generated_tokens": cost["generated_tokens"] + pairs["generated_tokens"],
        "flops": {kind: value + pairs["flops"].get(kind, 0.0) for kind, value in cost["flops"].items()},
        "peak_rss_mb": max(cost["peak_rss_mb"], pairs["peak_rss_mb"]),
        "pairs": dict(pairs),
    }


def _save(plan: Plan, job: Job, judge: Scorer, rows: list[Row]) -> None:
    """evaluation.json by the judge, proxy.json by the reward model on the same completions; the last one says done."""
    directory = plan.evaluation(job)
    settings = {"samples": plan.config.evaluation.samples, **evaluation_sampling(plan).model_dump()}
    seed = plan.config.evaluation.seed
    save_evaluation(directory, evaluation_of(rows, judge, job.method, seed, settings), rows)
    reward = reward_scorer(plan, job.size)
    proxy = judge_rows(rows, reward)
    write_rows(directory / PROXY_ROWS, proxy)
    write_json(directory / PROXY_FILE, evaluation_of(proxy, reward, job.method, seed, settings))


def write_comparison(plan: Plan, size: str, finished: Sequence[Job]) -> dict[str, Any] | None:
    """comparison.json and transcripts.jsonl of what is finished at a size; None, and no file, for nothing."""
    if not finished:
        return None
    base = Job(size, BASE)
    methods: dict[str, list[Evaluated]] = {}
    for job in finished:
        evaluated = load_evaluated(plan.evaluation(job))
        cost = load_cost(plan.run(job))
        methods.setdefault(job.method, []).append(Evaluated(evaluated.evaluation, evaluated.rows, cost))
    comparison = compare(load_evaluated(plan.evaluation(base)), methods, seed=plan.config.evaluation.seed)
    write_json(plan.out / size / COMPARISON, comparison)
    first = {job.method: job for job in reversed(finished)}
    shown = {BASE: base, **{name: first[name] for name in methods}}
    judged = {name: load_evaluated(plan.evaluation(job)).rows for name, job in shown.items()}
    proxies = {name: read_rows(plan.evaluation(job) / PROXY_ROWS) for name, job in shown.items()}
    write_rows(plan.out / size / TRANSCRIPTS, transcripts(judged, proxies))
    return comparison
