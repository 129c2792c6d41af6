"""Baseline and statistics of the reward-model benchmark: a ridge on TF-IDF, paired bootstraps of Spearman."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix, hstack
from scipy.stats import spearmanr
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge

from equipoise.data import ScoredRecord, prompt_text

ALPHAS = (0.3, 1.0, 3.0, 10.0)
RESAMPLES = 10_000
CHUNK = 1_000


def tfidf(train: Sequence[ScoredRecord], others: Sequence[Sequence[ScoredRecord]]) -> list[csr_matrix]:
    """Word 1-2-grams and character 2-5-grams of prompt and of response, fitted on the training rows."""
    columns: list[list[csr_matrix]] = [[] for _ in range(1 + len(others))]
    for text in (lambda r: prompt_text(r.prompt), lambda r: r.response):
        for analyzer, grams in (("word", (1, 2)), ("char_wb", (2, 5))):
            texts = [text(record) for record in train]
            if not any(texts):
                continue
            vectorizer = TfidfVectorizer(
                analyzer=analyzer, ngram_range=grams, sublinear_tf=True, min_df=2, max_features=100_000
            )
            columns[0].append(vectorizer.fit_transform(texts))
            for index, rows in enumerate(others, 1):
                columns[index].append(vectorizer.transform([text(record) for record in rows]))
    return [csr_matrix(hstack(parts)) for parts in columns]


def ridge_predictions(splits: dict[str, list[ScoredRecord]], aspects: Sequence[str]) -> dict[str, list[float]]:
    """Test predictions per aspect; the penalty is chosen by Spearman on the validation split."""
    features = dict(
        zip(
            ("train", "validation", "test"),
            tfidf(splits["train"], [splits["validation"], splits["test"]]),
            strict=True,
        )
    )
    predictions: dict[str, list[float]] = {}
    for aspect in aspects:
        rows, labels = _labelled(splits["train"], aspect)
        checked, truth = _labelled(splits["validation"], aspect)
        best: tuple[float, Ridge] | None = None
        for alpha in ALPHAS:
            model = Ridge(alpha=alpha, solver="sparse_cg").fit(features["train"][rows], labels)
            found = spearmanr(model.predict(features["validation"][checked]), truth).statistic
            if best is None or found > best[0]:
                best = (found, model)
        assert best is not None
        predictions[aspect] = best[1].predict(features["test"]).tolist()
    return predictions


def _labelled(records: Sequence[ScoredRecord], aspect: str) -> tuple[np.ndarray, np.ndarray]:
    scores = [record.scores.get(aspect) for record in records]
    rows = np.array([i for i, score in enumerate(scores) if score is not None])
    return rows, np.array([scores[i] for i in rows], dtype=float)


def paired_spearman(
    records: Sequence[ScoredRecord], aspect: str, ours: Sequence[float], theirs: Sequence[float], seed: int
) -> dict[str, object]:
    """Spearman of two predictors on the labelled rows, and their difference resampled over prompts.

    Rows of one prompt are drawn together; rows without a prompt stand for themselves.
    """
    rows, truth = _labelled(records, aspect)
    left, right = np.asarray(ours)[rows], np.asarray(theirs)[rows]
    clusters: dict[str, list[int]] = {}
    for position, row in enumerate(rows):
        text = prompt_text(records[row].prompt)
        clusters.setdefault(text or f"row {position}", []).append(position)
    members = [np.array(positions) for positions in clusters.values()]
    digest = hashlib.sha256(f"{seed} {aspect}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    chunks = []
    for _ in range(RESAMPLES // CHUNK):
        drawn = generator.multinomial(len(members), np.full(len(members), 1 / len(members)), size=CHUNK)
        counts = np.zeros((CHUNK, len(rows)))
        for cluster, positions in enumerate(members):
            counts[:, positions] = drawn[:, [cluster]]
        chunks.append(weighted_spearman(counts, left, truth) - weighted_spearman(counts, right, truth))
    differences = np.concatenate(chunks)
    point = spearmanr(left, truth).statistic - spearmanr(right, truth).statistic
    return {
        "n": len(rows),
        "prompts": len(members),
        "spearman": float(spearmanr(left, truth).statistic),
        "ridge": float(spearmanr(right, truth).statistic),
        "difference": float(point),
        "ci95": [float(q) for q in np.nanpercentile(differences, [2.5, 97.5])],
        "resampled": differences,
    }


def weighted_spearman(counts_RN: np.ndarray, first_N: np.ndarray, second_N: np.ndarray) -> np.ndarray:
    """Spearman [R] of R resamples in which row n stands counts_RN[r, n] times; NaN where a side does not vary.

    Ranking every resample anew would take minutes: the order of the rows is always the same, so the mid-ranks follow
    from running totals of the counts. Equal to `scipy.stats.spearmanr` on the repeated rows.
    """
    total_R1 = counts_RN.sum(axis=1, keepdims=True)

    def centred_ranks(values_N: np.ndarray) -> np.ndarray:
        _, group_N = np.unique(values_N, return_inverse=True)
        order = np.argsort(group_N, kind="stable")
        starts = np.flatnonzero(np.diff(group_N[order], prepend=-1))
        weight_RU = np.add.reduceat(counts_RN[:, order], starts, axis=1)
        rank_RU = np.cumsum(weight_RU, axis=1) - (weight_RU - 1) / 2
        return rank_RU[:, group_N] - (total_R1 + 1) / 2

    first_RN, second_RN = centred_ranks(first_N), centred_ranks(second_N)
    covariance = (counts_RN * first_RN * second_RN).sum(axis=1)
    variances = (counts_RN * first_RN**2).sum(axis=1) * (counts_RN * second_RN**2).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return covariance / np.sqrt(variances)
