"""Baseline and statistics of the reward-model benchmark: a ridge on TF-IDF, paired bootstraps of Spearman."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix, hstack
from scipy.stats import rankdata, spearmanr
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge

from equipoise.data import ScoredRecord, prompt_text

ALPHAS = (0.3, 1.0, 3.0, 10.0)
RESAMPLES = 10_000


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
    differences = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        drawn = generator.integers(len(members), size=len(members))
        positions = np.concatenate([members[i] for i in drawn])
        ranks = rankdata(truth[positions])
        differences[index] = _correlation(left[positions], ranks) - _correlation(right[positions], ranks)
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


def _correlation(values: np.ndarray, ranks: np.ndarray) -> float:
    if ranks.min() == ranks.max() or values.min() == values.max():
        return float("nan")
    return float(np.corrcoef(rankdata(values), ranks)[0, 1])
