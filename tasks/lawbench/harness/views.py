"""A view says how alike two texts are, seen in one way: n-grams, tf-idf, a Gram matrix.

Legend: N texts (train first, then items), V n-grams of a view.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.preprocessing import normalize
from texts import CLAUSE_ENDS, SENTENCE_ENDS, Mask, Part, mask_text, take_part, word_pairs, words

Matrix = NDArray[np.float32]

# n-grams of characters or words, or pairs of words that share a clause or a sentence
Unit = Literal["char", "word", "clause", "sentence"]

# N-grams in more texts than this share are multiplied as dense columns: BLAS is faster there.
DENSE_SHARE = 0.02


@dataclass(frozen=True, kw_only=True)
class View:
    """One entry of `views` in harness.yaml."""

    use: bool
    unit: Unit
    low: int = 1  # shortest n-gram
    high: int = 1  # longest n-gram
    part: Part = "whole"
    chars: int = 0  # length of a head or tail
    weight: float = 1.0  # in the sum of Gram matrices; 0 leaves the view to the re-ranker


@dataclass(frozen=True, kw_only=True)
class Tfidf:
    """What all views share."""

    binary: bool  # an n-gram counts once however often it occurs; otherwise 1 + log(count)
    idf_power: float  # 0 ignores document frequencies, 1 is the usual weight
    min_df: int


def gram_of_view(texts: Sequence[str], *, view: View, tfidf: Tfidf, mask: Mask) -> Matrix:
    """How alike all texts are in one view: shape (N, N), 1 on the diagonal."""
    parts = [take_part(mask_text(text, mask), view.part, view.chars) for text in texts]
    return gram(tfidf_rows(parts, view=view, tfidf=tfidf))


def tfidf_rows(texts: Sequence[str], *, view: View, tfidf: Tfidf) -> sp.csr_matrix:
    """Rows of length one, shape (N, V), float32.

    Document frequencies are counted over all texts, items included: no label is used.
    """
    counter = CountVectorizer(analyzer=_analyzer(view), min_df=tfidf.min_df, dtype=np.float32)
    counts_NV = counter.fit_transform(texts)
    df_V = np.bincount(counts_NV.indices, minlength=counts_NV.shape[1])
    idf_V = (np.log((1 + len(texts)) / (1 + df_V)) + 1) ** tfidf.idf_power
    counts_NV.data = np.ones_like(counts_NV.data) if tfidf.binary else 1 + np.log(counts_NV.data)
    return normalize(counts_NV @ sp.diags(idf_V.astype(np.float32)))


def gram(rows_NV: sp.csr_matrix) -> Matrix:
    """All inner products, shape (N, N); seconds for 6,000 texts of 300 characters."""
    columns = rows_NV.tocsc()
    frequent_V = np.diff(columns.indptr) > DENSE_SHARE * rows_NV.shape[0]
    dense = columns[:, frequent_V].toarray()
    rest = columns[:, ~frequent_V].tocsr()
    return dense @ dense.T + (rest @ rest.T).toarray()


def _analyzer(view: View) -> Callable[[str], list[str]]:
    """From a text to the features that are counted."""
    if view.unit == "clause":
        return partial(word_pairs, ends=CLAUSE_ENDS)
    if view.unit == "sentence":
        return partial(word_pairs, ends=SENTENCE_ENDS)
    if view.unit == "word":
        return lambda text: [" ".join(units) for units in _ngrams(words(text), view.low, view.high)]
    return lambda text: [str(units) for units in _ngrams(text, view.low, view.high)]


def _ngrams(units: Sequence[str], low: int, high: int) -> Iterator[Sequence[str]]:
    for size in range(low, high + 1):
        for i in range(len(units) - size + 1):
            yield units[i : i + size]
