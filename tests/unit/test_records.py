import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from sia import records
from sia.records import Attempt, Candidate, Evaluation, Outcome, Proposal, Result

TEXT = st.text(max_size=40)
SCORE = st.floats(allow_nan=False, allow_infinity=False)

proposals = st.builds(
    Proposal,
    hypothesis=TEXT,
    source=TEXT,
    changes=st.dictionaries(TEXT, st.one_of(TEXT, st.booleans(), st.integers(-99, 99), SCORE)),
)
candidates = st.builds(
    Candidate,
    id=TEXT,
    generation=st.integers(0, 999),
    index=st.integers(0, 9),
    parent=st.none() | TEXT,
    proposal=proposals,
)
evaluations = st.builds(
    Evaluation,
    candidate=TEXT,
    split=st.sampled_from(["dev", "test"]),
    score=st.none() | SCORE,
    metrics=st.dictionaries(TEXT, SCORE, max_size=3),
    items=st.dictionaries(TEXT, SCORE, max_size=3),
)
attempts = st.builds(Attempt, candidate=TEXT, outcome=st.sampled_from(Outcome), reason=TEXT)


@given(
    st.builds(Result, candidate=candidates, attempt=attempts, evaluation=st.none() | evaluations)
)
def test_a_record_survives_json(result: Result) -> None:
    assert records.from_json(records.to_json(result), Result) == result
    assert records.from_data(records.to_data(result), Result) == result


@given(
    st.builds(Result, candidate=candidates, attempt=attempts, evaluation=st.none() | evaluations)
)
def test_a_record_that_was_read_back_is_written_as_the_same_bytes(result: Result) -> None:
    line = records.to_json(result)
    assert records.to_json(records.from_json(line, Result)) == line


def test_fields_that_a_reader_fills_by_default_are_written_too() -> None:
    found = records.from_data({"candidate": "c", "split": "dev", "score": 1.0}, Evaluation)
    assert records.to_data(found)["outcome"] == "ok"


@given(evaluations)
def test_equal_records_are_equal_bytes_whatever_the_order_of_their_dictionaries(
    evaluation: Evaluation,
) -> None:
    turned = dataclasses.replace(
        evaluation, metrics=dict(reversed(list(evaluation.metrics.items())))
    )
    assert records.to_json(turned) == records.to_json(evaluation)


def test_the_verifiers_complaint_is_the_outcome_of_an_attempt_that_went_well() -> None:
    candidate = Candidate(
        id="g000-c0", generation=0, index=0, parent=None, proposal=Proposal(hypothesis="")
    )
    attempt = Attempt(candidate="g000-c0", outcome=Outcome.OK)
    refused = Evaluation(
        candidate="g000-c0",
        split="dev",
        score=None,
        outcome=Outcome.BAD_SUBMISSION,
        problem="no column id",
    )
    result = Result(candidate=candidate, attempt=attempt, evaluation=refused)
    assert result.outcome is Outcome.BAD_SUBMISSION
    assert result.reason == "no column id"
    assert result.score is None
