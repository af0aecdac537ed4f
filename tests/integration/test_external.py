"""Upstream task folders, unmodified: the four of the wheel and one made by hand."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from sia import rundir
from sia.errors import TaskError
from sia.records import Evaluation, Outcome
from sia.tasks import Task, data, load_task
from sia.tasks.external import open_external
from sia.verify import TaskVerifier

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("gpqa", "lawbench", "longcot-chess", "spaceship-titanic")
CACHE = Path("~/.cache/sia/test-upstream").expanduser()
MEMBERS = {
    "gpqa": ("public/diamond_questions.json", "private/diamond_questions.json"),
    "lawbench": (
        "public/classes.json", "public/test.csv", "public/sample_submission.csv",
        "private/test.csv",
    ),
    "longcot-chess": ("public/chess_hard.json", "private/answers.json"),
    "spaceship-titanic": (
        "public/train.csv", "public/test.csv", "public/sample_submission.csv", "private/test.csv",
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def upstream() -> Path:
    """The folders of the wheel as they are, kept between sessions."""
    facts = yaml.safe_load((ROOT / "tasks" / "lawbench" / "task.yaml").read_text())
    names = [
        f"{folder}/{name}"
        for folder in FOLDERS
        for name in (
            "data/public/task.md",
            *(f"data/{member}" for member in MEMBERS[folder]),
            *(() if folder == "spaceship-titanic" else ("data/public/evaluate.py",)),
            "reference/reference_target_agent.py",
            "reference/SAMPLE_TASK_DESCRIPTIONS.md",
        )
    ]
    facts["source"]["members"] = {name: f"sia/tasks/{name}" for name in names}
    root = CACHE / facts["source"]["sha256"][:16] / "lawbench"
    if not root.is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(
            ROOT / "tasks" / "lawbench", root, ignore=shutil.ignore_patterns("data", "__pycache__")
        )
    (root / "task.yaml").write_text(yaml.safe_dump(facts))
    try:
        return data.fetch(load_task(root))
    except TaskError as error:
        pytest.skip(f"no wheel: {error}")


EVALUATE = """
import argparse, csv, json, pathlib
gen = pathlib.Path(argparse.ArgumentParser().parse_known_args()[1][-1])
here = pathlib.Path(__file__).resolve().parent.parent
truth = {r["id"]: float(r["y"]) for r in csv.DictReader(open(here / "private" / "truth.csv"))}
rows = list(csv.DictReader(open(gen / "submission.csv")))
errors = [abs(float(r["y"]) - truth[r["id"]]) for r in rows]
(gen / "results.json").write_text(json.dumps({"scores": {"mae": sum(errors) / len(errors)}}))
"""
AGENT = """
import argparse, csv, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--dataset_dir", type=pathlib.Path)
parser.add_argument("--working_dir", type=pathlib.Path)
args = parser.parse_args()
rows = list(csv.DictReader((args.dataset_dir / "items.csv").open()))
with (args.working_dir / "submission.csv").open("w") as file:
    print("id,y", file=file)
    for row in rows:
        print(f"{row['id']},{float(row['x']) * SLOPE}", file=file)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in the upstream form whose evaluator reports a mean absolute error."""
    root = tmp_path / "slope"
    write(root / "data/public/task.md", "# Slope\n\nSay y.\n")
    write(root / "data/public/evaluate.py", EVALUATE)
    write(root / "data/public/items.csv", table("id,x", ((f"r{k}", k) for k in range(20))))
    write(root / "data/private/truth.csv", table("id,y", ((f"r{k}", 2 * k) for k in range(20))))
    write(root / "reference/reference_target_agent.py", AGENT.replace("SLOPE", "1"))
    return root


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def table(header: str, rows: Iterator[tuple[object, ...]] | list[tuple[object, ...]]) -> str:
    return "\n".join([header, *(",".join(map(str, row)) for row in rows), ""])


Score = Callable[..., Evaluation]


@pytest.fixture
def score(tmp_path: Path) -> Score:
    """Scores a submission, file name -> text, with the verifier's own process."""

    def run(task: Task, files: dict[str, str], split: str = "dev") -> Evaluation:
        submission = tmp_path / "submission"
        shutil.rmtree(submission, ignore_errors=True)
        for name, text in files.items():
            write(submission / name, text)
        with closing(TaskVerifier(task=task, split=split)) as verifier:
            return verifier.verify("g000-c0", submission)

    return run


def opened(folder: Path, tmp_path: Path, **settings: Any) -> Task:
    return open_external(dir=str(folder), cache=str(tmp_path / "cache"), **settings)


def ids_of(task: Task, split: str = "dev") -> list[str]:
    return json.loads((task.labels_dir(split) / "judge.json").read_text())["ids"]


def test_the_public_side_has_no_evaluator_and_no_private_file(
    upstream: Path, tmp_path: Path
) -> None:
    for name in ("gpqa", "lawbench", "longcot-chess"):
        task = opened(upstream / name, tmp_path)
        public = {path.name for path in task.public_dir.rglob("*")}
        assert "evaluate.py" not in public
        assert {"task.md", "SAMPLE_TASK_DESCRIPTIONS.md"} <= public
        assert not public & {"answers.json", "private"}
        assert task.source_packages == ("sia-agent",)
        assert (task.root / "data" / "private").stat().st_mode & 0o077 == 0
        reference = upstream / name / "reference" / "reference_target_agent.py"
        assert (task.reference_harness / "target_agent.py").read_bytes() == reference.read_bytes()


def test_half_of_the_items_are_sealed(upstream: Path, tmp_path: Path) -> None:
    for name, n in (("gpqa", 198), ("lawbench", 913), ("longcot-chess", 50)):
        task = opened(upstream / name, tmp_path)
        dev, test = set(ids_of(task, "dev")), set(ids_of(task, "test"))
        assert not dev & test
        assert len(dev) + len(test) == n
        assert task.facts.splits == {"dev": len(dev), "test": len(test)}
        assert abs(len(dev) - len(test)) <= 1
        assert task.facts.warnings == ()
        whole = opened(upstream / name, tmp_path, dev_fraction=None)
        assert whole.facts.splits == {"dev": n, "test": n}
        assert "Nothing is sealed" in whole.facts.warnings[0]


def gpqa_answers(upstream: Path, ids: list[str]) -> list[tuple[int, str]]:
    questions = json.loads((upstream / "gpqa/data/private/diamond_questions.json").read_text())
    letters = {str(q["id"]): (q["id"], q["correct_answer_letter"]) for q in questions}
    return [letters[item] for item in ids]


def details(answers: list[tuple[int, str]]) -> str:
    return json.dumps({"details": [{"question_id": q, "model_answer": a} for q, a in answers]})


def test_gpqa_counts_every_question_however_few_are_answered(
    upstream: Path, tmp_path: Path, score: Score
) -> None:
    task = opened(upstream / "gpqa", tmp_path, dev_fraction=None)
    right = gpqa_answers(upstream, ids_of(task))
    whole = score(task, {"results/a.json": details(right)})
    assert (whole.score, whole.n_items, whole.n_answered) == (1.0, 198, 198)
    one = score(task, {"results/a.json": details(right[:1])})
    assert one.metrics["reported"] == 1.0
    assert one.score == pytest.approx(1 / 198)
    assert one.n_answered == 1
    assert one.symptoms["abstained_share"] == pytest.approx(197 / 198)
    assert sum(one.items.values()) == 1
    # The evaluator's details hold the right answers; none of them reaches the record.
    assert "correct_answer" not in str(one)
    contradicting = [*right, (right[0][0], right[0][1]), (right[1][0], "A")]
    assert score(task, {"results/a.json": details(contradicting)}).score == pytest.approx(196 / 198)


def test_gpqa_is_scored_on_the_half_alone(upstream: Path, tmp_path: Path, score: Score) -> None:
    task = opened(upstream / "gpqa", tmp_path)
    dev, test = (gpqa_answers(upstream, ids_of(task, split)) for split in ("dev", "test"))
    files = {"results/a.json": details([*dev, *((q, "E") for q, _ in test)])}
    assert score(task, files).score == 1.0
    assert score(task, files, "test").score == 0.0


def lawbench_truth(upstream: Path) -> list[tuple[str, str]]:
    with (upstream / "lawbench/data/private/test.csv").open(encoding="utf-8", newline="") as file:
        return [(row["id"], row["label"]) for row in csv.DictReader(file)]


def test_lawbench_counts_no_row_twice(upstream: Path, tmp_path: Path, score: Score) -> None:
    task = opened(upstream / "lawbench", tmp_path, dev_fraction=None)
    truth = lawbench_truth(upstream)
    whole = score(task, {"submission.csv": table("id,label", truth)})
    assert whole.score == 1.0
    assert len(whole.items) == 913
    wrong = [(item, "盗窃罪?") for item, _ in truth[1:]]
    inflated = [*wrong, *[truth[0]] * 1000]
    found = score(task, {"submission.csv": table("id,label", inflated)})
    assert (found.score, found.n_answered) == (0.0, 912)
    assert found.metrics["n_repeated"] == 1
    disguised = [truth[0], ("00", truth[0][1]), ("0.0", truth[0][1]), ("+0", truth[0][1])]
    found = score(task, {"predictions.csv": table("id,label", disguised)})
    assert found.score == pytest.approx(1 / 913)
    assert (found.items["0"], found.metrics["n_unknown"]) == (1.0, 3)


def chess(answers: list[tuple[str, Any]]) -> str:
    return json.dumps([{"question_id": q, "prompt": "", "solution": a} for q, a in answers])


def test_chess_counts_every_problem_and_no_answer_twice(
    upstream: Path, tmp_path: Path, score: Score
) -> None:
    task = opened(upstream / "longcot-chess", tmp_path, dev_fraction=None)
    answers = json.loads((upstream / "longcot-chess/data/private/answers.json").read_text())
    right = list(answers.items())
    assert score(task, {"responses.json": chess(right)}).score == 1.0
    two = score(task, {"responses.json": chess(right[-1:] * 2)})
    assert (two.score, two.n_answered) == (0.0, 0)
    one = score(task, {"responses.json": chess(right[-1:])})
    assert one.score == pytest.approx(1 / 50)
    assert one.metrics["reported"] == 100.0
    # An entry that goes by two names answers nothing.
    double = [{"question_id": right[-1][0], "id": q, "solution": right[-1][1]} for q, _ in right]
    assert score(task, {"responses.json": json.dumps(double)}).score == pytest.approx(1 / 50)


def test_spaceship_titanic_has_no_evaluator_and_says_what_to_do(
    upstream: Path, tmp_path: Path, score: Score
) -> None:
    with pytest.raises(TaskError, match="task=spaceship-titanic") as error:
        opened(upstream / "spaceship-titanic", tmp_path)
    assert "task.metric=exact_match" in str(error.value)
    task = opened(upstream / "spaceship-titanic", tmp_path, metric="exact_match")
    assert task.facts.splits == {"dev": 435, "test": 435}
    path = upstream / "spaceship-titanic/data/private/test.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    right = [(row["PassengerId"], row["Transported"]) for row in rows]
    header = "PassengerId,Transported"
    assert score(task, {"submission.csv": table(header, right)}).score == 1.0
    planets = [(row["PassengerId"], row["HomePlanet"]) for row in rows]
    found = score(task, {"submission.csv": table("PassengerId,HomePlanet", planets)})
    assert found.score == 0.0
    sample = (upstream / "spaceship-titanic/data/public/sample_submission.csv").read_text()
    assert 0.4 < (score(task, {"submission.csv": sample}).score or 0) < 0.6


def test_an_evaluator_without_items_must_get_all_answers(
    folder: Path, tmp_path: Path, score: Score
) -> None:
    task = opened(folder, tmp_path, metric="mae", direction="minimize")
    assert (task.metric.direction, task.metric.best) == ("minimize", 0.0)
    rows = [(f"r{k}", 2 * k + 1) for k in range(20)]
    found = score(task, {"submission.csv": table("id,y", rows)})
    assert (found.score, found.n_items) == (1.0, 10)
    first = ids_of(task)[0]
    for bad in ([(first, 2 * int(first[1:]))], [*rows, (first, 0)], [(first, ""), *rows[1:]]):
        found = score(task, {"submission.csv": table("id,y", bad)})
        assert found.outcome is Outcome.BAD_SUBMISSION
        assert "answer all" in found.problem or "exit code" in found.problem


def test_what_the_evaluator_says_when_it_breaks_stays_private(
    folder: Path, tmp_path: Path, score: Score
) -> None:
    task = opened(folder, tmp_path, metric="mae", direction="minimize")
    rows = [(f"r{k}", "much") for k in range(20)]
    found = score(task, {"submission.csv": table("id,y", rows)})
    assert found.outcome is Outcome.BAD_SUBMISSION
    assert "could not convert" not in found.problem
    log = task.labels_dir("dev") / "evaluator.log"
    assert str(log) in found.problem
    assert "could not convert string to float: 'much'" in log.read_text()


def test_an_evaluator_that_never_ends_or_leaves_nothing_is_the_evaluators_fault(
    folder: Path, tmp_path: Path, score: Score
) -> None:
    answer = {"submission.csv": table("id,y", [(f"r{k}", k) for k in range(20)])}
    settings = {"metric": "mae", "direction": "minimize"}
    write(folder / "data/public/evaluate.py", "pass\n")
    found = score(opened(folder, tmp_path, **settings), answer)
    assert found.outcome is Outcome.VERIFIER_FAILED
    assert "left no results.json" in found.problem
    write(folder / "data/public/evaluate.py", EVALUATE.replace('"mae"', '"a": 1, "b"'))
    found = score(opened(folder, tmp_path, **settings), answer)
    assert "no number 'mae', but scores.a, scores.b" in found.problem
    write(folder / "data/public/evaluate.py", "import time\ntime.sleep(60)\n")
    task = opened(folder, tmp_path, **settings)
    path = task.labels_dir("dev") / "judge.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"timeout_s": 0.5}))
    assert "took longer than 0.5 s" in score(task, answer).problem


def test_a_folder_whose_items_are_unknown_warns_and_takes_the_evaluators_number(
    folder: Path, tmp_path: Path, score: Score
) -> None:
    truth = folder / "data/private/truth.csv"
    shutil.copy(truth, folder / "data/private/other.csv")
    lines = truth.read_text().splitlines()
    (folder / "data/private/other.csv").write_text("\n".join(lines[:5]))
    task = opened(folder, tmp_path, metric="mae", direction="minimize")
    assert len(task.facts.warnings) == 2
    found = score(task, {"submission.csv": "id,y\nr3,6\n"})
    assert (found.score, found.n_items) == (0.0, 0)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"data/public/task.md": None}, {}, "has no data/public/task.md"),
        ({"reference/reference_target_agent.py": None}, {}, "has no reference/"),
        ({"data/public/evaluate.py": None}, {}, "writes G/results.json"),
        ({"data/public/evaluate.py": "import absent_package"}, {}, "pip install absent_package"),
        ({}, {"metric": "mae"}, "task.direction=minimize"),
        ({}, {"dev_fraction": 1.5}, "dev_fraction=1.5 must lie between 0 and 1"),
    ],
)
def test_a_folder_that_cannot_be_opened_says_why(
    folder: Path, tmp_path: Path, change: dict[str, str | None], settings: Any, message: str
) -> None:
    for name, text in change.items():
        (folder / name).unlink()
        if text:
            write(folder / name, text)
    with pytest.raises(TaskError, match=message):
        opened(folder, tmp_path, **settings)
    assert not (tmp_path / "cache").exists()


def sia(tmp_path: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *args],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
        check=False, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip


def test_a_run_and_its_exam_on_a_folder_made_by_hand(folder: Path, tmp_path: Path) -> None:
    script = [{"files": {"target_agent.py": AGENT.replace("SLOPE", slope)}} for slope in "32"]
    write(tmp_path / "script.yaml", yaml.safe_dump(script))
    done = sia(
        tmp_path, "sia", "task=external", f"task.dir={folder}", "task.metric=mae",
        "task.direction=minimize", "meta=scripted", "meta.script=script.yaml", "generations=3",
        "tracking=none", "hydra.run.dir=run",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = rundir.read_result(tmp_path / "run")
    assert result is not None
    assert (result.best, result.best_score) == ("g002-c0", 0.0)
    done = sia(tmp_path, "sia.exam", "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no final refit" in done.stdout
    exam = rundir.read_exam(tmp_path / "run")
    assert exam is not None
    assert [row.test for row in exam.rows][-1] == 0.0
    # Another key is another task: the run's records do not fit it.
    (folder / "data/private/truth.csv").write_text(table("id,y", [(f"r{k}", k) for k in range(20)]))
    (tmp_path / "run" / "exam.json").unlink()
    assert "their scores cannot be compared" in sia(tmp_path, "sia.exam", "run").stderr


def test_results_that_the_target_wrote_itself_are_no_submission(
    folder: Path, tmp_path: Path
) -> None:
    agent = AGENT.replace("submission.csv", "results.json").replace("SLOPE", "2")
    write(folder / "reference/reference_target_agent.py", agent)
    done = sia(
        tmp_path, "sia", "task=external", f"task.dir={folder}", "task.metric=mae",
        "task.direction=minimize", "meta=scripted", "generations=1", "tracking=none",
    )  # fmt: skip
    assert done.returncode == 1
    assert "no_submission: 1" in done.stderr


@pytest.mark.parametrize("name", ["gpqa", "lawbench", "longcot-chess"])
def test_a_reference_agent_of_the_wheel_fails_with_its_reason(
    upstream: Path, tmp_path: Path, name: str
) -> None:
    """They call the services of vendors; what is run is theirs, unmodified."""
    done = sia(
        tmp_path, "sia", "task=external", f"task.dir={upstream / name}", "meta=scripted",
        "generations=1", "tracking=none", "hydra.run.dir=run",
    )  # fmt: skip
    assert done.returncode == 1
    assert "crashed: 1" in done.stderr
    (attempt,) = [
        record for key, record in rundir.records(tmp_path / "run").items() if "attempt" in key
    ]
    assert attempt["outcome"] == "crashed"
