"""Probabilities of being transported, from a table of numbers with gaps.

Legend: N passengers (n of train first), P columns.
"""

from dataclasses import dataclass

import numpy as np
from features import Table
from numpy.typing import NDArray
from passengers import Floats
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

Answers = NDArray[np.bool_]

KINDS = ("logistic", "hist", "forest")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The `model` section of harness.yaml."""

    kind: str
    penalty: float
    pairs: bool
    bags: int


@dataclass(frozen=True, kw_only=True)
class Hist:
    """The `hist` section: histogram gradient boosting."""

    learning_rate: float
    rounds: int
    leaves: int
    min_leaf: int
    l2: float
    columns: float  # share of the columns that a split may choose from


@dataclass(frozen=True, kw_only=True)
class Forest:
    """The `forest` section."""

    trees: int
    min_leaf: int
    columns: float


def probabilities(
    table: Table, answers: Answers, *, model: Model, hist: Hist, forest: Forest
) -> Floats:
    """P(transported) of every row, shape (N,); fitted on the first n.

    Raises:
        ValueError: The kind of model is unknown.
    """
    if model.kind not in (*KINDS, "blend"):
        raise ValueError(f"harness.yaml: model.kind={model.kind!r} is none of {KINDS}, blend")
    kinds = KINDS if model.kind == "blend" else (model.kind,)
    fitted = {
        "logistic": lambda: _logistic(table, answers, model),
        "hist": lambda: _hist(table, answers, hist, model.bags),
        "forest": lambda: _forest(table, answers, forest, model.bags),
    }
    # Where other work shares the cores, threads that wait for each other take ten times as long.
    with threadpool_limits(1):
        return np.asarray(np.mean([fitted[kind]() for kind in kinds], axis=0))


def _logistic(table: Table, answers: Answers, model: Model) -> Floats:
    values = StandardScaler().fit_transform(one_hot(table, pairs=model.pairs))
    fit = LogisticRegression(C=1 / model.penalty, max_iter=2000)
    fit.fit(values[: len(answers)], answers)
    return np.asarray(fit.predict_proba(values)[:, 1])


def _hist(table: Table, answers: Answers, settings: Hist, bags: int) -> Floats:
    total = np.zeros(len(table.values))
    for seed in range(bags):
        fit = HistGradientBoostingClassifier(
            learning_rate=settings.learning_rate,
            max_iter=settings.rounds,
            max_leaf_nodes=settings.leaves,
            min_samples_leaf=settings.min_leaf,
            l2_regularization=settings.l2,
            max_features=settings.columns,
            categorical_features=table.words,
            early_stopping=False,
            random_state=seed,
        )
        # With all columns and no subsampling every seed is the same model; the rows differ then.
        rows = _bag(len(answers), seed) if bags > 1 else np.arange(len(answers))
        fit.fit(table.values[rows], answers[rows])
        total += fit.predict_proba(table.values)[:, 1]
    return total / bags


def _forest(table: Table, answers: Answers, settings: Forest, bags: int) -> Floats:
    fit = RandomForestClassifier(
        n_estimators=settings.trees,
        min_samples_leaf=settings.min_leaf,
        max_features=settings.columns,
        random_state=0,
    )
    values = filled(table)
    fit.fit(values[: len(answers)], answers)
    return np.asarray(fit.predict_proba(values)[:, 1])


def _bag(n: int, seed: int) -> NDArray[np.int64]:
    """Nine tenths of the rows, in their order."""
    return np.sort(np.random.default_rng(seed).permutation(n)[: max(1, n * 9 // 10)])


def filled(table: Table) -> Floats:
    """Gaps of quantities filled with the median, gaps of words with a code of their own."""
    middle = np.nan_to_num(np.nanmedian(table.values, axis=0))
    return np.where(np.isnan(table.values), np.where(table.words, -1.0, middle), table.values)


def one_hot(table: Table, *, pairs: bool) -> Floats:
    """Quantities as they are and a column for each code, shape (N, more than P)."""
    values = filled(table)
    columns = [values[:, k] for k in np.flatnonzero(~table.words)]
    coded: dict[str, list[Floats]] = {}
    for k in np.flatnonzero(table.words):
        own = [(values[:, k] == code).astype(float) for code in np.unique(values[:, k])]
        coded[table.names[k]] = own
        columns += own
    if pairs:
        by_name = dict(zip(table.names, values.T, strict=True))
        others = [column for name in ("deck", "side") for column in coded.get(name, [])]
        others += [
            by_name["asleep"],
            by_name["age"],
            *(by_name[n] for n in by_name if n.startswith("lux")),
        ]
        columns += [planet * other for planet in coded["planet"] for other in others]
    return np.stack(columns, axis=1)
