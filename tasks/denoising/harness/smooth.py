"""Pieces that a denoiser is made of. C cells, G genes; every matrix is (C, G) unless said."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.neighbors import NearestNeighbors

Matrix = NDArray[np.float64]

THRESHOLD = 1e-4  # weaker edges of the graph are dropped


@dataclass(frozen=True, kw_only=True)
class Graph:
    """MAGIC: values diffuse along a graph of similar cells (van Dijk et al., 2018)."""

    use: bool
    weight: float  # in the blend with the other smoothers
    knn: int  # the neighbour whose distance is the bandwidth
    max_factor: int  # at most so many times `knn` neighbours
    decay: float  # of the kernel exp(-(distance / bandwidth)^decay)
    steps: int  # of the diffusion
    components: int  # distances are taken between so many principal components


@dataclass(frozen=True, kw_only=True)
class Svd:
    """The nearest matrix of low rank."""

    use: bool
    weight: float
    rank: int


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Non-negative factors with a Poisson likelihood, by multiplicative updates."""

    use: bool
    weight: float
    rank: int
    rounds: int


def principal(values: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    """Scores (C, r) and directions (G, r) of the uncentred matrix, largest first.

    Through the (C, C) Gram matrix: exact, deterministic, and cells are far fewer than genes.
    """
    eigenvalues, vectors = np.linalg.eigh(values @ values.T)
    order = np.argsort(-eigenvalues)[:rank]
    order = order[eigenvalues[order] > eigenvalues[-1] * 1e-12]
    size = np.sqrt(eigenvalues[order])
    scores = vectors[:, order] * size
    return scores, values.T @ vectors[:, order] / size


def low_rank(values: Matrix, settings: Svd) -> Matrix:
    """`values` cut to a low rank, without negative entries."""
    scores, directions = principal(values, settings.rank)
    return np.maximum(scores @ directions.T, 0.0)


def diffusion(values: Matrix, settings: Graph) -> Any:
    """The row-stochastic transition matrix, shape (C, C), sparse."""
    n_cells = len(values)
    scores, _ = principal(values, min(settings.components, n_cells))
    knn = min(settings.knn, n_cells - 1)
    reach = min(settings.max_factor * knn + 1, n_cells)  # a cell is its own first neighbour
    distance, neighbour = NearestNeighbors(n_neighbors=reach).fit(scores).kneighbors(scores)
    bandwidth = np.maximum(distance[:, knn], 1e-12)[:, None]
    kernel = np.exp(-((distance / bandwidth) ** settings.decay))
    kernel[kernel < THRESHOLD] = 0.0
    start = np.arange(0, kernel.size + 1, reach)
    graph = sparse.csr_matrix((kernel.ravel(), neighbour.ravel(), start), (n_cells, n_cells))
    graph = (graph + graph.T) / 2
    return sparse.diags(1 / np.asarray(graph.sum(1)).ravel()) @ graph


def diffuse(values: Matrix, settings: Graph) -> Matrix:
    """MAGIC's exact solver: `values` after some steps of diffusion."""
    step = diffusion(values, settings)
    for _ in range(settings.steps):
        values = step @ values
    return values


def poisson_factors(counts: Matrix, settings: Factors) -> Matrix:
    """Expected counts under a Poisson model with non-negative factors.

    Starts from the leading directions of the square roots, split by sign, so that nothing is drawn.
    """
    scores, directions = principal(np.sqrt(counts), settings.rank)
    n_genes = counts.shape[1]
    cells = np.abs(scores) + 0.01 * np.abs(scores).mean()  # (C, r)
    genes = np.maximum(directions, 0.0).T + 0.1 / np.sqrt(n_genes)  # (r, G)
    genes /= genes.sum(1, keepdims=True)
    cells *= counts.sum(1, keepdims=True) / cells.sum(1, keepdims=True)
    genes = np.ascontiguousarray(genes.T)  # (G, r)
    # Entries without a molecule have the ratio 0: the rates are needed at the others alone.
    ratio = sparse.csr_matrix(counts)
    found, row, column = ratio.data.copy(), *ratio.nonzero()
    for _ in range(settings.rounds):
        ratio.data = found / _rates(cells, genes, row, column)
        cells *= ratio @ genes
        ratio.data = found / _rates(cells, genes, row, column)
        genes *= ratio.T @ cells
        genes /= np.maximum(genes.sum(0), 1e-12)
    return cells @ genes.T


def _rates(cells: Matrix, genes: Matrix, row: Any, column: Any) -> Matrix:
    """Entries of `cells @ genes.T` at the given positions."""
    rates: Matrix = np.einsum("nr,nr->n", cells[row], genes[column])
    return np.maximum(rates, 1e-12)
