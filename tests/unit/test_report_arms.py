"""Runs as arms: what they are called, what is compared, and the tables in their three forms."""

import csv
import hashlib
from pathlib import Path

import pytest
import yaml

from sia import rundir
from sia.records import (
    Candidate,
    Evaluation,
    Exam,
    ExamRow,
    Generation,
    Lever,
    Proposal,
    RunResult,
    to_json,
)  # fmt: skip
from sia.report import arms
from sia.rundir import Journal, RunInfo

GOLDEN = Path(__file__).with_name("golden_report")
CONFIG = {
    "task": {"name": "toy"}, "levers": ["harness", "stop"], "seed": 0,
    "meta": {"_target_": "sia.meta.optuna.OptunaBackend", "patience": 8},
    "search": {"_target_": "sia.search.KeepBest", "candidates": 1},
    "weights": {"_target_": "sia.weights.recipes.NoUpdate", "name": "none"},
}  # fmt: skip


def answers(right: int, of: int, shift: int = 0) -> dict[str, float]:
    """`right` of so many items, the first of them after `shift`."""
    return {f"i{n:02}": float((n - shift) % of < right) for n in range(of)}


def run_at(
    path: Path,
    *,
    seed: int,
    test: int,
    dev: tuple[int, ...] = (20, 24, 22),
    reference: int = 22,
    best_lever: Lever = Lever.HARNESS,
    **config: object,
) -> Path:
    """An examined run of `toy` on 40 dev and 40 test items, from records."""
    path.mkdir(parents=True)
    info = RunInfo(
        run_id=f"toy-{path.name}", task="toy", task_version=1, meta="optuna", target="embedded",
        seed=seed, config_sha256="", created_at="2026-01-01T00:00:00+00:00", protocol=1,
    )  # fmt: skip
    (path / "run.json").write_bytes(to_json(info))
    (path / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "seed": seed, **config}))
    journal = Journal(path / "journal.jsonl")
    best = 0
    for index, right in enumerate(dev):
        name = f"g{index:03}-c0"
        lever = best_lever if index else Lever.HARNESS
        candidate = Candidate(
            id=name, generation=index, index=0, parent=None, lever=lever,
            proposal=Proposal(hypothesis=""),
        )  # fmt: skip
        items = answers(right, 40, shift=index)
        shares = {"大": right / 40, "a_b": 0.5}
        evaluation = Evaluation(
            candidate=name, split="dev", score=right / 40, n_items=40, items=items,
            breakdown={"recall": {c: {"n": 20, "recall": share} for c, share in shares.items()}},
        )  # fmt: skip
        accepted = index == 0 or right > dev[best]
        best = index if accepted else best
        generation = Generation(
            index=index, candidates=(name,), incumbent=f"g{best:03}-c0", best_score=dev[best] / 40,
            accepted=accepted,
        )  # fmt: skip
        journal.step(f"{index:04}/0/candidate", Candidate, lambda made=candidate: made)
        journal.step(f"{index:04}/0/evaluation", Evaluation, lambda made=evaluation: made)
        journal.step(f"{index:04}/generation", Generation, lambda made=generation: made)
    journal.close()
    rows = (
        ExamRow(name="reference harness", candidate="g000-c0", dev=dev[0] / 40,
                test=reference / 40, items=answers(reference, 40)),
        ExamRow(name="best by dev", candidate=f"g{best:03}-c0", dev=dev[best] / 40,
                test=test / 40, low=0.5, high=0.9, items=answers(test, 40)),
    )  # fmt: skip
    result = RunResult(
        status="finished", reason="", best=f"g{best:03}-c0", generations=len(dev), elapsed_s=12.0
    )
    (path / "result.json").write_bytes(to_json(result))
    exam = Exam(
        run_id=info.run_id, task="toy", metric="accuracy", n_items=40, opened_at="",
        sandbox="process", rows=rows,
    )  # fmt: skip
    (path / "exam.json").write_bytes(to_json(exam))
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two arms by three seeds."""
    for seed in range(3):
        run_at(tmp_path / "runs" / f"harness-{seed}", seed=seed, test=29 + seed)
        run_at(
            tmp_path / "runs" / f"both-{seed}", seed=seed, test=30 + seed, best_lever=Lever.WEIGHTS,
            levers=["harness", "weights", "stop"], weights={"_target_": "x.Menu", "name": "auto"},
        )  # fmt: skip
    return tmp_path / "runs"


def names(folder: Path) -> list[str]:
    (report,) = arms.reports([folder])
    return [arm.name for arm in report.arms]


def test_the_tables_are_the_golden_ones(runs: Path, tmp_path: Path) -> None:
    assert arms.main([str(runs), "--out", str(tmp_path / "out")]) == 0
    for golden in sorted(GOLDEN.iterdir()):
        assert (tmp_path / "out" / "toy" / golden.name).read_text() == golden.read_text()
    assert {path.suffix for path in GOLDEN.iterdir()} == {".md", ".tex", ".csv"}


def test_the_same_runs_give_the_same_bytes(runs: Path, tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        assert arms.main([str(runs), "--out", str(tmp_path / name)]) == 0
        files = sorted((tmp_path / name / "toy").iterdir())
        digests.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files})
    assert digests[0] == digests[1]
    figures = {"by_generation", "by_wall_time", "by_class", "dev_and_test"}
    assert {name for name in digests[0] if name.endswith(("pdf", "png"))} == {
        f"{figure}.{kind}" for figure in figures for kind in ("pdf", "png")
    }


def test_every_number_names_its_runs(runs: Path, tmp_path: Path) -> None:
    arms.main([str(runs), "--out", str(tmp_path)])
    with (tmp_path / "toy" / "comparisons.csv").open() as file:
        found = {(row["arm"], row["against"]): row["runs"].split() for row in csv.DictReader(file)}
    assert found["harness", "reference"] == ["toy-harness-0", "toy-harness-1", "toy-harness-2"]
    assert set(found["both", "harness"]) == {
        path.name.join(("toy-", "")) for path in runs.iterdir()
    }
    text = (tmp_path / "toy" / "arms.md").read_text()
    assert "harness: toy-harness-0, toy-harness-1, toy-harness-2." in text


def test_levers_name_the_arms_and_a_lever_without_weights_is_none(tmp_path: Path) -> None:
    run_at(tmp_path / "runs" / "a", seed=0, test=30)
    run_at(tmp_path / "runs" / "b", seed=1, test=30, levers=["harness", "weights", "stop"])
    assert names(tmp_path / "runs") == ["reference", "harness"]


def test_other_choices_are_named_by_their_option_and_values_by_their_key(tmp_path: Path) -> None:
    chain = {"_target_": "sia.search.Chain"}
    eager = {**CONFIG["meta"], "patience": 2}  # type: ignore[dict-item]  # a dictionary, above
    run_at(tmp_path / "runs" / "a", seed=0, test=30)
    run_at(tmp_path / "runs" / "b", seed=0, test=30, search=chain)
    run_at(tmp_path / "runs" / "c", seed=0, test=30, search=chain, meta=eager)
    assert sorted(names(tmp_path / "runs")) == [
        "meta.patience=2, chain", "meta.patience=8, chain", "meta.patience=8, keep_best",
        "reference",
    ]  # fmt: skip


def test_arms_can_be_named_and_compared_with_one(runs: Path) -> None:
    named = [f"ours={runs / 'both-0'},{runs / 'both-1'}", f"theirs={runs / 'harness-1'}"]
    (report,) = arms.reports([], named, ["theirs"])
    assert [arm.name for arm in report.arms] == ["reference", "ours", "theirs"]
    (row,) = report.tables[1].rows
    assert (row.arm, row.against, row.seeds, row.items) == ("ours", "theirs", 1, 40)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "No run was named"),
        (["--arm", "x"], "NAME=RUN,RUN"),
        (["--arm", "reference=a"], "NAME=RUN,RUN"),
        (["{runs}", "--against", "nobody"], "Its arms: reference, harness, both"),
        (["--arm", "x={runs}/harness-0,{runs}/both-0"], "both seed 0 of arm 'x'"),
    ],
)
def test_a_users_mistake_is_one_message(
    runs: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert arms.main([arg.format(runs=runs) for arg in args]) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_a_test_score_is_named_and_not_counted(runs: Path) -> None:
    path = runs / "both-2"
    found = rundir.read_exam(path)
    assert found is not None
    failed = ExamRow(name="best by dev", candidate="g001-c0", dev=0.6, note="crashed: exit code 1")
    exam = Exam(**{**vars(found), "rows": (found.rows[0], failed)})
    (path / "exam.json").write_bytes(to_json(exam))
    (report,) = arms.reports([runs])
    table = report.tables[0]
    assert {row.arm: row.seeds for row in table.rows} == {"reference": 3, "harness": 3, "both": 2}
    assert any("Left out, without a test score: toy-both-2" in note for note in table.notes)
    assert any(row.note == "crashed: exit code 1" for row in report.tables[2].rows)


def test_runs_on_other_items_are_refused(runs: Path) -> None:
    path = runs / "both-2"
    found = rundir.read_exam(path)
    assert found is not None
    other = ExamRow(name="best by dev", test=0.5, items={"x": 0.5})
    exam = Exam(**{**vars(found), "rows": (found.rows[0], other)})
    (path / "exam.json").write_bytes(to_json(exam))
    with pytest.raises(arms.RunDirectoryError, match="not examined on the same items"):
        list(arms.reports([runs]))


def test_scores_that_are_no_mean_of_items_are_compared_over_seeds(runs: Path) -> None:
    for path in sorted(runs.iterdir()):
        found = rundir.read_exam(path)
        assert found is not None
        rows = tuple(ExamRow(**{**vars(row), "items": {}}) for row in found.rows)
        (path / "exam.json").write_bytes(to_json(Exam(**{**vars(found), "rows": rows})))
    (report,) = arms.reports([runs])
    (harness, *_) = report.tables[1].rows
    assert (harness.items, harness.seeds) == (1, 3)
    assert harness.p_items is None
    assert harness.low < harness.gain < harness.high


def test_latex_escapes_what_it_would_read() -> None:
    from sia.report.tables import escape

    text = "50 % of a_b & c#1 -0.5 g000-c0"
    assert escape(text) == r"50 \% of a\_b \& c\#1 $-$0.5 g000-c0"
