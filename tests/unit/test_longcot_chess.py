"""`longcot-chess`: distances, tours, notation, split and verifier on small made-up problems."""

import csv
import importlib
import itertools
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from sia.tasks import load_task
from sia.tasks.data import task_module

TASK = Path(__file__).parents[2] / "tasks" / "longcot-chess"
HARNESS = TASK / "harness"
MODULES = tuple(path.stem for path in HARNESS.glob("*.py"))
CONFIG = yaml.safe_load((HARNESS / "harness.yaml").read_text(encoding="utf-8"))
START = "rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq - 0 1"


@pytest.fixture(scope="module")
def harness() -> Iterator[dict[str, ModuleType]]:
    """The harness's modules by name; sys.path and sys.modules are put back afterwards."""
    hidden = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(HARNESS))
    yield {name: importlib.import_module(name) for name in MODULES}
    sys.path.remove(str(HARNESS))
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(hidden)


def knight_prompt(squares: list[tuple[int, int]], size: int = 20) -> str:
    targets = ", ".join(map(str, squares[1:]))
    return f"A knight on a board of size {size}x{size}\nStart: {squares[0]}\nTargets: [{targets}]"


def random_distances(harness: dict[str, ModuleType], n: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    cells = rng.choice(400, n, replace=False)
    squares = [divmod(int(cell), 20) for cell in cells]
    problem = harness["knights"].read_knight(knight_prompt(squares))
    return harness["knights"].distances(problem, method="bfs")


def settings(harness: dict[str, ModuleType], **changes: Any) -> Any:
    return harness["tours"].Tours(**{**CONFIG["tour"], **changes})


def held_karp(D: Any) -> int:
    """The shortest open tour from square 0 by dynamic programming over sets."""
    n = len(D)
    best = {(1 << i, i): int(D[0, i]) for i in range(1, n)}
    for size in range(2, n):
        for members in itertools.combinations(range(1, n), size):
            bits = sum(1 << i for i in members)
            for last in members:
                rest = bits ^ (1 << last)
                best[bits, last] = min(
                    best[rest, before] + int(D[before, last])
                    for before in members
                    if before != last
                )
    full = (1 << n) - 2
    return min(best[full, last] for last in range(1, n))


@pytest.mark.parametrize("size", [5, 6, 8, 11])
def test_the_formula_agrees_with_the_search_on_every_pair_of_squares(
    harness: dict[str, ModuleType], size: int
) -> None:
    squares = np.array([(i, j) for i in range(size) for j in range(size)])
    formula = harness["knights"].formula(squares, size)
    for source, row in zip(squares.tolist(), formula, strict=True):
        searched = harness["knights"].breadth_first(size, tuple(source))
        np.testing.assert_array_equal(searched.ravel(), row)


@pytest.mark.parametrize("source", [(0, 0), (0, 1), (1, 1), (0, 57), (99, 99), (42, 17)])
def test_the_formula_agrees_with_the_search_on_the_large_board(
    harness: dict[str, ModuleType], source: tuple[int, int]
) -> None:
    knights = harness["knights"]
    targets = list(np.ndindex(100, 100))[::7]
    found = [knights.formula(np.array([source, target]), 100)[0, 1] for target in targets]
    np.testing.assert_array_equal(knights.breadth_first(100, source).ravel()[::7], found)


@pytest.mark.parametrize("seed", range(8))
def test_the_exact_tour_is_as_short_as_dynamic_programming_finds(
    harness: dict[str, ModuleType], seed: int
) -> None:
    D = random_distances(harness, 9, seed)
    answer = harness["tours"].solve(
        D, settings=settings(harness, exact=True), rng=np.random.default_rng(0)
    )
    assert answer.length == answer.bound == held_karp(D)
    assert answer.tour[0] == 0
    assert sorted(answer.tour) == list(range(9))
    assert harness["tours"].length(D, answer.tour) == answer.length


def test_local_steps_shorten_tours_and_keep_all_squares(harness: dict[str, ModuleType]) -> None:
    D = random_distances(harness, 25, 3)
    rng = np.random.default_rng(0)
    greedy = harness["tours"].solve(D, settings=settings(harness), rng=rng)
    local = harness["tours"].solve(
        D, settings=settings(harness, starts=3, two_opt=True, or_opt=True, kicks=5), rng=rng
    )
    assert local.bound <= local.length < greedy.length
    assert sorted(local.tour) == list(range(25))


def test_a_problem_out_of_time_keeps_its_tour_and_an_honest_bound(
    harness: dict[str, ModuleType],
) -> None:
    D = random_distances(harness, 25, 3)
    rng = np.random.default_rng(0)
    answer = harness["tours"].solve(D, settings=settings(harness, exact=True, exact_s=0.0), rng=rng)
    assert answer.bound < answer.length


def test_problems_of_one_or_two_squares_are_solved(harness: dict[str, ModuleType]) -> None:
    for squares, expected in ([[(3, 3), (3, 3)], 0], [[(0, 0), (1, 1)], 4], [[(0, 0), (1, 2)], 1]):
        problem = harness["knights"].read_knight(knight_prompt(squares))
        D = harness["knights"].distances(problem, method="formula")
        rng = np.random.default_rng(0)
        answer = harness["tours"].solve(D, settings=settings(harness, exact=True), rng=rng)
        assert answer.length == expected


def test_a_prompt_of_another_kind_is_no_knight_problem(harness: dict[str, ModuleType]) -> None:
    assert harness["knights"].read_knight(f"Position: FEN: {START}\nGive the moves") is None
    assert harness["engine"].read_fen(f"using this FEN: {START}\nGive") == START


@pytest.mark.parametrize(
    ("fen", "legal", "move", "check", "expected"),
    [
        (START, ("g1f3", "g1h3"), "g1f3", False, "Nf3"),
        ("4k3/8/8/1pP5/8/8/8/4K3 w - b6 0 1", (), "c5b6", False, "cxb6"),
        ("4k3/P7/8/8/8/8/8/4K3 w - - 0 1", (), "a7a8q", True, "a8=Q+"),
        ("4k3/8/8/8/8/8/8/R3K2R w KQ - 0 1", (), "e1c1", False, "O-O-O"),
        ("4k3/8/8/1N6/8/8/8/1N2K3 w - - 0 1", ("b1c3", "b5c3"), "b1c3", False, "N1c3"),
        ("4k3/8/8/8/8/8/8/N3K1N1 w - - 0 1", ("a1c2", "g1e2", "g1c2"), "a1c2", False, "Nac2"),
    ],
)
def test_moves_are_written_in_algebraic_notation(
    harness: dict[str, ModuleType],
    fen: str,
    legal: tuple[str, ...],
    move: str,
    check: bool,
    expected: str,
) -> None:
    engine = harness["engine"]
    before = engine.Position(engine.read_board(fen), legal, False)
    after = engine.Position({}, ("e8d8",), check)
    assert engine.notation(move, before, after) == expected


def test_a_mate_is_marked(harness: dict[str, ModuleType]) -> None:
    engine = harness["engine"]
    before = engine.Position(engine.read_board("6k1/5ppp/8/8/8/8/8/R3K3 w - - 0 1"), (), False)
    assert engine.notation("a1a8", before, engine.Position({}, (), True)) == "Ra8#"


def test_an_engine_is_asked_and_its_absence_is_an_abstention(
    harness: dict[str, ModuleType], tmp_path: Path
) -> None:
    fake = tmp_path / "engine"
    program = (Path(__file__).parents[1] / "uci_stand_in.py").read_text(encoding="utf-8")
    fake.write_text(f"#!{sys.executable}\n{program}", encoding="utf-8")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    engine = harness["engine"]
    given = {**CONFIG["engine"], "use": True}
    assert engine.best_line(START, engine.Engine(**{**given, "command": str(fake)})) == "e4 e5 Nf3"
    absent = engine.Engine(**{**given, "command": str(tmp_path / "absent")})
    assert engine.best_line(START, absent) is None
    # One that ends at once.
    silent = engine.Engine(**{**given, "command": "/bin/true"})
    assert engine.best_line(START, silent) is None


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of made-up raw files: 12 knight problems of five targets, 4 of moves."""
    folder = tmp_path_factory.mktemp("chess")
    rng = np.random.default_rng(1)
    questions, answers = [], {}
    for k in range(12):
        squares = [divmod(int(cell), 20) for cell in rng.choice(400, 6, replace=False)]
        questions.append({"question_id": f"k{k}", "prompt": knight_prompt(squares)})
        answers[f"k{k}"] = str(20 + k)
    for k in range(4):
        questions.append({"question_id": f"m{k}", "prompt": f"FEN: {START}\nMoves of game {k}"})
        answers[f"m{k}"] = ["e4", "e5", f"N{'abcd'[k]}3"]  # type: ignore[assignment]
    (folder / "raw").mkdir()
    (folder / "raw" / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
    (folder / "raw" / "answers.json").write_text(json.dumps(answers), encoding="utf-8")
    prepare = task_module(load_task(TASK), "prepare")
    prepare.prepare(folder / "raw", folder / "public", folder / "private", seed=0)
    prepare.reveal_dev(folder / "public", folder / "private" / "dev", folder / "revealed")
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_split_is_by_kind_and_train_has_proven_answers(
    split: Path, harness: dict[str, ModuleType]
) -> None:
    dev, test = (rows(split / "private" / side / "labels.csv") for side in ("dev", "test"))
    assert sorted(row["kind"] for row in dev) == ["knight"] * 9 + ["moves"] * 3
    assert len(test) == 4
    items = {row["id"] for row in rows(split / "public" / "items.csv")}
    assert items == {row["id"] for row in dev + test}
    train = rows(split / "public" / "train.csv")
    assert len(train) == 24
    for row in train[:3]:
        problem = harness["knights"].read_knight(row["prompt"])
        D = harness["knights"].distances(problem, method="formula")
        assert int(row["label"]) == held_karp(D)
    assert len(rows(split / "revealed" / "train.csv")) == 24 + 12


def test_raw_files_that_contradict_each_other_are_refused(split: Path, tmp_path: Path) -> None:
    prepare = task_module(load_task(TASK), "prepare")
    for name, content in (("questions.json", "[]"), ("answers.json", '{"k0": "1"}')):
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="name different items"):
        prepare.read_raw(tmp_path)


def verified(split: Path, folder: Path, changes: dict[str, list[str]]) -> dict[str, Any]:
    """The oracle's submission for dev with some answers replaced by none, one or two."""
    truth = {row["id"]: [row["label"]] for row in rows(split / "private" / "dev" / "labels.csv")}
    lines = [(item, answer) for item, given in (truth | changes).items() for answer in given]
    with (folder / "submission.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "answer"), *lines])
    return task_module(load_task(TASK), "verify").verify(  # type: ignore[no-any-return]
        folder, split / "private" / "dev"
    )


def test_every_item_counts_and_order_matters(split: Path, tmp_path: Path) -> None:
    dev = rows(split / "private" / "dev" / "labels.csv")
    knights = [row for row in dev if row["kind"] == "knight"]
    moves = [row for row in dev if row["kind"] == "moves"]
    assert verified(split, tmp_path, {})["score"] == 1
    backwards = " ".join(reversed(moves[0]["label"].split()))
    found = verified(
        split,
        tmp_path,
        {
            moves[0]["id"]: [backwards],
            moves[1]["id"]: [],
            knights[0]["id"]: [knights[0]["label"]] * 2,
            knights[1]["id"]: [f"solution = {knights[1]['label']}"],
            knights[2]["id"]: [str(int(knights[2]["label"]) + 3)],
            "stranger": ["1"],
        },
    )
    assert found["score"] == pytest.approx(7 / 12)
    assert (found["n_items"], found["n_answered"]) == (12, 9)
    metrics = found["metrics"]
    assert (metrics["n_duplicated"], metrics["n_unreadable"], metrics["n_missing"]) == (1, 1, 1)
    assert found["symptoms"]["too_long_share"] == pytest.approx(1 / 7)
    assert found["symptoms"]["mean_excess"] == pytest.approx(3 / 7)


def test_a_submission_that_cannot_be_read_is_refused(split: Path, tmp_path: Path) -> None:
    verify = task_module(load_task(TASK), "verify").verify
    labels = split / "private" / "dev"
    with pytest.raises(ValueError, match="missing"):
        verify(tmp_path, labels)
    (tmp_path / "submission.csv").write_bytes(b"id,answer\n\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        verify(tmp_path, labels)
    (tmp_path / "submission.csv").write_text("id,solution\n", encoding="utf-8")
    with pytest.raises(ValueError, match="the header is"):
        verify(tmp_path, labels)


def test_the_harness_answers_every_item(split: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(HARNESS / "target_agent.py")]
    command += ["--dataset_dir", str(split / "public"), "--working_dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(command, check=True, env=environment)
    answers = {row["id"]: row["answer"] for row in rows(tmp_path / "submission.csv")}
    items = rows(split / "public" / "items.csv")
    assert list(answers) == [row["id"] for row in items]
    for row in items:
        assert bool(answers[row["id"]]) == ("knight" in row["prompt"])
    assert len(list((tmp_path / "agent_execution").iterdir())) == CONFIG["trajectories"]
