"""Searches that keep every scored candidate: each may become a parent again.

Both see the candidates of a run as a tree. A *node* is a candidate that was scored; one that failed
is none, nor is a duplicate, which is another name of a node that is there already. Scores are
compared with one another alone, so that any metric will do: bounded or not, of either direction.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from sia.errors import ConfigError
from sia.records import Result
from sia.tasks.task import Metric


class Archive:
    """Samples parents by how good and how little explored they are, with replacement.

    The rule of the Darwin Gödel Machine (arXiv 2505.22954, appendix on parent selection):

        p(i) ∝ 1 / (1 + exp(-steepness * (a(i) - midpoint))) * 1 / (1 + n(i))

    a(i) is the standing of node i, n(i) how many nodes were made from it. There a(i) is an accuracy
    and a perfect agent is left out; here a(i) is the share of the other nodes that i beats, a tie
    counted half, because a metric may have no bounds: the best has 1, the worst 0, an only one 0.5.
    """

    def __init__(
        self, *, candidates: int = 2, steepness: float = 10.0, midpoint: float = 0.5
    ) -> None:
        """Sets the rule.

        Args:
            candidates: Of every generation after the first; each has a parent of its own.
            steepness: How much standing counts: 0 not at all, 10 is the paper's.
            midpoint: The standing at which the first factor is one half.

        Raises:
            ConfigError: No candidate is wanted, or a better one would be less likely.
        """
        if candidates < 1 or steepness < 0:
            raise ConfigError(
                f"search.candidates={candidates} must be at least 1, and "
                f"search.steepness={steepness:g} at least 0."
            )
        self.candidates = candidates
        self._steepness = steepness
        self._midpoint = midpoint

    def parents(
        self, results: Sequence[Result], metric: Metric, rng: np.random.Generator
    ) -> Sequence[Result]:
        """Nodes drawn by the rule."""
        tree = nodes(results)
        if not tree:
            return []
        drawn = rng.choice(len(tree), size=self.candidates, p=self.probabilities(tree, metric))
        return [tree[i] for i in drawn]

    def probabilities(self, tree: Sequence[Result], metric: Metric) -> npt.NDArray[np.float64]:
        """Of each node to be drawn, shape (n,); sums to 1.

        Args:
            tree: From `nodes`, not empty.
            metric: What the scores mean.
        """
        made = Counter(node.candidate.parent for node in tree)
        others = max(1, len(tree) - 1)
        standing = np.array(
            [0.5 if len(tree) == 1 else 1 - r / others for r in ranks(tree, metric)]
        )
        children = np.array([made[node.candidate.id] for node in tree])
        # Through tanh, which does not overflow: the sigmoid of x is (1 + tanh(x / 2)) / 2.
        weights = (1 + np.tanh(self._steepness * (standing - self._midpoint) / 2)) / (1 + children)
        total = weights.sum()
        return weights / total if total > 0 else np.full(len(tree), 1 / len(tree))


class Puct:
    """Goes on from the nodes with the highest upper confidence bound; draws no random number.

    The reuse of states in TTT-Discover (arXiv 2601.16175, section on reuse and its appendix):

        value(i) = Q(i) + exploration * P(i) * sqrt(1 + T) / (1 + n(i))

    Q(i)  the best score among the children of i, or its own where none was scored: what counts is
          the best outcome from there, not the mean
    P(i)  the prior, (N - rank) / sum over all N nodes, the best with rank 0; ties share a rank
    n(i)  visits: candidates made from i or from anything below it, whatever became of them
    T     visits of the whole tree

    The paper multiplies the second term with the range of the scores; here Q is divided by it: the
    same choice, and defined where all scores are equal (Q is 0 then). Within a generation a pick
    blocks its ancestors and descendants, as there, and counts as a visit at once. There, many first
    solutions make many trees; here one tree is soon blocked as a whole, and then all blocks are
    lifted. Nodes are never dropped: a run has far fewer than the paper's thousand.
    """

    def __init__(self, *, candidates: int = 2, exploration: float = 1.0) -> None:
        """Sets the rule.

        Args:
            candidates: Of every generation after the first; each has a parent of its own.
            exploration: Weight of the prior and of few visits against the best score; 1 is the
                paper's, 0 is greedy.

        Raises:
            ConfigError: No candidate is wanted, or visits would attract.
        """
        if candidates < 1 or exploration < 0:
            raise ConfigError(
                f"search.candidates={candidates} must be at least 1, and "
                f"search.exploration={exploration:g} at least 0."
            )
        self.candidates = candidates
        self._exploration = exploration

    def parents(
        self, results: Sequence[Result], metric: Metric, rng: np.random.Generator
    ) -> Sequence[Result]:
        """The nodes with the highest values, picked one after the other; of equals the earliest."""
        tree = nodes(results)
        if not tree:
            return []
        above = lineages(results)
        visits: Counter[str] = Counter()
        for result in results:
            visits.update(above[result.candidate.id])
        total = sum(result.candidate.parent is not None for result in results)
        blocked: set[str] = set()
        picked: list[Result] = []
        while len(picked) < self.candidates:
            values = self.values(tree, metric, visits, total)
            free = [node for node in tree if node.candidate.id not in blocked]
            if not free:
                blocked.clear()
                continue
            top = max(free, key=lambda node: values[node.candidate.id])
            picked.append(top)
            line = {top.candidate.id, *above[top.candidate.id]}
            blocked |= line | {other for other in above if top.candidate.id in above[other]}
            visits.update(line)
            total += 1
        return picked

    def values(
        self, tree: Sequence[Result], metric: Metric, visits: Mapping[str, int], total: int
    ) -> dict[str, float]:
        """The upper confidence bound of each node, by id.

        Args:
            tree: From `nodes`, not empty.
            metric: What the scores mean.
            visits: Of each node, by id; 0 where it is missing.
            total: Of the whole tree.
        """
        up = 1.0 if metric.direction == "maximize" else -1.0
        scores = {node.candidate.id: up * _score(node) for node in tree}
        low, high = min(scores.values()), max(scores.values())
        reached: dict[str, float] = {}
        for node in tree:
            if (parent := node.candidate.parent) is not None:
                score = scores[node.candidate.id]
                reached[parent] = max(reached.get(parent, score), score)
        found = {}
        for node, rank in zip(tree, ranks(tree, metric), strict=True):
            identity = node.candidate.id
            best = (reached.get(identity, scores[identity]) - low) / ((high - low) or 1.0)
            prior = (len(tree) - rank) / (len(tree) * (len(tree) + 1) / 2)
            bonus = prior * math.sqrt(1 + total) / (1 + visits.get(identity, 0))
            found[identity] = best + self._exploration * bonus
        return found


def nodes(results: Sequence[Result]) -> list[Result]:
    """The results that may become parents: scored, and no duplicates; oldest first."""
    return [
        result
        for result in results
        if result.score is not None and result.candidate.duplicate_of is None
    ]


def ranks(tree: Sequence[Result], metric: Metric) -> list[float]:
    """How many nodes are better than each one; equals share the mean of their ranks."""
    scores = [_score(node) for node in tree]
    return [
        sum(metric.better(other, score) for other in scores) + (scores.count(score) - 1) / 2
        for score in scores
    ]


def lineages(results: Sequence[Result]) -> dict[str, tuple[str, ...]]:
    """The ancestors of every candidate by its id, the nearest first."""
    found: dict[str, tuple[str, ...]] = {}
    for result in results:
        parent = result.candidate.parent
        found[result.candidate.id] = () if parent is None else (parent, *found[parent])
    return found


def _score(node: Result) -> float:
    assert node.score is not None  # else it is no node
    return node.score
