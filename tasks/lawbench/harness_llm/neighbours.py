"""The training cases that are most like an item, and the labels that they suggest."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer


def nearest(
    train: Sequence[str], items: Sequence[str], *, high: int, chars: int, count: int
) -> list[list[tuple[int, float]]]:
    """For each item the positions of its nearest training texts with their cosine, best first.

    Args:
        train: Texts.
        items: Texts.
        high: Longest n-gram of characters.
        chars: How much of each text counts.
        count: Neighbours of each item.
    """
    vectorizer = TfidfVectorizer(
        analyzer="char", ngram_range=(1, high), min_df=2, sublinear_tf=True, dtype=np.float32
    )
    rows = vectorizer.fit_transform([text[:chars] for text in (*train, *items)])
    cosine = (rows[len(train) :] @ rows[: len(train)].T).toarray()
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :count]
    return [
        [(int(k), float(own[k])) for k in best] for own, best in zip(cosine, order, strict=True)
    ]


def suggested(near: Sequence[tuple[int, float]], labels: Sequence[str], count: int) -> list[str]:
    """The labels that the neighbours speak for, each as loud as it is near, best first."""
    weight: dict[str, float] = defaultdict(float)
    for k, cosine in near:
        weight[labels[k]] += cosine**2
    return sorted(weight, key=lambda label: (-weight[label], label))[:count]


def chosen_shots(
    near: Sequence[tuple[int, float]], labels: Sequence[str], *, count: int, per_label: int
) -> list[int]:
    """The nearest cases, few of one label, the nearest last: next to the question."""
    taken: Counter[str] = Counter()
    shots: list[int] = []
    for k, _ in near:
        if len(shots) < count and taken[labels[k]] < per_label:
            taken[labels[k]] += 1
            shots.append(k)
    return shots[::-1]
