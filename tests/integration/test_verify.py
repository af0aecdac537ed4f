"""The verifier in its own process: warm, isolated from submissions, with a deadline."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sia.records import Outcome
from sia.tasks import Task, load_task
from sia.tasks.data import task_module
from sia.verify import TaskVerifier


@pytest.fixture
def submission(toy: Task, tmp_path: Path) -> Path:
    folder = tmp_path / "submission"
    folder.mkdir()
    task_module(toy, "controls").oracle(toy.labels_dir("dev"), folder)
    return folder


@pytest.fixture
def verifier(toy: Task) -> Iterator[TaskVerifier]:
    made = TaskVerifier(task=toy, split="dev")
    yield made
    made.close()


def with_verify(toy: Task, body: str) -> TaskVerifier:
    (toy.root / "verify.py").write_text(
        f"import os, time\n\ndef verify(submission_dir, labels_dir):\n    {body}\n"
    )
    return TaskVerifier(task=load_task(toy.root), split="dev", deadline_s=0.5)


def test_the_same_submission_gets_the_same_evaluation(
    verifier: TaskVerifier, submission: Path
) -> None:
    first = verifier.verify("g000-c0", submission)
    assert first.score == 1.0
    assert first.n_items == first.n_answered == 200
    assert set(first.items.values()) == {1.0}
    assert verifier.verify("g000-c0", submission) == first


@pytest.mark.parametrize(
    ("change", "score"),
    [
        (lambda rows: rows[: 1 + len(rows) // 2], 0.5),
        (lambda rows: rows + rows[1:51], 0.75),
        (lambda rows: [rows[0], *(row.split(",")[0] + ",neither" for row in rows[1:])], 0.0),
        (lambda rows: rows[:1], 0.0),
        (lambda rows: [*rows, "unknown,large"], 1.0),
    ],
    ids=["half", "duplicates", "unknown labels", "no rows", "unknown ids"],
)
def test_the_denominator_is_fixed(
    verifier: TaskVerifier, submission: Path, change: object, score: float
) -> None:
    path = submission / "submission.csv"
    rows = path.read_text().splitlines()
    path.write_text("\n".join(change(rows)) + "\n")  # type: ignore[operator]
    found = verifier.verify("g000-c0", submission)
    assert found.score == score
    assert found.n_items == 200


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a,b\n1,2\n"])
def test_an_unreadable_submission_is_refused_with_the_reason(
    verifier: TaskVerifier, submission: Path, content: bytes
) -> None:
    (submission / "submission.csv").write_bytes(content)
    found = verifier.verify("g000-c0", submission)
    assert found.outcome is Outcome.BAD_SUBMISSION
    assert "submission.csv" in found.problem
    assert found.score is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("time.sleep(60)", "longer than 0.5 s"),
        ("os._exit(3)", "the verifier died"),
        ("os.kill(os.getpid(), 9)", "the verifier died"),
        ("1 / 0", "ZeroDivisionError"),
        ("return {'score': float('nan'), 'n_items': 1}", "gave the score nan"),
        ("return {'score': 'high'}", "breaks its contract"),
        ("return {'n_items': 3}", "breaks its contract"),
    ],
)
def test_a_verifier_that_breaks_is_an_outcome_and_the_next_request_is_answered(
    toy: Task, submission: Path, body: str, message: str
) -> None:
    verifier = with_verify(
        toy, f"if (submission_dir / 'bad').exists(): {body}\n    return {{'score': 0.5}}"
    )
    (submission / "bad").touch()
    found = verifier.verify("g000-c0", submission)
    assert found.outcome is Outcome.VERIFIER_FAILED
    assert message in found.problem
    (submission / "bad").unlink()
    assert verifier.verify("g001-c0", submission).score == 0.5
    verifier.close()


def test_prints_of_a_verifier_do_not_disturb_its_answers(toy: Task, submission: Path) -> None:
    verifier = with_verify(toy, "print('{}' * 10000); return {'score': 0.25}")
    assert verifier.verify("g000-c0", submission).score == 0.25
    verifier.close()


def test_nothing_is_carried_from_one_submission_to_the_next(toy: Task, submission: Path) -> None:
    verifier = with_verify(
        toy, "global n; n = globals().get('n', 0) + 1; return {'score': 1.0 / n}"
    )
    assert [verifier.verify("c", submission).score for _ in range(3)] == [1.0, 1.0, 1.0]
    verifier.close()


def test_a_verifier_that_was_killed_is_started_anew(toy: Task, submission: Path) -> None:
    verifier = TaskVerifier(task=toy, split="dev")
    assert verifier.verify("c", submission).score == 1.0
    os.kill(verifier.pid, signal.SIGKILL)
    assert verifier.verify("c", submission).score == 1.0
    pid = verifier.pid
    verifier.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_no_process_of_a_hanging_verifier_is_left(
    toy: Task, submission: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "alive"
    verifier = with_verify(
        toy, f"os.fork() or (time.sleep(1.5), open({str(mark)!r}, 'w')); time.sleep(60)"
    )
    assert "longer than" in verifier.verify("c", submission).problem
    verifier.close()
    time.sleep(1.6)
    assert not mark.exists()


def test_an_import_error_of_a_verifier_is_an_outcome(toy: Task, submission: Path) -> None:
    (toy.root / "verify.py").write_text("import absent_package\n")
    verifier = TaskVerifier(task=toy, split="dev")
    found = verifier.verify("c", submission)
    assert found.outcome is Outcome.VERIFIER_FAILED
    assert "died twice" in found.problem
    verifier.close()


def test_failures_are_a_sample_of_the_dev_split_without_what_is_right(
    verifier: TaskVerifier, toy: Task, submission: Path
) -> None:
    path = submission / "submission.csv"
    rows = path.read_text().splitlines()
    path.write_text("\n".join([rows[0], *(row.split(",")[0] + ",large" for row in rows[1:])]))
    found = verifier.verify("g000-c0", submission)
    assert 0 < len(found.failures) <= 20
    assert {failure.answer for failure in found.failures} == {"large"}
    assert {found.items[failure.item] for failure in found.failures} == {0.0}
    labels = (toy.labels_dir("test") / "labels.csv").read_text().splitlines()[1:]
    sealed = {line.split(",")[0] for line in labels}
    assert not sealed & {failure.item for failure in found.failures}


def test_no_failure_of_the_sealed_split_is_kept(toy: Task, submission: Path) -> None:
    verifier = TaskVerifier(task=toy, split="test")
    found = verifier.verify("g000-c0", submission)
    assert found.score == 0.0  # the submission answers the dev items only
    assert found.failures == ()
    verifier.close()


@pytest.mark.parametrize("answers", ["{'a': 1}", "['a']", "None"])
def test_answers_that_are_not_text_by_id_break_the_contract(
    toy: Task, submission: Path, answers: str
) -> None:
    verifier = with_verify(toy, f"return {{'score': 0.5, 'answers': {answers}}}")
    found = verifier.verify("c", submission)
    assert found.outcome is Outcome.VERIFIER_FAILED
    assert "breaks its contract" in found.problem
    verifier.close()


def test_a_verifier_cannot_choose_which_failures_are_shown(toy: Task, submission: Path) -> None:
    body = "return {'score': 0.5, 'failures': [{'item': 'x', 'answer': 'y', 'score': 0.0}]}"
    verifier = with_verify(toy, body)
    assert verifier.verify("c", submission).failures == ()
    verifier.close()
