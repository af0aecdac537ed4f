from sia.records import Attempt, Candidate, Evaluation, Outcome, Proposal, Result
from sia.search import Chain, KeepBest, best
from sia.tasks.task import Metric

UP = Metric(name="accuracy")
DOWN = Metric(name="rmse", direction="minimize")


def results(*scores: float | None) -> list[Result]:
    made = []
    for number, score in enumerate(scores):
        identity = f"g{number:03}-c0"
        evaluation = Evaluation(candidate=identity, split="dev", score=score)
        made.append(
            Result(
                candidate=Candidate(
                    id=identity,
                    generation=number,
                    index=0,
                    parent=None,
                    proposal=Proposal(hypothesis=""),
                ),
                attempt=Attempt(candidate=identity, outcome=Outcome.OK),
                evaluation=evaluation if score is not None else None,
            )
        )
    return made


def chosen(result: Result | None) -> str | None:
    return result.candidate.id if result else None


def test_the_best_score_wins_and_a_tie_keeps_the_earlier_one() -> None:
    assert chosen(best(results(0.1, 0.5, 0.5, None, 0.4), UP)) == "g001-c0"
    assert chosen(best(results(0.3, 0.1, 0.1), DOWN)) == "g001-c0"
    assert best(results(None, None), UP) is None


def test_keep_best_goes_on_from_the_incumbent_after_a_loss() -> None:
    assert chosen(KeepBest().parent(results(0.1, 0.5, 0.2), UP)) == "g001-c0"
    assert KeepBest().parent([], UP) is None


def test_chain_goes_on_from_the_latest_scored_candidate() -> None:
    assert chosen(Chain().parent(results(0.5, 0.2, None), UP)) == "g001-c0"
    assert Chain().parent(results(None), UP) is None
