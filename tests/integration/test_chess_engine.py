"""A chess engine in a folder of programs: found and asked by the harness inside the sandbox."""

import csv
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hostile.stage import Remembering, Stage, make_task, why_not

from sia.records import Outcome
from sia.sandbox import Bwrap, Process, Sandbox

TESTS = Path(__file__).resolve().parents[1]
HARNESS = TESTS.parent / "tasks" / "longcot-chess" / "harness"
FEN = "rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq - 0 1"
MAKE: dict[str, Callable[[tuple[str, ...]], Sandbox]] = {
    "bwrap": lambda programs: Bwrap(programs=programs),
    "process": lambda programs: Process(programs=programs),
}


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    folder = tmp_path / "programs"
    folder.mkdir()
    engine = folder / "uci-stand-in"
    text = (TESTS / "uci_stand_in.py").read_text(encoding="utf-8")
    engine.write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
    engine.chmod(0o755)
    return folder


def answers(kind: str, root: Path, programs: tuple[str, ...]) -> list[list[str]]:
    if reason := why_not(kind):
        pytest.skip(reason)
    stage = Stage(
        task=make_task(root / "toy"), sandbox=Remembering(MAKE[kind](programs)), root=root
    )
    (stage.task.public_dir / "items.csv").write_text(f"id,prompt\nm1,using this FEN: {FEN}\n")
    harness = root / "harness"
    shutil.copytree(HARNESS, harness)
    config = yaml.safe_load((harness / "harness.yaml").read_text("utf-8"))
    config["engine"].update(use=True, command="uci-stand-in")
    (harness / "harness.yaml").write_text(yaml.safe_dump(config))
    attempt = stage.runner().run("a", harness=harness, out=stage.out("a"), deadline_s=60)
    assert attempt.outcome is Outcome.OK, attempt.reason
    with (stage.out("a") / "submission" / "submission.csv").open(encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


@pytest.mark.parametrize("kind", MAKE)
def test_an_engine_in_a_folder_of_programs_is_asked(
    kind: str, tmp_path: Path, programs: Path
) -> None:
    assert answers(kind, tmp_path, ("/nowhere", str(programs))) == [["m1", "e4 e5 Nf3"]]


@pytest.mark.parametrize("kind", MAKE)
def test_where_no_engine_is_shown_the_item_stays_empty(
    kind: str, tmp_path: Path, programs: Path
) -> None:
    assert ["m1", "e4 e5 Nf3"] not in answers(kind, tmp_path, ())
