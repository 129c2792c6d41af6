"""Multi-label reward regression: one network learns K aspects from scores with gaps.

Loss (section 4 of the design): sum_ik m_ik e_ik^2 / sum m, e in standardised units, m = 1 where response i was scored
on aspect k. Source of the multi-label form: arXiv 2503.21819, section 3.1. Usage, metrics and details:
docs/algorithms/reward_regression.md.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from equipoise.algorithms.batches import micro_batches
from equipoise.algorithms.reward_data import (
    EncodedSplit,
    aspects_with_moments,
    bootstrap_weights,
    encode_split,
    epoch_batches,
    joined_splits,
    labelled_splits,
    load_splits,
    member_seeds,
    num_batches,
)
from equipoise.algorithms.reward_report import (
    no_better_than_mean,
    plot_aspect,
    plot_names,
    split_metrics,
    uncertainty_metrics,
    write_report,
)
from equipoise.algorithms.run import Run
from equipoise.algorithms.steps import Updater
from equipoise.config import RewardConfig
from equipoise.data import SPLITS, ScoredRecord, cross_split_duplicates
from equipoise.errors import CheckpointError
from equipoise.functional import masked_regression_loss, spearman
from equipoise.models.reward_inputs import TruncationCount
from equipoise.models.reward_model import RewardModel
from equipoise.rollout.randomness import derived_seed

logger = logging.getLogger("equipoise")

REPORT_FILE = "reward_report.json"
REPORTED_TRAINING = 2000  # training rows that the report predicts: all of them would take a third of an epoch's time
_DROPOUT = 4  # stream of random numbers


@dataclass
class Best:
    """The best validated weights so far, and how long ago that was."""

    loss: float = math.inf
    step: int = 0
    without_improvement: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def update(self, loss: float, step: int, model: RewardModel) -> None:
        """Take a validation into account; weights are copied to the CPU where they are better than any before."""
        if loss < self.loss:
            self.loss, self.step, self.without_improvement = loss, step, 0
            self.weights = {name: p.detach().cpu().clone() for name, p in model.module.named_parameters()}
        else:
            self.without_improvement += 1

    def should_stop(self, patience: int | None) -> bool:
        """True after `patience` validations in a row without improvement."""
        return patience is not None and self.without_improvement >= patience

    def restore_into(self, model: RewardModel) -> None:
        """Put the best weights back; without a validation the last ones stay."""
        with torch.no_grad():
            for name, parameter in model.module.named_parameters():
                if name in self.weights:
                    parameter.copy_(self.weights[name])

    def tensors(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        return {f"best/{name}": tensor for name, tensor in self.weights.items()}

    def values(self) -> dict[str, Any]:
        """For the checkpoint; no validation yet is null, JSON has no infinity."""
        loss = self.loss if math.isfinite(self.loss) else None
        return {"best": {"loss": loss, "step": self.step, "without_improvement": self.without_improvement}}

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """The inverse of `tensors` and `values`."""
        stored = values["best"]
        self.loss = math.inf if stored["loss"] is None else stored["loss"]
        self.step, self.without_improvement = stored["step"], stored["without_improvement"]
        self.weights = {key.removeprefix("best/"): value for key, value in tensors.items() if key.startswith("best/")}


def train_reward(config: RewardConfig, run: Run, *, records: Sequence[ScoredRecord] | None = None) -> RewardModel:
    """Train a reward model on scored responses; writes the run directory and returns the model.

    Suffixes: B responses of a batch, K aspects, N rows of a split.

    Args:
        records: scored responses; those of `config.data` where None.

    Raises DataError where a declared aspect has no training labels, ConfigError for a backbone that cannot be a
    reward model, Interrupted after a signal, with everything saved.
    """
    if run.is_complete and (run.out / REPORT_FILE).is_file():
        logger.info("%s: this run is complete", run.out)
        return RewardModel.load(run.model_directory)
    if records is None:
        by_split = load_splits(config)
    elif any(record.split for record in records):
        by_split = joined_splits(records, [], config)
    else:
        by_split = joined_splits([], records, config)
    texts = labelled_splits(by_split, list(config.aspects))
    duplicates = cross_split_duplicates(by_split)
    if duplicates:
        logger.warning("reward: %d texts stand in more than one split, the first: %s", len(duplicates), duplicates[0])
    aspects = aspects_with_moments(config, texts["train"].labels_NK)
    model = RewardModel.from_backbone(config.model, aspects, config.input, config.seed, member_seeds(config))
    splits: dict[str, EncodedSplit] = {}
    truncation: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        model.inputs.truncation = TruncationCount()
        splits[split] = encode_split(model, texts[split])
        truncation[split] = model.truncation.to_json()
    best = Best()
    steps_done = _train(model, splits, config, run, best)
    best.restore_into(model)
    facts: dict[str, Any] = {
        "steps": steps_done,
        "best_step": best.step or steps_done,
        "truncation": truncation,
        "duplicates_across_splits": {"count": len(duplicates), "examples": [str(text) for text in duplicates[:5]]},
    }
    _report(model, splits, config, run, facts)
    run.finish(model.save)
    return model


def balance_weights(labels_NK: Tensor) -> Tensor:
    """Weights [K] that make every aspect weigh the same over the training set: w_k = N_total / (K N_k).

    N_k is the number of labels of aspect k, N_total their sum. Example: 30 and 10 labels: 40/60 and 40/20, so that
    both contribute 30 * 2/3 = 10 * 2 = 20. Raises nothing: every aspect has labels, `labelled_splits` saw to that.
    """
    counts_K = (~labels_NK.isnan()).sum(dim=0).double()
    return (counts_K.sum() / (len(counts_K) * counts_K)).float()


def _train(model: RewardModel, splits: dict[str, EncodedSplit], config: RewardConfig, run: Run, best: Best) -> int:
    """The training loop; returns the number of completed steps."""
    training = splits["train"]
    per_epoch = num_batches(len(training), config.batch_size)
    steps = per_epoch * config.num_epochs
    run.num_steps = steps
    lengths = tuple(len(row.ids) for row in training.rows)
    updater = Updater(model.module, config.optimizer, steps, run)
    done = run.first_step
    if (checkpoint := run.restore()) is not None:
        updater.load(checkpoint.tensors, checkpoint.values)
        best.load(checkpoint.tensors, checkpoint.values)
    with run.stopping_cleanly():
        while done < steps and not best.should_stop(config.patience):
            epoch, place = divmod(done, per_epoch)
            batch = epoch_batches(lengths, config.batch_size, config.seed, epoch)[place]
            # Dropout masks are a function of the step, so a resumed run repeats them.
            torch.manual_seed(derived_seed(config.seed, _DROPOUT, done, run.rank))
            with run.timed("update"):
                metrics = _update(model, training, batch, config, updater, run)
            done += 1
            if len(splits["validation"]) and _validation_due(done, per_epoch, steps, config):
                with run.timed("validation"):
                    metrics |= _validate(model, splits["validation"], config, run)
                best.update(metrics["validation/loss"], done, model)
            run.log(done, metrics)
            last_step = done if best.should_stop(config.patience) else steps
            run.maybe_checkpoint(
                done,
                last_step,
                lambda: {**updater.tensors(), **best.tensors()},
                {**updater.values(), **best.values()},
            )
    return done


def _validation_due(done: int, per_epoch: int, steps: int, config: RewardConfig) -> bool:
    return done % (config.evaluate_every or per_epoch) == 0 or done == steps


def _update(
    model: RewardModel,
    training: EncodedSplit,
    batch: list[int],
    config: RewardConfig,
    updater: Updater,
    run: Run,
) -> dict[str, Any]:
    """One optimizer step on the batch; processes take every n-th of its rows, micro-batches like lengths.

    The normaliser is that of the whole batch. `labels`: its number of labels. `equal`: B times the labels per row of
    the training set, so that a batch with few labels does not weigh each of them more, and the losses of an epoch
    average exactly to the mean over aspects of the mean squared error.
    """
    targets_NK = training.standardised_NK
    weights_K: Tensor | None = None
    if config.aspect_balance == "equal":
        weights_K = balance_weights(targets_NK).to(model.device)
        normalizer = len(batch) * float((~targets_NK.isnan()).sum()) / len(training)
    else:
        normalizer = float((~targets_NK[batch].isnan()).sum())
    own = sorted(batch, key=lambda row: len(training.rows[row].ids))[run.rank :: run.num_processes]
    summed = 0.0

    def loss_of(rows: list[int]) -> Tensor:
        nonlocal summed
        # A process without rows left still takes part in the collective passes, with nothing to learn.
        encoded = model.inputs.collate([training.rows[row] for row in rows or batch[:1]])
        targets_BK = targets_NK[rows] if rows else torch.full_like(targets_NK[batch[:1]], math.nan)
        predictions_BK = updater.wrapped(**{name: tensor.to(model.device) for name, tensor in encoded.items()})
        if model.num_members:
            weights_BM = bootstrap_weights(rows or batch[:1], config)
            loss = ensemble_loss(predictions_BK, targets_BK.to(model.device), config, normalizer, weights_K, weights_BM)
        else:
            loss, _ = masked_regression_loss(
                predictions_BK,
                targets_BK.to(model.device),
                kind=config.loss,
                normalizer=normalizer,
                weights_K=weights_K,
            )
        summed += float(loss.detach())
        if rows:
            flops = model.forward_flops([training.rows[row] for row in rows])
            run.count(trained_tokens=int(encoded["attention_mask"].sum()), forward=flops, backward=2 * flops)
        return loss

    model.module.train()
    parts = [own[part] for part in micro_batches(len(own), config.micro_batch_size)]
    parts += [[] for _ in range(run.largest(len(parts)) - len(parts))]
    result = updater.step([lambda part=part: loss_of(part) for part in parts])
    return {"loss": run.total(summed), **result}


def ensemble_loss(
    predictions_BMK: Tensor,
    targets_BK: Tensor,
    config: RewardConfig,
    normalizer: float,
    weights_K: Tensor | None = None,
    weights_BM: Tensor | None = None,
) -> Tensor:
    """Mean over the members of sum_ik v_im w_k m_ik l(e_imk) / normalizer, v the weight member m gives row i.

    The normaliser stays that of the unweighted labels, as the weights' mean is 1: an epoch then is the bootstrapped
    training set, and no batch's weights are scaled back to 1.

    Example: one row, one aspect, target 0, members 1 and 3, weights 2 and 1, normaliser 1: (2 * 1 + 1 * 9) / 2 = 5.5.
    """
    num_members = predictions_BMK.shape[1]
    factors_BMK = torch.ones_like(predictions_BMK) if weights_K is None else weights_K.expand_as(predictions_BMK)
    if weights_BM is not None:
        factors_BMK = factors_BMK * weights_BM.to(factors_BMK.device)[:, :, None]
    # Every term is a column of its own, so that it can have a weight of its own.
    loss, _ = masked_regression_loss(
        predictions_BMK.reshape(1, -1),
        targets_BK[:, None].expand_as(predictions_BMK).reshape(1, -1),
        kind=config.loss,
        normalizer=normalizer * num_members,
        weights_K=factors_BMK.reshape(-1),
    )
    return loss


def _validate(model: RewardModel, split: EncodedSplit, config: RewardConfig, run: Run) -> dict[str, Any]:
    """`validation/loss`, the mean squared error in standardised units, and Spearman per aspect.

    `labels`: over all labels; `equal`: the mean over aspects (those with validation labels) of each one's own.
    """
    scores_NK = predictions(model, split, config, run)
    std_K = torch.tensor([aspect.std for aspect in model.aspect_specs], dtype=torch.float64)
    squares_NK = ((scores_NK - split.labels_NK) / std_K).square()
    by_aspect_K = squares_NK.nanmean(dim=0)
    loss = by_aspect_K.nanmean() if config.aspect_balance == "equal" else squares_NK.nanmean()
    metrics: dict[str, Any] = {"validation/loss": float(loss)}
    for k, aspect in enumerate(model.aspect_specs):
        scored_N = ~split.labels_NK[:, k].isnan()
        value = float(spearman(scores_NK[scored_N, k], split.labels_NK[scored_N, k])) if scored_N.any() else math.nan
        metrics[f"validation/{aspect.name}/spearman"] = value if math.isfinite(value) else None
    return metrics


def predictions(model: RewardModel, split: EncodedSplit, config: RewardConfig, run: Run) -> Tensor:
    """Native scores [N, K] of a split, float64, on every process; each computes its share."""
    return _predicted(model, split, config, run)[0]


def _predicted(model: RewardModel, split: EncodedSplit, config: RewardConfig, run: Run) -> tuple[Tensor, Tensor]:
    """`predictions`, and the members' standard deviations [N, K]; zeros for a model with one head."""
    own = list(range(len(split)))[run.rank :: run.num_processes]
    both_2NK = torch.zeros(2, len(split), len(model.aspect_specs), dtype=torch.float64)
    if own:
        size = config.micro_batch_size or config.batch_size
        rows = [split.rows[row] for row in own]
        if model.num_members:
            both_2NK[:, own] = torch.stack(model.score_rows_with_std(rows, batch_size=size)).double()
        else:
            both_2NK[0, own] = model.score_rows(rows, batch_size=size).double()
    if run.num_processes > 1:
        both_2NK = run.accelerator.reduce(both_2NK.to(run.accelerator.device), reduction="sum").cpu()  # type: ignore[union-attr]
    return both_2NK[0], both_2NK[1]


def _report(
    model: RewardModel, splits: dict[str, EncodedSplit], config: RewardConfig, run: Run, facts: dict[str, Any]
) -> None:
    """reward_report.json and plots/; warns of aspects that are predicted no better than by their mean."""
    rows = {split: len(splits[split]) for split in SPLITS}
    splits = {**splits, "train": splits["train"].spread(REPORTED_TRAINING)}
    predicted = {split: _predicted(model, splits[split], config, run) for split in SPLITS}
    scores = {split: predicted[split][0] for split in SPLITS}
    by_split = {split: split_metrics(scores[split], splits[split].labels_NK, model.aspect_specs) for split in SPLITS}
    if not run.is_main:
        return
    files = plot_names(model.aspect_specs)
    unlearned, drawn = [], []
    for k, aspect in enumerate(model.aspect_specs):
        if split := no_better_than_mean(by_split, aspect.name):
            unlearned.append(aspect.name)
            metrics = by_split[split][aspect.name]
            logger.warning(
                "reward: aspect %r is predicted no better than by its training mean on %s (MSE %.4g, baseline %.4g); "
                "do not train a policy on it",
                aspect.name,
                split,
                metrics["mse"],
                metrics["baseline_mse"],
            )
        shown = next((split for split in ("test", "validation", "train") if by_split[split][aspect.name]["n"]), "train")
        labels_N = splits[shown].labels_NK[:, k]
        drawn.append((files[aspect.name], aspect, scores[shown][:, k], labels_N, shown))
    report = {
        "model": config.model.model,
        "rows": rows,
        **facts,
        "no_better_than_mean": unlearned,
        "aspects": {
            aspect.name: {
                **aspect.to_json(),
                "plot": f"plots/{files[aspect.name]}",
                **{split: by_split[split][aspect.name] for split in SPLITS},
            }
            for aspect in model.aspect_specs
        },
    }
    if config.ensemble is not None:
        report["ensemble"] = config.ensemble.model_dump() | {
            "aspects": {
                aspect.name: {
                    split: uncertainty_metrics(
                        predicted[split][1][:, k], scores[split][:, k], splits[split].labels_NK[:, k]
                    )
                    for split in SPLITS
                }
                for k, aspect in enumerate(model.aspect_specs)
            }
        }
    try:
        for file, aspect, scores_N, labels_N, shown in drawn:
            plot_aspect(run.out / "plots" / file, aspect, scores_N, labels_N, shown)
        write_report(run.out / REPORT_FILE, report)
    except OSError as error:
        raise CheckpointError(
            f"{run.out}: cannot write the report: {error}; free space and run again with --resume"
        ) from error
