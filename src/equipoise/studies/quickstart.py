"""The whole method on the sandbox: base policy, reward model, alignment, evaluation by the rubric, report.

Every stage leaves files and is skipped when they are there, so that an interrupted quickstart goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import IO, Any

import torch

from equipoise.config import GRPOConfig, SamplingConfig, load_recipe
from equipoise.data import PromptRecord, load_prompts
from equipoise.errors import ConfigError
from equipoise.evaluation import Evaluated, compare, evaluate_policy, load_cost, load_judge, write_json
from equipoise.evaluation.report import build_report
from equipoise.evaluation.rows import Row, read_rows, write_rows
from equipoise.models.policy import load_policy
from equipoise.models.reward_model import RewardModel
from equipoise.rollout.sampler import generate_in_parts
from equipoise.rollout.scorers import RewardModelScorer, Scorer
from equipoise.sandbox.datasets import Raters, scored_rows
from equipoise.sandbox.models import SIZES
from equipoise.sandbox.prompts import prompts as sandbox_prompts
from equipoise.studies.apart import run_apart
from equipoise.studies.jobs import locked
from equipoise.studies.judging import agreement, evaluation_of, judge_rows, rows_of_texts

RUBRIC = "sandbox"
TEST_PROMPTS = "sandbox/test"
METHODS = ("grpo", "ppo", "dpo")
SAMPLES = 2  # completions per test prompt
SAMPLING = SamplingConfig(temperature=1.0, max_tokens=80)
STATE_FILE = "quickstart.json"
ANNOTATIONS = "annotations.jsonl"
ANNOTATED_SAMPLES = 2  # responses of the base policy per training prompt that raters see
ANNOTATION_STEP = 2**20  # of the sampler's random numbers: none that training draws
PROMPTS_AT_ONCE = 32
HELD_OUT = (
    "test prompts ask about things and people, and in wording, that no training request has; the activities (cleaning, "
    "threatening, ...) occur in training; validation holds out things and people only"
)

STAGES = {
    "sft": "a small language model learns to answer, from random weights",
    "annotations": "raters score what it writes",
    "reward": "the reward model learns from their scores",
    "grpo": "the policy is aligned to the reward model",
    "ppo": "another, with a critic, on part of the tokens",
    "dpo": "another, on pairs of the base policy's samples",
    "evaluation": "the rubric judges all on unseen prompts",
    "controls": "what always refusing and always complying would score",
}

OTHERS_TOKENS = 40_000  # sampled by PPO, and for DPO's pairs: a minute, no fair fight; that is the comparison study's
PPO_BATCH = 64  # prompts of a step, a completion each

Train = Callable[[Path, list[str], Path], None]
MakePairs = Callable[[Path, Path, Mapping[str, float], int, int, Path], None]
Counting = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def _no_training(recipe: Path, overrides: list[str], out: Path) -> None:
    raise ConfigError(f"{out}: this study was opened to be read; open it with a trainer")


def _no_pairs(policy: Path, reward: Path, weights: Mapping[str, float], tokens: int, seed: int, out: Path) -> None:
    raise ConfigError(f"{out}: this study was opened to be read; open it with a maker of pairs")


@contextmanager
def _no_progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda count: None


@dataclass
class Study:
    """Where a quickstart lies and how it reaches the outside: training and progress are the caller's."""

    out: Path
    seed: int
    size: str
    train: Train = _no_training
    make_pairs: MakePairs = _no_pairs
    counting: Counting = _no_progress
    say: Callable[[str], None] = print
    command: Callable[[str], list[str]] | None = None  # that does the work of a method in a process of its own
    workers: int = 1  # methods at once, in such processes
    state: dict[str, Any] = field(default_factory=dict)

    def path(self, *parts: str) -> Path:
        """A place inside the output directory."""
        return self.out.joinpath(*parts)

    def stage(self, name: str, work: Callable[[], None]) -> None:
        """Do a stage unless it is done, and note the seconds it took, of all attempts together."""
        place = f"{list(STAGES).index(name) + 1}/{len(STAGES)} " if name in STAGES else ""
        if name in self.state["done"]:
            self.say(f"{place}{name}: done before, in {self.state['stages'][name]:.0f} s")
            return
        self.say(f"{place}{name}: {STAGES.get(name, 'the controls that take long')}")
        with self.clocked(name):
            work()
            self.state["done"].append(name)

    def add_seconds(self, name: str, seconds: float) -> None:
        """More seconds of a stage, to be saved."""
        self.state["stages"][name] = self.state["stages"].get(name, 0.0) + seconds

    @contextmanager
    def clocked(self, stage: str | None = None) -> Iterator[None]:
        """Add what the block takes to the seconds by the clock, and to a stage's; the state is saved, whatever happens.

        Stages side by side share a block and so count once."""
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            if stage is not None:
                self.add_seconds(stage, seconds)
            self.state["seconds"] = self.state.get("seconds", 0.0) + seconds
            self.save()

    def save(self) -> None:
        """Write the state."""
        write_json(self.path(STATE_FILE), self.state)


def recipe(name: str) -> Path:
    """A sandbox recipe that comes with the package."""
    return Path(str(files("equipoise.sandbox").joinpath(f"recipes/{name}.yaml")))


def open_study(
    out: Path,
    *,
    seed: int,
    size: str,
    train: Train,
    make_pairs: MakePairs,
    counting: Counting,
    say: Callable[[str], None],
    command: Callable[[str], list[str]] | None = None,
    workers: int = 1,
) -> Study:
    """A new study, or one to go on with. `command` and `workers`: see `Study`.

    Raises ConfigError where `out` holds something else, or another seed or size."""
    if size not in SIZES:
        raise ConfigError(f"--size {size}: no such model; use {', '.join(SIZES)}")
    study = Study(out, seed, size, train, make_pairs, counting, say, command, workers)
    path = study.path(STATE_FILE)
    if path.is_file():
        study.state = _recorded(path)
        for key, value in (("seed", seed), ("size", size)):
            if study.state.get(key) != value:
                raise ConfigError(
                    f"--out {out}: holds a quickstart with {key} {study.state.get(key)}, not {value}; "
                    f"give --{key} {study.state.get(key)} to go on with it, or another --out"
                )
        study.state.setdefault("seconds", sum(study.state["stages"].values()))  # stages once ran one by one
        if study.state.get("world", world_digest()) != world_digest():
            raise ConfigError(
                f"--out {out}: holds a quickstart made with other recipes, texts or rubric; results would mix. "
                "Give another --out"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: exists and is not a quickstart; give another directory")
    else:
        study.state = {
            "seed": seed, "size": size, "world": world_digest(), "started": now(), "stages": {}, "done": []
        }  # fmt: skip
        study.save()
    return study


def _recorded(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); remove the directory, or give another --out") from error
    if not isinstance(values, dict) or not {"seed", "size", "stages", "done"} <= set(values):
        raise ConfigError(f"{path}: not the state of a quickstart; remove the directory, or give another --out")
    return values


@cache
def world_digest(*, with_recipes: bool = True) -> str:
    """Of everything a finished stage depends on: the sandbox's texts, recipes, rubric and code."""
    found = hashlib.sha256()
    root = Path(str(files("equipoise.sandbox")))
    for path in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".yaml")):
        if path.parent.name == "recipes" and not with_recipes:
            continue
        found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def run_quickstart(study: Study) -> Path:
    """Every stage in order; returns the report's path. Raises ConfigError where another process is at work there."""
    with locked(study.out) as lock:
        return _run(study, lock)


def _run(study: Study, lock: IO[str]) -> Path:
    study.stage("sft", lambda: train_stage(study, "sft", [f"policy.model=sandbox/{study.size}"]))
    study.stage("annotations", lambda: annotate_stage(study))
    study.stage("reward", lambda: _train_reward(study))
    if study.command is not None and study.workers > 1:
        _methods_apart(study, study.command, lock)
    else:
        for name in METHODS:
            study.stage(name, lambda name=name: _TRAIN[name](study))
    study.stage("evaluation", lambda: evaluate_stage(study, METHODS))
    study.stage("controls", lambda: _controls(study))
    study.state |= {"finished": now(), **_facts(study)}
    study.save()
    return build_report(study.out)


def _methods_apart(study: Study, command: Callable[[str], list[str]], lock: IO[str]) -> None:
    """Train and sample what is not done yet, several at a time, longest first."""
    left = [name for name in ("grpo", "dpo", "ppo", "base") if not _is_sampled(study, name)]
    if not left:
        return
    study.say(f"{', '.join(left)}: {study.workers} at a time")

    def ended(name: str, well: bool, seconds: float) -> None:
        if name not in STAGES or name in study.state["done"]:
            return  # `base`, which is part of the evaluation, or one that only had to be sampled
        study.add_seconds(name, seconds)
        if well:
            study.state["done"].append(name)
        study.save()

    with study.clocked():
        run_apart(study.out, left, command, workers=study.workers, lock=lock, say=study.say, ended=ended)


def do_apart(study: Study, name: str) -> None:
    """What a process of its own does for a method, or for `base`: its training, and its completions."""
    if name in _TRAIN:
        _TRAIN[name](study)
    sampled(study, name, load_judge(RUBRIC))


def _train_grpo(study: Study) -> None:
    train_stage(study, "grpo", policy_overrides(study))


def _train_reward(study: Study) -> None:
    train_stage(study, "reward", reward_overrides(study.path("sft", "model"), study.path(ANNOTATIONS)))


def _train_ppo(study: Study) -> None:
    steps = math.ceil(OTHERS_TOKENS / PPO_BATCH)  # no completion is shorter than a token
    changes = {"prompts_per_step": PPO_BATCH, "num_steps": steps, "budget.generated_tokens": OTHERS_TOKENS}
    train_stage(study, "ppo", [*policy_overrides(study), *(f"{key}={value}" for key, value in changes.items())])


def _train_dpo(study: Study) -> None:
    """Pairs once, then training: an interrupted training goes on with the same pairs."""
    pairs = study.path("pairs.jsonl")
    if not pairs.is_file():
        grpo = load_recipe(recipe("grpo"))
        assert isinstance(grpo, GRPOConfig)
        models = study.path("sft", "model"), study.path("reward", "model")
        study.make_pairs(*models, grpo.objective_weights, OTHERS_TOKENS, study.seed, pairs)
    train_stage(study, "dpo", [f"policy.model={study.path('sft', 'model')}", f"data={pairs}"])


_TRAIN: dict[str, Callable[[Study], None]] = {"grpo": _train_grpo, "ppo": _train_ppo, "dpo": _train_dpo}


def _controls(study: Study) -> None:
    from equipoise.studies.controls import quick_controls

    quick_controls(study)


def train_stage(study: Study, name: str, overrides: list[str], *, recipe_name: str | None = None) -> None:
    """Train a sandbox recipe into a run directory of the study."""
    study.train(recipe(recipe_name or name), [f"seed={study.seed}", *overrides], study.path(name))


def annotate_stage(study: Study) -> None:
    """Raters score what the base policy itself writes for training prompts: a reward model should know its mistakes."""
    annotate(study.path("sft", "model"), study.path(ANNOTATIONS), seed=study.seed, counting=study.counting)


def annotate(base: Path, out: Path, *, seed: int, counting: Counting) -> None:
    """Sample a policy on the sandbox's training prompts and write the samples as raters score them."""
    policy = load_policy(str(base))
    records = load_prompts("sandbox")
    raters = Raters(f"of the base policy, seed {seed}")
    rows: list[dict[str, Any]] = []
    with counting("annotating", len(records) * ANNOTATED_SAMPLES) as advance:
        for rollout in generate_in_parts(
            policy,
            records,
            ANNOTATED_SAMPLES,
            SAMPLING,
            prompts_at_once=PROMPTS_AT_ONCE,
            seed=seed,
            step=ANNOTATION_STEP,
        ):
            for prompt, kind, response in zip(rollout.prompts, rollout.kinds, rollout.completions, strict=True):
                rows.append({**raters.row(prompt, kind, response), "split": "train"})
            advance(len(rollout))
    write_rows(out, rows)


def reward_overrides(base: Path, annotations: Path) -> list[str]:
    """What the reward recipe is told: start from the base policy, and learn from its annotated samples too."""
    return [f"model.model={base}", f"data=[sandbox, {json.dumps(str(annotations))}]"]


def policy_overrides(study: Study, reward: str = "reward") -> list[str]:
    """What an alignment recipe is told: the study's base policy and reward model."""
    return [
        f"policy.model={study.path('sft', 'model')}",
        f"scorers.0.reward_model={study.path(reward, 'model')}",
    ]


def evaluate_stage(study: Study, methods: Sequence[str]) -> None:
    """Sample base and methods on the test prompts, judge by rubric and reward model, compare."""
    rubric = load_judge(RUBRIC)
    reward = RewardModelScorer(RewardModel.load(study.path("reward", "model")), "reward model", 64)
    rows: dict[str, list[Row]] = {}
    proxy: dict[str, list[Row]] = {}
    evaluations: dict[str, dict[str, Any]] = {}
    for name in ("base", *methods):
        rows[name] = sampled(study, name, rubric)
        proxy[name] = judge_rows(rows[name], reward)
        evaluations[name] = evaluation_of(rows[name], rubric, name, study.seed, settings())
        write_json(study.path("evaluation", f"{name}.json"), evaluations[name])
        write_json(
            study.path("evaluation", f"proxy_{name}.json"),
            evaluation_of(proxy[name], reward, name, study.seed, settings()),
        )
    everything = [row for part in rows.values() for row in part]
    quality = agreement(everything, [row for part in proxy.values() for row in part], study.seed)
    note = "the reward model against the rubric, on completions of the policies for test prompts"
    values = {
        "aspects": quality,
        "responses_of": list(rows),
        "note": note,
        "annotated": annotated_quality(study, reward),
    }
    write_json(study.path("evaluation", "reward_quality.json"), values)
    evaluated = {
        name: Evaluated(evaluations[name], rows[name], load_cost(study.path("sft" if name == "base" else name)))
        for name in rows
    }
    comparison = compare(evaluated["base"], {name: [evaluated[name]] for name in methods}, seed=study.seed)
    write_json(study.path("comparison.json"), comparison)
    write_rows(study.path("transcripts.jsonl"), transcripts(rows, proxy))


def annotated_quality(study: Study, reward: Scorer) -> dict[str, float | None]:
    """Spearman of reward model and rubric per aspect on the test part of the annotated responses, ratings aside."""
    rows = list(scored_rows("test"))
    filled = rows_of_texts(
        [row["prompt"] for row in rows], [row["kind"] for row in rows], [row["response"] for row in rows],
        load_judge(RUBRIC),
    )  # fmt: skip
    return {
        name: found["spearman"] for name, found in agreement(filled, judge_rows(filled, reward), study.seed).items()
    }


def settings() -> dict[str, Any]:
    """How completions are drawn, as evaluation.json says it."""
    return {"samples": SAMPLES, **SAMPLING.model_dump()}


def sampled(study: Study, name: str, rubric: Scorer, *, model: Path | None = None) -> list[Row]:
    """Completions of a policy on the test prompts, judged by the rubric; kept, and read again when they are there."""
    kept = _completions(study, name)
    if kept.is_file():
        return read_rows(kept)
    records: list[PromptRecord] = load_prompts(TEST_PROMPTS)
    policy = load_policy(str(model or study.path("sft" if name == "base" else name, "model")))
    reference = None if name == "base" else load_policy(str(study.path("sft", "model")))
    with study.counting(f"evaluating {name}", len(records) * SAMPLES) as advance, torch.no_grad():
        _, rows = evaluate_policy(
            policy,
            records,
            [rubric],
            samples=SAMPLES,
            sampling=SAMPLING,
            seed=study.seed,
            reference=reference,
            judge_name=RUBRIC,
            batch_prompts=PROMPTS_AT_ONCE,
            progress=advance,
        )
    write_rows(kept, rows)
    return rows


def _completions(study: Study, name: str) -> Path:
    return study.path("evaluation", "completions", f"{name}.jsonl")


def _is_sampled(study: Study, name: str) -> bool:
    return _completions(study, name).is_file() and (name == "base" or name in study.state["done"])


def transcripts(rows: Mapping[str, Sequence[Row]], proxy: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """One entry per test prompt: what each policy wrote first, by rubric and reward model."""
    entries: dict[int, dict[str, Any]] = {}
    for name in rows:
        for judged, rewarded in zip(rows[name], proxy[name], strict=True):
            if judged["index"] == 0:
                entry = entries.setdefault(
                    judged["group"], {"prompt": judged["prompt"], "kind": judged["kind"], "policies": {}}
                )
                entry["policies"][name] = {
                    "completion": judged["response"],
                    "rubric": judged["scores"],
                    "reward": rewarded["scores"],
                }
    return [entries[group] for group in sorted(entries)]


def _facts(study: Study) -> dict[str, Any]:
    """What the report says about the set-up."""
    cost = load_cost(study.path("sft")) or {}
    kinds = {split: [prompt.kind for prompt in sandbox_prompts(split)] for split in ("train", "validation", "test")}
    return {
        "model_parameters": cost.get("trainable_parameters"),
        "recipes": {name: f"recipes/sandbox/{name}.yaml" for name in ("sft", "reward", *METHODS)},
        "data": {
            f"{split}_prompts": {kind: found.count(kind) for kind in sorted(set(found))}
            for split, found in kinds.items()
        }
        | {"held_out": HELD_OUT},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}",
    }
