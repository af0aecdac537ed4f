import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sia import seeds
from sia.errors import ConfigError
from sia.records import Attempt, Candidate, Evaluation, Outcome, Proposal, Result
from sia.search import Archive, Chain, KeepBest, Puct, Search, best
from sia.search.tree import lineages, nodes, ranks
from sia.tasks.task import Metric

UP = Metric(name="accuracy")
DOWN = Metric(name="rmse", direction="minimize")


def result(
    number: int, score: float | None, parent: int | None = None, twin: int | None = None
) -> Result:
    identity = f"g{number:03}-c0"
    evaluation = Evaluation(candidate=identity, split="dev", score=score)
    return Result(
        candidate=Candidate(
            id=identity,
            generation=number,
            index=0,
            parent=None if parent is None else f"g{parent:03}-c0",
            proposal=Proposal(hypothesis=""),
            duplicate_of=None if twin is None else f"g{twin:03}-c0",
        ),
        attempt=Attempt(candidate=identity, outcome=Outcome.OK),
        evaluation=evaluation if score is not None else None,
    )


def results(*scores: float | None) -> list[Result]:
    return [result(number, score) for number, score in enumerate(scores)]


def tree(*rows: tuple[float | None, int | None]) -> list[Result]:
    """Score and number of the parent of each candidate."""
    return [result(number, score, parent) for number, (score, parent) in enumerate(rows)]


def parents(
    search: Search, found: Sequence[Result], metric: Metric = UP, generation: int = 1
) -> list[int]:
    rng = seeds.stream(0, f"search/{generation}")
    return [chosen.candidate.generation for chosen in search.parents(found, metric, rng)]


def test_the_best_score_wins_and_a_tie_keeps_the_earlier_one() -> None:
    def winner(metric: Metric, *scores: float | None) -> int | None:
        found = best(results(*scores), metric)
        return found.candidate.generation if found else None

    assert winner(UP, 0.1, 0.5, 0.5, None, 0.4) == 1
    assert winner(DOWN, 0.3, 0.1, 0.1) == 1
    assert winner(UP, None, None) is None


def test_keep_best_goes_on_from_the_incumbent_after_a_loss() -> None:
    assert parents(KeepBest(), results(0.1, 0.5, 0.2)) == [1]
    assert parents(KeepBest(candidates=3), results(0.1, 0.5, 0.2)) == [1, 1, 1]


def test_chain_goes_on_from_the_latest_scored_candidate() -> None:
    assert parents(Chain(), results(0.5, 0.2, None)) == [1]


SEARCHES = [
    pytest.param(make, id=make().__class__.__name__)
    for make in (Chain, KeepBest, lambda: Archive(candidates=3), lambda: Puct(candidates=3))
]


@pytest.mark.parametrize("make", SEARCHES)
def test_without_a_score_there_is_no_parent(make: Callable[[], Search]) -> None:
    assert parents(make(), []) == []
    assert parents(make(), results(None, None)) == []


# The worked example of both trees:     0: 0.2
#                                      /   |   \
#                                 1: 0.6  2: -  3: 0.4
#                                    |
#                                 4: 0.5
EXAMPLE = tree((0.2, None), (0.6, 0), (None, 0), (0.4, 0), (0.5, 1))


def test_the_archive_draws_by_standing_and_children() -> None:
    """By hand: standings 0, 1, 1/3, 2/3; scored children 2, 1, 0, 0."""
    found = Archive().probabilities(nodes(EXAMPLE), UP)
    weights = [
        1 / (1 + math.exp(-10 * (standing - 0.5))) / (1 + children)
        for standing, children in ((0, 2), (1, 1), (1 / 3, 0), (2 / 3, 0))
    ]
    assert weights == pytest.approx([0.002231, 0.496654, 0.158869, 0.841131], abs=1e-6)
    assert list(found) == pytest.approx([weight / sum(weights) for weight in weights])


def test_equal_candidates_of_an_archive_share_a_standing() -> None:
    found = Archive().probabilities(nodes(tree((0.5, None), (0.5, 0), (0.5, 0))), UP)
    assert list(found) == pytest.approx([1 / 7, 3 / 7, 3 / 7])  # 1/3 to 1 to 1: children alone


def test_an_archive_without_steepness_looks_at_novelty_alone() -> None:
    found = Archive(steepness=0).probabilities(nodes(EXAMPLE), UP)
    total = 1 / 3 + 1 / 2 + 1 + 1
    assert list(found) == pytest.approx([1 / 3 / total, 1 / 2 / total, 1 / total, 1 / total])


def test_an_archive_that_is_as_steep_as_can_be_still_has_probabilities() -> None:
    found = Archive(steepness=1e6).probabilities(nodes(EXAMPLE), UP)
    assert list(found) == pytest.approx([0, 1 / 3, 0, 2 / 3])
    assert parents(Archive(steepness=1e6, midpoint=2.0), EXAMPLE)  # all weights vanish


def test_an_archive_draws_as_often_as_its_probabilities_say() -> None:
    search = Archive(candidates=20_000)
    drawn = parents(search, EXAMPLE)
    found = search.probabilities(nodes(EXAMPLE), UP)
    for number, probability in zip((0, 1, 3, 4), found, strict=True):
        assert drawn.count(number) / len(drawn) == pytest.approx(probability, abs=0.015)


def test_puct_values_the_best_child_the_rank_and_few_visits() -> None:
    """By hand: Q from children 0.6 and 0.5, else the own score; visits 4, 1, 0, 0 of T = 4."""
    found = Puct().values(nodes(EXAMPLE), UP, {"g000-c0": 4, "g001-c0": 1}, 4)
    assert found == pytest.approx(
        {
            "g000-c0": 1.0 + 0.1 * math.sqrt(5) / 5,
            "g001-c0": 0.75 + 0.4 * math.sqrt(5) / 2,
            "g003-c0": 0.5 + 0.2 * math.sqrt(5) / 1,
            "g004-c0": 0.75 + 0.3 * math.sqrt(5) / 1,
        }
    )
    assert parents(Puct(candidates=1), EXAMPLE) == [4]


def test_puct_counts_failures_and_duplicates_as_visits_of_all_ancestors() -> None:
    """0 - 1 - 2, and what was made of 2 came to nothing: each of the three was visited."""
    line = tree((0.5, None), (0.6, 0), (0.7, 1), (None, 2), (None, 2))
    line.append(result(5, 0.7, parent=2, twin=2))
    assert lineages(line)["g005-c0"] == ("g002-c0", "g001-c0", "g000-c0")
    assert parents(Puct(candidates=1), tree((0.5, None), (0.6, 0), (0.7, 1))) == [2]
    # Q 0.5, 1, 1; prior 1/6, 2/6, 3/6; visits 5, 4, 3 of T = 5
    values = Puct().values(nodes(line), UP, {"g000-c0": 5, "g001-c0": 4, "g002-c0": 3}, 5)
    assert values["g002-c0"] == pytest.approx(1 + 0.5 * math.sqrt(6) / 4)
    greedy = Puct(candidates=1, exploration=0)
    assert parents(greedy, line) == [1]  # its child has 0.7 as well, and it came first
    assert parents(Puct(candidates=1), line) == [2]


def test_puct_picks_from_different_branches_until_all_are_blocked() -> None:
    """4 is on top and blocks 1 and 0; 3 is free; then the blocks are lifted."""
    # With the two picks, T = 6: 0.75 + 0.4 * sqrt(7) / 3 = 1.10 and 0.75 + 0.3 * sqrt(7) / 2 = 1.15
    assert parents(Puct(candidates=3), EXAMPLE) == [4, 3, 4]
    assert parents(Puct(candidates=2), tree((0.5, None), (0.6, 0), (0.5, 0))) == [1, 2]


def test_one_candidate_is_the_parent_of_a_whole_generation() -> None:
    assert parents(Puct(candidates=3), results(0.4)) == [0, 0, 0]
    assert parents(Archive(candidates=3), results(0.4)) == [0, 0, 0]


def test_puct_explores_where_all_scores_are_equal() -> None:
    assert parents(Puct(candidates=2), tree((0.5, None), (0.5, 0), (0.5, 0))) == [1, 2]


def test_equals_share_the_mean_of_their_ranks() -> None:
    assert ranks(nodes(results(0.2, 0.9, 0.2, None, 0.5)), UP) == [2.5, 0, 2.5, 1]
    assert ranks(nodes(results(0.2, 0.9, 0.2, None, 0.5)), DOWN) == [0.5, 3, 0.5, 2]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Archive(candidates=0),
        lambda: Archive(steepness=-1),
        lambda: Puct(candidates=0),
        lambda: Puct(exploration=-1),
        lambda: KeepBest(candidates=0),
    ],
)
def test_a_search_without_sense_is_refused(make: Callable[[], Search]) -> None:
    with pytest.raises(ConfigError, match=r"search\.\w+=-?\d must be at least|, and"):
        make()


@st.composite
def runs(draw: st.DrawFn) -> list[Result]:
    """Candidates with some failures and duplicates, each made from an earlier node."""
    found = [result(0, 0.0)]
    for number in range(1, draw(st.integers(1, 12))):
        parent = draw(st.sampled_from(nodes(found))).candidate.generation
        kind = draw(st.sampled_from(["scored", "scored", "failed", "duplicate"]))
        if kind == "failed":
            found.append(result(number, None, parent))
        elif kind == "duplicate":
            twin = draw(st.sampled_from(nodes(found)))
            found.append(result(number, twin.score, parent, twin.candidate.generation))
        else:
            found.append(result(number, draw(st.integers(-8, 8)) / 4, parent))
    return found


TREES = [Archive(candidates=3), Puct(candidates=3)]


@pytest.mark.parametrize("search", TREES, ids=["archive", "puct"])
@given(found=runs())
def test_a_parent_is_a_node_and_a_function_of_results_and_stream(
    search: Search, found: list[Result]
) -> None:
    for metric in (UP, DOWN):
        chosen = parents(search, found, metric)
        assert len(chosen) == 3
        assert set(chosen) <= {node.candidate.generation for node in nodes(found)}
        assert chosen == parents(search, found, metric)


def rescored(found: Sequence[Result], change: Callable[[float], float]) -> list[Result]:
    return [
        result(
            one.candidate.generation,
            None if one.score is None else change(one.score),
            None if one.candidate.parent is None else int(one.candidate.parent[1:4]),
            None if one.candidate.duplicate_of is None else int(one.candidate.duplicate_of[1:4]),
        )
        for one in found
    ]


@given(found=runs())
def test_an_archive_looks_at_the_order_of_scores_alone(found: list[Result]) -> None:
    search = Archive(candidates=3)
    expected = parents(search, found)
    assert parents(search, rescored(found, lambda score: score**3 + 1e6)) == expected
    assert parents(search, rescored(found, lambda score: -math.exp(score)), DOWN) == expected


@given(found=runs())
def test_puct_looks_at_scores_up_to_their_unit_and_direction(found: list[Result]) -> None:
    search = Puct(candidates=3)
    expected = parents(search, found)
    assert parents(search, rescored(found, lambda score: 1024 * score + 512)) == expected
    assert parents(search, rescored(found, lambda score: 16 - 8 * score), DOWN) == expected
