"""Second stage: choose among the best few labels with evidence that one score cannot hold.

A conditional logit over the candidates of a text; its weights are shared by all labels, so a
handful of numbers is learned from the leave-one-out scores of the whole training set.

Legend: N texts, K candidates of a text, F features of a candidate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from classifiers import Labels
from numpy.typing import NDArray
from scipy.optimize import minimize
from views import Matrix

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Rerank:
    """The `rerank` section of harness.yaml."""

    use: bool
    top_k: int  # candidates of a text
    views: bool  # each view's own score as a feature
    smooth: bool  # the score under a ten times larger ridge
    prototypes: bool  # mean similarity to the label's training texts
    names: bool  # words of the label's name found in the text
    duels: bool  # pairs of candidates judged by their own training texts
    duel_ridge: float
    penalty: float  # on the squared weights


def choose(
    candidates_NK: Labels,
    evidence: Sequence[Matrix],
    answers: Labels,
    *,
    n_labels: int,
    penalty: float,
) -> Matrix:
    """Log-probabilities over all labels, shape (N, C); labels that are no candidates get -inf.

    Args:
        candidates_NK: Labels to choose from, best first; training texts first.
        evidence: Features of the candidates, each of shape (N, K); the first is the score that
            chose them. Those of training texts must be leave-one-out, or the weights are too bold.
        answers: Label of the first `len(answers)` texts. Those whose label is no candidate teach
            nothing and are left out.
        n_labels: C.
        penalty: On half the squared weights of the standardised features.
    """
    features_NKF = np.stack(evidence, axis=2).astype(np.float64)
    features_NKF -= features_NKF.mean(axis=1, keepdims=True)
    features_NKF /= features_NKF.std(axis=(0, 1)) + 1e-9
    n = len(answers)
    hit_NK = candidates_NK[:n] == answers[:, None]
    taught = hit_NK.any(axis=1)
    weights = _fit(features_NKF[:n][taught], hit_NK[taught].argmax(axis=1), penalty)
    log_p_NK = _log_softmax(features_NKF @ weights).astype(np.float32)
    result = np.full((len(candidates_NK), n_labels), -np.inf, np.float32)
    np.put_along_axis(result, candidates_NK, log_p_NK, 1)
    return result


def duels(gram: Matrix, answers: Labels, candidates_NK: Labels, *, ridge: float) -> Matrix:
    """Sum of the margins by which a candidate beats the others, shape (N, K).

    For every pair of labels that meet as candidates of some text, kernel ridge is fitted on the
    training texts of these two labels alone; a training text is judged by the fit without it.
    """
    n_texts, k = candidates_NK.shape
    first, second = np.triu_indices(k, 1)
    text = np.repeat(np.arange(n_texts), len(first))
    a, b = np.tile(first, n_texts), np.tile(second, n_texts)
    low = np.minimum(candidates_NK[text, a], candidates_NK[text, b])
    high = np.maximum(candidates_NK[text, a], candidates_NK[text, b])
    sign = np.where(candidates_NK[text, a] == low, 1, -1)
    pair = low * (candidates_NK.max() + 1) + high
    order = np.argsort(pair, kind="stable")
    margin = np.zeros(len(text), np.float32)
    place = np.full(n_texts, -1)
    for meetings in np.split(order, np.flatnonzero(np.diff(pair[order])) + 1):
        own_low = np.flatnonzero(answers == low[meetings[0]])
        own_high = np.flatnonzero(answers == high[meetings[0]])
        if not len(own_low) or not len(own_high):
            continue
        own = np.concatenate([own_low, own_high])
        targets = np.repeat([1.0, -1.0], [len(own_low), len(own_high)])
        inverse = np.linalg.inv(gram[np.ix_(own, own)] + ridge * np.eye(len(own)))
        dual = inverse @ targets
        leave_one_out = targets - dual / np.diag(inverse)
        met = text[meetings]
        place[own] = np.arange(len(own))
        margin[meetings] = np.where(
            place[met] >= 0, leave_one_out[place[met]], gram[np.ix_(met, own)] @ dual
        )
        place[own] = -1
    wins = np.zeros(candidates_NK.shape, np.float32)
    np.add.at(wins, (text, a), sign * margin)
    np.add.at(wins, (text, b), -sign * margin)
    return wins


def best_labels(scores: Matrix, k: int) -> Labels:
    """The `k` best labels of each text, best first; ties go to the first label."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def name_overlap(texts: Sequence[str], labels: Sequence[str]) -> Matrix:
    """Share of the character pairs of a label's name that occur in the text, rare pairs first."""
    pairs = [sorted(_pairs(label)) for label in labels]
    vocabulary = sorted(set().union(*pairs))
    column = {pair: k for k, pair in enumerate(vocabulary)}
    found = np.zeros((len(texts), len(vocabulary)), np.float32)
    for i, text in enumerate(texts):
        found[i, [column[pair] for pair in _pairs(text) if pair in column]] = 1
    rarity = np.log((1 + len(texts)) / (1 + found.sum(0)))
    weight = np.zeros((len(vocabulary), len(labels)), np.float32)
    for k, own in enumerate(pairs):
        rows = [column[pair] for pair in own]
        weight[rows, k] = rarity[rows] / max(float(rarity[rows].sum()), 1e-6)
    overlap: Matrix = found @ weight
    return overlap


def _pairs(text: str) -> set[str]:
    return {a + b for a, b in pairwise(text) if not {a, b} & set("[]、，。")}


def _fit(features_NKF: Array, chosen: Labels, penalty: float) -> Array:
    rows = np.arange(len(chosen))

    def loss(weights: Array) -> tuple[float, Array]:
        log_p = _log_softmax(features_NKF @ weights)
        slope = np.exp(log_p)
        slope[rows, chosen] -= 1
        value = -log_p[rows, chosen].sum() + penalty / 2 * weights @ weights
        return float(value), np.einsum("nk,nkf->f", slope, features_NKF) + penalty * weights

    start = np.zeros(features_NKF.shape[2])
    start[0] = 1
    fitted: Array = minimize(loss, start, jac=True, method="L-BFGS-B").x
    return fitted


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
