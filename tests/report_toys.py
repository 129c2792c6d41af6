"""Synthetic directories for the report: every file of a quickstart, from a seeded random world; no model is run."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ASPECTS = ("politeness", "meaningfulness", "actionability", "safety")
KINDS = ("benign", "borderline", "adversarial")
NAMED = [*ASPECTS, "combined"]
SHIFTS = {  # what each policy adds to the base's mean
    "base": (0.0, 0.0, 0.0, 0.0),
    "grpo": (0.27, 0.14, -0.09, 0.31),
    "ppo": (0.2, 0.06, 0.0, 0.22),
    "dpo": (0.12, 0.08, 0.03, 0.15),
    "best_of_16": (0.18, 0.12, 0.05, 0.14),
    "always_refuse": (0.22, -0.05, -0.3, 0.42),
    "always_comply": (0.2, 0.2, 0.3, -0.2),
    "shuffled_reward": (0.004, -0.01, 0.005, 0.0),
    "rubric_optimised": (0.38, 0.22, 0.24, 0.38),
}
MEANS = (0.49, 0.58, 0.47, 0.55)
SENTENCES = (
    "Thank you for asking, I am glad to help with this.",
    "First, write down what you need and check that nothing is missing.",
    "Then do it step by step, and look at the result before you go on.",
    "I am sorry, but I cannot help with that; it could hurt somebody.",
    "You could talk to a person you trust instead.",
    "Whatever, figure it out yourself.",
)
TOPICS = ("a garden path", "a stuck process", "the neighbour's lock", "a difficult letter", "an old bicycle")

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'><svg onload=alert(3)>"
    "\u202eevil\u202c\x00\x1b[2J\u2028\u200b<!-- {{ 7*7 }} &lt;script&gt;"
)

Scores = dict[str, list[float]]


def write_json(path: Path, values: Any) -> None:
    """Write one JSON file, directories included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def write_lines(path: Path, lines: Sequence[Any]) -> None:
    """Write JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def edit(path: Path, change: Any) -> None:
    """Load a JSON file, let `change(values)` alter it in place, write it."""
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    write_json(path, values)


class World:
    """Prompts of three kinds and scores of any policy on them, all from one seed."""

    def __init__(self, num_prompts: int = 24, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.kinds = [KINDS[p % 3] for p in range(num_prompts)]
        self.prompts = [f"How do I deal with {TOPICS[p % len(TOPICS)]}, case {p}?" for p in range(num_prompts)]
        self.difficulty = [self.random.gauss(0, 0.12) for _ in range(num_prompts)]
        self._scores: dict[str, Scores] = {}

    def scores(self, name: str) -> Scores:
        """{aspect or "combined": a value per prompt} in [0, 1]."""
        if name not in self._scores:
            scores: Scores = {}
            for k, aspect in enumerate(ASPECTS):
                mean = MEANS[k] + SHIFTS[name][k]
                scores[aspect] = [
                    min(max(mean + hard + self.random.gauss(0, 0.16), 0.0), 1.0) for hard in self.difficulty
                ]
            scores["combined"] = [statistics.fmean(values) for values in zip(*scores.values(), strict=True)]
            self._scores[name] = scores
        return self._scores[name]

    def of_kind(self, values: Sequence[float], kind: str) -> list[float]:
        """Values of the prompts of a kind."""
        return [value for value, other in zip(values, self.kinds, strict=True) if other == kind]

    def evaluation(self, name: str, judge: str = "sandbox", proxy_gap: float = 0.0) -> dict[str, Any]:
        """evaluation.json."""
        scores = self.scores(name)
        lifted = {aspect: [min(value + proxy_gap, 1.0) for value in values] for aspect, values in scores.items()}
        safety = SHIFTS[name][3]
        rates = {"benign": 0.06, "borderline": 0.15 + 0.3 * max(safety, 0), "adversarial": 0.3 + 1.2 * max(safety, 0)}
        by_name = {
            aspect: {
                **estimate(values),
                "by_kind": {kind: estimate(self.of_kind(values, kind)) for kind in KINDS},
            }
            for aspect, values in lifted.items()
        }
        return {
            "policy": f"runs/quickstart/{name}/model",
            "judge": judge,
            "num_prompts": len(self.prompts),
            "num_completions": len(self.prompts),
            "aspects": {aspect: by_name[aspect] for aspect in ASPECTS},
            "combined": by_name["combined"],
            "kl_to_reference": None if name == "base" else 2.4,
            "refusal_rate": rates,
            "refusal_ci95": {kind: [max(rate - 0.05, 0.0), rate + 0.06] for kind, rate in rates.items()},
            "completion_length": 31.5,
            "truncated_fraction": 0.02,
            "weights": {aspect: 0.25 for aspect in ASPECTS},
            "settings": {"samples": 1, "temperature": 1.0, "max_tokens": 64, "seed": 0, "num_resamples": 10000},
        }

    def differences(self, name: str, kind: str | None = None) -> dict[str, Any]:
        """Paired differences to the base, over all prompts or those of a kind."""
        base, other = self.scores("base"), self.scores(name)
        result = {}
        for aspect in NAMED:
            values = [b - a for a, b in zip(base[aspect], other[aspect], strict=True)]
            result[aspect] = estimate(values if kind is None else self.of_kind(values, kind))
        return result

    def method(self, name: str, seeds: int = 1) -> dict[str, Any]:
        """One entry of comparison.json's methods."""
        evaluation, base = self.evaluation(name), self.evaluation("base")
        refusal = {}
        for kind in KINDS:
            change = evaluation["refusal_rate"][kind] - base["refusal_rate"][kind]
            refusal[kind] = {"mean": change, "ci95": [change - 0.06, change + 0.06], "n": len(self.prompts) // 3}
        points = [
            {
                "policy": f"{name}-{number}",
                "aspects": {k: v["mean"] + 0.02 * (number - (seeds - 1) / 2) for k, v in evaluation["aspects"].items()},
                "combined": evaluation["combined"]["mean"],
            }
            for number in range(seeds)
        ]
        return {
            "evaluation": evaluation,
            "paired_difference": self.differences(name),
            "refusal_difference": refusal,
            "paired_by_kind": {kind: self.differences(name, kind) for kind in KINDS},
            "cost": cost(),
            "cost_per_seed": [cost()] * seeds,
            "seeds": points,
        }

    def comparison(self, methods: Sequence[str] = ("grpo",), seeds: int = 1) -> dict[str, Any]:
        """comparison.json."""
        return {"base": self.evaluation("base"), "methods": {name: self.method(name, seeds) for name in methods}}

    def completion(self, name: str, prompt: int) -> str:
        """Some sentences, another choice for every policy and prompt."""
        choice = random.Random(f"{name} {prompt}")
        return " ".join(choice.choice(SENTENCES) for _ in range(choice.randint(2, 5)))

    def transcripts(self, policies: Sequence[str] = ("base", "grpo")) -> list[dict[str, Any]]:
        """Lines of transcripts.jsonl."""
        return [
            {
                "prompt": prompt,
                "kind": self.kinds[p],
                "policies": {
                    name: {
                        "completion": self.completion(name, p),
                        "rubric": {aspect: self.scores(name)[aspect][p] for aspect in ASPECTS},
                        "reward": {aspect: min(self.scores(name)[aspect][p] + 0.05, 1.0) for aspect in ASPECTS},
                    }
                    for name in policies
                },
            }
            for p, prompt in enumerate(self.prompts)
        ]

    def controls(self, *, from_this_run: bool = True) -> dict[str, Any]:
        """controls.json."""
        texts = {
            "always_refuse": ("Always refuse", "Answers every prompt with one refusal.", "Safe and useless."),
            "always_comply": ("Always comply", "Answers every prompt with steps.", "Actionable and unsafe."),
            "best_of_16": ("Best of 16", "The base policy, best of 16 samples by the reward model.", "A strong rival."),
            "shuffled_reward": (
                "Shuffled reward",
                "GRPO on a reward model whose labels were shuffled.",
                "Must not improve.",
            ),
            "rubric_optimised": (
                "Rubric optimised",
                "GRPO on the rubric itself.",
                "High scores, and texts that show what gaming looks like.",
            ),
        }
        return {
            "made": "2025-11-02",
            "seed": 0,
            "from_this_run": from_this_run,
            "command": "equipoise quickstart --controls",
            "controls": {
                name: {
                    "title": title,
                    "what": what,
                    "expectation": expectation,
                    "evaluation": self.evaluation(name),
                    "paired_difference": self.differences(name),
                    "paired_by_kind": {kind: self.differences(name, kind) for kind in KINDS},
                    "transcripts": [
                        {
                            "prompt": self.prompts[p],
                            "kind": self.kinds[p],
                            "completion": self.completion(name, p),
                            "rubric": {aspect: self.scores(name)[aspect][p] for aspect in ASPECTS},
                        }
                        for p in range(3)
                    ],
                }
                for name, (title, what, expectation) in texts.items()
            },
        }


def estimate(values: Sequence[float]) -> dict[str, Any]:
    """A mean with its normal interval: enough for a picture."""
    mean = statistics.fmean(values)
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": mean, "ci95": [mean - half, mean + half], "n": len(values)}


def cost(wall_s: float = 150.0) -> dict[str, Any]:
    """cost.json."""
    return {
        "wall_s": wall_s,
        "generate_s": wall_s * 0.45,
        "score_s": wall_s * 0.15,
        "update_s": wall_s * 0.3,
        "generated_tokens": 812_345,
        "trained_tokens": 800_120,
        "flops": {"generate": 3.1e12, "score": 1.2e12, "reference": 9e11, "forward": 9e11, "backward": 1.9e12},
        "trainable_parameters": 1_148_000,
        "peak_rss_mb": 1480.5,
    }


def run_directory(path: Path, algorithm: str = "grpo", steps: int = 60, seed: int = 0) -> Path:
    """A run directory with plausible curves: proxy and rubric part ways late in training."""
    noise = random.Random(seed)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        done = step / steps
        rise = 1 - math.exp(-3 * done)
        line: dict[str, Any] = {"step": step, "loss": 2.0 - rise + noise.gauss(0, 0.05), "grad_norm": 0.8}
        line["learning_rate"] = 1e-3
        if algorithm in ("grpo", "ppo"):
            for k, aspect in enumerate(ASPECTS):
                line[f"reward/{aspect}/mean"] = MEANS[k] + SHIFTS["grpo"][k] * rise + noise.gauss(0, 0.03)
            line |= {"kl": 3 * rise + noise.gauss(0, 0.05), "entropy": 2.2 - rise, "reward/combined": 0.5 + 0.2 * rise}
            if step % 5 == 0:
                line |= _in_loop(rise, done)
        elif step % 10 == 0:
            line["validation/loss"] = 2.1 - rise
            if algorithm == "reward":
                line |= {f"validation/{aspect}/spearman": 0.8 * rise for aspect in ASPECTS}
        lines.append(line | {"time/step": 0.4})
    config: dict[str, Any] = {"algorithm": algorithm, "seed": seed, "num_steps": steps}
    if algorithm == "reward":
        config["aspects"] = {aspect: {"higher_is_better": True, "range": [0.0, 1.0]} for aspect in ASPECTS}
    elif algorithm in ("grpo", "ppo"):
        config["evaluation"] = {"every": 5, "judge": "sandbox"}
    environment = {"versions": {"python": "3.11.2", "torch": "2.13.0"}, "processor": "a processor", "cores": 2}
    write_json(path / "config.json", config)
    write_json(path / "environment.json", {**environment, "threads": 2, "git": "0123456789abcdef"})
    write_json(path / "cost.json", cost(150.0 if algorithm in ("grpo", "ppo") else 40.0))
    write_lines(path / "metrics.jsonl", lines)
    return path


def _in_loop(rise: float, done: float) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for k, aspect in enumerate(ASPECTS):
        proxy = MEANS[k] + SHIFTS["grpo"][k] * rise
        values[f"evaluation/{aspect}/mean"] = proxy + 0.04 * done
        values[f"evaluation/judge/{aspect}/mean"] = proxy - 0.05 * done**2
    values["evaluation/combined"] = 0.52 + 0.17 * rise + 0.04 * done
    values["evaluation/judge/combined"] = 0.52 + 0.17 * rise - 0.05 * done**2
    return values


def reward_report() -> dict[str, Any]:
    """reward_report.json."""
    numbers = {"n": 400, "mse": 0.02, "mae": 0.1, "bias": 0.01, "r2": 0.62, "pearson": 0.8, "spearman": 0.78}
    split = {**numbers, "baseline_mse": 0.06, "baseline_mae": 0.2}
    aspect = {"range": [0.0, 1.0], "higher_is_better": True, "mean": 0.5, "std": 0.3}
    return {
        "model": "encoder",
        "rows": {"train": 4000, "validation": 400, "test": 400},
        "no_better_than_mean": [],
        "aspects": {name: {**aspect, "train": split, "validation": split, "test": split} for name in ASPECTS},
    }


def quickstart_directory(
    directory: Path,
    *,
    num_prompts: int = 24,
    methods: Sequence[str] = ("grpo",),
    seeds: int = 1,
    controls: bool | None = True,
    from_this_run: bool = True,
) -> Path:
    """All files of `equipoise quickstart`."""
    world = World(num_prompts)
    for name in ("sft", "reward", *methods):
        run_directory(directory / name, name)
    write_json(directory / "reward" / "reward_report.json", reward_report())
    for name in ("base", *methods):
        write_json(directory / "evaluation" / f"{name}.json", world.evaluation(name))
        gap = 0.02 if name == "base" else 0.07
        write_json(directory / "evaluation" / f"proxy_{name}.json", world.evaluation(name, "reward", gap))
    quality = {"spearman": 0.83, "spearman_ci95": [0.79, 0.86], "pearson": 0.85, "n": 2 * num_prompts}
    write_json(
        directory / "evaluation" / "reward_quality.json",
        {
            "aspects": {
                name: {**quality, "spearman": 0.83 - 0.05 * k, "spearman_ci95": [0.78 - 0.05 * k, 0.87 - 0.05 * k]}
                | {"mean_reward": 0.6, "mean_rubric": 0.57}
                for k, name in enumerate(ASPECTS)
            },
            "responses_of": ["base", "grpo"],
            "note": "On test prompts, which no training saw.",
        },
    )
    write_json(directory / "comparison.json", world.comparison(methods, seeds))
    write_lines(directory / "transcripts.jsonl", world.transcripts(("base", *methods)))
    if controls:
        write_json(directory / "controls.json", world.controls(from_this_run=from_this_run))
    write_json(
        directory / "quickstart.json",
        {
            "seed": 0,
            "size": "small",
            "model_parameters": 1_148_000,
            "stages": {"data": 3.1, "sft": 41.0, "reward": 58.2, "grpo": 150.4, "evaluation": 22.9},
            "started": "2025-11-02T10:00:00+00:00",
            "finished": "2025-11-02T10:04:36+00:00",
            "recipes": {"sft": "recipes/sandbox/sft.yaml", "grpo": "recipes/sandbox/grpo.yaml"},
            "data": {
                "train_prompts": {"benign": 300, "borderline": 300, "adversarial": 300},
                "test_prompts": dict.fromkeys(KINDS, num_prompts // 3),
                "held_out": "topics and templates",
            },
            "machine": "2 cores of a processor",
        },
    )
    return directory


def hostile_directory(directory: Path) -> Path:
    """A quickstart in which every text that could come from a model, a file or a name attacks the page."""
    quickstart_directory(directory)
    lines = World(24).transcripts()
    for line in lines:
        line["prompt"] = HOSTILE
        line["kind"] = HOSTILE
        for written in line["policies"].values():
            written["completion"] = HOSTILE
            written["rubric"][HOSTILE] = 0.5
        line["policies"][HOSTILE] = line["policies"]["grpo"]
    write_lines(directory / "transcripts.jsonl", lines)

    def controls(values: dict[str, Any]) -> None:
        values |= {"made": HOSTILE, "command": HOSTILE, "from_this_run": False}
        for control in values["controls"].values():
            control |= {"title": HOSTILE, "what": HOSTILE, "expectation": HOSTILE}
            control["paired_difference"][HOSTILE] = {"mean": 1.0, "ci95": [0.5, 1.5]}
            control["transcripts"] = [
                {"prompt": HOSTILE, "kind": HOSTILE, "completion": HOSTILE, "rubric": {HOSTILE: 1}}
            ]

    def comparison(values: dict[str, Any]) -> None:
        evaluations = [values["base"], values["methods"]["grpo"]["evaluation"]]
        for evaluation in evaluations:
            evaluation |= {"judge": HOSTILE, "policy": HOSTILE}
            evaluation["aspects"][HOSTILE] = evaluation["aspects"]["safety"]
            evaluation["weights"][HOSTILE] = 1.0
            evaluation["refusal_rate"][HOSTILE] = 0.5
            evaluation["num_unscored"] = 3
        method = values["methods"].pop("grpo")
        for differences in (method["paired_difference"], *method["paired_by_kind"].values()):
            differences[HOSTILE] = differences["safety"]
        method["refusal_difference"][HOSTILE] = {"mean": 0.1, "ci95": [0.0, 0.2]}
        values["methods"][HOSTILE] = method

    def quickstart(values: dict[str, Any]) -> None:
        values |= {"size": HOSTILE, "machine": HOSTILE, "stages": {HOSTILE: 1.0}, "recipes": {"grpo": HOSTILE}}
        values["data"] = {HOSTILE: HOSTILE, "held_out": HOSTILE, "train_prompts": {HOSTILE: 3}}

    def quality(values: dict[str, Any]) -> None:
        values |= {"note": HOSTILE, "responses_of": [HOSTILE]}
        values["aspects"][HOSTILE] = values["aspects"]["safety"]

    def report(values: dict[str, Any]) -> None:
        values["aspects"][HOSTILE] = values["aspects"]["safety"]
        values["no_better_than_mean"] = [HOSTILE]

    edit(directory / "controls.json", controls)
    edit(directory / "comparison.json", comparison)
    edit(directory / "quickstart.json", quickstart)
    edit(directory / "evaluation" / "reward_quality.json", quality)
    edit(directory / "reward" / "reward_report.json", report)
    edit(directory / "grpo" / "config.json", lambda values: values.update(seed=HOSTILE, algorithm=HOSTILE))
    edit(directory / "grpo" / "environment.json", lambda values: values.update(versions={HOSTILE: HOSTILE}))
    edit(directory / "grpo" / "cost.json", lambda values: values["flops"].update({HOSTILE: 1.0}))
    metrics = directory / "grpo" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    write_lines(metrics, [{**line, f"reward/{HOSTILE}/mean": 0.5} for line in lines])
    for name in ("base", "grpo"):  # their aspects no longer match those of comparison.json
        (directory / "evaluation" / f"{name}.json").unlink()
        (directory / "evaluation" / f"proxy_{name}.json").unlink()
    return directory
