"""Shortest open tours: from square 0 through all others, ending anywhere.

Legend: n squares, D distances (n, n), symmetric, with the triangle inequality. A tour is a list of
all squares, 0 first; its length is the sum over neighbours, there is no way back.
"""

import time
from dataclasses import dataclass

import numpy as np
from knights import Distances
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components, maximum_flow

Tour = list[int]
Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

EPSILON = 1e-6
UNITS = 10**6  # flows are whole numbers
SLACK = 1e-3  # a cut that is violated by less is left to the integer programme


@dataclass(frozen=True, kw_only=True)
class Tours:
    """The `tour` section of harness.yaml."""

    starts: int  # greedy tours to begin with: the nearest square, then every other first target
    two_opt: bool  # turn a stretch round
    or_opt: bool  # move a stretch of up to three squares elsewhere
    kicks: int  # random double bridges, each repaired by the two above
    exact: bool  # integer programme with cuts: the optimum, proven
    exact_s: float  # seconds a problem may take before the best tour found is all there is


@dataclass(frozen=True)
class Answer:
    """A tour, and the bound that says how far from the optimum it can be."""

    tour: Tour
    length: int
    bound: int  # no tour is shorter; equal to `length`: proven optimal


def solve(D: Distances, *, settings: Tours, rng: np.random.Generator) -> Answer:
    """The best tour that the settings find; deterministic in `D`, the settings and `rng`."""
    if len(D) == 1:
        return Answer([0], 0, 0)
    tours = [greedy(D, first) for first in first_targets(D, settings.starts)]
    tours = [improve(D, tour, settings) for tour in tours]
    best = min(tours, key=lambda tour: length(D, tour))
    for _ in range(settings.kicks):
        other = improve(D, kick(best, rng), settings)
        if length(D, other) <= length(D, best):
            best = other
    if not settings.exact:
        return Answer(best, length(D, best), spanning_bound(D))
    return exact(D, upper=best, limit_s=settings.exact_s)


def length(D: Distances, tour: Tour) -> int:
    """Moves of an open tour."""
    return int(D[tour[:-1], tour[1:]].sum())


def first_targets(D: Distances, count: int) -> list[int]:
    """The targets to go to first, nearest first."""
    return [int(i) + 1 for i in np.argsort(D[0, 1:], kind="stable")[: max(count, 1)]]


def greedy(D: Distances, first: int) -> Tour:
    """From the start to `first`, then always to the nearest square that is left."""
    tour = [0, first]
    left = [i for i in range(1, len(D)) if i != first]
    while left:
        nearest = min(left, key=lambda i: (int(D[tour[-1], i]), i))
        tour.append(nearest)
        left.remove(nearest)
    return tour


def improve(D: Distances, tour: Tour, settings: Tours) -> Tour:
    """Steps that shorten the tour until none is left."""
    better = True
    while better:
        better = False
        if settings.two_opt:
            better |= _two_opt(D, tour)
        if settings.or_opt:
            better |= _or_opt(D, tour)
    return tour


def _two_opt(D: Distances, tour: Tour) -> bool:
    d, n, found = D.tolist(), len(tour), False
    for i in range(1, n - 1):
        for j in range(i + 1, n):
            gain = d[tour[i - 1]][tour[i]] - d[tour[i - 1]][tour[j]]
            if j + 1 < n:
                gain += d[tour[j]][tour[j + 1]] - d[tour[i]][tour[j + 1]]
            if gain > 0:
                tour[i : j + 1] = tour[i : j + 1][::-1]
                found = True
    return found


def _or_opt(D: Distances, tour: Tour) -> bool:
    d, found = D.tolist(), False
    for size in (1, 2, 3):
        for i in range(1, len(tour) - size + 1):
            stretch, rest = tour[i : i + size], tour[:i] + tour[i + size :]
            first, last = stretch[0], stretch[-1]
            gain = d[tour[i - 1]][first]
            if i < len(rest):
                gain += d[last][rest[i]] - d[tour[i - 1]][rest[i]]
            best, place, part = gain, i, stretch
            for j in range(1, len(rest) + 1):
                for a, b in ((first, last), (last, first)):
                    cost = d[rest[j - 1]][a]
                    if j < len(rest):
                        cost += d[b][rest[j]] - d[rest[j - 1]][rest[j]]
                    if cost < best:
                        best, place, part = cost, j, stretch if a == first else stretch[::-1]
            if best < gain:
                tour[:] = rest[:place] + part + rest[place:]
                found = True
    return found


def kick(tour: Tour, rng: np.random.Generator) -> Tour:
    """A double bridge: two neighbouring stretches change places."""
    if len(tour) < 4:
        return list(tour)
    a, b, c = sorted(rng.choice(np.arange(1, len(tour) + 1), 3, replace=False).tolist())
    return tour[:a] + tour[b:c] + tour[a:b] + tour[c:]


def spanning_bound(D: Distances) -> int:
    """Weight of a minimum spanning tree: an open tour is one, so none is shorter."""
    weight, near = 0, D[0].copy()
    left = np.ones(len(D), bool)
    left[0] = False
    while left.any():
        i = int(np.where(left, near, np.iinfo(np.int64).max).argmin())
        weight += int(near[i])
        left[i] = False
        near = np.minimum(near, D[i])
    return weight


def exact(D: Distances, *, upper: Tour, limit_s: float) -> Answer:
    """The shortest tour, proven, by cutting planes (Dantzig, Fulkerson and Johnson, 1954).

    A further square at distance 0 from the start and from every target closes the tour. Solutions
    that fall apart into rings get a cut for each ring, first those of the linear programme and then
    those of the integer programme. Every value is a bound, so the rounds end as soon as it reaches
    the length of a known tour.

    Args:
        D: Distances.
        upper: A tour to fall back on; the shorter, the fewer rounds.
        limit_s: For all rounds together; past it the bound may stay below the length.
    """
    deadline = time.monotonic() + limit_s
    n = len(D)
    best, bound = upper, spanning_bound(D)
    a, b = np.triu_indices(n + 1, 1)  # edges (a, b) with a < b; square n is the further one
    cost = np.where(b == n, 0, D[a, np.minimum(b, n - 1)]).astype(float)
    fixed = ((a == 0) & (b == n)).astype(float)  # the way is closed at the start
    members = np.arange(n + 1)[:, None]
    cuts = [LinearConstraint(csr_array((members == a) | (members == b)).astype(float), 2, 2)]
    for whole in (0, 1):
        while bound < length(D, best) and (left_s := deadline - time.monotonic()) > 0:
            found = milp(
                cost,
                integrality=np.full(len(cost), whole),
                bounds=Bounds(fixed, 1),
                constraints=cuts,
                options={"time_limit": left_s, "mip_rel_gap": 0.0},
            )
            if found.status != 0:  # out of time
                return Answer(best, length(D, best), bound)
            bound = max(bound, int(np.ceil(found.fun - EPSILON)))
            sides = loose_sets(found.x, a, b)
            if not sides:
                if np.abs(found.x - found.x.round()).max() < EPSILON:
                    best = min(best, _walk(found.x, a, b), key=lambda tour: length(D, tour))
                break
            inside = np.array(sides)
            crossing = inside[:, a] != inside[:, b]
            cuts.append(LinearConstraint(csr_array(crossing.astype(float)), 2, np.inf))
    return Answer(best, length(D, best), bound)


def loose_sets(x: Floats, a: Indices, b: Indices) -> list[NDArray[np.bool_]]:
    """Sets of squares that fewer than two (parts of) edges tie to the rest, as masks.

    The rings if the edges fall apart, otherwise the smallest cuts between square 0 and each other.
    """
    n = int(b.max()) + 1
    used = x > EPSILON
    weights = csr_array((x[used], (a[used], b[used])), shape=(n, n))
    count, ring = connected_components(weights, directed=False)
    if count > 1:
        return [ring == k for k in range(count)]
    found = {}
    units = np.rint(x[used] * UNITS).astype(np.int32)
    capacity = csr_array((units, (a[used], b[used])), shape=(n, n))
    capacity = csr_array(capacity + capacity.T)
    for sink in range(1, n):
        flow = maximum_flow(capacity, 0, sink)
        if flow.flow_value < (2 - SLACK) * UNITS:
            rest = csr_array(capacity - flow.flow)
            rest.eliminate_zeros()
            side = np.zeros(n, bool)
            side[breadth_first_order(rest, 0, return_predecessors=False)] = True
            found[side.tobytes()] = side
    return list(found.values())


def _walk(x: Floats, a: Indices, b: Indices) -> Tour:
    """The ring that the edges form, from square 0 away from the further square, which is left."""
    last = int(b.max())
    neighbours: dict[int, list[int]] = {i: [] for i in range(last + 1)}
    for i, j in zip(a[x > 0.5].tolist(), b[x > 0.5].tolist(), strict=True):
        neighbours[i].append(j)
        neighbours[j].append(i)
    tour, before = [0], last
    while (after := next(k for k in neighbours[tour[-1]] if k != before)) != last:
        before = tour[-1]
        tour.append(after)
    return tour
