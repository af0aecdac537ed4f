"""Kernel classifiers in closed form, with leave-one-out scores for what is built on top of them.

Legend: N texts (n of train first, then items), C labels. Scores are about 1 for the answer of a
training text and -1 for every other label.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack
from views import Matrix

Labels = NDArray[np.intp]


@dataclass(frozen=True)
class Scores:
    """Scores of one classifier; those of a training text come from a fit without that text."""

    train: Matrix  # (n, C)
    items: Matrix  # (N - n, C)

    def stacked(self) -> Matrix:
        """Train first, then items: shape (N, C)."""
        return np.concatenate([self.train, self.items])


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """The `classifier` section of harness.yaml."""

    ridge: float  # the larger, the smoother
    center: bool  # similarity around the mean text
    hinge_rounds: int  # 0 is ridge regression on +-1; 20 is close to a squared-hinge SVM


def one_hot(answers: Labels, n_labels: int) -> Matrix:
    """Targets +1 for the answer and -1 for the rest, shape (n, C)."""
    targets = np.full((len(answers), n_labels), -1, np.float32)
    targets[np.arange(len(answers)), answers] = 1
    return targets


def kernel_classifier(gram: Matrix, targets: Matrix, *, settings: Classifier) -> Scores:
    """Ridge regression or squared-hinge SVM in the space of `gram`, one output for each label.

    With `hinge_rounds` 0 this is kernel ridge, and the leave-one-out score of text i is
    `y_i - a_i / H_ii`, where `H` is the inverse of `gram + ridge` and `a = H y`; it equals a refit
    without text i. The hinge is reached by ridge regression whose targets move: a text beyond its
    margin costs nothing, so its target becomes its own score. Every round is one matrix product
    (with Nesterov's momentum). Leave-one-out scores are then far too good, because the texts
    beyond their margin pin the fit in place: do not learn a second stage from them.

    Args:
        gram: Shape (N, N), train first.
        targets: Shape (n, C), +1 or -1.
        settings: `ridge` is added to the diagonal and must be positive.
    """
    n = len(targets)
    if settings.hinge_rounds:
        gram = gram + 1  # a constant to be below zero with; ridge does better without it
    inverse = _inverse(gram[:n, :n], settings.ridge)
    dual = inverse @ targets
    moved = targets
    fitted = before = moved - settings.ridge * dual
    step = 1.0
    for _ in range(settings.hinge_rounds):
        next_step = (1 + np.sqrt(1 + 4 * step * step)) / 2
        ahead = fitted + np.float32((step - 1) / next_step) * (fitted - before)
        step = next_step
        moved = np.where(targets * ahead >= 1, ahead, targets)
        dual = inverse @ moved
        before, fitted = fitted, moved - settings.ridge * dual
    leave_one_out = moved - dual / np.diag(inverse)[:, None]
    return Scores(leave_one_out, gram[n:, :n] @ dual)


def prototypes(gram: Matrix, answers: Labels, n_labels: int) -> Scores:
    """Mean similarity to the training texts of each label, own text excluded."""
    n = len(answers)
    member = (one_hot(answers, n_labels) + 1) / 2
    sums = gram[:, :n] @ member
    count = member.sum(0)
    own = member * np.diag(gram)[:n, None]
    train = (sums[:n] - own) / np.maximum(count - member, 1)
    return Scores(train, sums[n:] / np.maximum(count, 1))


def center(gram: Matrix) -> Matrix:
    """Cosine similarity around the mean text: what all texts share no longer makes them alike."""
    mean = gram.mean(axis=0)
    centered = gram - mean - mean[:, None] + mean.mean()
    length = np.sqrt(np.maximum(np.diag(centered), 1e-6))
    return centered / length / length[:, None]


def _inverse(gram: Matrix, ridge: float) -> Matrix:
    """Inverse of `gram + ridge * I`: a Cholesky factor, then one solve for each unit vector.

    LAPACK's own inverse from a factor (potri) does less arithmetic and takes twice as long: its
    OpenBLAS version hardly uses a second core.
    """
    shifted = np.array(gram, np.float32, order="F")
    shifted[np.diag_indices(len(gram))] += ridge
    factor, info = lapack.spotrf(shifted, lower=1, overwrite_a=1)
    if info:
        raise ValueError(f"classifier.ridge={ridge!r} is too small for this view; raise it")
    identity = np.eye(len(gram), dtype=np.float32, order="F")
    inverse, _ = lapack.spotrs(factor, identity, lower=1, overwrite_b=1)
    return inverse
