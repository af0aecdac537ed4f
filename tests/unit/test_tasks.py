"""Free tests of every task folder, and the contract itself."""

import shutil
from pathlib import Path

import pytest

from sia.errors import TaskError
from sia.meta.knobs import load_space
from sia.provenance import tree_sha256
from sia.tasks import Task, checks, data, find_task_dir, load_task
from sia.tasks.__main__ import main

TASKS = Path(__file__).resolve().parents[2] / "tasks"
FOLDERS = sorted(path.parent for path in TASKS.glob("*/task.yaml"))
SECONDS = 120  # a verifier that may take longer is one that measures
CONTROLLED = [
    pytest.param(
        folder, marks=pytest.mark.slow if load_task(folder).facts.limits.verify_s > SECONDS else ()
    )
    for folder in FOLDERS
]


def with_data(folder: Path) -> Task:
    task = load_task(folder)
    try:
        task.check_needs()
    except TaskError as error:
        pytest.skip(str(error))
    if task.facts.source.kind == "generated":
        data.ensure(task, ask=False)
    elif not task.has_data():
        pytest.skip(f"no data: dvc repro split@{task.name}")
    return task


@pytest.mark.parametrize("folder", CONTROLLED, ids=lambda folder: folder.name)
def test_the_controls_hit_the_documented_ends_of_the_metric(folder: Path) -> None:
    assert list(checks.controls(with_data(folder))) == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_nothing_private_lies_on_the_public_side(folder: Path) -> None:
    assert list(checks.leaks(with_data(folder))) == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_task_folder_is_complete_and_named_after_its_task(folder: Path) -> None:
    task = load_task(folder)
    assert task.name == folder.name
    for name in ("README.md", "controls.py", "harness/harness.yaml", "harness/space.yaml"):
        assert (folder / name).is_file()
    for harness in task.harnesses.values():
        assert (harness / "harness.yaml").is_file()
    for baseline in task.facts.baselines.values():
        assert (folder / baseline / "target_agent.py").is_file()


def test_the_leak_walk_finds_an_answer_beside_its_id(toy: Task) -> None:
    first = (toy.labels_dir("test") / "labels.csv").read_text().splitlines()[1]
    (toy.public_dir / "hint.csv").write_text(f"x,id,label\n1,{first}\n")
    identity, label = first.split(",")
    (toy.public_dir / "hint.json").write_text(f'{{"{identity}": "{label}"}}\n')
    found = list(checks.leaks(toy))
    assert len(found) == 2
    assert all("beside its private label" in fault for fault in found)


def test_the_leak_walk_finds_a_private_file_and_a_link(toy: Task) -> None:
    shutil.copy(toy.labels_dir("dev") / "labels.csv", toy.public_dir / "notes.txt")
    (toy.public_dir / "link").symlink_to(toy.labels_dir("dev") / "labels.csv")
    found = " ".join(checks.leaks(toy))
    assert "public/notes.txt holds data/private/dev/labels.csv" in found
    assert "public/link is a symbolic link" in found


def test_a_wrong_documented_control_is_found(toy: Task) -> None:
    path = toy.root / "task.yaml"
    path.write_text(path.read_text().replace("oracle: 1.0", "oracle: 0.9"))
    assert "oracle control on dev: 1.0, documented 0.9" in " ".join(
        checks.controls(load_task(toy.root))
    )


def test_a_control_of_a_measured_metric_may_lie_between_two_ends(toy: Task) -> None:
    path = toy.root / "task.yaml"
    text = path.read_text()
    path.write_text(text.replace("oracle: 1.0", "oracle: [0.9, 1.1]"))
    assert list(checks.controls(load_task(toy.root))) == []
    path.write_text(text.replace("oracle: 1.0", "oracle: [1.1, 1.2]"))
    assert "oracle control on dev: 1.0, documented 1.1 to 1.2" in " ".join(
        checks.controls(load_task(toy.root))
    )


def test_the_same_seed_makes_the_same_bytes(toy: Task, tmp_path: Path) -> None:
    before = tree_sha256(toy.root / "data")
    data.split(toy, seed=0)
    assert tree_sha256(toy.root / "data") == before
    data.split(toy, seed=1)
    assert tree_sha256(toy.root / "data") != before


def test_a_split_that_fails_leaves_the_old_one(toy: Task) -> None:
    before = tree_sha256(toy.root / "data")
    path = toy.root / "prepare.py"
    text = path.read_text().replace("rng = random.Random(seed)", "raise ValueError('no rows')")
    path.write_text(text)
    with pytest.raises(TaskError, match="refuses the data: no rows"):
        data.split(toy, seed=0)
    assert tree_sha256(toy.root / "data") == before


def test_revealed_dev_items_are_in_train(toy: Task, tmp_path: Path) -> None:
    out = tmp_path / "revealed"
    data.task_module(toy, "prepare").reveal_dev(toy.public_dir, toy.labels_dir("dev"), out)
    before = (toy.public_dir / "train.csv").read_text().splitlines()
    after = (out / "train.csv").read_text().splitlines()
    assert after[: len(before)] == before
    assert len(after) == len(before) + toy.facts.splits["dev"]
    assert (out / "items.csv").read_bytes() == (toy.public_dir / "items.csv").read_bytes()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("direction: maximize", "direction: sideways", "'sideways' is neither"),
        ("version: 1", "version: one", "breaks the task contract"),
        ("name: toy", "nome: toy", "breaks the task contract"),
        ("version: 1", "version: 1\nharnesses: {llm: nowhere}", "has no nowhere/target_agent.py"),
    ],
)
def test_a_wrong_task_file_is_refused(toy: Task, old: str, new: str, message: str) -> None:
    path = toy.root / "task.yaml"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(TaskError, match=message):
        load_task(toy.root)


def test_missing_parts_and_folders_are_named(toy: Task) -> None:
    (toy.root / "verify.py").unlink()
    with pytest.raises(TaskError, match=r"has no verify\.py"):
        load_task(toy.root)
    with pytest.raises(TaskError, match="no task folder 'tasks/absent'"):
        find_task_dir("tasks/absent")


def test_missing_data_name_the_command_that_gets_them(toy: Task) -> None:
    path = toy.root / "task.yaml"
    path.write_text(path.read_text().replace("kind: generated", "kind: wheel"))
    shutil.rmtree(toy.root / "data")
    with pytest.raises(TaskError, match="Get them: dvc repro split@toy"):
        data.ensure(load_task(toy.root), ask=False)
    with pytest.raises(TaskError, match="Fetch them: dvc repro fetch@toy"):
        data.split(load_task(toy.root), seed=0)


def test_the_command_line_checks_and_lists(
    toy: Task, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(toy.root.parents[1])
    assert main(["check", "toy"]) == 0
    assert main(["list"]) == 0
    assert main(["split", "toy", "--seed", "3"]) == 0
    assert main(["check", "absent"]) == 2
    captured = capsys.readouterr()
    assert "toy: 0 faults" in captured.out
    assert "ready" in captured.out
    assert captured.err.startswith("sia: There is no task folder")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_declared_space_holds_the_reference_and_every_move(folder: Path) -> None:
    harness = folder / "harness"
    space = load_space(harness)
    for number, move in enumerate(space.moves):
        for name, value in move.set.items():
            assert space.knobs[name].allows(value), f"move {number} sets {name}={value!r}"
