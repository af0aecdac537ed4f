"""The columns of a table as features: numbers, words and sentences are told apart by looking."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import OneHotEncoder

Row = dict[str, str]
SENTENCE = 3.0  # words in a cell, on average, from which a column holds sentences
GAPS = ("", "na", "nan", "null", "none")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Features of the rows of train, then of the items; a sparse matrix."""

    values: Any
    n_train: int


def read(path: Path) -> list[Row]:
    """Rows by column name."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def build(train: Sequence[Row], items: Sequence[Row], config: Mapping[str, Any]) -> Table:
    """All columns but id and label that both tables have."""
    rows = [*train, *items]
    left_out = set(config["columns"].values())
    names = [name for name in items[0] if name in train[0] and name not in left_out]
    parts = [np.ones((len(rows), 1))]
    for name in names:
        cells = [(row[name] or "").strip() for row in rows]
        filled = [cell for cell in cells if cell.lower() not in GAPS]
        if not filled:
            continue
        if all(is_number(cell) for cell in filled):
            parts.append(numbers(cells, len(train), **config["numbers"]))
        elif np.mean([len(cell.split()) for cell in filled]) >= SENTENCE:
            if config["text"]["use"]:
                parts.append(sentences(cells, config["text"]))
        elif len(set(cells)) > 1:
            encoder = OneHotEncoder(
                handle_unknown="infrequent_if_exist", min_frequency=config["words"]["min_count"]
            )
            parts.append(encoder.fit_transform(np.array(cells, dtype=object).reshape(-1, 1)))
    values = sparse.hstack([sparse.csr_matrix(part) for part in parts], format="csr")
    return Table(values=values, n_train=len(train))


def is_number(cell: str) -> bool:
    """Whether a cell can be read as a finite number."""
    try:
        return bool(np.isfinite(float(cell)))
    except ValueError:
        return False


def numbers(cells: Sequence[str], n_train: int, *, logs: bool, gaps: bool) -> Any:
    """A column of numbers, scaled; its gaps are filled with the median of train."""
    raw = np.array([float(cell) if cell.lower() not in GAPS else np.nan for cell in cells])
    missing = np.isnan(raw)
    known = raw[:n_train][~missing[:n_train]]
    filled = np.where(missing, np.median(known) if len(known) else 0.0, raw)
    columns = [filled]
    if logs:
        columns.append(np.sign(filled) * np.log1p(np.abs(filled)))
    if gaps and missing.any():
        columns.append(missing.astype(float))
    stacked = np.stack(columns, axis=1)
    spread = stacked[:n_train].std(axis=0)
    return (stacked - stacked[:n_train].mean(axis=0)) / np.where(spread > 0, spread, 1.0)


def sentences(cells: Sequence[str], text: Mapping[str, Any]) -> Any:
    """Weighted n-grams of a column of sentences."""
    vectorizer = TfidfVectorizer(
        analyzer="char_wb" if text["letters"] else "word",
        ngram_range=(2, 4) if text["letters"] else (1, 2),
        token_pattern=r"(?u)\w+",
        max_features=text["max_features"],
        sublinear_tf=True,
    )
    try:
        return vectorizer.fit_transform(cells)
    except ValueError:  # no word in any cell
        return np.zeros((len(cells), 1))
