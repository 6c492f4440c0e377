"""Orders of features, LEACE, and the probe that tells what is left."""

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

MAX_ITER = 1000
FLAT = 1e-9  # a deviation, as a share of the largest


@dataclass(frozen=True)
class Probe:
    """A logistic regression of columns z-scored by what it was fitted on.

    weights: the largest of each column over classes [width]; converged: whether lbfgs did.
    """

    model: LogisticRegression | int  # a label where there was nothing to learn
    mean: np.ndarray
    deviation: np.ndarray
    kept: np.ndarray
    basis: np.ndarray | None
    weights: np.ndarray
    converged: bool

    def say(self, x: np.ndarray) -> np.ndarray:
        """Labels of x [n, width], int64 [n]."""
        if isinstance(self.model, int):
            return np.full(len(x), self.model)
        z = (x[:, self.kept] - self.mean) / self.deviation
        return self.model.predict(z if self.basis is None else z @ self.basis)


def fisher(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Σ_c n_c (μ_c − μ)² / Σ_c n_c σ_c² of each column of x [n, width]: 0 of one that is constant, infinite of one that
    is constant in every class alone."""
    mean = x.mean(0, dtype=np.float64)
    between, within = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for code in np.unique(codes):
        own = x[codes == code].astype(np.float64)
        between += len(own) * (own.mean(0) - mean) ** 2
        within += len(own) * own.var(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(between > 1e-18 * len(x), between / within, 0.0)


def descending(scores: np.ndarray) -> np.ndarray:
    """Columns by falling score; of equal ones the first."""
    return np.argsort(-scores, kind="stable")


def fit(x: np.ndarray, codes: np.ndarray, c: float | None) -> Probe:
    """Logistic regression on x [n, width] with labels codes [n].

    Columns are z-scored; those that never change are left out. c: inverse strength of the L2 penalty, None: no
    penalty. With more columns than samples it is solved in the samples' span, where the solution lies.
    """
    mean, deviation = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    weights = np.zeros(x.shape[1])
    kept = np.flatnonzero(deviation > FLAT * max(deviation.max(initial=0), 1e-300))
    if not len(kept) or len(np.unique(codes)) < 2:
        return Probe(int(np.bincount(codes).argmax()), mean[:0], mean[:0], kept, None, weights, True)
    z, basis = (x[:, kept] - mean[kept]) / deviation[kept], None
    if z.shape[1] > len(z):
        squares, u = np.linalg.eigh(z @ z.T)
        good = squares > 1e-10 * squares.max()
        basis = z.T @ (u[:, good] / np.sqrt(squares[good]))  # orthonormal
        z = z @ basis
    model = LogisticRegression(C=np.inf if c is None else c, max_iter=MAX_ITER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told by the number of iterations
        model.fit(z, codes)
    coefficients = model.coef_ if basis is None else model.coef_ @ basis.T
    weights[kept] = np.abs(coefficients).max(0)
    return Probe(model, mean[kept], deviation[kept], kept, basis, weights, bool(model.n_iter_[0] < MAX_ITER))


def leace(moment: np.ndarray, x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """What LEACE takes out: A [d, d] such that x − A (x − mean) has no covariance with the labels, changing x least.

    Belrose et al. 2023 (arXiv 2306.03819), theorem 4.3: with W the whitening transform and P the projection on the
    span of W Σ_xz, A = W⁺ P W. moment: E x xᵀ over the frames of the samples [d, d]; x: mean activations [n, d] of the
    samples, which count alike; codes [n].
    """
    mean = x.mean(0, dtype=np.float64)
    labels = np.eye(codes.max() + 1)[codes]
    cross = (x - mean).T @ (labels - labels.mean(0)) / len(x)
    values, vectors = np.linalg.eigh(moment - np.outer(mean, mean))
    good = values > 1e-9 * values.max()
    root, vectors = np.sqrt(values[good]), vectors[:, good]
    left, sizes, _ = np.linalg.svd((vectors / root).T @ cross, full_matrices=False)
    span = left[:, sizes > 1e-9 * max(sizes.max(), 1e-300)]
    return (vectors * root) @ span @ span.T @ (vectors / root).T


def rank(matrix: np.ndarray) -> int:
    """Dimensions that an eraser takes out."""
    return int(np.linalg.matrix_rank(matrix, tol=1e-6))


def permuted(codes: np.ndarray, speakers: np.ndarray, by_speaker: bool, rng: np.random.Generator) -> np.ndarray:
    """Labels moved to others: of whole speakers where a label belongs to the speaker, else of samples."""
    if not by_speaker:
        return rng.permutation(codes)
    names, first, index = np.unique(speakers, return_index=True, return_inverse=True)
    return rng.permutation(codes[first])[index] if len(names) > 1 else codes
