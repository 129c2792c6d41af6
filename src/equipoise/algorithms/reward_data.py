"""What a reward model is trained on: scored records as labels per split, and the order of batches."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equipoise.config import RewardConfig
from equipoise.data import SPLITS, ScoredRecord, load_scored, prompt_text, split_records, undeclared_aspects
from equipoise.data.problems import suggestion
from equipoise.errors import DataError
from equipoise.models.aspects import Aspect
from equipoise.models.reward_inputs import EncodedRow
from equipoise.models.reward_model import RewardModel
from equipoise.rollout.randomness import derived_seed, uniforms

logger = logging.getLogger("equipoise")

WINDOW = 16  # batches that are sorted by length together: little padding, batches still mixed
_ORDER, _BOOTSTRAP, _MEMBERS = 3, 5, 6  # streams of random numbers
MIN_LABELS = 2


@dataclass(frozen=True)
class LabelledTexts:
    """Texts of one split with native labels [N, K], float64, NaN where a response was not scored on an aspect."""

    prompts: list[Any]
    responses: list[str]
    labels_NK: Tensor

    def __len__(self) -> int:
        return len(self.responses)


@dataclass(frozen=True)
class EncodedSplit:
    """The same, encoded; `standardised_NK` are float32 labels in units of the training std."""

    rows: list[EncodedRow]
    labels_NK: Tensor
    standardised_NK: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def spread(self, most: int) -> EncodedSplit:
        """At most so many rows, evenly spaced. Example: 2 of rows 0 to 4 are 0 and 2."""
        if len(self) <= most:
            return self
        places = [place * len(self) // most for place in range(most)]
        return EncodedSplit(
            [self.rows[place] for place in places], self.labels_NK[places], self.standardised_NK[places]
        )


def load_splits(config: RewardConfig) -> dict[str, list[ScoredRecord]]:
    """Scored records of every source by split.

    A source whose rows carry a split keeps it; where it marks no row `validation`, that share of its training prompts
    becomes it, so that every source's aspects have a say in early stopping. The other sources are split by prompt,
    together; a prompt that a split source holds goes where it stands there. Raises DataError naming what is wrong in
    the files, or a declared aspect without any score.
    """
    with_split: list[ScoredRecord] = []
    without: list[ScoredRecord] = []
    for source in config.data:
        records = load_scored(source)
        if any(record.split for record in records):
            with_split += _with_validation(records, config)
        else:
            without += records
    return joined_splits(with_split, without, config)


def joined_splits(
    with_split: Sequence[ScoredRecord], without: Sequence[ScoredRecord], config: RewardConfig
) -> dict[str, list[ScoredRecord]]:
    """`load_splits` of records already loaded."""
    options = {"test": config.test_fraction, "validation": config.validation_fraction, "seed": config.seed}
    settled = _with_validation(with_split, config)
    places = {prompt_text(record.prompt): record.split for record in settled}
    places.pop("", None)  # rows without a prompt do not share one
    bound = [replace(r, split=places[prompt_text(r.prompt)]) for r in without if prompt_text(r.prompt) in places]
    free = [record for record in without if prompt_text(record.prompt) not in places]
    parts = [split_records(records, **options) for records in ([*settled, *bound], free) if records]
    return {name: [record for part in parts for record in part[name]] for name in SPLITS}


def _with_validation(records: Sequence[ScoredRecord], config: RewardConfig) -> list[ScoredRecord]:
    """The records, some training prompts marked `validation` where no row is."""
    training = [replace(record, split=None) for record in records if record.split == "train"]
    if not training or any(record.split == "validation" for record in records):
        return list(records)
    carved = split_records(training, validation=config.validation_fraction, test=0.0, seed=config.seed)
    logger.warning(
        "reward: no row has the split validation: %d of %d training rows are held out for it",
        len(carved["validation"]),
        len(training),
    )
    marked = [replace(record, split=name) for name in ("train", "validation") for record in carved[name]]
    return [*marked, *(record for record in records if record.split != "train")]


def labelled_splits(splits: Mapping[str, Sequence[ScoredRecord]], names: list[str]) -> dict[str, LabelledTexts]:
    """Texts and labels on the declared aspects, by split.

    Rows without a label on any of them are left out and counted; undeclared aspects are named once. Raises DataError
    naming the declared aspects that no row scores, or the training split does not.
    """
    records = [record for split in SPLITS for record in splits[split]]
    _check_scored(records, names)
    ignored = undeclared_aspects(records, names)
    if ignored:
        logger.warning("reward: the data scores %s, which `aspects` does not declare: ignored", ", ".join(ignored))
    labelled = {split: [record for record in splits[split] if _has_label(record, names)] for split in SPLITS}
    left_out = len(records) - sum(len(part) for part in labelled.values())
    if left_out:
        logger.warning("reward: %d of %d rows have no score on a declared aspect: left out", left_out, len(records))
    texts = {split: _labelled(labelled[split], names) for split in SPLITS}
    _check_labels(texts, names)
    return texts


def _has_label(record: ScoredRecord, names: Sequence[str]) -> bool:
    return any(record.scores.get(name) is not None for name in names)


def _check_scored(records: Sequence[ScoredRecord], names: Sequence[str]) -> None:
    named = {name for record in records for name in record.scores}
    for name in names:
        if name not in named:
            raise DataError(
                f"aspect {name!r} of `aspects` is in no row{suggestion(name, named)}; the data scores: "
                f"{', '.join(sorted(named)) or 'nothing'}"
            )
        if not any(record.scores.get(name) is not None for record in records):
            raise DataError(f"aspect {name!r}: all scores are missing; add scores or remove it from `aspects`")


def _labelled(records: Sequence[ScoredRecord], names: list[str]) -> LabelledTexts:
    labels_NK = torch.full((len(records), len(names)), float("nan"), dtype=torch.float64)
    for n, record in enumerate(records):
        for k, name in enumerate(names):
            value = record.scores.get(name)
            if value is not None:
                labels_NK[n, k] = value
    return LabelledTexts([record.prompt for record in records], [record.response for record in records], labels_NK)


def _check_labels(splits: dict[str, LabelledTexts], names: list[str]) -> None:
    for k, name in enumerate(names):
        counts = {split: int((~data.labels_NK[:, k].isnan()).sum()) for split, data in splits.items()}
        if counts["train"] < MIN_LABELS:
            raise DataError(
                f"aspect {name!r}: the training split has {counts['train']} scores of it (validation "
                f"{counts['validation']}, test {counts['test']}), at least {MIN_LABELS} are needed; add scored rows, "
                "move some to the training split, or remove the aspect from `aspects`"
            )
        if not counts["validation"]:
            logger.warning("reward: aspect %r has no validation scores: early stopping does not see it", name)


def aspects_with_moments(config: RewardConfig, labels_NK: Tensor) -> list[Aspect]:
    """The declared aspects with mean and (population) std of their training labels; a constant gets std 1."""
    aspects = []
    for k, (name, declared) in enumerate(config.aspects.items()):
        column = labels_NK[:, k][~labels_NK[:, k].isnan()]
        mean, std = float(column.mean()), float(column.std(correction=0))
        if bool((column == column[0]).all()):
            logger.warning(
                "reward: every training score of aspect %r is %g: there is nothing to learn", name, column[0]
            )
            mean, std = float(column[0]), 1.0
        aspects.append(Aspect.from_config(name, declared, mean=mean, std=std))
    return aspects


def encode_split(model: RewardModel, texts: LabelledTexts) -> EncodedSplit:
    """Token ids, once for the whole training, and standardised labels."""
    mean_K = torch.tensor([aspect.mean for aspect in model.aspect_specs], dtype=torch.float64)
    std_K = torch.tensor([aspect.std for aspect in model.aspect_specs], dtype=torch.float64)
    rows = model.inputs.rows(texts.prompts, texts.responses)
    return EncodedSplit(rows, texts.labels_NK, ((texts.labels_NK - mean_K) / std_K).float())


def num_batches(num_rows: int, batch_size: int) -> int:
    """Batches of an epoch; the last one may be smaller."""
    return -(-num_rows // batch_size)


@lru_cache(maxsize=2)
def epoch_batches(lengths: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row indices of every batch of an epoch, each row once; a function of the arguments alone.

    Rows are shuffled, every window of 16 batches is sorted by length and cut into batches, and the batches of all
    windows are shuffled.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, _ORDER, epoch))
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches: list[list[int]] = []
    for start in range(0, len(order), WINDOW * batch_size):
        window = sorted(order[start : start + WINDOW * batch_size], key=lambda row: lengths[row])
        batches += [window[cut : cut + batch_size] for cut in range(0, len(window), batch_size)]
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


def member_seeds(config: RewardConfig) -> list[int]:
    """A seed for each member's initial weights; empty where the recipe has no ensemble."""
    members = config.ensemble.members if config.ensemble is not None else 0
    return [derived_seed(config.seed, _MEMBERS, member) for member in range(members)]


def bootstrap_weights(rows: Sequence[int], config: RewardConfig) -> Tensor | None:
    """How much each member makes of these rows of the training split: float32 [B, M]; None without a bootstrap.

    Weights are drawn from an exponential distribution of mean 1, w = -ln(1 - u): the Bayesian bootstrap (Rubin, Annals
    of Statistics 1981) up to a factor that the whole split shares. Counting how often a row would be drawn with
    replacement leaves out a third of the rows, and with them all labels of a rare aspect; these weights are never 0.
    u is a function of (seed, row, member) alone, so a row weighs the same in every epoch and after a resume.

    Example: u = 0.5 gives ln 2 = 0.693.
    """
    if config.ensemble is None or not config.ensemble.bootstrap:
        return None
    seed = derived_seed(config.seed, _BOOTSTRAP)
    uniform_BM = uniforms(seed, 0, np.asarray(rows), np.zeros(len(rows)), config.ensemble.members)
    # Half a step up: u = 0 is one of the 2**23 values, and a weight of 0 would drop the row.
    return torch.from_numpy(-np.log1p(-(uniform_BM.astype(np.float64) + 2.0**-24))).float()
