"""The classifier that decides what a representation tells of the accent: L1-penalised logistic regression by saga."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, issparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

Features = Any  # np.ndarray, or csr_matrix, which has no types


@dataclass(frozen=True)
class Told:
    """Labels 0 and 1 told of the test clips, int8 [clips]; whether saga converged; how many weights are not 0."""

    said: np.ndarray
    converged: bool
    weights: int


def _deviation(x: Features) -> np.ndarray:
    """Of each column, float64; 0 of what never changes."""
    if not issparse(x):
        return x.std(0, dtype=np.float64)
    mean = np.asarray(x.mean(0)).ravel()
    square = np.asarray(x.multiply(x).mean(0)).ravel()
    return np.sqrt(np.clip(square - mean.astype(np.float64) ** 2, 0, None))


def classify(train: Features, labels: np.ndarray, test: Features, c: float, max_iter: int, seed: int) -> Told:
    """Fit on train [n, width] with labels 0 and 1 [n], tell test [m, width]; columns by their deviation in train.

    Dense columns are centred too. Sparse codes are not, so that they stay sparse: the intercept, which no penalty
    touches, takes up a column's mean. Columns that never change in train are left out: their weights would be 0.
    """
    if len(np.unique(labels)) < 2:
        return Told(np.full(test.shape[0], labels[0], np.int8), True, 0)
    deviation = _deviation(train)
    kept = np.flatnonzero(deviation > 1e-9)
    if not len(kept):
        return Told(np.full(test.shape[0], int(labels.mean() >= 0.5), np.int8), True, 0)
    if issparse(train):
        by = 1 / deviation[kept]
        x, y = (csr_matrix(part[:, kept].multiply(by), dtype=np.float64) for part in (train, test))
    else:
        mean = train[:, kept].mean(0, dtype=np.float64)
        x, y = ((part[:, kept] - mean) / deviation[kept] for part in (train, test))
    model = LogisticRegression(l1_ratio=1, C=c, solver="saga", max_iter=max_iter, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told by the number of iterations
        model.fit(x, labels)
    return Told(model.predict(y).astype(np.int8), bool(model.n_iter_[0] < max_iter), int(np.count_nonzero(model.coef_)))
